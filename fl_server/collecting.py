"""Sends messages to clients and passes on the replies, each as it comes; tells who was refused."""

import math
from collections.abc import Callable

from flwr.app import Message
from flwr.serverapp import Grid

from fl_client import protocol
from fl_client.federation_settings import RunSettings
from fl_client.protocol import ProtocolError
from fl_server.fold import RejectedUpdate
from fl_server.replies import replies_of, tell
from fl_server.roster import Client


def collect(
    grid: Grid,
    messages: list[Message],
    clients: list[Client],
    take: Callable[[Client, Message], None],
    refuse: Callable[[int, str], None],
    settings: RunSettings,
    number: int,
) -> set[int]:
    """Send messages and pass each reply to `take`; the keys of clients that did not answer.

    Where `take` raises, `refuse` gets the client's key and the reason. The owner of a device whose
    answer is refused is told.

    Args:
        grid: connects to the clients.
        messages: for each client.
        clients: those asked.
        take: uses a reply.
        refuse: notes a failure.
        settings: of the run, with its limits of time.
        number: round, from 0.
    """
    by_node = {client.node: client for client in clients}
    silent = {client.key for client in clients}
    limit = settings.deadline or math.inf
    rejected = []
    for node, reply in replies_of(grid, messages, limit, settings.patience):
        client = by_node[node]
        silent.discard(client.key)
        try:
            take(client, reply)
        except (ProtocolError, RejectedUpdate) as error:
            refuse(client.key, str(error))
            if not reply.has_error():
                rejected.append(node)
        del reply  # before the next one comes
    tell(grid, rejected, protocol.notice("rejected", number + 1))
    return silent
