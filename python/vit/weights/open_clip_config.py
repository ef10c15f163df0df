"""The open_clip_config.json beside open_clip's weights: what it says of the image tower and its pictures. Each key is
used, known to mean nothing here, or refused by name.

The tower is open_clip's own (`layers`, `width`, ...) or one of timm's (`timm_model_name`).
"""

from __future__ import annotations

from typing import Any

from ..model.configs import get_config
from ..support.records import Record
from . import transformers_config as sizes_of

#: Statistics of the images that open_clip means where a config leaves them out.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: Of the text tower, the loss and the program.
_IRRELEVANT = (
    *("text_cfg", "custom_text", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale", "output_dict"),
    *("cast_dtype", "hf_model_name", "hf_tokenizer_name", "hf_pooler_type"),
)
#: Parts of open_clip's own tower that no model here has, and the values without which they are not there.
_ABSENT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads"), (False, None)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, None)),
    "block_type": (None, "default"),
    "multimodal_cfg": (None,),
}
_POOLS = {"tok": "token", "avg": "avg", "none": ""}


def about(record: Record) -> dict[str, Any]:
    """What the record says, as arguments of Checkpoint."""
    cfg = record.record("model_cfg")
    vision = cfg.record("vision_cfg")
    outputs = cfg.integer("embed_dim", low=1)
    quick = cfg.boolean("quick_gelu", False)
    sizes_of.ignore(cfg, *_IRRELEVANT)
    _absent(cfg, "multimodal_cfg")
    image = sizes_of.sides(vision, "image_size", 224)
    sizes_of.ignore(vision, "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained")
    name = vision.text("timm_model_name", None) if vision.raw("timm_model_name", None) is not None else None
    arch = _own_tower(vision, outputs, quick) if name is None else _tower_of_timm(vision, outputs, name)
    arch |= {"img_size": image}
    if name is None and any(side % patch for side, patch in zip(image, arch["patch_size"], strict=True)):
        arch["drop_edge"] = True  # as a convolution does
    if (rate := vision.number("patch_dropout", 0.0, 0.0, 1.0)) > 0.0:
        arch["patch_drop_rate"] = rate
    vision.finish()
    cfg.finish()
    preprocess = _preprocess(record.record("preprocess_cfg", None), image)
    record.finish()
    return {"name": None if name is None else name.partition(".")[0], "arch": arch, "preprocess": preprocess}


def _own_tower(vision: Record, outputs: int, quick: bool) -> dict[str, Any]:
    """open_clip.transformer.VisionTransformer."""
    for key in _ABSENT:
        _absent(vision, key)
    sizes_of.check(vision, "pos_embed_type", ("learnable", "sin_cos_2d"), "learnable")  # a table in the file, both
    width = vision.integer("width", 768, 1)
    arch: dict[str, Any] = {
        "depth": vision.integer("layers", 12, 1),
        "embed_dim": width,
        "num_heads": max(1, width // vision.integer("head_width", 64, 1)),
        "mlp_ratio": sizes_of.ratio(int(width * vision.number("mlp_ratio", 4.0, low=0.0, high=1e6)), width),
        "patch_size": sizes_of.sides(vision, "patch_size", 16),
        "num_classes": outputs,
        "pre_norm": not vision.boolean("no_ln_pre", False),
        "global_pool": _POOLS[vision.choice("pool_type", _POOLS, "tok")],
        "act_layer": _activation(vision, quick),
        "norm_eps": 1e-5,
    }
    if vision.raw("norm_kwargs", None):
        norm = vision.record("norm_kwargs")
        arch["norm_eps"] = norm.number("eps", 1e-5, low=0.0, high=1.0)
        norm.finish()
    if vision.raw("ls_init_value", None) is not None:
        arch["init_values"] = vision.number("ls_init_value")
    last = vision.boolean("final_ln_after_pool", False)
    if arch["global_pool"] == "avg":
        arch["fc_norm"] = last
    return arch


def _tower_of_timm(vision: Record, outputs: int, name: str) -> dict[str, Any]:
    """open_clip.timm_model.TimmModel."""
    try:
        get_config(name.partition(".")[0])
    except ValueError:
        vision.refuse("timm_model_name", "the name of a model of vit.list_models()")
    arch: dict[str, Any] = {"num_classes": outputs}
    pool = vision.raw("timm_pool", "avg")
    if pool:
        arch["global_pool"] = vision.choice("timm_pool", ("avg", "avgmax", "max", "map", "token"), "avg")
    projection = vision.raw("timm_proj", "linear")
    if not pool and projection in (None, "", "none"):
        arch["global_pool"] = ""  # timm's tower is made without one; before a projection it keeps its own
    if projection not in (None, ""):
        vision.choice("timm_proj", ("linear", "none"), "linear")
        if projection == "none":
            arch["num_classes"] = 0
    vision.boolean("timm_proj_bias", False)  # the tensors tell
    for key, ours in (("timm_drop", "drop_rate"), ("timm_drop_path", "drop_path_rate")):
        if vision.raw(key, None) is not None and (rate := vision.number(key, low=0.0, high=1.0)):
            arch[ours] = rate
    return arch


def _activation(vision: Record, quick: bool) -> str:
    if not vision.raw("act_kwargs", None):
        return "quick_gelu" if quick else "gelu"
    options = vision.record("act_kwargs")
    tanh = options.choice("approximate", ("none", "tanh"), "none") == "tanh"
    options.finish()
    return "gelu_tanh" if tanh else "gelu"


def _absent(record: Record, key: str) -> None:
    value = record.raw(key, None)
    if value is not None and not any(value == one and type(value) is type(one) for one in _ABSENT[key]):
        record.refuse(key, "left out: no model here has it")


def _preprocess(cfg: Record | None, image: tuple[int, int]) -> dict[str, Any]:
    """The evaluation transform, as arguments of Preprocess."""
    cfg = Record({}, "preprocess_cfg") if cfg is None else cfg
    found: dict[str, Any] = {"crop_pct": 1.0}
    for key, usual in (("mean", MEAN), ("std", STD)):
        found[key] = cfg.numbers(key, count=3) if cfg.raw(key, None) is not None else usual
    if min(found["std"]) <= 0.0:
        cfg.refuse("std", "numbers above 0")
    # "random" is of training: images of an evaluation are resized by the usual one.
    how = cfg.choice("interpolation", ("bicubic", "bilinear", "random"), "bicubic")
    found["interpolation"] = "bilinear" if how == "bilinear" else "bicubic"
    modes = ("shortest", "squash") if image[0] == image[1] else ("squash",)
    mode = cfg.choice("resize_mode", modes, modes[0])
    found["crop_mode"] = {"shortest": "center", "squash": "squash"}[mode]
    sizes_of.check(cfg, "mode", ("RGB",), "RGB")
    if cfg.raw("size", None) is not None and sizes_of.sides(cfg, "size", 224) != image:
        cfg.refuse("size", f"that of the tower's images, {image[0]} x {image[1]}")
    sizes_of.ignore(cfg, "fill_color")  # of a mode that is refused
    cfg.finish()
    return found
