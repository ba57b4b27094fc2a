"""One federated round of a board, emulated or not, against a SuperLink on this machine."""

import contextlib
import os
import shutil
import signal
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
            device = _start_device(machine, address, processes.home, folder / "device.log")
            run = folder / "run"
            given = f"{SETTINGS} data='{machine.work / 'tones'}' output='{run}'"
            words = ("flwr", "run", str(ROOT), "lab", "--stream", "-c", given)
            started = processes.start(*words, log=folder / "run.log")
            while started.poll() is None and device.poll() is None:
                if time.monotonic() - begin > machine.limit:
                    break
                time.sleep(0.5)
            rows = read_metrics(run)
        finally:
            try:
                if device is not None:
                    _stop(device)
            finally:
                processes.end()
        logs = [_tail(folder / name) for name in ("device.log", "run.log")]
    result: dict[str, Any] = {"verdict": "ok", "seconds": round(time.monotonic() - begin, 1)}
    if not rows or rows[0]["failures"] or not rows[0].get("applied"):
        return result | {"verdict": "no update arrived", "device": logs[0], "run": logs[1]}
    losses = [rows[0][name] for name in ("contrastive", "held_out_loss") if name in rows[0]]
    return result | {"losses": losses, "warnings": _warnings(logs[0])}


def _stop(device: "subprocess.Popen[bytes]") -> None:
    """Stop a device as the README's systemd unit does, and after 60 s kill it."""
    if device.poll() is None:
        os.killpg(device.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            device.wait(60)
    end(device)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-4000:] if path.exists() else ""


def _start_device(
    machine: Machine, address: str, home: Path, log: Path
) -> "subprocess.Popen[bytes]":
    """Start `fl_client`; on this machine with `home` as FLWR_HOME, as the other processes."""
    state = machine.work / f"state-{machine.name}"
    shutil.rmtree(state, ignore_errors=True)
    words = machine.words(
        "-m", "fl_client", "--device", DEVICE, "--data", machine.seen(machine.work / "tones"),
        "--partition", "0/1", "--superlink", address,
        "--state", machine.seen(state),
        folder="/",
    )  # fmt: skip
    own = {"FLWR_HOME": str(home)} if machine.root is None else {}
    with log.open("ab") as stream:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT,
            env=machine.environment() | own, start_new_session=True,
        )  # fmt: skip


def _warnings(log: str) -> list[str]:
    """Lines of the device's log that warn of something."""
    marks = ("warn", "error", "anew", "skipped")
    return [line for line in log.splitlines() if any(mark in line.lower() for mark in marks)][:20]
