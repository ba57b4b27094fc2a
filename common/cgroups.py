"""Finds the Linux cgroups, version 1 or 2, that limit this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Cgroup(NamedTuple):
    """A cgroup of this process, or one that holds it."""

    folder: Path
    version: int
    """1 or 2."""


def cgroups_of(root: Path, controller: str) -> Iterator[Cgroup]:
    """The cgroups of this process whose controller is at hand, each followed by those around it.

    Args:
        root: of the file system, `/` or a copy of it.
        controller: `cpu` or `memory`.

    Raises:
        OSError: the list of this process' cgroups cannot be read.
        UnicodeDecodeError: it is not text.
    """
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if number == "0":
            version, mounts = 2, ["unified", "."]
        elif controller in controllers.split(","):
            # Where several controllers share a mount, not every system links their own names.
            version, mounts = 1, list(dict.fromkeys([controller, controllers]))
        else:
            continue
        for mount in (root / "sys/fs/cgroup" / name for name in mounts):
            own = mount / inside.lstrip("/")
            # Inside a container, the kernel may report the path on the host.
            folders = [own, *own.parents] if own.is_dir() else [mount]
            yield from (Cgroup(each, version) for each in folders if each.is_relative_to(mount))
