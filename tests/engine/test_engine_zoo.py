"""The engine on the networks that people download: every family and option in three precisions, beside the model."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import draw
import pytest
import torch
import vit
from conftest import USABLE
from rounding import close
from test_engine import check_parity, cosine, images_for, smooth_images
from test_engine_files import File, refused
from vit.bench.weights import seeded_state
from vit.engine import native
from vit.engine.accepts import refusals
from vit.engine.freeze import freeze
from vit.engine.grids import takes_any_size
from vit.engine.smooth import LAYERS, observe, smooth
from vit.engine.tensors import tensors_of
from vit.model import zoo
from vit.model.rows import attention_rows_of

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")

#: The names behind most downloads: plain ViTs, DeiT, FlexiViT, DINOv2, DINOv3, CLIP, SigLIP, EVA-02.
MOST_USED = re.compile(
    r"vit_(tiny|small|base|large|huge)_patch\d+_(224|384)|vit_giant_patch14_224|deit3?_.*|flexivit_.*"
    r"|vit_\w+_patch14_(reg4_)?dinov2|vit_\w+_dinov3(_qkvb)?|vit_(base|large|huge|giant|gigantic)_patch\d+_\w*clip_\w+"
    r"|vit_\w+_siglip_\w+|naflexvit_\w+_siglip|eva02_(tiny|small|base|large)_patch14_\d+"
)
#: Names that the engine refuses -> the option it names.
REFUSED = {"eva02_enormous_patch14_clip_224": "use_post_norm"}

BASE = {"backend": "reference", "training": False}
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 7, "mlp_ratio": 2.5}


def tiny(name: str, **arch: Any) -> dict[str, Any]:
    """Arguments of a narrow model of a name, at a grid that is not square."""
    entry = zoo.names()[name]
    patch = entry.arch["patch_size"]
    arch = BASE | TINY | {"img_size": (3 * patch, 4 * patch)} | arch
    if entry.kind == "eva" and entry.arch.get("attn_pool_num_heads"):
        arch["attn_pool_num_heads"] = 4
    return arch


def make(name: str, **arch: Any) -> tuple[Any, dict[str, Any]]:
    model = vit.create(name, **arch)
    model.load_state_dict(seeded_state(model.state_dict()))
    return model, arch


def one_of_each() -> list[str]:
    """The first name of each set of options; sizes are not options."""
    found: dict[tuple[object, ...], str] = {}
    for name, entry in zoo.names().items():
        if name not in REFUSED:
            found.setdefault((entry.kind, *sorted(map(str, list(entry.arch.items())[5:]))), name)
    return sorted(found.values())


def test_the_names_that_it_takes():
    """docs/engine.md: every name of the table but those of REFUSED, at its own sizes and depth 1, on the meta device;
    the reason is the option."""
    names = zoo.names()
    assert sum(MOST_USED.fullmatch(name) is not None for name in names) == 124
    assert not any(MOST_USED.fullmatch(name) for name in REFUSED)
    for name in names:
        model: Any = vit.create(name, device="meta", **BASE, depth=1)
        reasons = [reason for reason in refusals(model) if "has no values" not in reason]
        assert [REFUSED.get(name, "") in reason for reason in reasons] == [True] * (name in REFUSED), (name, reasons)
        assert model.embed_dim % 2 == model.blocks[0].mlp.fc2.in_features % 2 == 0, name  # for bfloat16 and int8


@pytest.mark.parametrize("name", one_of_each())
def test_every_set_of_options_gives_the_models_logits(name):
    """float32 and bfloat16 by the rules of test_engine.py, int8 by its cosine; narrow, at a grid that is not square."""
    model, arch = make(name, **tiny(name))
    images = images_for(model, 2)
    check_parity(model, arch, images)
    with torch.no_grad():
        truth = model(images)
    assert cosine(vit.Engine(model, "int8", calibrate=images)(images), truth) > 0.99


#: What no name has, or none together.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "max-of-all": ("vit_tiny_patch16_224", {"global_pool": "max", "pool_include_prefix": True}),
    "avg-of-all": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}),
    "avgmax-norm-first": ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": False}),
    "max-norm-first": ("vit_tiny_patch16_224", {"global_pool": "max", "fc_norm": False}),
    "map-norm-after": ("vit_base_patch16_siglip_224", {"fc_norm": True}),
    "map-no-norm": ("vit_base_patch16_siglip_224", {"final_norm": False, "num_classes": 0}),
    "map-rms-swiglu": (
        "vit_base_patch16_siglip_224",
        {"norm_layer": "rmsnorm", "mlp_layer": "swiglu", "class_token": True, "act_layer": "silu"},
    ),
    "all-tokens-no-norm": ("vit_base_patch16_radio_v3", {"global_pool": ""}),
    "features": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
    "distilled-features": ("deit_tiny_distilled_patch16_224", {"num_classes": 0}),
    "layer-qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    "rms-qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "norm_layer": "rmsnorm", "scale_mlp_norm": True}),
    "qk-norm-rope": ("eva02_small_patch14_224", {"qk_norm": True}),
    "gelu-gates": ("vit_tiny_patch16_224", {"mlp_layer": "swiglu_packed", "act_layer": "gelu"}),
    "norms-of-the-patches": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm", "pre_norm": True}),
    "padded-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (40, 50), "dynamic_img_pad": True}),
    "dynamic-and-padded": ("vit_small_patch16_dinov3", {"img_size": (40, 60), "dynamic_img_pad": True}),
    "dropped-edge": ("vit_so400m_patch14_siglip_384", {"img_size": (40, 50), "drop_edge": True}),
    "fixed-dynamic": ("vit_tiny_patch16_224", {"pos_embed": "sincos2d", "dynamic_img_size": True}),
    "odd-heads": ("eva02_tiny_patch14_224", {"embed_dim": 72, "num_heads": 2}),
    "rope-last-token": ("eva02_small_patch14_224", {"global_pool": "token", "depth": 3}),
    "rope-qk-last-token": ("vit_small_patch16_dinov3", {"global_pool": "token", "qk_norm": True, "num_reg_tokens": 2}),
    "rope-of-heads-last-token": ("vit_small_patch16_rope_mixed_224", {"depth": 3, "qk_norm": True}),
    "odd-width": ("eva02_large_patch14_224", {"mlp_ratio": 59 / 48}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_option_gives_the_models_logits(case):
    name, more = CASES[case]
    model, arch = make(name, **tiny(name, **more))
    images = images_for(model, 2)
    width = model.blocks[0].mlp.fc2.in_features
    if width % 2:
        with torch.no_grad():
            close(vit.Engine(model)(images), model(images))
        with pytest.raises(vit.BackendError, match=f"mlp_width is {width}; this precision needs a multiple of 2"):
            vit.Engine(model, "int8")
        return
    check_parity(model, arch, images)
    with torch.no_grad():
        truth = model(images)
    got = vit.Engine(model, "int8", calibrate=images)(images)
    assert cosine(got.flatten(1), truth.flatten(1)) > 0.99


#: Families at their own width, or half of it.
DEEP = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 98, "num_classes": 100}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {"embed_dim": 384, "num_heads": 6}),
    "siglip": ("vit_base_patch16_siglip_224", {"embed_dim": 384, "num_heads": 6, "img_size": 112, "num_classes": 0}),
    "giant": ("vit_giant_patch14_dinov2", {"embed_dim": 384, "num_heads": 6, "img_size": 98, "depth": 6}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 112, "num_classes": 0}),
    "dinov3-plus": ("vit_small_plus_patch16_dinov3", {"img_size": 112, "num_classes": 100}),
    "eva02": ("eva02_small_patch14_224", {"img_size": 98}),
    "eva02-normed": ("eva02_base_patch14_224", {"embed_dim": 384, "num_heads": 6, "img_size": 98}),
}  # fmt: skip


@pytest.mark.parametrize("family", DEEP)
def test_int8_keeps_the_direction_of_the_logits(family):
    """At half the depth; heavy-tailed weights, norms with outliers, with calibration and without."""
    name, more = DEEP[family]
    model, _ = make(name, **(BASE | {"depth": 6} | more))
    side = model.patch_embed.img_size[0]
    images = smooth_images(2, side)
    with torch.no_grad():
        truth = model(images)
    assert cosine(vit.Engine(model, "int8")(images), truth) > 0.998
    assert cosine(vit.Engine(model, "int8", calibrate=smooth_images(2, side, seed=2))(images), truth) > 0.998
    stored = vit.Engine(model, "bfloat16", weights="int8")(images)
    assert cosine(stored, truth) > 0.999


@pytest.mark.parametrize(("pool", "kept"), [("token", "bfloat16"), ("avg", "int8")])
def test_gated_layers_are_int8_where_the_mean_over_tokens_is_read(pool, kept):
    """DEEP has the logits of both: DINOv2-g by its class token, EVA-02 by the mean."""
    model, _ = make("eva02_tiny_patch14_224", **tiny("eva02_tiny_patch14_224"), global_pool=pool)
    precisions = freeze(model, "int8").precisions
    for layer in LAYERS:
        wanted = kept if layer.startswith("mlp") else "int8"
        assert precisions[f"blocks.0.{layer}.weight"] == native.PRECISIONS[wanted], layer


@pytest.mark.parametrize("family", ["siglip", "eva02-normed", "dinov3-plus"])
def test_smoothing_changes_no_logits(family):
    """Norms inside attention and MLP and the values of gated MLPs take what is divided out of their readers' inputs."""
    name, _ = DEEP[family]
    model, _ = make(name, **tiny(name))
    images = images_for(model, 2)
    tensors = freeze(model, "float32").tensors
    smoothed, inputs = smooth(tensors, 2, observe(model, images))
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in LAYERS]
    for layer in layers:
        before, after = tensors[f"{layer}.weight"], smoothed[f"{layer}.weight"]
        assert torch.equal(before, after) == (family == "siglip" and layer.endswith("fc2")), layer
    plain, other = built(model, tensors), built(model, smoothed)
    close(other(images), plain(images))
    assert set(inputs) == set(layers)


