"""Real faults at random moments of a real federation, and what is lost by them.

`python -m benchmarks.faults --runs 10` starts a SuperLink and three SuperNodes on loopback for each
run, injects one fault and prints one JSON object as its last line. A run is gone on with by
`resume` where the server's side failed. The disk faults mount a small tmpfs, which needs root.

Bad updates come from a test double: the SuperNode of one client finds a `flwr-clientapp` that wraps
Flower's `ClientApp.__call__` and changes the reply, so that all of the project's code is as it is.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console

from benchmarks.flower_processes import free_port, write_tones
from common import command
from common.errors import ShortwaveError, UsageError
from common.progress import bar_of
from fl_client.environment import QUIET
from fl_server.server_app import stored_settings
from ssl_core.training import checkpoint
from ssl_core.training.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
NODES = 3
_TRAIN = "Receiving: train message"
_SENT = "Sending: train message"
_UP = "Uvicorn running"
_FAILURE = re.compile(r"^ *client (\d+): (.+)$", re.MULTILINE)
_GOING_ON = re.compile(r"^going on with .* at round (\d+) of", re.MULTILINE)
_ROUND = re.compile(r"^round (\d+)/\d+  loss", re.MULTILINE)

# What stands in for `flwr-clientapp`; the first line and the constants are written before it.
_DOUBLE = """
import json
import pickle
import sys
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp

right = ClientApp.__call__


def wrong(app, message, context):
    reply = right(app, message, context)
    task = message.content.config_records.get("task", {})
    if "round" not in task or reply.has_error():
        return reply
    number, kept = int(task["round"]), Path(FOLDER, "reply")
    if FAULT == "replayed":
        if number not in ROUNDS:
            kept.write_bytes(pickle.dumps(reply.content))
            return reply
        reply = Message(pickle.loads(kept.read_bytes()), reply_to=message)
    elif number not in ROUNDS:
        return reply
    else:
        update = reply.content.array_records["update"]
        reply.content["update"] = ArrayRecord(
            {name: spoilt(array) for name, array in update.items()}
        )
    with open(Path(FOLDER, "bad.jsonl"), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(number) + "\\n")
    return reply


def spoilt(array):
    data = array.data
    if FAULT == "truncated":
        data = data[: len(data) // 2]
    else:
        header = 8 + int.from_bytes(data[:8], "little")  # of the safetensors format
        data = data[:header] + (PATTERN * len(data))[: len(data) - header]
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)


ClientApp.__call__ = wrong
from flwr.supernode.cli import flwr_clientapp

