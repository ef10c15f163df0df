"""The named models and the options they are made of, against timm."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import draw
import named
import pytest
import timm
import torch
import vit
from conftest import USABLE
from rounding import WIDE, close
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models import deit, get_pretrained_cfg, vision_transformer
from timm.models._registry import _deprecated_models, _module_to_models
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vit.backends import BackendError
from vit.model import zoo
from vit.model.options import Options, spelled
from vit.model.pos_embed import resample_patches
from zoo_against_timm import compare, fill, small

TIMM = "1.0.31"
#: 6 patches of 8 x 8, two blocks of 64 channels.
SMALL = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}


# ---- the tables ----


def embed_norm_eps(options: Options) -> float:
    return options.norm_eps if options.embed_norm_eps is None else options.embed_norm_eps


@pytest.mark.parametrize("name", sorted(n for n, entry in zoo.names().items() if entry.kind in ("vit", "deit")))
def test_sizes_and_options_are_timms(name, monkeypatch):
    """What timm's function of that name gives to the class, which is not made."""
    given: dict[str, Any] = {}
    for module, function in ((vision_transformer, "_create_vision_transformer"), (deit, "_create_deit")):
        monkeypatch.setattr(module, function, lambda variant, pretrained=False, **arch: given.update(arch))
    timm.models.model_entrypoint(name)()
    assert ("deit" if given.pop("distilled", False) else "vit") == zoo.names()[name].kind
    given.pop("img_size", None)  # that of the weights, as the next test says
    theirs, ours = Options(**spelled(given)), Options(**zoo.names()[name].arch)
    assert ours.mlp_hidden == theirs.mlp_hidden
    assert embed_norm_eps(ours) == embed_norm_eps(theirs)
    same = {"mlp_ratio": 4.0, "embed_norm_eps": None}
    assert replace(ours, **same) == replace(theirs, **same)


@pytest.mark.parametrize("full", sorted(zoo.tags()))
def test_published_weights_are_timms(full):
    tag, cfg = zoo.tags()[full], get_pretrained_cfg(full)
    assert (tag.num_classes, (3, tag.img_size, tag.img_size)) == (cfg.num_classes, cfg.input_size)
    assert tag.preprocess == {
        key: getattr(cfg, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    assert (tag.licence, bool(tag.hub)) == (cfg.license, bool(cfg.hf_hub_id))
    assert tag.hub in (None, cfg.hf_hub_id, f"timm/{full}")


#: What timm's four files hold and the tables do not: other block forms, and names for experiments.
NOT_HERE = {
    "deit": set(),
    "eva": {f"vit_{size}_patch16_sapiens2" for size in ("base", "large", "huge", "giant", "5b")},
    "naflexvit": {
        *(f"naflexvit_{size}_patch16_radio_v3" for size in ("base", "large", "huge", "giant")),
        *(f"naflexvit_{size}_patch16_radio_v4" for size in ("so400m", "huge")),
        *(f"naflexvit_{size}" for size in ("base_patch16_map", "base_patch16_parfac_gap")),
        *(f"naflexvit_so150m2_patch16_reg1_{pool}" for pool in ("gap", "map")),
    },
    "vision_transformer": {
        *(f"beit3_giant_patch14_{size}" for size in (224, 336)),
        *(f"vit_{name}_patch16_reg1_gap_256" for name in ("dlittle", "dpwee", "dwee", "pwee")),
        *("vit_base_patch16_18x2_224", "vit_small_patch16_18x2_224", "vit_small_patch16_36x1_224"),  # parallel blocks
        *("vit_base_patch16_plus_240", "vit_base_patch32_plus_256", "vit_base_patch16_rpn_224"),
        *("vit_base_patch16_xp_224", "vit_large_patch14_xp_224", "vit_huge_patch14_xp_224"),
    },
}


@pytest.mark.skipif(timm.__version__ != TIMM, reason=f"the tables are of timm {TIMM}")
@pytest.mark.parametrize("module", sorted(NOT_HERE))
def test_every_name_of_timm_is_in_the_tables(module):
    missing = _module_to_models[module] - zoo.names().keys() - zoo.aliases().keys()
    assert missing == NOT_HERE[module]


def test_a_name_alone_is_its_default_weights():
    for name, tag in zoo.defaults().items():
        cfg = get_pretrained_cfg(name)
        assert (tag.tag, tag.num_classes, tag.img_size) == (cfg.tag, cfg.num_classes, cfg.input_size[1]), name


@pytest.mark.parametrize("old", sorted(zoo.aliases()))
def test_old_names_say_the_new_one(old):
    assert zoo.aliases()[old].startswith(_deprecated_models[old])
    with pytest.warns(UserWarning, match=f"the name '{old}' is old; use '{zoo.aliases()[old]}'"):
        model = vit.create(old, backend="reference", device="meta", depth=1)
    assert model.name == zoo.aliases()[old]


def test_a_tag_brings_its_classes_size_and_transform():
    model = vit.create("vit_base_patch16_clip_384.openai_ft_in12k_in1k", backend="reference", device="meta", depth=1)
    cfg = get_pretrained_cfg("vit_base_patch16_clip_384.openai_ft_in12k_in1k")
    assert model.num_classes == 1000
    assert model.preprocess.img_size == cfg.input_size[1:]
    assert (model.preprocess.crop_pct, model.preprocess.crop_mode) == (cfg.crop_pct, cfg.crop_mode)
    assert vit.create("vit_base_patch16_224.augreg_in21k", device="meta", backend="reference").num_classes == 21843


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "naflexvit_base_patch16_siglip"]
)
def test_the_configuration_of_weights_names_timms_ends(name):
    ours = vit.create(name, backend="reference", device="meta", depth=1)
    for key in ("first_conv", "classifier", "fixed_input_size", "interpolation", "crop_pct", "crop_mode"):
        assert ours.pretrained_cfg[key] == getattr(get_pretrained_cfg(name), key), key


