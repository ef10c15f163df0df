"""The training loop: what a run leaves behind, that it repeats and resumes to the bit, and that nothing gets lost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import draw
import numpy as np
import pytest
import torch
import vit
from PIL import Image
from rounding import about, close
from safetensors.torch import load_file, save_file
from torch import nn
from training_helpers import STEPS, Hook, figures, full_disk, same_bits, terminate
from vit.backends import get
from vit.data import Source
from vit.support.files import append_line, replacing, write_text
from vit.training import Evaluation, Interrupted, Run, TrainConfig, TrainError, TrainResult, evaluate, train
from vit.training import state as checkpoints
from vit.training.config import RECIPES, from_mapping, read_yaml
from vit.training.optim import Average, learning_rate, make_optimizer
from vit.training.run import new_folder, new_path
from vit.viz import confusion

# From Python 3.12 on a fork beside other threads warns; PyTorch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

CPU = vit.backends()["cpu"]["available"]

SMALL = TrainConfig(
    arch={"embed_dim": 16, "depth": 2, "num_heads": 2},
    epochs=2,
    batch_size=128,
    drop_path=0.2,  # so that the model's own random numbers matter for resuming
    warmup_epochs=1.0,
    checkpoint_seconds=1e9,
)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A short training that nothing interrupted."""
    return train(SMALL, out=tmp_path_factory.mktemp("whole") / "run")


# ---- the run folder ----


def test_a_run_holds_everything(whole: TrainResult) -> None:
    names = {path.name for path in whole.run.iterdir()}
    assert names == {
        "config.yaml",
        "model.json",
        "run.json",
        "best.safetensors",
        "last.safetensors",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "curves.png",
        "phases.png",
        "calibration.png",
        "confusion.png",
    }
    for name in ("curves.png", "confusion.png"):
        with Image.open(whole.run / name) as picture:
            assert picture.size[0] > 300
    model = json.loads((whole.run / "model.json").read_text())
    assert model["class_names"] == list("0123456789")
    assert model["name"] == "vit_digits"
    assert model["arch"]["embed_dim"] == 16
    assert model["preprocess"]["in_chans"] == 1
    assert Run.open(whole.run).config == SMALL.resolved("digits")
    epochs, final = figures(whole.run)[:-1], figures(whole.run)[-1]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert [line["step"] for line in epochs] == [STEPS, 2 * STEPS]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert final["best_epoch"] == max(epochs, key=lambda line: (line["val_accuracy"], -line["val_loss"]))["epoch"]
    assert final["test_images"] == 359


def test_evaluation_repeats_the_logged_figures_to_the_bit(whole: TrainResult) -> None:
    final = figures(whole.run)[-1]
    result = Run.open(whole.run).evaluate()
    assert (result.accuracy, result.loss, result.images) == (final["test_accuracy"], final["test_loss"], 359)
    assert result.accuracy == whole.test.accuracy
    best = figures(whole.run)[final["best_epoch"] - 1]
    assert Run.open(whole.run).evaluate("val").accuracy == best["val_accuracy"]
    assert Run.open(whole.run).evaluate("val").loss == best["val_loss"]


def test_the_splits_are_what_they_are_called(whole: TrainResult) -> None:
    sizes = {split: Run.open(whole.run).evaluate(split).images for split in ("train", "val", "test", "all")}
    assert sizes == {"train": 1259, "val": 179, "test": 359, "all": 1797}


def test_the_batch_size_of_an_evaluation_does_not_matter(whole: TrainResult) -> None:
    results = [Run.open(whole.run).evaluate(batch_size=size) for size in (359, 50, 1)]
    if whole.backend == "cpu":  # PyTorch's own matmul, under the reference, may differ in the last bits
        assert len({result.loss for result in results}) == 1
    for result in results[1:]:
        assert result.loss == about(results[0].loss, 8)
        assert torch.equal(result.labels, results[0].labels)


def test_create_rebuilds_the_kept_model(whole: TrainResult) -> None:
    model = vit.create(weights=whole.run, training=False)
    assert model.name == "vit_digits"
    samples = Run.open(whole.run).samples("test", None)
    images = torch.stack([model.preprocess(samples.image(i)) for i in range(len(samples))])
    predictions = model(images).argmax(dim=1)
    assert (predictions == whole.test.predictions).float().mean() > 0.99


