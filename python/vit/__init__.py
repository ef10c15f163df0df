"""Vision Transformers on a readable PyTorch reference and on compiled kernels, forward and backward."""

import importlib.metadata

from . import ops, weights
from .backends import BackendError, backends
from .engine import Engine
from .model import VisionTransformer, list_models
from .model.factory import create
from .weights import WeightsError

try:
    __version__ = importlib.metadata.version("vit-kernels")
except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

__all__ = [
    "BackendError",
    "Engine",
    "VisionTransformer",
    "WeightsError",
    "__version__",
    "backends",
    "create",
    "list_models",
    "ops",
    "weights",
]
