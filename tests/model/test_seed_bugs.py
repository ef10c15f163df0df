"""One test for each numerical bug that was found in small published ViT implementations.

Every one of them trained without an error message. Each test builds the wrong version where that is short, so that
it is known to see the difference, and holds ours to an independent formula.
"""

from __future__ import annotations

import copy
import math

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from rounding import close
from torch import Tensor
from vit.model import VisionTransformer, patchify
from vit.preprocess import Preprocess

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}

#: The reference, and "auto": what a user of this machine gets.
BACKENDS = ["reference", "auto"]


def small(backend: str, **arch) -> VisionTransformer:
    """A model with every parameter drawn."""
    model = vit.create("vit_tiny_patch16_224", backend=backend, **(SMALL | arch))
    return draw.fill(model, 0.2)


def formula(model: VisionTransformer, x: Tensor) -> Tensor:
    """The whole network written out in float64, sharing no code with the package."""
    p = {key: value.double() for key, value in model.state_dict().items()}
    x, H, D = x.double(), model.num_heads, model.embed_dim // model.num_heads
    t = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    t = torch.cat([p["cls_token"].expand(len(x), -1, -1), t], 1) + p["pos_embed"]

    def norm(t: Tensor, name: str) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    for i in range(len(model.blocks)):
        b = f"blocks.{i}"
        qkv = norm(t, f"{b}.norm1") @ p[f"{b}.attn.qkv.weight"].T + p[f"{b}.attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in qkv.chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
        heads = (weights @ v).transpose(1, 2).flatten(2)
        t = t + heads @ p[f"{b}.attn.proj.weight"].T + p[f"{b}.attn.proj.bias"]
        h = norm(t, f"{b}.norm2") @ p[f"{b}.mlp.fc1.weight"].T + p[f"{b}.mlp.fc1.bias"]
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        t = t + h @ p[f"{b}.mlp.fc2.weight"].T + p[f"{b}.mlp.fc2.bias"]
    return norm(t, "norm")[:, 0] @ p["head.weight"].T + p["head.bias"]


def images(*shape: int) -> Tensor:
    return draw.randn(shape or (3, 3, 16, 16))


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_the_network_is_the_papers(backend_name):
    """Heads split before the projections, no output projection, no last norm, a scale after the softmax."""
    model, x = small(backend_name), images()
    close(model(x), formula(model, x))


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_gradients_are_the_papers(backend_name):
    """A class token that is counted twice, a position embedding whose backward is never called."""
    model, x = small(backend_name), images()
    exact = copy.deepcopy(model)
    exact.backend = "reference"
    exact.double()
    weight = draw.randn(3, 5)
    (model(x) * weight).sum().backward()
    parameters = dict(exact.named_parameters())
    with torch.no_grad():
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.proj.weight", "head.bias"):
            direction = draw.randn_like(parameters[name])
            values = []
            for sign in (1, -1):  # a central difference of the written-out formula
                parameters[name].add_(sign * 1e-5 * direction)
                values.append((formula(exact, x) * weight).sum())
                parameters[name].sub_(sign * 1e-5 * direction)
            slope = (values[0] - values[1]) / 2e-5
            terms = model.get_parameter(name).grad.double() * direction
            close(terms.sum(), slope, dtype=torch.float32, largest=terms.abs().sum().item(), what=name)


# ---- patches ----


def test_patches_are_not_a_view_of_the_image():
    """Reshaping [B, C, H, W] without a permutation gives rows of the image, not patches; reading it as
    [B, H, W, C] mixes the channels."""
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    naive = torch.stack([
        torch.stack([x[b, :, i : i + 4, j : j + 4].flatten() for i in range(0, 8, 4) for j in range(0, 12, 4)])
        for b in range(2)
    ])  # fmt: skip
    assert torch.equal(patchify(x, 4), naive)
    for wrong in (x.reshape(2, 6, 48), x.reshape(2, 8, 12, 3).unfold(1, 4, 4).unfold(2, 4, 4).reshape(2, 6, 48)):
        assert (wrong != naive).float().mean() > 0.5


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_reach_the_patch_embedding(backend_name, channels):
    """A `channels` argument that is accepted and not passed on."""
    model = small(backend_name, in_chans=channels)
    assert model.patch_embed.proj.weight.shape == (32, channels, 4, 4)
    x = images(1, channels, 16, 16)
    for channel in range(channels):
        changed = x.clone()
        changed[:, channel] += 1
        assert not torch.allclose(model(changed), model(x), atol=1e-3)


def test_a_patch_has_all_its_pixels():
    """A projection of 3 values instead of 3 P P."""
    model = small("reference", patch_embed="linear")
    assert model.patch_embed.proj.weight.shape == (32, 3 * 4 * 4)
    gradient = torch.autograd.grad(model(x := images(1, 3, 16, 16).requires_grad_()).sum(), x)[0]
    assert (gradient != 0).all()


# ---- positions ----


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_positions_are_trained(backend_name):
    model, x = small(backend_name), images()
    before = model.pos_embed.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    assert ((model.pos_embed - before).abs() > 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_positions_matter(backend_name):
    """Without them a ViT sees a bag of patches: shuffling the patches changes nothing."""
    x = images(1, 3, 16, 16)
    shuffled = torch.cat([x[..., 8:, :], x[..., :8, :]], dim=-2)
    model = small(backend_name)
    assert not torch.allclose(model(x), model(shuffled), atol=1e-2)
    model = small(backend_name, pos_embed="none")
    close(model(x), model(shuffled))


# ---- initialisation ----


@pytest.mark.parametrize("scheme", ["", "jax", "jax_nlhb", "moco", "reset"])
def test_initial_values_are_small(scheme):
    """Biases drawn with standard deviation 1 (a mean taken for a deviation), "uniform" weights from [-1, 1], unscaled
    N(0, 1) positions."""
    model = vit.create("vit_tiny_patch16_224", backend="reference", depth=1, weight_init=scheme, num_classes=1000)
    for name, value in model.named_parameters():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, float("weight" in name))), name
        elif name == "pos_embed":
            draw.check_deviation(value, 0.02, name)
        elif name == "cls_token":
            assert value.abs().max() < 6e-6  # of N(0, 1e-6^2): beyond 6 deviations once in 10^9
        elif "bias" in name:
            assert value.std() < 0.05, name
            assert value.abs().max() <= torch.tensor(math.log(1000)), name
        else:
            assert value.std() < 0.1, name
            assert value.abs().max() < 0.3, name
    with torch.inference_mode():
        assert torch.isfinite(model(images(2, 3, 224, 224))).all()