def test_tags_are_listed_and_unknown_ones_say_what_there_is():
    assert vit.list_models("vit_small_patch14_*dinov2*", tags=True) == [
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
    ]
    assert vit.list_models("*.lvd142m") == vit.list_models("*dinov2", tags=True)
    with pytest.raises(ValueError, match=r"vit_small_patch16_224 has no tag 'dinov9'; its tags are .*dino"):
        vit.create("vit_small_patch16_224.dinov9")
    with pytest.raises(ValueError, match="unknown model 'vit_so400m_patch14_siglip_385'; nearest: vit_so400m_patch14_"):
        vit.create("vit_so400m_patch14_siglip_385")


def test_import_does_not_read_the_tables():
    code = "import vit.model.zoo as z; import vit; print(z.names.cache_info().currsize, z.tags.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0 0\n"


def test_the_largest_is_described_without_its_memory():
    with FakeTensorMode():
        model = vit.create("vit_giant_patch14_dinov2", backend="reference")
        assert model(torch.empty(1, 3, 518, 518)).shape == (1, 1536)
    meta = vit.create("vit_giant_patch14_dinov2", backend="reference", device="meta")
    for described in (model, meta):
        assert sum(p.numel() for p in described.parameters()) == 1136479232


# ---- numbers ----


@pytest.mark.parametrize("backend_name", ["reference", *USABLE])
@pytest.mark.parametrize("name", named.one_of_each_kind())
def test_one_of_each_kind_has_timms_numbers(name, backend_name):
    assert compare(name, backend_name, **small(name), embed_dim=96, num_heads=3) is None


def _with_its_weight(name: str) -> Any:
    wide = zoo.names()[name].arch["embed_dim"] > 1024
    return pytest.param(name, marks=[pytest.mark.large] if wide else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [_with_its_weight(name) for name in sorted(zoo.names())])
def test_every_name_has_timms_numbers(name):
    assert compare(name, "reference", **small(name)) is None