def built(model: Any, tensors: dict[str, torch.Tensor]) -> vit.Engine:
    """A float32 engine of a model with other tensors."""
    frozen = freeze(model, "float32")
    frozen.tensors.update(tensors)
    engine = vit.Engine.__new__(vit.Engine)
    engine._adopt(native.library(), vit.Engine._build(frozen, 0), None, None, "the test")
    return engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["siglip", "eva02-normed", "dinov3-plus", "distilled", "qk-norm"])
def test_results_depend_neither_on_threads_nor_on_the_batch(family, dtype):
    """Bits. 8 threads on fewer cores also share columns, where gates, rotations and pooling wait for each other."""
    special = {
        "distilled": ("deit_tiny_distilled_patch16_224", {}),
        "qk-norm": ("vit_small_patch16_dinov3", {"qk_norm": True, "global_pool": "token"}),
    }
    name, _ = (DEEP | special)[family]
    patch = zoo.names()[name].arch["patch_size"]
    more = special.get(family, ("", {}))[1]
    model, _ = make(name, **tiny(name, embed_dim=96, num_heads=3, img_size=11 * patch, **more))
    images = images_for(model, 5)
    engine = vit.Engine(model, dtype, num_threads=1)
    names = ("logits", "features", "tokens.0") + (("tokens.1",) if family != "qk-norm" else ())
    alone = [engine(image[None], outputs=names) for image in images]
    alone = {name: torch.cat([one[name] for one in alone]) for name in names}
    for threads in (1, 2, 3, 8, 16):
        engine.num_threads = threads
        for chosen in ([0, 1, 2, 3, 4], [0], [3, 3, 1]):
            for name, got in engine(images[chosen], outputs=names).items():
                assert torch.equal(got, alone[name][chosen]), (threads, name)


