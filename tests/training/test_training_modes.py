"""Ways to train: mixing, erasing, other losses and optimizers, frozen and layer-wise learning, early ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from rounding import about, close
from safetensors.torch import load_file, save_file
from training_helpers import SMALL, STEPS, Hook, figures, same_bits, terminate
from vit.data import open_source
from vit.data.augment import Affine, Changes, CropFlip, Elastic, Erase, generator
from vit.data.loader import EpochBatches, Images, loader
from vit.data.presets import PRESETS, Torchvision
from vit.preprocess import Preprocess
from vit.support import affine
from vit.support.random import Stream
from vit.tasks import get
from vit.training import Interrupted, TrainConfig, train
from vit.training.features import features
from vit.training.mix import beta, mixed
from vit.training.optim import learning_rate, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

#: All that is new beside each other, on matrices large enough for 8 bits.
EVERYTHING = dataclasses.replace(
    SMALL,
    arch={"embed_dim": 64, "depth": 2, "num_heads": 2},
    batch_size=128,
    accumulate=2,
    optimizer="adamw8bit",
    layer_decay=0.7,
    mixup=0.8,
    cutmix=1.0,
    erase=0.5,
    loss="bce",
    spike=3.0,
    patience=5,
    grad_checkpoint="yes",
)


# ---- to the bit ----


def test_every_mode_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = train(EVERYTHING, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(EVERYTHING, out=tmp_path / "run", display=Hook(3, terminate))
    result = train(resume=tmp_path / "run", changes={"workers": 2})
    same_bits(whole.run, result.run)
    state = load_file(result.run / "checkpoint.safetensors")
    assert any(tensor.dtype == torch.uint8 for name, tensor in state.items() if name.endswith(".exp_avg"))


def test_a_run_from_before_an_option_goes_on(tmp_path: Path) -> None:
    """Its checkpoint and config.yaml do not know it: it had the default."""
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "run", display=Hook(3, terminate))
    config = tmp_path / "run" / "config.yaml"
    config.write_text("".join(line + "\n" for line in config.read_text().splitlines() if not line.startswith("mixup")))
    assert "mixup" not in config.read_text()
    train(resume=tmp_path / "run")


# ---- mixing and erasing ----


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_mixed_images_have_the_shares_of_their_labels(mixup: float, cutmix: float) -> None:
    # Image i has the value of its label everywhere, so the mean says which share of it is there.
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.float()[:, None, None, None].expand(4, 3, 20, 10).contiguous()
    for step in range(20):
        out, targets = mixed(images, labels, 4, mixup, cutmix, Stream("mix", 0, step))
        close(targets.sum(dim=1), torch.ones(4))
        close(out.mean(dim=(1, 2, 3)), targets @ labels.float())
        again = mixed(images, labels, 4, mixup, cutmix, Stream("mix", 0, step))
        assert torch.equal(out, again[0])
    assert images.unique().tolist() == [0, 1, 2, 3], "the batch itself is left alone"


def test_beta_has_its_mean_and_spread() -> None:
    rng = Stream("beta")
    for alpha in (0.2, 1.0, 2.0):
        variance = 1 / (4 * (2 * alpha + 1))
        drawn = np.array([beta(alpha, rng) for _ in range(4000)])
        assert drawn.mean() == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)  # 4 deviations of a mean
        # A variance of n numbers is off by sqrt((kurtosis - 1) / n) of itself; the kurtosis here is below 3.
        assert drawn.var() == pytest.approx(variance, rel=4 * (2 / 4000) ** 0.5)


def test_erasing_takes_rectangles_as_often_and_as_large_as_said() -> None:
    areas = []
    for index in range(400):
        pixels = torch.ones(3, 24, 32)
        Erase(0.25)(pixels, Stream("erase", index))
        assert torch.equal(pixels[0], pixels[2])
        areas.append(1 - pixels[0].mean().item())
    erased = [area for area in areas if area > 0]
    assert len(erased) / 400 == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 400) ** 0.5)  # 3 deviations of a share
    assert 0.005 < min(erased) < max(erased) < 0.36


@pytest.mark.parametrize("name", PRESETS)
def test_torchvisions_presets_depend_on_the_image_alone(name: str) -> None:
    pytest.importorskip("torchvision")
    change = Torchvision(name, CropFlip((16, 16)))
    image = Image.fromarray(np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3))
    before = torch.get_rng_state()
    first = [np.asarray(change(image, generator(0, 0, i))) for i in range(4)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = [np.asarray(change(image, generator(0, 0, i))) for i in reversed(range(4))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("name", PRESETS)
def test_torchvisions_presets_keep_grey_images_grey(name: str) -> None:
    """The greyscale of 3-Augment has three channels, which no batch of grey images takes."""
    pytest.importorskip("torchvision")
    image, change = gradient().convert("L"), Torchvision(name, CropFlip((24, 24)))
    assert {change(image, generator(0, 0, i)).mode for i in range(12)} == {"L"}


def test_erased_pixels_do_not_depend_on_the_workers() -> None:
    samples = open_source("digits").splits["train"].take(range(24))
    images = Images(samples, Preprocess((8, 8), in_chans=1), None, 3, Erase(0.5))
    batches = EpochBatches(24, 8, 0)
    found = [[x for x, _ in loader(images, batches, workers)] for workers in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    down, across = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([across * 6, down * 8, (across + down) * 3], axis=2).astype(np.uint8))


def test_colours_are_torchvisions() -> None:
    """The same factors by torchvision's functions, one after the other, give the same pixels."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = gradient()
    for index in range(8):
        change = Changes(jitter=0.4, hue=0.3)
        found = change(image, generator(0, 0, index))
        own = change._own(generator(0, 0, index))
        change._moves(image.size, own)
        brightness, contrast, saturation, turn, _ = own.uniform(-1.0, 1.0, 5).tolist()
        want = functional.adjust_brightness(image, 1 + 0.4 * brightness)
        want = functional.adjust_contrast(want, 1 + 0.4 * contrast)
        want = functional.adjust_saturation(want, 1 + 0.4 * saturation)
        want = functional.adjust_hue(want, 0.3 * turn)
        assert np.array_equal(np.asarray(found), np.asarray(want)), index


