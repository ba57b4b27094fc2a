"""Reads how much memory this process may use on this machine."""

import os
from pathlib import Path
from typing import Literal

import psutil

from common.cgroups import cgroups_of
from common.errors import DataError
from common.units import Size
from ssl_core.planning.device import AUTO, DeviceProfile
from ssl_core.planning.step_plan import Precision

_UNLIMITED = 2**60
"""Cgroups version 1 report a limit of at least this if there is none."""


def this_machine(root: Path = Path("/")) -> DeviceProfile:
    """Read how much memory this process may use beside all other running programs.

    This is the least of the kernel's available memory and the free memory of every memory cgroup of
    this process (version 1 and 2, up to the root), or the free memory of the first GPU. Memory that
    this process already holds counts as free.

    Args:
        root: parent folder of `proc` and `sys`.

    Raises:
        DataError: a cgroup file cannot be read; the message names it.
    """
    import torch

    from ssl_core.planning.processor import cpu_precisions
    from ssl_core.wav2vec2 import device_kernels

    own = psutil.Process().memory_info().rss
    available = psutil.virtual_memory().available
    sources = {"memory": "available memory of this machine"}
    for path, left in _free_in_cgroups(root):
        if left < available:
            available = left
            sources = {"memory": f"limit of the memory cgroup {path}"}
    memory, clientapp = available + own, max(own, _CLIENTAPP)
    if not torch.cuda.is_available():
        precisions: tuple[Precision, ...] = cpu_precisions()
        accelerator: Literal["cpu", "cuda"] = "cpu"
        shared = False
    else:
        accelerator = "cuda"
        shared = bool(torch.cuda.get_device_properties(0).is_integrated)
        precisions = ("fp32", "fp16")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            precisions = ("fp32", "bf16", "fp16")
        # Reading this creates the CUDA context, so it is already subtracted from free memory.
        free = torch.cuda.mem_get_info(0)[0] + torch.cuda.memory_reserved(0)
        if not shared:
            memory, clientapp = free, 0
            sources = {"memory": "free memory of the GPU"}
        elif free < available:
            memory = free + own
            sources = {"memory": "free memory of the GPU, which is the machine's"}
    profile = DeviceProfile(
        name=AUTO,
        description=f"this machine, {sources['memory']}",
        accelerator=accelerator,
        shared=shared,
        memory=Size(memory),
        system=Size(0),
        supernode=Size(0),
        clientapp=Size(clientapp),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        precisions=precisions,
        capability=device_kernels.capability("cuda:0"),
        triton=device_kernels.has_triton(),
        sources=sources,
    )
    profile.validate()
    return profile


_CLIENTAPP = 570 * 2**20
"""Resident after importing fl_client.client_app, measured as in `device_profiles.yaml`."""


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Files with limit and use of a memory cgroup, and the name of its file cache, by version."""


def _free_in_cgroups(root: Path) -> list[tuple[Path, int]]:
    """Folder and free bytes of each memory cgroup of this process that has a limit."""
    try:
        cgroups = list(cgroups_of(root, "memory"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(root / "proc/self/cgroup", error) from None
    rooms = []
    for folder, version in cgroups:
        limit, usage, cache = _FILES[version]
        if not (folder / limit).exists():
            continue
        text = _read(folder / limit).strip()
        if text == "max" or _number(text, folder / limit) >= _UNLIMITED:
            continue
        used = _number(_read(folder / usage).strip(), folder / usage)
        left = _number(text, folder / limit) - used + _cache(folder, cache)
        rooms.append((folder, max(left, 0)))
    return rooms


def _cache(folder: Path, name: str) -> int:
    """Bytes of file cache that the kernel drops when memory is needed."""
    path = folder / "memory.stat"
    if not path.exists():
        return 0
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value, path)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else "not text"
    return DataError(f"cannot read {path}, which limits this process: {reason}")


def _number(text: str, path: Path) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{path} does not hold a number of bytes but '{text[:40]}'")
    return int(text)
