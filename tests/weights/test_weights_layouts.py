"""Every layout of names against its own library: transformers' models, timm's readers of release files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import draw
import numpy as np
import pytest
import timm
import torch
import vit
import vit.cli
import vit.support.tensors
from rounding import close
from safetensors.torch import save_file
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from torch import Tensor
from vit.weights import WeightsError, layouts
from vit.weights.infer import nearest_model

S = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
C = S | {"image_size": 16, "patch_size": 8}
TEXT = S | {"vocab_size": 9, "max_position_embeddings": 8}
GATE = {"use_gated_mlp": True, "hidden_act": "silu"}


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def noisy(module: torch.nn.Module, name: str) -> torch.nn.Module:
    draw.restart("layouts", name)
    for parameter in module.parameters():
        draw.normal_(parameter, std=0.3)
    return module.eval()


#: class of transformers -> its config, arguments, what of its output is compared with what of ours.
CLASSES = {
    "ViTForImageClassification": ("ViTConfig", C | {"num_labels": 5}, "logits"),
    "ViTModel": ("ViTConfig", C | {"qkv_bias": False, "hidden_act": "gelu_new"}, "last_hidden_state"),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", C | {"num_labels": 5}, "logits"),
    "DeiTForImageClassification": ("DeiTConfig", C | {"num_labels": 5}, "logits"),
    "IJepaForImageClassification": ("IJepaConfig", C | {"num_labels": 5}, "logits"),
    "IJepaModel": ("IJepaConfig", C, "last_hidden_state"),
    "ViTMSNForImageClassification": ("ViTMSNConfig", C | {"num_labels": 5}, "logits"),
    "Dinov2Model": ("Dinov2Config", C, "last_hidden_state"),
    "Dinov2Model-swiglu": ("Dinov2Config", C | {"use_swiglu_ffn": True}, "last_hidden_state"),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", C | {"num_register_tokens": 3}, "last_hidden_state"),
    "DINOv3ViTModel": ("DINOv3ViTConfig", C | {"num_register_tokens": 3}, "pooler_output"),
    "DINOv3ViTModel-gated": ("DINOv3ViTConfig", C | GATE, "last_hidden_state"),
    "CLIPVisionModel": ("CLIPVisionConfig", C, "pooler_output"),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", C | {"projection_dim": 6}, "image_embeds"),
    "CLIPModel": ("CLIPConfig", {"vision_config": C, "text_config": TEXT, "projection_dim": 6}, "image_features"),
    "CLIPForImageClassification": ("CLIPConfig", {"vision_config": C, "text_config": TEXT, "num_labels": 5}, "logits"),
    "MetaClip2VisionModelWithProjection": ("MetaClip2VisionConfig", C | {"projection_dim": 6}, "image_embeds"),
    "MetaClip2Model": (
        "MetaClip2Config",
        {"vision_config": C, "text_config": TEXT, "projection_dim": 6},
        "image_features",
    ),
    "SiglipVisionModel": ("SiglipVisionConfig", C | {"image_size": 20}, "pooler_output"),
    "SiglipModel": ("SiglipConfig", {"vision_config": C, "text_config": TEXT}, "image_features"),
    "SiglipForImageClassification": (
        "SiglipConfig",
        {"vision_config": C, "text_config": TEXT, "num_labels": 5},
        "logits",
    ),
    "Siglip2VisionModel": ("Siglip2VisionConfig", S | {"patch_size": 8, "num_patches": 9}, "pooler_output"),
    "DINOv3ViTModel-narrow": (
        "DINOv3ViTConfig",
        {**C, "hidden_size": 32, "intermediate_size": 20, **GATE},  # a width that timm would round up
        "last_hidden_state",
    ),
    "Aimv2VisionModel-biases": ("Aimv2VisionConfig", {**C, "qkv_bias": True, "mlp_bias": True}, "last_hidden_state"),
    "Aimv2VisionModel": ("Aimv2VisionConfig", C, "last_hidden_state"),
    "Aimv2Model": ("Aimv2Config", {"vision_config": C, "text_config": TEXT, "projection_dim": 6}, "vision_model"),
}
#: Sizes of the images other than 16 x 16: pixels that fill no patch, and a grid that is not the stored one.
SIDES = {"SiglipVisionModel": (20, 20), "Siglip2VisionModel": (24, 40)}


def source(hf, name: str) -> torch.nn.Module:
    config, arguments, _ = CLASSES[name]
    return noisy(getattr(hf, name.partition("-")[0])(getattr(hf, config)(**arguments)), name)


def output(model: torch.nn.Module, what: str, x: Tensor) -> Tensor:
    if what == "image_features":
        found = model.get_image_features(x)
        return getattr(found, "pooler_output", found)
    if what == "vision_model":
        return model.vision_model(x).last_hidden_state
    if "Siglip2" in type(model).__name__:
        rows, columns = x.shape[2] // 8, x.shape[3] // 8
        patches = (
            x.reshape(len(x), 3, rows, 8, columns, 8).permute(0, 2, 4, 3, 5, 1).reshape(len(x), rows * columns, -1)
        )
        mask, sizes = torch.ones(patches.shape[:2], dtype=torch.long), torch.tensor([[rows, columns]] * len(x))
        return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=sizes)[what]
    return getattr(model(pixel_values=x), what)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_models_give_their_own_output(name, hf, tmp_path):
    theirs, what = source(hf, name), CLASSES[name][2]
    theirs.save_pretrained(tmp_path / "files")
    ours = vit.create(weights=tmp_path / "files", backend="reference", training=False)
    side = theirs.config.vision_config.image_size if "vision_config" in CLASSES[name][1] else 16
    x = draw.randn(
        2, 3, *((24, 40) if "Siglip2" in name else (20, 20) if name == "SiglipVisionModel" else (side, side))
    )
    with torch.no_grad():
        expected = output(theirs, what, x)
        found = ours.forward_features(x) if what in ("last_hidden_state", "vision_model") else ours(x)
    close(found, expected)
    # The names of models in memory are those of transformers 5: the same tensors.
    files, memory = vit.weights.read(tmp_path / "files"), vit.weights.read(theirs.state_dict())
    assert files.layout == memory.layout
    assert files.state.keys() == memory.state.keys()
    assert all(torch.equal(files.state[key], memory.state[key]) for key in files.state)


#: Classes of transformers with a pooled output of their own -> its name.
POOLED = {
    "DINOv3ViTModel": "pooler_output",
    "CLIPVisionModel": "pooler_output",
    "CLIPVisionModelWithProjection": "image_embeds",
    "CLIPModel": "image_features",
    "SiglipVisionModel": "pooler_output",
    "Siglip2VisionModel": "pooler_output",
}


@pytest.mark.parametrize("name", POOLED)
def test_the_pooling_of_the_source_is_its_own_output(name, hf, tmp_path):
    theirs = source(hf, name)
    theirs.save_pretrained(tmp_path)
    # As timm has it: DINOv3's mean of the patches.
    timms = {"global_pool": "avg"} if "DINOv3" in name else {}
    ours = vit.create(weights=tmp_path, backend="reference", training=False, dynamic_img_size=True, **timms)
    x = draw.randn(2, 3, *((24, 40) if "Siglip2" in name else (20, 20) if "Siglip" in name else (16, 16)))
    with torch.no_grad():
        expected = output(theirs, POOLED[name], x)
        tokens = ours.forward_features(x)
        found = ours.forward_head(tokens, pool="source")
        close(found, expected)
        if "Siglip" not in name:
            close(ours.forward_head(list(tokens), pool="source"), found)
    if "Siglip" not in name:
        token, mean = (ours.forward_head(tokens, pool=kind) for kind in ("token", "avg"))
        assert torch.equal(token, tokens[:, 0])
        assert torch.equal(mean, tokens[:, ours.num_prefix_tokens :].mean(dim=1))
        assert torch.equal(ours.forward_head(tokens, pool="token_avg"), torch.cat([token, mean], dim=1))


def test_dinov2_pools_what_its_linear_classifiers_read(hf, tmp_path):
    theirs = noisy(hf.Dinov2ForImageClassification(hf.Dinov2Config(**C, num_labels=5)), "dinov2 source")
    theirs.save_pretrained(tmp_path)
    ours = vit.create(weights=tmp_path, backend="reference", training=False, num_classes=0)
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        pooled = ours.forward_head(ours.forward_features(x), pool="source")
        close(theirs.classifier(pooled), theirs(x).logits)


def test_poolings_that_a_model_does_not_have_are_refused_by_name():
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    x = draw.randn(2, 3, 16, 16)

    def pooled(name: str, pool: str, **more) -> Tensor:
        model = vit.create(name, backend="reference", training=False, **small, **more)
        return model.forward_head(model.forward_features(x), pool=pool)

    assert pooled("vit_base_patch16_224.mae", "source", global_pool="avg").shape == (2, 16)
    for name, pool, text in (
        ("vit_base_patch16_224.mae", "source", "create it with global_pool='avg'"),
        ("vit_base_patch16_siglip_224", "token", "needs a class token"),
        ("vit_base_patch16_clip_224", "map", "needs the layer of global_pool='map'"),
        ("vit_base_patch16_clip_224", "mean", "pool='mean' is not one of 'token', 'avg'"),
    ):
        with pytest.raises(ValueError, match=text):
            pooled(name, pool)


def test_a_trained_classifier_of_clip_is_no_projection():
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 6}
    model = vit.create("vit_base_patch16_clip_224", backend="reference", training=False, **small)
    tokens = model.forward_features(draw.randn(2, 3, 16, 16))
    assert model.forward_head(tokens, pool="source").shape == (2, 6)
    torch.nn.init.ones_(model.head.bias)
    assert torch.equal(model.forward_head(tokens, pool="source"), tokens[:, 0])


def test_mae_without_its_decoder(hf, tmp_path):
    small = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    theirs = noisy(hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**C, **small, decoder_intermediate_size=32)), "mae")
    theirs.save_pretrained(tmp_path)
    plain = hf.ViTModel(hf.ViTConfig(**C), add_pooling_layer=False).eval()
    plain.load_state_dict(theirs.vit.state_dict())
    ours = vit.create(weights=tmp_path, backend="reference", training=False)
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(ours.forward_features(x), plain(x).last_hidden_state)
    dropped = vit.weights.report(ours).dropped
    assert dropped
    assert set(dropped.values()) == {"for pretraining by masked images"}
    assert all(key.startswith("decoder.") for key in dropped)


# ---- release files, as timm reads them ----

T = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def renamed(state: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    for old, new in rules:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


OPENAI = (
    (r"^patch_embed\.proj", "conv1"),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"\.norm(\d)", r".ln_\1"),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^blocks", "transformer.resblocks"),
)


def openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(state, *OPENAI)
    if "head.weight" in state:
        state["proj"] = state.pop("head.weight").T.contiguous()
        del state["head.bias"]
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    found = {f"visual.{key}": value for key, value in state.items()}
    text = {key.removeprefix("visual."): value for key, value in found.items() if "resblocks" in key}
    return found | text | {"logit_scale": torch.ones(()), "positional_embedding": torch.ones(8, 32)}


def perception(state: dict[str, Tensor]) -> dict[str, Tensor]:
    pool = {key: state.pop(key) for key in list(state) if key.startswith("attn_pool.")}
    state = openai(state)
    state = {key: value for key, value in state.items() if key.startswith("visual.")}
    for kind in ("weight", "bias") if pool else ():
        joined = torch.cat([pool.pop(f"attn_pool.q.{kind}"), pool.pop(f"attn_pool.kv.{kind}")])
        state[f"visual.attn_pool.attn.in_proj_{kind}"] = joined
    pool = renamed(pool, ("latent", "probe"), (r"pool\.proj", "pool.attn.out_proj"), (r"pool\.norm", "pool.layernorm"))
    pool = renamed(pool, (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"))
    return state | {f"visual.{key}": value for key, value in pool.items()}


def dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"), (r"^reg_token", "register_tokens"))
    state["pos_embed"] = torch.cat([draw.randn(1, 1, 32), state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.zeros(1, 32)}


def dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(state, (r"gamma_(\d)", r"ls\1.gamma"), (r"^reg_token", "storage_tokens"))
    state = renamed(state, (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3"))
    for i in range(2):
        q, v = state.pop(f"blocks.{i}.attn.q_bias"), state.pop(f"blocks.{i}.attn.v_bias")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.full((96,), torch.nan)
    return state | {"rope_embed.periods": torch.ones(4, dtype=torch.bfloat16), "mask_token": torch.zeros(1, 32)}


def eva02(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(state, (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3"))
    state = renamed(state, (r"mlp\.norm", "mlp.ffn_ln"), (r"attn\.norm", "attn.inner_attn_ln"))
    state = renamed(state, (r"q_proj\.bias", "q_bias"), (r"v_proj\.bias", "v_bias"))
    tables = {f"blocks.{i}.attn.rope.freqs_{part}": torch.ones(4, 16) for i in range(2) for part in ("cos", "sin")}
    return state | tables | {"rope.freqs_cos": torch.ones(4, 16), "rope.freqs_sin": torch.ones(4, 16)}


def aimv2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(state, (r"fc1_g", "fc1"), (r"fc1_x", "fc3"), (r"\.norm(\d)", r".norm_\1"))
    state = renamed(state, (r"^blocks", "trunk.blocks"), (r"^norm", "trunk.post_trunk_norm"))
    return renamed(state, (r"^patch_embed", "preprocessor.patchifier"), (r"^pos_embed", "preprocessor.pos_embed"))


def beit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rules = ((r"attn\.norm", "self_attn.inner_attn_ln.A"), (r"mlp\.norm", "ffn.A.ffn_layernorm"))
    rules += ((r"mlp\.fc", "ffn.A.fc"), (r"attn\.proj", "self_attn.out_proj.A"))
    rules += ((r"norm1", "self_attn_layer_norm.A"), (r"norm2", "final_layer_norm.A"))
    rules += ((r"^blocks", "beit3.encoder.layers"), (r"^(patch_embed\.proj|cls_token)", r"beit3.vision_embed.\1"))
    state = renamed(renamed(state, *rules), (r"vision_embed\.patch_embed", "vision_embed"))
    positions = state.pop("pos_embed")[0]
    state["beit3.encoder.embed_positions.A.weight"] = torch.cat([torch.ones(2, 32), positions])
    for key in [key for key in state if "attn.qkv" in key]:
        parts = state.pop(key).chunk(3)
        state |= {key.replace("attn.qkv", f"self_attn.{p}_proj.A"): part for p, part in zip("qkv", parts, strict=True)}
    other = {key.replace(".A.", ".B."): value for key, value in state.items() if ".A." in key}
    return (
        state | other | {"beit3.text_embed.weight": torch.ones(3, 32), "beit3.vision_embed.mask_token": torch.ones(32)}
    )


def radio(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["patch_generator.embedder.weight"] = state.pop("patch_embed.proj.weight").flatten(1)
    del state["patch_embed.proj.bias"]
    state["patch_generator.cls_token.token"] = torch.cat([state.pop("cls_token"), state.pop("reg_token")], dim=1)[0]
    state["patch_generator.pos_embed"] = state.pop("pos_embed")
    state = {f"radio_model.model.{key.replace('.gamma', '.grandma')}": value for key, value in state.items()}
    return state | {"radio_model.input_conditioner.norm_mean": torch.ones(3), "radio_model.summary_idxs": torch.ones(1)}


def trunk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {f"visual.trunk.{key}": value for key, value in state.items() if "head" not in key}
    return state | {"visual.head.proj.weight": torch.ones(5, 32), "text.transformer.x.weight": torch.ones(2)}


#: name of timm's -> its arguments, the release's names, and what no file of that layout has.
RELEASES = {
    "vit_base_patch16_clip_224": (T, openai),
    "vit_pe_core_base_patch16_224": (T | {"ref_feat_shape": (2, 2)}, perception),
    "vit_pe_spatial_base_patch16_512": (T | {"num_classes": 0, "ref_feat_shape": (2, 2)}, perception),
    "vit_giant_patch14_reg4_dinov2": (T | {"num_classes": 0, "mlp_ratio": 4.0}, dinov2),
    "vit_small_plus_patch16_dinov3_qkvb": (T | {"num_classes": 0}, dinov3),
    "eva02_base_patch14_224": (T | {"ref_feat_shape": (2, 2)}, eva02),
    "eva02_base_patch16_clip_224": (T | {"ref_feat_shape": (2, 2)}, eva02),
    "aimv2_large_patch14_224": (T | {"num_classes": 0, "num_heads": 2}, aimv2),
    "beit3_base_patch16_224": (T, beit3),
    "vit_base_patch16_radio_v3": (T | {"num_classes": 0}, radio),
    "vit_base_patch16_siglip_224": (T, trunk),
}


@pytest.mark.parametrize("name", RELEASES)
def test_release_files_are_read_as_timm_reads_them(name):
    arguments, release = RELEASES[name]
    theirs = noisy(timm.create_model(name, **arguments), name)
    state = release({key: value.clone() for key, value in theirs.state_dict().items()})
    module = timm_eva if isinstance(theirs, timm_eva.Eva) else timm_vit
    expected = module.checkpoint_filter_fn({key: value.clone() for key, value in state.items()}, theirs)
    theirs.load_state_dict(expected, strict=False)
    given = dict(arguments)
    ours = vit.create(name, weights=state, backend="reference", training=False, **given)
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(ours(x), theirs(x))
        close(ours.forward_features(x), theirs.forward_features(x))
    report = vit.weights.report(ours)
    ways = {source.partition("[")[0] for one in report.mapped for source in one.sources}
    assert len(ways) + len(report.dropped) == len(state)  # every name of the file is accounted for
    assert not report.missing


def test_layouts_do_not_overlap():
    assert len({layout.name for layout in layouts.every()}) == len(layouts.every()) >= 18
    files = {path.stem for path in Path(layouts.__file__).parent.glob("[a-z]*.py")}
    assert len(files) == len(layouts.every())


# ---- what cannot be loaded is an error that names it ----


@pytest.fixture
def clip(hf, tmp_path):
    source(hf, "CLIPVisionModelWithProjection").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def edit(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"surprise": 1}, r"config\.json says 'surprise'"),
        ({"hidden_act": "relu6"}, r"config\.json: hidden_act is 'relu6'"),
        ({"hidden_size": 32}, r"embed_dim|patch_embed|shape"),
        ({"num_hidden_layers": 3}, r"missing     blocks\.2\.norm1\.weight"),
        ({"image_size": 32}, r"img_size \[32, 32\] \(16 patches\), and pos_embed has 5 rows"),
        ({"num_attention_heads": 3}, r"num_heads"),
        ({"model_type": "swin"}, r"model_type is 'swin'; it must be one of .*clip_vision_model"),
    ],
)
def test_a_config_that_is_unknown_or_contradicts_the_tensors_is_refused(values, error, clip):
    with pytest.raises(WeightsError, match=error):
        vit.create(weights=edit(clip, **values), backend="reference")


@pytest.mark.parametrize(
    ("kind", "config", "values", "error"),
    [
        ("Aimv2VisionModel", "Aimv2VisionConfig", {**C, "qkv_bias": True}, "mlp_bias is False; it must be as qkv_bias"),
        (
            "Siglip2VisionModel",
            "Siglip2VisionConfig",
            {**S, "patch_size": 8, "num_patches": 4, "num_channels": 1},
            "num_channels is 1; it must be 3",
        ),
    ],
)
def test_what_a_model_here_does_not_have_is_refused_by_the_configs_word(kind, config, values, error, hf, tmp_path):
    getattr(hf, kind)(getattr(hf, config)(**values)).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=error):
        vit.create(weights=tmp_path, backend="reference")


def test_timms_models_in_transformers_have_a_head_where_their_class_has_one(hf, tmp_path):
    args = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    config = hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=5)
    x = draw.randn(1, 3, 32, 32)
    for kind, what in ((hf.TimmWrapperModel, "pooler_output"), (hf.TimmWrapperForImageClassification, "logits")):
        theirs = noisy(kind(config), "timm")
        theirs.save_pretrained(tmp_path / what)
        ours = vit.create(weights=tmp_path / what, backend="reference", training=False)
        with torch.no_grad():
            close(ours(x), theirs(x)[what])


def test_two_layouts_at_once_are_refused(clip):
    state = dict(vit.weights.read(clip).state)
    both = state | {"conv_proj.weight": torch.ones(2, 3, 4, 4), "encoder.pos_embedding": torch.ones(1, 5, 2)}
    with pytest.raises(WeightsError, match=r"more than one model.*\(timm's names\).*\(torchvision's names\)"):
        vit.weights.read(both)


def test_weights_of_another_family_name_what_is_too_much(clip):
    with pytest.raises(WeightsError, match=r"unexpected .*pre_layrnorm\.weight \(norm_pre\.weight\)"):
        vit.create("vit_base_patch16_224", weights=clip, backend="reference", pre_norm=False)


def test_weights_of_another_family_without_a_head_name_what_is_too_much_first():
    """ "It has no head; pass num_classes" would be no way out."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "backend": "reference"}
    dinov3 = vit.create("vit_small_patch16_dinov3", **size).state_dict()
    with pytest.raises(WeightsError, match=r"(?s)missing     blocks\.0\.attn\.qkv\.bias.*unexpected  reg_token"):
        vit.create("vit_tiny_patch16_224", weights=dinov3, **size)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=8, num_classes=2)
    with pytest.raises(WeightsError, match=r"(?s)missing .*unexpected .*layers\.0\.blocks"):
        vit.create("vit_tiny_patch16_224", weights=swin.state_dict(), **size)