ARCHS: list[dict[str, Any]] = [
    {"qk_norm": True},
    {"qk_norm": True, "norm_layer": "rmsnorm"},
    {"global_pool": "avgmax"},
    {"global_pool": "max", "fc_norm": False},
    {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    {"global_pool": "map", "reg_tokens": 1},
    {"global_pool": "", "num_classes": 0, "final_norm": False},
    {"reg_tokens": 3, "init_values": 0.1},
    {"reg_tokens": 3, "no_embed_class": True, "pos_embed": "none"},
    {"no_embed_class": True, "dynamic_img_size": True},
    {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "scale_mlp_norm": True, "init_values": 1e-2},
    {"mlp_layer": SwiGLUPacked},  # gated by GELU, as in timm, where nobody says SiLU
    {"mlp_layer": SwiGLU, "act_layer": "quick_gelu", "proj_bias": False},
    {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
    {"scale_attn_norm": True, "scale_mlp_norm": True, "embed_norm_layer": "rmsnorm"},
    {"img_size": (20, 29), "dynamic_img_pad": True, "dynamic_img_size": True},
    {"norm_layer": nn.LayerNorm},  # whose eps is 1e-5, and that of timm's class of this name 1e-6
    {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3), "embed_norm_layer": "layernorm"},
    {"embed_norm_layer": functools.partial(timm.layers.RmsNorm, eps=1e-2)},
    {"act_layer": functools.partial(nn.GELU, approximate="tanh")},
    {"act_layer": functools.partial(nn.SiLU, inplace=True)},
    {"mlp_layer": functools.partial(GluMlp, gate_last=False, act_layer=nn.Sigmoid)},  # which the block says again
]


@pytest.mark.parametrize("backend_name", ["reference", *USABLE])
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: "-".join(arch))
def test_options_have_timms_numbers(arch, backend_name):
    assert compare("vit_tiny_patch16_224", backend_name, **(SMALL | arch)) is None


