"""ClientApps that are forked from a process that has imported PyTorch already."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fl_client import warm_start

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="it forks on Linux only")

# A device: forks, and passes on what it reads. Flower's command says where it runs; Flower's loop
# takes its tasks from a folder, and starts them by Flower's own executor.
DEVICE = """
import importlib, json, os, subprocess, sys
from pathlib import Path
import fl_client.federation_settings  # some of the project, which the app must not find imported
from fl_client import warm_start
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, SubprocessExecutor
import flwr.supernode.cli

loop = importlib.import_module("flwr.supercore.superexec.run_superexec")
tasks = Path(sys.argv[1])

def app():
    own = [n for n in sys.modules if n.partition(".")[0] in ("fl_client", "ssl_core", "partitions")]
    print(json.dumps({
        "arguments": sys.argv, "pid": os.getpid(), "torch": "torch" in sys.modules, "own": own,
    }), flush=True)
    if "wait" in sys.argv:
        import time
        time.sleep(60)
    sys.exit(3)

def run(address, insecure):
    while True:
        for task in tasks.iterdir():
            task.unlink()
            SubprocessExecutor().launch(ExecutionSpec(
                task_type=TaskType.CLIENT_APP, runtime_api_address=address, token=task.name,
                insecure=insecure, root_certificates_path=None, runtime_dependency_install=False,
                parent_pid=os.getpid(), suppress_output=False, task_id=1,
            ))
        loop.time.sleep(0.2)

loop.run_superexec = run
flwr.supernode.cli.flwr_clientapp = app
forks = warm_start.begin("127.0.0.1:9")
forks.watch(lambda text: print(json.dumps({"said": text}), flush=True))
print(json.dumps({"process": forks.process}), flush=True)
for line in sys.stdin:
    if line == "idle\\n":
        forks.idle()
    else:
        (tasks / line.strip()).touch()
        forks.task()
"""


class Device:
    """A process that has begun."""

    def __init__(self, folder: Path) -> None:
        tasks, binaries = folder / "tasks", folder / "binaries"
        for made in (tasks, binaries):
            made.mkdir()
        stand_in = binaries / warm_start.EXECUTOR
        stand_in.write_text('#!/bin/sh\necho "[\\"$*\\"]"\n', encoding="utf-8")
        stand_in.chmod(0o700)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DEVICE, str(tasks)],
            cwd=ROOT, env=os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.forking = psutil.Process(self.said()["process"])

    def said(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    begun = Device(tmp_path)
    yield begun
    begun.end()


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it has not happened within a minute"
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@linux
def test_an_app_runs_in_a_process_of_its_own_as_if_it_had_been_started(device: Device) -> None:
    seen = []
    for token in ("first", "second"):
        device.tell(token)
        said = device.said()
        assert said["arguments"] == [
            "flwr-clientapp", "--runtime-api-address", "127.0.0.1:9", "--token", token,
            "--insecure", "--parent-pid", str(device.forking.pid),
        ]  # fmt: skip
        assert not said["torch"]
        assert said["own"] == []
        seen.append(said["pid"])
    assert len({*seen, device.process.pid, device.forking.pid}) == 4


@linux
def test_an_idle_device_imports_torch_for_the_apps_to_come(device: Device) -> None:
    device.tell("idle")
    maps = Path(f"/proc/{device.forking.pid}/maps")
    until(lambda: "libtorch" in maps.read_text(encoding="utf-8"))
    device.tell("now")
    assert device.said()["torch"]


@linux
def test_a_killed_app_harms_no_other(device: Device) -> None:
    device.tell("wait")
    app = psutil.Process(device.said()["pid"])
    assert app.name() == "flwr-clientapp"
    app.kill()
    until(lambda: gone(app))
    device.tell("next")
    assert "next" in device.said()["arguments"]
    until(lambda: device.forking.children() == [])


@linux
@pytest.mark.parametrize("told", ["", "wait"])
def test_it_ends_with_the_device(device: Device, told: str) -> None:
    if told:  # before, it waits for a SuperNode
        device.tell(told)
        device.said()
    device.end()
    until(lambda: gone(device.forking))


@linux
def test_signals_for_all_leave_its_end_to_the_device(device: Device) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        device.forking.send_signal(number)
    device.tell("one")
    assert "one" in device.said()["arguments"]


@linux
def test_without_it_flowers_own_command_is_started(device: Device) -> None:
    device.forking.kill()
    assert "as with --cold-start" in device.said()["said"]
    own = f"--parent-pid {device.process.pid}"
    assert device.said() == [f"--insecure --runtime-api-address 127.0.0.1:9 {own}"]


@linux
def test_a_machine_without_room_for_it_starts_every_app_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    assert warm_start.begin("127.0.0.1:9") is None


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
        "import fl_client.client_app, fl_client.local_training, fl_client.task_training\n"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "known = sys.stdlib_module_names | set(warm_start._OWN) | {'attr', 'attrs'}\n"
        "print(sorted(new - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert set(warm_start.IMPORTED) >= {"torch", "flwr.clientapp"}