sys.argv[0] = "flwr-clientapp"
sys.exit(flwr_clientapp())
"""
_POISONS = (b"\xff\xff\xff\xff", b"\xff\xff\x7f\x7f")
"""Bytes that are, as fp32, not a number, and 3.4e38; in int8 they make such scales."""


class TimeUp(ShortwaveError):
    """A run took longer than it may."""


@dataclasses.dataclass
class Outcome:
    """What a run came to."""

    fault: str
    encoding: str
    completed: bool = False
    """All rounds are in metrics.jsonl in the end."""
    rounds_lost: int = 0
    """Rounds that failed or had to be taken again."""
    audio_counted_twice: bool = False
    """A client twice in a round, or an update of another round folded."""
    state_lost: bool = False
    """The run directory or its last checkpoint cannot be opened, or a client never recovered."""
    updates_lost: int = 0
    """Answers of clients that are missing from the rounds."""
    clients_not_back: int = 0
    """Clients that are missing from the last round."""
    bad_updates_folded: int = 0
    """Poisoned, truncated or replayed updates that became part of the model."""
    resumed: int = 0
    """Times that the run was gone on with."""
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A disk of its own that can be filled, mounted while in use.

    Raises:
        UsageError: this user may not mount.
    """
    path.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        raise UsageError("the disk faults mount a tmpfs: run as root, or leave them out (--faults)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def can_mount() -> bool:
    """Whether the disk faults can be injected here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder, "disk"), 1):
                return True
        except (UsageError, OSError):
            return False


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for `leave` bytes; returns the file to delete."""
    path = disk / "filler"
    block = bytes(2**16)
    with path.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        stream.truncate(max(0, stream.tell() - leave))
    return path


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM, so that nothing is left behind."""
    caught: list[int] = []
    asked = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda number, frame: caught.append(number)) for one in asked]
    try:
        yield
    finally:
        for one, handler in zip(asked, before, strict=True):
            signal.signal(one, handler)
    if caught:
        raise KeyboardInterrupt


class Proxy:
    """A way to the SuperLink that can be cut in mid-upload."""

    def __init__(self, target: int) -> None:
        """Listen on a free port and pass on to the port `target`."""
        self.target, self.port = target, free_port()
        self.was_cut = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._left: int | None = None
        self._shut_until = 0.0
        self._away = 0.0
        self._ended = False
        threading.Thread(target=self._listen, daemon=True).start()

    def cut_after(self, sent: int, away: float) -> None:
        """Cut all connections once `sent` more bytes went up; refuse new ones for some seconds."""
        with self._lock:
            self._left, self._away = sent, away

    def cut(self) -> None:
        """Reset all connections now."""
        with self._lock:
            self._left, self._shut_until = None, time.monotonic() + self._away
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD)
            one.close()
        self.was_cut.set()

    def close(self) -> None:
        """End it."""
        self._ended = True
        self.cut()

    def _listen(self) -> None:
        while not self._ended:
            if time.monotonic() < self._shut_until:
                time.sleep(0.05)
                continue
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("127.0.0.1", self.port))
                server.listen()
                server.settimeout(0.05)
                while not self._ended and time.monotonic() >= self._shut_until:
                    with contextlib.suppress(TimeoutError):
                        self._join(server.accept()[0])

    def _join(self, near: socket.socket) -> None:
        near.settimeout(None)
        try:
            far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._sockets |= {near, far}
        for source, sink, up in ((near, far, True), (far, near, False)):
            threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**14):
                due = False
                with self._lock:
                    if up and self._left is not None:
                        self._left -= len(data)
                        due = self._left <= 0
                if due:
                    sink.sendall(data[: len(data) // 2])
                    self.cut()
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        if not up:
            with self._lock:
                self._sockets -= {source, sink}
            for one in (source, sink):
                one.close()


class Lab:
    """A SuperLink and its SuperNodes, and all that they start, in a folder of their own."""

    def __init__(self, folder: Path, data: Path, database: bool = False) -> None:
        """`folder`: new; `database`: whether the SuperLink keeps its state on disk."""
        self.folder, self.data, self.database = folder, data, database
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.port = free_port()
        self.link_log = folder / "superlink.log"
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.streams: list[Path] = []
        self.ways: dict[int, int] = {}
        """Ports by which a node reaches the SuperLink, other than its own."""
        self.doubles: dict[int, Path] = {}
        """Folders with a `flwr-clientapp` of a node's own."""
        self.proxies: list[Proxy] = []

    def environment(self, name: str) -> dict[str, str]:
        """As of a user with an activated environment; FLWR_HOME also marks what is started here."""
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        config = f'[superlink.lab]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (home / "config.toml").write_text(config, encoding="utf-8")
        binaries = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(home),
            # One for all runs: plans and recut corpora, keyed by what they are of.
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            "XDG_STATE_HOME": str(self.folder / "state" / name),
            "TMPDIR": str(self.folder / "tmp"),
            "PATH": binaries + os.pathsep + os.environ.get("PATH", ""),
            "COLUMNS": "200",
        }

    def _start(self, name: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as stream:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def start_link(self) -> None:
        """Start the SuperLink, at first or again; does not wait."""
        words = ["flower-superlink", "--insecure", "--port", str(self.port)]
        if self.database:
            words += ["--database", str(self.folder / "superlink.db")]
        self.link = self._start("link", self.link_log, *words)

    def start_node(self, number: int) -> None:
        """Start a SuperNode, at first or again."""
        words = [
            "--device", "auto", "--data", str(self.data), "--partition", f"{number}/{NODES}",
            "--superlink", f"127.0.0.1:{self.ways.get(number, self.port)}",
        ]  # fmt: skip
        launch = ["-m", "fl_client"]
        if number in self.doubles:  # fl_client puts the folder of the interpreter first on PATH
            words.append("--cold-start")  # which runs the `flwr-clientapp` that is there
            launch = ["-c", "import runpy, sys; sys.executable = sys.argv.pop(1); "
                      "runpy.run_module('fl_client', run_name='__main__')",
                      str(self.doubles[number] / "python")]  # fmt: skip
        self.nodes[number] = self._start(
            f"node-{number}", self.node_log(number), sys.executable, *launch, *words
        )

    def node_log(self, number: int) -> Path:
        """What a SuperNode and its ClientApps print."""
        return self.folder / f"node-{number}.log"

    def flwr_run(self, settings: str) -> subprocess.Popen[bytes]:
        """`flwr run` with a run config."""
        self.streams.append(self.folder / f"stream-{len(self.streams)}.log")
        words = ["flwr", "run", ".", "lab", "--stream", "-c", settings]
        return self._start("user", self.streams[-1], *words)

    def started_by(self, process: "subprocess.Popen[bytes] | None", name: str) -> list[Any]:
        """Processes of this name below another; not the stand-in that waits for a ClientApp."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid if process else 0).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = [Path(word).name for word in child.cmdline()[:6]]
                    if "warm_start.py" not in words and name in (child.name(), *words[:3]):
                        found.append(child)
        return found

    def mine(self) -> list[Any]:
        """Every process whose FLWR_HOME lies in this folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                home = process.environ().get("FLWR_HOME", "")
                if home.startswith(f"{self.folder}{os.sep}"):
                    found.append(process)
        return found

    def end(self) -> None:
        """End every process that was started here."""
        for proxy in self.proxies:
            proxy.close()
        for how, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            mine = self.mine()
            for process in mine:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(how)
                    process.send_signal(signal.SIGCONT)
            psutil.wait_procs(mine, timeout=patience)


class Trial:
    """One run, one fault."""

    def __init__(
        self,
        fault: str,
        folder: Path,
        data: Path,
        rng: random.Random,
        encoding: str,
        *,
        deadline: float = 40.0,
        patience: float = 0.0,
        rounds: int = 0,
        limit: float = 180.0,
        latest: float = float("inf"),
    ) -> None:
        """`deadline`: seconds a round may take; `limit`: seconds until the run is given up.

        `patience` is the run's; `rounds` is 3 or 4 where it is 0, and else at least 2. Faults come
        at most `latest` seconds after what they wait for: with 0 they hit however fast this is.
        """
        self.fault, self.rng, self.encoding, self.deadline = fault, rng, encoding, deadline
        self.patience, self.latest = patience, latest
        self.rounds = rounds or (4 if fault in ("hang", "supernode") else 3)
        self.at = rng.randrange(min(2, self.rounds - 1)) if fault != "replayed" else 1
        """Round of the fault, from 0; some are left in which to recover."""
        self.victim = rng.randrange(NODES)
        self.lab = Lab(folder, data, database=fault == "superlink")
        self.output = folder / "run"
        self.outcome = Outcome(fault, encoding)
        self.outcome.notes.append(f"client {self.victim}, round {self.at + 1} of {self.rounds}")
        self.started = time.monotonic()
        self.end = self.started + limit
        self.flwr: subprocess.Popen[bytes] | None = None
        self.stack = contextlib.ExitStack()

    # Waiting

    def wait(self, happens: Callable[[], object], what: str, seconds: float = 1e9) -> bool:
        """Wait for something; False after `seconds`.

        Raises:
            TimeUp: the run's own time is over.
        """
        end = time.monotonic() + seconds
        while not happens():
            if time.monotonic() > self.end:
                raise TimeUp(f"not within the time of the run: {what}")
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def sleep(self, seconds: float) -> None:
        """Sleep within the time of the run."""
        time.sleep(max(0.0, min(seconds, self.end - time.monotonic())))

    def stream(self) -> str:
        """What all `flwr run` so far have printed."""
        return "".join(_read(path) for path in self.lab.streams)

    def ended(self) -> bool:
        """Whether the present `flwr run` is over."""
        return self.flwr is None or self.flwr.poll() is not None

    def round_begins(self, number: int, delay: float = 0.0) -> bool:
        """Wait until the victim has got a round's message, and `delay` seconds longer."""
        log = self.lab.node_log(self.victim)
        self.wait(lambda: self.ended() or _read(log).count(_TRAIN) > number, f"round {number + 1}")
        self.sleep(self.rng.uniform(0, min(delay, self.latest)))
        return not self.ended()

    def client_app(self) -> Any:
        """The victim's ClientApp, suspended at a random moment of its life in round `at` or later.

        Whose life was over by then was too short for it: the next is looked at sooner.
        """
        log, taken, latest = self.lab.node_log(self.victim), self.at, min(5.0, self.latest)
        # An app of the message before may not be gone yet. They are told apart by their ids: what
        # the kernel says of a process's start may differ from the clock by a second or more.
        old: set[int] = set()

        def apps() -> list[Any]:
            return self.lab.started_by(self.node, "flwr-clientapp")

        def young() -> list[Any]:
            return [process for process in apps() if process.pid not in old]

        def begins(taken: int) -> bool:
            there = {process.pid for process in apps()}
            if _read(log).count(_TRAIN) > taken:
                return True
            old.update(there)
            return self.ended()

        while True:
            self.wait(functools.partial(begins, taken), f"round {taken + 1}")
            self.wait(lambda: self.ended() or young(), "a ClientApp")
            delay = self.rng.uniform(0, latest)
            self.sleep(delay)
            for process in young():
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    text = _read(log)
                    if text.count(_SENT) < text.count(_TRAIN):
                        return process
                    process.resume()
                old.add(process.pid)
            if self.ended():
                raise TimeUp("the run was over before the fault")
            taken, latest = _read(log).count(_TRAIN), delay

    @property
    def node(self) -> "subprocess.Popen[bytes]":
        """The victim's SuperNode."""
        return self.lab.nodes[self.victim]

    # The run

    def launch(self, resume: bool = False) -> None:
        """`flwr run`, from the beginning or going on."""
        given = {
            "model": "tiny", "set": "model.num-hidden-layers=1", "length": "1s", "batch": 2,
            "local-updates": 1, "rounds": self.rounds, "clients-per-round": NODES,
            "min-clients": 1, "deadline": self.deadline, "patience": self.patience,
            "encoding": self.encoding, "eval-crops": 4,
            "data": str(self.lab.data), "resume" if resume else "output": str(self.output),
        }  # fmt: skip
        settings = " ".join(
            f"{name}='{value}'" if isinstance(value, str) else f"{name}={value}"
            for name, value in given.items()
        )
        self.flwr = self.lab.flwr_run(settings)

    def start(self) -> None:
        """Bring the federation up, all nodes connected, and begin the run."""
        lab = self.lab
        lab.start_link()
        self.wait(lambda: _UP in _read(lab.link_log), "the SuperLink is up")
        for number in range(NODES):
            lab.start_node(number)
        for number in range(NODES):
            log = lab.node_log(number)
            self.wait(lambda log=log: "SuperNode ID:" in _read(log), "a SuperNode is up")  # type: ignore[misc]
        self.launch()

    def rows(self) -> list[dict[str, Any]]:
        """The rounds in metrics.jsonl."""
        try:
            return RunDirectory(self.output).metrics()
        except (ShortwaveError, OSError) as error:
            self.outcome.state_lost = True
            self.outcome.notes.append(str(error))
            return []

    def whole(self) -> bool:
        """Whether all rounds are there, each once, and saved."""
        steps = [row["step"] for row in self.rows()]
        last = checkpoint.latest(self.output / "checkpoints")
        return steps == list(range(1, self.rounds + 1)) and (
            last is not None and last.name == f"round-{self.rounds:05d}"
        )

    def finish(self) -> None:
        """Wait for the end; go on with the run when it ended before its last round."""
        while True:
            self.wait(lambda: self.ended() or self.revive(), "the run ends")
            if self.whole() or self.outcome.resumed == 3:
                return
            self.go_on()

    def revive(self) -> bool:
        """Start SuperNodes that have ended by themselves, as a service manager does; False."""
        for number, node in self.lab.nodes.items():
            if node.poll() is not None:
                self.outcome.notes.append(f"the SuperNode of client {number} had to be restarted")
                self.lab.start_node(number)
        return False

    def go_on(self) -> None:
        """End the present `flwr run` and go on with `resume`, as documented."""
        self.outcome.state_lost |= bool(problems := self.problems(self.rows()))
        self.outcome.notes += problems
        if self.flwr is not None and not self.ended():
            self.flwr.kill()
            self.flwr.wait()
        before = len(self.rows())
        self.outcome.resumed += 1
        self.launch(resume=True)
        path = self.lab.streams[-1]
        self.wait(lambda: self.ended() or _GOING_ON.search(_read(path)), "the run goes on", 60)
        found = _GOING_ON.search(_read(path))
        first = int(found[1]) if found else 1
        self.outcome.rounds_lost += max(1, before - first + 1)

    def problems(self, rows: list[dict[str, Any]]) -> list[str]:
        """Why the run directory cannot be gone on with; empty when it can."""
        try:
            stored_settings(self.output)
            last = checkpoint.latest(self.output / "checkpoints")
            if last is None:
                return ["rounds are logged and no checkpoint is there"] if len(rows) > 1 else []
            loaded = checkpoint.load(last)
            done = int(loaded.state["next_round"])
        except (ShortwaveError, OSError, ValueError, KeyError) as error:
            return [f"run directory: {error}"]
        if not all(bool(torch.isfinite(value).all()) for value in loaded.weights.values()):
            return [f"{last.name} has weights that are not finite"]
        if len(rows) not in (done, done + 1):
            return [f"{last.name}, but {len(rows)} rounds are logged"]
        return []

    def judge(self) -> None:
        """Fill in the outcome from what lies on disk."""
        outcome, rows, text = self.outcome, self.rows(), self.stream()
        outcome.completed = self.whole()
        problems = self.problems(rows)
        last_keys = {client["key"] for client in rows[-1]["clients"]} if rows else set()
        outcome.clients_not_back = NODES - len(last_keys)
        bad = [int(line) for line in _read(self.lab.folder / "bad.jsonl").split()]
        for row in rows:
            clients = row["clients"]
            keys = [client["key"] for client in clients]
            outcome.updates_lost += NODES - len(set(keys))
            heard = round(sum(client["seconds"] for client in clients) * 16_000)
            if len(set(keys)) < len(keys) or heard != round(row["samples"]):
                outcome.audio_counted_twice = True
                outcome.notes.append(f"round {row['step']}: clients {keys}, {heard} samples")
            if row["step"] - 1 in bad and self.victim in keys:
                outcome.bad_updates_folded += 1
                outcome.audio_counted_twice |= self.fault == "replayed"
        steps = [row["step"] for row in rows]
        if len(set(steps)) < len(steps):
            outcome.audio_counted_twice = True
            outcome.notes.append(f"rounds logged: {steps}")
        for key, number in lost_states(text):
            later = [row for row in rows if row["step"] > number]
            if later and not any(int(key) == c["key"] for row in later for c in row["clients"]):
                problems.append(f"client {key} lost its state in round {number} for good")
        outcome.state_lost |= bool(problems)
        failures = sorted({f"client {key}: {reason}" for key, reason in _FAILURE.findall(text)})
        outcome.notes += problems + failures
        outcome.notes += re.findall(r"^error: .+$|^.*two clients say.+$", text, re.MULTILINE)

    def run(self) -> Outcome:
        """Take the run from start to end; everything that it started is gone afterwards."""
        try:
            PREPARE.get(self.fault, lambda trial: None)(self)
            self.stack.callback(self.lab.end)
            try:
                self.start()
                FAULTS[self.fault](self)
                self.finish()
            except (TimeUp, psutil.Error) as error:
                self.outcome.notes.append(str(error))
            self.judge()
        finally:
            with undisturbed():
                self.stack.close()
            self.outcome.seconds = round(time.monotonic() - self.started, 1)
        return self.outcome


def lost_states(stream: str) -> Iterator[tuple[str, int]]:
    """Clients that said StateLost, with the round (from 1) under whose line they are listed."""
    number = 0
    for line in stream.splitlines():
        if found := _ROUND.match(line):
            number = int(found[1])
        elif (failure := _FAILURE.match(line)) and "StateLost" in failure[2]:
            yield failure[1], number


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


# The faults


def kill_client_app(trial: Trial) -> None:
    """SIGKILL of a ClientApp, as by an OOM killer."""
    trial.client_app().kill()


def kill_node(trial: Trial) -> None:
    """SIGKILL of a SuperNode, with all that it started (a power cut) or alone; it comes again."""
    trial.round_begins(trial.at, 8)
    below = psutil.Process(trial.node.pid).children(recursive=True)
    trial.node.kill()
    trial.node.wait()
    if trial.rng.random() < 0.5:
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()
    trial.sleep(trial.rng.uniform(2, 6))
    trial.lab.start_node(trial.victim)
    _note_orphans(trial, below)


def kill_link(trial: Trial) -> None:
    """SIGKILL of the SuperLink, which is started again, with the database it had or without."""
    trial.round_begins(trial.at, 10)
    lab = trial.lab
    assert lab.link is not None
    below = psutil.Process(lab.link.pid).children(recursive=True)
    lab.link.kill()
    lab.link.wait()
    trial.wait(trial.ended, "flwr run ends", 15)
    psutil.wait_procs(below, timeout=10)  # Flower ends what the SuperLink had started.
    _note_orphans(trial, below)
    for _ in range(3):
        before = _read(lab.link_log).count(_UP)
        lab.start_link()
        link = lab.link
        trial.wait(
            lambda: _read(lab.link_log).count(_UP) > before or link.poll() is not None,  # noqa: B023
            "the SuperLink is up again",
        )
        if link.poll() is None:
            break
    trial.go_on()


def kill_server_app(trial: Trial) -> None:
    """SIGKILL of the ServerApp."""
    trial.round_begins(trial.at, 10)
    for process in trial.lab.started_by(trial.lab.link, "flwr-serverapp"):
        process.kill()
    trial.wait(trial.ended, "flwr run ends", 5)  # It may not notice for a minute.
    if not trial.whole():
        trial.go_on()


def fill_client_disk(trial: Trial) -> None:
    """No space for the state of a client, for a round or so."""
    trial.round_begins(trial.at, 3)
    disk = trial.lab.folder / "state" / f"node-{trial.victim}"
    filler = fill(disk, trial.rng.choice((0, 2**12, 2**20)))
    log = trial.lab.node_log(trial.victim)
    trial.wait(
        lambda: trial.ended() or _read(log).count(_TRAIN) > trial.at + 1, "a round", trial.deadline
    )
    trial.sleep(trial.rng.uniform(0, 8))
    filler.unlink()


def fill_server_disk(trial: Trial) -> None:
    """No space in the run directory; freed once the run has failed."""
    trial.round_begins(trial.at, 6)
    filler = fill(trial.output, trial.rng.choice((0, 2**12, 2**20)))
    trial.wait(trial.ended, "the run fails")
    filler.unlink()
    if "no space left" not in trial.stream():
        trial.outcome.notes.append("the run failed without saying that the disk is full")


def cut_network(trial: Trial) -> None:
    """The connections of a node are reset in mid-upload, and refused for some seconds."""
    (proxy,) = trial.lab.proxies
    trial.round_begins(trial.at)
    size = 300_000 if trial.encoding == "int8" else 1_500_000
    proxy.cut_after(trial.rng.randrange(20_000, size), trial.rng.uniform(2, 8))
    if not trial.wait(proxy.was_cut.is_set, "an upload", 60):
        trial.outcome.notes.append("cut while nothing was on its way")
        proxy.cut()


def hang(trial: Trial) -> None:
    """A ClientApp, or a whole device, stands still for longer than the deadline."""
    app = trial.client_app()
    node = psutil.Process(trial.node.pid)
    whole = trial.rng.random() < 0.5
    stopped = [node, *node.children(recursive=True)] if whole else [app]
    trial.outcome.notes.append("all of the device hangs" if whole else "the ClientApp hangs")
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.suspend()
    trial.sleep(trial.deadline + trial.rng.uniform(3, 10))
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.resume()


def send_bad_updates(trial: Trial) -> None:
    """The double does it; see `_DOUBLE`."""


def _note_orphans(trial: Trial, below: list[Any]) -> None:
    psutil.wait_procs(below, timeout=10)
    for process in below:
        with contextlib.suppress(psutil.Error):
            name = " ".join(Path(word).name for word in process.cmdline()[1:2])
            trial.outcome.notes.append(f"{name} outlives its parent by 10 s")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "clientapp": kill_client_app,
    "supernode": kill_node,
    "superlink": kill_link,
    "superlink_memory": kill_link,
    "serverapp": kill_server_app,
    "disk_client": fill_client_disk,
    "disk_server": fill_server_disk,
    "network": cut_network,
    "poisoned": send_bad_updates,
    "truncated": send_bad_updates,
    "replayed": send_bad_updates,
    "hang": hang,
}