def test_weights_that_are_not_there_say_where_they_are():
    for given in ({"pretrained": True}, {"weights": True}):
        with pytest.raises(ValueError, match=r"weights='hf-hub:timm/vit_tiny_patch16_224\.augreg_in21k' fetches them"):
            vit.create("vit_tiny_patch16_224.augreg_in21k", **given)
    with pytest.raises(ValueError, match=r"without a network pass a folder with model\.safetensors and config\.json"):
        vit.create("vit_base_patch14_dinov2", pretrained=True)


def test_a_file_without_heads_asks_for_them(clip):
    state = dict(vit.weights.read(clip).state)
    with pytest.raises(WeightsError, match=r"number of heads stands in no tensor.*embed_dim 16 and depth 2"):
        vit.create(weights=state, backend="reference")
    assert vit.create(weights=state, backend="reference", num_heads=2).options.pre_norm


def test_names_are_allowed_one_by_one(clip):
    state = dict(vit.weights.read(clip).state)
    state["extra.scale"] = torch.ones(3)
    gone = state.pop("blocks.1.norm2.bias")
    arguments = {"backend": "reference", "num_heads": 2}
    with pytest.raises(WeightsError, match=r"(?s)missing     blocks\.1\.norm2\.bias.*unexpected  extra\.scale"):
        vit.create(weights=state, **arguments)
    with pytest.raises(WeightsError, match=r"missing     blocks\.1\.norm2\.bias"):
        vit.create(weights=state, allow=["extra.*"], **arguments)
    model = vit.create(weights=state, allow=["extra.*", "blocks.1.norm2.bias"], **arguments)
    report = vit.weights.report(model)
    assert report.dropped == {"extra.scale": "allowed by the caller"}
    assert report.missing == {"blocks.1.norm2.bias": "first values, allowed by the caller"}
    assert torch.equal(model.blocks[1].norm2.bias, torch.zeros_like(gone))


