"""Vision Transformers on a readable PyTorch reference and on compiled kernels, forward and backward."""

# First: a signal while PyTorch is imported, which takes seconds, ends the command in one line, too.
from .support import stop as _stop  # noqa: F401

# isort: split

from . import ops, optim, viz, weights
from .backends import BackendError, backends
from .engine import Engine
from .factory import create
from .fronts import from_timm, from_transformers, patch
from .model import VisionTransformer, list_models
from .quantization import quantize
from .version import __version__
from .weights import WeightsError

__all__ = [
    "BackendError",
    "Engine",
    "VisionTransformer",
    "WeightsError",
    "__version__",
    "backends",
    "create",
    "from_timm",
    "from_transformers",
    "list_models",
    "ops",
    "optim",
    "patch",
    "quantize",
    "viz",
    "weights",
]
