"""How many processor cores this process may use."""

import math
import os
from pathlib import Path

from common.cgroups import cgroups_of


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by the process' affinity and by the CPU quota of its cgroups, at least one.

    Args:
        root: of the file system that describes the cgroups.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, math.ceil(min(_quotas(root), default=cores))))


def _quotas(root: Path) -> list[float]:
    """Cores that each cgroup of this process grants, where it has a quota."""
    try:
        found = [_quota(cgroup.folder) for cgroup in cgroups_of(root, "cpu")]
    except (OSError, UnicodeDecodeError):
        return []
    return [quota for quota in found if quota > 0]


def _quota(folder: Path) -> float:
    """Cores that one cgroup grants; 0 without a quota."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return max(0.0, float(quota) / float(period))
    except (OSError, ValueError, ZeroDivisionError):  # `max` is no number
        return 0.0
