"""benchmarks/gpu without a GPU: every part runs to its end on small sizes, on the reference."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """The modules of benchmarks/gpu, on the CPU: graphs are calls, and each takes 1000 s: one is timed."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("timing", "report", "ops", "models", "parity")
    modules: dict[str, ModuleType] = {name: importlib.import_module(f"benchmarks.gpu.{name}") for name in names}
    timing, ops, models = modules["timing"], modules["ops"], modules["models"]

    def timed(run_all, count):
        run_all()
        return 1e6

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "BACKEND", "reference")
    monkeypatch.setattr(timing, "ROTATION_BYTES", 0)
    monkeypatch.setattr(timing, "_timed", timed)
    monkeypatch.setattr(timing, "_set_path", lambda name: timing.PATHS[name])
    monkeypatch.setattr(timing, "capture", lambda work, warm_up: (warm_up(), work(), SimpleNamespace(replay=work))[2])
    monkeypatch.setattr(models.vit, "create", functools.partial(vit.create, depth=1))
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    small = {"B": ("vit_tiny_patch16_224", 192, 3, 197, 2)}
    monkeypatch.setattr(models, "MODELS", small)
    monkeypatch.setattr(ops, "MODELS", small)
    for name, value in {"CEILING": 64, "ELEMENTS": 1 << 12, "WIDTHS": (64,), "TOKENS": (50,), "IMAGES": 2}.items():
        monkeypatch.setattr(ops, name, value)
    return SimpleNamespace(**modules)


def make_report(gpu, out: Path, only: str | None = None, seconds: float = 600, part: str = "ops"):
    return gpu.report.Report(part, seconds, only, out, {"device": "none"})


def rows(out: Path, part: str = "ops") -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(out.read_text())[part]["results"]}


def test_ops(gpu, tmp_path):
    report = make_report(gpu, tmp_path / "gpu.json")
    gpu.ops.part_ops(report)
    found = rows(tmp_path / "gpu.json")
    assert not report.failed
    assert all("failed" not in row and "not_run" not in row for row in found.values())
    attention = found["attention B=7 N=50 H=12 D=64 fwd"]
    assert {"ours_ms", "portable_ms", "no_wgmma_ms", "flash_ms", "TF_s", "TB_s", "speedup"} <= set(attention)
    assert attention["speedup"] == 1  # every call takes as long; our other paths are no rivals
    assert {f"linear B {layer}" for layer in ("qkv", "proj", "fc1", "fc2")} == {
        " ".join(name.split()[:3]) for name in found if name.startswith("linear")
    }
    assert len([name for name in found if name.endswith(" bwd")]) == 1 + 2 + 4 + 2


def test_the_newest_backward_races_the_present_one(gpu, tmp_path, monkeypatch):
    report = make_report(gpu, tmp_path / "gpu.json", only="^attention")
    calls = []
    monkeypatch.setattr(gpu.timing, "_set_path", calls.append)
    gpu.timing.choose("wgmma_backward")
    try:
        gpu.ops.part_ops(report)
        assert gpu.parity.labels() == ["wgmma_backward"]
    finally:
        gpu.timing.choose("automatic")
    assert {"ours_ms", "wgmma_backward_ms", "TF_s"} <= set(
        rows(tmp_path / "gpu.json")["attention B=7 N=50 H=12 D=64 bwd race"]
    )
    assert "automatic" in calls[1:-1]
    assert "wgmma_backward" not in gpu.parity.labels()
    assert "automatic" in gpu.parity.labels()