# ---- dropout ----


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_evaluation_has_no_dropout(rate):
    """Fused attention whose dropout stays on in evaluation: the published accuracy was measured with noise."""
    model, x = small("auto", **{rate: 0.9}).eval(), images()
    close(model(x), formula(model, x))
    assert torch.equal(model(x), model(x))


# ---- attention and softmax ----


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_attention_weights_sum_to_one(backend_name):
    """Dividing by sqrt(D) after the softmax shrinks every output: with equal values the output must be that value."""
    q, k = draw.randn(2, 2, 9, 3, 16).unbind(0)
    v = draw.randn(2, 1, 3, 16).expand(2, 9, 3, 16)
    close(vit.ops.attention(q, k, v, backend=backend_name), v)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_softmax_is_stable(backend_name):
    q = torch.full((1, 2, 1, 8), 100.0)
    k = torch.stack([torch.full((1, 1, 8), 100.0), torch.full((1, 1, 8), -100.0)], dim=1)
    v = torch.stack([torch.ones(1, 1, 8), torch.zeros(1, 1, 8)], dim=1)  # scores of +-28,284
    q.requires_grad_()
    out = vit.ops.attention(q, k, v, backend=backend_name)
    assert torch.equal(out, torch.ones(1, 2, 1, 8))
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


# ---- batches ----


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("classes", [1, 5])
def test_a_last_batch_of_one_keeps_its_dimension(backend_name, classes):
    """squeeze() on logits or labels."""
    model, x = small(backend_name, num_classes=classes), images(4, 3, 16, 16)
    assert model(x[:1]).shape == (1, classes)
    close(model(x[:1]), model(x)[:1])


# ---- images ----


def test_every_channel_has_its_own_statistics():
    """Colour images normalised with the one mean and deviation of MNIST."""
    preprocess = vit.create("deit_tiny_patch16_224", backend="reference", device="meta").preprocess
    assert len(set(preprocess.mean)) == len(set(preprocess.std)) == 3
    with pytest.raises(ValueError, match=r"mean has 2 values for 3 channel\(s\)"):
        Preprocess(32, mean=(0.1307, 0.3081))


# ---- precision and place ----


def test_float64_is_float64_throughout():
    """An intermediate kept in float32 costs seven digits."""
    model = small("auto").double()
    x = images().double()
    close(model(x), formula(model, x))


def test_no_gpu_is_needed():
    model = small("reference", device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(images()).device.type == "cpu"
