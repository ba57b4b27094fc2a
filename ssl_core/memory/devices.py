"""Devices by name: what memory they have, and what of it is left for training.

`devices.yaml` documents the figures and says where each is from. `auto` is this machine, read live.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import psutil

from partitions.command import nearest
from partitions.errors import DataError, UsageError
from partitions.settings import read_yaml
from partitions.units import format_bytes, parse_size
from ssl_core.memory.plan import Precision

AUTO = "auto"
"""Name of this machine."""

_SIZES = ("memory", "system", "supernode", "clientapp")
_UNLIMITED = 2**60
"""Version 1 of cgroups writes a number of this order where there is no limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A device; sizes in bytes. Exactly one of `system` and `share` is given."""

    name: str
    description: str
    accelerator: Literal["cpu", "cuda"]
    """Where a step is computed."""
    shared: bool = False
    """Whether the GPU's memory is the CPU's (Jetson)."""
    memory: int
    """What the system reports in all; of a GPU with memory of its own, that memory."""
    system: int | None = None
    """What the system and other programs take."""
    share: float | None = None
    """Where memory is shared: the share of it that the step's tensors get."""
    supernode: int
    """What the Flower SuperNode takes."""
    clientapp: int
    """What the process that trains takes before there is a model."""
    cores: int
    """CPU cores."""
    precisions: tuple[Precision, ...]
    """Precisions whose products the device computes itself."""
    timed_as: str = ""
    """Device of the paper's Table 2 whose seconds a step say how fast this one is; empty: none."""
    times_faster: float = 1.0
    """How many times as fast as that one."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where each figure is from, by field."""

    @property
    def training_bytes(self) -> int:
        """What is left for the process that trains, above its imports and CUDA context."""
        if self.share is not None:
            return int(self.share * self.memory)
        return self.memory - (self.system or 0) - self.supernode - self.clientapp

    @property
    def process_bytes(self) -> int:
        """What the process that trains may take in all."""
        return self.training_bytes + self.clientapp

    @property
    def system_bytes(self) -> int:
        """What the system and other programs take, also where `share` says it."""
        return self.memory - self.process_bytes - self.supernode

    def validate(self) -> None:
        """Check that the figures fit together.

        Raises:
            UsageError: a figure that is missing, negative, or more than there is.
        """
        where = f"device '{self.name}'"
        for name in _SIZES:
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{where}: {name} must not be below zero")
        if self.memory == 0 or self.cores < 1:
            raise UsageError(f"{where}: memory and cores must be above zero")
        if (self.system is None) == (self.share is None):
            raise UsageError(f"{where}: give one of system and share")
        if self.share is not None and not (self.shared and 0 < self.share < 1):
            raise UsageError(
                f"{where}: share, of a memory that a GPU shares (shared: true), must be between 0 "
                f"and 1, not {self.share}"
            )
        if self.shared and self.accelerator == "cpu":
            raise UsageError(f"{where}: shared is for a GPU; leave it out for accelerator cpu")
        if "fp32" not in self.precisions:
            raise UsageError(f"{where}: precisions must contain fp32, the precision of weights")
        if not 0 < self.times_faster < math.inf:
            raise UsageError(f"{where}: times_faster must be above zero, not {self.times_faster}")
        if self.training_bytes <= 0 or self.system_bytes < 0:
            taken = (self.system or 0) + self.supernode + self.clientapp
            raise UsageError(
                f"{where}: of {format_bytes(self.memory)} nothing is left for training after "
                f"{format_bytes(taken)} for the system, the SuperNode and the ClientApp"
            )


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """The profiles in a file of the form of `devices.yaml`.

    Raises:
        UsageError: unreadable, an unknown key (the nearest is named), or an impossible figure.
    """
    return {
        str(name): _profile(str(name), values, f"{path}: {name}")
        for name, values in read_yaml(path).items()
    }


def known_profiles(extra: Path | None = None) -> dict[str, DeviceProfile]:
    """The packaged profiles, and those of a user's file, which come first where names agree.

    Raises:
        UsageError: see `read_profiles`; a user's profile named `auto`.
    """
    with resources.as_file(resources.files(__package__) / "devices.yaml") as path:
        profiles = read_profiles(path)
    if extra is not None:
        profiles |= read_profiles(extra)
    if AUTO in profiles:
        raise UsageError(f"{extra}: '{AUTO}' is this machine; give the device another name")
    return profiles


