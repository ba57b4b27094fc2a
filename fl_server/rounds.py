"""The round loop: choose the cohort, send, fold each reply as it comes, take the server step.

It talks only to a Flower Grid, so it runs unchanged over a SuperLink, Flower's simulation and Ray.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fl_client import protocol, updates
from fl_client.federation_settings import RunSettings, TaskFederation
from fl_server.broadcast import PREFIX, WHOLE, Broadcast
from fl_server.collecting import collect
from fl_server.guards import Guards
from fl_server.replies import metrics_in, tell
from fl_server.roster import Client, RoundFailed, choose_cohort
from fl_server.round_result import Observer, RoundResult
from fl_server.round_updates import RoundUpdates
from fl_server.server_optimizer import ServerOptimizer
from ssl_core.training.schedule import gumbel_temperature, learning_rate


@dataclasses.dataclass(frozen=True)
class _Before:
    """What a round changes, as it was before."""

    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    folded: dict[int, int]


class Federation:
    """The global model and how rounds change it."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        optimizer: ServerOptimizer,
        settings: RunSettings,
        run: str = "run",
        told: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start from the given weights.

        Args:
            weights: global weights by parameter name, each `[...]`; each round changes them in
                place.
            optimizer: applies the mean update.
            settings: of the run.
            run: identity of the run.
            told: what clients are told in every round, see `Job.told`.
            folder: where updates wait that are not folded at once; None is the system's temporary
                folder.
        """
        self.weights, self.optimizer, self.settings = weights, optimizer, settings
        self.run, self.folder = run, folder
        self.told = dict(told or {})
        self.broadcast = Broadcast(settings.encoding)
        self.shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self.folded: dict[int, int] = {}
        """Last round in which a client's update was folded, by key."""
        self.guards = Guards(settings)
        self._before: _Before | None = None

    def round(
        self,
        grid: Grid,
        clients: list[Client],
        number: int,
        observer: Observer | None = None,
        undoable: bool = False,
    ) -> RoundResult:
        """Take one round.

        Args:
            grid: connects to the clients.
            clients: those connected.
            number: round, from 0.
            observer: is told what happens.
            undoable: whether `undo` may follow; it takes another copy of what the round changes.

        Raises:
            RoundFailed: fewer than `min_clients` updates could be folded.
        """
        started = time.monotonic()
        cohort = choose_cohort(clients, self.settings, number)
        messages, sent = self._train_messages(cohort, number)
        if observer is not None:
            observer.began(number, cohort)
        before = _Before({}, dict(self.optimizer.state), dict(self.folded))
        received = RoundUpdates(self.shapes, self.settings, number, self.guards, self.folder)
        failures, bounded = self._fold_replies(grid, messages, cohort, received, observer)
        self._require_enough(received, cohort, failures)
        self._before = before if undoable else None
        self.optimizer.apply(
            self.weights, received.fold.mean(), before.weights if undoable else None
        )
        metrics = received.averages() | {
            "cohort": len(cohort),
            "failures": len(failures),
            "bytes_sent": sent,
            "bytes_received": received.bytes,
            "round_seconds": time.monotonic() - started,
        }
        metrics |= self._schedule(number)
        return RoundResult(
            number, metrics, received.clients(), tuple(sorted(failures)), tuple(sorted(bounded))
        )

    def undo(self) -> None:
        """Go back to the weights and the server optimizer's state from before the last round.

        What clients hold of the broadcast stays as it is, since they have received it, and so does
        what the guards have learnt of them.
        """
        assert self._before is not None, "the round was not undoable"
        for name, value in self._before.weights.items():
            self.weights[name].copy_(value)
        self.optimizer.state = self._before.optimizer_state
        self.folded, self._before = self._before.folded, None

    def evaluate(
        self, grid: Grid, clients: list[Client], number: int
    ) -> tuple[dict[int, dict[str, float]], tuple[str, ...]]:
        """Let every client score the current weights on its own clips.

        Args:
            grid: connects to the clients.
            clients: those connected.
            number: rounds done.

        Returns:
            The metrics of each client by key, and a line for each client without any.
        """
        record, _ = Broadcast(self.settings.encoding).pack(self.weights, number, [])
        messages = self._messages(record, -1, clients, number, MessageType.EVALUATE)
        del record  # sending empties the messages, so that no copy of the weights stays
        names = protocol.metrics_of(self.settings.task)
        found: dict[int, dict[str, float]] = {}
        failures: list[str] = []

        def take(client: Client, reply: Message) -> None:
            found[client.key] = metrics_in(reply, names)

        def refuse(key: int, reason: str) -> None:
            failures.append(f"client {key}: {reason}")

        silent = collect(grid, messages, clients, take, refuse, self.settings, number)
        if silent:
            failures.append(f"{len(silent)} clients did not answer")
        return found, tuple(sorted(failures))

    def state(self, number: int) -> dict[str, Any]:
        """The state for a checkpoint after round `number`; nothing in it depends on the time."""
        settings = self.settings
        kept: dict[str, Any] = self.guards.state()
        lossy = settings.encoding != "fp32"
        if lossy or settings.keep_optimizer_state:  # clients go on from their last folded round
            kept["folded"] = self.folded
        if lossy:
            kept["held"] = self.broadcast.held
        return kept | {
            "next_round": number + 1,
            "next_update": (number + 1) * settings.local_updates,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "optimizer": settings.server_optimizer,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint beside the weights, by name, each `[...]`."""
        return self.optimizer.state | self.broadcast.state()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's `state` and `tensors`, each `[...]`."""
        sent = {name: value for name, value in tensors.items() if name.startswith(PREFIX)}
        self.optimizer.state = {n: value for n, value in tensors.items() if n not in sent}
        self.guards.restore(state)
        self.broadcast.load(sent, state.get("held", {}))
        self.folded = {int(key): number for key, number in state.get("folded", {}).items()}

    def _train_messages(self, cohort: list[Client], number: int) -> tuple[list[Message], int]:
        """A round's messages, and the bytes of weights in all of them."""
        record, base = self.broadcast.pack(self.weights, number, [client.key for client in cohort])
        messages = self._messages(record, base, cohort, number, MessageType.TRAIN)
        return messages, updates.size(record) * len(cohort)

    def _messages(
        self, weights: ArrayRecord, base: int, clients: list[Client], number: int, kind: str
    ) -> list[Message]:
        """A message to each client; `base` is the round to whose weights these are added, or -1."""
        settings, train = self.settings, kind == MessageType.TRAIN

        def instructions(client: Client) -> ConfigRecord:
            return protocol.instructions(
                run=self.run,
                **self.told,
                round=number,
                first_update=number * settings.local_updates,
                updates=settings.local_updates if train else 0,
                base_round=base,
                encoding=settings.encoding if base >= 0 else WHOLE[settings.encoding],
                folded_round=self.folded.get(client.key, -1),
            )

        return [
            Message(
                RecordDict(
                    {protocol.WEIGHTS: weights, protocol.INSTRUCTIONS: instructions(client)}
                ),
                client.node,
                kind,
                group_id=str(number + 1) if train else f"{number}-evaluate",
            )
            for client in clients
        ]

    def _fold_replies(
        self,
        grid: Grid,
        messages: list[Message],
        cohort: list[Client],
        received: RoundUpdates,
        observer: Observer | None,
    ) -> tuple[list[str], list[str]]:
        """Send a round's messages and fold the replies.

        Returns:
            A line for each client that failed, and for each folded update that was bounded.
        """
        failures: list[str] = []

        def take(client: Client, reply: Message) -> None:
            metrics = received.add(client, reply)
            if observer is not None:
                observer.replied(client.key, metrics)

        def refuse(key: int, reason: str) -> None:
            failures.append(f"client {key}: {reason}")
            self.broadcast.held.pop(key, None)
            if observer is not None:
                observer.replied(key, None, reason)

        settings, number = self.settings, received.number
        silent = collect(grid, messages, cohort, take, refuse, settings, number)
        limited = settings.deadline or settings.patience
        why = "no answer in time" if limited else "the message could not be sent"
        for key in silent:
            refuse(key, why)
        settled = received.settle()
        self.folded |= dict.fromkeys(received.folded(), number)
        # Who was refused only now has answered, so it holds the round's weights like the others.
        self.broadcast.held |= dict.fromkeys((*received.folded(), *settled.refused), number)
        for key, reason in sorted((settled.refused | settled.bounded).items()):
            if key in settled.refused:
                failures.append(f"client {key}: {reason}")
            if observer is not None:
                observer.judged(key, key in settled.refused, reason)
        nodes = [client.node for client in cohort if client.key in settled.refused]
        tell(grid, nodes, protocol.notice("rejected", number + 1))
        return failures, [f"client {key}: {what}" for key, what in settled.bounded.items()]

    def _require_enough(
        self, received: RoundUpdates, cohort: list[Client], failures: list[str]
    ) -> None:
        """Raise `RoundFailed` if too few updates were folded."""
        needed = min(self.settings.min_clients, len(cohort))
        if received.fold.count < needed:
            listed = "; ".join(sorted(failures)[:5])
            raise RoundFailed(
                f"round {received.number + 1}: {received.fold.count} updates could be used, "
                f"{needed} are needed: {listed}"
            )

    def _schedule(self, number: int) -> dict[str, float]:
        """Learning rate and Gumbel temperature of a round's last update; pretraining only."""
        settings = self.settings
        if isinstance(settings, TaskFederation):
            return {}
        recipe = settings.recipe
        last = (number + 1) * settings.local_updates - 1
        return {
            "learning_rate": learning_rate(recipe, last, settings.total_updates),
            "temperature": gumbel_temperature(recipe, last),
        }
