"""Optimizers for any model: ordinary torch.optim.Optimizers."""

from .adamw import AdamW

__all__ = ["AdamW"]
