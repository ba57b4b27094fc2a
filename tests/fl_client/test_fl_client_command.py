"""`python -m fl_client`: bad arguments, what is handed to Flower, and a clean end."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Writer
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.common.config import parse_config_args

from common.errors import UsageError
from common.process_environment import tuned
from common.units import Names, Seconds, Size
from fl_client.__main__ import DeviceSettings, _node_config, _number
from fl_client.environment import LEAN, QUIET
from fl_client.link_security import link_security
from ssl_core.planning.device_profiles import find_profile

ROOT = Path(__file__).parents[2]
Start = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command in a process group of its own, which the test's end ends."""
    started: list[subprocess.Popen[bytes]] = []

    def starter(*options: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"output-{len(started)}"
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "fl_client", *options]
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
            )
        started.append(process)
        return process, log

    yield starter
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "--data: give the corpus that this device trains on"),
        (
            ["--data", "{corpus}", "--partitoin", "0/2"],
            2,
            "unknown setting 'partitoin'; did you mean 'partition'?",
        ),
        (["--data", "{corpus}", "--partition", "2/2"], 2, "--partition '2/2' is not I/N"),
        (["--data", "{corpus}", "--partition", "0/2", "--speakers", "1"], 2, "exclude each other"),
        (["--data", "{corpus}", "--port", "none"], 2, "'none' is not a whole number"),
        (["--data", "{corpus}", "--memory", "much"], 2, "'much' is not a size"),
        (["--data", "{corpus}", "--length", "0s"], 2, "a length of '0s' holds no audio"),
        (["--data", "{corpus}", "--pause-load", "-1"], 2, "--pause-load must not be below zero"),
        (["--data", "{corpus}", "--checkpoint", "d"], 2, "--checkpoint is for a --task"),
        (["--data", "{corpus}", "--superlink", "here"], 2, "'here' is not HOST:PORT"),
        (["--data", "{corpus}", "--superlink", "10.0.0.9:8000"], 2, "would not be encrypted"),
        (["--data", "{corpus}", "--root-certificates", "no.crt"], 2, "no.crt: no such file"),
        (["--data", "{corpus}", "--key", "n.key"], 2, "--key proves who this node is over an encr"),
        (["--data", "{corpus}", "--insecure", "--key", "n.key"], 2, "--root-certificates ca.crt"),
        (["--data", "{corpus}/none"], 1, "no such folder"),
        (["--data", "{corpus}/train-a/1/1"], 1, "not in LibriSpeech's layout"),
        (["--data", "{corpus}", "--subset", "train-b"], 2, "train-b"),
    ],
)
def test_bad_arguments_are_one_line_and_an_exit_code(
    start: Start, write: Writer, root: Path, options: list[str], code: int, words: str
) -> None:
    write("train-a", 1, 1, 0)
    process, log = start(*(option.replace("{corpus}", str(root)) for option in options))
    assert process.wait(60) == code
    output = log.read_text(encoding="utf-8")
    assert words in output
    assert len(output.splitlines()) == 1, output


@pytest.mark.slow
def test_sigterm_ends_it_and_all_that_it_started(start: Start, write: Writer, root: Path) -> None:
    write("train-a", 1, 1, 0)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        superlink = f"127.0.0.1:{taken.getsockname()[1]}"
        process, log = start("--data", str(root), "--superlink", superlink)
        until(lambda: "Connection attempt failed" in log.read_text(encoding="utf-8"))
        assert tuned(found := psutil.Process(process.pid).environ()) == found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert "SuperNode terminated gracefully" in log.read_text(encoding="utf-8")
    until(lambda: not group_lives(process.pid))


