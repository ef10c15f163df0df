"""Parity: one list of cases and one tolerance rule, which hold every backend to the reference in float64."""

from .case import Case
from .case_list import CASES, cases
from .runner import Result, backend_ops, run
from .tolerance import Comparison, compare

__all__ = ["CASES", "Case", "Comparison", "Result", "backend_ops", "cases", "compare", "run"]
