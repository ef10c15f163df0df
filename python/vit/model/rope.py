"""Rotary position embeddings (RoFormer, arXiv:2104.09864) of a grid of patches: tables of sines and cosines.

A table is [N, 2 D]: the sines, then the cosines, of N patches in reading order, each D wide for heads of D elements.
With the angles a [N, D / 2] of a patch the D columns are a repeated element by element, for neighbours that are rotated
together ("interleaved"), or as a whole ("half"). The prefix tokens (class, registers) have no row and are not rotated.

Three kinds, with timm's names, buffers and numbers:

    cat     (EVA-02, arXiv:2303.11331) angle = coordinate * theta^(-k / (D / 4)) for each of two axes
    mixed   (arXiv:2403.13298) angle = x f_x + y f_y with learned frequencies of each block and head
    dinov3  (arXiv:2508.10104) angle = 2 pi coordinate / theta^(k / (D / 4)), coordinates within [-1, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .planned import HasBuffers

Grid = tuple[int, int]
INDEXING = ("ij", "xy")


class Rotary(HasBuffers, nn.Module):
    """What the kinds share: the grid, how coordinates are disturbed in training, and buffers that are computed again
    when the module moves.

    feat_shape: the grid whose table is kept; None: a table is made at each call of get_embed. shift_coords: every
    coordinate is moved by U(-s, s) of its axis; jitter_coords J: multiplied by a factor of its axis in [1 / J, J];
    rescale_coords R: by one of both axes in [1 / R, R]; in training mode only.
    """

    feat_shape: Grid | None

    def __init__(
        self,
        feat_shape: Grid | None,
        grid_indexing: str,
        shift_coords: float | None,
        jitter_coords: float | None,
        rescale_coords: float | None,
    ) -> None:
        super().__init__()
        self.feat_shape = feat_shape
        self.grid_indexing = grid_indexing
        self.shift_coords, self.jitter_coords, self.rescale_coords = shift_coords, jitter_coords, rescale_coords

    @property
    def disturbs(self) -> bool:
        """Whether coordinates are disturbed, now."""
        return self.training and (self.shift_coords, self.jitter_coords, self.rescale_coords) != (None, None, None)

    def buffers_for(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The values of the buffers."""
        raise NotImplementedError

    def get_embed(self, shape: Grid | None = None) -> Tensor:
        """The table of a grid, or of feat_shape."""
        raise NotImplementedError

    def update_feat_shape(self, feat_shape: Grid) -> None:
        """Keeps the table of another grid; nothing where none is kept."""
        if self.feat_shape is not None:
            self.feat_shape = feat_shape
            self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Computes the buffers, where they are unless told otherwise. dtype: of the model."""
        self._dtype = dtype or self._dtype
        first = next(self.buffers(), None)
        device = device or (torch.device("cpu") if first is None else first.device)
        for name, value in self.buffers_for(device, self._dtype).items():
            self.register_buffer(name, value, persistent=False)

    _dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Buffers are computed anew and not converted: frequencies lose their digits in half precision, and memory that
        to_empty() has taken holds nothing."""
        first = next(self.buffers())
        probe = fn(torch.empty(0, device=first.device, dtype=self._dtype))
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers(probe.device, probe.dtype)
        return self

    def _disturbed(self, grid: Tensor) -> Tensor:
        """Coordinates [N, 2] moved and scaled, the same for all patches; timm's order of random numbers."""
        for amount, size, scales in (
            (self.shift_coords, 2, False),
            (self.jitter_coords, 2, True),
            (self.rescale_coords, 1, True),
        ):
            if amount is not None:
                limit = math.log(amount) if scales else amount
                drawn = torch.empty(size, device=grid.device, dtype=grid.dtype).uniform_(-limit, limit)
                grid = grid * drawn.exp() if scales else grid + drawn
        return grid


