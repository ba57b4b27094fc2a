"""What goes down to the clients: the global weights, or what has changed of them, encoded.

Clients train from what they can decode, which the server keeps beside the true weights. When all of
a cohort hold the weights of the round before, only the difference is sent; what its encoding leaves
out is still in the next one. Otherwise all get the whole weights, in 8 bits (16 with `bf16`).
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_client import encoding, updates
from fl_client.encoding import Encoding

WHOLE: Mapping[Encoding, Encoding] = {
    "fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8", "topk": "int8",
}  # fmt: skip
"""How whole weights travel, by encoding."""
PREFIX = "broadcast/"


class Broadcast:
    """The weights as clients have them, and which clients have them."""

    def __init__(self, kind: Encoding) -> None:
        """Begin with clients that have nothing."""
        self.kind = kind
        self.sent: dict[str, Tensor] = {}
        self.held: dict[int, int] = {}
        """Round whose weights a client holds, by key."""

    def pack(
        self, weights: Mapping[str, Tensor], number: int, cohort: Iterable[int]
    ) -> tuple[ArrayRecord, int]:
        """A round's message.

        Args:
            weights: global weights.
            number: of the round.
            cohort: keys of the clients that get it.

        Returns:
            The arrays, and the round whose weights they are to be added to; -1: they are whole.
        """
        if self.kind == "fp32":
            return updates.pack((name, value.numpy()) for name, value in weights.items()), -1
        base = number - 1
        if not self.sent or any(self.held.get(key) != base for key in cohort):
            base = -1
        how = self.kind if base >= 0 else WHOLE[self.kind]
        packed = []
        for name, value in weights.items():
            target = value.numpy()
            if base >= 0:
                target = target - self.sent[name].numpy()
                if not target.any():
                    continue
            data = encoding.encode(target, how)
            packed.append((name, data))
            known = torch.from_numpy(np.ascontiguousarray(encoding.decode(data, target.shape, how)))
            self.sent[name] = self.sent[name].add_(known) if base >= 0 else known.clone()
        return updates.pack(packed), base

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, by name."""
        return {PREFIX + name: value for name, value in self.sent.items()}

    def load(self, tensors: Mapping[str, Tensor], held: Mapping[str, int]) -> None:
        """Bring back what `state` and `held` were."""
        self.sent = {
            name.removeprefix(PREFIX): value
            for name, value in tensors.items()
            if name.startswith(PREFIX)
        }
        self.held = {int(key): number for key, number in held.items()}
