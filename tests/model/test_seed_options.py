"""Options that the seed projects have: overlapping patches, 1-D sine positions, a head with a hidden layer, ReLU."""

from __future__ import annotations

import math
from typing import Any

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from rounding import close
from torch import Tensor, nn
from vit.backends import BackendError
from vit.model import patchify
from vit.model.layers import PatchEmbed

SMALL: dict[str, Any] = {
    **{"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3},
}
SEEDS: dict[str, Any] = {"patch_stride": 4, "pos_embed": "sincos1d", "representation_size": 4, "act_layer": "relu"}


def model_of(backend: str = "reference", **arch: Any) -> vit.VisionTransformer:
    torch.manual_seed(0)
    model = vit.VisionTransformer(backend=backend, **(SMALL | arch))
    draw.restart("seed options")
    for parameter in model.parameters():
        draw.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(("height", "width", "patch", "stride"), [(16, 24, 8, 4), (11, 14, 5, 3), (9, 9, 4, 5)])
def test_the_grid_of_overlapping_patches(height: int, width: int, patch: int, stride: int) -> None:
    """((side - patch) // stride + 1) patches a side, each the pixels that PyTorch's unfold takes."""
    images = draw.randn(2, 3, height, width)
    got = patchify(images, patch, stride=stride)
    assert got.shape[1] == ((height - patch) // stride + 1) * ((width - patch) // stride + 1)
    assert torch.equal(got, F.unfold(images, patch, stride=stride).transpose(1, 2))


@pytest.mark.parametrize("layout", ["conv", "linear"])
def test_overlapping_patches_are_a_convolution(backend: str, device: Any, layout: str) -> None:
    """Forward and backward, also to the image, against PyTorch's convolution in float64, by the rounding of sums of
    192 products."""
    model = vit.VisionTransformer(backend=backend, device=device, **(SMALL | {"patch_stride": 4}), patch_embed=layout)
    embed = model.patch_embed
    assert embed.grid_size == (3, 3)
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 10, 16)
    images = draw.randn(2, 3, 16, 16).to(device).requires_grad_()
    tokens = embed(images)
    dy = draw.randn(*tokens.shape).to(device)
    got = torch.autograd.grad(tokens, [images, embed.proj.weight, embed.proj.bias], dy)
    exact = images.detach().double().cpu().requires_grad_()
    weight = embed.filters().detach().double().cpu().requires_grad_()
    bias = embed.proj.bias.detach().double().cpu().requires_grad_()
    truth = F.conv2d(exact, weight, bias, stride=4).flatten(2).transpose(1, 2)
    wanted = torch.autograd.grad(truth, [exact, weight, bias], dy.double().cpu())
    for ours, theirs in zip((tokens, *got), (truth, *wanted), strict=True):
        close(ours.reshape(theirs.shape), theirs)


def test_a_stride_that_leaves_pixels_over() -> None:
    with pytest.raises(ValueError, match="16 x 16 is not filled by patches of 8 x 8, 5 x 5 apart"):
        model_of(patch_stride=5)
    images = draw.randn(2, 3, 16, 16)
    dropped = model_of(patch_stride=5, drop_edge=True)
    assert dropped.patch_embed.grid_size == (2, 2)
    padded = model_of(patch_stride=5, dynamic_img_pad=True)
    assert padded.patch_embed.grid_size == (3, 3)
    whole = model_of(patch_stride=5, img_size=18)
    assert torch.equal(padded(images), whole(F.pad(images, (0, 2, 0, 2))))
    assert torch.equal(dropped(images), model_of(patch_stride=5, img_size=13)(images[..., :13, :13]))


def test_overlapping_patches_of_other_sizes() -> None:
    model = model_of(patch_stride=4, dynamic_img_size=True)
    assert model.patch_embed(draw.randn(1, 3, 24, 16)).shape == (1, 5, 3, 16)
    assert model(draw.randn(1, 3, 24, 16)).shape == (1, 3)
    model.set_input_size(img_size=20)
    assert model.patch_embed.grid_size == (4, 4)
    with pytest.raises(ValueError, match="create the model anew"):
        model.set_input_size(patch_size=4)
    plain = PatchEmbed((16, 16), (8, 8), 3, 16)
    plain.set_patch_size((4, 4))
    assert plain.stride == (4, 4)


def test_sincos1d_is_the_formula() -> None:
    """sin and cos of n / 10000^(2 k / dim), alternating, over the patches in reading order; class token: zeros."""
    model = model_of(pos_embed="sincos1d", img_size=(16, 24))
    table = model.pos_embed
    assert table is not None
    assert not isinstance(table, nn.Parameter)
    assert not table[0, 0].any()
    angles = torch.arange(6.0).double()[:, None] / 10000 ** (torch.arange(8.0).double() / 8)
    expected = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    close(table[0, 1:], expected, 0.5)  # rounded once
    model.set_input_size(img_size=24)
    assert torch.equal(model.pos_embed, model_of(pos_embed="sincos1d", img_size=24).pos_embed)
    with pytest.raises(ValueError, match="even embed_dim"):
        model_of(pos_embed="sincos1d", embed_dim=9, num_heads=3)


def test_the_hidden_layer_of_the_head(backend: str, device: Any) -> None:
    """head(tanh(fc(norm(class token)))); what a probe reads is the hidden layer."""
    model = model_of(backend, representation_size=4).to(device)
    images = draw.randn(2, 3, 16, 16).to(device)
    tokens = model.forward_features(images)
    fc = model.pre_logits.fc
    hidden = torch.tanh(F.linear(tokens[:, 0], fc.weight, fc.bias))
    close(model.forward_head(tokens, pre_logits=True), hidden)
    close(model(images), F.linear(hidden, model.head.weight, model.head.bias))
    model.reset_classifier(7)
    assert model.head.in_features == model.head_hidden_size == 4
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_gap", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"]
)
def test_models_without_the_option_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="representation_size=4 is an option of VisionTransformer"):
        vit.create(name, backend="reference", depth=1, representation_size=4)


