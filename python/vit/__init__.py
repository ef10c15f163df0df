"""Vision Transformers on kernels of our own."""

from . import ops
from .backends import BackendError, backends

__all__ = ["BackendError", "backends", "ops"]
