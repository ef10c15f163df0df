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
def test_each_image_equals_its_lone_run_to_the_bit(name, training):
    model = draw.fill(vit.create(name, depth=2, num_classes=5, backend="cpu", **MODELS[name]), 0.05).train(training)
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
