"""Seeded weights: the same for everybody who draws them, and as hard to quantize as trained ones."""

from __future__ import annotations

import torch
import vit
from vit.bench.weights import seeded_state
from vit.support.random import normal


def drawn(seed: int = 0) -> dict[str, torch.Tensor]:
    return seeded_state(vit.create("vit_tiny_patch16_224", backend="reference").state_dict(), seed)


def test_a_tensor_depends_on_name_shape_and_seed_alone():
    whole = drawn()
    name = "blocks.3.mlp.fc1.weight"
    assert seeded_state({name: whole[name]})[name].equal(whole[name])
    assert not whole[name].equal(whole["blocks.4.mlp.fc1.weight"])
    assert not whole[name].equal(drawn(1)[name])


def test_heavy_tails_and_outlier_gains():
    whole = drawn()
    weight = whole["blocks.0.attn.qkv.weight"]
    kurtosis = (weight / weight.std()).pow(4).mean().item()
    assert kurtosis > 6  # a normal distribution has 3
    gain = whole["blocks.0.norm1.weight"]
    assert gain.max() > 4 * gain.median()


def test_activations_keep_their_size():
    model = vit.create("vit_tiny_patch16_224", backend="reference", training=False)
    model.load_state_dict(drawn())
    with torch.inference_mode():
        logits = model(normal((2, 3, 224, 224), "images"))
    assert 0.3 < logits.std() < 10
    assert not logits[0].allclose(logits[1], rtol=1e-2)  # the image still matters
