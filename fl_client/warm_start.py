"""New ClientApps without a new start: a process that has imported PyTorch makes them by forking.

Flower starts `flwr-clientapp` anew for every message, and each of them imports PyTorch before it
looks at the message: seconds of a board's processor in every round. Here a device imports what a
ClientApp needs of others once and forks a process that waits. A stand-in for `flwr-clientapp`,
found first on PATH, hands its arguments over; the process forks again, and that child runs Flower's
own `flwr_clientapp` with them, on the app's code as the SuperLink sends it. Every message still has
a process of its own, which can die alone; what was imported is in memory once, for the SuperNode
too. If the process is not there the stand-in starts Flower's command as usual.

The stand-in is this file, run as a script with the standard library alone.
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
import sys
import tempfile
import traceback
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
_OWN = ("common", "partitions", "ssl_core", "fl_client", "fl_server")
_SOCKET = "socket"
_PR_SET_NAME = 15  # linux/prctl.h
_KILLED = 137
_LARGEST_ORDER = 2**22


def begin() -> bool:
    """Fork the process that waits, and put the stand-in first on PATH; it ends with this process.

    To be called while this process has a single thread.

    Returns:
        False where there is no fork that is safe beside PyTorch (anything but Linux), and where
        the stand-in cannot be written: a full disk, a `TMPDIR` too long for a socket.
    """
    real = shutil.which(APP)
    if sys.platform != "linux" or real is None:
        return False
    listener = socket.socket(socket.AF_UNIX)
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="shortwave-"))
        stand_in, here = folder / APP, str(Path(__file__).resolve())
        words = [sys.executable, "-I", "-S", here, str(folder / _SOCKET), real]
        stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        stand_in.chmod(0o700)
        listener.bind(str(folder / _SOCKET))
        listener.listen()
    except OSError:
        listener.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return False
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a collection touches would have to be copied
    # Who holds the other end lives; the kernel closes it however that process ends.
    alive, kept = os.pipe()
    if os.fork() == 0:
        os.close(kept)
        code = 1
        try:
            code = _wait(listener, alive)
            shutil.rmtree(folder, ignore_errors=True)
        except SystemExit as end:  # of a ClientApp
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    listener.close()
    os.close(alive)
    os.environ["PATH"] = str(folder) + os.pathsep + os.environ.get("PATH", "")
    return True


def _wait(listener: socket.socket, alive: int) -> int:
    """Fork a ClientApp for each that asks, until `alive` is closed at its other end.

    Raises:
        SystemExit: in the children, when their app has ended.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the SuperNode, with which it ends
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children go by themselves
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]  # the app brings its own
    waiting: list[Any] = [listener, alive]
    while True:
        ready, _, _ = select.select(waiting, [], [])
        if alive in ready:
            return 0
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                os.close(alive)
                _run_app(connection)


def _run_app(connection: socket.socket) -> None:
    """Be the ClientApp that was asked for, in this process, to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        streams = array.array("i", [0, 0])
        room = socket.CMSG_SPACE(len(streams.tobytes()))
        text, extra, _, _ = connection.recvmsg(_LARGEST_ORDER, room)
        while not text.endswith(b"\n"):
            more = connection.recv(_LARGEST_ORDER)
            if not more:  # who asked has gone
                raise SystemExit(code)
            text += more
        streams = array.array("i", extra[0][2])
        for target, stream in enumerate(streams, 1):
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
    order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        streams = array.array("i", [1, 2])
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams.tobytes())]
        text = json.dumps(order).encode() + b"\n"
        sent = connection.sendmsg([text], extra)
        connection.sendall(text[sent:])
    except OSError:
        os.execv(real, [real, *arguments])
    answer = b""
    with contextlib.suppress(OSError):
        answer = connection.recv(1)
    return answer[0] if answer else _KILLED


if __name__ == "__main__":
    sys.exit(hand_over(sys.argv[1], sys.argv[2], sys.argv[3:]))
