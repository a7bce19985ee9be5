// A step of LAMB in two passes over each tensor: one moves its moments and forms its update and both norms, the other
// moves the tensor. Every result is rounded to the type of the tensor, and norms are summed in an order that does not
// depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Bfloat16 {
    uint16_t bits;
};

inline float load(const Bfloat16 &x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline float load(const float &x) { return x; }
inline double load(const double &x) { return x; }

inline void store(Bfloat16 &x, float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    x.bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}
inline void store(float &x, float value) { x = value; }
inline void store(double &x, double value) { x = value; }

struct Row {  // a row of the table that Python passes, 8 numbers of 64 bits
    void *parameter, *grad, *exp_avg, *exp_avg_sq, *term, *update;
    const float *step;
    int64_t numel;
};

struct Options {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t moves;
};

constexpr int64_t kBlock = 1 << 14;  // elements that a thread takes at a time, and whose squares are summed in one go

template <typename T, typename W>
void direction(const Row &row, const Options &options, int64_t begin, int64_t end, double *squares) {
    const T *p = static_cast<const T *>(row.parameter), *g = static_cast<const T *>(row.grad);
    const T *term = static_cast<const T *>(row.term);
    T *m = static_cast<T *>(row.exp_avg), *v = static_cast<T *>(row.exp_avg_sq), *u = static_cast<T *>(row.update);
    const double step = *row.step;
    const W rate = 1 / (1 - std::pow(options.beta1, step)), root = std::sqrt(1 / (1 - std::pow(options.beta2, step)));
    const W keep1 = options.beta1, take1 = 1 - options.beta1, keep2 = options.beta2, take2 = 1 - options.beta2;
    const W eps = options.eps, weight_decay = options.weight_decay;
    W of_parameter = 0, of_update = 0;
#pragma omp simd reduction(+ : of_parameter, of_update)
    for (int64_t i = begin; i < end; ++i) {
        const W grad = load(g[i]), value = load(p[i]);
        const W first = keep1 * load(m[i]) + take1 * grad, second = keep2 * load(v[i]) + take2 * grad * grad;
        store(u[i], first * rate / (std::sqrt(second) * root + eps) + weight_decay * load(term[i]));
        store(m[i], first);
        store(v[i], second);
        const W update = load(u[i]);
        of_parameter += value * value;
        of_update += update * update;
    }
    squares[0] = of_parameter;
    squares[1] = of_update;
}

template <typename T, typename W>
void move(const Row &row, W rate, int64_t begin, int64_t end) {
    T *p = static_cast<T *>(row.parameter);
    const T *u = static_cast<const T *>(row.update);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(p[i], load(p[i]) + rate * load(u[i]));
}

double rate_of(const double *squares, const Options &options) {
    const double parameter = std::sqrt(squares[0]), update = std::sqrt(squares[1]);
    const bool trusted = options.weight_decay != 0 && parameter > 0 && update > 0;
    return -options.lr * (trusted ? parameter / update : 1);
}

template <typename T, typename W>
void steps(const Row *rows, int64_t count, const Options &options, double *squares, int threads) {
    std::vector<double> parts;
    for (const Row *row = rows; row != rows + count; ++row, squares += 2) {
        const int64_t blocks = (row->numel + kBlock - 1) / kBlock;
        const auto end = [row](int64_t block) { return std::min((block + 1) * kBlock, row->numel); };
        parts.resize(2 * blocks);
#pragma omp parallel for num_threads(threads) if (blocks > 1)
        for (int64_t block = 0; block < blocks; ++block)
            direction<T, W>(*row, options, block * kBlock, end(block), &parts[2 * block]);
        squares[0] = squares[1] = 0;
        for (int64_t block = 0; block < blocks; ++block)
            squares[0] += parts[2 * block], squares[1] += parts[2 * block + 1];
        if (!options.moves) continue;
        const W rate = rate_of(squares, options);
#pragma omp parallel for num_threads(threads) if (blocks > 1)
        for (int64_t last = 0; last < blocks; ++last) {  // backwards: the cache holds what was written last
            const int64_t block = blocks - 1 - last;
            move<T, W>(*row, rate, block * kBlock, end(block));
        }
    }
}

}  // namespace

extern "C" {
void lamb_float32(const Row *rows, int64_t count, const Options *options, double *squares, int threads) {
    steps<float, float>(rows, count, *options, squares, threads);
}
void lamb_float64(const Row *rows, int64_t count, const Options *options, double *squares, int threads) {
    steps<double, double>(rows, count, *options, squares, threads);
}
void lamb_bfloat16(const Row *rows, int64_t count, const Options *options, double *squares, int threads) {
    steps<Bfloat16, float>(rows, count, *options, squares, threads);
}
}
