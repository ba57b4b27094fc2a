"""One federated round of a board, emulated or not, against a SuperLink on this machine."""

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arm_root import end
from benchmarks.board_trials import Machine, read_metrics
from benchmarks.flower_processes import ROOT, FlowerProcesses, free_port, wait_until

SETTINGS = (
    "model='tiny' architecture.num-hidden-layers=1 length='1s' batch=2 local-updates=1 rounds=1 "
    "clients-per-round=1 min-clients=1 eval-crops=2 held-out=0.2 seed=5"
)
DEVICE = "rpi4"
NUMBERS = ("loss", "contrastive", "held_out_loss", "failures", "cohort")
"""Of a round's metrics."""


def one_round(machine: Machine) -> dict[str, Any]:
    """Run `fl_client` on the machine and one round on a SuperLink here.

    On a board it is started as by the README's systemd unit: as user `pi`, in the root folder.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="round-") as name:
        folder = Path(name)
        processes = FlowerProcesses(folder / "home", XDG_CACHE_HOME=str(folder / "cache"))
        port = free_port()
        address = f"127.0.0.1:{port}"
        (processes.home / "config.toml").write_text(
            f'[superlink.lab]\naddress = "{address}"\ninsecure = true\n', encoding="utf-8"
        )
        device = None
        try:
            link = processes.start("flower-superlink", "--insecure", "--port", str(port))
            wait_until(
                lambda: link.poll() is None and b"Uvicorn running" in processes.log.read_bytes(),
                "the SuperLink is up",
            )
            device = _start_device(machine, address, folder)
            run = folder / "run"
            given = f"{SETTINGS} data='{machine_data(machine)}' output='{run}'"
            try:
                text = processes.run(
                    "flwr", "run", str(ROOT), "lab", "--stream", "-c", given, timeout=machine.limit
                ).stdout
            except subprocess.TimeoutExpired:
                text = f"no end within {machine.limit:.0f} s"
            rows = read_metrics(run)
        finally:
            if device is not None:
                end(device)
            processes.end()
        log = (folder / "device.log").read_text(errors="replace")
    result: dict[str, Any] = {"verdict": "ok", "seconds": round(time.monotonic() - begin, 1)}
    if not rows or rows[0]["failures"] or not rows[0].get("applied"):
        return result | {"verdict": "no update arrived", "device": log[-2000:], "run": text[-2000:]}
    losses = [rows[0][name] for name in ("contrastive", "held_out_loss") if name in rows[0]]
    return result | {"losses": losses, "warnings": _warnings(log)}


def machine_data(machine: Machine) -> str:
    """The corpus as the server, which is always on this machine, sees it."""
    return str(machine.work / "tones")


def _start_device(machine: Machine, address: str, folder: Path) -> "subprocess.Popen[bytes]":
    words = machine.words(
        "-m", "fl_client", "--device", DEVICE, "--data", machine.seen(machine.work / "tones"),
        "--partition", "0/1", "--superlink", address,
        "--state", machine.seen(machine.work / f"state-{machine.name}-{time.time_ns()}"),
        folder="/",
    )  # fmt: skip
    with (folder / "device.log").open("ab") as stream:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT,
            env=machine.environment(), start_new_session=True,
        )  # fmt: skip


def _warnings(log: str) -> list[str]:
    """Lines of the device's log that warn of something."""
    marks = ("warn", "error", "anew", "skipped")
    return [line for line in log.splitlines() if any(mark in line.lower() for mark in marks)][:20]
