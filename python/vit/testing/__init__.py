"""What tests, `vit parity` and `vit bench` share: the case list, the tolerance rule, the timing workers."""

from .cases import CASES, Case, cases
from .compare import Comparison, compare
from .parity import Result, backend_ops, run

__all__ = ["CASES", "Case", "Comparison", "Result", "backend_ops", "cases", "compare", "run"]
