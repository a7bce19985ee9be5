"""Train an image classifier as Khodak et al. 2021 do, with its images on the device and its steps as a CUDA graph.

    python -m benchmarks.training.vision --rank-scale 0.1111 --init spectral --decay frobenius --epochs 100 --out DIR

SGD with momentum, a rate that falls at milestones, random crops and mirroring. ``--decay`` is that of the factors; all
other parameters are under weight decay:

- ``none``; ``weight`` on each factor; ``frobenius`` on the products (K21, Def. 3.2), added to the gradient;
- ``normalized``: none, but after every step all factors of a product are scaled by one number so that its Frobenius
  norm is what it was after that step of the run ``--norms-from``, which was under Frobenius decay (K21, Fig. 3).

Measures are those after the last epoch; with ``_mid`` behind their names those when the rate first falls. Means over
the products: ``nuclear_norm``, ``nuclear_norm_bound`` (K21, Eq. 2), ``bound_ratio`` of the second to the first,
``frobenius_norm``, ``effective_rank``, ``effective_step_size`` (rate over squared Frobenius norm).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.grid_runs import BROKEN_OFF
from benchmarks.training.common import (
    EAGER_STEPS,
    Broken,
    CaptureFailed,
    RepeatedStep,
    Run,
    run_parser,
    run_program,
)
from benchmarks.training.images import CROP_PADDING, FLIPPED, Batches, normalize, read_images
from hf_fnl import (
    FactorizationConfig,
    Factorized,
    FactorizedConv2d,
    Product,
    diagnose,
    factorize_,
    find_products,
)
from hf_fnl.math.factors import decay_gradients, squared_frobenius_norm
from hf_fnl.vision.models import PRESETS, inner_convolutions, vision_model

RUNNER_OPTIONS = ("out", "device", "data", "deadline", "norms_from")  # which say where, not what
NORMS_FILE = "norms.pt"
SEVERAL = "--several"  # with a file as in train_several
PROGRAM = "benchmarks.training.vision"
DECAYS = ("none", "weight", "frobenius", "normalized")
COMPOSE = {"auto": None, "always": True, "never": False}
FIGURES = ("nuclear_norm", "nuclear_norm_bound", "frobenius_norm", "effective_rank", "effective_step_size")
EVERY = 5  # epochs from one evaluation and diagnosis to the next
AHEAD = 50  # steps after which the host waits until the device has done those before
MOST_TOGETHER = 16  # torch hands out 32 streams, of which a run takes one to capture and one to train
EVALUATED_AT_ONCE = 1000
MINUTES_TO_CHECKPOINT = 5
AGREEMENT = 0.05  # relative difference of an update by the graph from the same one without, which sums in another order


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the options.

    Raises:
        ValueError: If an option is out of range or needs another.
    """
    parser = run_parser(__doc__)
    parser.add_argument("--images", choices=tuple(CROP_PADDING), default="cifar10")
    parser.add_argument("--model", choices=tuple(PRESETS), default="resnet20")
    parser.add_argument("--width", type=int, help="channels of the first convolution")
    parser.add_argument("--rank-scale", type=float, help="of all convolutions but the first; they stay dense without")
    parser.add_argument(
        "--scheme", choices=("spatial", "channel"), default="spatial", help="K21's or K22's matrix of a kernel"
    )
    parser.add_argument(
        "--init", default="spectral", help="of the factors, such as spectral, spectral_ones, default or he"
    )
    parser.add_argument("--compose", choices=tuple(COMPOSE), default="auto", help="multiply factors out in a step")
    parser.add_argument("--decay", choices=DECAYS, default="weight", help="of the factors")
    parser.add_argument("--norms-from", type=Path, help="folder of the run that --decay normalized follows")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="coefficient of all decay")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--milestones", type=float, nargs="*", default=[0.5, 0.75], help="shares of the epochs")
    parser.add_argument("--gamma", type=float, default=0.1, help="factor of the rate at a milestone")
    parser.add_argument("--precision", choices=("tf32", "bf16"), default="tf32", help="of convolutions on a GPU")
    parser.add_argument("--limit", type=int, help="only this many images of each split")
    args = parser.parse_args(argv)
    if (args.decay == "normalized") != (args.norms_from is not None):
        raise ValueError("--decay normalized and --norms-from need each other")
    if args.rank_scale is None and args.decay != "weight":
        raise ValueError(f"--decay {args.decay} is of factors: give --rank-scale")
    if args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    return args


