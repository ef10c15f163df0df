"""The inference engine: a model frozen into packed weights, the whole network in one native call."""

from .engine import Engine as Engine
from .engine import Phase as Phase
