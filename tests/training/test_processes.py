"""Trainings of two processes (gloo): the results of one, sharded or not, and a clear end when one of them is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import restarted
import two_processes
from rounding import about
from training_helpers import figures, same_bits
from vit.training import train

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """That of a process which finds the tests' modules."""
    here = Path(__file__).parent
    search = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have trained; see two_processes.py."""
    out = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(out)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], texts
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, with the whole batch."""
    return train(two_processes.CONFIG, out=tmp_path_factory.mktemp("alone") / "run").run


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(pair: Path, alone: Path, kind: str) -> None:
    lines, wanted = figures(pair / kind), figures(alone)
    assert wanted[-2]["step"] == 54
    for line, want in zip(lines[:-1], wanted[:-1], strict=True):
        for name in ("train_loss", "train_cross_entropy", "val_loss", "grad_norm"):
            # Each of up to 54 steps adds the roundings of gradients that are summed in another order.
            assert line[name] == pytest.approx(want[name], abs=1e-5, rel=1e-5), name
    assert lines[0]["train_loss"] > lines[5]["train_loss"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_image_is_counted_once(pair: Path, alone: Path, kind: str) -> None:
    """The validation images are an odd number: one process has one more than the other."""
    final, wanted = figures(pair / kind)[-1], figures(alone)[-1]
    assert wanted["val_images"] % 2 == 1
    for name in ("val_images", "test_images"):
        assert final[name] == wanted[name]
    for name in ("val_accuracy", "test_accuracy"):
        assert final[name] == wanted[name]


def test_a_sharded_training_without_average_keeps_its_weights(pair: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(two_processes.CONFIG, ema=0.0, clip=0.0, epochs=2)
    wanted = figures(train(config, out=tmp_path / "run").run)
    compared = set()
    for line, want in zip(figures(pair / "plain"), wanted, strict=True):
        assert line.keys() == want.keys()
        for name in want.keys() & {"val_loss", "test_loss"}:
            assert line[name] == about(want[name], 80)  # the roundings of 18 steps
            compared.add(name)
    assert compared == {"val_loss", "test_loss"}


def test_a_sharded_training_goes_on_to_the_bit(pair: Path) -> None:
    same_bits(pair / "whole", pair / "interrupted")


@pytest.mark.parametrize("rank", [0, 1])
def test_8_bit_averages_of_parts_are_saved_and_loaded(pair: Path, rank: int) -> None:
    """Those of each process: the averages of one were taken for all of them."""
    assert (pair / f"optimizer-{rank}.txt").read_text() == "[True, True]"


def test_a_killed_process_ends_the_other_with_a_way_out(pair: Path) -> None:
    text = (pair / "error.txt").read_text()
    assert "another process of this training has ended or does not answer" in text
    assert f"go on with: vit train --resume {pair / 'lost'}" in text
    assert (pair / "lost" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_restart_by_torchrun_goes_on_to_the_bit(pair: Path, tmp_path: Path, killed: int) -> None:
    """--max-restarts: the new processes looked for the dead ones, by addresses in the store of the launcher."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["--max-restarts", "1", restarted.__file__, str(out), str(killed)]
    subprocess.run([*launcher, *words], env=environment(), timeout=120, check=True)
    same_bits(pair / "ddp", out)
    sessions = json.loads((out / "run.json").read_text())["sessions"]
    assert [session["outcome"] == "finished" for session in sessions] == [False, True]
