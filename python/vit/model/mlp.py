"""The MLP of a block: two linear layers, or three with a gate (arXiv:2002.05202). Parameter names are timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .options import Options
from .parts import activation_name, gated, gated_packed, make_activation, make_norm, norm
from .planned import CallsOps
from .torch_layers import call, dropout, know, linear, plain, untouched


class Mlp(CallsOps, nn.Module):
    """fc2(norm(act(fc1(x)))): [B, N, C] -> [B, N, C]."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        dim, hidden, bias = options.embed_dim, options.mlp_hidden, options.proj_bias
        self.fc1 = nn.Linear(dim, hidden, bias, **factory)
        self.act = make_activation(options.act_layer)
        self.drop1 = nn.Dropout(options.proj_drop_rate)
        self.norm = _inner_norm(options, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, bias, **factory)
        self.drop2 = nn.Dropout(options.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        ops, fc1 = self.ops, self.fc1
        alone = isinstance(x, Tensor) and untouched(fc1, nn.Linear) and plain([x, *fc1._parameters.values()])
        if alone and (activation := activation_name(self.act)):
            x = linear(ops, fc1, x, activation)  # [B, N, hidden]
        else:
            x = call(ops, self.act, call(ops, fc1, x))
        x = call(ops, self.norm, call(ops, self.drop1, x))
        return call(ops, self.drop2, call(ops, self.fc2, x))

    def inner(self, x: Tensor, activation: str) -> Tensor:
        """What fc2 is given, where no module need be called."""
        ops, own = self.ops, self._modules
        x = linear(ops, own["fc1"], x, activation)  # type: ignore[arg-type]
        return norm(ops, own["norm"], dropout(ops, own["drop1"], x))  # type: ignore[arg-type]


class GluMlp(CallsOps, nn.Module):
    """fc2(norm(act(g) * h)) with [g, h] = fc1(x), the gate first: timm's SwiGLUPacked. [B, N, C] -> [B, N, C]."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        dim, hidden, bias = options.embed_dim, options.mlp_hidden, options.proj_bias
        self.fc1 = nn.Linear(dim, hidden, bias, **factory)
        self.act = make_activation(options.act_layer)
        self.drop1 = nn.Dropout(options.proj_drop_rate)
        self.norm = _inner_norm(options, hidden // 2, **factory)
        self.fc2 = nn.Linear(hidden // 2, dim, bias, **factory)
        self.drop2 = nn.Dropout(options.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        ops = self.ops
        x = _gate(self, call(ops, self.fc1, x))
        x = call(ops, self.norm, call(ops, self.drop1, x))
        return call(ops, self.drop2, call(ops, self.fc2, x))

    def inner(self, x: Tensor, activation: str) -> Tensor:
        """What fc2 is given, where no module need be called."""
        ops = self.ops
        x = gated_packed(ops, activation, linear(ops, self.fc1, x))
        return norm(ops, self.norm, dropout(ops, self.drop1, x))


class SwiGLU(CallsOps, nn.Module):
    """fc2(norm(act(fc1_g(x)) * fc1_x(x))): [B, N, C] -> [B, N, C]."""

    def __init__(self, options: Options, **factory: Any) -> None:
        super().__init__()
        dim, hidden, bias = options.embed_dim, options.mlp_hidden, options.proj_bias
        self.fc1_g = nn.Linear(dim, hidden, bias, **factory)
        self.fc1_x = nn.Linear(dim, hidden, bias, **factory)
        self.act = make_activation(options.act_layer)
        self.drop1 = nn.Dropout(options.proj_drop_rate)
        self.norm = _inner_norm(options, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, bias, **factory)
        self.drop2 = nn.Dropout(options.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        ops = self.ops
        gate = call(ops, self.fc1_g, x)
        x = call(ops, self.fc1_x, x)
        name = activation_name(self.act) if isinstance(gate, Tensor) and plain((gate, x)) else None
        x = gated(ops, name, gate, x) if name else call(ops, self.act, gate) * x
        x = call(ops, self.norm, call(ops, self.drop1, x))
        return call(ops, self.drop2, call(ops, self.fc2, x))

    def inner(self, x: Tensor, activation: str) -> Tensor:
        """What fc2 is given, where no module need be called."""
        ops = self.ops
        gate, x = ops.movement.fork(x)
        x = gated(ops, activation, linear(ops, self.fc1_g, gate), linear(ops, self.fc1_x, x))
        return norm(ops, self.norm, dropout(ops, self.drop1, x))


def _gate(mlp: GluMlp, packed: Tensor) -> Tensor:
    """act(first half) * second half, by one op unless somebody looks at the activation."""
    name = activation_name(mlp.act) if isinstance(packed, Tensor) and plain((packed,)) else None
    if name:
        return gated_packed(mlp.ops, name, packed)
    gate, x = packed.chunk(2, dim=-1)
    return call(mlp.ops, mlp.act, gate) * x


def _inner_norm(options: Options, dim: int, **factory: Any) -> nn.Module:
    if not options.scale_mlp_norm:
        return nn.Identity()
    return make_norm(options.norm_layer, dim, options.norm_eps, **factory)


MLPS: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglu_packed": GluMlp, "swiglu": SwiGLU}
know(Mlp, GluMlp, SwiGLU, nn.SiLU, nn.ReLU, nn.RMSNorm)