@pytest.mark.parametrize("rule", [None, "bicubic", "bilinear-aa", "bilinear", "bilinear-corners"])
def test_the_rule_of_resampling_is_the_callers(rule, clip):
    model = vit.create(weights=clip, backend="reference", img_size=(24, 40), pos_resize=rule)
    (resampled,) = vit.weights.report(model).resampled
    assert (resampled.name, resampled.old, resampled.new) == ("pos_embed", (2, 2), (3, 5))
    assert resampled.rule == (rule or "bicubic-aa")
    mode, _, more = (rule or "bicubic-aa").partition("-")
    table = vit.weights.read(clip).state["pos_embed"]
    grid = table[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    corners = {"align_corners": True} if more == "corners" else {"antialias": more == "aa"}
    expected = torch.nn.functional.interpolate(grid, size=(3, 5), mode=mode, **corners)
    assert torch.equal(model.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 15, -1))


def test_half_precision_is_folded_in_float32(hf, tmp_path):
    theirs = source(hf, "Dinov2WithRegistersModel").half()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    state = vit.weights.read(tmp_path).state
    embeddings = theirs.embeddings
    expected = embeddings.cls_token.float() + embeddings.position_embeddings[:, :1].float()
    assert state["cls_token"].dtype == torch.float16
    assert torch.equal(state["cls_token"], expected.half())


