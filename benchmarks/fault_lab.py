"""The processes of a federation into which `benchmarks.faults` injects faults."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.flower_processes import ROOT, free_port
from benchmarks.tcp_proxy import Proxy
from fl_client.environment import QUIET

NODES = 3


class Lab:
    """A SuperLink, its SuperNodes and the processes they start, in a folder of their own."""

    def __init__(
        self, folder: Path, data: Path, database: bool = False, nodes: int = NODES
    ) -> None:
        """Make the folder; nothing is started.

        Args:
            folder: new.
            data: corpus in LibriSpeech's layout, divided among the nodes.
            database: whether the SuperLink keeps its state on disk.
            nodes: how many SuperNodes to start.
        """
        self.count = nodes
        self.folder, self.data, self.database = folder, data, database
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.port = free_port()
        self.link_log = folder / "superlink.log"
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.streams: list[Path] = []
        self.ways: dict[int, int] = {}
        """Ports through which a node reaches the SuperLink, if not the SuperLink's own."""
        self.doubles: dict[int, Path] = {}
        """Folders with a stand-in for a node's `flwr-clientapp`."""
        self.proxies: list[Proxy] = []

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a process `name`; FLWR_HOME also marks the processes started here."""
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        config = f'[superlink.lab]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(config, encoding="utf-8")
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(home),
            # Shared by all runs: plans and recut corpora, by digest.
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            "XDG_STATE_HOME": str(self.folder / "state" / name),
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
            "COLUMNS": "200",
        }

    def _start(self, name: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as stream:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def start_link(self) -> None:
        """Start or restart the SuperLink; does not wait for it."""
        words = ["flower-superlink", "--insecure", "--port", str(self.port)]
        if self.database:
            words += ["--database", str(self.folder / "superlink.db")]
        self.link = self._start("link", self.link_log, *words)

    def start_node(self, number: int) -> None:
        """Start or restart a SuperNode."""
        words = [
            "--device", "auto", "--data", str(self.data), "--partition", f"{number}/{self.count}",
            "--superlink", f"127.0.0.1:{self.ways.get(number, self.port)}",
        ]  # fmt: skip
        launch = ["-m", "fl_client"]
        if number in self.doubles:  # fl_client puts the folder of the interpreter first on PATH
            words.append("--cold-start")  # runs the `flwr-clientapp` that is first on PATH
            launch = ["-c", "import runpy, sys; sys.executable = sys.argv.pop(1); "
                      "runpy.run_module('fl_client', run_name='__main__')",
                      str(self.doubles[number] / "python")]  # fmt: skip
        self.nodes[number] = self._start(
            f"node-{number}", self.node_log(number), sys.executable, *launch, *words
        )

    def node_log(self, number: int) -> Path:
        """Log of a SuperNode and its ClientApps."""
        return self.folder / f"node-{number}.log"

    def flwr_run(self, settings: str) -> subprocess.Popen[bytes]:
        """Start `flwr run` with a run config."""
        self.streams.append(self.folder / f"stream-{len(self.streams)}.log")
        words = ["flwr", "run", ".", "lab", "--stream", "-c", settings]
        return self._start("user", self.streams[-1], *words)

    def started_by(self, process: "subprocess.Popen[bytes] | None", name: str) -> list[Any]:
        """Descendants of a process that have this name, without those waiting for a ClientApp."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid if process else 0).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = [Path(word).name for word in child.cmdline()[:6]]
                    if "warm_start.py" not in words and name in (child.name(), *words[:3]):
                        found.append(child)
        return found

    def mine(self) -> list[Any]:
        """Every process whose FLWR_HOME is in this folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                home = process.environ().get("FLWR_HOME", "")
                if home.startswith(f"{self.folder}{os.sep}"):
                    found.append(process)
        return found

    def end(self) -> None:
        """End every process started here."""
        for proxy in self.proxies:
            proxy.close()
        for how, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            mine = self.mine()
            for process in mine:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(how)
                    process.send_signal(signal.SIGCONT)
            psutil.wait_procs(mine, timeout=patience)


def read_log(path: Path) -> str:
    """What is in a log so far; empty if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
