"""Which file system a file is on, and whether a change of the file always shows there."""

import os
import re
from pathlib import Path

KEEP_CHANGE_TIMES = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs", "tmpfs", "overlay",
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph",
}  # fmt: skip
"""File systems whose times of change and inodes are their own, by their names in mountinfo.

FAT takes the modification time for it, and FUSE and SMB what their servers say.
"""
_MOUNTS = Path("/proc/self/mountinfo")


def file_system(path: str, mounts: Path = _MOUNTS) -> str:
    """Name of the file system that a file is on; empty if this system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place, best, name = os.path.realpath(path), "", ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two at one point the later hides the earlier
            best, name = point, rest.split()[0]
    return name
