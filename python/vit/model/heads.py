"""From tokens to logits: the pooling of a model, and that of those who published its weights."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .options import POOLS
from .torch_layers import call

#: What forward_head takes as `pool`.
POOLINGS = (*(kind for kind in POOLS if kind), "token_avg", "source")

#: Names of models -> how their authors' programs pool, where it is not as timm does: the first that fits.
#: "projection": the class token through the matrix that brings it beside texts.
SOURCES = (
    ("*dinov2*", "token_avg"),  # the input of DINOv2's linear classifiers
    ("*dinov3*", "token"),
    ("*.mae*", "avg"),
    ("*_clip_*", "projection"),
    ("*siglip*", "map"),
    ("vit_pe_core_*", "projection"),
)


class Heads:
    """Methods of a model with `head`, `fc_norm`, `attn_pool` and the options of pooling."""

    def forward_head(self: Any, tokens: Any, pre_logits: bool = False, pool: str | None = None) -> Any:
        """tokens [B, N, C], or a list of [N, C] -> logits [B, num_classes], or with pre_logits the pooled features
        [B, C]; without a pooling those of all tokens.

        pool: features [B, C] by "token" (the class token), "avg", "max", "avgmax" (of the patches) or "map" (by
        attention); "token_avg" [B, 2 C]: class token and mean side by side; "source": as those who published the
        weights do: DINOv2's class token and mean, DINOv3's class token, CLIP's and PE-core's projection, SigLIP's
        pooling by attention, MAE's mean, else the model's own. ValueError where a model does not have it.
        """
        if pool is not None:
            checks.choice(pool=(pool, POOLINGS))
            each = [image[None] for image in tokens] if isinstance(tokens, (list, tuple)) else [tokens]
            return torch.cat([self._pooled_by(one, pool) for one in each])
        if isinstance(tokens, (list, tuple)):
            return self._head_of_each(tokens, pre_logits)
        return self._head_of_pooled(self.pool(tokens), pre_logits)

    def _pooled_by(self: Any, tokens: Tensor, kind: str) -> Tensor:
        """tokens [B, N, C] -> what forward_head gives with pool=kind."""
        if kind == "source":
            kind = next((how for pattern, how in SOURCES if fnmatch.fnmatch(self.name, pattern)), "")
            if kind == "map" and self.attn_pool is None:  # names with "gap": SigLIP without its pooling
                kind = ""
            if kind == "avg" and not self.norm_after_pool:
                raise ValueError(
                    f"vit: {self.name}: pool='source' is the norm of the mean of the patches (MAE's), and this model's "
                    "norm comes first; create it with global_pool='avg'"
                )
            if kind == "projection":
                return self._head_of_pooled(self.pool(tokens), pre_logits=not self._projects())
            if not kind:
                return self.forward_head(tokens, pre_logits=True)
        if kind == "token_avg":
            return torch.cat([self._pooled_by(tokens, one) for one in ("token", "avg")], dim=1)
        if kind == "token" and self.cls_token is None:
            raise ValueError(f"vit: {self.name}: pool='token' needs a class token, which the model does not have")
        if kind == "map":
            if self.attn_pool is None:
                raise ValueError(f"vit: {self.name}: pool='map' needs the layer of global_pool='map'")
            return self._head_of_pooled(self.pool(tokens), pre_logits=True)
        return self._head_of_pooled(self._pooled(tokens, kind), pre_logits=True)

    def _projects(self: Any) -> bool:
        """Whether the head is the projection beside texts: without a bias, or with zeros, which no trained classifier
        has."""
        return isinstance(self.head, nn.Linear) and (self.head.bias is None or not bool(self.head.bias.any()))

    def _head_of_pooled(self: Any, pooled: Tensor, pre_logits: bool) -> Tensor:
        ops = self.ops
        x = call(ops, self.fc_norm, pooled)
        if (representation := self._modules.get("pre_logits")) is not None:
            x = call(ops, representation, x)
        x = call(ops, self.head_drop, x)
        return x if pre_logits else call(ops, self.head, x)

    def pool(self: Any, tokens: Tensor, pool_type: str | None = None) -> Tensor:
        """tokens [B, N, C] -> what the head reads [B, C]; all of them for "". pool_type: instead of global_pool."""
        if self.attn_pool is not None:
            skip = 0 if self.pool_include_prefix or self.pools_prefix else self.num_prefix_tokens
            return self.attn_pool(tokens[:, skip:])
        return self._pooled(tokens, self.global_pool if pool_type is None else pool_type)

    def _pooled(self: Any, tokens: Tensor, kind: str) -> Tensor:
        """tokens [B, N, C] pooled without parameters; all of them for ""."""
        skip = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if kind == "token":
            return self.ops.movement.first(tokens, 1).squeeze(1)
        if kind == "avg":
            return self.ops.movement.mean(tokens, skip)
        if kind in ("max", "avgmax"):
            largest = tokens[:, skip:].amax(dim=1)
            return largest if kind == "max" else 0.5 * (largest + self.ops.movement.mean(tokens, skip))
        return tokens
