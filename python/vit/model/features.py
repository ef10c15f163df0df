"""Tokens out of the middle of a network, in the forms that timm and DINO's programs use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .torch_layers import call


class Intermediates:
    """Methods of a model with `embed`, `blocks`, `norm`, `patch_embed` and `num_prefix_tokens`."""

    ops: Any
    blocks: Any
    norm: Any
    fc_norm: Any
    patch_embed: Any
    num_prefix_tokens: int
    #: What blocks are given where there is no mask, as timm's model does: hooks and a caller's own blocks see it.
    NO_MASKS: Mapping[str, Any] = {}

    def forward_intermediates(
        self: Any,
        images: Any,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """(tokens after the last norm, [the patch tokens after each wanted block]), with timm's arguments.

        indices: the last n blocks (int), those (sequence, negative from the end) or all (None). Each entry is
        [B, C, grid height, grid width], or [B, N, C] with output_fmt "NLC"; with return_prefix_tokens a pair
        of it and the class token and registers [B, prefix, C]. norm applies the final norm to each; stop_early skips
        the blocks after the last wanted one; intermediates_only returns the list alone; output_dict a dict of
        image_features, image_intermediates and image_intermediates_prefix. attn_mask, is_causal: see forward_features.
        Of a list of images each of these tensors is a list: of every image its own [C, h, w], [N, C] or [prefix, C].
        """
        checks.choice(output_fmt=(output_fmt, ("NCHW", "NLC")))
        wanted = block_indices(indices, len(self.blocks))
        last = max(wanted) if stop_early else len(self.blocks) - 1
        masks = {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}
        listed = isinstance(images, (list, tuple))
        if masks:
            self._check_masked(listed)
        tokens, given = self.start(images)
        lengths = given[0]["lengths"] if listed else None
        taken: list[Tensor] = []
        for i, block in enumerate(self.blocks[: last + 1]):
            tokens = self._run(block, tokens, **{**self.NO_MASKS, **given[i], **masks})
            if i in wanted:
                taken.append(call(self.ops, self.norm, tokens) if norm else tokens)
        pairs = [_split_prefix(self, x, images, output_fmt, lengths) for x in taken]
        prefixed = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": [patches for patches, _ in pairs]}
            if prefixed:
                found["image_intermediates_prefix"] = [prefix for _, prefix in pairs]
            return found if intermediates_only else found | {"image_features": self._normed(tokens, lengths)}
        entries = pairs if prefixed else [patches for patches, _ in pairs]
        return entries if intermediates_only else (self._normed(tokens, lengths), entries)

    def _normed(self: Any, tokens: Tensor, lengths: Sequence[int] | None) -> Any:
        """Tokens after the last norm; of a pack those of each image."""
        tokens = call(self.ops, self.norm, tokens)
        return tokens if lengths is None else self._features_of_each(tokens, lengths)

    def get_intermediate_layers(
        self: Any,
        images: Any,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """The outputs of the last n (or the named) blocks, in the form the DINO family uses."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            images, n, return_prefix_tokens, norm, True, fmt, intermediates_only=True, attn_mask=attn_mask
        )

    def prune_intermediate_layers(
        self: Any, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leaves out the blocks after the last of those wanted, and the last norm or the head if told; returns the
        positions of the wanted ones."""
        wanted = block_indices(indices, len(self.blocks))
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted


def _split_prefix(model: Any, tokens: Tensor, images: Any, output_fmt: str, lengths: Sequence[int] | None) -> Any:
    """Patch tokens, as output_fmt says, and the tokens before them; of a pack a list of both."""
    if lengths is not None:
        each = zip(model._features_of_each(tokens, lengths), images, strict=True)
        pairs = [_split_prefix(model, own[None], image[None], output_fmt, None) for own, image in each]
        return [patches[0] for patches, _ in pairs], [prefix[0] for _, prefix in pairs]
    prefix, patches = tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]
    if output_fmt == "NCHW":
        grid = model.patch_embed.grid_of(images)
        if patches.shape[1] != grid[0] * grid[1] and not torch.compiler.is_compiling():
            raise ValueError(
                f"vit: {patches.shape[1]} of {grid[0]} x {grid[1]} patches are left (patch_drop_rate), which are no "
                "grid; use output_fmt='NLC', or model.eval()"
            )
        patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
    return patches, prefix


def block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Positions of the wanted blocks in rising order; None is all, a number the last ones."""
    if indices is None:
        return list(range(depth))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    if not wanted or min(wanted) < -depth or max(wanted) >= depth:
        raise ValueError(f"vit: block indices {indices} do not lie in the model's {depth} blocks")
    return sorted({i % depth for i in wanted})
