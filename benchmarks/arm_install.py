"""Installs this checkout on an emulated board as the README says, and sums up what that takes."""

import hashlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.arm_root import HOME, USER, ArmRoot
from benchmarks.flower_processes import ROOT
from common.errors import ShortwaveError, UsageError

CHECKOUT = f"{HOME}/shortwave"
PYTHON = f"{CHECKOUT}/.venv/bin/python"
REPORT = f"{HOME}/pip-report.json"
STAMP = f"{HOME}/installed"
"""Digest of the files that were installed."""
INSTALLED = (
    "pyproject.toml", "constraints.txt", "common/", "partitions/", "ssl_core/", "fl_client/",
    "fl_server/", "simulation/",
)  # fmt: skip
"""Files and folders of the checkout that an installation depends on."""
LARGEST = 8
"""Wheels that are listed by name."""


def source_files() -> list[str]:
    """Paths of the checkout's files, without those that git ignores.

    Raises:
        UsageError: not a git checkout.
    """
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        raise UsageError(f"{ROOT} is not a git checkout: {listed.stderr.decode().strip()}")
    names = listed.stdout.decode().split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def digest(extras: Sequence[str]) -> str:
    """Digest of the files that are installed, and of the chosen extras."""
    found = hashlib.sha256(",".join(extras).encode())
    for name in source_files():
        if name.startswith(INSTALLED):
            found.update(f"\0{name}\0".encode() + (ROOT / name).read_bytes())
    return found.hexdigest()


def install(root: ArmRoot, extras: Sequence[str], cpu: str, limit: float) -> dict[str, Any]:
    """Make a virtual environment and install this checkout, unless that was done.

    Args:
        root: where to install.
        extras: of the project, such as tasks.
        cpu: qemu's name of the processor.
        limit: seconds.

    Returns:
        Packages, bytes of their wheels, bytes unpacked, seconds.

    Raises:
        ShortwaveError: a command on the board failed.
    """
    stamp, wanted = root.inside(STAMP), digest(extras)
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        _copy_checkout(root)
        target = f".[{','.join(extras)}]" if extras else "."
        pip = [
            ".venv/bin/pip",
            "install",
            "--no-compile",
            "--constraint",
            "constraints.txt",
            "--report",
            REPORT,
        ]
        seconds = 0.0
        for words in (["python3", "-m", "venv", ".venv"], [*pip, target]):
            done = root.run(words, limit, cpu, CHECKOUT)
            if done.code != 0:
                text = f"{' '.join(words)}: {done.verdict()}\n{done.output[-3000:]}"
                raise ShortwaveError(text)
            seconds += done.seconds
        sizes = _wheel_sizes(json.loads(root.inside(REPORT).read_text()))
        row = {"seconds": round(seconds), **_summary(sizes), "bytes_unpacked": _unpacked(root)}
        root.inside(REPORT).write_text(json.dumps(row))
        stamp.write_text(wanted)
    row = json.loads(root.inside(REPORT).read_text())
    return dict(row)


def _copy_checkout(root: ArmRoot) -> None:
    """Replace the checkout on the board by this one, without its virtual environment."""
    target = root.inside(CHECKOUT)
    if target.exists():
        shutil.rmtree(target)
    for name in source_files():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path)
    give(target)


def give(folder: Path) -> None:
    """Make a folder and everything in it the board user's own."""
    os.chown(folder, USER, USER)
    for path in folder.rglob("*"):
        os.chown(path, USER, USER, follow_symlinks=False)


def _wheel_sizes(report: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file that pip took from an index, by file name.

    Args:
        report: of `pip install --report`.
    """
    sources = [each["download_info"] for each in report["install"]]
    taken = [source["url"] for source in sources if "dir_info" not in source]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, taken))
    return {a.rpartition("/")[2]: size for a, size in zip(taken, sizes, strict=True)}


def _size(address: str) -> int:
    request = urllib.request.Request(address, method="HEAD")
    with urllib.request.urlopen(request, timeout=60) as reply:
        return int(reply.headers["Content-Length"])


def _summary(sizes: dict[str, int]) -> dict[str, Any]:
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        "packages": len(sizes),
        "bytes_downloaded": sum(sizes.values()),
        "largest_wheels": dict(largest),
    }


def _unpacked(root: ArmRoot) -> int:
    """Bytes of all files in the virtual environment's site-packages."""
    (folder,) = root.inside(f"{CHECKOUT}/.venv/lib").glob("python3*/site-packages")
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
