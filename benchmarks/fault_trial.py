"""One run of a federation, from its start to the judgement of its outcome."""

import contextlib
import functools
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_lab import NODES, Lab, read_log
from benchmarks.fault_outcome import Outcome, failures_of, lost_states, resume_problems
from benchmarks.poison import KINDS
from common.errors import ShortwaveError
from fl_server.guards import SMALLEST_COHORT
from ssl_core.training import checkpoint
from ssl_core.training.run_directory import RunDirectory

TRAIN = "Receiving: train message"
"""A SuperNode logs this when a round's message has come, and `_SENT` when its reply has gone."""
_SENT = "Sending: train message"
UP = "Uvicorn running"
"""The SuperLink logs this when it is up."""
_RESUMED = re.compile(r"^going on with .* at round (\d+) of", re.MULTILINE)


class TimeUp(ShortwaveError):
    """A run took longer than it may."""


class Trial:
    """One run with one fault."""

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
        """Choose the client and the round that the fault hits; nothing is started.

        Args:
            fault: one of `fault_injection.FAULTS`.
            folder: new.
            data: corpus in LibriSpeech's layout.
            rng: decides when the fault comes, and whom it hits.
            encoding: of weights and updates.
            deadline: seconds a round may take.
            patience: of the run.
            rounds: at least 2; 0 takes 3 or 4, depending on the fault.
            limit: seconds until the run is given up.
            latest: most seconds between the event a fault waits for and the fault; with 0 the fault
                hits however fast the machine is.
        """
        self.fault, self.rng, self.encoding, self.deadline = fault, rng, encoding, deadline
        self.patience, self.latest = patience, latest
        lies = fault in KINDS
        self.rounds = rounds or (4 if lies or fault in ("hang", "supernode") else 3)
        self.at = rng.randrange(min(2, self.rounds - 1)) if fault != "replayed" else 1
        """Round of the fault, from 0; later rounds are for recovery."""
        nodes = SMALLEST_COHORT if lies else NODES
        self.victim = rng.randrange(nodes)
        self.lab = Lab(folder, data, fault == "superlink", nodes)
        self.output = folder / "run"
        self.outcome = Outcome(fault, encoding)
        self.outcome.notes.append(f"client {self.victim}, round {self.at + 1} of {self.rounds}")
        self.started = time.monotonic()
        self.end = self.started + limit
        self.flwr: subprocess.Popen[bytes] | None = None
        self.stack = contextlib.ExitStack()

    def wait(self, happens: Callable[[], object], what: str, seconds: float = 1e9) -> bool:
        """Wait for a condition; False after `seconds`.

        Args:
            happens: the condition.
            what: its description, for errors.
            seconds: how long to wait.

        Raises:
            TimeUp: the run's time is over.
        """
        end = time.monotonic() + seconds
        while not happens():
            if time.monotonic() > self.end:
                raise TimeUp(f"the run's time was over before: {what}")
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def sleep(self, seconds: float) -> None:
        """Sleep, at most to the end of the run's time."""
        time.sleep(max(0.0, min(seconds, self.end - time.monotonic())))

    def stream(self) -> str:
        """Output of all calls of `flwr run` so far."""
        return "".join(read_log(path) for path in self.lab.streams)

    def ended(self) -> bool:
        """Whether the current `flwr run` has ended."""
        return self.flwr is None or self.flwr.poll() is not None

    def round_begins(self, number: int, delay: float = 0.0) -> bool:
        """Wait for the victim's message of a round, then up to `delay` seconds; False if ended."""
        log = self.lab.node_log(self.victim)
        self.wait(
            lambda: self.ended() or read_log(log).count(TRAIN) > number, f"round {number + 1}"
        )
        self.sleep(self.rng.uniform(0, min(delay, self.latest)))
        return not self.ended()

    def client_app(self) -> Any:
        """The victim's ClientApp, suspended at a random moment in round `at` or later.

        If it has ended by that moment, an earlier moment of the next one is tried.

        Raises:
            TimeUp: the run was over before.
        """
        log, taken, latest = self.lab.node_log(self.victim), self.at, min(5.0, self.latest)
        # An app of the previous message may still be alive. Ids tell them apart: the kernel's start
        # time of a process may differ from the clock by a second or more.
        old: set[int] = set()

        def apps() -> list[Any]:
            return self.lab.started_by(self.node, "flwr-clientapp")

        def young() -> list[Any]:
            return [process for process in apps() if process.pid not in old]

        def begins(taken: int) -> bool:
            there = {process.pid for process in apps()}
            if read_log(log).count(TRAIN) > taken:
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
                    text = read_log(log)
                    if text.count(_SENT) < text.count(TRAIN):
                        return process
                    process.resume()
                old.add(process.pid)
            if self.ended():
                raise TimeUp("the run was over before the fault")
            taken, latest = read_log(log).count(TRAIN), delay

    @property
    def node(self) -> "subprocess.Popen[bytes]":
        """The victim's SuperNode."""
        return self.lab.nodes[self.victim]

    def launch(self, resume: bool = False) -> None:
        """Start `flwr run` for a new run, or to resume it."""
        given = {
            "model": "tiny", "architecture.num-hidden-layers": 1, "length": "1s", "batch": 2,
            "local-updates": 1, "rounds": self.rounds, "clients-per-round": self.lab.count,
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
        """Start the federation, wait until all nodes are connected, and start the run."""
        lab = self.lab
        lab.start_link()
        self.wait(lambda: UP in read_log(lab.link_log), "the SuperLink is up")
        for number in range(lab.count):
            lab.start_node(number)
        for number in range(lab.count):
            log = lab.node_log(number)
            self.wait(lambda log=log: "SuperNode ID:" in read_log(log), "a SuperNode is up")  # type: ignore[misc]
        self.launch()

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of each logged round."""
        try:
            return RunDirectory(self.output).metrics()
        except (ShortwaveError, OSError) as error:
            self.outcome.state_lost = True
            self.outcome.notes.append(str(error))
            return []

    def whole(self) -> bool:
        """Whether each round is logged once and the last one is saved."""
        steps = [row["step"] for row in self.rows()]
        last = checkpoint.latest(self.output / "checkpoints")
        return steps == list(range(1, self.rounds + 1)) and (
            last is not None and last.name == f"round-{self.rounds:05d}"
        )

    def finish(self) -> None:
        """Wait for the end; resume the run, up to 3 times, if it ended before its last round."""
        while True:
            self.wait(lambda: self.ended() or self.revive(), "the run ends")
            if self.whole() or self.outcome.resumed == 3:
                return
            self.resume()

    def revive(self) -> bool:
        """Restart SuperNodes that have ended by themselves, as a service manager does; False."""
        for number, node in self.lab.nodes.items():
            if node.poll() is not None:
                self.outcome.notes.append(f"the SuperNode of client {number} had to be restarted")
                self.lab.start_node(number)
        return False

    def resume(self) -> None:
        """End the current `flwr run` and resume the run, as documented."""
        self.outcome.state_lost |= bool(problems := resume_problems(self.output, self.rows()))
        self.outcome.notes += problems
        if self.flwr is not None and not self.ended():
            self.flwr.kill()
            self.flwr.wait()
        before = len(self.rows())
        self.outcome.resumed += 1
        self.launch(resume=True)
        path = self.lab.streams[-1]
        self.wait(lambda: self.ended() or _RESUMED.search(read_log(path)), "the run resumes", 60)
        found = _RESUMED.search(read_log(path))
        first = int(found[1]) if found else 1
        self.outcome.rounds_lost += max(1, before - first + 1)

    def judge(self) -> None:
        """Complete the outcome from what lies on disk."""
        outcome, rows, text = self.outcome, self.rows(), self.stream()
        outcome.completed = self.whole()
        problems = resume_problems(self.output, rows)
        last_keys = {client["key"] for client in rows[-1]["clients"]} if rows else set()
        outcome.clients_not_back = self.lab.count - len(last_keys)
        bad = [int(line) for line in read_log(self.lab.folder / "bad.jsonl").split()]
        for row in rows:
            clients = row["clients"]
            keys = [client["key"] for client in clients]
            outcome.updates_lost += self.lab.count - len(set(keys))
            heard = round(sum(client["seconds"] for client in clients) * 16_000)
            if len(set(keys)) < len(keys) or heard != round(row["samples"]):
                outcome.audio_counted_twice = True
                outcome.notes.append(f"round {row['step']}: clients {keys}, {heard} samples")
            if row["step"] - 1 in bad and self.victim in keys:
                if row["weights_bounded"] or row["norms_bounded"]:
                    outcome.bad_updates_bounded += 1
                    continue
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
        outcome.notes += problems + failures_of(text)
        outcome.notes += re.findall(r"^error: .+$|^.*two clients say.+$", text, re.MULTILINE)
