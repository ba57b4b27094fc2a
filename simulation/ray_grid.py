"""A Flower Grid on Ray, whose workers answer for numbered clients.

A worker that dies costs no client its answer: its messages are sent again, and a new worker starts.
"""

import collections
import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from flwr.app import Message, Metadata, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.cores import usable_cores
from simulation.ray_runtime import RayFailed, RayRuntime, one_line
from simulation.ray_worker import RUN_ID, Letter, Worker, seal, unseal
from simulation.shipped_state import StateChange, apply_change, read_state

SERVER_NODE = 0
_TRIES = 3
"""Times that a message is sent, or a worker started, before the run stops."""
_START = 60.0
"""Seconds in which another worker must have started, with a core for each."""
_FETCH = 5.0
"""Seconds to fetch an answer before looking whether Ray still runs."""


@dataclasses.dataclass
class _Slot:
    """A place for a worker, which is replaced when it dies."""

    worker: Any
    starting: Any
    """Ray's reference to whether the worker is on another machine, known once it has started."""
    far: bool | None = None
    """None until then."""
    load: int = 0
    """Messages that the worker has."""


@dataclasses.dataclass
class _Task:
    """A message to a client, until its answer is here."""

    identifier: str
    letter: Letter
    slot: int = 0
    worker: Any = None
    failures: int = 0


class RayGrid(Grid):
    """A Grid whose clients are numbered partitions that a few workers answer for.

    Finished updates must not pile up in memory, so at most two messages per worker are in progress
    or waiting to be pulled.
    """

    def __init__(
        self, run_config: Mapping[str, Any], nodes: list[dict[str, Any]], runtime: RayRuntime
    ) -> None:
        """Start the workers.

        Args:
            run_config: Flower's run config.
            nodes: node config of each client.
            runtime: Ray, which has been started.
        """
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 0
        self._run = Run.create_empty(RUN_ID)
        self._nodes = {number + 1: node for number, node in enumerate(nodes)}
        self._runtime = runtime
        manifest = str(nodes[0].get("manifest", ""))
        content = np.fromfile(manifest, np.uint8) if manifest and runtime.address else None
        self._arguments = (ray.put(dict(run_config)), runtime.node, ray.put(content))
        self._slots = [self._new_slot() for _ in range(runtime.workers)]
        self._moved, self._failed_starts = time.monotonic(), 0
        self._queue: collections.deque[_Task] = collections.deque()
        self._under_way: dict[Any, _Task] = {}
        self._ready: dict[str, Message] = {}
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
        self._runtime.check()
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
            self._queue.append(_Task(identifier, letter))
            identifiers.append(identifier)
        self._dispatch()
        return identifiers

    def wait(self, seconds: float) -> None:
        """Wait up to `seconds` for a reply, and send further messages in its place.

        Raises:
            RayFailed: Ray or its workers do not work.
        """
        self._runtime.check()
        starting = {slot.starting: slot for slot in self._slots if slot.far is None}
        waiting = [*self._under_way, *starting]
        if waiting:
            done, _ = ray.wait(waiting, num_returns=1, timeout=seconds)
            if done and len(waiting) > 1:
                done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            for reference in done:
                if reference in starting:
                    self._started(starting[reference])
                else:
                    self._take(reference)
            self._require_progress(bool(done))
        self._dispatch()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived to the given messages."""
        self.wait(0)
        found = [self._ready.pop(each) for each in message_ids if each in self._ready]
        self._dispatch()
        return found

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

    def _new_slot(self) -> _Slot:
        options = {"num_cpus": 1, "num_gpus": self._runtime.gpus_each}
        worker = Worker.options(**options).remote(*self._arguments)  # type: ignore[attr-defined]
        return _Slot(worker, worker.is_far.remote())

    def _started(self, slot: _Slot) -> None:
        """Note that a worker has started; start another one if it has not."""
        try:
            slot.far = self._fetch(slot.starting)
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _TRIES:
                raise RayFailed(f"no worker starts: {one_line(error)}") from None
            self._slots[self._slots.index(slot)] = self._new_slot()
            return
        self._failed_starts = 0

    def _require_progress(self, moved: bool) -> None:
        """Raise `RayFailed` if no worker has started for too long."""
        if moved or any(slot.far is not None for slot in self._slots):
            self._moved = time.monotonic()
            return
        limit = _START
        if not self._runtime.address:
            limit *= max(1.0, len(self._slots) / usable_cores())
        if time.monotonic() - self._moved > limit:
            raise RayFailed(
                f"no worker has started within {limit:.0f} s. {len(self._slots)} workers need a "
                f"CPU and {self._runtime.gpus_each:g} GPUs each; {self._runtime.free()}"
            )

    def _dispatch(self) -> None:
        """Send queued messages to the least busy workers, up to two per worker."""
        ready = [number for number, slot in enumerate(self._slots) if slot.far is not None]
        while (
            ready and self._queue and len(self._under_way) + len(self._ready) < 2 * len(self._slots)
        ):
            task = self._queue.popleft()
            task.slot = min(ready, key=lambda number: self._slots[number].load)
            slot = self._slots[task.slot]
            task.worker = slot.worker
            message = task.letter.message
            node = self._nodes[message.metadata.dst_node_id]
            files = read_state(Path(node["state"]), node["partition-id"]) if slot.far else {}
            flat = [part for pair in task.letter.arrays.items() for part in pair]
            reference = slot.worker.answer.remote(message, node, files, *flat)
            self._under_way[reference] = task
            slot.load += 1

    def _take(self, reference: Any) -> None:
        """Fetch an answer; send the message again if a worker or Ray has failed."""
        task = self._under_way.pop(reference)
        slot = self._slots[task.slot]
        if slot.worker is task.worker:
            slot.load -= 1
        answer: tuple[Letter, StateChange | None]
        try:
            answer = self._fetch(reference)
        except ray.exceptions.RayError as error:
            self._send_again(task, error)
            return
        letter, change = answer
        if change is not None:
            node = self._nodes[task.letter.message.metadata.dst_node_id]
            apply_change(change, Path(node["state"]), node["partition-id"])
        self._ready[task.identifier] = unseal(letter)

    def _send_again(self, task: _Task, error: Exception) -> None:
        """Queue a message again, and replace its worker if that has died.

        Raises:
            RayFailed: it has been sent often enough.
        """
        self._runtime.check()
        task.failures += 1
        if task.failures >= _TRIES:
            key = self._nodes[task.letter.message.metadata.dst_node_id]["partition-id"]
            raise RayFailed(
                f"{_TRIES} times no worker could answer for client {key}: {one_line(error)}"
            )
        slot = self._slots[task.slot]
        if slot.worker is task.worker and isinstance(error, ray.exceptions.RayActorError):
            self._slots[task.slot] = self._new_slot()
        self._queue.appendleft(task)

    def _fetch(self, reference: Any) -> Any:
        """Get a result, looking now and then whether Ray still runs."""
        while True:
            try:
                return ray.get(reference, timeout=_FETCH)
            except ray.exceptions.GetTimeoutError:
                self._runtime.check()