@pytest.mark.parametrize("base", [None, Affine(), CropFlip((24, 24)), Torchvision("three", CropFlip((24, 24)))])
def test_points_move_as_the_pixels_do(base: object) -> None:
    """A bright dot is where `place` says: of rotations and mirror images, beside whatever other augmentation."""
    if isinstance(base, Torchvision):
        pytest.importorskip("torchvision")
    change = Changes(base, (24, 24), rotate=40.0, hflip=0.5, vflip=0.5)
    dot = np.zeros((60, 60, 3), np.uint8)
    dot[22:27, 33:38] = 255
    image, seen = Image.fromarray(dot), 0
    for index in range(20):
        if isinstance(base, Torchvision):  # whose colours would hide the dot
            change = dataclasses.replace(change, base=base.crop)
        pixels = np.asarray(change(image, generator(0, 0, index)).convert("L")).astype(float)
        place = change.place(image.size, generator(0, 0, index))
        x, y = affine.moved(place, np.array([[35.5, 24.5]]))[0]
        if not (3 < x < pixels.shape[1] - 3 and 3 < y < pixels.shape[0] - 3):
            continue
        down, across = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]] + 0.5
        middle = (across * pixels).sum() / pixels.sum(), (down * pixels).sum() / pixels.sum()
        assert abs(middle[0] - x) < 0.6, index
        assert abs(middle[1] - y) < 0.6, index
        seen += 1
    assert seen >= 8


