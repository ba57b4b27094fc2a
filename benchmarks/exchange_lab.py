"""A SuperLink with some devices as processes of their own, and the memory they take."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.flower_processes import FlowerProcesses, free_port, wait_until
from fl_client.environment import LEAN

KINDS = {
    "superlink": ("flower-superlink",),
    "serverapp": ("flwr-serverapp",),
    "clientapp": ("flwr-clientapp",),
    "supernode": ("flower-supernode", "fl_client"),
}
"""Words in the name or command line of each kind of process; other processes are not counted."""
CONNECTION = "exchange"


class Lab:
    """A SuperLink and some devices, and the peak memory of each kind of process."""

    def __init__(
        self,
        folder: Path,
        clients: int,
        data: Path,
        plain: bool,
        cgroup: str = "",
        options: Sequence[str] = ("--device", "auto", "--memory", "8GB"),
    ) -> None:
        """Prepare a laboratory, which starts when it is entered.

        Args:
            folder: new folder for Flower's and the clients' state.
            clients: how many devices.
            data: corpus that is divided among the devices.
            plain: devices are plain SuperNodes rather than `fl_client`.
            cgroup: folder of a memory cgroup that every device enters; empty is none.
            options: of `fl_client`.
        """
        self.clients, self.data, self.plain = clients, data, plain
        self.cgroup, self.options = cgroup, options
        self.processes = FlowerProcesses(
            folder / "home",
            XDG_STATE_HOME=str(folder / "state"),
            OMP_WAIT_POLICY="passive",
            **({} if plain else LEAN),
        )
        self.peaks: dict[str, int] = {}
        """Largest proportional set size in bytes of each of `KINDS`, and of all `together`."""
        self._stop = threading.Event()

    def __enter__(self) -> "Lab":
        try:
            self._begin()
        except BaseException:
            self.processes.end()
            raise
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.processes.end()

    def _begin(self) -> None:
        start, log = self.processes.start, self.processes.log
        port = free_port()
        address = f"127.0.0.1:{port}"
        (self.processes.home / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
        )
        link = start("flower-superlink", "--insecure", "--port", str(port))
        wait_until(
            lambda: link.poll() is None and b"Uvicorn running" in log.read_bytes(),
            "the SuperLink is up",
        )
        for number in range(self.clients):
            if self.plain:
                start(
                    "flower-supernode", "--insecure", "--superlink", address, "--port",
                    str(free_port()),
                )  # fmt: skip
                continue
            enter = f"echo $$ > {self.cgroup}/cgroup.procs; " if self.cgroup else ""
            start(
                "sh", "-c", enter + 'exec "$@"', "sh",
                sys.executable, "-m", "fl_client", *self.options,
                "--data", str(self.data), "--superlink", address,
                "--partition", f"{number}/{self.clients}",
            )  # fmt: skip

    def _watch(self) -> None:
        """Follow the proportional set sizes of all processes, and keep the largest."""
        known: dict[int, str] = {}  # kind by process id, empty for processes that do not count
        for looks in itertools.count():
            if self._stop.wait(0.5):
                return
            if looks % 8 == 0:  # a process may have been seen before it ran its own program
                known.clear()
            sizes = dict.fromkeys(KINDS, 0)
            there = set(psutil.pids())
            for identifier in there - known.keys():
                known[identifier] = self._kind(identifier)
            for identifier, kind in list(known.items()):
                if identifier not in there:
                    del known[identifier]
                elif kind:
                    with contextlib.suppress(OSError, IndexError):
                        text = Path(f"/proc/{identifier}/smaps_rollup").read_text()
                        sizes[kind] += 1024 * int(text.split("Pss:")[1].split()[0])
            for kind, size in (sizes | {"together": sum(sizes.values())}).items():
                self.peaks[kind] = max(self.peaks.get(kind, 0), size)

    def _kind(self, identifier: int) -> str:
        """Which of `KINDS` a process of this laboratory is, or an empty text."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(identifier)
            if process.environ().get("FLWR_HOME") == str(self.processes.home):
                words = " ".join([process.name(), *process.cmdline()])
                return next((k for k, names in KINDS.items() if any(n in words for n in names)), "")
        return ""

    def run(self, app: Path, config: str) -> str:
        """Call `flwr run` and wait for its end; returns what it printed.

        Args:
            app: folder of the Flower app.
            config: its run config.
        """
        words = ("flwr", "run", str(app), CONNECTION, "--stream", "-c", config)
        return self.processes.run(*words, timeout=1500).stdout
