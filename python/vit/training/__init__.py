"""Training and evaluation: one configuration, one loop, one run folder."""

from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .loop import Interrupted, TrainError, TrainResult, train
from .run import Run

__all__ = [
    "Evaluation",
    "Interrupted",
    "Run",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "evaluate",
    "train",
]
