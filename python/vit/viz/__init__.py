"""Pictures, drawn without a display."""

from .confusion import confusion
from .curves import curves

__all__ = ["confusion", "curves"]
