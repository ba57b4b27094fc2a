"""An arm64 Debian root file system, and programs run in it by qemu as on a chosen Cortex core.

Every program gets mount and process namespaces of its own. When it ends, is killed or its parent
dies, the kernel ends everything that it started and removes its mounts.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import ShortwaveError, UsageError

BINFMT = Path("/proc/sys/fs/binfmt_misc")
EMULATOR = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
"""Debian's line for the kernel: which files are arm64 programs, and what runs them."""
PROGRAMS = {
    "debootstrap": "debootstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
"""Programs needed, and Debian's package of each."""
PACKAGES = "python3,python3-venv,ca-certificates"
"""Added to a minimal Debian; Raspberry Pi OS Lite has them."""
HOST_FILES = (
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt",
)
"""Copied from this machine, so that name lookups and pip work as here."""
USER, HOME = 1000, "/home/pi"
ENTER = """
mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; mount --rbind /sys "$1/sys"
root=$1; user=$2; folder=$3; shift 3
chroot --userspec="$user:$user" "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
exit $?
"""
"""The shell stays: a first process of a namespace is not killed by its own SIGILL or SIGABRT."""


class Outcome(NamedTuple):
    """How a program ended."""

    code: int | None
    """Exit code; 128 and more for signals; None beyond the time limit."""
    output: str
    """stdout and stderr."""
    seconds: float

    def verdict(self) -> str:
        """`ok`, or why not, with the last line of the output."""
        if self.code == 0:
            return "ok"
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        number = self.code - 128 if self.code > 128 else -self.code
        if number > 0:
            names = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV"}
            return f"killed by {names.get(number, f'signal {number}')}"
        return f"exit {self.code}: {(self.output.strip().splitlines() or [''])[-1][:300]}"


def bounded(
    words: Sequence[str], limit: float, environment: Mapping[str, str], folder: Path
) -> Outcome:
    """Run a program of at most `limit` seconds; it and its process group end with this call.

    Args:
        words: program and arguments.
        limit: seconds.
        environment: the whole environment.
        folder: working directory.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile() as stream:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=folder,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        stream.seek(0)
        text = stream.read().decode(errors="replace")
    return Outcome(code, text, time.monotonic() - begin)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that leads a group, and the group, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def require() -> None:
    """Check that this machine can emulate a board, and let the kernel run arm64 programs by qemu.

    The registration stays until the next start, as that of Debian's package does.

    Raises:
        UsageError: not x86-64 Linux, not root, or programs are missing.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UsageError(f"this emulates arm64 on x86-64 Linux, not on {platform.machine()}")
    if os.geteuid():
        raise UsageError("chroot and mounts need root: run as root")
    missing = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name)})
    if missing or not EMULATOR.exists():
        names = " ".join(missing or ["qemu-user-static"])
        raise UsageError(f"missing programs: apt-get install {names}")
    try:
        if not (BINFMT / "register").exists():
            subprocess.run(
                ["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)],
                check=True, capture_output=True,
            )  # fmt: skip
        if not (BINFMT / "qemu-aarch64").exists():
            (BINFMT / "register").write_bytes(EMULATOR.read_bytes())
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"cannot tell the kernel to run arm64 programs by qemu: {error}") from None


class ArmRoot:
    """A root file system of arm64 Debian in a folder, with the user `pi`."""

    def __init__(self, folder: Path, suite: str) -> None:
        """Use a root file system.

        Args:
            folder: has a root file system for each suite.
            suite: Debian's release, such as bookworm.
        """
        self.suite = suite
        self.path = folder.resolve() / suite

    def make(self, mirror: str, limit: float) -> None:
        """Make the root file system with debootstrap unless it is there.

        Args:
            mirror: address of the Debian archive.
            limit: seconds.

        Raises:
            ShortwaveError: debootstrap or a program in the new root failed.
        """
        if not self.path.exists():
            partial = self.path.with_name(self.path.name + ".partial")
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            words = [
                "debootstrap", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}",
                self.suite, str(partial), mirror,
            ]  # fmt: skip
            made = bounded(_own_namespaces(words), limit, os.environ, self.path.parent)
            if made.code != 0:
                raise ShortwaveError(f"debootstrap: {made.verdict()}\n{made.output[-2000:]}")
            partial.rename(self.path)
        for name in map(Path, HOST_FILES):
            if name.exists():
                shutil.copyfile(name, self.inside(str(name)))
        if not self.inside(HOME).exists():
            words = ["useradd", "--create-home", "--uid", str(USER), "pi"]
            added = self.run(words, limit=300, folder="/", user=0)
            if added.code != 0:
                raise ShortwaveError(f"useradd in {self.path}: {added.verdict()}")

    def inside(self, path: str) -> Path:
        """The path on this machine of an absolute path in the root."""
        return self.path / path.lstrip("/")

    def words(self, words: Sequence[str], folder: str = HOME, user: int = USER) -> list[str]:
        """Program and arguments on this machine that run a program in the root.

        Args:
            words: program and arguments in the root.
            folder: working directory in the root.
            user: number of its user.
        """
        enter = ["sh", "-ec", ENTER, "enter", str(self.path), str(user), folder]
        return _own_namespaces([*enter, *words])

    def run(
        self,
        words: Sequence[str],
        limit: float,
        cpu: str = "",
        folder: str = HOME,
        user: int = USER,
    ) -> Outcome:
        """Run a program in the root.

        Args:
            words: program and arguments.
            limit: seconds.
            cpu: qemu's name of the processor; empty for one with every extension.
            folder: working directory in the root.
            user: number of its user.
        """
        words = self.words(words, folder, user)
        return bounded(words, limit, environment(cpu), self.path.parent)


def environment(cpu: str = "", **further: str) -> dict[str, str]:
    """Environment of a fresh login of `pi`, with this machine's settings of pip and proxies.

    Args:
        cpu: qemu's name of the processor; empty for one with every extension.
        further: variables to add.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name.lower().endswith("_proxy")
    }
    own = {
        "HOME": HOME,
        "USER": "pi",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    return kept | own | ({"QEMU_CPU": cpu} if cpu else {}) | further


def _own_namespaces(words: Sequence[str]) -> list[str]:
    """Words that run a program in namespaces that die with it and with this process."""
    return [
        "setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private",
        "--pid", "--fork", "--kill-child", "--", *words,
    ]  # fmt: skip
