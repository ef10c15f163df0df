"""What a model costs: parameters, multiply-adds and memory, found by a dry run that computes and allocates nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..factory import create
from ..model.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Layers:
    """A group of like layers: how many, and parameters and multiply-adds per image of all of them together."""

    name: str
    count: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Size:
    """The figures of a model. Memory is in bytes for float32 parameters and one batch of `batch` images.

    macs: multiply-adds of one image's forward in matmul, linear and attention, as papers count them
    weights: parameters and buffers
    inference: most memory that intermediate results need at one time in a forward without gradients
    activations: what the forward keeps for the backward
    training: weights, gradients, AdamW's two moments, and the most intermediate results of forward and backward
    """

    name: str
    backend: str
    parameters: int
    macs: int
    batch: int
    weights: int
    inference: int
    activations: int
    training: int
    layers: tuple[Layers, ...]


def measure(name: str, batch: int = 1, backend: str = "auto", **arch: Any) -> Size:
    """The size of vit.create(name, **arch); memory is that of `backend`, whose kernels keep less than PyTorch's.

    Raises what vit.create raises.
    """
    with FakeTensorMode():
        # The counter hooks every module, and cannot where one is given a parameter without a graph.
        counted = create(name, backend="reference", device="cpu", **arch).requires_grad_(False)
        # As products: not every torch version knows what its fused attention on CPUs multiplies.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            counted(_images(counted, 1))
        flops = {path: sum(kinds.values()) for path, kinds in counter.get_flop_counts().items()}

        model = create(name, backend=backend, **arch)
        images = _images(model, batch)
        weights = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(model))
        model.eval()
        with torch.no_grad(), _Memory(model, images) as memory:
            model(images)
        inference = memory.peak
        model.train()
        with _Memory(model, images) as memory:
            loss = model(images).sum()
            activations = memory.live
            loss.backward()
        training = weights + 2 * _gradients(model) + memory.peak
    return Size(
        name,
        repr(model._plan),
        sum(parameter.numel() for parameter in model.parameters()),
        flops["Global"] // 2,
        batch,
        weights,
        inference,
        activations,
        training,
        tuple(_layers(counted, flops)),
    )


class _Memory(TorchDispatchMode):
    """Counts the bytes of every storage that appears while it is active, except the model's own and the input."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in (*_tensors(model), images)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def _images(model: VisionTransformer, batch: int) -> Tensor:
    embed = model.patch_embed
    return torch.empty(batch, embed.in_chans, *embed.img_size, device=model.device, dtype=model.dtype)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _gradients(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _layers(model: VisionTransformer, flops: dict[str, int]) -> Iterator[Layers]:
    """The model's rows of `vit info`: those of all blocks are added up."""
    depth, modules, kind = len(model.blocks), dict(model.named_modules()), type(model).__name__

    def row(label: str, *paths: str, count: int = 1) -> Layers:
        there = [path for path in paths if path in modules]
        parameters = sum(p.numel() for path in there for p in modules[path].parameters())
        return Layers(label, count, parameters, sum(flops.get(f"{kind}.{path}", 0) for path in there) // 2)

    def in_blocks(label: str, *parts: str) -> Layers:
        return row(label, *(f"blocks.{i}{part}" for i in range(depth) for part in parts), count=depth)

    tokens = sum(p.numel() for p in model._parameters.values() if p is not None)
    qkv = in_blocks("attention q, k, v", *(f".attn.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj")))
    projection = in_blocks("attention projection", ".attn.proj")
    attention, mlp, block_norms = in_blocks("", ".attn"), in_blocks("MLP", ".mlp"), in_blocks("", ".norm1", ".norm2")
    norms = row("", "norm", "fc_norm", "norm_pre")
    inner = attention.parameters - qkv.parameters - projection.parameters  # norms of q and k, biases of their own
    # What else blocks hold are the factors of LayerScale.
    scales = in_blocks("", "").parameters - attention.parameters - mlp.parameters - block_norms.parameters
    yield row("patch embedding", "patch_embed")
    yield Layers("class token, positions", 1, tokens + row("", "rope").parameters, 0)
    yield qkv
    yield Layers("attention", depth, inner, attention.macs - qkv.macs - projection.macs)
    yield projection
    yield mlp
    if scales:
        yield Layers("layer scale", 2 * depth, scales, 0)
    before = int(norms.parameters > 0 and next(modules["norm_pre"].parameters(), None) is not None)
    yield Layers("layer norms", 2 * depth + 1 + before, norms.parameters + block_norms.parameters, 0)
    if model.attn_pool is not None:
        yield row("attention pooling", "attn_pool")
    yield row("head", "head", "head_dist")
