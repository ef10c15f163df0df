"""The arguments of a Vision Transformer: one frozen record, checked when it is made, with timm's names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from . import checks, init

POOLS = ("token", "avg", "avgmax", "max", "map", "")
POSITIONS = ("learned", "sincos2d", "sincos1d", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("mlp", "swiglu_packed", "swiglu")
#: How positions get another grid: interpolation, antialiasing, corners.
RESIZES = ("bicubic-aa", "bicubic", "bilinear-aa", "bilinear", "bilinear-corners")

#: timm's spelling of a value, or the name of the class that timm takes in its place -> ours.
_SPELLINGS: dict[str, dict[Any, Any]] = {
    "pos_embed": {"learn": "learned", "": "none", True: "learned", False: "none"},
    "act_layer": {
        **{None: "gelu", "GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"},
        **{"SiLU": "silu", "Swish": "silu", "swish": "silu", "ReLU": "relu", "": "gelu"},
    },
    "norm_layer": {None: "layernorm", "LayerNorm": "layernorm", "RMSNorm": "rmsnorm", "RmsNorm": "rmsnorm"},
    "embed_norm_layer": {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm", "RmsNorm": "rmsnorm"},
    "representation_size": {None: 0},
    "mlp_layer": {None: "mlp", "Mlp": "mlp", "SwiGLUPacked": "swiglu_packed", "SwiGLU": "swiglu"},
}
#: What timm's blocks say when they make a layer: a partial's word does not count.
_SAID_BY_BLOCKS = {"mlp_layer": ("act_layer", "norm_layer", "bias", "drop"), "act_layer": ("inplace",)}
#: What a class of timm's or PyTorch's may be told -> the value that we compute.
_COMPUTED = {
    **{"affine": True, "elementwise_affine": True, "bias": True, "approximate": "none"},
    **{"gate_last": False, "use_conv": False, "align_to": 0},
}
for _name in ("layer_norm", "LayerNorm"):
    _SPELLINGS["norm_layer"][_name] = _SPELLINGS["embed_norm_layer"][_name] = "layernorm"


@dataclass(frozen=True)
class Options:
    """Sizes, parts and rates of a network; vit.VisionTransformer says what each means.

    Raises ValueError for values that do not exist or do not fit together.
    """

    img_size: Any = 224
    patch_size: Any = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    global_pool: str = "token"
    fc_norm: bool | None = None
    pos_embed: str = "learned"
    patch_embed: str = "conv"
    dynamic_img_pad: bool = False
    act_layer: str = "gelu"
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = ""
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    patch_drop_rate: float = 0.0
    fix_init: bool = False
    norm_layer: str = "layernorm"
    embed_norm_layer: str | None = None
    embed_norm_eps: float | None = None
    mlp_layer: str = "mlp"
    drop_edge: bool = False
    pos_resize: str | None = None
    patch_stride: Any = None
    representation_size: int = 0
    decoder: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.choice(global_pool=(self.global_pool, POOLS), pos_embed=(self.pos_embed, POSITIONS))
        checks.choice(act_layer=(self.act_layer, ACTIVATIONS), weight_init=(self.weight_init, init.SCHEMES))
        checks.choice(norm_layer=(self.norm_layer, NORMS), mlp_layer=(self.mlp_layer, MLPS))
        if self.embed_norm_layer is not None:
            checks.choice(embed_norm_layer=(self.embed_norm_layer, NORMS))
        if self.embed_norm_eps is not None:
            checks.number(0.0, embed_norm_eps=self.embed_norm_eps)
        if self.pos_resize is not None:
            checks.choice(pos_resize=(self.pos_resize, RESIZES))
        checks.positive(in_chans=self.in_chans, embed_dim=self.embed_dim, depth=self.depth, num_heads=self.num_heads)
        checks.number(0.0, norm_eps=self.norm_eps)
        checks.rate(**{f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_rate")})
        checks.classes(self.num_classes)
        checks.count(reg_tokens=self.reg_tokens, representation_size=self.representation_size)
        if self.patch_stride is not None:
            checks.sides("patch_stride", self.patch_stride)
        checks.pooling(self.global_pool, self.class_token, self.fc_norm)
        checks.switches(**{f.name: getattr(self, f.name) for f in fields(self) if f.type == "bool"})
        if self.init_values is not None:
            checks.finite(init_values=self.init_values)
        object.__setattr__(self, "decoder", checks.decoder(self.decoder, self.global_pool))
        if self.decoder and (self.dynamic_img_size or self.patch_drop_rate):
            raise ValueError("vit: decoder goes with one grid of patches: no dynamic_img_size, no patch_drop_rate")
        if self.decoder and self.representation_size:
            raise ValueError("vit: representation_size is a hidden layer of a classifier; a decoder has none")
        hidden = checks.mlp_width(self.embed_dim, self.num_heads, self.mlp_ratio)
        if self.mlp_layer == "swiglu_packed" and hidden % 2:
            raise ValueError(f"vit: mlp_layer='swiglu_packed' halves the MLP's width, and {hidden} is odd")

    @property
    def mlp_hidden(self) -> int:
        """The width of the MLP's first layer."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, then registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def position_rows_of_prefix(self) -> int:
        """How many of them have a row in the position embedding."""
        return 0 if self.no_embed_class else self.prefix_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the last norm comes after the pooling, where its parameters are called fc_norm."""
        return self.global_pool in ("avg", "avgmax", "max") if self.fc_norm is None else self.fc_norm


#: The names of all options -> their defaults.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Options)}


def defaults_of(kind: type[Options]) -> dict[str, Any]:
    """The names of the options of a class of models -> their defaults."""
    return {f.name: f.default for f in fields(kind)}


#: Norms that a class or a partial of one may stand for -> where its eps goes.
_EPS = {"norm_layer": "norm_eps", "embed_norm_layer": "embed_norm_eps"}

#: Older names of options.
ALIASES = {
    "dynamic_pad": "dynamic_img_pad",
    "num_reg_tokens": "reg_tokens",
    "use_abs_pos_emb": "pos_embed",
    "use_fc_norm": "fc_norm",
    "use_pre_transformer_norm": "pre_norm",
    "scale_mlp": "scale_mlp_norm",
    "scale_attn_inner": "scale_attn_norm",
    "scale_attn_inner_norm": "scale_attn_norm",
}


def spelled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under our names, and values as we spell them: timm's spellings, classes and partials are understood.

    Raises ValueError where an alias and its option say different things.
    """
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        name = ALIASES.get(key, key)
        if name in _SPELLINGS:
            value, eps = _name_of(name, value)
            if name in _EPS and eps is not None:
                found.setdefault(_EPS[name], eps)
            value = _SPELLINGS[name].get(value, value)
        if name != key and arguments.get(name, value) != value:
            raise ValueError(f"vit: {key}={value!r} contradicts {name}={arguments[name]!r}; they are one option")
        found[name] = value
    if isinstance(arguments.get("embed_norm_layer"), str) and "norm_eps" in found.keys() - arguments.keys():
        found.setdefault("embed_norm_eps", 1e-6)  # timm's, whatever the class of the other norms says of theirs
    return found


