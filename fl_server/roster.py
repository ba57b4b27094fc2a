"""The connected clients: who they are, who comes and goes, and the cohort of a round."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common.errors import ShortwaveError
from fl_client import protocol
from fl_client.federation_settings import RunSettings
from fl_client.protocol import ProtocolError
from fl_server.replies import metrics_in, replies_of, tell
from ssl_core.training.randomness import generator

_DOUBLE = "two clients say they are number"
_LOOK = 0.25
"""Seconds between two looks for new clients while too few are ready."""


class RoundFailed(ShortwaveError):
    """Too few clients answered for the run to go on."""


@dataclasses.dataclass(frozen=True)
class Client:
    """A connected client that has described itself."""

    key: int
    """The client's number."""
    node: int
    """Flower's node id."""
    crops: int
    """Crops, or clips to train on."""
    seconds: float
    """Seconds of audio to train on."""


class Roster:
    """Keeps track of the connected clients."""

    def __init__(self, grid: Grid, settings: RunSettings, say: Callable[[str], None]) -> None:
        """Start with no known client.

        Args:
            grid: connects to the clients.
            settings: of the run.
            say: prints a line about a client that cannot take part, has come or has gone.
        """
        self.grid, self.settings, self.say = grid, settings, say
        self._known: dict[int, Client] = {}
        self._problems: dict[int, str] = {}
        self._doubles: dict[int, int] = {}
        """By node that was left out: the node that takes part in its place."""

    def gather(self) -> list[Client]:
        """Query every connected node until enough have answered; ordered by key.

        Raises:
            RoundFailed: too few have answered after `settings.wait` seconds; lists their errors.
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
            time.sleep(_LOOK)

    def refresh(self) -> list[Client]:
        """Query new nodes and drop those that have gone; the clients connected now.

        Raises:
            RoundFailed: too few, as in `gather`.
        """
        there = set(self.grid.get_node_ids())
        for node in [node for node in self._known if node not in there]:
            self.say(f"client {self._known.pop(node).key} has gone")
        self._doubles = {node: kept for node, kept in self._doubles.items() if kept in there}
        self._problems = {
            node: text
            for node, text in self._problems.items()
            if node in there and (node in self._doubles or not text.startswith(_DOUBLE))
        }
        before = set(self._known)
        clients = self.gather()
        for node in self._known.keys() - before:
            self.say(f"client {self._known[node].key} has come")
        return clients

    def _ask_new(self) -> list[int]:
        """Query the nodes that have not been queried; their ids."""
        known = self._known.keys() | self._problems.keys()
        new = [node for node in self.grid.get_node_ids() if node not in known]
        for node, reply in replies_of(self.grid, _queries(new), self.settings.wait) if new else ():
            try:
                values = metrics_in(reply, protocol.INFO_METRICS)
            except ProtocolError as error:
                self._problems[node] = str(error)
                self.say(f"a client cannot take part: {error}")
                if not reply.has_error():
                    tell(self.grid, [node], protocol.notice("version"))
                continue
            self._known[node] = Client(
                int(values["partition"]), node, int(values["crops"]), values["seconds"]
            )
        return new

    def _without_doubles(self) -> list[Client]:
        """One client for each key, ordered by key: two would count the same audio twice."""
        by_key: dict[int, list[Client]] = {}
        for client in sorted(self._known.values(), key=lambda client: client.node):
            by_key.setdefault(client.key, []).append(client)
        return [self._one_of(by_key[key]) for key in sorted(by_key)]

    def _one_of(self, same: list[Client]) -> Client:
        """The one of several clients with the same key that takes part.

        A restarted device has a new node id while its old one may still be listed: that one does
        not answer. Who does is told.
        """
        if len(same) == 1:
            return same[0]
        key = same[0].key
        notice = protocol.notice("double", key)
        there = tell(self.grid, [client.node for client in same], notice)
        kept = next((client for client in same if client.node in there), same[-1])
        for client in same:
            if client is kept:
                continue
            self._known.pop(client.node)
            if client.node not in there:
                self._problems[client.node] = f"client {key} does not answer as this node any more"
                continue
            self._problems[client.node], self._doubles[client.node] = f"{_DOUBLE} {key}", kept.node
            self.say(f"{_DOUBLE} {key}; only one of them takes part, both are told")
        return kept


def choose_cohort(clients: list[Client], settings: RunSettings, number: int) -> list[Client]:
    """Draw the clients of a round.

    Args:
        clients: those connected, ordered by key.
        settings: of the run; its seed decides the draw.
        number: round, from 0.

    Returns:
        The cohort, ordered by key.
    """
    size = min(settings.clients_per_round, len(clients))
    rng = generator(settings.seed, "cohort", number)
    chosen = rng.choice(len(clients), size=size, replace=False)
    return [clients[int(place)] for place in np.sort(chosen)]


def _queries(nodes: list[int]) -> list[Message]:
    """Messages that ask nodes to describe themselves."""
    return [
        Message(
            RecordDict({protocol.INSTRUCTIONS: protocol.instructions(ask="describe")}),
            node,
            MessageType.QUERY,
            group_id="describe",
        )
        for node in nodes
    ]
