"""`vit viz` and vit.viz: rows of attention against timm's probabilities, rollout against the product of matrices,
pictures that are pictures, and what is refused."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draw
import numpy as np
import pytest
import timm
import torch
import vit
from conftest import USABLE
from PIL import Image
from rounding import WIDE, close
from safetensors.torch import save_file
from torch import Tensor, nn
from vit.cli import main
from vit.viz import attention_rows, filter_components, position_similarity, rollout, token_colours
from vit.viz.arrays import principal

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
#: name -> further arguments: one of every form of attention.
MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {"qk_norm": True},
    "vit_small_patch14_reg4_dinov2": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_siglip_224": {},
    "eva02_base_patch14_448": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_pe_core_tiny_patch16_384": {"attn_pool_num_heads": 4},
    "naflexvit_base_patch16_siglip": {},
}


def pair(name: str, backend: str = "reference") -> tuple[nn.Module, Any, Tensor]:
    """timm's model, ours with the same weights, and images of 3 x 5 patches, all in float64: softmax of large scores
    differs by 6e-6 in float32, and by no more than 2e-15 so."""
    arch = SMALL | MODELS[name]
    patch = 14 if "patch14" in name else 16
    if "naflex" not in name:
        arch["img_size"] = (3 * patch, 5 * patch)
    theirs = draw.fill(timm.create_model(name, **arch), 0.2).eval().double()
    ours = vit.create(name, backend=backend, device="cpu", training=False, **arch).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, draw.randn(2, 3, 3 * patch, 5 * patch, dtype=torch.float64)


def matrices(model: Any, images: Tensor) -> list[Tensor]:
    """timm's own probabilities [B, H, N, N] of each block."""
    found: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        model.forward_features(images)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_timms(name: str) -> None:
    theirs, ours, images = pair(name)
    wanted = matrices(theirs, images)
    prefix = ours.num_prefix_tokens
    assert wanted[0].shape[-1] == prefix + 15
    queries = ["patch:1,2", "patch:2,4", 0]
    places = [prefix + 7, prefix + 14, 0]
    for kind, place in (("class", 0), ("distillation", 1), (f"register:{ours.num_reg_tokens - 1}", prefix - 1)):
        has = {"class": ours.has_class_token, "distillation": "distilled" in name}.get(kind, ours.num_reg_tokens > 0)
        if has:
            queries.append(kind)
            places.append(place)
    before = ours(images)
    rows = attention_rows(ours, images, queries=queries)
    assert len(rows) == 2
    for row, matrix in zip(rows, wanted, strict=True):
        close(row, matrix[:, :, places], 2 * WIDE)  # a rounding of a large score is a relative error of the softmax
    (last,) = attention_rows(ours, images, [-1], "patch:0,0")
    assert torch.equal(last, attention_rows(ours, images, 1, "patch:0,0")[0])
    close(last, wanted[1][:, :, [prefix]], 2 * WIDE)
    assert torch.equal(ours(images), before), "the model is what it was"


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384"])
def test_the_pooling_query_is_timms(name: str) -> None:
    theirs, ours, images = pair(name)
    with torch.no_grad():
        tokens, pool = theirs.forward_features(images), theirs.attn_pool
        q = pool.q(pool.latent).view(1, 1, pool.num_heads, -1).transpose(1, 2)
        k = pool.kv(tokens).view(2, tokens.shape[1], 2, pool.num_heads, -1)[:, :, 0].transpose(1, 2)
        wanted = (q * pool.scale @ k.transpose(-2, -1)).softmax(-1)
    (row,) = attention_rows(ours, images, queries="pool")
    close(row, wanted)


@pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not built")
def test_rows_follow_the_blocks_of_a_native_backend_with_gradients() -> None:
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
        theirs, ours, images = pair(name, "cpu")
        (row,) = attention_rows(ours, images.requires_grad_(), 1)
        close(row, matrices(theirs, images.detach())[1][:, :, :1], WIDE)
        (gradient,) = torch.autograd.grad(row.square().sum(), images)
        assert 0 < float(gradient.abs().max()) < float("inf")


