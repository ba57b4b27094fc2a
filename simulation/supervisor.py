"""Runs the simulation in a child process, and starts it again when Ray, not a client, has failed.

Ray's library ends the process that has lost Ray, without an error, and some of its calls never
return. So a parent looks on: it says what happened, ends every process that is left and goes on
from the last round.
"""

import atexit
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "SHORTWAVE_SUPERVISOR"
"""For the child: its parent's process id and the file descriptor to report to."""
ESSENTIAL = ("gcs_server", "raylet")
"""Processes without which Ray does nothing."""
_RESTARTS = 3
"""Times that the child is started again before another round is saved."""
_GRACE = 15.0
"""Seconds that the child gets to notice that Ray has failed."""
_END = 5.0
"""Seconds that other processes get to end by themselves after the child has ended."""
_LOOK = 1.0
"""Seconds between two looks at the processes."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class Supervisor:
    """The parent."""

    def __init__(self, script: Path, words: Sequence[str]) -> None:
        """Take the command; `run` starts it.

        Args:
            script: to run in the child, see `Child`.
            words: of the command line.
        """
        self.script, self.words = script, list(words)
        self._told: dict[str, Any] = {}
        self._seen: set[psutil.Process] = set()
        self._essential: dict[str, psutil.Process] = {}
        self._stopped = 0
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the child, again if need be; the exit code."""
        _prctl(_SET_CHILD_SUBREAPER, 1)  # processes that the child leaves behind become ours
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGTSTP, self._suspend)
        failures, saved = 0, ""
        while True:
            code, reason = self._run_child()
            self._end_others()
            if self._stopped:
                return code if not reason else 128 + self._stopped
            if not reason:
                return code
            failures = failures + 1 if saved == self._saved() else 1
            saved = self._saved()
            run = self._told.get("run", "")
            if failures > _RESTARTS:
                print(f"error: {reason}" + (f"; go on with --resume {run}" if run else ""),
                      file=sys.stderr, flush=True)  # fmt: skip
                return 1
            print(f"{reason}; no client is to blame: starting again", file=sys.stderr, flush=True)
            self.words = self._told.get("again", self.words)

    def _saved(self) -> str:
        """Name of the newest checkpoint."""
        folder = Path(self._told.get("run", os.devnull)) / "checkpoints"
        return max((path.name for path in folder.glob("*")), default="")

    def _pass_on(self, number: int, _: Any) -> None:
        self._stopped = self._stopped or number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _suspend(self, *_: Any) -> None:
        """Suspend the child too on Ctrl-Z, until this process goes on."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._child.send_signal(signal.SIGCONT)

    def _run_child(self) -> tuple[int, str]:
        """Start the child and wait; its exit code and, if Ray has failed, what happened."""
        self._told |= {"ended": False, "lost": "", "watch": False}
        reading, writing = os.pipe()
        self._child = subprocess.Popen(
            [sys.executable, str(self.script), *self.words],
            env=os.environ | {VARIABLE: f"{os.getpid()} {writing}"},
            pass_fds=(writing,),
            process_group=0,  # Ctrl-C comes here, and is passed on once
        )
        os.close(writing)
        if self._stopped:  # before there was a child
            self._child.send_signal(self._stopped)
        with os.fdopen(reading, "rb", buffering=0) as reports:
            lost = self._wait(reports)
        code = self._child.wait()
        if self._told["lost"] or lost:
            return 1, str(self._told["lost"] or lost)
        if not self._told["ended"]:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return 1, f"the simulation's process has ended ({how}), as when Ray fails"
        return code, ""

    def _wait(self, reports: Any) -> str:
        """Read reports until the child has ended; why it was ended here, if it was."""
        assert self._child is not None
        rest, since = b"", 0.0
        while self._child.poll() is None:
            ready, _, _ = select.select([reports], [], [], _LOOK)
            if ready:
                part = reports.read(65536)
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._told |= json.loads(line)
                if not part:
                    time.sleep(0.05)  # it has closed its end
                continue
            self._look()
            if not (self._told["watch"] and self._failed()):
                since = 0.0
            elif not since:
                since = time.monotonic()
            elif time.monotonic() - since > _GRACE:
                self._child.kill()
                return self._failed()
        self._look()
        for line in (rest + (reports.read(65536) or b"")).split(b"\n"):
            if line:
                self._told |= json.loads(line)
        return ""

    def _look(self) -> None:
        """Remember all descendants, for the time when the child that knows them has gone."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                if process not in self._seen:
                    self._seen.add(process)
                    if process.name() in ESSENTIAL:
                        self._essential[process.name()] = process

    def _failed(self) -> str:
        """Which process that Ray needs has ended, in words; empty if none has."""
        return next(
            (ended(name) for name, process in self._essential.items() if not alive(process)), ""
        )

    def _end_others(self) -> None:
        """End the descendants that are left; none may outlive the command."""
        self._look()
        end_processes(self._seen, _END)
        self._seen.clear()
        self._essential.clear()


class Child:
    """The child's side: what it tells its parent. Without a parent it tells nobody."""

    def __init__(self) -> None:
        """Find the parent, and end when it ends."""
        parent, _, descriptor = os.environ.pop(VARIABLE, "").partition(" ")
        self._descriptor = int(descriptor) if descriptor else -1
        if parent:
            atexit.register(self.tell, ended=True)  # not called where Ray's library ends Python
            _prctl(_SET_PDEATHSIG, signal.SIGTERM)  # so that Ray's processes are ended too
            threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()

    def tell(self, **values: Any) -> bool:
        """Report values; whether there is a parent.

        Args:
            values: `run`, the run directory; `again`, words of the command line that go on with
                it; `watch`, whether Ray is in use; `lost`, why it has failed; `ended`, true at the
                end.
        """
        if self._descriptor < 0:
            return False
        with contextlib.suppress(OSError):
            os.write(self._descriptor, json.dumps(values).encode() + b"\n")
        return True


def _end_with(parent: int) -> None:
    """End this process, at the latest `_GRACE` seconds after its parent."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def ended(name: str) -> str:
    """That one of Ray's processes has ended, in words."""
    return f"Ray's process {name} has ended"


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def end_processes(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Wait for processes to end, and kill those that have not.

    Args:
        processes: to end.
        seconds: to wait.
    """
    _, left = psutil.wait_procs([each for each in processes if alive(each)], timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=seconds)


def _prctl(option: int, value: int) -> None:
    """Linux' prctl(2); nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


SUPERVISED = Child()
"""This process, as the child of a supervisor; it has none if it is not one's child."""
