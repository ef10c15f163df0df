"""Pictures, drawn without a display, and the numbers in them."""

from .arrays import filter_components, position_similarity, token_colours
from .attention import attention_rows, rollout
from .calibration import calibration
from .confusion import confusion
from .curves import curves
from .figure import save
from .phases import phases
from .pictures import draw_attention, draw_features, draw_filters, draw_patches, draw_posemb, draw_rollout

__all__ = [
    "attention_rows",
    "calibration",
    "confusion",
    "curves",
    "draw_attention",
    "draw_features",
    "draw_filters",
    "draw_patches",
    "draw_posemb",
    "draw_rollout",
    "filter_components",
    "phases",
    "position_similarity",
    "rollout",
    "save",
    "token_colours",
]
