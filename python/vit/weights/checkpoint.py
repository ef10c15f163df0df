"""What a weights file says: the tensors, and as much about their model as is written beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..model.patches import grid_of_positions
from . import infer
from .layout import Mapped
from .loaded import Report

PATCHES = "patch_embed.proj.weight"
POSITIONS = "pos_embed"
HEAD = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
#: What the names of a decoder in the head begin with.
STAGES = "head.stages."


def is_head(name: str) -> bool:
    """Whether a parameter is of the head, and so depends on the classes and the task."""
    return name in HEAD or name.startswith(STAGES)


def some(names: Sequence[str], limit: int = 12) -> str:
    """The first names of a list that may be long, for error texts."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


class WeightsError(RuntimeError):
    """Weights that cannot be read or do not fit the model; the text names the file, the parameters and the
    way out."""


@dataclass(frozen=True)
class Checkpoint:
    """What a source of weights says.

    state: timm's parameter names -> tensors on the CPU. arch, preprocess: arguments of VisionTransformer and of
    Preprocess, as far as they are written beside the weights; likewise the model's name and the class names. implied:
    arguments of VisionTransformer that every model of this layout has, whatever its name. dropped: parts of a file that
    a ViT does not have -> why they are left out. layout, mapped: whose names the file has, and what became of each.
    base: the named model with the options of this layout, where the file names none. allow: names, also with
    wildcards, that may be in the file alone or in the model alone.
    """

    state: Mapping[str, Tensor]
    source: str
    name: str | None = None
    arch: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    implied: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    layout: str = "timm"
    mapped: tuple[Mapped, ...] = ()
    base: str | None = None
    allow: tuple[str, ...] = ()

    def settings(self, name: str | None) -> dict[str, Any]:
        """Arguments of the model these weights belong to: what the tensors tell, and over it, unless another model
        than theirs is asked for by name, what is written beside them."""
        found = {**self.implied, **self.sizes()}
        if name is None and self.name is None and not self.arch:
            inferred = infer.options(self.state)
            if inferred and infer.nearest_model(inferred, self.base or "vit") is None:
                inferred["num_heads"] = None  # which stands in no tensor
            found = {**inferred, **found}
        if not self.describes(name):
            return found
        found |= self.arch
        if self.arch.get("global_pool") == "avg" and "fc_norm" not in self.arch and self._has_norm():
            found["fc_norm"] = False  # the last norm is called norm where it comes before the pooling
        return found

    def fitting(self, decoder: bool) -> Checkpoint:
        """Itself, or for a model whose head has a `decoder` that these weights lack, the same without their head."""
        heads = [key for key in self.state if is_head(key)]
        if not decoder or not heads or any(key.startswith(STAGES) for key in heads):
            return self
        return replace(
            self,
            state={key: value for key, value in self.state.items() if key not in heads},
            dropped={**self.dropped, **dict.fromkeys(heads, "a head without the decoder that the model has")},
            mapped=tuple(one for one in self.mapped if not set(one.targets) & set(heads)),
        )

    def model_name(self) -> str | None:
        """The named model that these weights are of, or else one with their options and, where there is one, sizes."""
        if self.name is None and "embeds.proj.weight" in self.state:
            raise WeightsError(
                f"vit: {self.source} holds a NaFlexVit of timm's, and no tensor says how many heads it has and how its "
                "positions get another size; pass the name of the model: naflexvit_..."
            )
        if self.name is not None or self.base is None:
            return self.name
        return infer.nearest_model({**infer.options(self.state), **self.arch}, self.base) or self.base

    def report(self) -> Report:
        """What reading tells of a load: what became of the names."""
        return Report(self.source, self.layout, self.name, self.mapped, dict(self.dropped))

    def origin(self) -> dict[str, str]:
        """timm's names -> those in the file, in layouts with others."""
        return {target: " + ".join(one.sources) for one in self.mapped for target in one.targets}

    def describes(self, name: str | None) -> bool:
        """Whether what is written beside the tensors is about a model of that name: not where it names another one."""
        return None in (name, self.name) or name == self.name

    def sizes(self) -> dict[str, Any]:
        """What the tensors themselves tell about the ends of the network: classes, image channels, pooling."""
        sizes: dict[str, Any] = {}
        if (head := self.state.get("head.weight")) is not None and head.ndim:
            sizes["num_classes"] = len(head)
        if (patches := self.state.get(PATCHES)) is not None and patches.ndim == 4:
            sizes["in_chans"] = patches.shape[1]
        if "fc_norm.weight" in self.state:
            sizes["global_pool"] = "avg"
        if "blocks.0.norm1.weight" in self.state and "cls_token" not in self.state and not self._lacks_token():
            # Without a class token logits come from the mean of the patches; the name of the last norm tells its place.
            sizes |= {"class_token": False, "global_pool": "avg"} | ({"fc_norm": False} if self._has_norm() else {})
        stages = len({key.split(".")[2] for key in self.state if key.startswith(STAGES)})
        norms = [self.state.get(f"{STAGES}{i}.norm.weight") for i in range(stages)]
        if stages and all(norm is not None for norm in norms):
            sizes |= {"decoder": tuple(map(len, norms)), "global_pool": ""}  # type: ignore[arg-type]
        if "attn_pool.latent" in self.state:
            sizes |= {"global_pool": "map", "fc_norm": None}
        return sizes

    def _lacks_token(self) -> bool:
        """Whether positions have a row for a class token that is not there."""
        table = self.state.get(POSITIONS)
        rows = 0 if table is None or table.ndim != 3 else table.shape[1]
        return rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1 and math.isqrt(rows) ** 2 != rows

    def _has_norm(self) -> bool:
        return "norm.weight" in self.state and "fc_norm.weight" not in self.state

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches that the position embedding stands for, where image and patch size are known."""
        image, patch, patches = self.arch.get("img_size"), self.arch.get("patch_size"), self.state.get(PATCHES)
        if patches is not None and patches.ndim == 4:
            patch = tuple(patches.shape[2:])
        if image is None or patch is None:
            return None
        return grid_of_positions({**self.arch, "img_size": image, "patch_size": patch})


def all_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite, itself and as `dtype`: in one pass, where isfinite() makes copies (a
    second for ViT-B)."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # no arithmetic in 8 bits
    if tensor.numel() == 0:
        return True
    # The ends are finite only where all of it is, and conversion keeps their order.
    return all(math.isfinite(end if dtype is None else end.to(dtype)) for end in tensor.detach().aminmax())
