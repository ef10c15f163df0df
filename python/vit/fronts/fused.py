"""Modules whose formula is not one call of a PyTorch function: gated MLPs, fc1 with its activation, quick GELU,
torch.nn.MultiheadAttention.

Each is known by the names that its code uses, in their order: a version of a library that does more in its `forward`
uses more of them, and is left alone. Where not all is as usual, or somebody looks at a module that would be passed
over, the module's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..model.torch_layers import runs, unwatched, watched_everywhere
from .functional import Functions, names_in

Forward = Callable[..., Any]


def fused(kind: type[nn.Module], functions: Functions) -> tuple[Forward, tuple[str, ...]] | None:
    """A forward in place of that of the class, and the ops in it; None for a class that is none of these."""
    own: Any = kind.forward
    if kind is nn.MultiheadAttention:
        return _attention(own, functions), ("linear", "attention")
    if not isinstance(own, FunctionType):
        return None
    names = tuple(names_in(own.__code__))
    numbers = tuple(one for one in own.__code__.co_consts if isinstance(one, float))
    if (names, numbers) in _FORMULAS:
        return _by_formula(own, functions, _FORMULAS[names, numbers]), ("gelu",)
    if names == _RMS_NORM:
        return _rms_norm(own, functions), ("rms_norm",)
    if names == ("act",) and kind.__module__ == "transformers.activations":
        return _by_act(own, functions), ("gelu",)
    made = _MLPS.get(names)
    return None if made is None else made(own, functions)


# ---- activations ----


def kind_of(module: nn.Module) -> Any:
    """The class of a module, that before if it is swapped."""
    return getattr(type(module), "_vit_swapped", (type(module),))[0]


def activation_of(module: nn.Module) -> str | None:
    """The activation of vit.ops.linear that a module of torch, timm or transformers computes; None for another one."""
    kind = kind_of(module)
    where, name = kind.__module__, kind.__name__
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if where == "timm.layers.activations":
        return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(name)
    if where == "transformers.activations":
        if name in ("GELUActivation", "GELUTanh"):
            return _gelu_of(getattr(module, "act", None))
        others = {"QuickGELUActivation": "quick_gelu", "NewGELUActivation": "gelu_tanh", "SiLUActivation": "silu"}
        return others.get(name)
    name = {nn.SiLU: "silu", nn.ReLU: "relu"}.get(kind)
    return None if name is None or module.inplace else name


def _gelu_of(function: Any) -> str | None:
    if function is F.gelu:
        return "gelu"
    tanh = getattr(function, "func", None) is F.gelu and getattr(function, "keywords", None) == {"approximate": "tanh"}
    return "gelu_tanh" if tanh and not function.args else None


def _by_act(own: Forward, functions: Functions) -> Forward:
    """transformers' GELU, which keeps the function that it calls."""

    def forward(self: Any, input: Tensor) -> Tensor:
        name = _gelu_of(self.act)
        if name is None:
            return own(self, input)
        return functions.functional.gelu(input, approximate="tanh" if name == "gelu_tanh" else "none")

    return forward


#: Names and numbers in the code of activations that are written out -> the approximation of vit.ops.gelu.
_FORMULAS = {
    (("torch", "sigmoid"), (1.702,)): "quick",
    (("torch", "tanh", "math", "sqrt", "pi", "pow"), (0.5, 1.0, 2.0, 0.044715, 3.0)): "tanh",
}


def _by_formula(own: Forward, functions: Functions, approximate: str) -> Forward:
    """x * sigmoid(1.702 x), or GELU's tanh form."""

    def forward(self: Any, input: Tensor) -> Tensor:
        ops = functions.for_tensor(input)
        return own(self, input) if ops is None or not runs(ops.gelu, input) else ops.gelu(input, approximate)

    return forward


#: The code of transformers' RMSNorm: weight * (x in float32 / root mean square) in x's dtype.
_RMS_NORM = ("dtype", "to", "torch", "float32", "pow", "mean", "rsqrt", "variance_epsilon", "weight")


def _rms_norm(own: Forward, functions: Functions) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        ops, weight = functions.for_tensor(hidden_states), self.weight
        # A weight of another dtype would decide about the dtype of the result.
        if ops is None or weight.dtype != hidden_states.dtype or not runs(ops.rms_norm, hidden_states, weight):
            return own(self, hidden_states)
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)

    return forward


# ---- MLPs ----