class Products:
    """The products of a model, of which those with equal shapes are computed at once.

    Args:
        model: Holds them.
    """

    def __init__(self, model: nn.Module) -> None:
        has_any = any(isinstance(module, Factorized) for module in model.modules())
        self.all: list[Product] = find_products(model, kinds=("conv",)) if has_any else []
        names = dict(model.named_parameters())
        self.factors = [tuple(names[name] for name in product.parameter_names) for product in self.all]

        def shapes(number: int) -> list[torch.Size]:
            return [factor.shape for factor in self.factors[number]]

        order = sorted(range(len(self.all)), key=shapes)
        self._groups = [list(numbers) for _, numbers in groupby(order, key=shapes)]
        self._order = [number for numbers in self._groups for number in numbers]
        self.parameters = [factor for number in self._order for factor in self.factors[number]]

    def _stacked(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.stack(alike) for alike in zip(*(self.factors[n] for n in numbers), strict=True))

    def decay_gradients(self) -> list[Tensor]:
        """Return the gradients of ``||W||_F^2 / 2``, in the order of ``parameters``."""
        found = [zip(*decay_gradients(*self._stacked(numbers)), strict=True) for numbers in self._groups]
        return [gradient for group in found for of_product in group for gradient in of_product]

    def norms(self) -> Tensor:
        """Return the Frobenius norms ``(products,)``, in the order of the groups."""
        return torch.cat([squared_frobenius_norm(*self._stacked(numbers)) for numbers in self._groups]).sqrt()

    def rescale_(self, norms: Tensor) -> None:
        """Give every product a norm, in the order of the groups; its factors are scaled by the same number."""
        scales = (norms / self.norms()).sqrt().unbind()
        for number, scale in enumerate(scales):
            for factor in self.parameters[2 * number : 2 * number + 2]:
                factor.mul_(scale)

    @property
    def names(self) -> list[str]:
        """Names of the products, in the order of the groups."""
        return [self.all[number].name for number in self._order]


class Training:
    """A model, its batches and its update, all of whose state lies in tensors that stay where they are.

    Args:
        model: What is trained, on its device.
        batches: Of which an epoch consists.
        decay: That of the factors, one of ``DECAYS``.
        weight_decay: Coefficient of all decay.
        momentum: Of SGD.
        norms: Frobenius norms ``(steps, products)`` that a normalized run follows or one under Frobenius decay fills.
        bf16: Whether the model computes in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        decay: str,
        weight_decay: float,
        momentum: float,
        norms: Tensor | None = None,
        bf16: bool = False,
    ) -> None:
        self.model, self.batches, self.decay, self.norms = model, batches, decay, norms
        self.weight_decay, self.momentum, self.bf16 = weight_decay, momentum, bf16
        self.products = Products(model)
        of_products = set(self.products.parameters)
        others = [parameter for parameter in model.parameters() if parameter not in of_products]
        self.parameters = [*self.products.parameters, *others]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        device = batches.position.device
        self.rate, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name."""
        counters = {"rate": self.rate, "loss": self.loss, "count": self.count, "position": self.batches.position}
        velocities = {f"velocity.{number}": velocity for number, velocity in enumerate(self.velocities)}
        norms = {"norms": self.norms} if self.norms is not None and self.decay == "frobenius" else {}
        return {**counters, **velocities, **norms, **{f"model.{k}": v for k, v in self.model.state_dict().items()}}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Copy a state into the tensors."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def step(self) -> None:
        """Make one update."""
        images, labels = self.batches.take()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            logits = self.model(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            self.loss.add_(loss)
            self._move(self._with_decay(list(gradients)))
            if self.norms is not None:
                self._keep_norms()
            self.count.add_(1)

    def _with_decay(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients with those of decay, which are coupled: momentum sees them."""
        count = len(self.products.parameters)
        factors, others = gradients[:count], gradients[count:]
        others = list(torch._foreach_add(others, self.parameters[count:], alpha=self.weight_decay))
        if self.decay in ("weight", "frobenius") and factors:
            terms = self.products.decay_gradients() if self.decay == "frobenius" else self.products.parameters
            factors = list(torch._foreach_add(factors, terms, alpha=self.weight_decay))
        return [*factors, *others]

    def _move(self, gradients: list[Tensor]) -> None:
        """SGD with momentum; the rate is read on the device."""
        torch._foreach_mul_(self.velocities, self.momentum)
        torch._foreach_add_(self.velocities, gradients)
        torch._foreach_sub_(self.parameters, torch._foreach_mul(self.velocities, self.rate))

    def _keep_norms(self) -> None:
        assert self.norms is not None
        if self.decay == "normalized":
            self.products.rescale_(self.norms.index_select(0, self.count)[0])
        else:
            self.norms.index_copy_(0, self.count, self.products.norms()[None])

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy in percent and mean loss on 8-bit images."""
        self.model.eval()
        hits, loss = torch.zeros((), device=labels.device), torch.zeros((), device=labels.device)
        pairs = zip(images.split(EVALUATED_AT_ONCE), labels.split(EVALUATED_AT_ONCE), strict=True)
        for pixels, classes in pairs:
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(pixel_values=normalize(pixels, self.batches.statistics)).logits.float()
            hits += (logits.argmax(1) == classes).sum()
            loss += F.cross_entropy(logits, classes, reduction="sum")
        self.model.train()
        return {"accuracy": 100 * hits.item() / len(labels), "test_loss": loss.item() / len(labels)}

    def diagnose(self) -> dict[str, float]:
        """Means of ``FIGURES`` and of ``bound_ratio`` over the products, computed on the CPU; nothing without any."""
        if not self.products.all:
            return {}
        factors = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.ndim == 2}
        each = diagnose(factors, self.products.all, learning_rate=self.rate.item()).values()
        means = {name: statistics.fmean(figures[name] for figures in each) for name in FIGURES}
        ratios = [
            figures["nuclear_norm_bound"] / figures["nuclear_norm"] for figures in each if figures["nuclear_norm"]
        ]
        return {**means, "bound_ratio": statistics.fmean(ratios) if ratios else math.nan}


def read_norms(folder: Path) -> tuple[list[str], Tensor]:
    """Return the products of a run under Frobenius decay, and their norms ``(steps, products)``.

    Raises:
        FileNotFoundError: If the run recorded none.
    """
    path = folder / NORMS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"--norms-from {folder} holds no {NORMS_FILE}: it is to be a run of --decay frobenius")
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found["names"], found["norms"]


