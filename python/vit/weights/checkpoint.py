"""What a weights file says: the tensors, and as much about their model as is written beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class WeightsError(RuntimeError):
    """Weights that cannot be read or do not fit the model; the text names the file, the parameters and the
    way out."""


@dataclass(frozen=True)
class Checkpoint:
    """`state`: timm's parameter names -> tensors on the CPU. `arch`, `preprocess`: arguments of
    VisionTransformer and Preprocess; name and class_names where the source knows them. `grid`: the patch grid
    of the position embedding."""

    state: Mapping[str, Tensor]
    source: str
    name: str | None = None
    arch: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    grid: tuple[int, int] | None = None

    def sizes(self) -> dict[str, int]:
        """The sizes that do not depend on the rest of the network: classes and image channels."""
        sizes = {}
        if (head := self.state.get("head.weight")) is not None:
            sizes["num_classes"] = head.shape[0]
        patches = self.state.get("patch_embed.proj.weight")
        if patches is not None and patches.ndim == 4:
            sizes["in_chans"] = patches.shape[1]
        return sizes