class RotaryEmbeddingCat(Rotary):
    """Axial table of patch indices: [N, 2 D], the first axis' D / 4 bands, then the second's.

    Coordinates are index + grid_offset, times reference / grid where there is a ref_feat_shape (the grid of the
    pretraining, to which others are interpolated). grid_indexing "ij": y, then x; "xy": x, then y.
    """

    pos_embed: Tensor | None
    bands: Tensor

    def __init__(
        self,
        dim: int,
        temperature: float = 10000.0,
        feat_shape: Grid | None = None,
        ref_feat_shape: Grid | None = None,
        grid_offset: float = 0.0,
        grid_indexing: str = "ij",
        rotate_half: bool = False,
        **disturb: float | None,
    ) -> None:
        super().__init__(feat_shape, grid_indexing, **_disturb(**disturb))
        self.dim, self.temperature = dim, temperature
        self.ref_feat_shape, self.grid_offset, self.rotate_half = ref_feat_shape, grid_offset, rotate_half
        self.register_buffer("pos_embed", None, persistent=False)
        self.init_non_persistent_buffers()

    def buffers_for(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Bands in float32 or wider; the table of feat_shape in the model's dtype."""
        count = self.dim // 4
        exponent = torch.arange(count, device="cpu").to(torch.float32) / count
        bands = 1.0 / (float(self.temperature) ** exponent)
        made = {"bands": bands.to(device, _wide(dtype))}
        if self.feat_shape is not None:
            made["pos_embed"] = self._table(self.feat_shape, bands, False).to(device, dtype)
        return made

    def get_embed(self, shape: Grid | None = None) -> Tensor:
        """[N, 2 D] in float32, or in the model's dtype where the table of feat_shape is kept."""
        if self.feat_shape is not None and self.pos_embed is not None and not self.disturbs:
            return self.pos_embed
        return self._table(self.feat_shape or _given(shape), self.bands, self.disturbs)

    def _table(self, shape: Grid, bands: Tensor, disturb: bool) -> Tensor:
        grid = index_grid(shape, self.grid_indexing, bands.device, self.grid_offset, self.ref_feat_shape)
        if disturb:
            grid = self._disturbed(grid)
        angles = (grid[:, :, None] * bands).flatten(1)  # [N, D / 2]
        return sines(angles, self.rotate_half, bands.dtype if disturb else torch.float32)


class RotaryEmbeddingMixed(Rotary):
    """Tables of learned frequencies, [depth, heads, N, 2 D]: each block and each head has its own.

    freqs [2, depth, heads, D / 2] belong to the first and the second coordinate of grid_indexing.
    """

    t_x: Tensor | None
    t_y: Tensor | None

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        temperature: float = 10.0,
        feat_shape: Grid | None = None,
        grid_indexing: str = "xy",
        factory: dict[str, Any] | None = None,
        **disturb: float | None,
    ) -> None:
        super().__init__(feat_shape, grid_indexing, **_disturb(**disturb))
        self.dim, self.depth, self.num_heads, self.temperature = dim, depth, num_heads, temperature
        self.freqs = nn.Parameter(torch.empty(2, depth, num_heads, dim // num_heads // 2, **(factory or {})))
        self.register_buffer("t_x", None, persistent=False)
        self.register_buffer("t_y", None, persistent=False)
        self.init_non_persistent_buffers()

    def buffers_for(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The coordinates of feat_shape, in float32 or wider."""
        if self.feat_shape is None:
            return {}
        x, y = index_grid(self.feat_shape, self.grid_indexing, device).to(_wide(dtype)).unbind(1)
        return {"t_x": x.contiguous(), "t_y": y.contiguous()}

    def get_embed(self, shape: Grid | None = None) -> Tensor:
        """[depth, heads, N, 2 D] in the dtype of freqs, with a gradient to them."""
        if shape is None and self.t_x is not None and self.t_y is not None:
            grid = torch.stack([self.t_x, self.t_y], dim=1)
        else:
            grid = index_grid(_given(shape), self.grid_indexing, self.freqs.device)
        grid, dtype = grid.float(), self.freqs.dtype
        if self.disturbs:
            grid, dtype = self._disturbed(grid), _wide(dtype)
        # Products of elements and not a matmul, which autocast would round.
        freqs = self.freqs.float()
        angles = grid[:, :1] * freqs[0][:, :, None] + grid[:, 1:] * freqs[1][:, :, None]  # [depth, heads, N, D / 2]
        return sines(angles, False, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        if self.feat_shape is None:  # no buffers
            nn.Module._apply(self, fn, recurse)
            return self
        return super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        """Frequencies are no weights."""
        return {"freqs"}

    def start(self, angle: Tensor) -> Tensor:
        """First values of freqs: frequencies theta^(-4 k / D) of two axes at right angles, turned by an angle of each
        block and head [depth, heads, 1]."""
        width = self.dim // self.num_heads
        size = 1.0 / (self.temperature ** (torch.arange(0, width, 4, device="cpu", dtype=torch.float32) / width))
        turned = [angle, angle + torch.pi / 2]
        return torch.stack([torch.cat([size * f(a) for a in turned], dim=-1) for f in (torch.cos, torch.sin)])


class RotaryEmbeddingDinoV3(Rotary):
    """Axial table of normalised coordinates: [N, 2 D], y's D / 4 periods, then x's.

    Coordinates are the centres of patches, (i + 0.5) / h and (j + 0.5) / w, mapped to [-1, 1]. The published files
    store the periods rounded to bfloat16; these are float32, as timm's.
    """

    pos_embed_cached: Tensor | None
    periods: Tensor

    def __init__(
        self,
        dim: int,
        temperature: float = 100.0,
        feat_shape: Grid | None = None,
        grid_offset: float = 0.0,
        grid_indexing: str = "ij",
        rotate_half: bool = True,
        **disturb: float | None,
    ) -> None:
        super().__init__(feat_shape, grid_indexing, **_disturb(**disturb))
        self.dim, self.temperature = dim, float(temperature)
        self.grid_offset, self.rotate_half = grid_offset, rotate_half
        self.register_buffer("pos_embed_cached", None, persistent=False)
        self.init_non_persistent_buffers()

    def buffers_for(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Periods in float32 or wider; the table of feat_shape in the model's dtype."""
        exponent = 2.0 * torch.arange(self.dim // 4, device="cpu", dtype=torch.float32) / (self.dim // 2)
        periods = (self.temperature**exponent).to(_wide(dtype))
        made = {"periods": periods.to(device)}
        if self.feat_shape is not None:
            made["pos_embed_cached"] = self._table(self.feat_shape, periods, False).to(device, dtype)
        return made

    def get_embed(self, shape: Grid | None = None) -> Tensor:
        """[N, 2 D] in float32 or wider, or in the model's dtype where the table of feat_shape is kept."""
        if shape is None and self.pos_embed_cached is not None and not self.disturbs:
            return self.pos_embed_cached
        return self._table(shape or _given(self.feat_shape), self.periods, self.disturbs)

    def _table(self, shape: Grid, periods: Tensor, disturb: bool) -> Tensor:
        axes = [
            (torch.arange(side, device=periods.device, dtype=torch.float32) + 0.5 + self.grid_offset) / float(side)
            for side in shape
        ]
        grid = 2.0 * _mesh(axes, self.grid_indexing) - 1.0
        if disturb:
            grid = self._disturbed(grid)
        angles = 2 * math.pi * grid.to(periods.dtype)[:, :, None] / periods
        return sines(angles.flatten(1), self.rotate_half, periods.dtype)


def index_grid(
    shape: Grid, indexing: str, device: Any = "cpu", offset: float = 0.0, reference: Grid | None = None
) -> Tensor:
    """Coordinates of patches [h * w, 2] in reading order: index + offset, times reference / grid; (y, x) for "ij"."""
    axes = [torch.arange(side, device=device).to(torch.float32) + offset for side in shape]
    if reference is not None:
        axes = [axis / side * other for axis, side, other in zip(axes, shape, reference, strict=True)]
    return _mesh(axes, indexing)


def _mesh(axes: list[Tensor], indexing: str) -> Tensor:
    """[h] and [w] -> [h * w, 2]."""
    y, x = torch.meshgrid(axes, indexing="ij")
    return torch.stack([x, y] if indexing == "xy" else [y, x], dim=-1).flatten(0, 1)


def sines(angles: Tensor, half: bool, dtype: torch.dtype) -> Tensor:
    """Angles [..., D / 2] -> sines and cosines [..., 2 D], each angle twice."""
    parts = [angles.sin(), angles.cos()]
    parts = [torch.cat([p, p], dim=-1) if half else p.repeat_interleave(2, -1) for p in parts]
    return torch.cat(parts, dim=-1).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of frequencies and coordinates: half precision would move the last patches of a row by half a patch."""
    return dtype if dtype == torch.float64 else torch.float32


def _given(shape: Grid | None) -> Grid:
    if shape is None:
        raise ValueError("vit: a rotary table of no fixed grid needs a shape (rows, columns)")
    return shape


def _disturb(
    shift_coords: float | None = None, jitter_coords: float | None = None, rescale_coords: float | None = None
) -> dict[str, float | None]:
    """The arguments, checked."""
    given = {"shift_coords": shift_coords, "jitter_coords": jitter_coords, "rescale_coords": rescale_coords}
    for name, value in given.items():
        low = 0.0 if name == "shift_coords" else 1.0
        if value is not None and not (
            isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < math.inf
        ):
            raise ValueError(f"vit: rope_{name} must be None or a number from {low:g}, got {value!r}")
    return given
