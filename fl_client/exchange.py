"""From a message to the model, and from the trained model to the update that goes back."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_client import encoding, protocol, updates
from fl_client.client_state import ClientState, StateLost
from fl_client.encoding import Decoded, Encoding


class Weights(Protocol):
    """A model, or the part of one that is shared."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, on their own memory."""


class Exchange(Protocol):
    """One round's exchange of a client."""

    def load(self) -> None:
        """Give the model the weights that the round starts from."""

    def difference(self) -> ArrayRecord:
        """What has become of them; ends the exchange."""


def exchange_of(
    model: Weights,
    weights: ArrayRecord,
    task: Mapping[str, Any],
    client: ClientState,
    kind: Encoding,
) -> Exchange:
    """The exchange of a round, by the run's encoding.

    Raises:
        ProtocolError: weights that do not fit the model.
        StateLost: a difference to weights that are not here.
    """
    if kind == "fp32":
        return _Plain(model, weights)
    return _Encoded(model, weights, task, kind, client)


class _Plain:
    """fp32 both ways; nothing is kept."""

    def __init__(self, model: Weights, weights: ArrayRecord) -> None:
        self.own, self.weights = model.state_dict(), updates.Views(weights)
        if self.own.keys() != set(self.weights):
            wrong = sorted(self.own.keys() ^ set(self.weights))
            raise protocol.ProtocolError(f"the weights do not fit the model: {wrong[0]} and others")

    def load(self) -> None:
        for name, value in self.weights.items():
            own = self.own[name]
            if tuple(value.shape) != tuple(own.shape):
                raise protocol.ProtocolError(f"{name} is {value.shape}, not {tuple(own.shape)}")
            own.copy_(updates.as_tensor(value))

    def difference(self) -> ArrayRecord:
        return updates.pack(self._differences())

    def _differences(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        for name in list(self.weights):
            start = updates.as_tensor(self.weights[name])
            yield name, self.own[name].cpu().sub(start).numpy()
            del start
            self.weights.release(name)


class _Encoded:
    """Fewer bits both ways; the weights received, and what an update leaves out, are on disk."""

    def __init__(
        self,
        model: Weights,
        weights: ArrayRecord,
        task: Mapping[str, Any],
        kind: Encoding,
        client: ClientState,
    ) -> None:
        self.own, self.kind, self.client = model.state_dict(), kind, client
        self.number, self.folded = int(task["round"]), int(task["folded_round"])
        self._receive(weights, int(task["base_round"]), str(task["encoding"]))
        self.start = client.load("weights", self.number)
        self._untouched = True

    def _receive(self, weights: ArrayRecord, base: int, how: str) -> None:
        if how not in encoding.ENCODINGS:
            raise protocol.ProtocolError(f"the weights come in an unknown encoding, '{how}'")
        shapes = {name: tuple(value.shape) for name, value in self.own.items()}
        received = Decoded(weights, shapes, how)
        before = self.client.load("weights", base) if base >= 0 else {}
        if base < 0 and set(received) != set(shapes):
            wrong = sorted(set(shapes) ^ set(received))
            raise protocol.ProtocolError(f"the weights do not fit the model: {wrong[0]} and others")
        if base >= 0 and set(before) != set(shapes):
            raise StateLost("the weights of the round before are those of another model")
        for name, own in self.own.items():
            if base >= 0:
                own.copy_(before[name])
            if name in received:
                value = updates.as_tensor(np.ascontiguousarray(received[name]))
                own.copy_(own.cpu().add_(value) if base >= 0 else value)
                del value
                received.release(name)
        self.client.save("weights", self.number, self.own)

    def load(self) -> None:
        if self._untouched:  # what was received is still in the model
            self._untouched = False
            return
        for name, own in self.own.items():
            own.copy_(self.start[name])

    def difference(self) -> ArrayRecord:
        left: Mapping[str, Tensor] = {}
        if self.folded >= 0:
            try:
                left = self.client.load("residual", self.folded)
            except StateLost:
                left = {}  # a client that was set up anew: some of one update is lost
        sent: list[str] = []
        result = updates.pack(self._encoded(left, sent))
        self.client.save("residual", self.number, _Halved(self.own, tuple(sent)), self.folded)
        return result

    def _encoded(
        self, left: Mapping[str, Tensor], sent: list[str]
    ) -> Iterator[tuple[str, encoding.Bytes]]:
        """The update's tensors, encoded; what that leaves out stays in the model's place."""
        for name, own in self.own.items():
            # What is left out replaces the weights, which nobody needs any more.
            own.sub_(self.start[name].to(own.device))
            if name in left:
                own.add_(left[name].to(own.device))
            array = own.cpu().numpy()
            if not array.any():
                continue
            data = encoding.encode(array, self.kind)
            sent.append(name)
            yield name, data
            own.sub_(
                torch.from_numpy(
                    np.ascontiguousarray(encoding.decode(data, array.shape, self.kind))
                ).to(own.device)
            )


class _Halved(Mapping[str, Tensor]):
    """Some of the tensors, each in bf16 when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