def _unseen(*modules: nn.Module) -> bool:
    """Whether nobody would notice that modules of these classes are not called."""
    return unwatched(modules) and not watched_everywhere()


def _plain_mlp(fc1: str, act: str, rest: Callable[[Any, Tensor], Tensor]) -> Any:
    """fc1 and its activation in one op; then what the module does behind them."""

    def make(own: Forward, functions: Functions) -> tuple[Forward, tuple[str, ...]]:
        def forward(self: Any, x: Tensor) -> Tensor:
            first, second = getattr(self, fc1), getattr(self, act)
            name, ops = activation_of(second), functions.for_tensor(x)
            if name is None or ops is None or kind_of(first) is not nn.Linear or not _unseen(first, second):
                return own(self, x)
            if not runs(ops.linear, x, first.weight, first.bias):
                return own(self, x)
            return rest(self, ops.linear(x, first.weight, first.bias, name))

        return forward, ("linear", "gelu")

    return make


def _gated_mlp(act: str, parts: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]], rest: Any) -> Any:
    """silu(gate) * x in one op. parts: the gate and the values, or both packed and None."""

    def make(own: Forward, functions: Functions) -> tuple[Forward, tuple[str, ...]]:
        def forward(self: Any, x: Tensor) -> Tensor:
            module, ops = getattr(self, act), functions.for_tensor(x)
            usual = activation_of(module) == "silu" and _unseen(module) and not getattr(self, "gate_last", False)
            if ops is None or not usual or getattr(self, "chunk_dim", -1) != -1:
                return own(self, x)
            gate, values = parts(self, x)
            if runs(ops.swiglu, gate, values):
                return rest(self, ops.swiglu(gate) if values is None else ops.swiglu(values, gate))
            gate, values = (gate, values) if values is not None else gate.chunk(2, dim=-1)
            return rest(self, module(gate) * values)

        return forward, ("swiglu",)

    return make


def _timm_rest(self: Any, x: Tensor) -> Tensor:
    return self.drop2(self.fc2(self.norm(self.drop1(x))))


#: Names in the code of `forward`, in order -> what makes ours.
_MLPS: dict[tuple[str, ...], Any] = {
    # timm: Mlp, GluMlp, SwiGLU
    ("fc1", "act", "drop1", "norm", "fc2", "drop2"): _plain_mlp("fc1", "act", _timm_rest),
    ("fc1", "chunk", "chunk_dim", "gate_last", "act", "drop1", "norm", "fc2", "drop2"): _gated_mlp(
        "act", lambda self, x: (self.fc1(x), None), _timm_rest
    ),
    ("fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2"): _gated_mlp(
        "act", lambda self, x: (self.fc1_g(x), self.fc1_x(x)), _timm_rest
    ),
    # transformers: ViT, CLIP, SigLIP, DINOv2; DINOv3 without and with a gate, DINOv2 with one, AIMv2
    ("fc1", "activation_fn", "fc2"): _plain_mlp("fc1", "activation_fn", lambda self, x: self.fc2(x)),
    ("down_proj", "act_fn", "up_proj"): _plain_mlp("up_proj", "act_fn", lambda self, x: self.down_proj(x)),
    ("down_proj", "act_fn", "gate_proj", "up_proj"): _gated_mlp(
        "act_fn", lambda self, x: (self.gate_proj(x), self.up_proj(x)), lambda self, x: self.down_proj(x)
    ),
}


# ---- attention ----


def _attention(own: Forward, functions: Functions) -> Forward:
    """torch.nn.MultiheadAttention of one sequence with itself, where no probabilities are asked for."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if query is key and key is value and not need_weights and not masked and why_not(self) is None:
            ops = functions.for_tensor(query)
            both = (self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
            dropped = self.training and self.dropout
            if ops is not None and query.dim() == 3 and not dropped and runs(ops.linear, query, *both):
                packed = ops.linear(query, self.in_proj_weight, self.in_proj_bias)
                packed = packed.unflatten(2, (3, self.num_heads, self.head_dim))
                x = ops.attention(packed).flatten(2)
                return ops.linear(x, self.out_proj.weight, self.out_proj.bias), None
        return own(
            self,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    return forward


def why_not(module: nn.MultiheadAttention) -> str | None:
    """What a MultiheadAttention has that the op does not; None where it has nothing of it."""
    if not module.batch_first:
        return "batch_first is False"
    if not module._qkv_same_embed_dim:
        return "keys and values have another width than queries"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    return None
