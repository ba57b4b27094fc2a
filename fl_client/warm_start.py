"""Starts ClientApps by forking a process that has already imported PyTorch.

Flower starts a new `flwr-clientapp` for every message, and each imports PyTorch first, which takes
seconds of a board's processor in every round. Here the device imports a ClientApp's third-party
packages once and forks a server process. A stand-in for `flwr-clientapp`, first on PATH, sends its
arguments to that server, which forks a child; the child runs Flower's own `flwr_clientapp` with
them, on the app's code as sent by the SuperLink. Every message still has a process of its own,
whose death harms no other; the imported packages are in memory once, for the SuperNode too. Without
the server the stand-in starts Flower's command as usual.

The stand-in is this file, run as a script with only the standard library.
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
    "attrs",
    "docstring_parser",
    "flwr.app",
    "flwr.clientapp",
    "flwr.supernode.cli",
    "jsonargparse",
    "numpy.random",
    "psutil",
    "safetensors.torch",
    "soundfile",
    "soxr",
    "torch",
    "yaml",
)
"""Third-party packages that the ClientApp imports; a test keeps this complete."""
_OWN = ("common", "partitions", "ssl_core", "fl_client", "fl_server")
_SOCKET = "socket"
_PR_SET_NAME = 15  # linux/prctl.h
_KILLED = 137
_LARGEST_ORDER = 2**22


def begin() -> bool:
    """Fork the server process, which ends with this one, and put the stand-in first on PATH.

    Call it while this process has a single thread.

    Returns:
        False if forking is not safe with PyTorch (on anything but Linux), or if the stand-in cannot
        be written: the disk is full, or `TMPDIR` is too long for a socket.
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
    gc.freeze()  # a collection in a child would copy every page that it touches
    # The kernel closes `kept` when this process ends, however it ends.
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
    """Fork a ClientApp for each connection, until the other end of `alive` is closed.

    Raises:
        SystemExit: in the children, when their app has ended.
    """
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # meant for the SuperNode, with which this process ends
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child becomes a zombie
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]  # the app has its own copy
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
    """Run the requested ClientApp in this process, to its end."""
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
            if not more:  # the stand-in has gone
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
    """Set the process name that `ps` and `top` show."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def hand_over(path: str, real: str, arguments: list[str]) -> int:
    """Let the server process run a ClientApp; returns the app's exit code when it has ended.

    Args:
        path: socket of the server process.
        real: Flower's own command, run if there is no server.
        arguments: of the command.
    """
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