def test_two_runs_are_bit_identical(whole: TrainResult, tmp_path: Path) -> None:
    again = train(SMALL, out=tmp_path / "again")
    same_bits(whole.run, again.run)


def test_another_seed_gives_another_run(whole: TrainResult, tmp_path: Path) -> None:
    other = train(dataclasses.replace(SMALL, seed=1, epochs=1), out=tmp_path / "other")
    assert figures(other.run)[0]["train_loss"] != figures(whole.run)[0]["train_loss"]


def test_an_existing_folder_is_never_overwritten(whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exists already; go on with it \(vit train --resume"):
        train(SMALL, out=whole.run)
    (tmp_path / "empty").mkdir()
    assert new_path(tmp_path / "empty", "digits") == tmp_path / "empty"


def test_the_default_folder_is_the_next_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-1").mkdir(parents=True)
    assert new_path(None, "digits") == Path("runs/digits-2")


def test_trainings_that_start_together_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(None, "digits"), range(32)))
    assert len(set(made)) == 32
    assert all(path.is_dir() for path in made)


def test_a_training_asks_only_the_backends_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vit.backends() would load and compile every other one at each checkpoint."""
    monkeypatch.setattr(vit, "backends", crash)
    monkeypatch.setattr(get("sycl"), "info", crash)
    monkeypatch.setattr(Source, "fingerprint", lambda self: next(digests))
    digests = iter(["once"])
    train(dataclasses.replace(SMALL, epochs=1, checkpoint_seconds=0.0), out=tmp_path / "run")


def test_a_refused_training_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'vit_digit'; nearest: vit_digits"):
        train(dataclasses.replace(SMALL, model="vit_digit"), out=tmp_path / "run")
    config = dataclasses.replace(SMALL, backend="cpu", arch={"attn_drop_rate": 0.1})
    with pytest.raises(vit.BackendError, match="attention dropout" if CPU else "not built"):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- resuming ----


@pytest.mark.parametrize("at", [1, 4, STEPS, STEPS + 3, 2 * STEPS], ids=lambda at: f"step{at}")
def test_a_signal_stops_and_resuming_is_bit_identical(whole: TrainResult, tmp_path: Path, at: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"go on with: vit train --resume .*run"):
        train(SMALL, out=tmp_path / "run", display=Hook(at, terminate))
    assert signal.getsignal(signal.SIGTERM) == before
    hook = Hook()
    result = train(resume=tmp_path / "run", display=hook)
    assert hook.steps == 2 * STEPS - at
    assert not any("resumed elsewhere" in line for line in hook.lines)
    assert result.test.loss == whole.test.loss
    same_bits(whole.run, result.run)


def test_a_signal_during_the_validation(whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Evaluation:
        terminate()
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("vit.training.loop.evaluate", interrupted)
    with pytest.raises(Interrupted, match=f"after step {STEPS}/{STEPS} of epoch 1"):
        train(SMALL, out=tmp_path / "run")
    monkeypatch.undo()
    assert figures(tmp_path / "run") == []
    same_bits(whole.run, train(resume=tmp_path / "run").run)


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def impatient() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher's copy of the same Ctrl-C
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(SMALL, out=tmp_path / "run", display=Hook(2, impatient))


def test_a_crash_costs_only_the_steps_since_the_checkpoint(whole: TrainResult, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, checkpoint_seconds=0.0)
    with pytest.raises(Crash):
        train(config, out=tmp_path / "run", display=Hook(13, crash))
    hook = Hook()
    result = train(resume=tmp_path / "run", display=hook)
    assert hook.steps == 2 * STEPS - 13, "the error itself left a checkpoint of step 13"
    same_bits(whole.run, result.run)


def test_resuming_twice_and_after_the_end(whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "run", display=Hook(3, terminate))
    with pytest.raises(Interrupted):
        train(resume=tmp_path / "run", display=Hook(10, terminate))
    train(resume=tmp_path / "run")
    same_bits(whole.run, tmp_path / "run")
    hook = Hook()
    assert train(resume=tmp_path / "run", display=hook).test.loss == whole.test.loss
    assert hook.steps == 0
    same_bits(whole.run, tmp_path / "run")


def test_a_killed_process_is_resumed_bit_identically(whole: TrainResult, tmp_path: Path) -> None:
    """SIGKILL at no particular moment, while every step writes a checkpoint; then the run goes on as if nothing was."""
    config = dataclasses.replace(SMALL, checkpoint_seconds=0.0)
    write_text(tmp_path / "recipe.yaml", config.to_yaml())
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vit", "train", "--config", str(tmp_path / "recipe.yaml"), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    result = train(resume=run)
    same_bits(whole.run, result.run)
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")], "leftovers are reused"


def test_resuming_does_not_need_the_weights_it_started_from(whole: TrainResult, tmp_path: Path) -> None:
    weights = tmp_path / "start.safetensors"
    weights.write_bytes((whole.run / "best.safetensors").read_bytes())
    config = dataclasses.replace(SMALL, weights=str(weights))
    first = train(config, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(3, terminate))
    weights.unlink()
    same_bits(first.run, train(resume=tmp_path / "run").run)


def test_resuming_with_workers_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    folder = coloured_folders(tmp_path / "data", 40)
    config = dataclasses.replace(FOLDER, data=str(folder), workers=2)
    first = train(config, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "run", display=Hook(3, terminate))
    train(resume=tmp_path / "run")
    same_bits(first.run, tmp_path / "run")


def test_a_training_with_workers_ends(tmp_path: Path) -> None:
    """The process, too: whoever reads images must be gone when the interpreter exits."""
    words = ["--arch", "embed_dim=16", "depth=1", "num_heads=2", "--epochs", "1", "--workers", "2"]
    command = [sys.executable, "-m", "vit", "train", *words, "--out", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_changed_data_are_refused(tmp_path: Path) -> None:
    folder = coloured_folders(tmp_path / "data", 40)
    with pytest.raises(Interrupted):
        train(dataclasses.replace(FOLDER, data=str(folder)), out=tmp_path / "run", display=Hook(1, terminate))
    next((folder / "red").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"is not the data .* was trained on: images, labels or classes"):
        train(resume=tmp_path / "run")


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        train(SMALL, out=tmp_path / "run", display=Hook(1, terminate))
    hook = Hook()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train(resume=tmp_path / "run", display=hook)
    assert any("the last bits may differ: threads 1 -> 7" in line for line in hook.lines)


def test_the_number_of_threads_is_put_back(whole: TrainResult) -> None:
    assert Run.open(whole.run).config.threads == 1
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Run.open(whole.run).evaluate()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_resumed_is_refused(whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder: no such folder"):
        train(resume=tmp_path / "none")
    with pytest.raises(ValueError, match=r"not a run folder of vit train: it has no config\.yaml"):
        train(resume=tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "model.json", "metrics.jsonl"):
        (run / name).write_bytes((whole.run / name).read_bytes())
    with pytest.raises(ValueError, match=r"there is no checkpoint\.safetensors"):
        train(resume=run)
    (run / "checkpoint.safetensors").write_bytes((whole.run / "checkpoint.safetensors").read_bytes())
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing or shorter than"):
        train(resume=run)
    with pytest.raises(ValueError, match=r"has no best\.safetensors yet: no epoch was finished"):
        Run.open(run).evaluate()
    good = (whole.run / "checkpoint.safetensors").read_bytes()
    save_file({"model.x": torch.zeros(1)}, run / "checkpoint.safetensors", metadata={"vit": "{}"})
    with pytest.raises(ValueError, match="has format None; this version of vit reads 2"):
        train(resume=run)
    for damaged in (good[:1000], b"", pickle.dumps({"model": 1}), b"\xff" * 100):
        (run / "checkpoint.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a checkpoint of vit train, or damaged"):
            train(resume=run)
    (run / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is damaged"):
        train(resume=run)


# ---- files ----


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    model = vit.create("vit_digits", backend="reference")
    optimizer = make_optimizer(model, 1e-3, 0.05, 0.999)
    path = tmp_path / "checkpoint.safetensors"
    tensors = checkpoints.collect(model, None, optimizer)
    checkpoints.save(path, checkpoints.Progress(epoch=3), {}, tensors)
    before = path.read_bytes()
    for size in (0, 1000, len(before) - 1):
        with full_disk(size), pytest.raises(OSError, match="The file before this one is unchanged"):
            checkpoints.save(path, checkpoints.Progress(epoch=4), {}, tensors)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert checkpoints.load(path)[0].epoch == 3


def test_a_training_on_a_full_disk_can_be_resumed(whole: TrainResult, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, checkpoint_seconds=0.0)
    with contextlib.ExitStack() as disk, pytest.raises(OSError, match=r"cannot write .*checkpoint\.safetensors"):
        train(config, out=tmp_path / "run", display=Hook(6, lambda: disk.enter_context(full_disk(20_000))))
    same_bits(whole.run, train(resume=tmp_path / "run").run)


def test_a_full_disk_leaves_the_weights_before_them(tmp_path: Path) -> None:
    run = Run.create(tmp_path, SMALL, {})
    run.save_weights({"x": torch.zeros(1000)})
    with (
        full_disk(2000),
        pytest.raises(OSError, match=r"cannot write .*best\.safetensors: .*The file before this one is unchanged"),
    ):
        run.save_weights({"x": torch.ones(1000)})
    assert not load_file(run.weights)["x"].any()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            crash()

    with pytest.raises(Crash):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint = tmp_path / "checkpoint.safetensors"
        model = vit.create("vit_digits", backend="reference")
        tensors = checkpoints.collect(model, None, make_optimizer(model, 1, 0, 0.9))
        checkpoints.save(checkpoint, checkpoints.Progress(), {}, tensors)
        assert checkpoint.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_lines_behind_the_offset_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    end = append_line(path, "one", 0)
    append_line(path, "a line after the last checkpoint", end)
    assert append_line(path, "two", end) == 8
    assert path.read_text() == "one\ntwo\n"


# ---- the arithmetic of a step ----


def test_learning_rate_at_its_corners() -> None:
    rates = [learning_rate(step, 110, 10, 1.0, 0.1) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert learning_rate(110, 110, 10, 1.0, 0.1) == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 5, 0, 1.0, 0.0) == 1.0
    assert learning_rate(3, 3, 3, 1.0, 0.0) == 1.0, "a warm-up as long as the training"


def test_biases_norms_and_tokens_are_not_decayed() -> None:
    model = vit.create("vit_mnist_demo", backend="reference")
    decayed, plain = make_optimizer(model, 1e-3, 0.05, 0.999).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        name for name in names.values() if name.endswith("weight") and "norm" not in name
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {"cls_token", "pos_embed"} < {names[id(p)] for p in plain["params"]}


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(draw.randn_like(model.weight))
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    close(average.model.weight, expected)
    assert not average.model.weight.requires_grad


def test_without_an_average_the_weights_themselves_are_kept(tmp_path: Path) -> None:
    result = train(dataclasses.replace(SMALL, ema=0.0, epochs=1), out=tmp_path / "run")
    state = load_file(result.run / "checkpoint.safetensors")
    kept = load_file(result.run / "best.safetensors")
    assert not [name for name in state if name.startswith("average.")]
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in kept.items())


def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    plain = dataclasses.replace(SMALL, epochs=1, drop_path=0.0, lr=1e-4)
    large = train(plain, out=tmp_path / "large")
    small = train(dataclasses.replace(plain, batch_size=32, accumulate=4), out=tmp_path / "small")
    ours, theirs = figures(small.run)[0], figures(large.run)[0]
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["train_loss"] == about(theirs["train_loss"], 16)
    assert ours["grad_norm"] == about(theirs["grad_norm"], 16)
    assert ours["val_loss"] == about(theirs["val_loss"], 16)


def test_bfloat16_trains(tmp_path: Path) -> None:
    result = train(dataclasses.replace(SMALL, amp="bf16", epochs=1), out=tmp_path / "run")
    assert figures(result.run)[0]["train_loss"] < 2.4
    assert all(tensor.dtype == torch.float32 for tensor in load_file(result.run / "best.safetensors").values())


def test_gradients_that_stay_not_finite_stop_the_training(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, lr=1e30, clip=0.0, warmup_epochs=0.0)
    hook = Hook()
    with pytest.raises(TrainError, match=r"10 steps in a row .* not finite in the gradient of cls_token.* --lr"):
        train(config, out=tmp_path / "run", display=hook)
    assert sum("step left out" in line for line in hook.lines) >= 10
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "best.safetensors").values())


def test_a_single_bad_step_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.cross_entropy
    calls = 0

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs) * (math.nan if calls == 5 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spoiled)
    result = train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "run")
    line = figures(result.run)[0]
    assert line["skipped_steps"] == 1
    assert math.isfinite(line["train_loss"])


# ---- other data ----

FOLDER = TrainConfig(
    model="vit_digits",
    arch={"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 1, "num_heads": 2},
    epochs=2,
    batch_size=16,
    augment="crop",
    warmup_epochs=0.0,
    lr=5e-3,
    val_fraction=0.2,
    checkpoint_seconds=1e9,
)


def coloured_folders(root: Path, count: int) -> Path:
    """Two classes that a look at the colour tells apart."""
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("green", 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (18, 22, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def test_class_folders_are_learned(tmp_path: Path) -> None:
    folder = coloured_folders(tmp_path / "data", 60)
    (folder / "red" / "broken.png").write_bytes(b"nothing")
    hook = Hook()
    config = dataclasses.replace(FOLDER, data=str(folder), epochs=8)
    result = train(config, out=tmp_path / "run", display=hook)
    assert result.test.accuracy == 1.0
    assert any(r"skipped 1 unusable file: red/broken.png (not an image" in line for line in hook.lines)
    with pytest.raises(ValueError, match="1 unusable file"):
        train(dataclasses.replace(config, bad_images="refuse"), out=tmp_path / "refused")
    other = coloured_folders(tmp_path / "other", 5)
    assert Run.open(result.run).evaluate(data=str(other)).images == 10, "other data are evaluated as a whole"
    for name in ("red", "green"):
        shutil.copytree(other / name, tmp_path / "untested" / "train" / name)
        (tmp_path / "untested" / "test" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the test split of .*untested holds no usable image"):
        Run.open(result.run).evaluate("test", data=str(tmp_path / "untested"))
    (other / "red").rename(other / "blue")
    with pytest.raises(ValueError, match=r"blue is not a class of .*; its classes are \['green', 'red'\]"):
        Run.open(result.run).evaluate(data=str(other))


def test_class_names_are_no_formulas(tmp_path: Path) -> None:
    """matplotlib reads what stands between dollar signs as TeX, and fails on what is none."""
    labels = torch.tensor([0, 1, 1])
    confusion(labels, labels, ["$_$", r"5$ \frac$"], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size[0] > 300


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    folder = coloured_folders(tmp_path / "data", 10)
    with pytest.raises(ValueError, match=r"12 training images do not fill one optimizer step of 16 images"):
        train(dataclasses.replace(FOLDER, data=str(folder)), out=tmp_path / "run")


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes=7, but digits has 10 classes; leave it out"):
        train(dataclasses.replace(SMALL, arch={"num_classes": 7}), out=tmp_path / "run")


def test_weights_bring_their_own_sizes_and_preprocessing(whole: TrainResult, tmp_path: Path) -> None:
    """The new run is one that can be loaded and resumed, though its options name neither."""
    start = tmp_path / "start"
    shutil.copytree(whole.run, start)
    info = json.loads((start / "model.json").read_text())
    info["preprocess"] |= {"mean": [0.4], "std": [0.3]}
    (start / "model.json").write_text(json.dumps(info))
    config = dataclasses.replace(SMALL, arch={}, weights=str(start))
    done = train(config, out=tmp_path / "done")
    model = vit.create(weights=done.run)
    assert (model.embed_dim, len(model.blocks), model.preprocess.mean) == (16, 2, (0.4,))
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "resumed", display=Hook(STEPS + 2, terminate))
    shutil.rmtree(start)
    train(resume=tmp_path / "resumed")
    same_bits(tmp_path / "resumed", done.run)


def test_training_starts_from_given_weights(whole: TrainResult, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, weights=str(whole.run), lr=0.0, min_lr=0.0, ema=0.0, epochs=1)
    result = train(config, out=tmp_path / "run")
    start, end = load_file(whole.run / "best.safetensors"), load_file(result.run / "best.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start if not name.startswith("head."))


# ---- the configuration ----


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epoch": 3}, "unknown option 'epoch' in file.yaml; did you mean epochs?"),
        ({"zzz": 3}, "unknown option 'zzz' in file.yaml; known are data, model, arch"),
        ({"epochs": "many"}, "epochs in file.yaml is 'many'; it must be a int"),
        ({"epochs": 1.5}, "epochs in file.yaml is 1.5; it must be a int"),
        ({"epochs": True}, "epochs in file.yaml is True; it must be a int"),
        ({"lr": [1]}, r"lr in file.yaml is \[1\]; it must be a float"),
        ({"arch": [1]}, "arch in file.yaml must be a mapping"),
        ({"model": 3}, "model in file.yaml is 3; it must be a str"),
        ({"epochs": 0}, "--epochs is 0; allowed is any number from 1"),
        ({"lr": float("nan")}, "--lr is nan; allowed"),
        ({"lr": math.inf}, "--lr is inf; allowed is any number from 0.0"),
        ({"warmup_epochs": "inf"}, "--warmup-epochs is inf; allowed"),
        ({"drop_path": 1.5}, "--drop-path is 1.5; allowed"),
        ({"augment": "mirror"}, "--augment is 'mirror'; allowed are none, affine, elastic, crop"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave no training image"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("?", r"\?")):
        from_mapping(values, "file.yaml")


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    config = from_mapping({"lr": "1e-3", "warmup-epochs": 2, "seed": 3.0, "model": None}, "file.yaml")
    assert (config.lr, config.warmup_epochs, config.seed, config.model) == (1e-3, 2.0, 3, None)


def test_an_unquoted_no_of_a_yaml_file_is_no(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("amp: no\nepochs: 3\n")
    assert from_mapping(read_yaml(tmp_path / "recipe.yaml"), "recipe.yaml") == TrainConfig(amp="no", epochs=3)


def test_recipes_fill_only_what_is_open() -> None:
    assert all(getattr(TrainConfig().resolved(kind), name) is not None for kind in RECIPES for name in RECIPES[kind])
    assert TrainConfig(epochs=7).resolved("mnist").epochs == 7
    assert TrainConfig().resolved("mnist").model == "vit_mnist_demo"


# ---- several processes, and the promise of the README ----


def two_processes(*words: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vit", "train"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launch, *words, "--json"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """The standard output of a process that must succeed."""
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    return output


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, drop_path=0.0, lr=1e-4)
    single = train(config, out=tmp_path / "single")
    recipe, pair = tmp_path / "recipe.yaml", tmp_path / "pair"
    write_text(recipe, dataclasses.replace(config, batch_size=64).to_yaml())
    output = finish(two_processes("--config", str(recipe), "--out", str(pair)))
    assert len([line for line in output.splitlines() if line.startswith("{")]) == 1, "one process speaks"
    for ours, theirs in zip(figures(pair)[:-1], figures(single.run)[:-1], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)  # 18 steps of sums in another order
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)  # 18 steps of sums in another order
        assert abs(ours["val_accuracy"] - theirs["val_accuracy"]) <= 3 / 179  # images whose two best are close


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    recipe, whole, run = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "run"
    write_text(recipe, dataclasses.replace(SMALL, batch_size=64, epochs=8).to_yaml())
    finish(two_processes("--config", str(recipe), "--out", str(whole)))
    process = two_processes("--config", str(recipe), "--out", str(run))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert checkpoints.load(run / "checkpoint.safetensors")[0].epoch < 8, "stopped before the end"
    finish(two_processes("--resume", str(run)))
    same_bits(whole, run)


@pytest.mark.slow
def test_the_default_recipe_reads_98_of_100_digits(tmp_path: Path) -> None:
    began = time.process_time()
    result = train(TrainConfig(), out=tmp_path / "run")
    assert isinstance(result.test, Evaluation)
    assert result.test.accuracy >= 0.98
    assert time.process_time() - began < 180, "seconds of the processor: those of the clock depend on its other work"