def test_rows_of_half_precision_are_float32_and_errors_leave_no_hook() -> None:
    _, ours, images = pair("vit_small_patch16_224")
    exact = attention_rows(ours, images)
    for row, wanted in zip(attention_rows(ours.bfloat16(), images.bfloat16()), exact, strict=True):
        assert row.dtype == torch.float32
        close(row, wanted, dtype=torch.bfloat16)
        close(row.sum(-1), torch.ones(row.shape[:-1]))
    with pytest.raises(ValueError, match="images are 10 x 10"):
        attention_rows(ours, torch.zeros(1, 3, 10, 10, dtype=torch.bfloat16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())


def brute_force(found: list[Tensor], first: Tensor, fusion: str, discard: float) -> Tensor:
    """The product of whole matrices in float64: [B, N]."""
    row = first.double()
    for matrix in reversed(found):
        fused = matrix.double()
        fused = fused.mean(1) if fusion == "mean" else fused.amax(1) if fusion == "max" else fused.amin(1)
        for one in fused:
            flat = one.view(-1)
            flat[flat.argsort()[: int(discard * len(flat))]] = 0.0
        fused = fused + torch.eye(fused.shape[-1], dtype=torch.float64)
        row = (row[:, None] @ (fused / fused.sum(-1, keepdim=True)))[:, 0]
    return row


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize(("fusion", "discard"), [("mean", 0.0), ("max", 0.0), ("min", 0.0), ("mean", 0.6)])
def test_rollout_is_the_product(name: str, fusion: str, discard: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit.viz.attention.AT_ONCE", 400)  # some rows at a time
    theirs, ours, images = pair(name)
    found = matrices(theirs, images)
    count, prefix = found[0].shape[-1], ours.num_prefix_tokens
    for query, places in (("class", [0]), ("register:1", [2]), ("mean", range(prefix, count))):
        first = torch.zeros(2, count, dtype=torch.float64)
        first[:, list(places)] = 1 / len(places)
        got = rollout(ours, images, query, fusion, discard)
        close(got, brute_force(found, first, fusion, discard))
        close(got.sum(1), torch.ones(2))


def test_rollout_begins_at_the_pooling_layer() -> None:
    theirs, ours, images = pair("vit_base_patch16_siglip_224")
    found = matrices(theirs, images)
    with torch.no_grad():
        first = attention_rows(ours, images, queries="pool")[0].mean(1)[:, 0]
    close(rollout(ours, images, "pool"), brute_force(found, first, "mean", 0.0))


@pytest.mark.parametrize(
    ("name", "query", "text"),
    [
        ("vit_base_patch16_siglip_224", "class", r"has no class token; allowed: patch:ROW,COLUMN of 3 x 5, pool"),
        ("vit_small_patch14_reg4_dinov2", "register:4", r"no such register; allowed: class, register:0 to register:3"),
        ("vit_small_patch14_reg4_dinov2", "pool", r"does not pool by attention \(global_pool='token'\)"),
        ("vit_small_patch14_reg4_dinov2", "patch:3,0", r"no patch:3,0; its patches are patch:0,0 to patch:2,4"),
        ("vit_small_patch14_reg4_dinov2", "patch:x", r"'patch:x' is no patch:ROW,COLUMN"),
        ("vit_small_patch14_reg4_dinov2", "head", r"has no query 'head'; allowed: class"),
        ("vit_small_patch14_reg4_dinov2", 20, r"has no token 20; it has 0 to 19"),
        ("vit_small_patch14_reg4_dinov2", "distillation", r"has no distillation token; allowed: class"),
    ],
)
def test_a_query_that_is_not_there(name: str, query: Any, text: str) -> None:
    _, ours, images = pair(name)
    for read in (lambda: attention_rows(ours, images, queries=query), lambda: rollout(ours, images, query)):
        with pytest.raises(ValueError, match=text):
            read()


def test_other_refusals_of_the_functions() -> None:
    _, ours, images = pair("vit_small_patch16_224")
    with pytest.raises(ValueError, match="block indices"):
        attention_rows(ours, images, [2])
    with pytest.raises(ValueError, match="stands alone"):
        attention_rows(ours, images, queries=["class", "pool"])
    with pytest.raises(ValueError, match="fusion='sum' is not one of"):
        rollout(ours, images, fusion="sum")
    with pytest.raises(ValueError, match="discard must be at least 0"):
        rollout(ours, images, discard=1.0)
    with pytest.raises(TypeError, match=r"a model of vit\.create, got Linear"):
        attention_rows(nn.Linear(1, 1), images)  # type: ignore[arg-type]
    ours.blocks[1].attn = nn.Identity()
    with pytest.raises(TypeError, match="Block with Identity is not known"):
        attention_rows(ours, images)
    dropping = vit.create("vit_digits", device="cpu", patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"patches are left \(patch_drop_rate\)"):
        attention_rows(dropping, torch.zeros(1, 1, 8, 8))


def test_numbers_behind_the_pictures() -> None:
    _, ours, images = pair("vit_small_patch16_224")
    cosines = position_similarity(ours)
    a, b = ours.pos_embed[0, 1 + 7], ours.pos_embed[0, 1 + 4]
    assert cosines.shape == (3, 5, 3, 5)
    close(cosines[1, 2, 0, 4], torch.cosine_similarity(a, b, dim=0))
    components, shares = filter_components(ours, 6)
    assert components.shape == (6, 3, 16, 16)
    filters = ours.patch_embed.proj.weight.detach().flatten(1).float()
    variance = (filters - filters.mean(0)).square().sum()
    along = ((filters - filters.mean(0)) @ components.flatten(1).t()).square().sum(0)
    close(shares, along / variance)
    assert float(shares.diff().max()) <= 0
    _, flexible, _ = pair("naflexvit_base_patch16_siglip")
    red = filter_components(flexible, 1)[0][0, 0]
    alone = principal(flexible.embeds.proj.weight.detach(), 1)[1].view(16, 16, 3)[..., 0]
    close(red, alone)  # a NaFlexVit's patch is [P, Q, channels]
    colours = token_colours(ours, [images[0], images[1]])
    assert [c.shape for c in colours] == [(3, 5, 3)] * 2
    assert float(torch.cat([c.view(-1) for c in colours]).max()) == 1.0
    tokens = ours.forward_features(images)[:, 1:].flatten(0, 1).detach()
    centred = tokens - tokens.mean(0)
    first = (centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]).float()
    drawn = torch.cat([c.view(-1, 3)[:, 0] for c in colours])
    inside = (drawn > 0) & (drawn < 1)
    assert abs(float(torch.corrcoef(torch.stack([first[inside], drawn[inside]]))[0, 1])) > 0.9999


@pytest.mark.parametrize(
    ("name", "what"), [("vit_small_patch16_dinov3", "rope_type='dinov3'"), ("vit_digits", "no pos")]
)
def test_a_model_without_position_embedding_says_so(name: str, what: str) -> None:
    more: dict[str, Any] = SMALL if "dinov3" in name else {"pos_embed": "none"}
    with pytest.raises(ValueError, match=what):
        position_similarity(vit.create(name, device="cpu", training=False, **more))


# ---- the command ----


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    y, x = np.mgrid[0:60, 0:90]
    Image.fromarray(np.stack([2 * x, 3 * y, x + y], axis=2).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a small model with registers, which vit.create takes."""
    folder = tmp_path_factory.mktemp("weights")
    arch = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": [48, 64], "reg_tokens": 2, "num_classes": 4}
    model = vit.create("vit_tiny_patch16_224", device="cpu", **arch)
    save_file(model.state_dict(), folder / "best.safetensors")
    record = {"name": model.name, "arch": arch, "class_names": None, "preprocess": model.preprocess.to_dict()}
    (folder / "model.json").write_text(json.dumps(record))
    return str(folder)


def readable(path: Path) -> bool:
    if path.suffix == ".svg":
        return ET.parse(path).getroot().tag.endswith("svg")
    if path.suffix == ".pdf":
        return path.read_bytes().startswith(b"%PDF-")
    with Image.open(path) as image:
        return image.format == "PNG" and image.convert("L").getextrema() != (255, 255)


COMMANDS: list[tuple[str, ...]] = [
    ("patches", "IMAGE", "IMAGE"),
    ("attention", "IMAGE"),
    ("attention", "IMAGE", "--layer", "all", "--head", "mean", "--query", "register:1"),
    ("attention", "IMAGE", "--layer=-2,-1", "--head", "0", "--query", "patch:2,1"),
    ("rollout", "IMAGE", "--fusion", "max", "--discard", "0.5"),
    ("posemb",),
    ("filters",),
    ("features", "IMAGE", "--layer", "0"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_picture_is_one(words: tuple[str, ...], weights: str, photo: str, tmp_path: Path, capsys) -> None:
    suffix = (".png", ".svg", ".pdf")[COMMANDS.index(words) % 3]
    output = tmp_path / f"a{suffix}"
    output.write_text("the old one")
    words = tuple(photo if word == "IMAGE" else word for word in words)
    assert main(["viz", words[0], weights, *words[1:], "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert captured.err == ""
    assert readable(output)
    assert sorted(tmp_path.iterdir()) == [output]


def test_text_in_an_svg_is_text_and_equal_pictures_are_equal_files(weights: str, photo: str, tmp_path: Path) -> None:
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    for path in (first, second):
        assert main(["viz", "attention", weights, photo, "--head", "2", "--output", str(path)]) == 0
    text = first.read_text()
    assert first.read_bytes() == second.read_bytes()
    assert "layer 1: attention of the class token" in text
    assert "head 2" in text
    assert ", prefix " in text


@pytest.fixture
def backend_of_the_user() -> Iterator[Any]:
    import matplotlib

    before = matplotlib.rcParams.copy()
    yield matplotlib
    assert dict(matplotlib.rcParams.copy()) == dict(before)  # of a copy, as looking at the backend chooses one


def test_pictures_from_python_leave_matplotlib_as_it_is(backend_of_the_user: Any, tmp_path: Path) -> None:
    model = vit.create("vit_digits", device="cpu", training=False)
    image = Image.new("L", (8, 8), 90)
    figure = vit.viz.draw_attention(model, [image], layers=None, heads="mean")
    vit.viz.save(figure, str(tmp_path / "a.png"))
    assert readable(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"heads=\[9\]: vit_digits has the heads 0 to"):
        vit.viz.draw_attention(model, [image], heads=[9])
    with pytest.raises(ValueError, match="inches high"):
        vit.viz.draw_patches(model, [image] * 60)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["patches", "W", "none.png", "--output", "a.png"], 1, "cannot read image none.png: no such file"),
        (["patches", "W", "W", "--output", "a.png"], 1, "is a folder"),
        (["patches", "W", "I", "--output", "a.jpg"], 2, "must end in .png, .svg, .pdf, got 'a.jpg'"),
        (["patches", "W", "I", "--output", "a"], 2, "must end in .png"),
        (["patches", "W", "I", "--output", "no/a.png"], 2, "there is no folder"),
        (["patches", "W", "I"], 2, "--output"),
        (["patches", "W", "--output", "a.png"], 2, "no image is given; usage: vit viz patches MODEL IMAGE..."),
        (["patch", "W", "I", "--output", "a.png"], 2, "invalid choice: 'patch'"),
        (["patches", "W", "I", "--head", "1", "--output", "a.png"], 2, "--head goes with attention, not with patches"),
        (["features", "W", "I", "--layer", "all", "--output", "a.png"], 2, "features are those of one --layer"),
        (["attention", "W", "I", "--layer", "9", "--output", "a.png"], 1, "do not lie in the model's 2 blocks"),
        (["attention", "W", "I", "--head", "3", "--output", "a.png"], 1, "has the heads 0 to 2"),
        (["attention", "W", "I", "--head", "x", "--output", "a.png"], 2, "must be like 0,3, mean or all, got 'x'"),
        (["attention", "W", "I", "--query", "pool", "--output", "a.png"], 1, "does not pool by attention"),
        (
            ["attention", "W", "I", "--query", "register:2", "--output", "a.png"],
            1,
            "allowed as --query: class, register:0",
        ),
        (["rollout", "W", "I", "--discard", "1", "--output", "a.png"], 2, "must be at least 0 and below 1"),
        (["posemb", "no_such_model", "--output", "a.png"], 1, "there is no file or folder 'no_such_model'"),
        (
            ["posemb", "vit_digits", "--model", "vit_digits", "--output", "a.png"],
            1,
            "--model vit_digits is for weights",
        ),
    ],
)
def test_refusals(
    words: list[str], code: int, text: str, weights: str, photo: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["viz", *({"W": weights, "I": photo}.get(word, word) for word in words)]) == code
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_name_is_a_network_with_random_weights_and_a_link_is_not_written_to(
    tmp_path: Path, photo: str, capsys
) -> None:
    output = tmp_path / "a.png"
    assert main(["viz", "filters", "vit_digits", photo, "--output", str(output)]) == 0
    assert capsys.readouterr().err == (
        "vit: filters is a picture of the weights alone; the images are not read\n"
        "vit: vit_digits is a name: its weights are random\n"
    )
    assert main(["viz", "patches", "vit_7b_patch16_dinov3", photo, "--output", str(output)]) == 0  # without its 27 GB
    assert capsys.readouterr().err == ""
    (tmp_path / "link.png").symlink_to(output)
    assert main(["viz", "filters", "vit_digits", "--output", str(tmp_path / "link.png")]) == 1
    assert "is a link" in capsys.readouterr().err
