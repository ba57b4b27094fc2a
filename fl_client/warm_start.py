"""Starts ClientApps by forking a process that has already imported PyTorch.

Flower starts a new `flwr-clientapp` for every message, and each imports PyTorch first, which takes
seconds of a board's processor in every round. Here the device forks a server process, which imports
a ClientApp's third-party packages while the SuperNode looks for its SuperLink. A stand-in for
`flwr-clientapp`, first on PATH, sends its arguments to that server, which forks a child; the child
runs Flower's own `flwr_clientapp` with them, on the app's code as sent by the SuperLink. Every
message still has a process of its own, whose death harms no other. `flower-superexec`, which starts
the ClientApps, is forked likewise. Flower itself is imported once for all of them. Without the
server the stand-ins start Flower's commands as usual.

The stand-ins run this file as a script, with only the standard library.
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

if __name__ != "__main__":  # the stand-ins have the standard library only
    from fl_client.page_release import release_program_pages

APP, EXECUTOR = "flwr-clientapp", "flower-superexec"
COMMANDS = {
    APP: ("flwr.supernode.cli", "flwr_clientapp"),
    EXECUTOR: ("flwr.supercore.cli", "flower_superexec"),
}
"""Commands that are forked: module and function of each."""
SHARED = tuple(module for module, _ in COMMANDS.values())
"""What every process of the device imports, before the first fork."""
IMPORTED = (
    "docstring_parser",
    "flwr.app",
    "flwr.clientapp",
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
    """Fork the server process, which ends with this one, and put the stand-ins first on PATH.

    Call it while this process has a single thread.

    Returns:
        False if forking is not safe with PyTorch (on anything but Linux), or if the stand-ins
        cannot be written: the disk is full, or `TMPDIR` is too long for a socket.
    """
    real = {name: shutil.which(name) for name in COMMANDS}
    if sys.platform != "linux" or None in real.values():
        return False
    listener = socket.socket(socket.AF_UNIX)
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="shortwave-"))
        here = str(Path(__file__).resolve())
        for name, path in real.items():
            words = [sys.executable, "-I", "-S", here, str(folder / _SOCKET), name, str(path)]
            stand_in = folder / name
            stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
            stand_in.chmod(0o700)
        listener.bind(str(folder / _SOCKET))
        listener.listen()
    except OSError:
        listener.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return False
    _import(SHARED)
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


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it touches


def _wait(listener: socket.socket, alive: int) -> int:
    """Fork a command for each connection, until the other end of `alive` is closed.

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
    todo = list(IMPORTED)
    while True:
        # Between two imports, look for the executor, which needs none of them.
        ready, _, _ = select.select(waiting, [], [], 0 if todo else None)
        if not ready:
            importlib.import_module(todo.pop(0))
            if not todo:
                _import(())
                release_program_pages()
            continue
        if alive in ready:
            return 0
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                os.close(alive)
                _run(connection, todo)


def _run(connection: socket.socket, todo: list[str]) -> None:
    """Run the requested command in this process, to its end.

    Args:
        connection: to the stand-in.
        todo: packages of a ClientApp that are still to be imported.
    """
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
        name = order["name"]
        sys.argv = [name, *order["arguments"]]
        _be_called(name)
        random.seed()
        if name == EXECUTOR:
            connection.send(b"\0")  # nobody waits for its end
        else:
            _import(tuple(todo))
        module, function = COMMANDS[name]
        getattr(importlib.import_module(module), function)()
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


def hand_over(path: str, name: str, real: str, arguments: list[str]) -> int:
    """Let the server process run a command.

    Args:
        path: socket of the server process.
        name: of the command.
        real: Flower's own command, run if there is no server.
        arguments: of the command.

    Returns:
        A ClientApp's exit code, when it has ended; 0 for the executor, when it has started.
    """
    order = {
        "name": name,
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
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
    sys.exit(hand_over(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
