"""Sdist, wheel and editable installs, and what becomes of backends that cannot be built.

The builds run on a copy of the source tree whose csrc/ is replaced by a stand-in: what is tested is how
setup.py drives compilers and what it packs, and two small C++ files make that seconds instead of minutes. The
real sources were built by the installation these tests run in.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFTOVERS = ("build", "dist", "site", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__", ".*_cache", ".venv*")
VERSION = re.compile(r'^version = "(.+)"$', re.MULTILINE)
BUILD_SWITCHES = {"VIT_BACKENDS", "CMAKE_ARGS", "MAX_JOBS", "PYTHONPATH"}
BINDINGS = """
#include <Python.h>
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
#define TEXT(name) #name
#define NAME(name) TEXT(name)
int answer();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, NAME(VIT_MODULE), nullptr, -1, nullptr};
PyMODINIT_FUNC INIT(VIT_MODULE)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", answer());
  PyModule_AddIntConstant(module, "contract", -1);
  return module;
}
"""
ANSWER = """
#ifndef ANSWER
#define ANSWER 42
#endif
int answer() { return ANSWER; }
"""


def add_backend(tree: Path, name: str, kernels: str) -> None:
    folder = tree / "csrc" / name
    folder.mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text("target_sources(vit_module PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/kernels.cpp)")
    (folder / "kernels.cpp").write_text(kernels)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree with one stand-in backend, cpu."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *LEFTOVERS))
    shutil.rmtree(copy / "csrc")
    add_backend(copy, "cpu", ANSWER)
    (copy / "csrc/bindings.cpp").write_text(BINDINGS)
    return copy


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in BUILD_SWITCHES}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    env = clean | {"PATH": path} | environment
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, text=True, capture_output=True)


def pip(*arguments: object, tree: Path, python: object = sys.executable, **environment: str) -> str:
    """Run pip without network; returns its output, raises AssertionError with it when pip fails."""
    command = [python, "-m", "pip", "-v", *arguments, "--no-index", "--no-deps", "--no-build-isolation"]
    result = run(*command, cwd=tree, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def build_wheel(tree: Path, **environment: str) -> Path:
    out = tree.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    pip("wheel", "-w", out, ".", tree=tree, **environment)
    (wheel,) = out.iterdir()
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def records(wheel: Path) -> dict[str, dict[str, Any]]:
    return json.loads(contents(wheel)["vit/_build.json"])


def modules(wheel: Path) -> list[str]:
    return sorted(name.split(".")[0] for name in contents(wheel) if name.endswith(".so"))


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment that borrows torch and the build tools from this one."""
    folder = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path).returncode == 0
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "bin/python"


REPORT = """
import importlib, json, vit
try:
    answer = importlib.import_module("vit._cpu").answer
except ModuleNotFoundError:
    answer = None
print(json.dumps({"file": vit.__file__, "version": vit.__version__, "answer": answer} | vit.backends(), default=str))
"""


