"""The inference engine: a model frozen into packed weights, the whole network in one native call."""

from .cuda import CudaEngine as CudaEngine
from .engine import Engine as Engine
from .profile import Phase as Phase