def build_model(args: argparse.Namespace, num_labels: int, image_shape: Sequence[int]) -> nn.Module:
    """Return the model that the options describe, freshly drawn with the seed, in training mode."""
    torch.manual_seed(args.seed)
    height, _, channels = image_shape
    model = vision_model(args.model, num_labels=num_labels, image_size=height, num_channels=channels, width=args.width)
    if args.rank_scale is not None:
        config = FactorizationConfig(
            kinds=("conv",),
            include=inner_convolutions(model),
            conv_scheme=args.scheme,
            init=args.init,
            rank_scale=args.rank_scale,
        )
        factorize_(model, config)
    for module in model.modules():
        if isinstance(module, FactorizedConv2d):
            module.compose = COMPOSE[args.compose]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # a count that only an average without momentum reads
    return model.train()


def rate_at(args: argparse.Namespace, epoch: int) -> float:
    """Return the learning rate of an epoch, the first of which is 0."""
    return args.rate * args.gamma ** sum(epoch >= round(share * args.epochs) for share in args.milestones)


class Session:
    """A run from its options to its result.

    Args:
        args: The options.
        argv: As they were given.
    """

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        self.args, self.run = args, Run(args, PROGRAM, list(argv))
        device = self.run.device
        pixels, labels = read_images(args.images, args.data, "train", args.limit)
        threads = torch.get_num_threads()
        if device.type == "cuda":
            torch.set_num_threads(min(8, os.cpu_count() or 1))  # of which many runs at once need one each later
        model = build_model(args, int(labels.max()) + 1, pixels.shape[1:])
        torch.set_num_threads(threads)
        batches = Batches(
            pixels,
            labels,
            batch_size=args.batch_size,
            crop_padding=CROP_PADDING[args.images],
            flipped=FLIPPED[args.images],
            seed=args.seed,
            device=device,
        )
        test_pixels, test_labels = read_images(args.images, args.data, "test", args.limit)
        self.test = torch.from_numpy(test_pixels).to(device), torch.from_numpy(test_labels).to(device)
        self.training = Training(
            model.to(device, memory_format=torch.channels_last),
            batches,
            decay=args.decay,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            bf16=args.precision == "bf16",
        )
        self.training.norms = self._norms()
        self.repeat = RepeatedStep(self.training.step, device, capture=not args.eager)
        self._calls, self._first = 0, 0

    def _norms(self) -> Tensor | None:
        """Norms to follow, or room for those of this run."""
        steps, products = self.args.epochs * self.training.batches.steps, self.training.products
        if self.args.decay == "frobenius":
            return torch.zeros(steps, len(products.all), device=self.run.device)
        if self.args.decay != "normalized":
            return None
        names, norms = read_norms(self.args.norms_from)
        if sorted(names) != sorted(products.names) or len(norms) != steps:
            raise ValueError(
                f"--norms-from {self.args.norms_from} has {len(norms)} steps and {len(names)} products, and this run "
                f"{steps} and {len(products.names)}: they have to be the same"
            )
        return norms[:, [names.index(name) for name in products.names]].to(self.run.device)

    def begin(self) -> None:
        """Go on from a checkpoint, if there is one, and make the first updates, the last of them a captured one.

        Raises:
            CaptureFailed: If a step cannot be replayed as a CUDA graph.
        """
        self._first = self._resume()
        left = self.training.batches.steps - self._open(self._first)
        torch.backends.cudnn.benchmark = True  # which is of no use where shapes are met a few times only
        for _ in range(min(EAGER_STEPS + 1, left)):
            self._step()
        torch.backends.cudnn.benchmark = False

    def train(self) -> dict[str, Any]:
        """Train to the end, after :meth:`begin`, and return the result.

        Raises:
            Broken: If time is over; a checkpoint is written.
            CaptureFailed: If a step cannot be replayed as a CUDA graph.
        """
        saved = time.time()
        for epoch in range(self._first, self.args.epochs):
            self._epoch(epoch)
            self._log(epoch)
            if time.time() > saved + 60 * MINUTES_TO_CHECKPOINT:
                self._save(epoch + 1, 0)
                saved = time.time()
        return self._finish()

    def _open(self, epoch: int) -> int:
        """Prepare the batches and the rate of an epoch; the number of its updates that are made already."""
        training, batches = self.training, self.training.batches
        done = int(batches.position.item())
        if not done:
            training.loss.zero_()
        batches.begin_epoch(epoch)
        batches.position.fill_(done)
        training.rate.fill_(rate_at(self.args, epoch))
        return done

    def _epoch(self, epoch: int) -> None:
        """Make all updates of an epoch, or those that are left of it."""
        batches = self.training.batches
        before: torch.cuda.Event | None = None
        for number in range(self._open(epoch), batches.steps):
            if number % AHEAD == 0:
                if before is not None:
                    before.synchronize()
                if self.run.must_stop():
                    self._save(epoch, number)
                    raise Broken(f"in epoch {epoch + 1} of {self.args.epochs}")
                if self.run.device.type == "cuda":
                    before = torch.cuda.Event()
                    before.record()
            self._step()
        batches.position.zero_()

    def _step(self) -> None:
        """One update; the first that is a replay of a CUDA graph has to be what it is without."""
        self._calls += 1
        if self.args.eager or self.run.device.type != "cuda" or self._calls != EAGER_STEPS + 1:
            self.repeat()
            return
        difference = replay_difference(self.training, self.repeat)
        self.run.note(f"steps are a CUDA graph; its first update differs by {difference:.1e} of its norm")
        if not difference < AGREEMENT:
            raise CaptureFailed(f"a replayed update differs by {difference:.2g} of its norm")

    def _log(self, epoch: int) -> None:
        """Log an epoch; one of several with accuracy and diagnostics."""
        figures = {"epoch": epoch + 1, "train_loss": self.training.loss.item() / self.training.batches.steps}
        figures["rate"] = self.training.rate.item()
        is_mid = rate_at(self.args, epoch + 1) != rate_at(self.args, epoch)
        if (epoch + 1) % EVERY == 0 or epoch + 1 == self.args.epochs or is_mid:
            figures |= self.training.evaluate(*self.test) | self.training.diagnose()
        self.run.log(**figures)

    def _resume(self) -> int:
        """Go on from the checkpoint, if there is one; the epoch to begin with."""
        if (found := self.run.load()) is None:
            return 0
        self.training.restore(found["tensors"])
        return int(found["epoch"])

    def _save(self, epoch: int, position: int) -> None:
        """Write a checkpoint from which a run goes on with a batch of an epoch."""
        self.training.batches.position.fill_(position)
        self.run.save({"epoch": epoch, "tensors": self.training.state()})

    def _finish(self) -> dict[str, Any]:
        """Write the result, and the norms that other runs may follow."""
        training, history = self.training, self.run.history
        if training.norms is not None and self.args.decay == "frobenius":
            torch.save({"names": training.products.names, "norms": training.norms.cpu()}, self.args.out / NORMS_FILE)
        watched = [entry for entry in history if "accuracy" in entry]
        falls = min((round(share * self.args.epochs) for share in self.args.milestones), default=self.args.epochs)
        middle = next((entry for entry in watched if entry["epoch"] == falls), watched[-1])
        measures = {name: value for name, value in watched[-1].items() if name not in ("epoch", "rate")}
        measures |= {f"{name}_mid": middle[name] for name in measures}
        options = {name: value for name, value in vars(self.args).items() if name not in RUNNER_OPTIONS}
        return self.run.finish(
            measures,
            options=options,
            parameters=sum(parameter.numel() for parameter in training.model.parameters()),
            steps_per_epoch=training.batches.steps,
            graph=self.run.device.type == "cuda" and not self.args.eager,
        )


