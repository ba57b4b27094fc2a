"""The round loop: choose the cohort, send, fold each reply as it comes, step, evaluate, save.

It talks to a Flower Grid and nothing else, so it runs unchanged over a SuperLink, Flower's
simulation and Ray.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from common.errors import ShortwaveError
from fl_client import protocol, updates
from fl_client.encoding import Decoded
from fl_client.federation_settings import FederationSettings
from fl_client.protocol import ProtocolError
from fl_server.broadcast import WHOLE, Broadcast
from fl_server.fold import Fold, RejectedUpdate
from fl_server.server_optimizer import ServerOptimizer
from ssl_core.training.randomness import generator
from ssl_core.training.schedule import gumbel_temperature, learning_rate

_LONGEST_PAUSE = 1.0
_PAUSE = 0.01
"""Seconds between two looks, for each reply that is waited for, up to the longest."""
_DOUBLE = "two clients say they are number"


class RoundFailed(ShortwaveError):
    """Too few clients answered for the run to go on."""


@dataclasses.dataclass(frozen=True)
class Client:
    """A connected client that has said who it is."""

    key: int
    node: int
    crops: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """What a round did."""

    number: int
    metrics: dict[str, float]
    """Means over clients, weighted by audio; counts and bytes are sums."""
    clients: tuple[dict[str, float], ...]
    """Metrics of each client that was folded, with its `key`, ordered by key."""
    failures: tuple[str, ...]
    """One line for each client that was not."""


class Observer(Protocol):
    """Is told what happens in a round."""

    def began(self, number: int, cohort: Sequence[Client]) -> None:
        """Round `number` was sent to its cohort."""

    def replied(self, key: int, metrics: dict[str, float] | None, error: str = "") -> None:
        """A client's update was folded (`metrics`), or was not (`error`)."""


def _replies(
    grid: Grid, messages: list[Message], limit: float, patience: float = 0.0
) -> Iterator[tuple[int, Message]]:
    """Each reply with the node that was asked, as they come, so that no more than one is held here.

    It ends after `limit` seconds, or, once half have answered, after `patience` times as
    long as the slowest of them took.

    The node is not read from the reply: where a device has gone, the SuperLink answers in its
    place and under its own id. A message that could not be sent (Flower gives no id) has no reply.
    A grid may offer `wait(seconds)`, which returns early when a reply is there.
    """
    wait: Callable[[float], None] = getattr(grid, "wait", time.sleep)
    nodes = [message.metadata.dst_node_id for message in messages]
    sent = zip(grid.push_messages(messages), nodes, strict=False)
    waiting = {identifier: node for identifier, node in sent if identifier is not None}
    messages.clear()
    started, pause = time.monotonic(), 0.02
    last = end = started + limit
    half = len(waiting) / 2
    while waiting and time.monotonic() < end:
        found = False
        for identifier, node in list(waiting.items()):
            for reply in grid.pull_messages([identifier]):
                waiting.pop(identifier, None)
                found = True
                now = time.monotonic()
                if patience and len(waiting) <= half:
                    end = min(last, started + (now - started) * max(patience, 1.0))
                yield node, reply
                del reply
        if found:
            pause = 0.02
        elif waiting:
            wait(pause)
            pause = min(pause * 1.5, max(0.25, _PAUSE * len(waiting)), _LONGEST_PAUSE)


class Roster:
    """The clients that are there, as they come and go."""

    def __init__(
        self, grid: Grid, settings: FederationSettings, say: Callable[[str], None]
    ) -> None:
        """`say` is told of clients that cannot take part, that come late and that have gone."""
        self.grid, self.settings, self.say = grid, settings, say
        self._known: dict[int, Client] = {}
        self._problems: dict[int, str] = {}

    def gather(self) -> list[Client]:
        """Ask every connected node who it is, until enough have answered; ordered by key.

        Raises:
            RoundFailed: too few after `settings.wait` seconds; their errors are listed.
        """
        end = time.monotonic() + self.settings.wait
        needed, told = self.settings.min_clients, False
        while True:
            new = self._ask_new()
            clients = self._without_doubles()
            if len(clients) >= needed:
                return clients
            if time.monotonic() > end or (
                self._problems and not new and len(self._problems) >= needed
            ):
                listed = "; ".join(sorted(set(self._problems.values()))) or "none has connected"
                raise RoundFailed(
                    f"{len(clients)} clients are ready, {needed} are needed: {listed}"
                )
            if not told:
                self.say(f"waiting for clients: {len(clients)} of {needed} are ready")
                told = True
            time.sleep(1)

    def refresh(self) -> list[Client]:
        """Those there now: who has come is asked, who has gone is left out.

        Raises:
            RoundFailed: too few, as in `gather`.
        """
        there = set(self.grid.get_node_ids())
        for node in [node for node in self._known if node not in there]:
            self.say(f"client {self._known.pop(node).key} has gone")
        # A device that was started again comes under a new id while the old one is still listed.
        self._problems = {
            node: text
            for node, text in self._problems.items()
            if node in there and not text.startswith(_DOUBLE)
        }
        before = set(self._known)
        clients = self.gather()
        for node in self._known.keys() - before:
            self.say(f"client {self._known[node].key} has come")
        return clients

    def _ask_new(self) -> list[int]:
        known = self._known.keys() | self._problems.keys()
        new = [node for node in self.grid.get_node_ids() if node not in known]
        messages = [
            Message(
                RecordDict({protocol.TASK: protocol.task(ask="describe")}),
                node,
                MessageType.QUERY,
                group_id="describe",
            )
            for node in new
        ]
        for node, reply in _replies(self.grid, messages, self.settings.wait) if messages else ():
            try:
                if reply.has_error():
                    raise ProtocolError(_reason(reply))
                values = protocol.check_metrics(reply.content, protocol.INFO_METRICS)
            except ProtocolError as error:
                self._problems[node] = str(error)
                self.say(f"a client cannot take part: {error}")
                continue
            self._known[node] = Client(
                int(values["partition"]), node, int(values["crops"]), values["seconds"]
            )
        return new

    def _without_doubles(self) -> list[Client]:
        """Clients ordered by key; two with the same key would count the same audio twice."""
        chosen: dict[int, Client] = {}
        for client in sorted(self._known.values(), key=lambda client: client.node):
            if client.key in chosen:
                self._problems[client.node] = f"{_DOUBLE} {client.key}"
                self.say(f"{self._problems[client.node]}; only one of them takes part")
                self._known.pop(client.node)
            else:
                chosen[client.key] = client
        return [chosen[key] for key in sorted(chosen)]


