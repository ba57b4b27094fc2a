"""A Flower Grid on Ray: workers that keep the model, and arrays in shared memory.

The workers run the project's ClientApp. A message does not carry its arrays: they are put into
Ray's object store once, however many clients get them, and are read there without copying.
"""

import collections
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from flwr.app import Array, ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import ShortwaveError
from common.process_environment import tuned
from common.stop import stop_on_sigterm
from fl_client import protocol

RUN_ID = 1
SERVER_NODE = 0

Buffers = dict[str, tuple[str, tuple[int, ...], str, npt.NDArray[np.uint8]]]
"""An ArrayRecord's dtype, shape, serialisation type and bytes `[byte]` by tensor name."""


class Letter(NamedTuple):
    """A message without its arrays, and the arrays."""

    message: Message
    arrays: dict[str, Any]
    """By record name: `Buffers`, or a reference to them in the object store."""


def to_buffers(record: ArrayRecord) -> Buffers:
    """An ArrayRecord's bytes as NumPy arrays `[byte]`, which Ray stores and maps uncopied."""
    return {
        name: (array.dtype, tuple(array.shape), array.stype, np.frombuffer(array.data, np.uint8))
        for name, array in record.items()
    }


def from_buffers(buffers: Buffers) -> ArrayRecord:
    """The ArrayRecord of `to_buffers`, on the same memory."""
    record = ArrayRecord()
    for name, (dtype, shape, stype, data) in buffers.items():
        array = Array(dtype, shape, stype, b"")
        array.data = data.data
        record[name] = array
    return record


def seal(message: Message) -> Letter:
    """Split a message from its arrays."""
    if message.has_error():
        return Letter(message, {})
    content = RecordDict()
    arrays: dict[str, Any] = {}
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            arrays[name] = to_buffers(record)
        else:
            content[name] = record
    return Letter(Message(metadata=message.metadata, content=content), arrays)


def unseal(letter: Letter) -> Message:
    """Put the arrays back into the message."""
    for name, buffers in letter.arrays.items():
        letter.message.content[name] = from_buffers(buffers)
    return letter.message


@ray.remote
class Worker:
    """A process that keeps the ClientApp and its model, and answers for any client."""

    def __init__(self, run_config: dict[str, Any]) -> None:
        """Import the ClientApp; `run_config` has all settings."""
        from fl_client.client_app import app

        self.app, self.run_config = app, run_config

    def answer(self, message: Message, node: dict[str, Any], *arrays: Any) -> Letter:
        """Run the ClientApp on a message.

        Args:
            message: without its arrays.
            node: the client's node config.
            arrays: alternating record names and `Buffers`; Ray resolves no nested references.
        """
        pairs = dict(zip(arrays[::2], arrays[1::2], strict=True))
        node_id = message.metadata.dst_node_id
        context = Context(RUN_ID, node_id, node, RecordDict(), self.run_config)
        return seal(self.app(unseal(Letter(message, pairs)), context))