def find_profile(name: str, extra: Path | None = None) -> DeviceProfile:
    """The device of that name; `auto` is this machine.

    Raises:
        UsageError: no such device; the nearest is named.
        DataError: this machine's limits cannot be read.
    """
    profiles = known_profiles(extra)
    if name == AUTO:
        return this_machine()
    if name not in profiles:
        names = [AUTO, *profiles]
        raise UsageError(
            f"no device '{name}': choose from {', '.join(names)}{nearest(name, names)}"
        )
    return profiles[name]


def _profile(name: str, values: object, where: str) -> DeviceProfile:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a device is a mapping of figures, not '{values}'")
    fields = {field.name: field for field in dataclasses.fields(DeviceProfile)}
    del fields["name"]
    for key in values:
        if key not in fields:
            raise UsageError(f"{where}: unknown figure '{key}'{nearest(str(key), list(fields))}")
    required = [
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise UsageError(f"{where}: missing {', '.join(missing)}")
    chosen: dict[str, Any] = {"name": name}
    for key, value in values.items():
        chosen[key] = _value(key, value, f"{where}: {key}")
    profile = DeviceProfile(**chosen)
    try:
        profile.validate()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return profile


def _value(key: str, value: Any, where: str) -> Any:
    if key in _SIZES:
        if str(value).strip() == "0":
            return 0
        try:
            return parse_size(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    if key == "precisions":
        known = typing.get_args(Precision)
        items = value if isinstance(value, list) else [value]
        for item in items:
            if item not in known:
                raise UsageError(f"{where}: '{item}' is not one of {', '.join(known)}")
        return tuple(items)
    if key == "sources":
        if not isinstance(value, dict):
            raise UsageError(f"{where}: a mapping of figures to texts, not '{value}'")
        return {str(name): str(text) for name, text in value.items()}
    if key == "accelerator" and value not in ("cpu", "cuda"):
        raise UsageError(f"{where}: '{value}' is not one of cpu, cuda")
    kinds = {"shared": bool, "share": float, "times_faster": float, "cores": int}
    kind = kinds.get(key, str)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where}: '{value}' is not of type {kind.__name__}")
    return value


def this_machine(root: Path = Path("/")) -> DeviceProfile:
    """Read what this process may take of the machine it is on, besides all that runs already.

    The least of the memory that the kernel calls available and of every memory cgroup that this
    process is in (version 1 and 2, up to the root), or the free memory of the first GPU. What this
    process holds already is its own to take, so it is counted as free.

    Args:
        root: where `proc` and `sys` are.

    Raises:
        DataError: a cgroup file that is there cannot be read; the message names it.
    """
    import torch

    own = psutil.Process().memory_info().rss
    available = psutil.virtual_memory().available
    sources = {"memory": "available memory of this machine"}
    for path, left in _cgroup_rooms(root):
        if left < available:
            available = left
            sources = {"memory": f"limit of the memory cgroup {path}"}
    memory, clientapp = available + own, max(own, _CLIENTAPP)
    if not torch.cuda.is_available():
        precisions: tuple[Precision, ...] = ("fp32",)
        if torch.cpu._is_amx_tile_supported():
            precisions = ("fp32", "bf16")
        accelerator: Literal["cpu", "cuda"] = "cpu"
        shared = False
    else:
        accelerator = "cuda"
        shared = bool(torch.cuda.get_device_properties(0).is_integrated)
        precisions = ("fp32", "fp16")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            precisions = ("fp32", "bf16", "fp16")
        # The context, which reading this makes, is out of what is free already.
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
        memory=memory,
        system=0,
        supernode=0,
        clientapp=clientapp,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        precisions=precisions,
        sources=sources,
    )
    profile.validate()
    return profile


_CLIENTAPP = 570 * 2**20
"""Resident after importing fl_client.client_app, measured as in `devices.yaml`."""


def _cgroup_rooms(root: Path) -> list[tuple[Path, int]]:
    """What each memory cgroup of this process has left, with its folder."""
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return []
    rooms = []
    for line in _read(membership).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if number == "0":
            mounts = [root / "sys/fs/cgroup/unified", root / "sys/fs/cgroup"]
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
            limit, usage, cache = (
                "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
            )  # fmt: skip
        else:
            continue
        for mount in mounts:
            own = mount / inside.lstrip("/")
            # Inside a container, the path that the kernel tells may be that of the host.
            folders = [own, *own.parents] if own.is_dir() else [mount]
            for folder in folders:
                if folder != mount and mount not in folder.parents:
                    break
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
    """Bytes of files that the kernel drops when memory is asked for."""
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
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise DataError(f"cannot read {path}, which limits this process: {reason}") from None


def _number(text: str, path: Path) -> int:
    if not text.strip().isdigit():
        raise DataError(f"{path} does not hold a number of bytes but '{text[:40]}'")
    return int(text)
