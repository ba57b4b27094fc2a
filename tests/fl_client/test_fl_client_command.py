"""`python -m fl_client`: bad arguments, what is handed to Flower, and a clean end."""

import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Writer

from fl_client.__main__ import _node_config, _security
from fl_client.environment import QUIET
from fl_client.settings import FederationSettings
from partitions.errors import UsageError
from partitions.settings import to_yaml

ROOT = Path(__file__).parents[2]


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fl_client", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


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
        (["--data", "{corpus}/train-a"], 1, "not in LibriSpeech's layout"),
        (["--data", "{corpus}", "--subset", "train-b"], 2, "train-b"),
    ],
)
def test_bad_arguments_are_one_line_and_an_exit_code(
    write: Writer, root: Path, options: list[str], code: int, words: str
) -> None:
    write("train-a", 1, 1, 0)
    process = start(*(option.replace("{corpus}", str(root)) for option in options))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert words in output
    assert len(output.splitlines()) == 1, output


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["ctrl-c", "one process"])
def test_an_interrupt_ends_it_and_all_that_it_started(
    write: Writer, root: Path, whole_group: bool
) -> None:
    write("train-a", 1, 1, 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    process = start("--data", str(root), "--superlink", nobody)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Starting Flower SuperExec" in line:
            break
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    # stdout closes when the last process that holds it has ended, SuperExec included.
    output, _ = process.communicate(timeout=60)
    output = "".join(lines) + output
    assert process.returncode == 0, output
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


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
