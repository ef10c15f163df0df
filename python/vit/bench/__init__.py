"""Benchmarks: races of models and ops between processes, on the parity cases and on exported models."""