def test_changes_come_as_often_as_said_and_nothing_by_default() -> None:
    image = gradient()
    assert np.array_equal(np.asarray(Changes()(image, generator(0, 0, 0))), np.asarray(image))
    mirrored = [np.asarray(Changes(hflip=0.25)(image, generator(0, 0, i))) for i in range(400)]
    share = np.mean([np.array_equal(one, np.asarray(image)[:, ::-1]) for one in mirrored])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5, "four deviations"
    down = Changes(vflip=1.0)(image, generator(0, 0, 0))
    assert np.array_equal(np.asarray(down), np.asarray(image)[::-1])
    grey = np.asarray(Changes(grey=1.0)(image, generator(0, 0, 0)))
    assert (grey == grey[..., :1]).all()
    assert Changes(Elastic(), rotate=5.0)(image.convert("L"), generator(0, 0, 0)).mode == "L"


def test_an_image_is_repeated_in_other_shapes_and_steps_stay_as_many() -> None:
    batches = EpochBatches(12, 4, seed=3, repeats=3)
    keys = [key for batch in batches for key in batch]
    assert len(keys) == 12 == len([key for batch in EpochBatches(12, 4, seed=3) for key in batch])
    assert [key[1] for key in keys] == [key[1] for key in keys[::3] for _ in range(3)]
    assert len({key[1] for key in keys}) == 4, "a third of the images in an epoch"
    assert len(set(keys)) == 12
    images = Images(open_source("digits").splits["train"], Preprocess((8, 8), in_chans=1), Affine(), 3)
    first, again = images[keys[0]][0], images[keys[1]][0]
    assert not torch.equal(first, again)
    assert torch.equal(first, images[keys[0]][0])
    ranks = [EpochBatches(12, 2, seed=3, rank=rank, world=2, repeats=3) for rank in range(2)]
    together = [sorted(first + second) for first, second in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in batches]


def test_colours_of_grey_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--hue and --grey change nothing of grey images"):
        train(dataclasses.replace(SMALL, hue=0.1, grey=0.5), out=tmp_path / "run")


# ---- losses ----


def test_binary_cross_entropy_is_deits() -> None:
    logits, labels = draw.randn(5, 7), torch.tensor([0, 1, 2, 3, 6])
    loss = get("classification").loss(logits, labels, 0.1, "bce")
    shares = F.one_hot(labels, 7) * 0.9 + 0.1 / 7
    want = F.binary_cross_entropy_with_logits(logits, shares, reduction="none").sum(dim=1).mean()
    assert loss.item() == about(want.item())
    soft = get("classification").loss(logits, F.one_hot(labels, 7).float(), 0.1, "bce")
    assert soft.item() == about(loss.item())
    for smoothing in (0.0, 0.2):
        hard = get("classification").loss(logits, labels, smoothing)
        assert get("classification").loss(logits, F.one_hot(labels, 7).float(), smoothing).item() == pytest.approx(
            hard.item()
        )


# ---- what learns, and how fast ----


def test_layer_decay_makes_lower_blocks_slower() -> None:
    model = vit.create("vit_digits", depth=3)
    optimizer = make_optimizer(model, 1.0, 0.05, 0.999, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert of["head.weight"] == of["norm.weight"] == 1.0
    assert of["blocks.2.attn.qkv.weight"] == 0.5
    assert of["blocks.0.norm1.bias"] == 0.125
    assert of["patch_embed.proj.weight"] == of["cls_token"] == 0.0625
    assert len(scale) == len(list(model.parameters()))


def test_a_probe_moves_the_head_alone(tmp_path: Path) -> None:
    result = train(dataclasses.replace(SMALL, freeze="backbone", ema=0.0, epochs=1), out=tmp_path / "run")
    kept = vit.create(weights=result.run).state_dict()
    torch.manual_seed(0)
    start = vit.create("vit_digits", num_classes=10, drop_path_rate=0.2, **SMALL.arch).state_dict()
    assert {name for name in kept if not torch.equal(kept[name], start[name])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["sgd", "lion", "lamb"])
def test_other_optimizers_go_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    """What LAMB counts is in its groups and not beside each parameter: without it the corrections begin anew."""
    if kind != "sgd":
        pytest.importorskip("timm")
    rate = {"sgd": 0.1, "lion": 3e-4, "lamb": 1e-2}[kind]
    config = dataclasses.replace(SMALL, optimizer=kind, lr=rate, beta2=0.99, ema=0.0, drop_path=0.0, repeats=2)
    whole = train(config, out=tmp_path / "whole")
    names = {
        name.rpartition(".")[2] for name in load_file(whole.run / "checkpoint.safetensors") if "optimizer." in name
    }
    averages = {"exp_avg"} if kind == "lion" else {"exp_avg", "exp_avg_sq"}
    assert names == ({"momentum_buffer"} if kind == "sgd" else averages)
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(5, terminate))
    same_bits(whole.run, train(resume=tmp_path / "run").run)