def _mount_state(trial: Trial) -> None:
    path = trial.lab.folder / "state" / f"node-{trial.victim}"
    trial.stack.enter_context(small_disk(path, 64))


def _mount_output(trial: Trial) -> None:
    trial.stack.enter_context(small_disk(trial.output, 192))


def _add_proxy(trial: Trial) -> None:
    proxy = Proxy(trial.lab.port)
    trial.lab.proxies.append(proxy)
    trial.lab.ways[trial.victim] = proxy.port


def _add_double(trial: Trial) -> None:
    folder = trial.lab.folder / "double"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    constants = {
        "FAULT": trial.fault,
        "FOLDER": str(trial.lab.folder),
        "ROUNDS": [trial.at],
        "PATTERN": trial.rng.choice(_POISONS),
    }
    lines = [f"#!{shlex.quote(sys.executable)}"]
    lines += [f"{name} = {value!r}" for name, value in constants.items()]
    script = folder / "flwr-clientapp"
    script.write_text("\n".join(lines) + _DOUBLE, encoding="utf-8")
    script.chmod(0o755)
    trial.lab.doubles[trial.victim] = folder


PREPARE: dict[str, Callable[[Trial], None]] = {
    "disk_client": _mount_state,
    "disk_server": _mount_output,
    "network": _add_proxy,
    **dict.fromkeys(("poisoned", "truncated", "replayed"), _add_double),
}