class RayGrid(Grid):
    """A Grid whose clients are numbered partitions that a few workers answer for.

    Finished updates must not pile up in memory, so at most two messages per worker are in progress
    or waiting to be pulled.
    """

    def __init__(
        self, run_config: Mapping[str, Any], nodes: list[dict[str, Any]], workers: int, gpus: float
    ) -> None:
        """Start the workers.

        Args:
            run_config: Flower's run config.
            nodes: node config of each client.
            workers: number of processes.
            gpus: GPUs of each worker, which may be a fraction of one; 0 for none.
        """
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 0
        self._run = Run.create_empty(RUN_ID)
        self._nodes = {number + 1: node for number, node in enumerate(nodes)}
        self._workers = [
            Worker.options(  # type: ignore[attr-defined]
                num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=2
            ).remote(dict(run_config))
            for _ in range(workers)
        ]
        self._load = [0] * workers
        self._queue: collections.deque[tuple[str, Letter]] = collections.deque()
        self._under_way: dict[Any, tuple[str, int, Message]] = {}
        self._ready: dict[str, Any] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid works for."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a client.

        Args:
            content: records to send.
            message_type: one of Flower's `MessageType`.
            dst_node_id: the client's node id.
            group_id: group of messages, such as a round.
            ttl: seconds that the message is valid; None takes Flower's default.
        """
        metadata = Metadata(
            run_id=RUN_ID,
            message_id="",
            src_node_id=SERVER_NODE,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
        )
        return Message(metadata=metadata, content=content)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids: partition numbers plus one."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and return their ids; a record that several share is stored once."""
        stored: dict[int, Any] = {}
        identifiers = []
        for message in messages:
            self._count += 1
            identifier = str(self._count)
            message.metadata.__dict__["_message_id"] = identifier
            records = message.content.array_records
            letter = seal(message)
            for name, record in records.items():
                if id(record) not in stored:
                    stored[id(record)] = ray.put(letter.arrays[name])
                letter.arrays[name] = stored[id(record)]
            self._queue.append((identifier, letter))
            identifiers.append(identifier)
        self._dispatch()
        return identifiers

    def _dispatch(self) -> None:
        """Send queued messages to the least busy workers, up to two per worker."""
        while self._queue and len(self._under_way) + len(self._ready) < 2 * len(self._workers):
            identifier, letter = self._queue.popleft()
            index = min(range(len(self._workers)), key=self._load.__getitem__)
            node = self._nodes[letter.message.metadata.dst_node_id]
            flat = [part for pair in letter.arrays.items() for part in pair]
            reference = self._workers[index].answer.remote(letter.message, node, *flat)
            self._under_way[reference] = (identifier, index, letter.message)
            self._load[index] += 1

    def wait(self, seconds: float) -> None:
        """Wait up to `seconds` for a reply, and send further messages in its place."""
        if not self._under_way:
            return
        done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=seconds)
        if done and len(self._under_way) > 1:
            done, _ = ray.wait(list(self._under_way), num_returns=len(self._under_way), timeout=0)
        for reference in done:
            identifier, index, message = self._under_way.pop(reference)
            self._load[index] -= 1
            self._ready[identifier] = (reference, message)
        self._dispatch()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived to the given messages."""
        self.wait(0)
        replies = []
        for identifier in message_ids:
            if identifier not in self._ready:
                continue
            reference, message = self._ready.pop(identifier)
            try:
                replies.append(unseal(ray.get(reference)))
            except ray.exceptions.RayError as error:
                reason = " ".join(str(getattr(error, "cause", None) or error).split())[:500]
                failure = Error(code=protocol.CLIENT_FAILED, reason=reason)
                replies.append(Message(failure, reply_to=message))
        self._dispatch()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for all replies, or those within `timeout` seconds."""
        waiting = list(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            self.wait(1.0)
            found = list(self.pull_messages(waiting))
            replies += found
            for reply in found:
                waiting.remove(reply.metadata.reply_to_message_id)
        return replies


def start_ray(workers: int, *, address: str, weights_bytes: int, gpu: bool) -> float:
    """Start Ray on this machine, on loopback only, or join a cluster.

    Args:
        workers: number of worker processes to come.
        address: of a Ray cluster; empty starts Ray here.
        weights_bytes: size of the shared weights, which the object store holds several times.
        gpu: whether workers need GPUs.

    Returns:
        GPUs per worker, which may be a fraction of one; 0 without `gpu`.

    Raises:
        ShortwaveError: Ray does not start, or sees no GPU although `gpu` is set.
    """
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if root not in sys.path:
        sys.path.insert(0, root)
    os.environ.update(tuned(os.environ))
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            store = max(256 * 2**20, int(weights_bytes * (2 * workers + 2) * 1.05))
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                object_store_memory=store,
                log_to_driver=False,
                logging_level="error",
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ShortwaveError(f"Ray does not start: {error}") from None
    stop_on_sigterm()  # Ray has put a handler of its own in its place, which aborts
    if not gpu:
        return 0.0
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if not gpus:
        raise ShortwaveError("--device cuda: Ray sees no GPU; use --device cpu")
    return float(gpus) / workers
