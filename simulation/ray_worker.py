"""The process that answers for simulated clients, and how messages travel to it on Ray.

A message does not carry its arrays: they are put into Ray's object store once, however many clients
get them, and are read there without copying.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from simulation.shipped_state import Files, StateChange, changed_state, unpack_state

RUN_ID = 1

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


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """A process that keeps the ClientApp and its model, and answers for any client."""

    def __init__(
        self, run_config: dict[str, Any], server_node: str, manifest: npt.NDArray[np.uint8] | None
    ) -> None:
        """Import the ClientApp.

        Args:
            run_config: all settings of the run.
            server_node: Ray's id of the machine that the server runs on.
            manifest: content `[byte]` of the recut corpus' file, if the run has one.
        """
        from fl_client.client_app import app

        self.app, self.run_config = app, run_config
        self.far = ray.get_runtime_context().get_node_id() != server_node
        self.folder = tempfile.TemporaryDirectory(prefix="shortwave-worker-") if self.far else None
        self.manifest = ""
        if self.folder is not None and manifest is not None:
            self.manifest = str(Path(self.folder.name) / "manifest.tsv")
            manifest.tofile(self.manifest)

    def is_far(self) -> bool:
        """Whether this worker runs on another machine than the server."""
        return self.far

    def answer(
        self, message: Message, node: dict[str, Any], files: Files, *arrays: Any
    ) -> tuple[Letter, StateChange | None]:
        """Run the ClientApp on a message.

        Args:
            message: without its arrays.
            node: the client's node config. Its paths are the server's: a worker on another machine
                takes its own in their place.
            files: for a worker on another machine, the client's state.
            arrays: alternating record names and `Buffers`; Ray resolves no nested references.

        Returns:
            The answer, and how the client's state on another machine has changed.
        """
        pairs = dict(zip(arrays[::2], arrays[1::2], strict=True))
        letter = Letter(message, pairs)
        if not self.far:
            return self._run(letter, node), None
        with tempfile.TemporaryDirectory(prefix="shortwave-state-") as folder:
            node = node | {"state": folder} | ({"manifest": self.manifest} if self.manifest else {})
            unpack_state(files, Path(folder))
            answer = self._run(letter, node)
            return answer, changed_state(files, Path(folder), int(node["partition-id"]))

    def _run(self, letter: Letter, node: dict[str, Any]) -> Letter:
        node_id = letter.message.metadata.dst_node_id
        context = Context(RUN_ID, node_id, node, RecordDict(), self.run_config)
        return seal(self.app(unseal(letter), context))
