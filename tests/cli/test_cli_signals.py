"""A signal in any phase of a command: one line, exit code 128 + its number, no file half written, and a run goes on."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vit
import yaml
from training_helpers import SMALL, same_bits
from vit.cli import main

PRELOADED = ["vit.cli.train", "vit.training", "accelerate", "matplotlib.pyplot", "sklearn.datasets", "yaml"]


def in_a_process(words: list[str], place: str, number: int, times: int, output: str) -> None:
    """The command, which gets the signal whenever it comes to a function ("module:name")."""
    for descriptor, name in ((1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # of readers, as elsewhere
    sys.argv = ["vit", *words]
    module, _, names = place.partition(":")
    *path, name = names.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    plain = getattr(owner, name)

    def struck(*args: Any, **options: Any) -> Any:
        for _ in range(times):
            os.kill(os.getpid(), number)
        return plain(*args, **options)

    setattr(owner, name, struck)
    sys.exit(main())


@pytest.fixture(scope="module")
def processes() -> Any:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


@pytest.fixture
def stopped(processes: Any, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that gets a signal at a place; the one line that it says."""

    def run(words: list[str], place: str, number: signal.Signals = signal.SIGTERM, times: int = 1) -> str:
        output = tmp_path / "output"
        process = processes.Process(target=in_a_process, args=(words, place, number, times, str(output)))
        process.start()
        process.join(120)
        text = Path(f"{output}.err").read_text()
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode == 128 + number, (process.exitcode, text)
        assert text.startswith("vit: stopped")
        assert text.endswith("\n")
        assert text.count("\n") == 1, text
        return text

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that no signal stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(vars(SMALL) | {"epochs": 1, "checkpoint_seconds": 0.0}))
    assert main(["train", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder


PHASES = {
    "reading the data": "vit.training.assembly:open_source",
    "building the model": "vit.training.assembly:create",
    "making the folder": "vit.training.run:write_text",
    "run.json": "vit.training.record:write_text",
    "the first step": "vit.training.step:Stepper.step",
    "writing a file of tensors": "safetensors.torch:save_file",
    "validation": "vit.training.loop:evaluate",
    "metrics": "vit.training.run:append_line",
    "the final evaluation": "vit.training.run:Run.load",
    "pictures": "vit.viz:curves",
    "a picture's file": "vit.viz.figure:write_bytes",
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_training_stops_in_one_line_and_goes_on(
    phase: str, stopped: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ["train", "--config", str(whole / "recipe.yaml"), "--out", str(out), "--resume", "auto"]
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[list(PHASES).index(phase) % 3]
    text = stopped(words, PHASES[phase], number)
    if (out / "config.yaml").exists():
        assert text.endswith(f"go on with: vit train --resume {out}\n")
    assert not list(tmp_path.glob("run/.*")), "no lock, no temporary file"
    if "picture" not in phase:  # which take longer than the training
        monkeypatch.setattr("vit.training.loop.draw_final", lambda *things: None)
    assert main(words) == 0
    same_bits(whole / "run", out)


def test_two_signals_are_as_one(stopped: Any, whole: Path, tmp_path: Path) -> None:
    """A launcher passes on what the terminal has already sent."""
    words = ["train", "--config", str(whole / "recipe.yaml"), "--out", str(tmp_path / "run")]
    stopped(words, "vit.training.step:Stepper.step", signal.SIGINT, times=2)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images and a place to write to."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("things")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = vit.create("vit_tiny_patch16_224", backend="reference", **sizes)
    model.class_names = ("cat", "dog")
    vit.weights.save(model, folder / "weights")
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (20 * i, 9, 80 * (name == "cat"))).save(folder / "data" / name / f"{i}.png")
    return folder


COMMANDS = {
    "eval": (["eval", "weights", "--data", "data"], "vit.training.evaluate:loader"),
    "predict": (["predict", "weights", "data", "--csv", "old"], "vit.preprocess:Preprocess.__call__"),
    "predict, no file": (["predict", "weights", "data"], "vit.preprocess:Preprocess.__call__"),
    "convert": (["convert", "weights", "new"], "safetensors.torch:save_file"),
    "quantize": (["quantize", "weights", "--calibrate", "data", "--output", "old"], "vit.engine.quantize:figures"),
    "data index": (["data", "index", "data"], "vit.data.folder:_Decoder.decode"),
    "data index, writing": (["data", "index", "data"], "numpy:savez_compressed"),
    "viz": (["viz", "patches", "weights", "data/cat/0.png", "--output", "old.png"], "vit.viz.figure:write_bytes"),
    "info": (["info", "--json"], "vit.cli.info:run"),
    "parity": (["parity", "--op", "gelu", "--json", "old"], "vit.parity:run"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stops_in_one_line(command: str, stopped: Any, things: Path, monkeypatch) -> None:
    monkeypatch.chdir(things)
    for name in ("old", "old.png"):
        Path(name).write_text("kept")
    before = sorted(path for path in things.rglob("*") if path.name != "new")
    assert stopped(*COMMANDS[command], signal.SIGINT) == "vit: stopped by SIGINT\n"
    assert sorted(path for path in things.rglob("*") if path.name != "new") == before
    assert {Path(name).read_text() for name in ("old", "old.png")} == {"kept"}


def test_a_sweep_says_its_own_command(stopped: Any, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ["sweep", "--config", str(whole / "recipe.yaml"), "--vary", "lr=0.001,0.002", "--sampler", "grid"]
    words += ["--out", str(tmp_path / "sweep")]
    for place in ("vit.training.step:Stepper.step", "vit.training.sweep:cost"):  # in a training, and behind it
        assert f"; go on with: vit {' '.join(words)}\n" in stopped(words, place)


def test_a_race_keeps_what_it_measured(stopped: Any, tmp_path: Path) -> None:
    report = tmp_path / "race.json"
    words = ["bench", "--ops", "--op", "gelu", "--direction", "fwd", "--rounds", "1", "--backends", "reference"]
    words += ["--json", str(report)]
    assert stopped(words, "vit.bench.candidates:work", signal.SIGINT) == "vit: stopped by SIGINT\n"
    assert json.loads(report.read_text())["records"] == []


def test_imports_are_stopped_in_one_line() -> None:
    code = (
        "import os, signal, sys\n"
        "class Strike:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Strike()); sys.argv = ['/usr/bin/vit', 'info']\n"
        "import vit.cli"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "vit: stopped by SIGINT\n")


def test_a_program_that_imports_vit_keeps_its_handlers() -> None:
    code = "import signal, vit; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "default_int_handler" in found
    assert "SIG_DFL" in found or "0" in found


def test_what_is_ignored_stays_ignored(stopped: Any, whole: Path, tmp_path: Path) -> None:
    """As nohup and shells do it for jobs in the background."""
    from vit.support import stop
    from vit.training.interrupt import Signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stop_requested
        handlers = [signal.getsignal(number) for number in stop.SIGNALS]
        stop.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number, handler in zip(stop.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_is_the_one_of_the_handler_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit.training import interrupt

    clock, seen = [10.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with interrupt.Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.number, seen) == (signal.SIGTERM, [])
            clock[0] += 2
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