def test_tokens_and_attention_are_the_models():
    """Of models with registers, rotary positions and norms of queries and keys."""
    for name, more in (("vit_small_patch16_dinov3", {"qk_norm": True}), ("vit_small_patch14_reg4_dinov2", {})):
        model, _ = make(name, **tiny(name, **more))
        images = images_for(model, 2)
        wanted = ("tokens.0", "tokens.1", "attention.0", "attention.1", "features")
        got = vit.Engine(model)(images, outputs=wanted)
        with torch.no_grad():
            tokens, given = model.start(images)
            for i, (block, also) in enumerate(zip(model.blocks, given, strict=True)):
                rows = block.probabilities(tokens, [0], attention_rows_of(model, block.attn.head_dim), **also)[:, :, 0]
                close(got[f"attention.{i}"], rows)
                tokens = block(tokens, **also)
                close(got[f"tokens.{i}"], tokens)
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        close(got["features"], pooled)
        assert model.num_prefix_tokens == 5


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("family", ["siglip", "eva02-normed", "distilled"])
def test_files_hold_every_option(tmp_path, family, dtype):
    name = "deit_tiny_distilled_patch16_224" if family == "distilled" else DEEP[family][0]
    model, _ = make(name, **tiny(name))
    images = images_for(model, 2)
    engine = vit.Engine(model, dtype)
    engine.save(tmp_path / "model.vit")
    for mmap in (False, True):
        loaded = vit.Engine.load(tmp_path / "model.vit", mmap=mmap)
        assert loaded.config == engine.config
        assert torch.equal(loaded(images), engine(images))
    data = bytearray((tmp_path / "model.vit").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "model.vit").write_bytes(data)
    refused(tmp_path / "model.vit", "is damaged: the data of tensor")


