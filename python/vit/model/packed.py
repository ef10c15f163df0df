"""Images of several sizes in one forward: their tokens one behind another, [1, N, C], and how many each has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MAKE = "model.preprocess makes one from a PIL image, torch.from_numpy from an array"


class Packs:
    """Methods of a model with `start`, `blocks`, `pool` and `forward_head`."""

    def _start_packed(self: Any, images: Sequence[Tensor]) -> tuple[Tensor, list[dict[str, Any]]]:
        """The tokens of images [in_chans, height, width] one behind another [1, N, C], each made as if it were alone,
        and for each block how many they are and what else it takes."""
        for i, image in enumerate(images):
            if not isinstance(image, Tensor):
                raise TypeError(f"vit: images[{i}] must be a tensor, got {type(image).__name__}; {_MAKE}")
            if image.ndim != 3:
                raise ValueError(f"vit: images[{i}] must be [{self.in_chans}, height, width], got {list(image.shape)}")
        if not images:
            raise ValueError("vit: the list of images is empty")
        if not isinstance(self.blocks, (nn.Sequential, nn.ModuleList)):
            raise TypeError(
                f"vit: a list of images needs blocks one by one, and blocks is {type(self.blocks).__name__}"
            )
        each = [self.start(image[None]) for image in images]
        lengths = [tokens.shape[1] for tokens, _ in each]
        tokens = self.ops.movement.join([tokens for tokens, _ in each])
        return tokens, [more | {"lengths": lengths} for more in self._given_packed([given for _, given in each])]

    def _given_packed(self: Any, each: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What each block takes beside the tokens, from that for each image."""
        return [{}] * len(self.blocks)

    def _features_of_each(self: Any, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """A pack [1, N, C] -> the tokens of each image [n, C]."""
        return [image[0] for image in self.ops.movement.split(tokens, lengths)]

    def _head_of_each(self: Any, images: Sequence[Tensor], pre_logits: bool) -> Any:
        """Tokens of each image [n, C] -> logits [B, num_classes], or a list of those of all tokens where none are
        pooled."""
        if self.attn_pool is None and not self.global_pool:
            return [self.forward_head(image[None], pre_logits)[0] for image in images]
        return self._head_of_pooled(torch.cat([self.pool(image[None]) for image in images]), pre_logits)