def pair(**arch: Any) -> tuple[nn.Module, Any]:
    theirs = timm.create_model("vit_tiny_patch16_224", **(SMALL | arch)).eval()
    fill(theirs)
    ours = vit.create("vit_tiny_patch16_224", backend="auto", device="cpu", **(SMALL | arch)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_none_is_the_named_models_own_value():
    """As in timm.create_model."""
    for name, key in (("vit_small_patch14_dinov2", "init_values"), ("eva02_tiny_patch14_224", "ref_feat_shape")):
        arch = {"depth": 1, "img_size": 28, key: None}
        assert compare(name, "reference", **arch) is None
        assert getattr(vit.create(name, backend="reference", **arch).options, key) is not None


def test_hooks_see_timms_tensors_with_every_part_there_is():
    arch = {"reg_tokens": 1, "init_values": 0.5, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}
    theirs, ours = pair(**arch, global_pool="map", mlp_layer=SwiGLU, act_layer="silu", pre_norm=True)
    seen: list[dict[str, torch.Tensor]] = []
    x = draw.randn(2, 3, 16, 24)
    for model in (theirs, ours):
        outputs: dict[str, torch.Tensor] = {}
        for key, module in model.named_modules():
            module.register_forward_hook(lambda m, i, o, key=key, outputs=outputs: outputs.update({key: o}))
        model(x)
        seen.append(outputs)
    assert list(seen[0]) == list(seen[1])
    for key, tensor in seen[0].items():
        close(seen[1][key], tensor, what=key)


def test_images_of_any_size():
    theirs, ours = pair(dynamic_img_size=True, reg_tokens=1)
    for size in ((16, 24), (40, 24), (8, 56)):
        x = draw.randn(1, 3, *size)
        close(ours(x), theirs(x))
        for mine, other in zip(
            ours.forward_intermediates(x, intermediates_only=True),
            theirs.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            close(mine, other)
    with pytest.raises(ValueError, match="20 x 24 is no multiple of the patch size 8 x 8"):
        ours(draw.randn(1, 3, 20, 24))


@pytest.mark.parametrize("fused", [True, False])
def test_masks_are_timms(fused):
    theirs, ours = pair()
    for model in (theirs, ours):
        for block in model.blocks:
            block.attn.fused_attn = fused
    x, mask = draw.randn(2, 3, 16, 24), torch.ones(7, 7, dtype=torch.bool).tril(2)
    for arguments in ({"attn_mask": mask}, {"attn_mask": mask.float()}, {"is_causal": True}):
        close(ours(x, **arguments), theirs(x, **arguments))
        y = draw.randn(2, 7, 64)
        mine, other = ours.blocks[0].attn(y, **arguments), theirs.blocks[0].attn(y, **arguments)
        close(mine, other)


def test_a_mask_is_refused_by_a_backend_without_masks(backend):
    model = vit.create("vit_tiny_patch16_224", backend=backend, **SMALL)
    with pytest.raises(BackendError, match="attn_mask and is_causal are computed by PyTorch"):
        model(torch.zeros(1, 3, 16, 24, device=model.device), is_causal=True)


def test_another_input_size_later():
    theirs, ours = pair(reg_tokens=2)
    for arguments in ({"img_size": (32, 40)}, {"patch_size": (4, 8)}, {"img_size": (24, 24), "patch_size": (12, 8)}):
        theirs.set_input_size(**arguments)
        ours.set_input_size(**arguments)
        x = draw.randn(1, 3, *theirs.patch_embed.img_size)
        close(ours(x), theirs(x))
        assert ours.preprocess.img_size == ours.patch_embed.img_size
    with pytest.raises(ValueError, match="no multiple of the patch size 7 x 7"):
        ours.set_input_size(patch_size=7)
    assert ours.patch_embed.patch_size == (12, 8)


def test_features_in_every_form():
    theirs, ours = pair(reg_tokens=2)
    x = draw.randn(1, 3, 16, 24)
    mine, other = (m.forward_intermediates(x, 1, return_prefix_tokens=True, output_dict=True) for m in (ours, theirs))
    assert list(mine) == ["image_intermediates", "image_intermediates_prefix", "image_features"]
    for key in other:
        close(mine[key], other[key])
    assert ours.feature_info == theirs.feature_info
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.prune_intermediate_layers([0]) == theirs.prune_intermediate_layers([0]) == [0]
    close(ours(x), theirs(x))


def test_distilled_training_gives_both_logits():
    arch = SMALL | {"depth": 1}
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", **arch)
    fill(theirs)
    ours = vit.create("deit_tiny_distilled_patch16_224", backend="reference", **arch)
    ours.load_state_dict(theirs.state_dict())
    x = draw.randn(2, 3, 16, 24)
    for model in (theirs, ours):
        model.train().set_distilled_training(True)
    for mine, other in zip(ours(x), theirs(x), strict=True):
        close(mine, other)
    ours.reset_classifier(3)
    assert [head.out_features for head in ours.get_classifier()] == [3, 3]
    assert ours.eval()(x).shape == (2, 3)
    with pytest.raises(ValueError, match="a distilled head reads two tokens"):
        ours.reset_classifier(3, "avg")


def test_patches_are_dropped_in_training_only():
    ours = vit.create("vit_tiny_patch16_224", backend="auto", device="cpu", patch_drop_rate=0.5, **SMALL)
    seen = []
    ours.blocks[0].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    x = draw.randn(2, 3, 16, 24)
    ours(x).sum().backward()
    ours.eval()(x)
    assert [t.shape[1] for t in seen] == [1 + 3, 1 + 6]
    kept = torch.cdist(seen[0][:, 1:], seen[1][:, 1:]).argmin(2)
    assert all(len(set(row.tolist())) == 3 for row in kept)


@pytest.mark.parametrize("scheme", ["", "jax", "moco", "reset"])
def test_new_parts_begin_as_timms(scheme):
    arch = SMALL | {"embed_dim": 256, "weight_init": scheme, "global_pool": "map", "init_values": 0.3, "reg_tokens": 4}
    arch |= {"mlp_layer": SwiGLU, "act_layer": "silu", "fix_init": True}
    theirs = timm.create_model("vit_tiny_patch16_224", **arch)
    ours = vit.create("vit_tiny_patch16_224", backend="reference", **arch)
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        deviation = float(other.detach().std(correction=0))
        if deviation == 0.0:
            assert torch.equal(mine, other), key
        elif other.numel() >= 256:
            # Chance moves two deviations of n numbers 1 / sqrt(n) of themselves apart, two means sqrt(2 / n) of those.
            bound = min(0.15, 4 / other.numel() ** 0.5)
            assert float(mine.detach().std()) == pytest.approx(deviation, rel=bound), key
            distance = float(mine.detach().mean() - other.detach().mean())
            assert abs(distance) < 4 * deviation * (2 / other.numel()) ** 0.5, key


@pytest.mark.parametrize("rule", ["bicubic-aa", "bilinear"])
def test_patches_are_resampled_as_timms(rule):
    weight = draw.randn(4, 3, 16, 16)
    mode, _, aa = rule.partition("-")
    for size in ((8, 8), (24, 20), (16, 16)):
        wanted = timm.layers.resample_patch_embed(weight, size, interpolation=mode, antialias=bool(aa))
        # Each pseudo-inverse of 256 pixels is up to 13 roundings away from the exact one.
        close(resample_patches(weight, size, rule), wanted, WIDE)


def test_weights_are_brought_to_another_size_as_by_timm():
    """FlexiViT's files bilinearly without antialiasing, patches too where another size is asked for; others bicubic."""
    for name, arch, rule in (
        ("vit_base_patch16_siglip_224", {"img_size": (64, 96)}, {}),
        ("flexivit_small", {"img_size": 96, "patch_size": 24}, {"interpolation": "bilinear", "antialias": False}),
    ):
        narrow = {"embed_dim": 64, "num_heads": 2, "depth": 1}
        published = timm.create_model(name, **narrow)
        fill(published)
        theirs = timm.create_model(name, **narrow, **arch).eval()
        theirs.load_state_dict(vision_transformer.checkpoint_filter_fn(published.state_dict(), theirs, **rule))
        ours = vit.create(name, backend="reference", weights=published.state_dict(), **narrow, **arch).eval()
        x = draw.randn(1, 3, *theirs.patch_embed.img_size)
        close(ours(x), theirs(x))


# ---- what does not go ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reg_tokens": -1}, "reg_tokens must be a whole number from 0, got -1"),
        ({"mlp_layer": GluMlp}, r"mlp_layer='GluMlp\(gate_last=True\)' is not one of 'mlp'"),
        ({"mlp_layer": functools.partial(SwiGLU, align_to=16)}, r"mlp_layer='SwiGLU\(align_to=16\)' is not one of"),
        ({"norm_layer": nn.RMSNorm}, r"norm_layer='RMSNorm\(eps=None\)' is not one of"),
        (
            {"norm_layer": functools.partial(nn.LayerNorm, bias=False)},
            r"norm_layer='LayerNorm\(bias=False\)' is not one of 'layernorm', 'rmsnorm'",
        ),
        (
            {"embed_norm_layer": functools.partial(timm.layers.LayerNorm, affine=False)},
            r"embed_norm_layer='LayerNorm\(affine=False\)' is not one of 'layernorm'",
        ),
        ({"act_layer": functools.partial(nn.ReLU, other=1)}, r"act_layer='ReLU\(other=1\)' is not one of"),
        ({"reg_token": None}, "no argument 'reg_token'; did you mean reg_tokens"),
        ({"mlp_layer": "glu"}, "mlp_layer='glu' is not one of 'mlp', 'swiglu_packed', 'swiglu'"),
        ({"norm_layer": "batchnorm"}, "norm_layer='batchnorm' is not one of 'layernorm', 'rmsnorm'"),
        ({"mlp_layer": "swiglu_packed", "mlp_ratio": 0.4}, "halves the MLP's width, and 25 is odd"),
        ({"pre_norm": "yes"}, "pre_norm must be True or False, got 'yes'"),
        ({"init_values": float("nan")}, "init_values must be a finite number, got nan"),
        ({"dynamic_pad": True, "dynamic_img_pad": False}, "dynamic_pad=True contradicts dynamic_img_pad=False"),
        ({"patch_drop_rate": 1.0}, "patch_drop_rate must be at least 0 and below 1"),
        ({"pos_resize": "cubic"}, "pos_resize='cubic' is not one of"),
        ({"reg_token": 4}, "no argument 'reg_token'; did you mean reg_tokens"),
    ],
    ids=str,
)
def test_bad_options_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        vit.create("vit_tiny_patch16_224", backend="reference", **(SMALL | arguments))


def test_a_constructor_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="VisionTransformer has no argument 'reg_token'"):
        vit.VisionTransformer(32, 8, reg_token=4)
    with pytest.raises(TypeError, match="VisionTransformer got img_size twice"):
        vit.VisionTransformer(32, img_size=32)
