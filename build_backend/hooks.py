"""The build backend: setuptools, plus the compiler wheels that only some builds need.

`pip install .` asks for nothing extra. The CUDA compiler (on a machine without nvcc), the Mojo compiler and the SYCL
headers are 85 to 200 MB: they become build requirements only when VIT_BACKENDS names that backend.
"""

from __future__ import annotations

from typing import Any

import native
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are

CUDA_COMPILER = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
# The oldest runtime that the `sycl` extra accepts: a module linked with it loads with every later one.
SYCL_HEADERS = ["intel-sycl-rt==2026.0.0"]
MOJO_COMPILER = [f"mojo-compiler=={native.MOJO_VERSION}"]


def _extra_requirements() -> list[str]:
    wanted = native.requested() or []
    extra = []
    if "cuda" in wanted and native.find_nvcc() is None:
        extra += CUDA_COMPILER
    if "sycl" in wanted and native.find_sycl() is None:
        extra += SYCL_HEADERS
    if "mojo" in wanted and native.find_mojo() is None:
        extra += MOJO_COMPILER
    return extra


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """The requirements of setuptools and those of the backends named in VIT_BACKENDS."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _extra_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _extra_requirements()
