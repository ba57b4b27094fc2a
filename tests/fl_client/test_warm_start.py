"""ClientApps that are forked from a process that has imported PyTorch already."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fl_client import warm_start

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="it forks on Linux only")

# A device: begins, then runs `flwr-clientapp` as Flower's executor would, with Flower's command
# replaced by one that says where it runs.
DEVICE = """
import json, os, subprocess, sys
import fl_client.federation_settings  # some of the project, which the app must not find imported
from fl_client import warm_start

def app():
    own = [n for n in sys.modules if n.partition(".")[0] in ("fl_client", "ssl_core", "partitions")]
    print(json.dumps({
        "arguments": sys.argv, "folder": os.getcwd(), "word": os.environ.get("WORD"),
        "pid": os.getpid(), "torch": "torch" in sys.modules, "own": own,
    }), flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    if "wait" in sys.argv:
        import time
        time.sleep(60)
    sys.exit(int(sys.argv[-1]))

import flwr.supernode.cli
flwr.supernode.cli.flwr_clientapp = app
assert warm_start.begin()
print(json.dumps({"path": os.environ["PATH"].split(os.pathsep)[0]}), flush=True)
sys.stdin.read()
"""


class Device:
    """A process that has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = str(Path(sys.executable).parent)
        path = binaries + os.pathsep + os.environ.get("PATH", "")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DEVICE],
            cwd=ROOT, env=os.environ | {"PATH": path, "TMPDIR": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.stand_in = Path(json.loads(self.process.stdout.readline())["path"], "flwr-clientapp")

    def ask(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self.stand_in), *arguments],
            cwd=self.folder, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def device(tmp_path: Path) -> "Device":
    return Device(tmp_path)


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it has not happened within a minute"
        time.sleep(0.05)


@linux
def test_an_app_runs_in_a_process_of_its_own_as_if_it_had_been_started(device: Device) -> None:
    try:
        seen = []
        for code in (0, 3):
            app = device.ask("--token", "secret", str(code), WORD=f"word {code}")
            output, errors = app.communicate(timeout=60)
            assert app.returncode == code
            assert errors == "to stderr\n"
            said = json.loads(output)
            assert said["arguments"] == ["flwr-clientapp", "--token", "secret", str(code)]
            assert (said["folder"], said["word"]) == (str(device.folder), f"word {code}")
            assert said["torch"]
            assert said["own"] == []
            seen.append(said["pid"])
        assert len({*seen, device.process.pid}) == 3
    finally:
        device.end()


@linux
def test_a_killed_app_is_noticed_and_the_next_one_runs(device: Device) -> None:
    try:
        app = device.ask("wait", "0")
        assert app.stdout is not None
        pid = json.loads(app.stdout.readline())["pid"]
        assert psutil.Process(pid).name() == "flwr-clientapp"
        os.kill(pid, signal.SIGKILL)
        app.communicate(timeout=60)
        assert app.returncode == 137
        assert device.ask("0").wait(60) == 0
    finally:
        device.end()


@pytest.mark.slow
@linux
def test_it_ends_with_the_device_and_leaves_nothing(device: Device) -> None:
    (waiting,) = device.children()
    device.end()
    until(lambda: not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE)
    until(lambda: not device.stand_in.exists())


@linux
def test_without_it_flowers_own_command_is_started(device: Device) -> None:
    try:
        (waiting,) = device.children()
        waiting.kill()
        until(lambda: not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE)
        output, _ = device.ask("--help").communicate(timeout=120)
        assert "--runtime-api-address" in output
    finally:
        device.end()


@linux
def test_who_asks_and_goes_at_once_leaves_no_process(device: Device) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(device.stand_in.parent / "socket"))
            asking.send(b"{")
        assert device.ask("0").wait(60) == 0
        until(lambda: len(device.children()) == 1)
    finally:
        device.end()


@linux
def test_a_place_too_long_for_a_socket_leaves_every_start_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert not warm_start.begin()
    assert os.environ["PATH"] == str(Path(sys.executable).parent)
    assert list(long.iterdir()) == []


def test_a_device_registers_no_operation_that_the_app_will_register() -> None:
    code = "import fl_client.__main__, sys; print('ssl_core.wav2vec2.operators' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_a_client_app_imports_nothing_of_others_that_is_not_there_already() -> None:
    code = (
        "import importlib, sys\n"
        "from fl_client import warm_start\n"
        "for name in warm_start.SHARED + warm_start.IMPORTED: importlib.import_module(name)\n"
        "before = set(sys.modules)\n"
        "import fl_client.client_app\n"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "known = sys.stdlib_module_names | set(warm_start._OWN) | {'attr', 'attrs'}\n"
        "print(sorted(new - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert set(warm_start.IMPORTED) >= {"torch", "flwr.clientapp"}