@pytest.mark.parametrize("mlp_layer", ["mlp", "swiglu", "swiglu_packed"])
def test_relu(backend: str, device: Any, mlp_layer: str) -> None:
    """A model with ReLU gives the reference's logits and gradients, called by its class as timm does, too."""
    arch = {"act_layer": nn.ReLU, "mlp_layer": mlp_layer}
    assert vit.VisionTransformer(**SMALL, **arch, backend="reference").blocks[0].mlp.act.__class__ is nn.ReLU
    images, found = draw.randn(2, 3, 16, 16), []
    for name, place, dtype in ((backend, device, torch.float32), ("reference", "cpu", torch.float64)):
        model = model_of(name, **arch).to(device=place, dtype=dtype)
        logits = model(images.to(place, dtype))
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for ours, exact in zip(*found, strict=True):
        close(ours, exact)


def test_all_of_them_are_saved_and_created_again(tmp_path: Any) -> None:
    model = vit.create("vit_tiny_patch16_224", backend="reference", training=False, **(SMALL | SEEDS))
    vit.weights.save(model, tmp_path)
    again = vit.create(weights=tmp_path, backend="reference", training=False)
    images = draw.randn(2, 3, 16, 16)
    assert torch.equal(model(images), again(images))
    bare = vit.create(weights=model.state_dict() | {}, backend="reference", training=False, **(SMALL | SEEDS))
    assert torch.equal(model(images), bare(images))


@pytest.mark.parametrize("option", SEEDS)
def test_the_engine_refuses_what_it_does_not_compute(option: str) -> None:
    model = model_of(**{option: SEEDS[option]})
    if option == "pos_embed":  # a table like any other
        images = draw.randn(2, 3, 16, 16)
        close(vit.Engine(model)(images), model(images))
        return
    with pytest.raises(BackendError, match="ReLU; the engine knows" if option == "act_layer" else option):
        vit.Engine(model)


class Head(nn.Module):
    """A head of attention with one projection whose channels are q, k and v in turn."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3)).unbind(-1)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.layernorm1, self.layernorm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.msa = nn.ModuleDict({"proj_back": nn.Linear(dim, dim)})
        self.msa["heads"] = nn.ModuleList(Head(dim, dim // heads) for _ in range(heads))
        self.mlp = nn.ModuleDict({"fc": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layernorm1(x)
        x = x + self.msa["proj_back"](torch.cat([head(y) for head in self.msa["heads"]], -1))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc"](self.layernorm2(x))))


class Theirs(nn.Module):
    """A ViT under the names of the layout "heads apart", written anew."""

    def __init__(self, dim: int = 12, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.patch_embed = nn.Module()
        self.backbone.patch_embed.convProjection = nn.Conv2d(3, dim, 8, 8)
        self.backbone.patch_embed.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.backbone.patch_embed.cls_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.backbone.encoders = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.layernorm = nn.LayerNorm(dim)
        self.hidden, self.final_class = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        embed = self.backbone.patch_embed
        x = embed.convProjection(images).flatten(2).mT
        x = torch.cat([embed.cls_embed.expand(len(x), -1, -1), x], 1) + embed.pos_embed
        for block in self.backbone.encoders:
            x = block(x)
        return self.final_class(torch.tanh(self.hidden(self.layernorm(x[:, 0]))))


def test_weights_with_interleaved_qkv(tmp_path: Any) -> None:
    """q, k and v of each channel beside each other, head by head, into timm's rows; sizes, heads and hidden layer are
    told by the file alone."""
    draw.restart("interleaved")
    theirs = Theirs().eval()
    for parameter in theirs.parameters():
        draw.normal_(parameter, std=0.3)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    ours = vit.create(weights=path, backend="reference", training=False)
    assert vit.weights.report(ours).layout == "heads apart"
    assert (ours.options.num_heads, ours.options.representation_size, ours.options.norm_eps) == (3, 3, 1e-5)
    images = draw.randn(2, 3, 16, 16)
    close(ours(images), theirs(images))
    short = {key: value for key, value in theirs.state_dict().items() if "encoders.1.msa.heads.1" not in key}
    with pytest.raises(vit.weights.WeightsError, match=r"encoders\.1\.msa\.heads\.1"):
        vit.create(weights=short, backend="reference")
