"""Three devices with keys of their own train over TLS; whoever is not known stays outside."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.flower_processes import FlowerProcesses, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DEVICES = ("rpi4", "jetson-xavier-nx", "auto")
ACTIVE = "SuperNode ID:"
# More clients a round than devices: had a stranger been let in, it would be among them.
SETTINGS = (
    "model='tiny' architecture.num-hidden-layers=1 length='1s' batch=2 local-updates=1 rounds=3 "
    "clients-per-round=5 min-clients=3 eval-crops=0 seed=5"
)


class Lab(NamedTuple):
    """An encrypted SuperLink with three devices inside and two strangers outside."""

    processes: FlowerProcesses
    devices: list["subprocess.Popen[bytes]"]
    stranger: "subprocess.Popen[bytes]"
    """Has the certificate, and a key that nobody registered."""
    open: "subprocess.Popen[bytes]"
    """Has no certificate."""
    folder: Path

    def log(self, name: object) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, librispeech: Path) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("secure")
    processes = FlowerProcesses(folder / "home", XDG_CACHE_HOME=str(folder / "cache"))
    keys, port = folder / "keys", free_port()
    authority = keys / "ca.crt"
    (processes.home / "config.toml").write_text(
        f'[superlink.lab]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{authority}"\n',
        encoding="utf-8",
    )

    def device(name: object, *options: str) -> "subprocess.Popen[bytes]":
        return processes.start(
            sys.executable, "-m", "fl_client", "--data", str(librispeech.resolve()),
            "--superlink", f"127.0.0.1:{port}", "--state", str(folder / f"state-{name}"), *options,
            log=folder / f"{name}.log",
        )  # fmt: skip

    def known(number: int) -> tuple[str, ...]:
        return ("--root-certificates", str(authority), "--key", str(keys / f"node-{number}.key"))

    try:
        made = processes.run(
            sys.executable, "-m", "fl_server", "certificates", "--output", str(keys),
            "--nodes", "4",
        )  # fmt: skip
        assert made.returncode == 0, made.stdout
        link = processes.start(
            "flower-superlink", "--port", str(port), "--enable-supernode-auth",
            "--ssl-ca-certfile", str(authority), "--ssl-certfile", str(keys / "server.pem"),
            "--ssl-keyfile", str(keys / "server.key"),
        )  # fmt: skip
        wait_until(
            lambda: link.poll() is None and b"Uvicorn running" in processes.log.read_bytes(),
            "the SuperLink is up",
        )
        for number in range(len(DEVICES)):
            public = str(keys / f"node-{number}.pub")
            registered = processes.run("flwr", "supernode", "register", public, "lab")
            assert "registered successfully" in registered.stdout, registered.stdout
        devices = [
            device(number, "--device", name, "--partition", f"{number}/3", *known(number))
            for number, name in enumerate(DEVICES)
        ]
        stranger = device("stranger", "--speakers", "19", *known(3))
        without = device("open", "--speakers", "19", "--insecure")
        yield Lab(processes, devices, stranger, without, folder)
    finally:
        processes.end()


@pytest.fixture(scope="module")
def rows(lab: Lab, librispeech: Path) -> list[dict[str, object]]:
    """The metrics of a finished run."""
    output = lab.folder / "run"
    result = lab.processes.run(
        "flwr", "run", ".", "lab", "--stream", "-c",
        f"{SETTINGS} data='{librispeech.resolve()}' output='{output}'",
    )  # fmt: skip
    assert f"run directory: {output}" in result.stdout, result.stdout
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_three_registered_devices_train_over_tls(lab: Lab, rows: list[dict[str, object]]) -> None:
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        clients = row["clients"]
        assert isinstance(clients, list)
        assert [client["key"] for client in clients] == [0, 1, 2]
        assert (row["cohort"], row["failures"], row["samples"]) == (3, 0, 3 * 2 * 16_000)
    for number, process in enumerate(lab.devices):
        assert process.poll() is None
        assert ACTIVE in lab.log(number)
        assert lab.log(number).count("Receiving: train message") == 3


def test_a_key_that_is_not_registered_is_refused(lab: Lab) -> None:
    assert lab.stranger.wait(60) != 0
    assert "Failed to activate SuperNode" in lab.log("stranger")
    assert ACTIVE not in lab.log("stranger")


@pytest.mark.usefixtures("rows")
def test_a_device_without_the_certificate_stays_outside(lab: Lab) -> None:
    assert "Connection attempt failed" in lab.log("open")
    assert ACTIVE not in lab.log("open")