def report(python: Path) -> dict[str, Any]:
    """What the vit of that interpreter says: where it is, what its cpu module answers, and its backends."""
    result = run(python, "-W", "error", "-c", REPORT, cwd=python.parent)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def git_files(*folders: str) -> set[str]:
    """The repository's files below `folders`; of an unpacked sdist, which has no git, all that lie there."""
    listed = run("git", "ls-files", *folders, cwd=ROOT)
    names = listed.stdout.split() if listed.returncode == 0 else []
    found = [ROOT / name for name in names] or [p for d in folders for p in (ROOT / d).rglob("*")]
    return {str(p.relative_to(ROOT)) for p in found if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_equals_one_built_from_the_tree(tree: Path) -> None:
    command = "import sys; sys.path.insert(0, 'build_backend'); import hooks; hooks.build_sdist('dist')"
    result = run(sys.executable, "-c", command, cwd=tree)
    assert result.returncode == 0, result.stderr
    (sdist,) = (tree / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tree.parent)
    wanted = git_files("build_backend", "python", "tests", "docs", "examples", "benchmarks", "mkdocs.yml", "LICENSE")
    wanted |= {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*.*")}
    wanted |= {"CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"}
    assert wanted - packed == set()
    assert [name for name in packed if name.endswith((".so", ".pyc", "_build.json"))] == []

    from_tree = contents(build_wheel(tree))
    from_sdist = contents(build_wheel(tree.parent / sdist.name.removesuffix(".tar.gz")))
    assert sorted(from_tree) == sorted(from_sdist)
    assert [name for name in from_tree if name.endswith(".py") and from_tree[name] != from_sdist[name]] == []
    assert {"vit/py.typed", "vit/_build.json", "vit/__init__.py"} <= from_tree.keys()
    assert {name.partition("/")[0].partition("-")[0] for name in from_tree} == {"vit", "vit_kernels"}


@pytest.mark.slow
def test_install_into_a_fresh_environment(tree: Path, fresh_python: Path) -> None:
    # The borrowed packages may hold a vit of this version: without the option pip would find nothing to do.
    pip("install", "--ignore-installed", build_wheel(tree), tree=tree, python=fresh_python)
    vit = report(fresh_python)
    assert Path(vit["file"]).is_relative_to(fresh_python.parent.parent)
    assert vit["version"] == re.search(VERSION, (tree / "pyproject.toml").read_text())[1]
    assert vit["answer"] == 42
    assert vit["cpu"]["available"] is False
    assert "contract -1" in vit["cpu"]["reason"], "a module of another contract number must be refused"
    assert vit["reference"]["available"] is True
    assert os.access(fresh_python.parent / "vit", os.X_OK)


@pytest.mark.slow
def test_editable_install_builds_in_place_and_drops_what_no_longer_builds(tree: Path, fresh_python: Path) -> None:
    package = tree / "python/vit"
    pip("install", "--ignore-installed", "-e", ".", tree=tree, python=fresh_python)
    vit = report(fresh_python)
    assert Path(vit["file"]).parent == package
    assert vit["answer"] == 42
    pip("install", "--ignore-installed", "-e", ".", tree=tree, python=fresh_python, CXX="/bin/false")
    assert list(package.glob("_cpu*")) == []
    vit = report(fresh_python)
    assert vit["answer"] is None
    assert vit["cpu"]["available"] is False
    assert "/bin/false" in vit["cpu"]["reason"]
    assert vit["reference"]["available"] is True


@pytest.mark.slow
def test_one_broken_backend_leaves_the_others(tree: Path) -> None:
    add_backend(tree, "other", '#error "this compiler is not the right one"')
    wheel = build_wheel(tree)
    found = records(wheel)
    assert modules(wheel) == ["vit/_cpu"]
    assert found["cpu"]["built"] is True
    assert found["cpu"]["compiler"]
    assert found["cpu"]["bytes"] > 1000
    assert found["other"]["built"] is False
    assert "this compiler is not the right one" in found["other"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_an_unusable_compiler_is_a_reason_and_never_a_failed_build(tree: Path, compiler: str) -> None:
    wheel = build_wheel(tree, CXX=compiler)
    assert modules(wheel) == []
    assert compiler in records(wheel)["cpu"]["reason"]


@pytest.mark.slow
def test_a_named_backend_that_does_not_build_is_an_error(tree: Path) -> None:
    add_backend(tree, "other", '#error "this compiler is not the right one"')
    with pytest.raises(AssertionError, match=r"cannot be built here.*\n.*not the right one"):
        build_wheel(tree, VIT_BACKENDS="cpu,other")
    with pytest.raises(AssertionError, match=r"VIT_BACKENDS names tpu; .* cpu, other, reference"):
        build_wheel(tree, VIT_BACKENDS="cpu,tpu")
    assert [modules(build_wheel(tree, VIT_BACKENDS=name)) for name in ("cpu", "reference")] == [
        ["vit/_cpu"],
        [],
    ]
    assert records(build_wheel(tree, VIT_BACKENDS="reference"))["cpu"]["reason"] == "not named in VIT_BACKENDS"


@pytest.mark.slow
def test_cmake_args_and_max_jobs_are_honoured(tree: Path) -> None:
    wheel = build_wheel(tree, CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-DANSWER=7 -DSPACE' -DVIT_UNUSED=1", MAX_JOBS="1")
    assert records(wheel)["cpu"]["flags"].startswith("-DANSWER=7 -DSPACE")
    with pytest.raises(AssertionError, match="MAX_JOBS is 'many'"):
        build_wheel(tree, MAX_JOBS="many")


@pytest.fixture
def build_modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The modules of build_backend/: native and hooks."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    return importlib.import_module("native"), importlib.import_module("hooks")


def test_other_platforms_get_the_reference_only(
    build_modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native, _ = build_modules
    monkeypatch.setattr(native, "backends", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(native.sys, "platform", "darwin")
    monkeypatch.setattr(native.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(native.platform, "machine", lambda: "arm64")
    monkeypatch.delenv("VIT_BACKENDS", raising=False)
    reason = "native backends need Linux on x86_64 or aarch64, this is Darwin arm64"
    assert {record.reason for record in native.build(tmp_path / "vit", tmp_path / "work").values()} == {reason}
    assert "Darwin arm64" in (tmp_path / "vit/_build.json").read_text()


def test_compilers_are_fetched_only_for_a_named_backend(
    build_modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    native, hooks = build_modules
    monkeypatch.setattr(native, "backends", lambda: ["cpu", "cuda", "mojo", "sycl"])
    monkeypatch.setattr(native, "find_nvcc", lambda: None)
    monkeypatch.setattr(native, "find_mojo", lambda: None)
    monkeypatch.setattr(native, "find_sycl", lambda: None)
    monkeypatch.delenv("VIT_BACKENDS", raising=False)
    plain = hooks.get_requires_for_build_wheel()
    monkeypatch.setenv("VIT_BACKENDS", "cpu,sycl")
    assert [r for r in hooks.get_requires_for_build_wheel() if r not in plain] == hooks.SYCL_HEADERS
    monkeypatch.setenv("VIT_BACKENDS", "cpu,mojo")
    assert [r for r in hooks.get_requires_for_build_wheel() if r not in plain] == hooks.MOJO_COMPILER
    monkeypatch.setattr(native, "find_mojo", lambda: Path("/usr/bin/mojo"))
    assert hooks.get_requires_for_build_wheel() == plain
    monkeypatch.setenv("VIT_BACKENDS", "cuda")
    assert [r for r in hooks.get_requires_for_build_editable() if r not in plain] == hooks.CUDA_COMPILER
    monkeypatch.setattr(native, "find_nvcc", lambda: Path("/usr/bin/nvcc"))
    assert hooks.get_requires_for_build_wheel() == plain


def test_only_the_mojo_compiler_of_one_version_is_taken(
    build_modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    native, _ = build_modules
    monkeypatch.setattr(native.sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert native.find_mojo() is None
    compiler = tmp_path / "bin/mojo"
    compiler.parent.mkdir()
    for version, found in [("1.1.0", None), ("1.2.10", None), (native.MOJO_VERSION, compiler)]:
        compiler.write_text(f"#!/bin/sh\necho 'Mojo {version} (2016d0cd)'\n")
        compiler.chmod(0o755)
        assert native.find_mojo() == found
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert native.find_mojo() is None
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native.sys, "platform", "linux")
    with pytest.raises(native.BuildError, match=r"no Mojo 1\.2\.0 .* name mojo in VIT_BACKENDS"):
        native._toolchain("mojo")
    assert f"set(wanted {native.MOJO_VERSION})" in (ROOT / "csrc/mojo/CMakeLists.txt").read_text()


def test_hooks_and_continuous_integration_run_the_same_tool_versions() -> None:
    pins = set(re.findall(r'"((?:ruff|clang-format|typos|mypy)==[\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    hooks = re.findall(r'additional_dependencies: \["([^"]+)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pins) == 4
    assert set(hooks) <= pins
    assert {hook.partition("==")[0] for hook in hooks} == {"ruff", "clang-format", "typos"}