def test_models(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    report = make_report(gpu, tmp_path / "gpu.json", part="model")
    gpu.models.part_model(report)
    found = rows(tmp_path / "gpu.json", "model")
    assert not report.failed
    assert set(found) == {"inference B batch 2", "latency B batch 1", "training B batch 2"}
    assert found["inference B batch 2"]["ours_images_s"] == 0.002
    assert {"ours_ms", "eager_ms", "compiled_ms", "engine_ms"} <= set(found["latency B batch 1"])


def test_parity(gpu, tmp_path):
    report = make_report(gpu, tmp_path / "gpu.json", only="deterministic|graph", part="parity")
    gpu.parity.part_parity(report, 1, 0)
    assert {"deterministic", "same_in_a_graph", "parity no_wgmma"} <= set(rows(tmp_path / "gpu.json", "parity"))
    report = make_report(gpu, tmp_path / "gpu.json", only="gelu-fwd-float32-m17", part="parity")
    gpu.parity.part_parity(report, 1, 1)
    found = rows(tmp_path / "gpu.json", "parity")
    assert found["deterministic"]["ok"]  # what --only leaves out stays in the file
    assert found["parity automatic"]["passed"] > 0
    assert found["parity automatic"]["failed_cases"] == 0


def test_a_wrong_kernel_fails_the_report(gpu, tmp_path, monkeypatch):
    wrong = SimpleNamespace(gelu=lambda x, approximate="none": x)
    monkeypatch.setattr(gpu.parity, "backend_ops", lambda name: wrong)
    report = make_report(gpu, tmp_path / "gpu.json", only="gelu-fwd-float32-m17", part="parity")
    gpu.parity.part_parity(report, 1, 1)
    assert report.failed
    assert json.loads((tmp_path / "gpu.json").read_text())["parity"]["failed"]


def test_what_there_is_no_time_for_is_listed(gpu, tmp_path):
    report = make_report(gpu, tmp_path / "gpu.json", seconds=-1)
    gpu.ops.part_ops(report)
    gpu.parity.part_parity(report, 50, 0)
    found = rows(tmp_path / "gpu.json")
    assert found["copy"] == {"name": "copy", "not_run": "out of time"}
    assert "--first 0" in found["parity portable rest"]["not_run"]


@pytest.mark.parametrize(
    ("script", "row", "failed"),
    [
        ("exit 0", {"ok": True}, False),
        ("exit 7", {"failed": "exit code 7: "}, True),
        ("echo Device not supported", {"not_run": "compute-sanitizer refuses this device"}, False),
    ],
)
def test_sanitizer(gpu, tmp_path, monkeypatch, script, row, failed):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpu.parity, "guard_bytes", lambda report, why: report.add("memcheck", not_run=why))
    report = make_report(gpu, tmp_path / "gpu.json", part="sanitizer")
    gpu.parity.part_sanitizer(report)
    assert row.items() <= rows(tmp_path / "gpu.json", "sanitizer")["memcheck"].items()
    assert report.failed == failed


