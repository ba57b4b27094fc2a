"""New ClientApps without a new start: a process that has imported PyTorch makes them by forking.

Flower starts `flwr-clientapp` anew for every message, and each of them imports PyTorch before it
looks at the message: seconds of a board's processor in every round. Here a process of the device
imports what a ClientApp needs once, none of the app's own code, and waits. A stand-in for
`flwr-clientapp`, found first on PATH, hands its arguments over; the process forks, and its child
runs Flower's own `flwr_clientapp` with them. Every message still has a process of its own, which
can die alone; what was imported is in memory once. If the process is not there the stand-in starts
Flower's command as usual.

This file is imported by `fl_client` to `begin`, and run as a script, with the standard library
alone, for both other parts: the app's code comes from the SuperLink and must not be here before.
"""

import array
import contextlib
import gc
import importlib
import json
import os
import random
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

APP = "flwr-clientapp"
IMPORTED = (
    "flwr.app",
    "flwr.clientapp",
    "flwr.supernode.cli",
    "jiwer",
    "numpy.random",
    "psutil",
    "safetensors.torch",
    "soundfile",
    "soxr",
    "torch",
    "yaml",
)
"""What the project's ClientApp imports of others; a test keeps this complete."""
_SOCKET = "socket"
_PR_SET_NAME = 15  # linux/prctl.h
_KILLED = 137


def begin() -> bool:
    """Start the process that forks, and put the stand-in first on PATH; it ends with this process.

    Returns:
        False where there is no fork that is safe beside PyTorch (anything but Linux).
    """
    if sys.platform != "linux":
        return False
    real = shutil.which(APP)
    if real is None:
        return False
    folder = Path(tempfile.mkdtemp(prefix="shortwave-"))
    own = [sys.executable, "-P", str(Path(__file__).resolve())]
    stand_in = folder / APP
    words = [sys.executable, "-I", "-S", own[-1], "hand-over", str(folder / _SOCKET), real]
    stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    stand_in.chmod(0o700)
    # Whoever holds the other end lives; the kernel closes it however this process ends.
    alive, _kept = os.pipe()
    subprocess.Popen(
        [*own, "serve", str(folder), str(alive)], pass_fds=[alive], stdin=subprocess.DEVNULL
    )
    os.close(alive)
    os.environ["PATH"] = str(folder) + os.pathsep + os.environ.get("PATH", "")
    return True


def serve(folder: Path, alive: int) -> None:
    """Fork a ClientApp for each that asks, until `alive` is closed at its other end.

    Returns in the children as well, which have run their app then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the SuperNode
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / _SOCKET))
        listener.listen()
        for name in IMPORTED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # what a collection touches would have to be copied
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children go by themselves
        waiting: list[Any] = [listener, alive]
        while True:
            ready, _, _ = select.select(waiting, [], [])
            if alive in ready:
                break
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    os.close(alive)
                    _run_app(connection)
    shutil.rmtree(folder, ignore_errors=True)


def _run_app(connection: socket.socket) -> None:
    """Be the ClientApp that was asked for, in this process, to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        streams = array.array("i", bytes(2 * array.array("i").itemsize))
        text, extra, _, _ = connection.recvmsg(2**20, socket.CMSG_SPACE(len(streams.tobytes())))
        streams.frombytes(extra[0][2])
        for target, stream in zip((1, 2), streams[-2:], strict=True):
            os.dup2(stream, target)
            os.close(stream)
        order = json.loads(text)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = [APP, *order["arguments"]]
        _be_called(APP)
        random.seed()
        from flwr.supernode.cli import flwr_clientapp

        flwr_clientapp()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        with contextlib.suppress(OSError):
            connection.send(bytes([code & 255]))
    raise SystemExit(code)


def _be_called(name: str) -> None:
    """Show this name to `ps` and `top`."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def hand_over(path: str, real: str, arguments: list[str]) -> int:
    """Let the process at this socket run a ClientApp; the app's exit code, when it has ended."""
    order = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        streams = array.array("i", [1, 2])
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams.tobytes())]
        connection.sendmsg([json.dumps(order).encode()], extra)
    except OSError:
        os.execv(real, [real, *arguments])
    answer = b""
    with contextlib.suppress(OSError):
        answer = connection.recv(1)
    return answer[0] if answer else _KILLED


if __name__ == "__main__":
    part, *rest = sys.argv[1:]
    if part == "serve":
        serve(Path(rest[0]), int(rest[1]))
    else:
        sys.exit(hand_over(rest[0], rest[1], rest[2:]))
