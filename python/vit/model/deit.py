"""DeiT with a distillation token (arXiv:2012.12877): a second token and head that learn from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .torch_layers import call
from .vision_transformer import VisionTransformer


class VisionTransformerDistilled(VisionTransformer):
    """images [B, in_chans, height, width] -> the mean of the logits of two heads [B, num_classes].

    After set_distilled_training(), in training mode: the pair of them. The arguments are VisionTransformer's.

    Raises ValueError for another pooling than by the tokens.
    """

    reads_one_token = False
    CLASSIFIER = ("head", "head_dist")

    def _build_embedding(self, home: Tensor, factory: dict[str, Any]) -> None:
        o = self.options
        if o.global_pool != "token" or o.reg_tokens or o.no_embed_class:
            raise ValueError(
                "vit: a distilled head reads the class and the distillation token: it goes with global_pool='token', "
                "reg_tokens=0 and no_embed_class=False"
            )
        super()._build_embedding(home, factory)
        self.dist_token = nn.Parameter(torch.empty(1, 1, o.embed_dim, **factory))

    def _build_head(self, factory: dict[str, Any]) -> None:
        o = self.options
        checks.absent("VisionTransformerDistilled", representation_size=o.representation_size)
        super()._build_head(factory)
        self.head_dist: nn.Module = nn.Identity()
        if o.num_classes:
            self.head_dist = nn.Linear(o.embed_dim, o.num_classes, **factory)
        self.distilled_training = False

    def _prefix(self) -> Tensor:
        return torch.cat([self.cls_token, self.dist_token], dim=1)  # type: ignore[list-item]

    def forward_head(self, tokens: Any, pre_logits: bool = False, pool: str | None = None) -> Any:
        """tokens [B, N, C], or a list of [N, C] -> logits [B, num_classes], or with pre_logits the mean of both
        tokens [B, C]. pool: see VisionTransformer."""
        if pool is not None:
            return super().forward_head(tokens, pre_logits, pool)
        ops = self.ops
        if isinstance(tokens, (list, tuple)):
            both = torch.cat([ops.movement.first(image[None], 2) for image in tokens])
        else:
            both = ops.movement.first(tokens, 2)
        x, distilled = (call(ops, self.head_drop, both[:, i]) for i in range(2))
        if pre_logits:
            return (x + distilled) / 2
        x, distilled = call(ops, self.head, x), call(ops, self.head_dist, distilled)
        return (x, distilled) if self.distilled_training and self.training else (x + distilled) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training gives the logits of both heads."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """Both last layers."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces both heads by newly initialised ones; 0 removes them."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"vit: a distilled head reads two tokens; global_pool={global_pool!r} does not go with it")
        super().reset_classifier(num_classes)
        self.head_dist = self._new_head("head_dist")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a stem and the blocks, for layer-wise learning rates."""
        return super().group_matcher(coarse) | {"stem": r"^cls_token|pos_embed|patch_embed|dist_token"}
