"""Training and evaluation: one configuration, one loop, one run folder."""

from ..data import ReaderError
from ..tasks import Evaluation
from .config import TrainConfig
from .evaluate import evaluate
from .loop import Interrupted, TrainError, TrainResult
from .resume import RefusedChange
from .run import Run
from .start import train

__all__ = [
    "Evaluation",
    "Interrupted",
    "ReaderError",
    "RefusedChange",
    "Run",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "evaluate",
    "train",
]
