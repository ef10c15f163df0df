"""What `vit bench` measures: races of models and of ops, the start of a fresh process, and the machine's limits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..parity.case import Case
from . import exports, runtimes
from .machine import machine, public, versions
from .runtimes import RUNTIMES, Arch, Refusal, Spec
from .workers import Failure, Timing, Worker, race

#: Of whose version a figure depends.
PACKAGES = ("torch", "timm", "numpy", "onnx", "onnxruntime", "openvino", "nncf")

Watch = Callable[[str], None]
Peak = dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class Job:
    """One race of models: `arch` are sizes that differ from those of the named model."""

    model: str
    arch: Arch
    dtype: str
    batch: int
    mode: str

    @property
    def name(self) -> str:
        return ":".join([self.model, *(f"{key}={value}" for key, value in self.arch)])

    @property
    def text(self) -> str:
        return f"{self.name} {self.mode} {self.dtype} batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Who races, and how: `candidates` are backends and names of RUNTIMES."""

    candidates: tuple[str, ...]
    device: str
    threads: int
    rounds: int
    peak: Peak = None


def time_models(
    jobs: Sequence[Job], setting: Setting, root: str, watch: Watch, start_up: str = "no"
) -> Iterator[dict[str, Any]]:
    """For each job {"records": [...], "refused": [...], "start_up": [...]}: files of models go below the folder `root`.

    Each candidate is in one of the first two lists. start_up "yes" and "only" start each of RUNTIMES in a fresh
    process as well; "only" leaves out the race.
    """
    for job in jobs:
        specs = _specs(job, setting, root)
        able, found = prepare(specs, job, watch)
        if start_up != "only":
            for name, entries in _race(job, able, setting, watch).items():
                found[name] += entries
        if start_up != "no":
            timed = {entry["backend"] for entry in found["records"]}
            fresh = [spec for spec in able if spec.runtime in RUNTIMES and (spec.runtime in timed or not timed)]
            found["start_up"] = [_start_up(job, spec, watch) for spec in fresh]
        yield found


def _race(job: Job, specs: Sequence[Spec], setting: Setting, watch: Watch) -> dict[str, list[Any]]:
    from .candidates import inference_step, libraries, training_step

    def told(i: int, what: str) -> None:
        watch(f"{job.text}: {specs[i].runtime}, {what}")

    make = inference_step if job.mode == "inference" else training_step
    found: dict[str, list[Any]] = {"records": [], "refused": []}
    workers = [Worker(setting.threads) for _ in specs]  # fresh ones: their memory is measured
    try:
        for worker, spec in zip(workers, specs, strict=True):
            worker.request("call", libraries, spec.runtime, job.mode)
        outcomes = race(workers, make, [(spec, setting.device) for spec in specs], setting.rounds, told)
        for worker, spec, outcome in zip(workers, specs, outcomes, strict=True):
            if isinstance(outcome, Failure):
                found["refused"].append(_refused(job, spec, outcome))
            else:
                memory, result = worker.request("peak_memory"), worker.request("result")
                found["records"].append(_record(job, spec, outcome, memory, result, setting.peak))
    finally:
        for worker in workers:
            worker.stop()
    return found


