"""A list of images of several sizes: one packed forward, each image as if it were alone."""

from __future__ import annotations

import draw
import pytest
import torch
import vit
from vit.model.layers import DropPath
from vit.ops import attention

SIZES = ((32, 64), (64, 64), (64, 64), (16, 16), (112, 48))
MODELS = {
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "deit_tiny_distilled_patch16_224": {"dynamic_img_size": True},
    "naflexvit_base_patch16_siglip": {"embed_dim": 64, "num_heads": 2},
    "vit_small_patch16_dinov3": {"dynamic_img_size": True},
    "vit_small_patch16_rope_mixed_224": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_pack_is_that_of_each_image_to_the_bit(dtype, queries):
    lengths = [64, 64, 5, 197, 1]
    packed = draw.randn(1, sum(lengths), 3, 2, 32, dtype=dtype, requires_grad=True)
    y = attention(packed, queries=queries, lengths=lengths)
    dy = draw.randn_like(y)
    y.backward(dy)
    rows = lengths if queries is None else [queries] * len(lengths)
    parts = zip(packed.detach().split(lengths, 1), packed.grad.split(lengths, 1), strict=True)
    for (x, grad), own, d in zip(parts, y.split(rows, 1), dy.split(rows, 1), strict=True):
        x = x.clone().requires_grad_()
        alone = attention(x, queries=queries)
        alone.backward(d)
        assert torch.equal(alone, own)
        assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_each_image_equals_its_lone_run_to_the_bit(host, name, training):
    model = draw.fill(vit.create(name, depth=2, num_classes=5, backend=host, **MODELS[name]), 0.05).train(training)
    images = [draw.randn(3, *size, requires_grad=True) for size in SIZES]
    logits = model(images)
    dy = draw.randn_like(logits)
    logits.backward(dy)
    for i, image in enumerate(images):
        alone = image.detach()[None].requires_grad_()
        y = model(alone)
        y.backward(dy[i : i + 1])
        assert torch.equal(y[0], logits[i])
        assert torch.equal(alone.grad[0], image.grad)


def test_weight_gradients_of_a_checkpointed_pack_are_the_same():
    model = draw.fill(vit.create("vit_tiny_patch16_224", depth=2, num_classes=5, dynamic_img_size=True), 0.05)
    images = [draw.randn(3, *size) for size in SIZES]
    grads = []
    for checkpointing in (False, True):
        model.grad_checkpointing = checkpointing
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_features_of_a_pack_are_a_list_of_tokens():
    model = vit.create("naflexvit_base_patch16_gap", depth=1, embed_dim=64, num_heads=2, training=False)
    images = [draw.randn(3, *size) for size in SIZES]
    features = model.forward_features(images)
    prefix = model.num_prefix_tokens
    assert [list(x.shape) for x in features] == [[prefix + h * w // 256, 64] for h, w in SIZES]
    assert torch.equal(model.forward_head(features), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_intermediates_of_a_pack_are_those_of_each_image_to_the_bit(name):
    model = draw.fill(vit.create(name, depth=2, num_classes=5, backend="cpu", **MODELS[name]), 0.05).eval()
    images = [draw.randn(3, *size) for size in SIZES]
    features, entries = model.forward_intermediates(images, return_prefix_tokens=True, norm=True)
    rows = model.get_intermediate_layers(images, 1)[0]
    found = model.forward_intermediates(images, 1, output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    for i, (image, (h, w)) in enumerate(zip(images, SIZES, strict=True)):
        alone, own = model.forward_intermediates(image[None], return_prefix_tokens=True, norm=True)
        assert torch.equal(features[i], alone[0])
        for entry, expected in zip(entries, own, strict=True):
            pairs = zip(entry, expected, strict=True) if model.num_prefix_tokens else [(entry, expected)]
            assert all(torch.equal(part[i], whole[0]) for part, whole in pairs)
            patches = entry[0] if model.num_prefix_tokens else entry
            assert list(patches[i].shape) == [model.embed_dim, h // 16, w // 16]
        assert torch.equal(rows[i], model.get_intermediate_layers(image[None], 1)[0][0])
        assert torch.equal(rows[i], found["image_intermediates"][0][i])
        if model.num_prefix_tokens:
            assert found["image_intermediates_prefix"][0][i].shape == (model.num_prefix_tokens, model.embed_dim)
        assert torch.equal(found["image_features"][i], features[i])
    with pytest.raises(ValueError, match="attn_mask and is_causal go with images of one size"):
        model.forward_intermediates(images, is_causal=True)


@pytest.mark.parametrize("name", MODELS)
def test_patch_dropout_of_a_pack_is_that_of_each_image_in_its_turn(name):
    model = vit.create(name, depth=2, num_classes=5, backend="cpu", patch_drop_rate=0.5, **MODELS[name])
    draw.fill(model, 0.05).train()
    images = [draw.randn(3, *size, requires_grad=True) for size in SIZES]
    torch.manual_seed(0)
    logits = model(images)
    logits.square().sum().backward()
    torch.manual_seed(0)
    assert torch.equal(torch.cat([model(image.detach()[None]) for image in images]), logits)
    kept = [len(tokens) - model.num_prefix_tokens for tokens in model.forward_features(images)]
    assert kept == [max(1, h * w // 256 // 2) for h, w in SIZES]
    assert all(image.grad.count_nonzero() for image in images)
    with pytest.raises(ValueError, match=r"8 of 4 x 4 patches are left \(patch_drop_rate\), which are no grid"):
        model.forward_intermediates(images[1:])


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_compiles_without_a_break(name):
    torch._dynamo.reset()
    model = draw.fill(vit.create(name, depth=1, num_classes=5, backend="cpu", **MODELS[name]), 0.05)
    images = [draw.randn(3, *size) for size in SIZES]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(images)
        logits.square().sum().backward()
        grads.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_pack_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = draw.fill(vit.create("vit_tiny_patch16_224", depth=1, num_classes=5, dynamic_img_size=True), 0.05)
        images = [draw.randn(3, *size) for size in SIZES]
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        grads = []
        for run in (model, wrapped):
            model.zero_grad()
            run(images).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_stochastic_depth_drops_images_of_a_pack_whole():
    lengths = [3, 5, 2, 4, 6, 1]
    y = DropPath(0.5)(torch.ones(1, sum(lengths), 2), lengths)
    kept = [set(image.flatten().tolist()) for image in y.split(lengths, 1)]
    assert all(values in ({0.0}, {2.0}) for values in kept)
    assert {0.0} in kept
    assert {2.0} in kept


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([3, 3], ValueError, r"\[3, 3\] sum up to 6, and q has 7 tokens"),
        ([0, 7], ValueError, "must be positive, got 0 at position 0"),
        ([9, -2], ValueError, "must be positive, got -2 at position 1"),
        ([7.0], TypeError, r"integers, got \[7.0\]"),
        (torch.tensor([3, 4]), TypeError, "got a Tensor; use lengths.tolist()"),
        ([], ValueError, "sum up to 0"),
    ],
)
def test_wrong_lengths_are_named(lengths, error, text):
    with pytest.raises(error, match=text):
        attention(torch.zeros(1, 7, 3, 1, 8), lengths=lengths)


def test_lengths_want_one_row_of_tokens():
    with pytest.raises(ValueError, match=r"\[1, N, H, D\].* got q \[2, 7, 3, 1, 8\]"):
        attention(torch.zeros(2, 7, 3, 1, 8), lengths=[7, 7])


def test_wrong_lists_of_images_are_named():
    model = vit.create("vit_tiny_patch16_224", depth=1, dynamic_img_size=True, training=False)
    with pytest.raises(ValueError, match="list of images is empty"):
        model([])
    with pytest.raises(ValueError, match=r"images\[1\] must be \[3, height, width\], got \[1, 3, 16, 16\]"):
        model([torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16)])
    with pytest.raises(TypeError, match=r"images\[0\] must be a tensor, got str"):
        model(["a.png"])
