"""The CUDA backend on a GPU: python -m benchmarks.gpu --help."""