def test_a_head_begins_as_the_probe_of_its_features(tmp_path: Path) -> None:
    """With a learning rate of nothing the model answers as logistic regression on the features does."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = draw.fill(vit.create("vit_digits", depth=2, embed_dim=32, num_heads=2), 0.3)
    weights = tmp_path / "w.safetensors"
    save_file(model.state_dict(), weights)
    arch = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    config = dataclasses.replace(
        SMALL, arch=arch, weights=str(weights), head_init="probe", lr=0.0, ema=0.0, drop_path=0.0, epochs=1
    )
    result = train(config, out=tmp_path / "run")
    source = open_source("digits").divided(0.1, 0.2, 0)
    found = [features(model, source.splits[split], 64) for split in ("train", "test")]
    mean, spread = found[0].mean(axis=0, dtype=np.float64), found[0].std(axis=0, dtype=np.float64) + 1e-6
    want = linear_model.LogisticRegression(max_iter=1000).fit((found[0] - mean) / spread, source.splits["train"].labels)
    answers = want.predict((found[1] - mean) / spread)
    assert result.test.predictions.tolist() == answers.tolist()
    shown = Hook()
    drawn = {"data": "shapes", "model": "vit_tiny_patch16_224", "arch": arch | {"img_size": 32, "patch_size": 16}}
    train(dataclasses.replace(config, **drawn, weights=None), out=tmp_path / "other", display=shown)
    assert "--head-init probe is for one linear classifier: the head begins at random" in shown.lines


def test_the_cosine_ends_at_exactly_0() -> None:
    rates = [learning_rate(step, 100, 10, 1e-3, 0.0) for step in (0, 9, 10, 55, 100)]
    assert rates == [1e-4, 1e-3, 1e-3, pytest.approx(5e-4), 0.0]


# ---- early ends and guards ----


def test_patience_ends_a_training_that_stands_still(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, lr=0.0, epochs=9, patience=2, ema=0.0)
    hook = Hook()
    result = train(config, out=tmp_path / "run", display=hook)
    assert result.epochs == 3
    assert "ends after epoch 3: none of the last 2 was better" in hook.lines
    assert figures(result.run)[-1]["final"]
    assert train(resume=tmp_path / "run").epochs == 3


def test_a_step_with_a_sudden_loss_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = get("classification")
    plain, calls = type(task).loss, [0]

    def loss(self, *args):
        calls[0] += 1
        return plain(self, *args) * (100 if calls[0] == 22 else 1)

    monkeypatch.setattr(type(task), "loss", loss)
    hook = Hook()
    train(dataclasses.replace(SMALL, epochs=3, spike=5.0), out=tmp_path / "run", display=hook)
    left_out = [line for line in hook.lines if "left out" in line]
    assert len(left_out) == 1
    assert left_out[0].startswith("step 22: loss ")
    assert figures(tmp_path / "run")[2]["skipped_steps"] == 1
    assert 3 * STEPS > 22


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mixup": -0.1}, "--mixup is -0.1; allowed is 0.0 to 4.0"),
        ({"optimizer": "adam"}, "--optimizer is 'adam'; allowed are adamw, adamw8bit, sgd, lion, lamb"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"layer_decay": 1.5}, "--layer-decay is 1.5"),
        ({"erase": 2.0}, "--erase is 2.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TrainConfig(**options)
