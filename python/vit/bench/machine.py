"""The machine and the software a figure was measured on: without them it means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast matrix products are, as /proc/cpuinfo calls them.
FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The processor and what limits it; "unknown" or None for what the system does not tell."""
    fields = cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": processor(),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_quota": _read("/sys/fs/cgroup/cpu.max"),  # CPU time per period in microseconds, "max": no limit
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "mhz_now": fields.get("cpu MHz", "unknown"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "virtual": "hypervisor" in flags,
        "load_before": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def processor() -> str:
    """The processor's name with family and model: virtual machines call Zen 4 and Zen 5 alike "AMD EPYC"."""
    fields = cpuinfo()
    try:
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except KeyError:
        return platform.processor() or platform.machine() or "unknown"


def cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo, of its last processor; empty where there is none."""
    text = _read("/proc/cpuinfo")
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value}


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """A backend's record with files by their names alone: a published figure needs no folders of the machine."""
    return {key: _FOLDERS.sub("", value) if isinstance(value, str) else value for key, value in record.items()}


_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/()]+/)*")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"
