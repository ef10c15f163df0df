"""How many processor cores this process may use, and how many of them nothing else uses."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """The cores of the process's affinity mask, or of its control group's quota (version 1 or 2), if that is less."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_quota(root)
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def free_cores(root: Path = Path("/")) -> int:
    """The available cores less the share of the machine that was busy in the last minute; at least 1.

    The load average counts the whole machine, so it is taken as a share of all its cores.
    """
    available = available_cores(root)
    busy = min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return max(1, round(available * (1.0 - busy)))


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process allow, the least of its ancestors'; None: no limit.

    In a container the group's own path may lie outside of what is mounted; then the mount's root is the group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            mounts, read = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"], _quota_v1
        else:
            continue
        for mount in mounts:
            steps = [part for part in group.split("/") if part and part != ".."]
            for count in range(len(steps), -1, -1):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(read((root / mount).joinpath(*steps[:count])))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
