"""Ctrl-C and SIGTERM stop a command, with an exit code that says which."""

import signal
import subprocess
import sys

import pytest

WAITING = "import time; print('ready', flush=True); time.sleep(60)"
COMMAND = f"""
from common import command
def main(_):
    {WAITING}
command.run(main)
"""
TRAINING = """
import time
from common import command
from common.errors import Interrupted
from common.stop import Stop
def main(_):
    with Stop() as stop:
        print("ready", flush=True)
        end = time.monotonic() + 60
        while not stop():
            assert time.monotonic() < end
            time.sleep(0.01)
        print("stopping", flush=True)
        time.sleep(0.5)  # saves its checkpoint
        print("saved", flush=True)
        raise Interrupted("interrupted; go on with --resume runs/one")
command.run(main)
"""


def run(script: str, *numbers: signal.Signals) -> tuple[int, str, str]:
    """Send signals, one for each line that the script prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    printed = ""
    for number in numbers:
        printed += process.stdout.readline()
        process.send_signal(number)
    rest, errors = process.communicate(timeout=50)
    return process.returncode, printed + rest, errors


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_command_stops_at_once(number: signal.Signals, code: int) -> None:
    assert run(COMMAND, number) == (code, "ready\n", "interrupted\n")


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGTERM], 130),
    ],
)
def test_a_training_saves_first_and_says_how_to_go_on(
    numbers: list[signal.Signals], code: int
) -> None:
    assert run(TRAINING, *numbers) == (
        code,
        "ready\nstopping\nsaved\n",
        "interrupted; go on with --resume runs/one\n",
    )


def test_a_second_ctrl_c_stops_a_training_at_once() -> None:
    code, printed, errors = run(TRAINING, signal.SIGINT, signal.SIGINT)
    assert (code, printed, errors) == (130, "ready\nstopping\n", "interrupted\n")
