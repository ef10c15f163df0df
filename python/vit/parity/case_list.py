"""The one list of cases: parity, gradients, benchmarks and capability all walk over `CASES`.

Sizes use the letters of `csrc/vit.h`: b batch, m rows, n columns (matmul, linear) or tokens (attention),
k inner size, l keys, h heads, d head dimension, c channels. Four groups:

    regular   shapes of real Vision Transformers, at batch sizes a test can afford
    odd       primes, ones, tails around every tile size, strided, misaligned, packed and broadcast tensors
    corner    empty tensors, NaN, infinities, magnitudes near the ends of a dtype, constant rows
    large     what a training step looks like: bounded so that the list stays within minutes on two cores
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .case import Case, case_of, words

DTYPES = ("float32", "float64", "bfloat16")
GPU_DTYPES = ("float32", "bfloat16", "float16")


def _layer_norm() -> Iterator[Case]:
    for sizes in words("m197 c192, m197 c384, m197 c768, b2 m50 c1024, m17 c64"):
        yield case_of("layer_norm", "regular", sizes)
    for sizes in words(
        "m1 c1, m3 c2, m5 c7, m1 c768, m7 c127, b2 m3 c33, m2 c1408, m11 c1280, c768, c5, m9 c31, m6 c17"
    ):
        yield case_of("layer_norm", "odd", sizes)
    yield case_of("layer_norm", "odd", "m13 c96", weight=False, bias=False)
    yield case_of("layer_norm", "odd", "m13 c96", bias=False)
    yield case_of("layer_norm", "odd", "m13 c96", eps=1e-3)
    yield case_of("layer_norm", "odd", "m13 c96", eps=1e-12)
    for layout in words("rows, offset1, offset3, columns, transposed, expanded"):
        yield case_of("layer_norm", "odd", "m13 c95", layout=layout)
    yield case_of("layer_norm", "odd", "b3 m5 c40", layout="tokens")
    for sizes in words("m0 c64, b0 m5 c64"):
        yield case_of("layer_norm", "corner", sizes)
    for values in words("offset_x, constant_x, zero_x, huge_x, tiny_x, nan_x, inf_x, nan_weight, inf_bias"):
        yield case_of("layer_norm", "corner", "m19 c130", values=values)
    yield case_of("layer_norm", "corner", "m3 c1", values="offset_x")
    yield case_of("layer_norm", "large", "m1576 c768")
    yield case_of("layer_norm", "large", "m3152 c384")


def _rms_norm() -> Iterator[Case]:
    for sizes in words("m197 c384, m197 c768, b2 m50 c1024, b2 m197 c64"):
        yield case_of("rms_norm", "regular", sizes)
    for sizes in words("m1 c1, m3 c2, m5 c7, m7 c127, b2 m3 c33, m11 c1280, c768, c5, m9 c31, m6 c17, m301 c72"):
        yield case_of("rms_norm", "odd", sizes)
    yield case_of("rms_norm", "odd", "m13 c96", weight=False)
    yield case_of("rms_norm", "odd", "m13 c96", eps=1e-3)
    for layout in words("rows, offset1, offset3, columns, transposed, expanded"):
        yield case_of("rms_norm", "odd", "m13 c95", layout=layout)
    yield case_of("rms_norm", "odd", "b3 m5 c40", layout="tokens")
    for sizes in words("m0 c64, b0 m5 c64"):
        yield case_of("rms_norm", "corner", sizes)
    for values in words("offset_x, constant_x, zero_x, huge_x, tiny_x, nan_x, inf_x, nan_weight"):
        yield case_of("rms_norm", "corner", "m19 c130", values=values)
    yield case_of("rms_norm", "large", "m1576 c768")


def _gelu() -> Iterator[Case]:
    for approximate in words("none, tanh, quick, silu, relu"):
        option = {} if approximate == "none" else {"approximate": approximate}
        for sizes in words("m197 c768, m17 c256"):
            yield case_of("gelu", "regular", sizes, **option)
        for sizes in words("c1, c7, c17, c129, m3 c5, b2 m3 c31"):
            yield case_of("gelu", "odd", sizes, **option)
        for layout in words("rows, offset1, offset3, columns, transposed, expanded"):
            yield case_of("gelu", "odd", "m13 c37", layout=layout, **option)
        yield case_of("gelu", "corner", "m0 c8", **option)
        for values in words("huge_x, tiny_x, wide_x, zero_x, nan_x, inf_x"):
            yield case_of("gelu", "corner", "m7 c61", values=values, **option)
    yield case_of("gelu", "large", "m1576 c3072")


def _swiglu() -> Iterator[Case]:
    for packed in (True, False):
        for sizes in words("m197 c512, m50 c2048"):
            yield case_of("swiglu", "regular", sizes, packed=packed)
        for sizes in words("m1 c1, m3 c5, c7, m5 c17, m9 c129, b2 m3 c31, m33 c341"):
            yield case_of("swiglu", "odd", sizes, packed=packed)
        for layout in words("rows, offset1, offset3, columns, transposed, expanded"):
            yield case_of("swiglu", "odd", "m13 c37", layout=layout, packed=packed)
        yield case_of("swiglu", "odd", "b3 m5 c40", layout="tokens", packed=packed)
        for sizes in words("m0 c8, m3 c0"):
            yield case_of("swiglu", "corner", sizes, packed=packed)
        for values in words("huge_x, tiny_x, wide_x, zero_x, nan_x, inf_x"):
            yield case_of("swiglu", "corner", "m7 c61", values=values, packed=packed)
    yield case_of("swiglu", "corner", "m7 c61", values="huge_gate", packed=False)
    yield case_of("swiglu", "large", "m1576 c2048", packed=True)


def _matmul() -> Iterator[Case]:
    for sizes in words("m197 n384 k384, b6 m197 n197 k64, b6 m197 n64 k197, b2 h3 m50 n50 k64"):
        yield case_of("matmul", "regular", sizes)
    for sizes in words(
        "m1 n1 k1, m1 n1 k768, m1 n768 k1, m768 n1 k5, m7 n13 k11, m8 n48 k16, m9 n49 k17, m31 n33 k65, m13 "
        "n97 k3, b5 m3 n5 k7, b2 h3 m4 n5 k6, m64 n64 k64, m12 n32 k2, m101 n17 k257"
    ):
        yield case_of("matmul", "odd", sizes)
    for layout in words("nt, tn, tt, rows, columns, offset1, expanded"):
        yield case_of("matmul", "odd", "b3 m17 n29 k23", layout=layout)
    for layout in words("broadcast_a, broadcast_b, single_a, single_b"):
        yield case_of("matmul", "odd", "b3 h2 m17 n19 k23", layout=layout)
    for sizes in words("m5 n7 k0, b2 m5 n7 k0, m0 n7 k3, m5 n0 k3, b0 m5 n7 k3"):
        yield case_of("matmul", "corner", sizes)
    for values in words("huge_a, tiny_a, tiny_a+tiny_b, zero_b, nan_a, nan_b, inf_a, inf_b, offset_a"):
        yield case_of("matmul", "corner", "m21 n50 k35", values=values)
    yield case_of("matmul", "large", "m1576 n384 k384")
    yield case_of("matmul", "large", "b48 m197 n197 k64", layout="nt")


def _linear() -> Iterator[Case]:
    residual: dict[str, Any] = {"residual": True}
    gelu: dict[str, Any] = {"activation": "gelu"}
    tanh: dict[str, Any] = {"activation": "gelu_tanh"}
    yield case_of("linear", "regular", "m197 n576 k192")
    yield case_of("linear", "regular", "m197 n192 k192", **residual)
    yield case_of("linear", "regular", "m197 n768 k192", **gelu)
    yield case_of("linear", "regular", "m197 n192 k768", **residual)
    yield case_of("linear", "regular", "m197 n1152 k384")
    yield case_of("linear", "regular", "m197 n1536 k384", **gelu)
    yield case_of("linear", "regular", "m197 n384 k1536", **residual)
    yield case_of("linear", "regular", "m197 n768 k768", **residual)
    yield case_of("linear", "regular", "m8 n1000 k384")
    yield case_of("linear", "regular", "b2 m50 n384 k384")
    yield case_of("linear", "regular", "b4 m17 n192 k64")
    for sizes in words(
        "m1 n1 k1, m1 n768 k768, m2 n3 k1, m197 n1 k96, m7 n13 k11, m8 n48 k16, m9 n49 k17, m31 n33 k65, "
        "m101 n97 k127, m96 n96 k96, m97 n47 k31, m5 n10 k64, n7 k5, n48 k192, b2 m3 n5 k7"
    ):
        yield case_of("linear", "odd", sizes)
    for sizes in words("m7 n13 k11, m9 n49 k17, m50 n98 k33, m1 n1 k1, n13 k7, b2 m3 n5 k7"):
        yield case_of("linear", "odd", sizes, **gelu)
        yield case_of("linear", "odd", sizes, **residual)
        yield case_of("linear", "odd", sizes, **tanh, **residual)
    yield case_of("linear", "odd", "m13 n50 k29", bias=False)
    yield case_of("linear", "odd", "m13 n50 k29", bias=False, **gelu)
    yield case_of("linear", "odd", "m13 n50 k29", bias=False, **tanh)
    yield case_of("linear", "odd", "m13 n50 k29", bias=False, **gelu, **residual)
    for layout in words("rows, offset1, offset3, columns, transposed, expanded"):
        yield case_of("linear", "odd", "m37 n53 k41", layout=layout, **gelu, **residual)
    yield case_of("linear", "odd", "b3 m5 n33 k40", layout="tokens", **residual)
    for sizes in words("m0 n8 k16, b0 m3 n8 k16, m3 n0 k16, m5 n8 k0, b2 m5 n8 k0"):
        yield case_of("linear", "corner", sizes)
    yield case_of("linear", "corner", "m0 n8 k16", **gelu, **residual)
    yield case_of("linear", "corner", "m5 n8 k0", **gelu, **residual)
    for values in words(
        "huge_x, tiny_x, tiny_x+tiny_weight, zero_weight, nan_x, nan_weight, nan_bias, inf_x, inf_weight, offset_x"
    ):
        yield case_of("linear", "corner", "m21 n50 k35", values=values)
    for values in words("huge_x, wide_x, nan_x, inf_x, nan_residual, inf_bias"):
        yield case_of("linear", "corner", "m21 n50 k35", values=values, **gelu, **residual)
    yield case_of("linear", "corner", "m21 n50 k35", values="huge_x", **tanh)
    yield case_of("linear", "large", "m1576 n768 k768")
    yield case_of("linear", "large", "m1576 n2304 k768")
    yield case_of("linear", "large", "m1576 n3072 k768", **gelu)
    yield case_of("linear", "large", "m1576 n768 k3072", **residual)
    yield case_of("linear", "large", "m197 n3072 k768", **gelu)
    yield case_of("linear", "large", "m197 n768 k3072", **residual)


def _scaled() -> Iterator[Case]:
    """LayerScale in linear, and the activations that came with it."""
    scale: dict[str, Any] = {"scale": True}
    yield case_of("linear", "regular", "m197 n384 k384", **scale, residual=True)
    yield case_of("linear", "regular", "m197 n192 k768", **scale, residual=True)
    yield case_of("linear", "regular", "m197 n1536 k384", activation="quick_gelu")
    for sizes in words("m7 n13 k11, m9 n49 k17, m50 n98 k33, m1 n1 k1, n13 k7, b2 m3 n5 k7"):
        yield case_of("linear", "odd", sizes, **scale, residual=True)
        yield case_of("linear", "odd", sizes, **scale, activation="silu")
        yield case_of("linear", "odd", sizes, activation="quick_gelu", residual=True)
        yield case_of("linear", "odd", sizes, activation="relu")
    yield case_of("linear", "odd", "m13 n50 k29", bias=False, **scale)
    yield case_of("linear", "odd", "m13 n50 k29", bias=False, **scale, activation="gelu", residual=True)
    for layout in words("rows, offset1, columns, transposed, expanded"):
        yield case_of("linear", "odd", "m37 n53 k41", layout=layout, **scale, residual=True)
    for sizes in words("m0 n8 k16, m3 n0 k16, m5 n8 k0"):
        yield case_of("linear", "corner", sizes, **scale, residual=True)
    for values in words("huge_x, nan_scale, zero_scale, tiny_scale, nan_residual"):
        yield case_of("linear", "corner", "m21 n50 k35", values=values, **scale, residual=True)
    for activation in words("quick_gelu, silu, relu"):
        for values in words("huge_x, wide_x, inf_x"):
            yield case_of("linear", "corner", "m21 n50 k35", values=values, activation=activation)
    yield case_of("linear", "large", "m1576 n768 k3072", **scale, residual=True)


def _rotary() -> Iterator[Case]:
    for pairing in words("interleaved, half"):
        option: dict[str, Any] = {} if pairing == "interleaved" else {"pairing": pairing}
        yield case_of("rotary", "regular", "b2 n197 h6 d64", layout="packed", prefix=1, **option)
        yield case_of("rotary", "regular", "b1 n201 h3 d64", layout="packed", prefix=5, **option)
        for sizes in words("b1 n1 h1 d2, b2 n3 h1 d6, b1 n5 h2 d10, b2 n7 h3 d34, b1 n12 h2 d80, b1 n9 h1 d256"):
            yield case_of("rotary", "odd", sizes, **option)
        for table in words("heads, samples, both"):
            yield case_of("rotary", "odd", "b3 n11 h2 d24", table=table, prefix=2, **option)
        for layout in words("packed, heads_first, rows, offset1, offset3, columns, expanded, tokens"):
            yield case_of("rotary", "odd", "b2 n27 h3 d24", layout=layout, prefix=1, **option)
        yield case_of("rotary", "odd", "b2 n3 h1 d6", prefix=3, **option)
        for sizes in words("b0 n5 h2 d16, b2 n0 h2 d16, b2 n5 h0 d16, b2 n5 h2 d0"):
            yield case_of("rotary", "corner", sizes, **option)
        for values in words("huge_x, tiny_x, zero_x, nan_x, nan_table, inf_x"):
            yield case_of("rotary", "corner", "b2 n7 h2 d32", values=values, prefix=1, **option)
    yield case_of("rotary", "large", "b8 n197 h12 d64", layout="packed", prefix=1)
    yield case_of("rotary", "large", "b4 n257 h12 d64", table="heads")


#: Elements of a head in the named models, and in their poolings.
HEAD_DIMS = (24, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128, 192)


def _attention() -> Iterator[Case]:
    for sizes in words("b1 n197 h3 d64, b2 n197 h6 d64, b2 n50 h12 d64"):
        yield case_of("attention", "regular", sizes, layout="packed")
    for sizes in words("b4 n17 h4 d16, b1 n257 h2 d80, b1 n257 h2 d88"):
        yield case_of("attention", "regular", sizes, layout="packed")
    for sizes in words(
        "b1 n1 h1 d8, b1 n1 h1 d64, b2 n2 h1 d16, b1 n3 h2 d8, b3 n7 h1 d24, b1 n12 h2 d32, b1 n13 h1 d40, "
        "b1 n16 h1 d48, b1 n17 h1 d64, b2 n31 h3 d72, b1 n33 h1 d96, b1 n63 h1 d128, b1 n65 h2 d160, b1 n29 "
        "h1 d256, b1 n48 h1 d12, b1 n49 h1 d17, b1 n101 h1 d57, b1 n130 h1 d255"
    ):
        yield case_of("attention", "odd", sizes)
    for sizes in words(
        "b2 n5 l33 h2 d16, b1 n33 l5 h2 d16, b1 n1 l197 h3 d64, b1 n197 l1 h1 d64, b1 n70 l129 h1 d32, b2 "
        "n129 l67 h2 d64"
    ):
        yield case_of("attention", "odd", sizes)
    for layout in words("packed, heads_first, rows, offset1, offset3, columns, expanded, tokens"):
        yield case_of("attention", "odd", "b2 n27 h3 d24", layout=layout)
    for scale in (1.0, 0.05, -0.3, 0.0):
        yield case_of("attention", "odd", "b1 n37 h2 d32", scale=scale)
    for lengths in ((37,), (1, 1), (5, 17, 17, 1, 70), (130, 3)):
        yield case_of("attention", "odd", f"b1 n{sum(lengths)} h2 d24", layout="packed", lengths=lengths)
    yield case_of("attention", "odd", "b1 n50 h3 d64", layout="columns", lengths=(16, 33, 1))
    yield case_of("attention", "large", "b1 n845 h6 d64", layout="packed", lengths=(64, 197, 197, 387))
    for sizes in words("b0 n5 h2 d16, b2 n0 l5 h2 d16, b2 n5 h0 d16"):
        yield case_of("attention", "corner", sizes)
    for values in words(
        "big_q, big_q+big_k, limit_q+limit_k, huge_v, tiny_q, tiny_v, zero_q, zero_v, constant_k, "
        "offset_q+offset_k, nan_q, nan_k, nan_v, inf_q, inf_k, inf_v"
    ):
        yield case_of("attention", "corner", "b2 n70 h2 d32", values=values)
    yield case_of("attention", "corner", "b1 n5 l67 h1 d64", values="inf_v")
    yield case_of("attention", "large", "b4 n197 h12 d64", layout="packed")
    yield case_of("attention", "large", "b1 n577 h3 d64", layout="packed")
    yield case_of("attention", "large", "b1 n1370 h1 d64", layout="packed")
    for head_dim in HEAD_DIMS:  # at one length, to be compared with each other
        yield case_of("attention", "large", f"b2 n257 h4 d{head_dim}", layout="packed")


def _attention_rows() -> Iterator[Case]:
    yield case_of("attention_rows", "regular", "b2 n197 h6 d64", layout="packed", queries=(0,))
    yield case_of("attention_rows", "regular", "b1 n261 h3 d64", layout="packed", queries=(0, 1, 4, 133, 260))
    for sizes in words("b1 n1 h1 d8, b2 n7 h1 d24, b1 n17 h3 d72, b1 n29 h2 d17, b2 n101 h1 d255, b1 n70 l1290 h1 d40"):
        yield case_of("attention_rows", "odd", sizes)
    yield case_of("attention_rows", "odd", "b2 n1 l197 h3 d64", layout="expanded", queries=(0,))
    for layout in words("packed, heads_first, rows, offset1, offset3, columns, tokens"):
        yield case_of("attention_rows", "odd", "b2 n27 h3 d24", layout=layout, queries=(9, 3, 26))
    for scale in (1.0, 0.05, -0.3, 0.0):
        yield case_of("attention_rows", "odd", "b1 n37 h2 d32", scale=scale, queries=(5, 6, 7))
    for lengths in ((37,), (5, 17, 17, 70), (130, 3)):
        sizes = f"b1 n{sum(lengths)} h2 d24"
        yield case_of("attention_rows", "odd", sizes, layout="packed", lengths=lengths, queries=(2, 0))
    for sizes in words("b0 n5 h2 d16, b2 n5 h0 d16"):
        yield case_of("attention_rows", "corner", sizes, queries=(1,))
    yield case_of("attention_rows", "corner", "b2 n5 h2 d16", queries=())
    for values in words("big_q+big_k, limit_q+limit_k, tiny_q, zero_q, constant_k, nan_q, nan_k, inf_q, inf_k"):
        yield case_of("attention_rows", "corner", "b2 n70 h2 d32", values=values)


def _mixed() -> Iterator[Case]:
    """bfloat16 activations with float32 parameters (autocast) or a float32 residual stream."""
    mixed: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "float32"}
    for sizes in words("m197 c384, m13 c33, m5 c1"):
        yield dataclasses.replace(case_of("layer_norm", "odd", sizes), **mixed)
    yield dataclasses.replace(case_of("layer_norm", "odd", "m13 c33", bias=False), **mixed)
    for sizes in words("m197 c384, m13 c33, m5 c1"):
        yield dataclasses.replace(case_of("rms_norm", "odd", sizes), **mixed)
    for table in words("shared, heads"):
        yield dataclasses.replace(case_of("rotary", "odd", "b2 n19 h3 d24", table=table, prefix=1), **mixed)
    options: tuple[dict[str, Any], ...] = (
        {},
        {"activation": "gelu"},
        {"residual": True},
        {"activation": "gelu_tanh", "residual": True},
        {"scale": True, "residual": True},
        {"bias": False},
    )
    for sizes in words("m197 n384 k384, m31 n50 k37"):
        for option in options:
            case = dataclasses.replace(case_of("linear", "odd", sizes, **option), dtype="bfloat16")
            yield dataclasses.replace(case, param_dtype="float32")
            if case.option("residual"):  # and the scale has its type
                yield dataclasses.replace(case, out_dtype="float32")
                yield dataclasses.replace(case, param_dtype="float32", out_dtype="float32")


def _without_gradient(case: Case) -> bool:
    """Gradients at infinite inputs are exempt: the formula's own derivative is inf * 0 there. A routine has none."""
    return "inf_" in case.values or case.op == "attention_rows"