def test_without_a_gpu_it_says_so(gpu, capsys, monkeypatch):
    main = importlib.import_module("benchmarks.gpu.__main__")
    monkeypatch.setattr(main, "get", lambda name: SimpleNamespace(unavailable=lambda: "no GPU"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--part", "ops"])
    assert main.main() == 1
    assert "backend 'reference' cannot be used: no GPU" in capsys.readouterr().err


def test_an_error_of_the_gpu_ends_a_part_and_is_kept(gpu, tmp_path, monkeypatch):
    main = importlib.import_module("benchmarks.gpu.__main__")

    def part(report):
        report.add("first", ok=True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(main.PARTS, "ops", part)
    monkeypatch.setattr(main, "environment", lambda commit: {})
    monkeypatch.setattr(sys, "argv", ["gpu", "--part", "ops", "--out", str(tmp_path / "a.json"), "--path", "no_wgmma"])
    try:
        assert main.main() == main.CRASHED
        assert gpu.timing.chosen() == "no_wgmma"
        with gpu.timing.path("portable"):
            assert gpu.timing.chosen() == "portable"
        assert gpu.timing.chosen() == "no_wgmma"
    finally:
        gpu.timing.choose("automatic")
    found = rows(tmp_path / "a.json")
    assert found["first"]["ok"]
    assert "illegal memory access" in found["crash"]["failed"]


def test_figures_are_kept_before_the_next_compilation(gpu, tmp_path):
    report = make_report(gpu, tmp_path / "gpu.json", part="model")
    report.end = 0
    gpu.models.inference(report, "B")
    (row,) = rows(tmp_path / "gpu.json", "model").values()
    assert {"ours_images_s", "eager_images_s", "speedup"} <= set(row)
    assert "compiled_images_s" not in row


def test_a_failed_training_fails_the_report(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = make_report(gpu, tmp_path / "gpu.json", part="train")
    gpu.models.part_train(report)
    assert report.failed
    assert rows(tmp_path / "gpu.json", "train")["train cpu"] == {"name": "train cpu", "failed": "exit code 1: "}


@pytest.fixture
def steps(monkeypatch) -> ModuleType:
    """benchmarks/gpu/steps.py with a build and steps that take no time: the last argument is a program."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.gpu.steps")
    monkeypatch.setattr(module, "GRACE", 0)
    run = module.run
    monkeypatch.setattr(module, "run", lambda c, seconds: run([c[0], "-c", c[2 if c[1] == "-c" else 3]], seconds))
    monkeypatch.setattr(module, "ROOT", ROOT / "tests")  # nothing is built there
    monkeypatch.setattr(module, "START", "")
    built = iter([False])
    monkeypatch.setattr(module, "built", lambda: next(built, True))  # by then it is
    return module


def test_the_run_goes_on_after_a_step_that_fails_or_hangs(steps, tmp_path, monkeypatch):
    out = tmp_path / "h200" / "gpu.json"
    wrote = f"import pathlib, json; p = pathlib.Path({str(out)!r}); c = json.loads(p.read_text()) | {{'ops': 1}}"
    programs = {
        "build": "import os; assert os.environ['VIT_BACKENDS'] == 'cpu,cuda'",
        "fails": "import sys; sys.exit('illegal memory access')",
        "hangs": "import subprocess; subprocess.run(['sleep', '60'])",
        "works": f"{wrote}; p.write_text(json.dumps(c))",
    }
    monkeypatch.setattr(steps, "BUILD", programs.pop("build"))
    monkeypatch.setattr(steps, "STEPS", [steps.Step(name, 2, (text,)) for name, text in programs.items()])
    assert steps.run_steps(out, minutes=1) == 1
    content = json.loads(out.read_text())
    assert content["ops"] == 1
    codes = {name: row["code"] for name, row in content["steps"].items()}
    assert codes == {"start": 0, "build": 0, "fails": 1, "hangs": -9, "works": 0}
    assert "illegal memory access" in content["steps"]["fails"]["tail"]
    assert "ended after 2 s" in content["steps"]["hangs"]["tail"]
    monkeypatch.setattr(steps, "STEPS", [*steps.STEPS, steps.Step("new", 2, ("pass",))])
    assert steps.run_steps(out, minutes=1) == 0  # only what is new
    assert "new" in json.loads(out.read_text())["steps"]


def test_the_run_ends_with_a_failed_build_and_starts_nothing_it_has_no_time_for(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "STEPS", [steps.Step("long", 100, ("pass",)), steps.Step("probe", 2, ("",), "sys")])
    monkeypatch.setattr(steps, "BUILD", "raise SystemExit('cpu: no g++')")
    assert steps.run_steps(tmp_path / "a.json", minutes=0.5) == 0  # cuda was built
    assert list(json.loads((tmp_path / "a.json").read_text())["steps"]) == ["start", "build", "probe"]
    monkeypatch.setattr(steps, "built", lambda: False)
    assert steps.run_steps(tmp_path / "b.json", minutes=5) == 1
    assert list(json.loads((tmp_path / "b.json").read_text())["steps"]) == ["start", "build", "probe"]


def test_the_run_ends_where_torch_has_no_gpu(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "START", "raise SystemExit('no GPU')")
    assert steps.run_steps(tmp_path / "a.json", minutes=5) == 1
    (row,) = json.loads((tmp_path / "a.json").read_text())["steps"].values()
    assert row["tail"] == "no GPU\n"


def test_the_steps_are_known_and_fit(steps, gpu):
    main = importlib.import_module("benchmarks.gpu.__main__")
    for step in steps.STEPS:
        assert importlib.util.find_spec(step.module)
        if step.module != steps.Step.module:
            continue
        options = dict(zip(step.arguments[::2], step.arguments[1::2], strict=True))
        assert options["--part"] in ("parity", *main.PARTS)
    assert sum(step.seconds for step in steps.STEPS) + 60 * 2 <= 30 * 60
    assert sum(step.seconds for step in steps.STEPS[:6]) + 60 <= 9 * 60
    assert set(steps.TRUSTED) <= {step.name for step in steps.STEPS}


@pytest.mark.parametrize(
    ("done", "path"),
    [
        ({}, []),
        ({"probe": 0, "promises": 1, "parity of wgmma": 1}, []),
        ({"probe": 2}, []),  # not compiled
        ({"probe": 1}, ["--path", "no_wgmma"]),
        ({"probe": 0, "parity of wgmma": 3}, ["--path", "no_wgmma"]),
        ({"probe": 0, "promises": -9}, ["--path", "no_wgmma"]),
        ({"probe": 0, "ops of B": 3}, []),
    ],
)
def test_doubtful_kernels_are_left_out(steps, tmp_path, monkeypatch, done, path):
    out, commands = tmp_path / "a.json", []
    out.write_text(json.dumps({"steps": {name: {"code": code} for name, code in done.items()}}))
    monkeypatch.setattr(steps, "STEPS", [steps.Step("next", 10, ("--part", "ops")), steps.STEPS[0]])
    monkeypatch.setattr(steps, "BUILD", "")
    monkeypatch.setattr(steps, "run", lambda command, seconds: commands.append(command) or {"code": 0})
    assert steps.run_steps(out, minutes=1) == 0
    assert commands[2][7:] == ["--seconds", "10", *path]
    assert all("--path" not in command for command in commands[3:])  # the probe knows no paths


@pytest.mark.parametrize(("probe", "commands"), [(0, 3), (1, 2)])
def test_the_newest_kernel_has_steps_of_its_own(steps, tmp_path, monkeypatch, probe, commands):
    """None of them where all kernels of wgmma are in doubt."""
    out, found = tmp_path / "a.json", []
    out.write_text(json.dumps({"steps": {"probe": {"code": probe}}}))
    monkeypatch.setattr(steps, "STEPS", [steps.Step("newest", 10, ("--part", "ops", *steps.NEWEST))])
    monkeypatch.setattr(steps, "BUILD", "")
    monkeypatch.setattr(steps, "run", lambda command, seconds: found.append(command) or {"code": 0})
    assert steps.run_steps(out, minutes=1) == 0
    assert len(found) == commands


#: A program in the place of the probes: "good", "bad", "hangs".
PROBES = """#!/bin/sh
case "$1" in
  "") echo good; echo hangs; echo bad ;;
  good) ;;
  hangs) sleep 60 ;;
  bad) echo "3 of 64 wrong"; exit 1 ;;
esac
"""


def test_each_probe_is_on_its_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    probe = importlib.import_module("benchmarks.gpu.probe")

    def compile_probes(program):
        program.write_text(PROBES)
        program.chmod(0o755)
        return ""

    monkeypatch.setattr(probe, "compile_probes", compile_probes)
    monkeypatch.setattr(probe, "SECONDS_EACH", 0.5)
    out = tmp_path / "a.json"
    monkeypatch.setattr(sys, "argv", ["probe", "--out", str(out)])
    assert probe.main() == 1
    found = rows(out, "probe")
    assert found["good"]["ok"]
    assert found["hangs"]["failed"] == "hangs: ended after 0.5 s"
    assert found["bad"]["failed"] == "exit code 1: 3 of 64 wrong"


def test_probes_that_do_not_compile_say_nothing_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    probe = importlib.import_module("benchmarks.gpu.probe")
    monkeypatch.setattr(probe, "compile_probes", lambda program: "no nvcc")
    monkeypatch.setattr(sys, "argv", ["probe", "--out", str(tmp_path / "a.json")])
    assert probe.main() == 2
    assert rows(tmp_path / "a.json", "probe")["compile"]["not_run"] == "no nvcc"
