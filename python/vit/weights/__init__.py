"""Weights from files: safe reading, one converter per foreign layout, adaptation to a model of another
size."""

from .adapt import load_into as load_into
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import WeightsError as WeightsError
from .fit import check_fit as check_fit
from .loaded import Report as Report
from .loaded import report as report
from .read import load as load
from .read import read as read
from .write import save as save
