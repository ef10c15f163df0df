"""Runs build_backend/native.py where setuptools builds extension modules; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))

import native  # noqa: E402 - found through the line above


class BuildBackends(build_ext):
    """Build every backend with CMake, next to the Python files (editable) or into the wheel's folder."""

    def run(self) -> None:
        try:
            records = native.build(self._package(self.inplace), Path(self.build_temp).absolute())
        except native.BuildError as error:
            raise CompileError(str(error)) from None
        for name, record in records.items():
            print(f"vit: {name}: {'built' if record.built else f'skipped: {record.reason}'}", flush=True)

    def get_outputs(self) -> list[str]:
        return [str(self._package(False) / file.name) for file in self._built()]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(self._package(False) / file.name): str(file) for file in self._built() if self.inplace}

    def _package(self, inplace: bool) -> Path:
        if inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir("vit")).absolute()
        return Path(self.build_lib).absolute() / "vit"

    def _built(self) -> list[Path]:
        folder = self._package(self.inplace)
        names = ["_build", *native.backends()]
        return [
            file for name in names for file in folder.glob(f"{name if name == '_build' else '_' + name}.*")
        ]


setup(
    ext_modules=[Extension(f"vit._{name}", sources=[]) for name in native.backends()],
    cmdclass={"build_ext": BuildBackends},
)
