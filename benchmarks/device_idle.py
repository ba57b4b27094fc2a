"""Measures a device without its training: time to its first answer, and memory between rounds.

`python -m benchmarks.device_idle --data LibriSpeech` starts a SuperLink and a run that waits for
one client, then a device on one core: seconds until it has contact, and until its first answer (to
the query that describes it) is sent. After the round it measures the memory of the device's
processes. Devices are, in turn, `python -m fl_client`, the same with `--cold-start`, and plain
Flower with the same app: `flower-supernode`. The last line is one JSON object.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.flower_processes import FlowerProcesses, free_port, wait_until, write_tones
from common import command
from common.options import settings_parser
from common.settings import parse

_CONTACT, _ANSWERED = b"SuperNode ID", b"Sending: "
KINDS = ("warm", "cold_start", "flower")
_SETTLED = 15.0
"""Seconds after a run until memory between rounds is measured: Flower polls every 3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdleSettings:
    """What to measure."""

    data: Path | None = None
    """Corpus in LibriSpeech's layout; by default tones."""
    repeats: int = 3
    """Starts of a device of each kind; the median counts."""
    drop_caches: bool = False
    """Empty the page cache before each start (root)."""

    def validate(self) -> None:
        """Nothing to check."""


def command_of(kind: str, superlink: str, data: Path) -> list[str]:
    """The command of a device.

    Args:
        kind: one of `KINDS`.
        superlink: HOST:PORT.
        data: the corpus.
    """
    if kind == "flower":
        node = f'data="{data}" client-key=1'
        words = ["--superlink", superlink, "--port", str(free_port()), "--node-config", node]
        return ["flower-supernode", "--insecure", *words]
    words = ["--device", "rpi4", "--data", str(data), "--superlink", superlink]
    cold = ["--cold-start"] if kind == "cold_start" else []
    return [sys.executable, "-m", "fl_client", *words, *cold]


def measure(settings: IdleSettings, data: Path, kind: str) -> dict[str, float]:
    """Start a SuperLink, a run and a device of this kind, and measure the device."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = FlowerProcesses(folder / "home", XDG_STATE_HOME=str(folder / "state"))
        port, log = free_port(), folder / "device.log"
        (processes.home / "config.toml").write_text(
            f'[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
        )
        try:
            processes.start("flower-superlink", "--insecure", "--port", str(port))
            wait_until(lambda: b"Uvicorn running" in processes.log.read_bytes(), "SuperLink")
            config = (
                f"model='tiny' data='{data}' output='{folder / 'run'}' rounds=1 min-clients=1 "
                "clients-per-round=1 local-updates=1 batch=1 eval-crops=0 length='1s'"
            )
            run = processes.start("flwr", "run", ".", "lab", "--stream", "-c", config)
            wait_until(lambda: b"waiting for clients" in processes.log.read_bytes(), "the run")
            if settings.drop_caches:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            core = {max(os.sched_getaffinity(0))}
            everything = os.sched_getaffinity(0)
            os.sched_setaffinity(0, core)  # inherited by the device
            started = time.monotonic()
            device = processes.start(*command_of(kind, f"127.0.0.1:{port}", data), log=log)
            os.sched_setaffinity(0, everything)
            found = {}
            for key, word in (("contact", _CONTACT), ("answered", _ANSWERED)):
                wait_until(functools.partial(_has, log, word), key, pause=0.02)
                found[key] = time.monotonic() - started
            run.wait(200)
            time.sleep(_SETTLED)
            family = psutil.Process(device.pid)
            found |= memory([family, *family.children(recursive=True)])
            return found
        finally:
            processes.end()


def _has(log: Path, word: bytes) -> bool:
    return word in log.read_bytes()


def memory(processes: list[psutil.Process]) -> dict[str, float]:
    """MB of processes together: proportional set size, and of it what is not in files."""
    total = {"Pss": 0, "Pss_Anon": 0, "Pss_File": 0}
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        for line in text.splitlines():
            key, _, rest = line.partition(":")
            if key in total:
                total[key] += int(rest.split()[0]) * 1024
    return {
        "processes": len(processes),
        "pss_mb": total["Pss"] / 1e6,
        "anonymous_mb": total["Pss_Anon"] / 1e6,
        "file_mb": total["Pss_File"] / 1e6,
    }


def main() -> int:
    """Measure devices of each kind; returns the exit code."""
    parser = settings_parser(
        IdleSettings, prog="python -m benchmarks.device_idle", description=__doc__
    )
    settings, _ = parse(IdleSettings, parser, None)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        data = settings.data.resolve() if settings.data else write_tones(Path(name))
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(settings.repeats):
            for kind, rows in found.items():
                rows.append(measure(settings, data, kind))
                shown = {key: round(value, 2) for key, value in rows[-1].items()}
                print(kind, shown, f"load {os.getloadavg()[0]:.1f}", flush=True)
        for kind, rows in found.items():
            result[kind] = {
                key: sorted(row[key] for row in rows)[len(rows) // 2] for key in rows[0]
            }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(lambda _: main())