def until(happens: Callable[[], bool]) -> None:
    """Wait for something that a test's end depends on."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it has not happened within a minute"
        time.sleep(0.2)


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_connections_off_this_machine_are_encrypted_or_said_to_be_open(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.crt"
    certificate.write_text("x")
    assert link_security("127.0.0.1:8000", None, False) == ["--insecure"]
    assert link_security("pi.lan:8000", None, True) == ["--insecure"]
    assert link_security("pi.lan:8000", certificate, False) == [
        "--root-certificates",
        str(certificate),
    ]
    with pytest.raises(UsageError, match="exclude each other"):
        link_security("pi.lan:8000", certificate, True)


def test_a_key_goes_to_flower_with_the_certificate(tmp_path: Path) -> None:
    make_keys(tmp_path)
    certificate, key = tmp_path / "ca.crt", tmp_path / "good.key"
    assert link_security("pi.lan:8000", certificate, False, key) == [
        "--root-certificates", str(certificate), "--auth-supernode-private-key", str(key),
    ]  # fmt: skip
    for host in ("127.0.0.1", "pi.lan"):
        for insecure in (False, True):
            with pytest.raises(UsageError, match="--key proves who this node is"):
                link_security(f"{host}:8000", None, insecure, key)


@pytest.mark.parametrize("name", ["good.pub", "curve", "rsa", "locked", "pkcs8", "ca.crt"])
def test_a_key_that_flower_cannot_use_is_refused(tmp_path: Path, name: str) -> None:
    make_keys(tmp_path)
    with pytest.raises(UsageError, match="not an ECDSA P-384 private key in OpenSSH's format"):
        link_security("pi.lan:8000", tmp_path / "ca.crt", False, tmp_path / name)
    with pytest.raises(UsageError, match=r"none\.key: no such file"):
        link_security("pi.lan:8000", tmp_path / "ca.crt", False, tmp_path / "none.key")


def make_keys(folder: Path) -> None:
    """A key as Flower wants it, and others."""
    good, other = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    ssh, plain = PrivateFormat.OpenSSH, NoEncryption()
    public = good.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    # What `ssh-keygen` writes when it is given a passphrase; the encrypted part is not looked at.
    parts = (b"aes256-ctr", b"bcrypt", string(bytes(16)) + bytes((0, 0, 0, 16)))
    locked = b"openssh-key-v1\0" + b"".join(map(string, parts)) + bytes((0, 0, 0, 1))
    locked += string(base64.b64decode(public.split()[1])) + string(bytes(208))
    mark = b"-----%s OPENSSH PRIVATE KEY-----\n"
    contents = {
        "ca.crt": b"x",
        "good.pub": public,
        "good.key": good.private_bytes(Encoding.PEM, ssh, plain),
        "curve": other.private_bytes(Encoding.PEM, ssh, plain),
        "rsa": rsa.generate_private_key(65_537, 2_048).private_bytes(Encoding.PEM, ssh, plain),
        "pkcs8": good.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, plain),
        "locked": mark % b"BEGIN" + base64.encodebytes(locked) + mark % b"END",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def string(value: bytes) -> bytes:
    """As SSH writes it: the length first (RFC 4251, section 5)."""
    return len(value).to_bytes(4, "big") + value


def test_off_this_machine_without_certificates_it_says_how_to_make_them() -> None:
    with pytest.raises(UsageError, match="`python -m fl_server certificates` makes one there"):
        link_security("pi.lan:8000", None, False)


def node(data: Path, **changes: Any) -> DeviceSettings:
    return DeviceSettings(data=data, **{"device": "rpi4", **changes})


def test_a_nodes_config_is_read_by_flower_as_it_was_given(tmp_path: Path) -> None:
    folder = tmp_path / "o'brien's = #1 ü"
    given = _node_config(node(folder, subset=Names.parse("train-a, train-b"), partition="1/2"))
    assert parse_config_args([given]) == {
        "device": "rpi4",
        "data": str(folder),
        "subset": "train-a,train-b",
        "memory": find_profile("rpi4").process_bytes,
        "partition-id": 1,
        "num-partitions": 2,
    }
    with pytest.raises(UsageError, match="cannot be passed on"):
        _node_config(node(tmp_path / 'a"b'))


def test_a_device_has_the_same_number_after_a_restart_and_others_have_another(
    tmp_path: Path,
) -> None:
    numbers = []
    for name in ("", "", "84"):
        number, held = _number(node(tmp_path, speakers=Names.parse(name), state=tmp_path / "state"))
        numbers.append(number)
        assert parse_config_args([_node_config(node(tmp_path), number)])["client-key"] == number
        del held
    assert numbers[0] == numbers[1] != numbers[2]
    assert _number(node(tmp_path, partition="1/2")) == (0, None)


def test_a_node_is_told_what_its_device_has_and_what_its_owner_wants(tmp_path: Path) -> None:
    given = node(
        tmp_path, device="auto", partition="0/1", memory=Size.parse("4GB"),
        length=Seconds.parse("500ms"), pause_temperature=70.5, pause_load=2.0,
        pause_memory=Size.parse("500MB"), state=tmp_path / "state",
    )  # fmt: skip
    assert parse_config_args([_node_config(given)]) == {
        "device": "auto", "data": str(tmp_path), "partition-id": 0, "num-partitions": 1,
        "state": str(tmp_path / "state"), "memory": 4 * 10**9, "length": 0.5,
        "pause-temperature": 70.5, "pause-load": 2.0, "pause-memory": 500 * 10**6,
    }  # fmt: skip
    live = _node_config(node(tmp_path, device="auto", partition="0/1"))
    assert "memory" not in parse_config_args([live])  # this machine's, read in every round


def test_the_shell_gets_every_variable_that_keeps_flower_quiet() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "fl_client.environment"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"no_proxy": "", "NO_PROXY": "10.0.0.1, localhost"},
    ).stdout
    exempt = dict.fromkeys(("no_proxy", "NO_PROXY"), "10.0.0.1,localhost,127.0.0.1,::1")
    wanted = QUIET | LEAN | exempt
    assert printed.splitlines() == [f"export {name}={value}" for name, value in wanted.items()]
    assert {"FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"} < QUIET.keys()
