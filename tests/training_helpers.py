"""What the tests of trainings share: a small training, a display that acts at a step, and comparison to the bit."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vit.training import TrainConfig
from vit.training.progress import Silent

TINY = ["--arch", "embed_dim=16", "depth=1", "num_heads=2", "--batch-size", "128"]

SMALL = TrainConfig(
    arch={"embed_dim": 16, "depth": 1, "num_heads": 2},
    epochs=2,
    batch_size=128,
    drop_path=0.2,  # so that the model's own random numbers matter for resuming
    warmup_epochs=1.0,
    checkpoint_seconds=1e9,
)
STEPS = 9  # of an epoch: 1259 training images in batches of 128


class Hook(Silent):
    """Calls `action` once, after optimizer step `at`, and keeps the lines it was shown."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        self.at, self.action = at, action
        self.steps = 0
        self.lines: list[str] = []

    def step(self, text: str) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.action()

    def line(self, text: str) -> None:
        self.lines.append(text)


def summary(task: Any, outputs: torch.Tensor, targets: torch.Tensor) -> Any:
    """The figures of a task over outputs that are one batch."""
    return task.summarize([torch.cat(column) for column in zip(task.measure(outputs, targets), strict=True)])


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes: the kernel's own error, as on a full disk.

    Only for the write in question: pytest's own output may be such a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def figures(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "step_ms")} for line in lines]


def same_bits(first: Path, second: Path) -> None:
    """Every tensor of the kept weights and of the training's state, and every figure, are equal."""
    for name in ("best.safetensors", "last.safetensors", "checkpoint.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different, f"{name}: {different}"
    assert figures(first) == figures(second)


def vit_process(*words: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "vit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120.0
) -> None:
    """Until the condition holds; fails when the process ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_metrics(run: Path) -> bool:
    """Whether an epoch is finished."""
    path = run / "metrics.jsonl"
    return path.is_file() and bool(path.read_text())


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