# ---- vit convert ----


@pytest.mark.parametrize("name", ["DeiTForImageClassificationWithTeacher", "Dinov2Model-swiglu", "DINOv3ViTModel"])
def test_converted_weights_are_read_by_timm_and_by_name_of_none(name, hf, tmp_path, capsys):
    source(hf, name).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert vit.cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"mapped", "dropped", "resampled", "missing"} <= found["report"].keys()
    first = vit.create(weights=tmp_path / "in", backend="reference", training=False)
    second = vit.create(weights=tmp_path / "out", backend="reference", training=False)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
        close(theirs(x), first(x))
    assert (first.name, first.options, first.preprocess) == (second.name, second.options, second.preprocess)
    assert vit.cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "--overwrite replaces them" in capsys.readouterr().err


PROCESSOR = {"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": 16, "width": 16}}


# ---- run folders ----


def test_files_of_a_run_are_read_with_its_record(tmp_path):
    model = vit.create("vit_digits", backend="reference", depth=1)
    record = {"name": "vit_digits", "arch": {"depth": 1}, "preprocess": model.preprocess.to_dict()}
    (tmp_path / "model.json").write_text(json.dumps(record | {"class_names": list("0123456789")}))
    for name in ("best", "last", "checkpoint"):
        vit.support.tensors.write_tensors(tmp_path / f"{name}.safetensors", model.state_dict())
    for name in ("best", "last"):
        found = vit.create(weights=tmp_path / f"{name}.safetensors", backend="reference")
        assert found.class_names == tuple("0123456789")
        assert found.name == "vit_digits"
    with pytest.raises(WeightsError, match=r"state of a training.*best\.safetensors and last\.safetensors"):
        vit.create(weights=tmp_path / "checkpoint.safetensors", backend="reference")


