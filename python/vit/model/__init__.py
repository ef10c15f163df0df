"""The Vision Transformer: sizes by name and the network. (factory.py, above it, also knows the weights.)"""

from .configs import list_models as list_models
from .layers import patchify as patchify
from .layers import unpatchify as unpatchify
from .vision_transformer import VisionTransformer as VisionTransformer
