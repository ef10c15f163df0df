"""The former name of `vit.parity`; it goes with the next release."""

from .parity import *  # noqa: F403
from .parity import __all__ as __all__
