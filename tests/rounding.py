"""How near two results must be that differ by roundings alone: the tests' tolerance beside the rule of `vit.parity`.

The unit is one rounding: eps of the coarser dtype times the largest wanted value, so that a number says how many
operations may have rounded differently, in every dtype and at every size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

#: A forward or backward of a small model by another library, another backend or in another order of sums: its two
#: blocks put about 16 operations one behind the other, each of which may be half a rounding off, on both sides.
#: (Measured: up to 8.)
MODEL = 16
#: The same of models whose products sum up thousands of terms, up to 15,360: the rounding of such a sum grows with the
#: root of their number and is 3 times that of a few hundred. (Measured: up to 32.)
WIDE = 48
#: The same in 16 bits, where sums are float32 and only what is stored is rounded: a dozen roundings, by chance up or
#: down, are about the root of 12.
SHORT = 4


def close(
    got: Any,
    want: Any,
    roundings: float | None = None,
    *,
    dtype: torch.dtype | None = None,
    largest: float | None = None,
    what: str = "",
) -> None:
    """Asserts that `got` is at most `roundings` (MODEL, in 16 bits SHORT) away from `want`; tuples, lists and
    dictionaries part by part.

    `dtype` is what was computed in, where the results are wider. `largest` is the size that was rounded, where it is
    not that of `want`: of the terms of a sum that cancels, of all gradients where some are zero.
    """
    given: dict[str, Any] = {"dtype": dtype, "largest": largest}
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want), what
        for i, pair in enumerate(zip(got, want, strict=True)):
            close(*pair, roundings, **given, what=f"{what}[{i}]")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), what
        for key in want:
            close(got[key], want[key], roundings, **given, what=f"{what}[{key!r}]")
    elif want is None:
        assert got is None, what
    else:
        got, want = (x.detach().cpu() if isinstance(x, Tensor) else torch.as_tensor(x) for x in (got, want))
        assert got.shape == want.shape, f"{what}: {list(got.shape)}, not {list(want.shape)}"
        if got.equal(want):
            return
        eps = max(torch.finfo(t).eps for t in ((got.dtype, want.dtype) if dtype is None else (dtype,)))
        if roundings is None:
            roundings = MODEL if eps < 1e-6 else SHORT
        size = want.double().abs().max().item() if largest is None else largest
        found = ((got.double() - want.double()).abs().max() / (eps * size)).item()
        assert found <= roundings, f"{what or 'the results'}: {found:.3g} roundings apart, allowed {roundings}"


def about(number: float, roundings: float = 4) -> Any:
    """A number that was computed in float32: equal to `number` within so many of its roundings."""
    return pytest.approx(number, rel=roundings * torch.finfo(torch.float32).eps, abs=0.0)
