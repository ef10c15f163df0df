"""The Vision Transformer: sizes by name and the network. (factory.py, above it, also knows the weights.)"""

from .configs import list_models as list_models
from .patches import patchify as patchify
from .patches import unpatchify as unpatchify
from .vision_transformer import VisionTransformer as VisionTransformer