NEW_FIELDS = (
    *(
        "drop_edge",
        "norm",
        "embed_norm",
        "pre_norm",
        "qk_norm",
        "attn_norm",
        "mlp_norm",
        "gated",
        "rotary",
        "rotary_of_heads",
    ),
    *("pool_prefix", "pool_activation", "pool_heads", "pool_mlp_width"),
)


def test_files_of_the_version_before_still_load(tmp_path):
    """Their networks have none of the options that came later."""
    path = tmp_path / "model.vit"
    file = File(path)
    before = vit.Engine.load(path)
    images = draw.randn(2, 3, 32, 32)
    for field in NEW_FIELDS:
        assert file.texts.pop(field) == "0"
    refused(file.write(path), "says nothing about drop_edge")
    file.texts["version"] = "4"
    assert torch.equal(vit.Engine.load(file.write(path))(images), before(images))
    file.texts["version"] = "3"
    refused(file.write(path), "has format version 3, this library reads 4 to 5")


def test_numbers_of_new_options_out_of_range_are_named(tmp_path):
    path = tmp_path / "model.vit"
    file = File(path)
    wrong: dict[str, tuple[str, ...]] = dict.fromkeys(NEW_FIELDS, ("-1", "2", "3", "x"))
    wrong |= {"norm_first": ("3", "-1"), "rotary": ("3", "1"), "pool_heads": ("1", "-1"), "pool_mlp_width": ("4", "-1")}
    for field, values in wrong.items():
        good = file.texts[field]
        for value in values:
            file.texts[field] = value
            refused(file.write(path), "is damaged")
        file.texts[field] = good
    vit.Engine.load(file.write(path))


def test_the_c_interface_builds_every_option():
    """vit_engine_build by name, and its refusal of a tensor that is missing or that nothing reads."""
    library = native.library()
    model, _ = make("eva02_base_patch14_224", **tiny("eva02_base_patch14_224"))
    frozen = freeze(model, "float32")
    library.destroy(vit.Engine._build(frozen, 0))
    for name in ("rotary", "blocks.1.mlp.norm.weight", "blocks.0.mlp.fc1.weight"):
        kept = frozen.tensors.pop(name)
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            vit.Engine._build(frozen, 0)
        frozen.tensors[name] = kept
    for field in ("rotary", "mlp_norm"):
        kept = frozen.config[field]
        frozen.config[field] = 0
        with pytest.raises(vit.BackendError, match="the network has no part that reads .*" + field.replace("_", ".")):
            vit.Engine._build(frozen, 0)
        frozen.config[field] = kept
    frozen.config.update(pool=native.POOLS["map"], pool_heads=5, pool_mlp_width=8, pool_activation=1)
    with pytest.raises(ValueError, match="embed_dim 48 is not a multiple of pool_heads 5"):
        vit.Engine._build(frozen, 0)
    assert ctypes.sizeof(native.Config) % 8 == 0


def test_a_model_of_another_grid_is_what_images_of_its_size_give():
    """Positions of dynamic sizes are resampled once, at construction."""
    for name in ("vit_small_patch16_dinov3", "naflexvit_base_patch16_siglip", "flexivit_small"):
        model, _ = make(name, **tiny(name, img_size=64))
        model.set_input_size((48, 80))
        images = images_for(model, 2)
        with torch.no_grad():
            truth = model(images)
        engine = vit.Engine(model)
        close(engine(images), truth)
        others = draw.randn(1, 3, 64, 64)
        if takes_any_size(model):
            with torch.no_grad():
                close(engine(others), model(others))
        else:
            with pytest.raises(ValueError, match="64 x 64, the engine takes 48 x 80"):
                engine(others)


def test_tensors_do_not_depend_on_the_mode():
    """Rotary coordinates are disturbed in training alone."""
    model, _ = make("vit_small_patch16_dinov3", **tiny("vit_small_patch16_dinov3", rope_shift_coords=0.5))
    expected = vit.Engine(model)(images_for(model, 1) * 0 + 1)
    model.train()
    assert torch.equal(vit.Engine(model)(images_for(model, 1) * 0 + 1), expected)
    assert model.training
    assert model.rope.training
    assert set(tensors_of(model, dict(model.named_modules())))
