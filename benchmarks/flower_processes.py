"""Flower's processes for tests and benchmarks, with free ports and a FLWR_HOME of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import soundfile

from fl_client.environment import QUIET, without_proxies

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FlowerProcesses:
    """Starts commands in the repository's root, as a user with an activated environment does."""

    def __init__(self, home: Path, **environment: str) -> None:
        """Make the folder `home`.

        Args:
            home: FLWR_HOME; it also marks the processes that Flower starts itself.
            environment: further environment variables.
        """
        self.home = home
        home.mkdir(parents=True)
        binaries = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            **QUIET,
            **without_proxies(os.environ),
            "FLWR_HOME": str(home),
            "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
            "COLUMNS": "200",
            **environment,
        }
        self.log = home / "processes.log"

    def start(self, *command: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command in the background, in a session of its own; output goes to `log`."""
        with (log or self.log).open("ab") as stream:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip

    def run(self, *command: str, timeout: float = 500) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, at most `timeout` seconds; stderr is part of stdout."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def mine(self) -> list[psutil.Process]:
        """Every process with this FLWR_HOME."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == str(self.home):
                    found.append(process)
        return found

    def end(self) -> None:
        """End every process with this FLWR_HOME."""
        for process in self.mine():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(self.mine(), timeout=15)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_until(happens: Callable[[], bool], what: str, pause: float = 0.2) -> None:
    """Wait until a condition holds, looking every `pause` seconds; fails after 90 s."""
    end = time.monotonic() + 90
    while not happens():
        assert time.monotonic() < end, f"not within 90 s: {what}"
        time.sleep(pause)


def write_tones(root: Path) -> Path:
    """Six speakers with 24 s of random tones each, in LibriSpeech's layout."""
    rng = np.random.default_rng(0)
    for speaker in range(1, 7):
        folder = root / "train-small" / str(speaker) / "1"
        folder.mkdir(parents=True)
        for number in range(4):
            pitches = np.repeat(rng.uniform(80, 4_000, 60), 1_600)  # a new tone every 0.1 s
            sound = 0.2 * np.sin(2 * np.pi * np.cumsum(pitches) / 16_000)
            soundfile.write(folder / f"{speaker}-1-{number:04d}.flac", sound, 16_000)
    return root
