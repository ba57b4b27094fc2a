"""Decodes a message's weights into the model, and encodes the trained model's update."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_client import encoding, protocol, updates
from fl_client.client_state import ClientState, StateLost
from fl_client.encoding import Decoded
from fl_client.protocol import Encoding


class Weights(Protocol):
    """A model or its shared part."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, each `[...]`; they share the model's memory."""


class Exchange(Protocol):
    """One round's exchange of a client with the server."""

    def load(self) -> None:
        """Set the model to the weights that the round starts from."""

    def difference(self) -> ArrayRecord:
        """The update: trained minus received weights. Ends the exchange."""


def exchange_of(
    model: Weights,
    weights: ArrayRecord,
    instructions: Mapping[str, Any],
    client: ClientState,
    kind: Encoding,
) -> Exchange:
    """The exchange of a round.

    Args:
        model: receives the weights; the update is computed from it.
        weights: the message's weights, emptied as they are used.
        instructions: see `protocol.instructions`.
        client: the client's state on disk.
        kind: encoding of the run.

    Raises:
        ProtocolError: the weights do not fit the model.
        StateLost: the weights are a difference to weights that this client no longer has.
    """
    if kind == "fp32":
        return _Plain(model, weights)
    return _Encoded(model, weights, instructions, kind, client)


class _Plain:
    """fp32 in both directions; keeps nothing on disk."""

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
    """Fewer bits in both directions; keeps the received weights and the residual on disk."""

    def __init__(
        self,
        model: Weights,
        weights: ArrayRecord,
        instructions: Mapping[str, Any],
        kind: Encoding,
        client: ClientState,
    ) -> None:
        self.own, self.kind, self.client = model.state_dict(), kind, client
        self.number = int(instructions["round"])
        self.folded = int(instructions["folded_round"])
        self._receive(weights, int(instructions["base_round"]), str(instructions["encoding"]))
        self.start = client.load("weights", self.number)
        self._untouched = True

    def _receive(self, weights: ArrayRecord, base: int, how: str) -> None:
        if how not in protocol.ENCODINGS:
            raise protocol.ProtocolError(f"unknown encoding of the weights: '{how}'")
        shapes = {name: tuple(value.shape) for name, value in self.own.items()}
        received = Decoded(weights, shapes, how)
        before = self.client.load("weights", base) if base >= 0 else {}
        if base < 0 and set(received) != set(shapes):
            wrong = sorted(set(shapes) ^ set(received))
            raise protocol.ProtocolError(f"the weights do not fit the model: {wrong[0]} and others")
        if base >= 0 and set(before) != set(shapes):
            raise StateLost("the stored weights of the round before belong to another model")
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
        if self._untouched:  # the model still has the received weights
            self._untouched = False
            return
        for name, own in self.own.items():
            own.copy_(self.start[name])

    def difference(self) -> ArrayRecord:
        residual: Mapping[str, Tensor] = {}
        if self.folded >= 0:
            with contextlib.suppress(StateLost):  # a client that was set up anew has none
                residual = self.client.load("residual", self.folded)
        sent: list[str] = []
        result = updates.pack(self._encoded(residual, sent))
        self.client.save("residual", self.number, _InBf16(self.own, tuple(sent)), self.folded)
        return result

    def _encoded(
        self, residual: Mapping[str, Tensor], sent: list[str]
    ) -> Iterator[tuple[str, encoding.Bytes]]:
        """Encode the update's tensors, append their names to `sent`, leave the new residual."""
        for name, own in self.own.items():
            # The residual replaces the weights, which are no longer needed.
            own.sub_(self.start[name].to(own.device))
            if name in residual:
                own.add_(residual[name].to(own.device))
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


class _InBf16(Mapping[str, Tensor]):
    """The named tensors, each converted to bf16 on access."""

    def __init__(self, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