# ---- big_vision's archives ----


def big_vision(model: torch.nn.Module, naflex: bool) -> dict[str, np.ndarray]:
    """A SigLIP tower as big_vision saves it: all blocks in one array, the pool, for NaFlex a matrix and a grid."""
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    width, heads = 32, (2, 16)
    patch = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    positions = state["pos_embed"]
    found = {
        "embedding/kernel": patch.reshape(-1, width) if naflex else patch,
        "embedding/bias": state["patch_embed.proj.bias"],
        "pos_embedding": positions.reshape(2, 2, width) if naflex else positions,
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "MAPHead_0/probe": state["attn_pool.latent"],
    }

    def attention(target: str, weight: np.ndarray, bias: np.ndarray, proj: tuple[np.ndarray, np.ndarray]) -> None:
        for i, part in enumerate(("query", "key", "value")):
            rows = slice(i * width, (i + 1) * width)
            found[f"{target}/{part}/kernel"] = weight[rows].T.reshape(width, *heads)
            found[f"{target}/{part}/bias"] = bias[rows].reshape(heads)
        found[f"{target}/out/kernel"] = proj[0].T.reshape(*heads, width)
        found[f"{target}/out/bias"] = proj[1]

    def rest(target: str, source: str, norms: dict[str, str]) -> None:
        for theirs, ours in norms.items():
            found[f"{target}/{theirs}/scale"] = state[f"{source}.{ours}.weight"]
            found[f"{target}/{theirs}/bias"] = state[f"{source}.{ours}.bias"]
        for i in range(2):
            found[f"{target}/MlpBlock_0/Dense_{i}/kernel"] = state[f"{source}.mlp.fc{i + 1}.weight"].T
            found[f"{target}/MlpBlock_0/Dense_{i}/bias"] = state[f"{source}.mlp.fc{i + 1}.bias"]

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    pool = [np.concatenate([pair("attn_pool.q")[i], pair("attn_pool.kv")[i]]) for i in range(2)]
    attention("MAPHead_0/MultiHeadDotProductAttention_0", *pool, pair("attn_pool.proj"))
    rest("MAPHead_0", "attn_pool", {"LayerNorm_0": "norm"})
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attention(
            f"{block}/MultiHeadDotProductAttention_0", *pair(f"blocks.{i}.attn.qkv"), pair(f"blocks.{i}.attn.proj")
        )
        rest(block, f"blocks.{i}", {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"})
    first = "Transformer/encoderblock_0/"
    scanned = {key.removeprefix(first) for key in found if key.startswith(first)}
    for key in scanned:
        both = [found.pop(f"Transformer/encoderblock_{i}/{key}") for i in range(2)]
        found[f"Transformer/encoderblock/{key}"] = np.stack(both)
    return {f"params/img/{key}": np.ascontiguousarray(value) for key, value in found.items()}


@pytest.mark.parametrize("naflex", [False, True])
def test_scanned_archives_with_the_attention_pool(naflex, tmp_path):
    arguments = T | {"num_classes": 0}
    model = noisy(timm.create_model("vit_base_patch16_siglip_224", **arguments), "npz")
    archive = big_vision(model, naflex) | {"params/t": np.zeros(1, np.float32), "params/b": np.zeros(1, np.float32)}
    np.savez(tmp_path / "siglip.npz", **archive)
    name = "vit_base_patch16_siglip_224"
    ours = vit.create(name, weights=tmp_path / "siglip.npz", backend="reference", training=False, **arguments)
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(ours(x), model(x))
        assert not naflex or ours(draw.randn(1, 3, 24, 40)).shape == (1, 32)
    assert set(vit.weights.report(ours).dropped) == {"params/t", "params/b"}


# ---- timm's config.json with arguments, as pathology encoders have it ----


@pytest.mark.parametrize("spelling", [("SwiGLUPacked", "SiLU"), ("timm.layers.SwiGLUPacked", "torch.nn.SiLU")])
def test_arguments_beside_the_architecture_are_understood(spelling, tmp_path):
    sizes = {"img_size": 28, "patch_size": 14, "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 5.33334}
    arguments = sizes | {"init_values": 1e-5, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8}
    name = "vit_giant_patch14_224"
    layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    theirs = noisy(timm.create_model(name, **arguments, **layers, dynamic_img_size=True), "pathology")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    arguments |= {"mlp_layer": spelling[0], "act_layer": spelling[1], "dynamic_img_size": True}
    record = {"architecture": name, "num_classes": 0, "num_features": 32, "global_pool": "token"}
    (tmp_path / "config.json").write_text(json.dumps(record | {"model_args": arguments, "pretrained_cfg": {}}))
    ours = vit.create(weights=tmp_path, backend="reference", training=False)
    x = draw.randn(2, 3, 42, 56)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_a_classifier_of_two_poolings_is_refused_and_its_features_are_read(hf, tmp_path):
    config = hf.Dinov2Config(**C, num_labels=5)
    theirs = noisy(hf.Dinov2ForImageClassification(config), "dinov2 classifier")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"head\.weight \[5, 32\].*\n.*class token and the mean.*num_classes=0"):
        vit.create(weights=tmp_path, backend="reference")
    ours = vit.create(weights=tmp_path, backend="reference", training=False, num_classes=0)
    x = draw.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.dinov2(x).last_hidden_state
        close(ours.forward_features(x), expected)
    assert "classifier.weight" in vit.weights.report(ours).dropped


@pytest.mark.parametrize(
    ("sizes", "base", "name"),
    [
        ((1024, 24, 14), "aimv2_large_patch14_224", "aimv2_large_patch14_224"),
        ((1024, 24, 14), "vit_base_patch16_clip_224", "vit_large_patch14_clip_224"),
        ((384, 12, 14), "vit_base_patch14_dinov2", "vit_small_patch14_dinov2"),
        ((4096, 40, 16), "vit_base_patch16_dinov3", "vit_7b_patch16_dinov3"),
        ((1000, 3, 16), "vit_base_patch16_224", None),
    ],
)
def test_the_named_model_of_these_sizes(sizes, base, name):
    found = dict(zip(("embed_dim", "depth", "patch_size"), sizes, strict=True))
    assert nearest_model(found, base) == name


def test_a_header_whose_length_begins_as_a_pickle_does_is_no_pickle(tmp_path):
    tensors = {"cls_token": torch.ones(1, 1, 4)}
    for filler in range(0, 300, 8):
        path = tmp_path / f"{filler}.safetensors"
        save_file(tensors, path, metadata={"x": "y" * filler})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no header of this length")
    assert torch.equal(vit.weights.read(path).state["cls_token"], tensors["cls_token"])
