"""In front of code that has a model of another library: the same weights in vit's model, or vit's ops in theirs."""

from .foreign import from_timm as from_timm
from .foreign import from_transformers as from_transformers
from .patch import patch as patch
from .report import PatchReport as PatchReport
