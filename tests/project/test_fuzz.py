"""A minute of fuzzing with a fixed seed: every input ends well, and what does not is noticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import USABLE
from fuzz.formats import FORMATS, Change, job_of
from fuzz.run import fuzz
from fuzz.worker import Worker

pytestmark = pytest.mark.fuzz


def test_inputs_of_every_format_end_well(tmp_path):
    kept = Path(os.environ.get("VIT_FUZZ_OUT", "build/fuzz")).resolve()
    shutil.rmtree(kept, ignore_errors=True)
    figures = fuzz(tmp_path, kept, list(FORMATS), seed=0)
    print(figures.table())
    assert not figures.failed(), "\n".join([figures.table(), *figures.failures])
    assert all(counts["right"] and counts["named error"] for counts in figures.counts.values())
    missing = FORMATS.keys() - figures.counts.keys()
    assert missing <= ({"engine"} if "cpu" not in USABLE else set())


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("fuzz") / "worker")
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("raise ValueError('vit: {path} is damaged')", "named error"),
        ("raise ValueError('vit: something is damaged')", "traceback"),
        ("raise ValueError('damaged')", "traceback"),
        ("raise KeyError('x')", "traceback"),
        ("raise ValueError('vit: {path} \\x1b[2J')", "traceback"),
        ("raise MemoryError", "blow-up"),
        ("x = bytearray(700 << 20); x[:: 4096] = b'x' * len(x[:: 4096])", "blow-up"),
        ("import subprocess; subprocess.run(['gs', '{path}'])", "ran a program"),
        ("import os; os.system('true')", "ran a program"),
        ("open('/tmp/vit-fuzz-elsewhere', 'w')", "ran a program"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died"),
        ("import os; os._exit(0)", "died"),
        ("while True: pass", "hang"),
        ("raise Wrong('other values')", "wrong silently"),
        ("pass", "right"),
    ],
)
def test_every_kind_of_failure_is_noticed(text, outcome, worker, tmp_path):
    path = tmp_path / "input.py"
    path.write_text(text.replace("{path}", str(path)))
    seed = tmp_path / "seed.py"
    seed.write_text("pass")
    job = job_of("config", path, seed, Change(""), "") | {"use": "script"}
    assert worker.run(job)[0] == outcome


def test_what_a_process_does_once_is_no_inputs_time(worker, tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz.worker.MOST_SECONDS", 1.0)
    worker.close()  # a new process reads the seed first
    seed, path = tmp_path / "seed.py", tmp_path / "input.py"
    seed.write_text("import time\nend = time.process_time() + 3\nwhile time.process_time() < end: pass\n")
    path.write_text("pass")
    job = job_of("config", path, seed, Change(""), "") | {"use": "script"}
    assert worker.run(job) == ("right", "done")


def test_results_that_are_or_are_not_the_seeds(worker, tmp_path):
    path = tmp_path / "input.py"
    path.write_text("pass")
    job = job_of("config", path, path, Change("", same=True), "other") | {"use": "script"}
    assert worker.run(job)[0] == "wrong silently"
    job = job_of("config", path, path, Change("", differs=("depth",)), "done") | {"use": "script"}
    assert worker.run(job) == ("wrong silently", "the change of depth changed nothing")