# The command


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Sums over runs."""
    return {"runs": len(outcomes)} | {
        name: sum(int(getattr(outcome, name)) for outcome in outcomes)
        for name in (
            "completed", "rounds_lost", "audio_counted_twice", "state_lost", "updates_lost",
            "clients_not_back", "bad_updates_folded", "resumed",
        )
    }  # fmt: skip


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the runs; returns the exit code."""
    parser = command.Parser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument(
        "--runs", type=command.argument(command.positive), default=10, help="how many"
    )
    parser.add_argument("--data", type=Path, help="LibriSpeech (default: six speakers of tones)")
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=list(FAULTS),
        metavar="NAME",
        help=f"taken in turn, of {', '.join(FAULTS)} (default: all that this user may inject)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is hit")
    parser.add_argument("--deadline", type=float, default=40.0, help="seconds a round may take")
    parser.add_argument(
        "--patience",
        type=float,
        default=3.0,
        help="of the run: a round ends once the others have waited so many times as long",
    )
    parser.add_argument("--limit", type=float, default=180.0, help="seconds a run may take")
    parser.add_argument("--keep", type=Path, help="folder to keep logs and run directories in")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    faults = options.faults
    if not faults:
        faults = list(FAULTS)
        if not can_mount():
            faults = [name for name in faults if not name.startswith("disk")]
            console.print("no disk faults: mounting needs root")
    signal.signal(signal.SIGTERM, _stop)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, bar_of(console) as bar:
        folder = (options.keep or Path(temporary)).resolve()
        data = options.data.resolve() if options.data else write_tones(Path(temporary, "corpus"))
        task = bar.add_task("runs", total=options.runs)
        for number in range(options.runs):
            fault, turn = faults[number % len(faults)], number // len(faults)
            rng = random.Random(f"{options.seed} {number}")
            encoding = ("int8", "fp32")[(turn + number) % 2]
            if fault == "disk_client":
                encoding = "int8"  # fp32 keeps nothing on the devices
            place = folder / f"{number:03d}-{fault}"
            trial = Trial(
                fault, place, data, rng, encoding, deadline=options.deadline,
                patience=options.patience, limit=options.limit,
            )  # fmt: skip
            outcome = trial.run()
            outcomes.append(outcome)
            console.print(_line(outcome), highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)
    by_fault = {
        name: summary([outcome for outcome in outcomes if outcome.fault == name])
        for name in dict.fromkeys(outcome.fault for outcome in outcomes)
    }
    print(json.dumps(summary(outcomes) | {"by_fault": by_fault}))
    return 0


def _line(outcome: Outcome) -> str:
    values = dataclasses.asdict(outcome)
    told = [f"{outcome.fault} ({outcome.encoding}, {outcome.seconds:.0f} s):"]
    told.append("completed" if outcome.completed else "NOT completed")
    told += [
        f"{name.replace('_', ' ')} {int(values[name])}"
        for name in ("rounds_lost", "audio_counted_twice", "state_lost", "updates_lost",
                     "clients_not_back", "bad_updates_folded")
        if values[name]
    ]  # fmt: skip
    return "  ".join([*told, *(f"[{note}]" for note in outcome.notes)])


if __name__ == "__main__":
    command.run(main)
