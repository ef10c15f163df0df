"""timm's Block with the sums and LayerScale inside the linear ops: a third of the passes over the activations."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..model.torch_layers import plain, runs, unwatched, watched_everywhere
from ..ops._attention import MAX_HEAD_DIM
from .functional import Functions, names_in
from .fused import activation_of, kind_of

#: The code of Block.forward: x + drop_path1(ls1(attn(norm1(x)))), then x + drop_path2(ls2(mlp(norm2(x)))).
BLOCK = ("drop_path1", "ls1", "attn", "norm1", "drop_path2", "ls2", "mlp", "norm2")
_MLP = ("fc1", "act", "drop1", "norm", "fc2", "drop2")
#: What the versions of Attention.forward use.
_ATTENTION = {
    *("shape", "gate", "sigmoid", "qkv", "reshape", "num_heads", "head_dim", "permute", "unbind", "q_norm", "k_norm"),
    *("fused_attn", "F", "scaled_dot_product_attention", "attn_drop", "p", "training", "scale", "transpose", "norm"),
    *("resolve_self_attn_mask", "maybe_add_mask", "softmax", "attn_dim", "proj", "proj_drop"),
}


def why_not(block: Any) -> str | None:
    """What keeps a Block from being computed here; None where nothing does."""
    for part, known in ((block.attn, _ATTENTION), (block.mlp, set(_MLP))):
        own = kind_of(part).forward
        if not isinstance(own, FunctionType) or not set(names_in(own.__code__)) <= known:
            return f"its {type(part).__name__} is not known here; the modules in it are swapped one by one"
    return None


def block(own: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    """The forward: what is unusual in a call, or seen by somebody, goes the block's own way."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ops = functions.for_tensor(x)
        masked = not all(one is None or one is False for one in (*args, *kwargs.values()))
        if ops is None or masked or x.dim() != 3 or not _usual(self, x, ops):
            return own(self, x, *args, **kwargs)
        attn, mlp = self.attn, self.mlp
        packed = attn.qkv(self.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim))
        x = _added(ops, ops.attention(packed).flatten(2), attn.proj, x, self.ls1)
        y = self.norm2(x)
        y = ops.linear(y, mlp.fc1.weight, mlp.fc1.bias, activation_of(mlp.act))
        return _added(ops, mlp.norm(y), mlp.fc2, x, self.ls2)

    return forward


def _added(ops: Any, y: Tensor, layer: Any, x: Tensor, scale: Any) -> Tensor:
    """x + scale(layer(y))."""
    return ops.linear(y, layer.weight, layer.bias, None, x, getattr(scale, "gamma", None))


def _usual(self: Any, x: Tensor, ops: Any) -> bool:
    """Whether all modules of a block are timm's own, none drops anything now, and nobody would notice that most are not
    called."""
    attn, mlp = self.attn, self.mlp
    if kind_of(attn).__name__ != "Attention" or kind_of(mlp).__name__ != "Mlp":
        return False
    drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
    empty = [attn.q_norm, attn.k_norm]
    if (norm := getattr(attn, "norm", None)) is not None:
        empty.append(norm)
    for path in (self.drop_path1, self.drop_path2):
        if type(path) is not nn.Identity and (type(path).__name__ != "DropPath" or (path.training and path.drop_prob)):
            return False
    scales = [one for one in (self.ls1, self.ls2) if type(one) is not nn.Identity]
    linears = (attn.proj, mlp.fc1, mlp.fc2)
    seen = (attn, mlp, *drops, *empty, *scales, *linears, mlp.act, self.drop_path1, self.drop_path2)
    return (
        all(type(one) is nn.Identity for one in empty)
        and all(type(one) is nn.Dropout and not (one.training and one.p) for one in drops)
        and all(type(one).__name__ == "LayerScale" for one in scales)
        and all(kind_of(one) is nn.Linear and runs(ops.linear, x, one.weight, one.bias) for one in linears)
        and activation_of(mlp.act) is not None
        and attn.fused_attn
        and getattr(attn, "gate", None) is None
        and 1 <= attn.head_dim <= MAX_HEAD_DIM
        and plain(one.gamma for one in scales)
        and unwatched(seen)
        and not watched_everywhere()
    )
