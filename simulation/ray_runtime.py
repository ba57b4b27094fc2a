"""Ray under the simulation: starts our own or joins a cluster, and notices when it fails."""

import contextlib
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil
import ray

from common.cores import usable_cores
from common.errors import ShortwaveError, UsageError
from common.lock import Locked, lock
from common.process_environment import tuned
from common.stop import stop_on_sigterm
from fl_client.environment import QUIET
from simulation.supervisor import ESSENTIAL, alive, end_processes, ended

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("common", "partitions", "ssl_core", "fl_client", "fl_server", "simulation")
_PREFIX = "sw-ray-"
_LONGEST_FOLDER = 40
"""Characters of the folder that holds Ray's. Ray makes sockets some 60 characters below it, and
Linux allows a socket's path 107."""
_RAISED = "error raised in its creation task"
"""In Ray's message about a worker that ended with an exception, which follows."""
_REACH = 10.0
"""Seconds to reach a cluster."""
_YOUNG = 60.0
"""Seconds after which a folder without a lock is nobody's."""
_END = 10.0
"""Seconds that Ray's processes get to end."""


class RayFailed(ShortwaveError):
    """Ray does not work; no client is to blame, and the run can be resumed."""


class RayLost(RayFailed):
    """A process of Ray itself has ended; starting Ray again helps."""


class RayRuntime:
    """Our own Ray, or a cluster that this process has joined."""

    def __init__(
        self, *, workers: int | None, most: int, address: str, weights_bytes: int, gpu: bool
    ) -> None:
        """Take the settings; `start` starts.

        Args:
            workers: number of worker processes; None takes all usable cores.
            most: workers that can be busy at once.
            address: of a Ray cluster; empty starts Ray here.
            weights_bytes: size of the shared weights, which the object store holds several times.
            gpu: whether workers need GPUs.
        """
        self.address, self.weights_bytes, self.gpu = address, weights_bytes, gpu
        self.workers = workers or (0 if address else min(usable_cores(), most))
        self._most = most
        self.gpus_each = 0.0
        self.node = ""
        """Ray's id of this machine."""
        self._essential: dict[str, psutil.Process] = {}
        self._folder: Path | None = None
        self._lock: IO[str] | None = None

    def start(self) -> None:
        """Start or join Ray.

        Raises:
            UsageError: the cluster has too few cores.
            RayFailed: Ray does not start, or has no GPU although workers need them.
        """
        before = set(psutil.Process().children())
        try:
            self._join() if self.address else self._start_own()
            self.node = ray.get_runtime_context().get_node_id()
        except Exception as error:  # Ray raises errors of many kinds
            reason = one_line(error)
            self.close()
            what = f"cannot join the cluster {self.address}" if self.address else "does not start"
            raise RayFailed(f"Ray {what}: {reason}") from None
        finally:
            stop_on_sigterm()  # Ray has put a handler of its own in its place, which aborts
        if self.address:
            self._fit_cluster()
        else:
            own = [each for each in psutil.Process().children() if each not in before]
            self._essential = {each.name(): each for each in own if each.name() in ESSENTIAL}
        if self.gpu:
            self.gpus_each = gpus_of_a_worker(
                int(ray.cluster_resources().get("GPU", 0)), self.workers
            )

    def _start_own(self) -> None:
        self._folder, self._lock = _own_folder()
        _let_workers_import()
        ray.init(
            address="local",
            num_cpus=self.workers,
            include_dashboard=False,
            object_store_memory=max(
                256 * 2**20, int(self.weights_bytes * (2 * self.workers + 2) * 1.05)
            ),
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(self._folder),
        )

    def _join(self) -> None:
        _require_reachable(self.address)
        environment = tuned({}) | QUIET
        ray.init(
            address=self.address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={
                "py_modules": [str(_ROOT / name) for name in _PACKAGES],
                "env_vars": environment,
            },
        )

    def _fit_cluster(self) -> None:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if max(1, self.workers) > cores:
            self.close()
            raise UsageError(
                f"--workers {self.workers or 1}: the cluster {self.address} has {cores} CPUs"
            )
        self.workers = self.workers or min(cores, self._most)

    def check(self) -> None:
        """Raise `RayLost` if a process that our own Ray needs has ended."""
        for name, process in self._essential.items():
            if not alive(process):
                raise RayLost(ended(name))

    def free(self) -> str:
        """What Ray could still give to workers, in words."""
        with contextlib.suppress(ray.exceptions.RayError):
            left = ray.available_resources()
            return f"Ray has {left.get('CPU', 0):g} CPUs and {left.get('GPU', 0):g} GPUs free"
        return "Ray does not say what is free"

    def close(self) -> None:
        """Leave the cluster, or end our own Ray and every process of it."""
        own = [] if self.address else psutil.Process().children(recursive=True)
        with contextlib.suppress(Exception):  # whatever is left of Ray
            ray.shutdown()
        end_processes(own, _END)
        self._essential = {}
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._lock = None


def gpus_of_a_worker(gpus: int, workers: int) -> float:
    """GPUs that each worker gets: one whole, or such a fraction that a GPU serves several.

    Args:
        gpus: GPUs that Ray has.
        workers: worker processes.

    Raises:
        RayFailed: there is no GPU.
    """
    if not gpus:
        raise RayFailed("--device cuda: Ray sees no GPU; use --device cpu")
    together = math.ceil(workers / gpus)
    return math.floor(10_000 / together) / 10_000  # Ray counts in ten-thousandths


def _require_reachable(address: str) -> None:
    """Raise `OSError` if nobody listens at `host:port`, for which Ray itself would look minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()


def one_line(error: Exception) -> str:
    """What went wrong, from one of Ray's errors, which fill a page."""
    text = str(getattr(error, "cause", None) or error)
    if isinstance(error, ray.exceptions.RayActorError) and _RAISED not in text:
        return "its process has ended, as when memory runs out"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def _own_folder() -> tuple[Path, IO[str] | None]:
    """A new short folder for Ray's files, and the lock that says it is in use.

    Folders whose process was killed are removed.
    """
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.cwd())]
    short = [each for each in places if len(each) <= _LONGEST_FOLDER and os.access(each, os.W_OK)]
    if not short:
        raise RayFailed(f"no folder that Ray can use: the path of {places[0]} is too long")
    for old in Path(short[0]).glob(f"{_PREFIX}*"):
        with contextlib.suppress(Locked, OSError):
            if time.time() - old.stat().st_mtime < _YOUNG:
                continue
            held = lock(old / ".lock", 0.0)
            shutil.rmtree(old, ignore_errors=True)
            if held is not None:
                held.close()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=short[0]))
    return folder, lock(folder / ".lock", 0.0)


def _let_workers_import() -> None:
    """Give child processes this project's packages and settings."""
    root = str(_ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    if root not in sys.path:
        sys.path.insert(0, root)
    os.environ.update(tuned(os.environ))
