"""Sends messages and notices over a Flower Grid, and yields the replies as they come."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fl_client import protocol
from fl_client.protocol import ProtocolError

_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
_TOLD_IN = 30.0
"""Seconds for connected devices to confirm a notice."""
_PAUSE = 0.01
"""Seconds between two polls for each reply awaited, within the limits above."""


def replies_of(
    grid: Grid, messages: list[Message], limit: float, patience: float = 0.0
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield each reply as it comes, with the node that was asked.

    No more than one reply is held here. The node is not read from the reply: for a device that has
    gone, the SuperLink answers under its own id. A message that cannot be sent, to which Flower
    gives no id, gets no reply. A grid may offer `wait(seconds)`, which returns early when a reply
    is ready.

    Args:
        grid: connects to the clients.
        messages: emptied once sent.
        limit: seconds after which to stop.
        patience: once half have answered, stop after this many times as long as the slowest of
            them took; 0 waits for all.
    """
    wait: Callable[[float], None] = getattr(grid, "wait", time.sleep)
    nodes = [message.metadata.dst_node_id for message in messages]
    sent = zip(grid.push_messages(messages), nodes, strict=False)
    waiting = {identifier: node for identifier, node in sent if identifier is not None}
    messages.clear()
    started, pause = time.monotonic(), _SHORTEST_PAUSE
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
            pause = _SHORTEST_PAUSE
        elif waiting:
            wait(pause)
            pause = min(pause * 1.5, max(0.25, _PAUSE * len(waiting)), _LONGEST_PAUSE)


def tell(grid: Grid, nodes: Iterable[int], notice: ConfigRecord) -> set[int]:
    """Show the owners of devices a notice; the nodes that have confirmed it.

    Args:
        grid: connects to the clients.
        nodes: whom to tell.
        notice: see `protocol.notice`.
    """
    messages = [
        Message(
            RecordDict({protocol.INSTRUCTIONS: notice}), node, MessageType.QUERY, group_id="notice"
        )
        for node in nodes
    ]
    if not messages:
        return set()
    return {node for node, reply in replies_of(grid, messages, _TOLD_IN) if not reply.has_error()}


def metrics_in(reply: Message, names: tuple[str, ...]) -> dict[str, float]:
    """The metrics of a reply, checked.

    Raises:
        ProtocolError: the client failed, or the metrics are not as agreed.
    """
    if reply.has_error():
        reason, code = reply.error.reason, reply.error.code
        raise ProtocolError(" ".join(str(reason).split()) if reason else f"error {code}")
    return protocol.check_metrics(reply.content, names)
