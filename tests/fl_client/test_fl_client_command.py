"""`python -m fl_client`: bad arguments, what is handed to Flower, and a clean end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Writer

from fl_client.__main__ import _node_config, _security
from fl_client.environment import QUIET
from fl_client.settings import FederationSettings
from partitions.errors import UsageError
from partitions.settings import to_yaml

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
        ([], 2, "required: --data"),
        (["--data", "{corpus}", "--partitoin", "0/2"], 2, "did you mean '--partition'?"),
        (["--data", "{corpus}", "--partition", "2/2"], 2, "--partition '2/2' is not I/N"),
        (["--data", "{corpus}", "--partition", "0/2", "--speakers", "1"], 2, "exclude each other"),
        (["--data", "{corpus}", "--port", "none"], 2, "'none' is not a whole number"),
        (["--data", "{corpus}", "--superlink", "here"], 2, "'here' is not HOST:PORT"),
        (["--data", "{corpus}", "--superlink", "10.0.0.9:8000"], 2, "would not be encrypted"),
        (["--data", "{corpus}", "--root-certificates", "no.crt"], 2, "no.crt: no such file"),
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
def test_an_interrupt_ends_it_and_all_that_it_started(
    start: Start, write: Writer, root: Path
) -> None:
    write("train-a", 1, 1, 0)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        superlink = f"127.0.0.1:{taken.getsockname()[1]}"
        process, log = start("--data", str(root), "--superlink", superlink)
        until(lambda: "Starting Flower SuperExec" in log.read_text(encoding="utf-8"))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
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
    assert _security("127.0.0.1:8000", None, False) == ["--insecure"]
    assert _security("pi.lan:8000", None, True) == ["--insecure"]
    assert _security("pi.lan:8000", certificate, False) == ["--root-certificates", str(certificate)]
    with pytest.raises(UsageError, match="exclude each other"):
        _security("pi.lan:8000", certificate, True)


def test_a_nodes_config_is_read_by_flower_as_it_was_given(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    folder = tmp_path / "o'brien's = #1 ü"
    given = _node_config("rpi4", folder, "train-a, train-b", "1/2", "")
    assert parse_config_args([given]) == {
        "device": "rpi4",
        "data": str(folder),
        "subset": "train-a, train-b",
        "partition-id": 1,
        "num-partitions": 2,
    }
    with pytest.raises(UsageError, match="cannot be passed on"):
        _node_config("rpi4", tmp_path / 'a"b', "", None, "")


def test_a_device_has_the_same_number_after_a_restart_and_others_have_another(
    tmp_path: Path,
) -> None:
    configs = [_node_config("rpi4", tmp_path, "", None, name) for name in ("", "", "84")]
    assert configs[0] == configs[1]
    assert configs[0].split("client-key=")[1] != configs[2].split("client-key=")[1].split()[0]


def test_the_shell_gets_every_variable_that_keeps_flower_quiet() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "fl_client.environment"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.splitlines() == [f"export {name}={value}" for name, value in QUIET.items()]
    assert {"FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"} < QUIET.keys()


def test_flowers_run_config_names_every_setting() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config = project["tool"]["flwr"]["app"]["config"]
    names = [line.partition(":")[0] for line in to_yaml(FederationSettings()).splitlines()]
    assert sorted(config) == sorted(names)
    assert FederationSettings.from_run_config(config).model == "tiny"