def _name_of(option: str, value: Any) -> tuple[Any, float | None]:
    """A class or a partial of one by its name, and the eps of a norm. What a partial says, and no option does, stands
    behind the name in brackets, which makes it the name of nothing we have."""
    keywords: Mapping[str, Any] = {}
    if isinstance(value, functools.partial):
        keywords, value = value.keywords, value.func
    if not isinstance(value, type):
        return value, None
    kind: Any = value
    own = inspect.signature(kind.__init__).parameters
    told = {key: own[key].default for key in ("eps", "gate_last") if key in own}
    told |= {key: given for key, given in keywords.items() if key not in _SAID_BY_BLOCKS.get(option, ())}
    eps, name = told.get("eps"), value.__name__
    if name == "GELU" and told.get("approximate") == "tanh":
        return "GELUTanh", None
    if eps is not None:
        del told["eps"]
    other = [f"{key}={given!r}" for key, given in told.items() if key not in _COMPUTED or given != _COMPUTED[key]]
    if other:
        return f"{name}({', '.join(other)})", None
    return "SwiGLUPacked" if name == "GluMlp" else name, eps


def signature_of(extra: Mapping[str, Any], kind: type[Options] = Options) -> inspect.Signature:
    """The signature of a model's constructor: the options, then keyword-only `extra` arguments and their defaults."""
    kinds = inspect.Parameter
    given = [kinds(n, kinds.POSITIONAL_OR_KEYWORD, default=d) for n, d in defaults_of(kind).items()]
    return inspect.Signature([*given, *(kinds(n, kinds.KEYWORD_ONLY, default=d) for n, d in extra.items())])
