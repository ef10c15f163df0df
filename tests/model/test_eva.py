"""Eva (EVA-02, DINOv3, Perception Encoder, RoPE-ViT) against timm: parameters, numbers, modules, sizes and tools."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import draw
import pytest
import timm
import torch
import vit
from conftest import NATIVE, USABLE
from rounding import WIDE, close
from test_model_modules import recorded, same_calls
from test_plan import check
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from vit.model.eva import Eva
from vit.model.layers import DropPath
from vit.ops import Spec

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
#: One name of every form of block, positions and head.
NAMES = [
    "eva02_tiny_patch14_224",  # packed SwiGLU, fc_norm, interpolated positions
    "eva02_base_patch14_448",  # split projections, split SwiGLU with a norm inside
    "eva02_large_patch14_clip_336",  # and one in the attention, class token
    "eva02_enormous_patch14_clip_224",  # norms behind the branches
    "eva_giant_patch14_224",  # no rotation
    "vit_small_patch16_dinov3",  # registers, halves, dynamic sizes, no bias of q, k, v
    "vit_small_plus_patch16_dinov3_qkvb",  # aligned SwiGLU
    "vit_small_patch16_lingbot",  # class token with registers
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",  # learned frequencies
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",  # pooling by attention, norm before
    "vit_pe_lang_large_patch14_448",  # no norm at the end
]
#: Backends that have every op of these models.
ROTATES = [
    name
    for name in USABLE
    if not NATIVE[name].reasons(Spec("rotary", torch.float32, {"x": ("*", 4, 2, 8)}, True, {}, "cpu"))
]
BACKENDS = ["reference", *ROTATES]


def arguments(name: str, **arch: Any) -> dict[str, Any]:
    """Small, on a grid of 3 x 5 patches."""
    patch = 14 if "patch14" in name else 16
    pool = {"attn_pool_num_heads": 4} if "pe_core" in name else {}
    return SMALL | {"img_size": (3 * patch, 5 * patch)} | pool | arch


def pair(name: str, backend: str = "reference", training: bool = False, **arch: Any) -> tuple[nn.Module, Eva]:
    """timm's model and ours with the same weights, none of them at zero or one."""
    arch = arguments(name, **arch)
    theirs = draw.fill(timm.create_model(name, **arch), 0.1)
    for block in theirs.blocks:  # ours draws other numbers for the same seed
        for place in ("drop_path1", "drop_path2"):
            if isinstance(drop := getattr(block, place), timm.layers.DropPath):
                setattr(block, place, DropPath(drop.drop_prob))
    ours = vit.create(name, backend=backend, device="cpu", **arch)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(training), ours.train(training)


