"""Going on: what may change, what is refused, what a damaged file says, and that no moment of a stop is a dead end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import draw
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training_helpers import SMALL, STEPS, Hook, figures, same_bits, terminate, vit_process, wait_for
from vit.cli import main
from vit.support.files import is_leftover
from vit.support.tensors import KEY, DamagedFile, read_tensors, write_tensors
from vit.training import Interrupted, RefusedChange, Run, TrainError, TrainResult, train
from vit.training import state as states
from vit.training.resume import FREE
from vit.training.run import is_free

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A short training that nothing interrupted."""
    return train(SMALL, out=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        train(SMALL, out=run, display=Hook(STEPS + 3, terminate))
    return run


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped in its second epoch."""
    shutil.copytree(stopped_once, tmp_path / "run")
    return tmp_path / "run"


# ---- no dead ends ----


def test_the_first_step_leaves_a_checkpoint(tmp_path: Path) -> None:
    seen: list[bool] = []
    look = Hook(2, lambda: seen.append((tmp_path / "run" / "checkpoint.safetensors").is_file()))
    train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "run", display=look)
    assert seen == [True]


def test_resume_auto_starts_and_goes_on(whole: TrainResult, tmp_path: Path) -> None:
    """One command for a batch system that starts a job again until it ends."""
    out = tmp_path / "run"
    options = dataclasses.replace(SMALL)
    for at in (2, STEPS):
        with pytest.raises(Interrupted):
            train(options, out=out, resume="auto", display=Hook(at, terminate))
    train(options, out=out, resume="auto")
    same_bits(whole.run, out)
    hook = Hook()
    train(options, out=out, resume="auto", display=hook)
    assert hook.steps == 0, "it was finished"
    with pytest.raises(ValueError, match="--resume auto needs --out"):
        train(options, resume="auto")


def test_a_kill_before_the_first_step_is_no_dead_end(whole: TrainResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Run.create(run, whole_config(whole), Run.open(whole.run).model)
    train(resume=run)
    same_bits(whole.run, run)


def test_each_state_that_a_killed_start_leaves_is_free_or_a_run(whole: TrainResult, tmp_path: Path) -> None:
    """SIGKILL at each file operation between the lock and the end of Run.create, in a fork: what is left takes a new
    run, or is one that has not started. config.yaml without model.json was neither."""
    config, model = whole_config(whole), Run.open(whole.run).model
    found, code, at = set(), 1, 0
    while code:
        at, run = at + 1, tmp_path / f"run-{at}"
        run.mkdir()
        if not (child := os.fork()):
            _killed_at(at, run)
            held = Run(run, config, model).lock()
            Run.create(run, config, model)
            os._exit(held.descriptor < 0)
        code = os.waitpid(child, 0)[1]
        files = frozenset(entry.name for entry in run.iterdir() if not is_leftover(entry))
        if is_free(run):
            way_out = f".*vit train --out {re.escape(str(run))} starts one there" if ".lock" in files else "$"
            with pytest.raises(ValueError, match=f"it has no config.yaml{way_out}"):
                Run.open(run)
        else:
            assert Run.open(run).is_unstarted(), files
        found.add(files)
    assert {frozenset(), frozenset([".lock"]), frozenset([".lock", "model.json"])} < found
    assert frozenset([".lock", "model.json", "metrics.jsonl", "config.yaml"]) in found


def _killed_at(number: int, folder: Path) -> None:
    """Kills this process in front of its so manieth file operation in the folder."""
    done = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and str(folder) in str(arguments[0]) and next(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("left", ["model.json", "config.yaml"], ids=["this version", "earlier versions"])
@pytest.mark.parametrize("words", [[], ["--resume", "auto"]])
def test_a_run_starts_where_a_start_was_killed(whole: TrainResult, tmp_path: Path, left: str, words: list[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_text('{"pid": 4194305, "host": "gone"}')
    shutil.copy(whole.run / left, out)
    with pytest.raises(ValueError, match=f"vit train --out {out} starts one there"):
        Run.open(out)
    assert main(["train", "--config", str(whole.run / "config.yaml"), "--out", str(out), *words]) == 0
    same_bits(whole.run, out)


def test_files_of_the_user_are_not_those_of_a_killed_start(whole: TrainResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole.run / "config.yaml", out)
    assert not is_free(out), "nothing has locked it"
    (out / ".lock").touch()
    (out / "notes.txt").touch()
    assert not is_free(out)
    (out / "notes.txt").unlink()
    shutil.copy(whole.run / "metrics.jsonl", out)
    assert not is_free(out), "there are figures"


@pytest.mark.parametrize("words", [["--resume", "auto", "--out"], ["--resume"]], ids=["auto", "by name"])
def test_a_run_without_a_step_takes_every_option(whole: TrainResult, tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "run"
    Run.create(out, dataclasses.replace(whole_config(whole), lr=0.123, seed=5), Run.open(whole.run).model)
    lr, seed = (str(getattr(whole_config(whole), name)) for name in ("lr", "seed"))
    config = ["--config", str(whole.run / "config.yaml")] if "auto" in words else []
    assert main(["train", *config, *words, str(out), "--lr", lr, "--seed", seed]) == 0
    same_bits(whole.run, out)


def whole_config(whole: TrainResult) -> Any:
    return Run.open(whole.run).config


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_a_kill_in_the_first_seconds_goes_on(whole: TrainResult, tmp_path: Path, delay: float) -> None:
    out = tmp_path / "run"
    words = ["train", "--config", str(whole.run / "config.yaml"), "--out", str(out), "--resume", "auto"]
    process = vit_process(*words)
    wait_for(lambda: (out / "model.json").exists(), process)
    try:
        process.wait(delay or 0.001)
    except Exception:
        process.kill()
    process.communicate()
    assert main(words) == 0
    same_bits(whole.run, out)


def test_an_error_leaves_a_checkpoint_of_the_last_whole_step(
    whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one in the middle of an optimizer step: that step is not in it."""
    original, calls = torch.optim.AdamW.step, []

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == STEPS + 4:
            self.param_groups[0]["params"][0].data.zero_()
            raise MemoryError("no memory")
        return original(self, *args, **kwargs)

    config = dataclasses.replace(SMALL, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fails)
        with pytest.raises(MemoryError):
            train(config, out=tmp_path / "run")
    train(resume=tmp_path / "run")
    same_bits(whole.run, tmp_path / "run")


def test_a_training_that_diverges_at_once_promises_no_weights(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, lr=1e30, clip=0.0, warmup_epochs=0.0, batch_size=32)
    with pytest.raises(TrainError, match=r"No epoch was finished$"):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_checkpoints_take_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes long is written less often."""
    clock, written = [0.0], []
    monkeypatch.setattr("vit.training.loop.time.monotonic", lambda: clock[0])

    def slow(*args: Any) -> None:
        written.append(clock[0])
        clock[0] += 10.0

    monkeypatch.setattr(states, "save", slow)
    hook = Hook()
    hook.step = lambda text: clock.__setitem__(0, clock[0] + 50.0)  # type: ignore[method-assign]
    train(dataclasses.replace(SMALL, checkpoint_seconds=60.0), out=tmp_path / "run", display=hook)
    gaps = [b - a for a, b in itertools.pairwise(written[:-1])]
    assert len(written) >= 4
    assert all(gap >= 200.0 for gap in gaps)


# ---- what may change ----


def test_options_that_change_nothing_done_are_taken(whole: TrainResult, stopped: Path) -> None:
    hook = Hook()
    train(resume=stopped, changes={"workers": 1, "threads": 2, "checkpoint_seconds": 5.0, "lr": 2e-3}, display=hook)
    same_bits(whole.run, stopped)
    assert any("--workers 0 -> 1" in line for line in hook.lines)
    config = Run.open(stopped).config
    assert (config.workers, config.threads, config.checkpoint_seconds, config.lr) == (1, 2, 5.0, 2e-3)
    sessions = json.loads((stopped / "run.json").read_text())["sessions"]
    assert [session["outcome"].partition(":")[0] for session in sessions] == ["Interrupted", "finished"]


def test_more_epochs_follow_the_longer_schedule(whole: TrainResult, tmp_path: Path) -> None:
    """What is done stays; the steps to come have the rates of a training of the new length, also after another stop."""
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        shutil.copytree(whole.run, run)
    hook = Hook()
    train(resume=runs[0], changes={"epochs": 4}, display=hook)
    assert any("--epochs 2 -> 4; the steps to come follow the learning rates" in line for line in hook.lines)
    lines = [line for line in figures(runs[0]) if "epoch" in line]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == [line for line in figures(whole.run) if "epoch" in line]
    long = train(dataclasses.replace(SMALL, epochs=4), out=tmp_path / "long")
    assert [line["lr"] for line in lines[2:]] == [line["lr"] for line in figures(long.run)[2:4]]
    with pytest.raises(Interrupted):
        train(resume=runs[1], changes={"epochs": 4}, display=Hook(STEPS + 1, terminate))
    train(resume=runs[1])
    same_bits(*runs)
    with pytest.raises(RefusedChange, match="has done 4 epochs, more than --epochs 3"):
        train(resume=runs[0], changes={"epochs": 3})


@pytest.mark.parametrize(
    ("words", "flag"),
    [(["--lr", "1"], "--lr"), (["--seed", "3"], "--seed"), (["--batch-size", "5"], "--batch-size"),
     (["--ema", "0"], "--ema"),
     (["--arch", "depth=2"], "--arch"), (["--val-fraction", "0.3"], "--val-fraction"), (["--amp", "bf16"], "--amp")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_options_that_would_change_the_past_are_named(
    stopped: Path, words: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(stopped), "--workers", "1", *words]) == 2
    error = capsys.readouterr().err
    assert f"leave out {flag}, or start a new run" in error
    assert all(f"--{name.replace('_', '-')}" in error for name in FREE)


def test_data_may_move(tmp_path: Path) -> None:
    from test_training import FOLDER, coloured_folders

    folder = coloured_folders(tmp_path / "data", 40)
    with pytest.raises(Interrupted):
        train(dataclasses.replace(FOLDER, data=str(folder)), out=tmp_path / "run", display=Hook(1, terminate))
    folder.rename(tmp_path / "moved")
    result = train(resume=tmp_path / "run", changes={"data": str(tmp_path / "moved")})
    assert result.test is not None
    assert result.test.images


# ---- damage ----


def test_every_flipped_bit_of_a_checkpoint_is_named(stopped: Path) -> None:
    """In the header, in the data, anywhere: nothing else than what was written is gone on with."""
    path = stopped / "checkpoint.safetensors"
    good = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    places = [rng.randrange(header) for _ in range(150)] + [rng.randrange(header, len(good)) for _ in range(50)]
    for place in [0, 7, 8, header - 1, header, len(good) - 1, *places]:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors (is|has|of)"):
            states.load(path)
    path.write_bytes(good)
    states.load(path)


def test_a_flipped_bit_of_the_kept_weights_is_named(whole: TrainResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    good = (run / "best.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for place in (header, (header + len(good)) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 4
        (run / "best.safetensors").write_bytes(bad)
        with pytest.raises(
            DamagedFile, match=r"best\.safetensors is damaged: it holds other bits than were written of"
        ):
            Run.open(run).evaluate()


def test_eval_says_that_the_options_were_edited(whole: TrainResult, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(whole.run, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert "was changed" not in capsys.readouterr().err
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("split_seed: 0", "split_seed: 1"))
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    assert "config.yaml was changed after the training" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval"], ["train", "--resume"]])
def test_preprocessing_that_lost_its_size_is_damage(
    stopped: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess": {}}))
    assert main([*command, str(stopped)]) == 1
    assert "model.json is damaged: preprocess lacks img_size" in capsys.readouterr().err


def test_damaged_best_weights_are_named_before_the_training_goes_on(whole: TrainResult, tmp_path: Path) -> None:
    shutil.copytree(whole.run, tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-100])
    watch = Hook(1, lambda: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"best\.safetensors is no safetensors file, or damaged.* start a new run"):
        train(resume=tmp_path / "run", display=watch, changes={"epochs": SMALL.epochs + 1})


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"tensors": 3, "about": {}}', '{"tensors": {}, "about": []}'])
def test_metadata_of_another_kind_is_damage(tmp_path: Path, content: str) -> None:
    text = f"{zlib.crc32(content.encode()):08x} {content}"
    save_file({}, tmp_path / "a.safetensors", {KEY: text})
    with pytest.raises(ValueError, match=r"the metadata of .*a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors")


def test_checksums_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": draw.randn(3),
        "b": draw.randn(2, 2, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "n": torch.tensor(3),
    }
    write_tensors(path, tensors, {"by": "mine"})
    about, read = read_tensors(path, required=True)
    assert about == {"by": "mine"}
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    from safetensors.torch import save_file

    save_file(tensors | {"b": tensors["b"] + 1}, path, metadata)
    with pytest.raises(DamagedFile, match=r"other bits than were written of b$"):
        read_tensors(path)
    save_file({"a": tensors["a"]}, path, metadata)
    with pytest.raises(DamagedFile, match=r"it lacks b, empty, n$"):
        read_tensors(path)
    save_file(tensors | {"more": tensors["a"] + 0}, path, metadata)
    with pytest.raises(DamagedFile, match=r"it also holds more$"):
        read_tensors(path)
    save_file(tensors, path, {"vit": metadata["vit"].replace("mine", "mime")})
    with pytest.raises(DamagedFile, match="its metadata is not what was written"):
        read_tensors(path)
    save_file(tensors, path)
    read_tensors(path)
    with pytest.raises(DamagedFile, match="has no checksums"):
        read_tensors(path, required=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epoch", -1), ("epoch", []), ("epoch", 1.5), ("epoch", True), ("epoch", 10**30), ("step", -3), ("step", 10_000),
     ("loss_sum", "x"), ("loss_sum", None), ("norm_sum", -1.0), ("skipped", 99), ("skipped_in_a_row", -1),
     ("best_epoch", 7), ("best", {"accuracy": "x"}), ("best", []), ("metrics_bytes", -1), ("metrics_bytes", 10**9),
     ("monitor_sums", [1.0]), ("monitor_sums", {}), ("seconds", -5), ("seconds", float("inf")), ("more", 1)],
)  # fmt: skip
def test_every_field_of_the_progress_is_checked(stopped: Path, key: str, value: Any) -> None:
    path = stopped / "checkpoint.safetensors"
    about, tensors = read_tensors(path)
    about["progress"][key] = value
    write_tensors(path, tensors, about)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors|metrics\.jsonl|not JSON"):
        train(resume=stopped)


def test_every_tensor_of_a_checkpoint_is_expected(stopped: Path) -> None:
    path = stopped / "checkpoint.safetensors"
    about, tensors = read_tensors(path)
    name = "average.blocks.0.mlp.fc1.weight"
    for changed, text in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks {name}"),
        ({k: v for k, v in tensors.items() if k != "optimizer.3.exp_avg"}, "lacks optimizer.3.exp_avg"),
        (tensors | {"optimizer.99.step": torch.zeros(())}, "also holds optimizer.99.step"),
        (tensors | {name: tensors[name].double()}, f"another shape or dtype of {name}"),
        (tensors | {"model.head.bias": torch.zeros(11)}, "another shape or dtype of model.head.bias"),
    ):
        write_tensors(path, changed, about)
        with pytest.raises(ValueError, match=f"does not fit this training: it .*{text}"):
            train(resume=stopped)


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        ("config.yaml", "weight_decay: 0.05", "weight_decay: 0.5", r"config.yaml is not what .* weight_decay was 0.05"),
        ("config.yaml", "seed: 0", "seed: 1", "config.yaml is not what"),
        ("model.json", '"drop_path_rate": 0.2', '"drop_path_rate": 0.3', r"model.json is not what .* arch was"),
        ("model.json", '"name": "vit_digits"', '"name": 5', "model.json is damaged: .*name is 5; it must be a text"),
        ("model.json", '"class_names": [', '"class_names": [3,', "model.json is damaged: .*list of texts"),
        ("metrics.jsonl", '"epoch": 1', '"epoch": [1', r"metrics.jsonl, line 1 is not JSON"),
        ("config.yaml", "epochs: 2", "epochs: &a 2\nwarmup: *a", "anchor or alias"),
    ],
)
def test_an_edited_file_is_named(stopped: Path, file: str, old: str, new: str, text: str) -> None:
    content = (stopped / file).read_text()
    assert old in content
    (stopped / file).write_text(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=text):
        train(resume=stopped)


def test_deep_and_large_texts_are_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "abcdefghi"
    bomb = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    for file, text in (
        ("config.yaml", "[" * 5000),
        ("config.yaml", f"a: &a [x]\n{bomb}arch: {{depth: *i}}\n"),
        ("model.json", "[" * 100_000),
    ):
        good = (stopped / file).read_text()
        (stopped / file).write_text(text)
        for command in (["train", "--resume"], ["eval"]):
            assert main([*command, str(stopped)]) == 1
            error = capsys.readouterr().err
            assert file in error
            assert len(error) < 1000
        (stopped / file).write_text(good)


@pytest.mark.parametrize(
    "value", ["{a: 1}", "[[1]]", "2026-01-01", "[" * 100, "&a [*a]", "!!python/object:os.system x"]
)
def test_what_no_argument_can_be_is_refused(value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", f"--arch=depth={value}", "--out", str(tmp_path / "run")]) == 1
    assert "depth" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"arch: {{depth: {value}}}\n")
    assert main(["train", "--config", str(recipe), "--out", str(tmp_path / "run")]) == 1
    assert str(recipe) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
