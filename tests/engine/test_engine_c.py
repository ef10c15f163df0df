"""The engine without Python: examples/c under AddressSanitizer and under valgrind, with good and with bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vit
from conftest import USABLE
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LEVELS = vit.backends()["cpu"].get("isa available", "").split(", ")

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.slow,
    pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here"),
]

SAVE = """
import json, sys, numpy, torch, vit
from vit.bench.weights import seeded_state
model = vit.create("vit_tiny_patch16_224", backend="reference", img_size=32, depth=2, num_classes=10, training=False)
model.load_state_dict(seeded_state(model.state_dict()))
tensor = torch.from_numpy(numpy.fromfile(f"{sys.argv[1]}/tensor.f32", numpy.float32)).reshape(1, 3, 32, 32)
best = {}
for dtype in ("float32", "bfloat16", "int8"):
    engine = vit.Engine(model, dtype)
    engine.save(f"{sys.argv[1]}/{dtype}.vit")
    top = engine(tensor).softmax(-1)[0].topk(5)
    best[dtype] = list(zip(top.indices.tolist(), top.values.tolist()))
json.dump(best, open(f"{sys.argv[1]}/best.json", "w"))
"""


def build(folder: Path, *options: str) -> Path:
    """The folder with classify_static and classify_shared."""
    warnings = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"
    for command in (["-S", ROOT / "examples/c", "-B", folder, "-G", "Ninja", warnings, *options], ["--build", folder]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def files(folder: Path, level: str) -> Path:
    """Engine files of a small model for a level, pictures, a tensor and the best classes the Python engine gives it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.ppm")
    Image.fromarray(pixels).save(folder / "picture.png")
    rng.standard_normal((3, 32, 32), dtype=np.float32).tofile(folder / "tensor.f32")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "VIT_CPU_ISA": level}
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], env=environment, check=True)
    return folder


def run(program: Path, *arguments: object, level: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*prefix, str(program), *map(str, arguments)],
        env=os.environ | {"VIT_CPU_ISA": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def check_programs(folder: Path, data: Path, level: str, prefix: tuple[str, ...] = ()) -> None:
    """Good input gives the Python engine's classes, bad input an error text and exit code 1."""
    best = json.loads((data / "best.json").read_text())
    for dtype, program in (("float32", "static"), ("bfloat16", "shared"), ("int8", "static")):
        done = run(
            folder / f"classify_{program}", data / f"{dtype}.vit", data / "tensor.f32", level=level, prefix=prefix
        )
        assert done.returncode == 0, done.stderr
        got = [(int(line.split()[1]), float(line.split()[2])) for line in done.stdout.splitlines()]
        # Other compiler options contract other products: where activations are rounded, some fall to the other side.
        # At most a unit of the last printed digit, a quarter of bfloat16's rounding, a step of 127.
        close = {"float32": 1e-4, "bfloat16": 2**-9, "int8": 1 / 127}[dtype]
        assert got[0][0] == best[dtype][0][0]
        assert [p for _, p in got] == pytest.approx([p for _, p in best[dtype]], abs=close)
    pictures = [
        run(folder / "classify_static", data / "float32.vit", data / f"picture.{kind}", level=level, prefix=prefix)
        for kind in ("ppm", "png")
    ]
    assert pictures[0].returncode == 0, pictures[0].stderr
    assert pictures[0].stdout == pictures[1].stdout or "without libpng" in pictures[1].stderr

    engine = (data / "float32.vit").read_bytes()
    (data / "truncated.vit").write_bytes(engine[: len(engine) // 2])
    (data / "nan.f32").write_bytes(np.full((3, 32, 32), np.nan, np.float32).tobytes())
    (data / "short.f32").write_bytes(b"abcd")
    (data / "short.ppm").write_bytes((data / "picture.ppm").read_bytes()[:99])
    for model_file, picture, message in (
        ("truncated.vit", "tensor.f32", "truncated"),
        ("picture.ppm", "tensor.f32", "not an engine file"),
        ("absent.vit", "tensor.f32", "cannot open"),
        ("float32.vit", "nan.f32", "NaN"),
        ("float32.vit", "short.f32", "one float32 for each"),
        ("float32.vit", "short.ppm", "is truncated"),
        ("float32.vit", "float32.vit", "not a binary PPM"),
    ):
        done = run(folder / "classify_static", data / model_file, data / picture, level=level, prefix=prefix)
        assert done.returncode == 1, done.stderr
        assert message in done.stderr


def test_c_example_under_address_sanitizer(tmp_path):
    folder = build(tmp_path / "build", "-DVIT_SANITIZE=ON")
    for level in LEVELS:
        check_programs(folder, files(tmp_path / level, level), level)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_c_example_under_valgrind(tmp_path):
    """valgrind's processor has no AVX-512: the highest level it can run is taken."""
    folder = build(tmp_path / "build")
    prefix = ("valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite")
    program = folder / "classify_static"
    probe = run(program, files(tmp_path / "probe", "baseline") / "float32.vit", "", level="unknown", prefix=prefix)
    known = re.search(r"this machine and build have (.*);", probe.stderr)
    assert known, probe.stderr
    level = known[1].split(", ")[-1]
    check_programs(folder, files(tmp_path / "data", level), level, prefix)