def images(model: Any, height: int = 0, width: int = 0) -> Tensor:
    size = (height, width) if height else model.patch_embed.img_size
    draw.restart("images")
    return draw.randn(2, 3, *size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_logits_features_and_every_gradient(backend_name, name):
    theirs, ours = pair(name, backend_name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert {n: b.shape for n, b in ours.named_buffers()} == {n: b.shape for n, b in theirs.named_buffers()}
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    found = []
    for model in (theirs, ours):
        x = images(model).requires_grad_()
        features = model.forward_features(x)
        logits = model(x)
        (logits * torch.linspace(0.5, 1, logits.numel()).view_as(logits)).sum().backward()
        found.append((logits, features, x.grad, {n: p.grad for n, p in model.named_parameters()}))
    expected, got = found
    close(got, expected, WIDE)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_forward_calls_is_what_was_planned(name):
    check(vit.create(name, backend="reference", **arguments(name)))


@pytest.mark.parametrize(
    "arch",
    [
        {"proj_drop_rate": 0.3, "drop_path_rate": 0.3, "pos_drop_rate": 0.3, "drop_rate": 0.3},
        {"attn_drop_rate": 0.3},
        {"qk_norm": True},
        {"global_pool": "", "num_classes": 0},
        {"global_pool": "token", "use_fc_norm": True, "qkv_fused": False},
        {"global_pool": "map", "use_rot_pos_emb": False, "pos_embed": "learned"},
    ],
    ids=str,
)
def test_options_too_call_what_was_planned(arch):
    check(vit.create("vit_small_patch16_dinov3", backend="reference", **arguments("patch16", **arch)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_every_module_sees_and_gives_timms_tensors(backend_name, name):
    theirs, ours = pair(name, backend_name, training=True, drop_path_rate=0.5, proj_drop_rate=0.3, drop_rate=0.2)
    seen = []
    for model in (theirs, ours):
        torch.manual_seed(3)  # what is dropped
        with recorded(model) as calls:
            logits = model(images(model))
        seen.append((calls, logits))
    (expected, their_logits), (got, logits) = seen
    assert [path for path, _, _ in got] == [path for path, _, _ in expected]
    for (_, x, y), (_, their_x, their_y) in zip(got, expected, strict=True):
        close(x, their_x, WIDE)
        close(y, their_y, WIDE)
    close(logits, their_logits, WIDE)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.attn", "blocks.0.mlp.act", "blocks.1.attn.k_norm", "norm"])
@pytest.mark.parametrize("name", ["eva02_base_patch14_448", "vit_small_patch16_lingbot"])
def test_what_one_hook_returns_is_used(name, place):
    logits = []
    for model in pair(name):
        model.get_submodule(place).register_forward_hook(lambda module, args, y: y * 0.5)
        logits.append(model(images(model)))
    close(logits[1], logits[0], WIDE)


def test_a_replaced_layer_is_called():
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    logits = []
    for model in pair("eva02_base_patch14_448"):
        for path in ("attn.q_proj", "mlp.fc1_g", "attn.proj"):
            layer = model.blocks[1].get_submodule(path)
            layer.__class__ = Twice
        logits.append(model(images(model)))
    close(logits[1], logits[0], WIDE)


def test_probabilities_can_be_looked_at_as_in_timm():
    seen = []
    for model in pair("vit_small_patch16_dinov3"):
        for block in model.blocks:
            block.attn.fused_attn = False
        with recorded(model, "blocks.1.attn.attn_drop") as calls:
            model(images(model))
        seen.append(calls)
    assert seen[1][0][2].shape == (2, 2, 20, 20)
    same_calls(seen[1], seen[0])


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"])
@pytest.mark.parametrize("pad", [False, True])
def test_sizes_at_run_time(name, pad):
    theirs, ours = pair(name, dynamic_img_size=True, dynamic_img_pad=pad)
    patch = ours.patch_embed.patch_size[0]
    for rows, columns in ((3, 5), (4, 3)):
        x = images(ours, rows * patch - 3 * pad, columns * patch - 5 * pad)
        close(ours(x), theirs(x), WIDE)
        taken = ours.forward_intermediates(x, return_prefix_tokens=True, norm=True)[1]
        for (a, b), (c, d) in zip(
            taken, theirs.forward_intermediates(x, return_prefix_tokens=True, norm=True)[1], strict=True
        ):
            close(a, c, WIDE)
            assert b.shape == d.shape
            close(b, d, WIDE)


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_ape_224", "vit_small_patch16_dinov3"]
)
def test_set_input_size(name):
    theirs, ours = pair(name)
    patch = ours.patch_embed.patch_size[0]
    for model in (theirs, ours):
        model.set_input_size(img_size=(4 * patch, 2 * patch))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    close(ours(images(ours)), theirs(images(ours)), WIDE)


@pytest.mark.parametrize("arguments_", [{}, {"indices": 1, "stop_early": True}, {"indices": [0], "output_fmt": "NLC"}])
@pytest.mark.parametrize("name", ["vit_small_patch16_rope_mixed_ape_224", "vit_pe_lang_large_patch14_448"])
def test_intermediates(name, arguments_):
    theirs, ours = pair(name)
    x = images(ours)
    (got, taken), (expected, wanted) = (m.forward_intermediates(x, **arguments_) for m in (ours, theirs))
    close(got, expected, WIDE)
    for a, b in zip(taken, wanted, strict=True):
        close(a, b, WIDE)


def test_heads_are_replaced_as_in_timm():
    theirs, ours = pair("vit_pe_core_tiny_patch16_384")
    for model in (theirs, ours):
        model.reset_classifier(3, "avg")
    assert ours.head.weight.shape == (3, 48)
    assert ours.attn_pool is None
    theirs.load_state_dict(ours.state_dict())
    close(ours(images(ours)), theirs(images(ours)), WIDE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_enormous_patch14_clip_224"])
def test_masks_are_timms(name, fused):
    theirs, ours = pair(name)
    for block in (*theirs.blocks, *ours.blocks):
        block.attn.fused_attn = fused
    count = ours.forward_features(images(ours)).shape[1]
    mask = draw.rand(count, count) > 0.3
    mask.fill_diagonal_(True)
    x = images(ours)
    close(ours(x, attn_mask=mask[None, None]), theirs(x, attn_mask=mask[None, None]), WIDE)
    close(ours(x, is_causal=True), theirs(x, is_causal=True), WIDE)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        draw.restart()
        _, ours = pair("vit_small_patch16_rope_mixed_ape_224", training=True)
        ours.set_grad_checkpointing(recompute)
        ours(images(ours)).square().sum().backward()
        gradients.append({n: p.grad for n, p in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"])
def test_patch_dropout_keeps_the_places_of_what_it_keeps(name):
    """Kept patches in another order, with their own rotations: the pooled features are those of the same patches."""
    _, ours = pair(name, patch_drop_rate=0.5, global_pool="avg")
    everything = ours(images(ours))
    ours.train()
    ours.patch_drop.kept = lambda x: torch.arange(15).flip(0).repeat(2, 1)  # all of them, in another order
    close(ours(images(ours)), everything, WIDE)
    ours.patch_drop.kept = lambda x: torch.tensor([[3, 1], [14, 0]])
    assert ours.forward_features(images(ours)).shape[1] == ours.num_prefix_tokens + 2
    ours(images(ours)).sum().backward()


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_coordinates_are_disturbed_in_training_only(name):
    disturb = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    theirs, ours = pair(name, **disturb)
    close(ours(images(ours)), theirs(images(ours)), WIDE)
    logits = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(5)
        logits.append(model(images(ours)))
    close(logits[1], logits[0], WIDE)
    assert not torch.equal(ours(images(ours)), ours(images(ours)))


# ---- tables ----


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_are_timms_to_the_bit(name, dtype, dynamic):
    theirs, ours = pair(name, dynamic_img_size=dynamic)
    shape = (3, 5) if dynamic else None
    table, expected = (model.to(dtype).rope.get_embed(shape) for model in (ours, theirs))
    assert table.dtype == expected.dtype
    assert torch.equal(table, expected)


def test_tables_survive_half_precision_and_back():
    _, ours = pair("eva02_tiny_patch14_224")
    table = ours.rope.get_embed().clone()
    assert torch.equal(ours.bfloat16().float().rope.get_embed(), table)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_plus_patch16_dinov3_qkvb"])
def test_a_model_without_values_gets_tables_with_its_weights(name):
    theirs, _ = pair(name)
    with torch.device("meta"):
        ours = vit.create(name, backend="reference", **arguments(name)).eval()
    assert all(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    close(ours(images(ours)), theirs(images(ours)), WIDE)
    with torch.device("meta"):
        ours = vit.create(name, backend="reference", **arguments(name)).eval()
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    close(ours(images(ours)), theirs(images(ours)), WIDE)


def test_seven_billion_parameters_need_no_memory():
    with FakeTensorMode():
        model = vit.create("vit_7b_patch16_dinov3", backend="reference")
    assert sum(p.numel() for p in model.parameters()) == 6_716_030_976


def test_copies_and_pickles_compute_the_same():
    _, ours = pair("vit_small_patch16_rope_mixed_ape_224")
    logits = ours(images(ours))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for model in (
        copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)
    ):  # fmt: skip
        assert torch.equal(model(images(ours)), logits)


def test_compiled_models_compute_the_same():
    _, ours = pair("vit_small_patch16_rope_mixed_ape_224", depth=1)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images(ours)), ours(images(ours)))


def test_the_engine_names_an_option_that_it_does_not_compute():
    with pytest.raises(vit.BackendError, match="use_post_norm=True: the engine computes False"):
        vit.Engine(pair("eva02_enormous_patch14_clip_224")[1])


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ({"rope_type": "axial"}, "rope_type='axial' is not one of 'cat', 'mixed', 'dinov3'"),
        ({"embed_dim": 36}, "embed_dim 36 / num_heads 2 is 18"),
        ({"rope_type": "mixed", "rope_rotate_half": True}, "rope_rotate_half must be False"),
        ({"rope_jitter_coords": 0.5}, "rope_jitter_coords must be None or a number from 1"),
        ({"ref_feat_shape": "16"}, "ref_feat_shape must be"),
        ({"rope_grid_indexing": "yx"}, "rope_grid_indexing='yx'"),
        ({"use_post_norm": True}, "use_post_norm goes without"),
        ({"final_norm": False}, "final_norm=False is an option of VisionTransformer"),
        ({"swiglu_mlp": True, "act_layer": "relu"}, "swiglu_mlp=True gates by SiLU; act_layer='relu' does not go"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arch, text):
    with pytest.raises(ValueError, match=text):
        vit.create("vit_small_patch16_dinov3", backend="reference", **arguments("patch16", **arch))