def _expand(dtypes: Iterable[str], tf32: bool = False) -> Iterator[Case]:
    """Every shape in every dtype and direction; with `tf32` the products of float32 in TF32, too."""
    dtypes = tuple(dtypes)
    norms = [*_layer_norm(), *_rms_norm()]
    products = [*_matmul(), *_linear(), *_scaled()]
    base = [*norms, *_gelu(), *_swiglu(), *products, *_rotary(), *_attention(), *_attention_rows()]
    shapes = [
        dataclasses.replace(case, dtype=dtype)
        for case in base
        for dtype in dtypes
        if case.group != "large" or dtype != "float64"  # no one trains in float64; "odd" has its tails
    ]
    shapes += [case for case in _mixed() if case.dtype in dtypes]
    for case in shapes:
        if case.dtype == "float16" and "limit" in case.values:
            continue  # the exponent range of float16 is tested by "big"
        rounded = tf32 and case.dtype == "float32" and case.op in ("matmul", "linear", "attention")
        for variant in (case, dataclasses.replace(case, tf32=True)) if rounded else (case,):
            yield variant
            if not _without_gradient(case):
                yield dataclasses.replace(variant, direction="bwd")


CASES: tuple[Case, ...] = tuple(_expand(DTYPES))


def cases(
    device: str = "cpu",
    ops: Iterable[str] | None = None,
    groups: Iterable[str] | None = None,
    dtypes: Iterable[str] | None = None,
    directions: Iterable[str] | None = None,
    pattern: str | None = None,
) -> list[Case]:
    """The cases of a device type, narrowed by op, group, dtype, direction or a regular expression on the id.

    GPU device types get float16 in place of float64; CUDA has the products of float32 in TF32, too.
    """
    everything = CASES if device == "cpu" else tuple(_expand(GPU_DTYPES, tf32=device == "cuda"))
    wanted = {"op": ops, "group": groups, "dtype": dtypes, "direction": directions}
    sets = {field: set(names) for field, names in wanted.items() if names is not None}
    regex = re.compile(pattern) if pattern else None
    return [
        case
        for case in everything
        if all(getattr(case, field) in names for field, names in sets.items())
        and (regex is None or regex.search(case.id))
    ]