def _start_up(job: Job, spec: Spec, watch: Watch) -> dict[str, Any]:
    """What runtimes.first_image measures in a process of its own, or the reason why there is nothing."""
    watch(f"{job.text}: {spec.runtime}, a fresh process")
    source = Path(runtimes.__file__).read_text(encoding="utf-8")
    # -c: started from its file, it would find the modules beside it under names that runtimes import.
    command = [sys.executable, "-c", source, json.dumps(dataclasses.asdict(spec))]
    done = subprocess.run(command, cwd=spec.folder, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return _about(job, spec) | {"reason": last[0] if last else f"died with exit code {done.returncode}"}
    return _about(job, spec) | json.loads(done.stdout.splitlines()[-1])


def _specs(job: Job, setting: Setting, root: str) -> list[Spec]:
    where = exports.folder(root, job.model, job.arch)
    shared = (job.model, job.dtype, job.batch, setting.threads, where, job.arch)
    return [Spec(name, *shared) for name in setting.candidates]


def prepare(specs: Sequence[Spec], job: Job, watch: Watch) -> tuple[list[Spec], dict[str, list[Any]]]:
    """Exports what each candidate loads, in a process that ends then; who can take part, and why others cannot."""
    worker = Worker(specs[0].threads)
    able: list[Spec] = []
    found: dict[str, list[Any]] = {"records": [], "refused": []}
    try:
        if job.mode == "inference":
            watch(f"{job.text}: weights and images")
            worker.request("call", exports.export_base, job.model, job.arch, specs[0].folder, job.batch)
        for spec in specs:
            try:
                if spec.runtime in RUNTIMES:
                    worker.request("call", runtimes.imports, spec.runtime)
                if spec.runtime in RUNTIMES and job.mode == "inference":
                    watch(f"{job.text}: exporting for {spec.runtime}")
                    runtimes.check(spec.runtime, spec.dtype)
                    worker.request("call", exports.export, spec)
                able.append(spec)
            except (Refusal, RuntimeError) as error:
                found["refused"].append(_refused(job, spec, Failure(str(error), isinstance(error, Refusal))))
    finally:
        worker.stop()
    return able, found


def _about(job: Job, spec: Spec) -> dict[str, Any]:
    return {
        "model": job.name, "backend": spec.runtime, "dtype": job.dtype, "batch": job.batch, "mode": job.mode,
        "threads": spec.threads,
    }  # fmt: skip


def _refused(job: Job, spec: Spec, failure: Failure) -> dict[str, Any]:
    return _about(job, spec) | {"reason": failure.reason, "failed": not failure.refused}


def _record(job: Job, spec: Spec, timing: Timing, memory: int, result: Any, peak: Peak) -> dict[str, Any]:
    record = _about(job, spec) | {
        "ms_median": 1e3 * timing.median, "ms_min": 1e3 * timing.best,
        "images_per_second": job.batch / timing.median, "peak_memory_mb": round(memory / 2**20, 1),
    }  # fmt: skip
    if result is not None:
        logits, phases = result
        record |= distance(logits, np.load(spec.path("reference.npy")))
        if phases:
            record["phases"] = [phase | _percent(phase, job.dtype, peak) for phase in phases]
    return record


def _percent(phase: dict[str, Any], dtype: str, peak: Peak) -> dict[str, float]:
    """Of the peak of the dtype that the engine's phase computes in."""
    kind = {"embed": "bfloat16", "attention": "bfloat16", "head": "float32"}.get(phase["name"], dtype)
    limit = (peak or {}).get(kind if dtype == "int8" else dtype)
    rate = 1e-6 * phase["flops"] / phase["ms"] if phase["ms"] else 0.0
    return {"percent_of_peak": 100 * rate / limit} if limit and rate else {}


def distance(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far logits are from the float32 reference: max|difference| / max|reference|, and the cosine of the two."""
    count = min(len(logits), len(reference))
    a, b = logits[:count].astype(np.float64).ravel(), reference[:count].astype(np.float64).ravel()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {
        "logits_max_error": float(np.abs(a - b).max() / np.abs(b).max()),
        "logits_cosine": float(a @ b / size) if size else float(not np.any(a - b)),
    }


def time_ops(cases: Sequence[Case], setting: Setting, watch: Watch) -> Iterator[dict[str, Any]]:
    """For each case {"records": [...], "refused": [...]}: PyTorch's own op first, then each backend."""
    from .candidates import op_step, work

    names = ["torch", *setting.candidates]
    workers = [Worker(setting.threads) for _ in names]
    try:
        for case in cases:

            def told(i: int, what: str, case: Case = case) -> None:
                watch(f"{case.id}: {names[i]}, {what}")

            jobs = [(name, case, setting.device) for name in names]
            outcomes = race(workers, op_step, jobs, setting.rounds, told)
            yield _op_records(case, names, outcomes, setting.threads, work(case), setting.peak)
    finally:
        for worker in workers:
            worker.stop()


def _op_records(
    case: Case,
    names: Sequence[str],
    outcomes: Sequence[Timing | Failure],
    threads: int,
    work: tuple[float, str],
    peak: Peak,
) -> dict[str, Any]:
    amount, unit = work
    found: dict[str, Any] = {"records": [], "refused": []}
    for name, outcome in zip(names, outcomes, strict=True):
        record: dict[str, Any] = {
            "id": case.id, "op": case.op, "dtype": case.dtype, "direction": case.direction, "backend": name,
            "threads": threads,
        }  # fmt: skip
        if isinstance(outcome, Failure):
            found["refused"].append(record | {"reason": outcome.reason, "failed": not outcome.refused})
            continue
        rate = 1e-9 * amount / outcome.median
        record |= {"ms_median": 1e3 * outcome.median, "ms_min": 1e3 * outcome.best, "rate": rate, "unit": unit}
        if isinstance(outcomes[0], Timing):
            record["ratio_to_torch"] = outcomes[0].median / outcome.median
        if peak and unit == "GFLOP/s" and case.dtype in peak:
            record["percent_of_peak"] = 100 * rate / peak[case.dtype]
        found["records"].append(record)
    return found


def environment(setting: Setting) -> dict[str, Any]:
    """The machine and the software, and its peak: without them a figure means nothing."""
    import torch

    from ..backends import backends
    from ..version import __version__

    found = machine() | versions(PACKAGES)
    found |= {
        "vit": __version__,
        "threads": setting.threads,
        "rounds": setting.rounds,
        "device": setting.device,
        "backends": {n: public(record) for n, record in backends().items() if n in setting.candidates},
        "peak_gflops": setting.peak,
        "thread_variables": {key: os.environ[key] for key in _THREAD_VARIABLES if key in os.environ},
    }
    if setting.device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(setting.device)
    with contextlib.suppress(KeyError):
        found["cpu_isa"] = backends()["cpu"]["isa"]
    return found


_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_AFFINITY", "GOMP_CPU_AFFINITY",
    "VIT_CPU_ISA",
)  # fmt: skip