def choose_cohort(clients: list[Client], settings: FederationSettings, number: int) -> list[Client]:
    """The clients of a round, drawn by (seed, round) from those there, ordered by key."""
    size = min(settings.clients_per_round, len(clients))
    rng = generator(settings.seed, "cohort", number)
    chosen = rng.choice(len(clients), size=size, replace=False)
    return [clients[int(place)] for place in np.sort(chosen)]


class Federation:
    """The global model and how rounds change it."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        optimizer: ServerOptimizer,
        settings: FederationSettings,
        run: str = "run",
        backbone: str = "",
    ) -> None:
        """Begin with what the server holds.

        Args:
            weights: global weights by parameter name, changed in place by each round.
            optimizer: how the mean update is applied.
            settings: of the run.
            run: identity of the run.
            backbone: of a task, digest of the backbone that everyone begins with.
        """
        self.weights, self.optimizer, self.settings = weights, optimizer, settings
        self.run = run
        self.base = {"backbone": backbone} if backbone else {}
        self.broadcast = Broadcast(settings.encoding)
        self.shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self.folded: dict[int, int] = {}
        """Last round in which a client's update was folded, by key."""

    def round(
        self,
        grid: Grid,
        clients: list[Client],
        number: int,
        observer: Observer | None = None,
    ) -> RoundResult:
        """One round.

        Args:
            grid: how clients are reached.
            clients: those connected.
            number: of the round, from 0.
            observer: is told what happens.

        Raises:
            RoundFailed: fewer than `min_clients` updates could be folded.
        """
        settings = self.settings
        started = time.monotonic()
        cohort = choose_cohort(clients, settings, number)
        by_node = {client.node: client for client in cohort}
        first = number * settings.local_updates
        record, base = self.broadcast.pack(self.weights, number, [client.key for client in cohort])
        sent = updates.size(record) * len(cohort)
        messages = [
            Message(
                RecordDict(
                    {
                        protocol.WEIGHTS: record,
                        protocol.TASK: protocol.task(
                            run=self.run,
                            **self.base,
                            round=number,
                            first_update=first,
                            updates=settings.local_updates,
                            base_round=base,
                            encoding=settings.encoding if base >= 0 else WHOLE[settings.encoding],
                            folded_round=self.folded.get(client.key, -1),
                        ),
                    }
                ),
                client.node,
                MessageType.TRAIN,
                group_id=str(number + 1),
            )
            for client in cohort
        ]
        del record
        fold = Fold(self.shapes)
        folded: dict[int, dict[str, float]] = {}
        failures: list[str] = []
        silent = {client.key for client in cohort}
        received = 0
        replies = _replies(grid, messages, settings.deadline or math.inf, settings.patience)
        if observer is not None:
            observer.began(number, cohort)
        for node, reply in replies:
            client = by_node[node]
            silent.discard(client.key)
            try:
                received += self._fold(fold, reply, folded, client.key, number)
                self.folded[client.key] = self.broadcast.held[client.key] = number
                if observer is not None:
                    observer.replied(client.key, folded[client.key])
            except (ProtocolError, RejectedUpdate) as error:
                failures.append(f"client {client.key}: {error}")
                self.broadcast.held.pop(client.key, None)
                if observer is not None:
                    observer.replied(client.key, None, str(error))
            del reply
        limited = settings.deadline or settings.patience
        why = "no answer in time" if limited else "the message could not be sent"
        failures += [f"client {key}: {why}" for key in silent]
        for key in silent:
            self.broadcast.held.pop(key, None)
            if observer is not None:
                observer.replied(key, None, why)
        needed = min(settings.min_clients, len(cohort))
        if fold.count < needed:
            listed = "; ".join(sorted(failures)[:5])
            raise RoundFailed(
                f"round {number + 1}: {fold.count} updates could be used, {needed} are needed: "
                f"{listed}"
            )
        self.optimizer.apply(self.weights, fold.mean())
        values = [{"key": float(key), **folded[key]} for key in sorted(folded)]
        metrics = _mean(values, protocol.metrics_of(settings.task)) | {
            "cohort": len(cohort),
            "failures": len(failures),
            "bytes_sent": sent,
            "bytes_received": received,
            "round_seconds": time.monotonic() - started,
        }
        if not settings.task:
            recipe, last = settings.model_and_recipe()[1], first + settings.local_updates - 1
            metrics["learning_rate"] = learning_rate(recipe, last, settings.total_updates)
            metrics["temperature"] = gumbel_temperature(recipe, last)
        return RoundResult(number, metrics, tuple(values), tuple(sorted(failures)))

    def evaluate(
        self, grid: Grid, clients: list[Client], number: int
    ) -> tuple[dict[int, dict[str, float]], tuple[str, ...]]:
        """Let every client score the weights as they are, on its own clips.

        Args:
            grid: how clients are reached.
            clients: those connected.
            number: rounds done.

        Returns:
            The metrics of each client by key, and a line for each that has none.
        """
        settings = self.settings
        record, _ = Broadcast(settings.encoding).pack(self.weights, number, [])
        messages = [
            Message(
                RecordDict(
                    {
                        protocol.WEIGHTS: record,
                        protocol.TASK: protocol.task(
                            run=self.run,
                            **self.base,
                            round=number,
                            first_update=number * settings.local_updates,
                            updates=0,
                            base_round=-1,
                            encoding=WHOLE[settings.encoding],
                            folded_round=self.folded.get(client.key, -1),
                        ),
                    }
                ),
                client.node,
                MessageType.EVALUATE,
                group_id=f"{number}-evaluate",
            )
            for client in clients
        ]
        del record
        keys = {client.node: client.key for client in clients}
        found: dict[int, dict[str, float]] = {}
        failures = []
        limit = settings.deadline or math.inf
        for node, reply in _replies(grid, messages, limit, settings.patience):
            try:
                if reply.has_error():
                    raise ProtocolError(_reason(reply))
                names = protocol.metrics_of(settings.task)
                found[keys[node]] = protocol.check_metrics(reply.content, names)
            except ProtocolError as error:
                failures.append(f"client {keys[node]}: {error}")
        silent = sorted(set(keys.values()) - set(found))
        if len(silent) > len(failures):
            failures.append(f"{len(silent) - len(failures)} clients did not answer")
        return found, tuple(sorted(failures))

    def _fold(
        self,
        fold: Fold,
        reply: Message,
        folded: dict[int, dict[str, float]],
        key: int,
        number: int,
    ) -> int:
        if reply.has_error():
            raise ProtocolError(_reason(reply))
        names = protocol.metrics_of(self.settings.task)
        metrics = protocol.check_metrics(reply.content, names)
        record = reply.content.array_records.get(protocol.UPDATE)
        if record is None:
            raise ProtocolError("the reply has no update")
        if key in folded:
            raise ProtocolError("a second update in the same round")
        if metrics["round"] != number:
            raise ProtocolError(f"an update of round {int(metrics['round']) + 1}")
        if not metrics["applied"]:
            raise RejectedUpdate("no update had a finite gradient")
        samples, kind = int(metrics["samples"]), self.settings.encoding
        if kind == "fp32":
            fold.add(updates.Views(record), samples)
        else:
            fold.add(Decoded(record, self.shapes, kind), samples, partial=True)
        folded[key] = metrics
        return updates.size(record)


