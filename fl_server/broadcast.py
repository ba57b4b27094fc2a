"""Encodes what is sent to the clients: the global weights, or their change since the last round.

Clients train from the decoded weights, which the server keeps beside the exact ones. If the whole
cohort holds the weights of the round before, only the difference to those is sent, so the next
round makes up for its encoding error. Otherwise all get the whole weights, in 8 bits (16 with
`bf16`).
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_client import encoding, updates
from fl_client.protocol import Encoding

WHOLE: Mapping[Encoding, Encoding] = {
    "fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8", "topk": "int8",
}  # fmt: skip
"""Encoding of whole weights, by the run's encoding."""
PREFIX = "broadcast/"
"""Of the names of these tensors in a checkpoint."""


class Broadcast:
    """The weights as clients decode them, and which clients hold them."""

    def __init__(self, kind: Encoding) -> None:
        """Start with clients that hold nothing."""
        self.kind = kind
        self.sent: dict[str, Tensor] = {}
        self.held: dict[int, int] = {}
        """Round whose weights a client holds, by the client's key."""

    def pack(
        self, weights: Mapping[str, Tensor], number: int, cohort: Iterable[int]
    ) -> tuple[ArrayRecord, int]:
        """Encode a round's weights.

        Args:
            weights: global weights by parameter name, fp32, each `[...]`.
            number: round, from 0.
            cohort: keys of the clients that get them.

        Returns:
            The arrays, and the round to whose weights they are added; -1 for whole weights.
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
        """Tensors for a checkpoint, by name, each `[...]`."""
        return {PREFIX + name: value for name, value in self.sent.items()}

    def load(self, tensors: Mapping[str, Tensor], held: Mapping[str, int]) -> None:
        """Restore `state`'s tensors, each `[...]`, from a checkpoint, and `held`."""
        self.sent = {
            name.removeprefix(PREFIX): value
            for name, value in tensors.items()
            if name.startswith(PREFIX)
        }
        self.held = {int(key): number for key, number in held.items()}
