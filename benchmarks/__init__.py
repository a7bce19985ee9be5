"""Side-by-side measurements: each file is one theme, run as ``python -m benchmarks.<theme>``."""
