"""A small Grid in the test's process, and what its clients answer."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, MetricRecord, RecordDict

from fl_client import protocol, updates
from fl_client.encoding import encode
from fl_client.protocol import Encoding

Reply = Callable[[Message], Message]


class FakeGrid:
    """Answers each message with functions of it, in a chosen order of arrival."""

    def __init__(self, answers: dict[int, list[Reply]], arrival: list[int] | None = None) -> None:
        """`answers`: by node id; `arrival`: node ids, first to reply first."""
        self.answers, self.arrival = answers, arrival or list(answers)
        self.sent: list[Message] = []
        self.unsendable: set[int] = set()
        self.silent: set[int] = set()
        self.waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        identifiers: list[str | None] = []
        for message in messages:
            identifier = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identifier
            self.sent.append(message)
            if message.metadata.dst_node_id in self.unsendable:
                identifiers.append(None)
                continue
            self.waiting[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, identifiers: Iterable[str]) -> list[Message]:
        there = {message.metadata.dst_node_id for message in self.waiting.values()}
        first = next((node for node in self.arrival if node in there - self.silent), None)
        replies = []
        for identifier in identifiers:
            node = self.waiting[identifier].metadata.dst_node_id
            if node == first:
                message = self.waiting.pop(identifier)
                replies += [answer(message) for answer in self.answers[node]]
        return replies

    def wait(self, seconds: float) -> None:
        assert self.waiting, f"waits {seconds} s for nothing"
        time.sleep(0.01)


def update(
    values: list[float],
    samples: float,
    *,
    name: str = "w",
    metrics: dict[str, Any] | None = None,
    dtype: type = np.float32,
    encoding: Encoding = "fp32",
) -> Reply:
    """An answer to a train message: `w` and `b` changed by `values` (of `w`) and 0."""
    numbers = dict.fromkeys(protocol.TRAIN_METRICS, 1.0)
    numbers |= {"samples": samples} | (metrics or {})
    arrays: dict[str, Any] = {name: np.array(values, dtype), "b": np.zeros((), dtype)}
    if encoding != "fp32":
        arrays = {key: encode(value, encoding) for key, value in arrays.items()}

    def answer(message: Message) -> Message:
        if message.metadata.message_type == MessageType.QUERY:  # a notice
            return Message(RecordDict(), reply_to=message)
        asked = message.content.config_records[protocol.INSTRUCTIONS]["round"]
        numbers.update({"round": asked} if "round" not in (metrics or {}) else {})
        content = RecordDict(
            {
                protocol.UPDATE: updates.pack(arrays.items()),
                protocol.METRICS: MetricRecord(numbers),
            }
        )
        return Message(content, reply_to=message)

    return answer


def description(key: int, seconds: float = 10.0) -> Reply:
    record = MetricRecord({"partition": key, "crops": 2, "seconds": seconds})
    return lambda message: Message(RecordDict({protocol.METRICS: record}), reply_to=message)
