"""Two commits in one race: python benchmarks/commits.py OLD NEW [--cases REGEX] [--dtype D] [--rounds N] [--json FILE]

OLD and NEW are folders that hold the package `vit` of a commit with its compiled modules: `pip install --target OLD .`
in each checkout, or `python/` of a checkout in which the backend was built. Each has a process of its own; they take
turns by rounds while the other idles, so a slow minute of the machine hits both. Only the public interface is called.

Prints the time of a call in both, the median of all rounds and the best, and OLD / NEW: above 1 the new one is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Case -> model, batch, or an op and the shapes of its tensors.
MODELS = {
    "vit_digits b1": ("vit_digits", 1, False),
    "ViT-Ti/16 b1": ("vit_tiny_patch16_224", 1, False),
    "ViT-B/16 b1": ("vit_base_patch16_224", 1, False),
    "ViT-B/16 b8": ("vit_base_patch16_224", 8, False),
    "train ViT-S/16 b16": ("vit_small_patch16_224", 16, True),
}
OPS: dict[str, tuple[Any, ...]] = {  # results of 64 elements: the time is that of the call
    "gelu of 64": ("gelu", (8, 8)),
    "layer_norm of 64": ("layer_norm", (8, 8), (8,), (8,)),
    "matmul of 64": ("matmul", (8, 8), (8, 8)),
    "linear of 64": ("linear", (8, 8), (8, 8), (8,)),
    "attention of 64": ("attention", (1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)),
}
LAYERS: dict[str, tuple[Any, ...]] = {  # of ViT-B/16 at batch 8, forward and backward
    "layer_norm": ("layer_norm", (1576, 768), (768,), (768,)),
    "matmul": ("matmul", (1576, 384), (384, 384)),
    "qkv": ("linear", (1576, 768), (2304, 768), (2304,)),
    "proj": ("linear", (1576, 768), (768, 768), (768,)),
    "fc1": ("linear", (1576, 768), (3072, 768), (3072,)),
    "fc2": ("linear", (1576, 3072), (768, 3072), (768,)),
    "attention": ("attention", (4, 197, 12, 64), (4, 197, 12, 64), (4, 197, 12, 64)),
}
BACKWARD = " backward"
CASES = (*OPS, *(layer + direction for layer in LAYERS for direction in ("", BACKWARD)), *MODELS)
ROUND_SECONDS = 0.25


def normal(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Normal numbers, the same in every commit."""
    import torch

    return torch.tensor(statistics.NormalDist().samples(math.prod(shape), seed=seed)).reshape(shape)


def model_step(name: str, batch: int, train: bool, backend: str) -> Callable[[], Any]:
    import torch
    import vit

    model: Any = vit.create(name, backend=backend, training=train).train(train)
    images = normal((batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size))
    if not train:

        def infer() -> Any:
            with torch.inference_mode():
                return model(images)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.arange(batch) % model.num_classes

    def step() -> None:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def op_step(op: str, *shapes: tuple[int, ...], dtype: str, backend: str, backward: bool) -> Callable[[], Any]:
    import torch
    import vit

    tensors = [normal(shape, i).to(getattr(torch, dtype)) for i, shape in enumerate(shapes)]
    call = getattr(vit.ops, op)
    if backward:
        y = call(*(t.requires_grad_() for t in tensors), backend=backend)
        dy = normal(tuple(y.shape), len(shapes)).to(y.dtype)
        return lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True)

    def step() -> Any:
        with torch.no_grad():
            return call(*tensors, backend=backend)

    return step


def serve(case: str, backend: str, dtype: str, threads: int) -> None:
    """A racer: for each line on standard input a round, whose times it prints."""
    import torch

    torch.set_num_threads(threads)
    if case in MODELS:
        step = model_step(*MODELS[case], backend)
    else:
        op, *shapes = (OPS | LAYERS)[case.removesuffix(BACKWARD)]
        step = op_step(op, *shapes, dtype=dtype, backend=backend, backward=case.endswith(BACKWARD))
    calls, best = 0, 1e9

    def timed() -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    while calls < 3 or (calls < 200 and best * calls < ROUND_SECONDS):
        calls, best = calls + 1, min(best, timed())
    print("ready", flush=True)
    for _ in sys.stdin:
        timed()
        print(json.dumps([timed() for _ in range(max(1, min(5000, int(ROUND_SECONDS / best))))]), flush=True)


class Racer:
    def __init__(self, tree: Path, case: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", case, args.backend, args.dtype, str(args.threads)]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.rounds: list[list[float]] = []
        self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a racer ended with exit code {self.process.wait()}")
        return line

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(json.loads(self.line()))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def milliseconds(self) -> tuple[float, float]:
        """The median and the best of all calls."""
        times = [t for times in self.rounds for t in times]
        return 1e3 * statistics.median(times), 1e3 * min(times)


def race(case: str, args: argparse.Namespace) -> dict[str, Any]:
    racers = [Racer(tree, case, args) for tree in (args.old, args.new)]
    for turn in range(args.rounds):
        for i in (turn % 2, 1 - turn % 2):
            racers[i].turn()
    for racer in racers:
        racer.stop()
    (old, old_best), (new, new_best) = (racer.milliseconds() for racer in racers)
    return {
        "case": case, "backend": args.backend, "dtype": args.dtype, "threads": args.threads, "old_ms": old,
        "new_ms": new, "old_ms_min": old_best, "new_ms_min": new_best, "ratio": old / new,
        "ratio_min": old_best / new_best,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--cases", default="", metavar="REGEX", help="one of: " + ", ".join(CASES))
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the ops; models have float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = []
    for case in CASES:
        if re.search(args.cases, case):
            records.append(race(case, args))
            print(
                "{case:20s} old {old_ms:9.4f} ms (best {old_ms_min:9.4f})   new {new_ms:9.4f} ms (best "
                "{new_ms_min:9.4f})   old / new {ratio:5.2f} (best {ratio_min:5.2f})".format(**records[-1]),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
