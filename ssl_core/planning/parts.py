"""An estimate of memory, part by part."""

import dataclasses

from common.units import format_bytes

ALLOCATOR = 0.435
"""Overhead of allocators as a fraction of activations and temporary tensors: gaps, blocks kept for
reuse, workspaces of convolutions. Calibrated on Table 2, see `paper.table2`."""


CONTEXT = "CUDA context"
"""Part of a GPU's memory; on a board whose GPU shares it, of the whole process before training."""
COPIES = "copies in 16 bits"
WORKSPACES = "cuBLAS workspaces"
RESERVED = "CUDA allocator"
"""Part of reserved memory beyond what is allocated: gaps in segments."""
STAYING = (
    "imports",
    CONTEXT,
    "parameters",
    "optimizer state",
    COPIES,
    WORKSPACES,
    "message buffers",
)
"""Parts that do not depend on the batch."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the peak, by name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the whole process."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes that torch counts as allocated on a GPU: without the CUDA context and gaps."""
        others = (CONTEXT, RESERVED)
        return sum(size for name, size in self.parts.items() if name not in others)

    @property
    def growing(self) -> int:
        """Bytes of the parts that grow with the batch."""
        return sum(size for name, size in self.parts.items() if name not in STAYING)

    def describe(self) -> str:
        """One line for each part, the largest first."""
        order = sorted(self.parts.items(), key=lambda item: -item[1])
        return "\n".join(f"{format_bytes(size):>10}  {name}" for name, size in order)
