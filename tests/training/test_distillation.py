"""Teachers, dropped patches and float16: what they compute, and that a training with them goes on to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import draw
import pytest
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from rounding import about, close
from safetensors.torch import load_file, save_file
from training_helpers import SMALL, Hook, figures, same_bits, terminate
from vit.preprocess import Preprocess
from vit.training import Interrupted, train
from vit.training.scale import GROWTH_STEPS, LossScale
from vit.training.state import Progress
from vit.training.teacher import Teacher, distillation_loss

DISTILLED = dataclasses.replace(
    SMALL,
    model="deit_tiny_distilled_patch16_224",
    arch={"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 8, "patch_size": 2, "in_chans": 1},
    patch_drop_rate=0.25,
)
HALF = dataclasses.replace(SMALL, backend="reference", amp="fp16", epochs=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(dataclasses.replace(SMALL, lr=5e-3), out=tmp_path_factory.mktemp("teacher") / "run").run


# ---- the loss ----


def test_the_loss_is_that_of_the_papers() -> None:
    student, teacher = draw.randn(6, 5), draw.randn(6, 5)
    hard = distillation_loss(student, teacher, "hard", 3.0)
    assert hard.item() == pytest.approx(F.cross_entropy(student, teacher.argmax(1)).item())
    p, q = (torch.softmax(x.double() / 3, dim=1) for x in (teacher, student))
    want = 9 * (p * (p.log() - q.log())).sum(dim=1).mean()
    assert distillation_loss(student, teacher, "soft", 3.0).item() == about(want.item())
    assert distillation_loss(teacher, teacher, "soft", 3.0).item() == 0.0


# ---- the teacher ----


class Watching(torch.nn.Module):
    """Keeps what it is shown."""

    def __init__(self, preprocess: Preprocess, names: tuple[str, ...] | None = None, classes: int = 3) -> None:
        super().__init__()
        self.preprocess, self.class_names, self.num_classes = preprocess, names, classes
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return torch.arange(self.num_classes).float().expand(len(images), -1)


def test_a_teacher_sees_the_image_as_it_was_trained_to() -> None:
    picture = Image.fromarray(draw.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    own = Preprocess((16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=1.0)
    mine = Preprocess((16, 16), crop_pct=1.0)
    model = Watching(own)
    Teacher(model, mine, list("abc"))(mine(picture)[None])
    close(model.seen[0], own(picture))

    grey = Preprocess((16, 16), in_chans=1, crop_pct=1.0)
    Teacher(model, grey, list("abc"))(grey(picture)[None])
    close(model.seen[0], own(picture.convert("L")))

    model = Watching(Preprocess((8, 8), in_chans=1, crop_pct=1.0))
    Teacher(model, mine, list("abc"))(mine(picture)[None])
    small = model.preprocess(picture.convert("L"))
    assert model.seen[0].shape == small.shape
    assert (model.seen[0] - small).abs().mean() < 0.05, "another bicubic, yet the same picture"


def test_a_teacher_is_asked_in_the_order_of_the_data() -> None:
    plain = Preprocess((8, 8), in_chans=1)
    images = torch.zeros(2, 1, 8, 8)
    assert Teacher(Watching(plain, ("c", "a", "b")), plain, list("abc"))(images)[0].tolist() == [1, 2, 0]
    assert Teacher(Watching(plain), plain, list("abc"))(images)[0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="does not know the class"):
        Teacher(Watching(plain, ("c", "a", "x")), plain, list("abc"))
    with pytest.raises(ValueError, match="the teacher has 3 classes, the data 2"):
        Teacher(Watching(plain), plain, list("ab"))


@pytest.mark.parametrize(
    ("source", "text"),
    [("nowhere.safetensors", "--teacher nowhere.safetensors: weights"), ("vit_digits", "hf-hub:timm/vit_digits")],
)
def test_a_teacher_that_is_not_there_is_named(source: str, text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(vit.weights.WeightsError, match=text):
        train(dataclasses.replace(SMALL, teacher=source), out=tmp_path / "run")


# ---- trainings ----


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_comes_closer_to_its_teacher(teacher: Path, tmp_path: Path, kind: str) -> None:
    """With a share of 1 the labels do not count: the loss is the distance from the teacher alone."""
    config = dataclasses.replace(
        SMALL, epochs=4, lr=5e-3, teacher=str(teacher), distill=kind, distill_alpha=1.0, label_smoothing=0.0, ema=0.0
    )
    lines = figures(train(config, out=tmp_path / "run").run)
    assert lines[3]["train_loss"] < 0.8 * lines[0]["train_loss"]


def test_distillation_goes_on_to_the_bit(teacher: Path, tmp_path: Path) -> None:
    """Two heads, dropped patches and mixed images beside each other."""
    config = dataclasses.replace(DISTILLED, teacher=str(teacher), distill="soft", mixup=0.5)
    whole = train(config, out=tmp_path / "whole").run
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(4, terminate))
    same_bits(whole, train(resume=tmp_path / "run").run)
    weights = load_file(whole / "best.safetensors")
    assert not torch.equal(weights["head.weight"], weights["head_dist.weight"])
    model = vit.create(weights=whole)
    assert model.options.patch_drop_rate == 0.25


def test_the_second_head_learns_from_the_teacher_alone(teacher: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(DISTILLED, teacher=str(teacher), distill_alpha=1.0, ema=0.0, epochs=1)
    found = load_file(train(config, out=tmp_path / "run").run / "best.safetensors")
    assert not found["head.bias"].any(), "no gradient has come to the first one"
    assert found["head_dist.bias"].any()


def test_another_teacher_is_refused_when_a_training_goes_on(teacher: Path, tmp_path: Path) -> None:
    weights = load_file(teacher / "best.safetensors")
    for name in ("config.yaml", "model.json", "best.safetensors"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((teacher / name).read_bytes())
    config = dataclasses.replace(SMALL, teacher=str(tmp_path / "copy"))
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(4, terminate))
    weights["head.bias"] += 1
    save_file(weights, tmp_path / "copy" / "best.safetensors")
    with pytest.raises(ValueError, match=r"its weights have changed since|best\.safetensors"):
        train(resume=tmp_path / "run")


# ---- patches ----


def test_dropped_patches_are_not_computed_and_all_are_seen_in_evaluation() -> None:
    model = vit.create("vit_digits", patch_drop_rate=0.5)
    tokens = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))
    model.train()(torch.zeros(2, 1, 8, 8))
    model.eval()(torch.zeros(2, 1, 8, 8))
    prefix = model.num_prefix_tokens
    assert [count - prefix for count in tokens] == [8, 16]


# ---- float16 ----


@pytest.mark.slow
def test_float16_goes_on_to_the_bit_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit.training.scale.GROWTH_STEPS", 3)
    whole = train(HALF, out=tmp_path / "whole").run
    with pytest.raises(Interrupted):
        train(HALF, out=tmp_path / "run", display=Hook(4, terminate))
    same_bits(whole, train(resume=tmp_path / "run").run)
    losses = {
        amp: figures(train(dataclasses.replace(HALF, amp=amp), out=tmp_path / amp).run)[0]["train_loss"]
        for amp in ("no", "bf16")
    }
    # The first epoch's loss is as near to float32's as bfloat16's, whose roundings are eight times as large.
    assert abs(figures(whole)[0]["train_loss"] - losses["no"]) <= abs(losses["bf16"] - losses["no"])


def test_the_scale_halves_at_an_overflow_and_grows_again() -> None:
    progress = Progress(loss_scale=4.0)
    scale = LossScale(progress, True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([8.0, 2.0])
    scale.unscale([parameter, torch.nn.Parameter(torch.zeros(1))])
    assert parameter.grad.tolist() == [2.0, 0.5]
    assert scale.update(False)
    assert progress.loss_scale == 2.0
    for _ in range(GROWTH_STEPS):
        assert not scale.update(True)
    assert (progress.loss_scale, progress.scaled_steps) == (4.0, 0)
    progress.loss_scale = 1.0
    assert not scale.update(False), "no smaller scale helps: the step is a bad one"
    off = LossScale(Progress(), False)
    assert off.factor == 1.0
    assert not off.update(False)


def test_an_overflow_leaves_the_step_out_and_is_no_bad_step(tmp_path: Path) -> None:
    """A scale far too large at first: it is halved until the gradients fit, and nothing but these steps is lost."""
    hook = Hook()
    from vit.training import step

    plain = step.Stepper.__init__

    def start(self, parts, progress, *others):
        plain(self, parts, progress, *others)
        progress.loss_scale = 2.0**32

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Stepper, "__init__", start)
        train(dataclasses.replace(HALF, epochs=3), out=tmp_path / "run", display=hook)
    told = [line for line in hook.lines if "float16 overflowed" in line]
    assert len(told) > 10, "more than the ten bad steps after which a training gives up"
    assert told[0].startswith("step 1: float16 overflowed: loss scale 2.14748e+09")
    assert sum(line.get("skipped_steps", 0) for line in figures(tmp_path / "run")) == len(told)
    assert figures(tmp_path / "run")[2]["skipped_steps"] == 0


def test_a_backend_without_float16_is_refused_by_name(tmp_path: Path) -> None:
    from vit.training.scale import check_fp16

    check_fp16({"linear": "reference"})
    with pytest.raises(ValueError, match="--amp fp16: the cpu backend has no float16, only float32, float64, bfloat16"):
        check_fp16({"linear": "cpu", "gelu": "reference"})
    if vit.backends()["cpu"]["available"]:
        with pytest.raises(ValueError, match="the cpu backend has no float16"):
            train(dataclasses.replace(HALF, backend="cpu"), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