def replay_difference(training: Training, repeat: Callable[[], None]) -> float:
    """Make an update by ``repeat``, take it back and make it without; the norm of their difference by that of one.

    The batch is the same in both, and the state afterwards is that of the second.
    """
    state = {name: tensor.clone() for name, tensor in training.state().items()}
    before = [parameter.detach().clone() for parameter in training.parameters]
    repeat()
    replayed = [parameter.detach().clone() for parameter in training.parameters]
    training.restore(state)
    training.step()

    def distance(others: Sequence[Tensor]) -> float:
        pairs = zip(training.parameters, others, strict=True)
        return math.sqrt(sum((p.detach() - other).double().square().sum().item() for p, other in pairs))

    return distance(replayed) / max(distance(before), 1e-30)


def train_several(file: Path) -> int:
    """Train several runs in this process, each in a thread and on a stream of its own: a GPU computes them at once.

    Args:
        file: JSON with the arguments of each.

    Returns:
        The exit code: 0 if all are done, ``BROKEN_OFF`` if some are to go on later, 1 if one failed; why is in its log.

    Raises:
        CaptureFailed: If a step cannot be replayed as a CUDA graph.
        ValueError: If there are more than ``MOST_TOGETHER``.
    """
    sessions, codes = [], [0]
    listed = json.loads(file.read_text(encoding="utf-8"))
    if len(listed) > MOST_TOGETHER:
        raise ValueError(f"{SEVERAL} takes at most {MOST_TOGETHER} runs, got {len(listed)}")
    for words in listed:
        args = parse(words)
        with _logged(args.out, codes):
            session = Session(args, words)
            session.begin()  # here, for what is global, as seeds and captures are, is not for threads
            sessions.append(session)

    def stop(number: int, frame: Any) -> None:
        for session in sessions:
            session.run.tell_to_stop()

    def train(session: Session) -> None:
        stream = torch.cuda.Stream() if session.run.device.type == "cuda" else None
        with _logged(session.args.out, codes), torch.cuda.stream(stream):
            session.train()

    before = signal.signal(signal.SIGTERM, stop)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with ThreadPoolExecutor(max(1, len(sessions))) as pool:
        list(pool.map(train, sessions))
    signal.signal(signal.SIGTERM, before)
    return 1 if 1 in codes else max(codes)


@contextlib.contextmanager
def _logged(folder: Path, codes: list[int]) -> Iterator[None]:
    """Write into the log of a run how it ended, if not well, and add its exit code."""
    try:
        yield
    except CaptureFailed:
        raise  # after which the device is of no use in this process
    except Exception as error:  # one run that fails does not end the others
        codes.append(BROKEN_OFF if isinstance(error, Broken) else 1)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"stopped: {error}\n" if isinstance(error, Broken) else traceback.format_exc())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and return the result."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [SEVERAL]:
        try:
            sys.exit(train_several(Path(arguments[1])))
        except CaptureFailed as failure:  # alone in a process, each would train without a graph
            sys.exit(f"no CUDA graph: {failure}")
    session = Session(parse(arguments), arguments)
    with session.run.stopping():
        session.begin()
        return session.train()


if __name__ == "__main__":
    run_program(PROGRAM, main)
