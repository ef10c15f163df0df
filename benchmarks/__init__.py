"""Benchmarks: `pytest benchmarks/`, and `python -m benchmarks.gpu` on a GPU."""
