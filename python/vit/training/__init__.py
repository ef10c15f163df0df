"""Training and evaluation: one configuration, one loop, one run folder."""

from ..data import ReaderError
from ..tasks import Evaluation
from .config import TrainConfig
from .evaluate import evaluate
from .interrupt import Interrupted
from .report import TrainResult
from .resume import RefusedChange
from .run import Run
from .start import train
from .step import TrainError

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