def _reason(reply: Message) -> str:
    error = reply.error
    return " ".join(str(error.reason).split()) if error.reason else f"error {error.code}"


_SUMMED = {"samples", "crops", "clips", "test_clips", "updates", "applied", "fallbacks"}
_LARGEST = {"train_seconds", "paused_seconds", "peak_bytes", "predicted_bytes", "memory_bytes"}


def _mean(clients: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, float]:
    weights = np.array([client["samples"] for client in clients])
    result: dict[str, float] = {}
    for name in names:
        values = np.array([client[name] for client in clients])
        if name in _SUMMED or name.startswith("skipped_"):
            result[name] = float(values.sum())
        elif name in _LARGEST:
            result[name] = float(values.max())
        else:
            result[name] = float((values * weights).sum() / weights.sum())
    return result


def state_of(
    number: int, settings: FederationSettings, federation: Federation | None = None
) -> dict[str, Any]:
    """What a checkpoint after round `number` says; nothing in it depends on the clock."""
    exchange = {}
    if federation is not None and settings.encoding != "fp32":
        exchange = {"folded": federation.folded, "held": federation.broadcast.held}
    return exchange | {
        "next_round": number + 1,
        "next_update": (number + 1) * settings.local_updates,
        "rounds": settings.rounds,
        "seed": settings.seed,
        "optimizer": settings.server_optimizer,
    }
