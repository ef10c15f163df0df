"""Training and evaluation: one configuration, one loop, one run folder."""

from .config import TrainConfig
from .evaluate import Evaluation, evaluate, evaluate_run
from .loop import Interrupted, TrainError, TrainResult, train

__all__ = [
    "Evaluation",
    "Interrupted",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "evaluate",
    "evaluate_run",
    "train",
]
