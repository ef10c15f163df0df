"""What the case list needs to know of attention and of its rows (see definitions.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, Ops, Tensors


class Attention:
    backward_work = 2.5

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        b, n, h, d = (case[letter] for letter in "bnhd")
        length = dict(case.sizes).get("l", n)
        return {"q": (b, n, h, d), "k": (b, length, h, d), "v": (b, length, h, d)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        pass

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        return ops.attention(t["q"], t["k"], t["v"], scale=case.option("scale"), lengths=case.option("lengths"))

    def torch(self, case: Case, t: Tensors) -> Tensor:
        lengths = case.option("lengths")
        if lengths is None:
            q, k, v = (t[name].transpose(1, 2) for name in "qkv")
            return F.scaled_dot_product_attention(q, k, v, scale=case.option("scale")).transpose(1, 2)
        q, k, v = (t[name].transpose(1, 2).split(lengths, 2) for name in "qkv")
        images = zip(q, k, v, strict=True)
        out = [F.scaled_dot_product_attention(*image, scale=case.option("scale")) for image in images]
        return torch.cat(out, 2).transpose(1, 2)

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        if lengths := case.option("lengths"):
            alone = dataclasses.replace(case, options=())
            split = zip(*(x.split(lengths, 1) for x in (t["q"], t["k"], t["v"], dy)), strict=True)
            each = [self.magnitude(alone, dict(zip("qkv", image, strict=False)), image[3]) for image in split]
            return {name: torch.cat([one[name] for one in each], 1) for name in each[0]}
        q, k, v, do = (x.transpose(1, 2) for x in (t["q"], t["k"], t["v"], dy))
        scale = case.option("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        p = (scale * q @ k.mT).softmax(-1)
        scores = abs(scale) * q.abs() @ k.abs().mT
        # dp_i = p_i (ds_i - sum_j p_j ds_j) with every ds_j of size scores_j: what rounded scores do to p. The
        # backward takes its p from the maximum and the sum that the forward saved, and from the same scores.
        others = (p * scores).sum(-1, keepdim=True) - p * scores
        rounded = p * (scores * (1 - p) + others.clamp_min(0))
        out = (p + rounded) @ v.abs()
        dp = do @ v.mT
        dp_abs = do.abs() @ v.abs().mT
        centred = (dp - (p * dp).sum(-1, keepdim=True)).abs()
        ds = p * (dp_abs + (p * dp_abs + rounded * dp.abs()).sum(-1, keepdim=True)) + rounded * centred
        ds = abs(scale) * ds
        grads = {
            "out": out,
            "q": ds @ k.abs(),
            "k": ds.mT @ q.abs(),
            "v": (p + rounded).mT @ do.abs(),
        }
        return {name: x.transpose(1, 2) for name, x in grads.items()}

    def work(self, case: Case) -> tuple[float, str]:
        keys = self.shapes(case)["k"][1]
        scores = sum(n * n for n in case.option("lengths", ())) or case["n"] * keys
        return 4.0 * case["b"] * case["h"] * scores * case["d"], "GFLOP/s"


class AttentionRows:
    backward_work = 0.0

    def shapes(self, case: Case) -> dict[str, tuple[int, ...]]:
        b, n, h, d = (case[letter] for letter in "bnhd")
        return {"q": (b, n, h, d), "k": (b, dict(case.sizes).get("l", n), h, d)}

    def draw(self, case: Case, tensors: Tensors) -> None:
        pass

    def call(self, ops: Ops, case: Case, t: Tensors) -> Tensor:
        options = {name: case.option(name) for name in ("queries", "scale", "lengths")}
        return ops.attention_rows(t["q"], t["k"], **options)

    def torch(self, case: Case, t: Tensors) -> Tensor:
        """The scores in the dtype of the result: of 16 bits no product is rounded."""
        if lengths := case.option("lengths"):
            return self._of_each(case, t, lengths, self.torch)
        q, k, scale = self._chosen(case, {name: x.to(_wide(x.dtype)) for name, x in t.items()})
        return (scale * q @ k.mT).softmax(-1)

    def magnitude(self, case: Case, t: Tensors, dy: Tensor) -> Tensors:
        return {"out": self._magnitude(case, t)}

    def _magnitude(self, case: Case, t: Tensors) -> Tensor:
        """p, and what rounded scores do to it, as in Attention."""
        if lengths := case.option("lengths"):
            return self._of_each(case, t, lengths, self._magnitude)
        q, k, scale = self._chosen(case, t)
        p, scores = (scale * q @ k.mT).softmax(-1), abs(scale) * q.abs() @ k.abs().mT
        others = (p * scores).sum(-1, keepdim=True) - p * scores
        return p + p * (scores * (1 - p) + others.clamp_min(0))

    def _of_each(
        self, case: Case, t: Tensors, lengths: Sequence[int], of_one: Callable[[Case, Tensors], Tensor]
    ) -> Tensor:
        alone = dataclasses.replace(case, options=tuple(o for o in case.options if o[0] != "lengths"))
        images = zip(*(t[name].split(lengths, 1) for name in "qk"), strict=True)
        return torch.cat([of_one(alone, {"q": q, "k": k}) for q, k in images], -1)

    def _chosen(self, case: Case, t: Tensors) -> tuple[Tensor, Tensor, float]:
        """q [B, H, R, D], k [B, H, L, D] and the scale."""
        queries, scale = case.option("queries"), case.option("scale")
        q = t["q"] if queries is None else t["q"][:, list(queries)]
        return q.transpose(1, 2), t["k"].transpose(1, 2), q.shape[-1] ** -0.5 if scale is None else scale

    def work(self, case: Case) -> tuple[float, str]:
        rows = case["n"] if case.option("queries") is None else len(case.option("queries"))
        return 2.0 * case["b"] * case["h"] * rows * self.shapes(case)["k"][1] * case["d"], "GFLOP/s"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
