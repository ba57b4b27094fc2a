"""Starts ClientApps by forking a process that imports PyTorch when the device is idle.

Flower's SuperNode starts `flower-superexec`, which asks it for tasks and starts a `flwr-clientapp`
for each, a new Python that imports PyTorch: seconds of a board's processor in every round. Here the
device forks a process before its SuperNode starts. That process runs Flower's own loop of
`flower-superexec`, but forks where the loop would start a program: the child runs Flower's own
`flwr_clientapp`, on the app's code as sent by the SuperLink. Every message still has a process of
its own, whose death harms no other. Flower itself is imported once for all of them.

To describe itself a device needs no PyTorch. The process imports it after the first answer, or once
no message has come for a while. Should the process end, the device starts Flower's commands as
usual.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import random
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from fl_client.page_release import release_program_pages
from fl_client.unneeded import left_out

APP, EXECUTOR = "flwr-clientapp", "flower-superexec"
SHARED = (
    "flwr.supernode.cli",
    "flwr.supercore.superexec.executor.subprocess_executor",
    "flwr.supercore.superexec.run_superexec",
)
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
LOOK = 3.0
"""Seconds after which the loop looks for a task of which it was not told."""
_TASK, _IDLE = b"t", b"i"
_OWN = ("common", "partitions", "ssl_core", "fl_client", "fl_server")
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


class Forks:
    """The SuperNode's hold on the process that forks its ClientApps."""

    def __init__(self, process: int, pipe: int, address: str) -> None:
        """Take over the process.

        Args:
            process: its id.
            pipe: by which it is told what happens.
            address: HOST:PORT of the SuperNode's runtime API.
        """
        self.process, self.address = process, address
        self._pipe = pipe
        os.set_blocking(pipe, False)

    def task(self) -> None:
        """Tell the process that there is a task."""
        self._tell(_TASK)

    def idle(self) -> None:
        """Tell the process that nothing needs the processor now."""
        self._tell(_IDLE)

    def _tell(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # it is busy for long, or has ended
            os.write(self._pipe, what)

    def watch(self, say: Callable[[str], None]) -> None:
        """Start Flower's own `flower-superexec` if the process ends, for as long as this one runs.

        Args:
            say: prints a line.
        """
        threading.Thread(target=self._watch, args=(say,), name="forks", daemon=True).start()

    def _watch(self, say: Callable[[str], None]) -> None:
        os.waitpid(self.process, 0)
        say(
            "the process that starts ClientApps has ended; from now on "
            "every round starts Python and PyTorch anew, as with --cold-start"
        )
        words = ["--insecure", "--runtime-api-address", self.address]
        subprocess.Popen([EXECUTOR, *words, "--parent-pid", str(os.getpid())])


def begin(address: str) -> Forks | None:
    """Fork the process, which ends with this one; only one with a single thread may call this.

    Args:
        address: HOST:PORT at which the SuperNode of this process will have its runtime API.

    Returns:
        None if forking is not safe with PyTorch (on anything but Linux), or fails.
    """
    if sys.platform != "linux":
        return None
    orders, pipe = os.pipe()
    try:
        with left_out():
            _import(SHARED)
        process = os.fork()
    except (ImportError, OSError):  # another version of Flower, or no room for a process
        os.close(orders)
        os.close(pipe)
        return None
    if process:
        os.close(orders)
        return Forks(process, pipe, address)
    os.close(pipe)
    _leave(lambda: _serve(orders, address))


def _import(names: Sequence[str]) -> None:
    """Import modules so that processes forked from this one share their pages."""
    gc.disable()  # what a collection frees leaves holes, and the next object there copies the page
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()  # a collection in a child would copy every page that it touches


def _serve(orders: int, address: str) -> None:
    """Fork a ClientApp for each task, until the other end of the pipe `orders` is closed."""
    device = os.getppid()
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != device:  # it has ended meanwhile
        return
    _control(_PR_SET_NAME, EXECUTOR.encode())
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # for the SuperNode, with which this process ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child becomes a zombie
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]  # the app has its own copy
    pace = _Pace(orders)
    loop: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    launcher: Any = importlib.import_module(SHARED[1])
    loop.time = pace
    loop.register_signal_handlers = lambda **_: None
    launcher.subprocess = SimpleNamespace(Popen=_start, DEVNULL=subprocess.DEVNULL)
    pace.wait(None)  # until the SuperNode is there
    loop.run_superexec(address, insecure=True)


class _Pace:
    """Stands in for the module `time` in Flower's loop, which then waits for tasks."""

    def __init__(self, orders: int) -> None:
        """Take orders from a pipe."""
        self._orders = orders
        self._todo = list(IMPORTED)
        self._idle = False

    def sleep(self, _: float) -> None:
        """Return when there may be a task."""
        self.wait(LOOK)

    def wait(self, patience: float | None) -> None:
        """Return when there may be a task; meanwhile import, as long as the device is idle.

        Args:
            patience: seconds after which to return anyhow; None for no end.
        """
        while True:
            imports = self._idle and self._todo
            if select.select([self._orders], [], [], 0 if imports else patience)[0]:
                told = os.read(self._orders, 4_096)
                if not told:
                    raise SystemExit(0)
                self._idle = told.endswith(_IDLE)
                return
            if not imports:
                return
            _import([self._todo.pop(0)])
            if not self._todo:
                release_program_pages()


def _start(command: Sequence[str], **options: Any) -> None:
    """Stands in for `subprocess.Popen` in Flower's loop, and forks what is a ClientApp."""
    if command[0] != APP or options:
        subprocess.Popen(command, **options)
    elif os.fork() == 0:
        _leave(lambda: _run(command))


def _run(command: Sequence[str]) -> None:
    """Run a ClientApp in this process."""
    for number in (*_STOPS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _control(_PR_SET_NAME, APP.encode())
    random.seed()
    sys.argv = list(command)
    importlib.import_module("flwr.supernode.cli").flwr_clientapp()


def _leave(run: Callable[[], None]) -> NoReturn:
    """Run in a process that was just forked, and end it."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _control(option: int, value: int | bytes) -> None:
    """Set an attribute of this process, see prctl(2)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
