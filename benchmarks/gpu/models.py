"""Whole models: inference, training, latency, and a short training to an accuracy."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import vit
from torch import Tensor
from vit.support.random import Stream

from . import timing
from .report import Report
from .timing import BF16, Candidate, milliseconds, normal

#: Name, width, heads, tokens with the class token, and a batch that fills a large GPU; first what matters most.
MODELS = {
    "B": ("vit_base_patch16_224", 768, 12, 197, 256),
    "S": ("vit_small_patch16_224", 384, 6, 197, 256),
    "L": ("vit_large_patch16_224", 1024, 16, 197, 128),
    "H": ("vit_huge_patch14_224", 1280, 16, 257, 64),
}


def part_model(report: Report) -> None:
    for size in MODELS:
        for what in (inference, latency, training):
            if report.wanted(f"{what.__name__} {size}"):
                try:
                    what(report, size)
                except torch.OutOfMemoryError as error:
                    report.fail(f"{what.__name__} {size}", str(error)[:200])
                torch.cuda.empty_cache()
                torch._dynamo.reset()


def models(name: str, training: bool) -> dict[str, Any]:
    """The same weights on our kernels and on PyTorch's, eager and compiled."""
    reference = vit.create(name, backend="reference", device=timing.DEVICE, dtype=BF16)
    ours = vit.create(name, backend=timing.BACKEND, device=timing.DEVICE, dtype=BF16)
    ours.load_state_dict(reference.state_dict())
    for model in (ours, reference):
        model.train(training)
    found: dict[str, Any] = {"ours": ours, "eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    if "base" in name and not training:
        found["max_autotune"] = torch.compile(reference, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def inference(report: Report, size: str) -> None:
    name, *_, batch = MODELS[size]
    images = [normal(batch, 3, 224, 224) for _ in range(4)]

    def forward(model: Any) -> Candidate:
        def call(i: int) -> Tensor:
            with torch.no_grad():
                return model(images[i % 4])

        return call

    candidates = {key: forward(model) for key, model in models(name, training=False).items()}
    per_second(report, f"inference {size} batch {batch}", candidates, batch)


def training(report: Report, size: str) -> None:
    name, *_, batch = MODELS[size]
    images = [normal(batch, 3, 224, 224) for _ in range(2)]
    labels = torch.from_numpy(Stream("labels").integers(0, 1000, batch)).to(timing.DEVICE)

    def step(model: Any) -> Candidate:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def call(i: int) -> None:
            F.cross_entropy(model(images[i % 2]).float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    candidates = {key: step(model) for key, model in models(name, training=True).items()}
    per_second(report, f"training {size} batch {batch}", candidates, batch, rounds=3, target=500)


def by_stages(report: Report, candidates: dict[str, Candidate], **kwargs: Any) -> Iterator[dict[str, float]]:
    """Milliseconds of what starts at once, then again with each that takes a minute to compile, while there is time."""
    slow = [key for key in candidates if key in ("compiled", "max_autotune")]
    for n in range(len(slow) + 1):
        if n > 0 and time.monotonic() > report.end:
            return
        yield milliseconds({k: f for k, f in candidates.items() if k not in slow[n:]}, graphs=False, **kwargs)


def per_second(report: Report, name: str, candidates: dict[str, Candidate], batch: int, **kwargs: Any) -> None:
    for ms in by_stages(report, candidates, **({"rounds": 5, "target": 300} | kwargs)):
        figures: dict[str, Any] = {f"{key}_images_s": 1000 * batch / value for key, value in ms.items()}
        others = [value for key, value in ms.items() if key != "ours"]
        if "ours" in ms and others:
            figures["speedup"] = min(others) / ms["ours"]
        report.failed |= "ours" not in ms
        report.add(name, **figures)


def latency(report: Report, size: str) -> None:
    """Batch 1, both sides replayed as a CUDA graph; and vit.Engine, whose calls copy image and logits as well."""
    image = normal(1, 3, 224, 224)

    def replayed(model: Any) -> Candidate:
        @torch.no_grad()
        def forward() -> Tensor:
            return model(image)

        @functools.cache  # captured by the first call, which may fail
        def graph() -> Any:
            return timing.capture(forward, forward)

        return lambda i: graph().replay()

    found = models(MODELS[size][0], training=False)
    found.pop("max_autotune", None)
    candidates, given = {key: replayed(model) for key, model in found.items()}, image.float()
    engine = functools.cache(lambda: vit.Engine(found["ours"], dtype=BF16, device=timing.DEVICE))
    candidates["engine"] = lambda i: engine()(given)
    for ms in by_stages(report, candidates):
        report.failed |= "ours" not in ms
        report.add(f"latency {size} batch 1", **{f"{key}_ms": value for key, value in ms.items()})


#: `vit` on the path that is its first argument.
ON_PATH = "import sys; from benchmarks.gpu.timing import choose; choose(sys.argv[1]); from vit.cli import main; "
ON_PATH += "sys.exit(main(sys.argv[2:]))"


def part_train(report: Report) -> None:
    """The digits of scikit-learn, the same options on both backends."""
    for backend in (timing.BACKEND, "cpu"):
        if not report.wanted(f"train {backend}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", ON_PATH, timing.chosen()]
            command += ["train", "--out", f"{folder}/run", "--backend", backend]
            try:
                seconds = max(60.0, report.end - time.monotonic())
                done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            except subprocess.TimeoutExpired:
                report.add(f"train {backend}", not_run=f"longer than {seconds:.0f} s")
                continue
            text = (done.stdout + done.stderr).strip()
            if done.returncode == 0:
                report.add(f"train {backend}", ok=True, tail=text[-300:])
            else:
                report.fail(f"train {backend}", f"exit code {done.returncode}: {text[-1000:]}")
