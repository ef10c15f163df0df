"""Runs build_backend/native.py where setuptools builds extension modules; the rest is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))

import native


class BuildBackends(build_ext):
    """Build every backend with CMake: into the wheel's folder, or (editable) next to the Python files."""

    def run(self) -> None:
        try:
            records = native.build(self._package(self.inplace), Path(self.build_temp).absolute())
        except native.BuildError as error:
            raise CompileError(str(error)) from None
        for name, record in records.items():
            print(f"vit: {name}: {'built' if record.built else f'skipped: {record.reason}'}", flush=True)

    def get_outputs(self) -> list[str]:
        package = self._package(inplace=False)
        return [str(package / file.name) for file in native.outputs(self._package(self.inplace))]

    def get_output_mapping(self) -> dict[str, str]:
        sources = native.outputs(self._package(inplace=True)) if self.inplace else []
        return {str(self._package(inplace=False) / file.name): str(file) for file in sources}

    def _package(self, inplace: bool) -> Path:
        if inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir("vit")).absolute()
        return Path(self.build_lib).absolute() / "vit"


setup(
    ext_modules=[Extension(f"vit._{name}", sources=[]) for name in native.backends()],
    cmdclass={"build_ext": BuildBackends},
)
