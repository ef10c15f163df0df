"""What a load of weights reads, and how much memory it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import vit
from safetensors.torch import save_file

MEMORY = """
import sys, threading, time
import vit

def anonymous():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

vit.create("test_vit", backend="reference", weights=sys.argv[2])  # what is imported at the first call
before, most, over = anonymous(), 0, threading.Event()

def watch():
    global most
    while not over.wait(0.001):
        most = max(most, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = vit.create("vit_small_patch16_224", backend="reference", weights=sys.argv[1])
over.set()
thread.join()
print(max(most, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_load_needs_little_more_memory_than_the_model(form, tmp_path):
    """88 MB of weights, beside an optimizer's state in the checkpoint: at most 1.15 of them in memory at any time."""
    files = []
    for name in ("vit_small_patch16_224", "test_vit"):
        state = vit.create(name, backend="reference").state_dict()
        files.append(tmp_path / f"{name}.{form}")
        if form == "pt":
            torch.save({"model": state, "optimizer": {i: 2 * t for i, t in enumerate(state.values())}}, files[-1])
        else:
            save_file(state, files[-1])
    size = sum(t.numel() * t.element_size() for t in vit.weights.load(files[0]).values())
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, files)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) <= 1.15 * size


def test_no_tensor_of_a_file_is_read_twice(tmp_path, monkeypatch):
    model = vit.create("vit_tiny_patch16_224", backend="reference", depth=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    read: list[str] = []

    class Counted:
        """An open file that remembers which tensors were asked for."""

        def __init__(self, *arguments):
            self.opened = original(*arguments)

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Counted)
    vit.create("vit_tiny_patch16_224", backend="reference", depth=2, weights=tmp_path / "model.safetensors")
    assert sorted(read) == sorted(model.state_dict())
