"""The race: candidates take turns, and one that fails leaves the others running."""

from __future__ import annotations

import os

import numpy as np
import pytest
from vit.bench.machine import public
from vit.bench.race import distance
from vit.bench.runtimes import Refusal
from vit.bench.workers import Candidate, Failure, Timing, Worker, race


def candidate(kind: str) -> Candidate:
    """Runs in a worker process."""
    if kind == "refuses":
        raise Refusal("no such hardware")
    if kind == "breaks":
        raise KeyError("blocks")
    calls = []

    def step() -> int:
        calls.append(0)
        if kind == "dies" and len(calls) > 60:
            os._exit(7)
        return len(calls)

    return Candidate(step, result=lambda out: (kind, out))


def test_failures_leave_the_race_and_say_why():
    kinds = ["runs", "refuses", "breaks", "dies"]
    workers, turns = [Worker(1) for _ in kinds], []
    try:
        outcomes = race(workers, candidate, [(kind,) for kind in kinds], 3, lambda i, what: turns.append((i, what)))
        kind, calls = workers[0].request("result")
    finally:
        for worker in workers:
            worker.stop()
    ran, refused, broken, dead = outcomes
    assert isinstance(ran, Timing)
    assert 0 < ran.best <= ran.median
    assert kind == "runs"
    assert calls > len(ran.seconds)
    assert refused == Failure("no such hardware", refused=True)
    assert isinstance(broken, Failure)
    assert not broken.refused
    assert "KeyError: 'blocks'" in broken.reason
    assert isinstance(dead, Failure)
    assert "exit code 7" in dead.reason
    assert [i for i, what in turns if what == "warm-up"] == [0, 1, 2, 3]
    rounds = [(i, what) for i, what in turns if what != "warm-up"]
    assert rounds == [(0, "round 1 of 3"), (3, "round 1 of 3"), (0, "round 2 of 3"), (0, "round 3 of 3")]


def test_distance_sees_scale_direction_and_extra_images():
    reference = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)
    assert distance(np.vstack([reference, reference]), reference) == {
        "logits_max_error": 0,
        "logits_cosine": pytest.approx(1),
    }
    assert distance(1.5 * reference, reference) == {"logits_max_error": 0.5, "logits_cosine": pytest.approx(1)}
    assert distance(-reference, reference)["logits_cosine"] == pytest.approx(-1)


def test_published_records_name_files_without_their_folders():
    record = {
        "threads": "OpenMP of the process (/home/me/lib/libgomp.so.1)",
        "runtime": "/opt/sycl/libsycl.so.8",
        "isa": "avx512bf16, of v3/v4",
        "memory": 3,
    }
    assert public(record) == {
        "threads": "OpenMP of the process (libgomp.so.1)",
        "runtime": "libsycl.so.8",
        "isa": "avx512bf16, of v3/v4",
        "memory": 3,
    }
