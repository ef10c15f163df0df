"""Random numbers that are the same bits everywhere: whatever the version of PyTorch or NumPy, the processor and its
instruction set, the library of mathematical functions.

torch.randn gives other numbers for one seed under AVX2 than without it and changes between releases; NumPy promises the
raw words of its bit generators (NEP 19) but not what its Generator makes of them, whose normal numbers ask the C
library for logarithms. So a Stream takes raw words of SFC64 and makes everything of them by operations that IEEE 754
rounds in one way only: + - * / and square roots, each by itself.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 15  # values at a time: their intermediate results fit the second-level cache
TABLE_BITS = 12

Size = int | tuple[int, ...]


class Stream:
    """The sequence of random numbers that belongs to a key of whole numbers and texts.

    Methods have the names and arguments of numpy.random.Generator's. Each call goes on where the last one stopped.
    """

    def __init__(self, *key: int | str) -> None:
        text = repr(tuple(part if isinstance(part, str) else int(part) for part in key))
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._raw = np.random.SFC64(int.from_bytes(digest, "little")).random_raw

    def _words(self, count: int) -> np.ndarray:
        """uint32 [count]; of an odd count the last half word is lost."""
        return np.asarray(self._raw(-(-count // 2)), "<u8").view("<u4")[:count]

    def standard_normal(
        self, size: Size, dtype: Any = np.float32, bound: float = math.inf, out: np.ndarray | None = None
    ) -> np.ndarray:
        """N(0, 1), between -bound and bound: float32, or float64 as (x + sqrt(2) y) / sqrt(3) of two such numbers.

        The largest magnitude is 6.34 (float64: 8.8). `out`: the float32 array to fill instead of a new one.
        """
        if np.dtype(dtype) == np.float64:
            x = self.standard_normal(size, bound=bound).astype(np.float64)
            y = self.standard_normal(size, bound=bound).astype(np.float64)
            return x * math.sqrt(1 / 3) + y * math.sqrt(2 / 3)
        out = np.empty(size, np.float32) if out is None else out
        flat = out.reshape(-1)
        cut = round(math.erfc(bound / math.sqrt(2)) * 2**31)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            part[:] = _normal(self._words(part.size), cut)
        return out

    def lognormal(self, sigma: float, size: Size) -> np.ndarray:
        """exp(N(0, sigma^2)), float32."""
        return _exp(np.float32(sigma) * self.standard_normal(size))

    def uniform(self, low: float, high: float, size: Size, dtype: Any = np.float64) -> np.ndarray:
        """low + (high - low) u with u in [0, 1) of 53 bits (float64) or 24 bits (float32)."""
        out = np.empty(size, dtype)
        flat = out.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            if out.dtype == np.float64:
                part[:] = self._raw(part.size) >> np.uint64(11)
                part *= 2.0**-53
            else:
                part[:] = (self._words(part.size) >> 8).view(np.int32)
                part *= np.float32(2.0**-24)
            part *= part.dtype.type(high - low)
            part += part.dtype.type(low)
        return out

    def integers(self, low: int, high: int, size: Size) -> np.ndarray:
        """int64 in [low, high); the bias is at most (high - low) / 2^64."""
        count = math.prod(np.atleast_1d(size).tolist())
        return (self._raw(count) % np.uint64(high - low)).astype(np.int64).reshape(size) + low

    def permutation(self, count: int) -> np.ndarray:
        """0 to count - 1 in random order, int64."""
        return np.argsort(self._raw(count), kind="stable")


def normal(size: Size, *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first N(0, 1) numbers of the key's Stream as a tensor on the CPU."""
    drawn = Stream(*key).standard_normal(size, np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(drawn).to(dtype)


def fresh_key() -> int:
    """64 bits of PyTorch's default generator: what follows depends on torch.manual_seed and differs call by call.

    Of its distributions, whole numbers of few bits are one word of the generator each in every version.
    """
    words = torch.randint(1 << 16, (4,), device="cpu").tolist()
    return sum(word << 16 * place for place, word in enumerate(words))


def _normal(words: np.ndarray, cut: int = 0) -> np.ndarray:
    """uint32 words -> float32 N(0, 1) without the outermost cut / 2^31 of the distribution.

    A word is a sign and 31 bits k: the normal number that is exceeded with probability (k + 1/2) / 2^32. Linear
    interpolation in a table, wrong by at most 3e-6, is four times faster than the quantile; the outermost 3 % get that.
    """
    k = words >> 1
    if cut:
        k = (np.uint64(cut) + (k.astype(np.uint64) * np.uint64(2**31 - cut) >> np.uint64(31))).astype(np.uint32)
    start, step = _table()
    place = (k >> (31 - TABLE_BITS)).astype(np.intp)
    z = step.take(place)
    z *= (k & (2 ** (31 - TABLE_BITS) - 1)).view(np.int32).astype(np.float32)
    z += start.take(place)
    far = np.flatnonzero(place < 2**TABLE_BITS // 32)
    z[far] = _upper_quantile((k[far].view(np.int32).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32))
    z.view(np.uint32)[:] ^= words << 31
    return z


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Per interval of k its first quantile and the slope."""
    knots = np.arange(2**TABLE_BITS + 1, dtype=np.float32) * np.float32(0.5 / 2**TABLE_BITS)
    quantiles = _upper_quantile(np.maximum(knots, np.float32(2.0**-33)))
    return quantiles[:-1], (quantiles[1:] - quantiles[:-1]) * np.float32(2.0 ** (TABLE_BITS - 31))


def _upper_quantile(half: np.ndarray) -> np.ndarray:
    """The z >= 0 that a standard normal number exceeds with probability `half` in (0, 0.5]: float32, to 3e-7.

    Algorithm AS 241, PPND7 (Wichura, 1988); its third interval begins below the smallest `half`, 2^-33.
    """
    middle = np.float32(0.5) - half
    r = np.float32(0.180625) - middle * middle
    z = middle * _polynomial(r, 59.109374720, 159.29113202, 50.434271938, 3.3871327179)
    z /= _polynomial(r, 67.187563600, 78.757757664, 17.895169469, 1.0)
    far = np.flatnonzero(half < np.float32(0.075))
    r = np.sqrt(-_log(half[far])) - np.float32(1.6)
    z[far] = _polynomial(r, 0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
    z[far] /= _polynomial(r, 0.12021132975, 0.73700164250, 1.0)
    return z


def _log(x: np.ndarray) -> np.ndarray:
    """The logarithm of positive float32, to 2e-7: x = m 2^e, log m = 2 artanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    low = m < np.float32(math.sqrt(0.5))
    m, e = np.where(low, m + m, m), e - low
    s = (m - np.float32(1)) / (m + np.float32(1))
    series = _polynomial(s * s, 1 / 7, 1 / 5, 1 / 3, 1.0)
    return e.astype(np.float32) * np.float32(math.log(2)) + (s + s) * series


def _exp(x: np.ndarray) -> np.ndarray:
    """The exponential of float32, to 2e-7: x = k log 2 + r, and r's Taylor series."""
    k = np.rint(x * np.float32(1 / math.log(2)))
    r = x.astype(np.float64) - k.astype(np.float64) * math.log(2)
    series = _polynomial(r, *(1 / math.factorial(n) for n in range(9, -1, -1)))
    return np.ldexp(series, k.astype(np.int32)).astype(np.float32)


def _polynomial(x: np.ndarray, *coefficients: float) -> np.ndarray:
    """Horner's scheme, highest power first."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y *= x
        y += x.dtype.type(coefficient)
    return y
