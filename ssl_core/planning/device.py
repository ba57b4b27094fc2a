"""A device: what memory it has, and what of it is left for training."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from common.errors import UsageError
from common.units import Size, format_bytes
from ssl_core.planning.step_plan import Precision

AUTO = "auto"
"""Name of this machine."""

_SIZES = ("memory", "system", "supernode", "clientapp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A device; sizes in bytes. Exactly one of `system` and `tensor_fraction` is given."""

    name: str
    description: str
    accelerator: Literal["cpu", "cuda"]
    """Where a step is computed."""
    shared: bool = False
    """Whether the GPU's memory is the CPU's (Jetson)."""
    memory: Size
    """What the system reports in all; of a GPU with memory of its own, that memory."""
    system: Size | None = None
    """What the system and other programs take."""
    tensor_fraction: float | None = None
    """Where memory is shared: the fraction of it that the step's tensors get."""
    supernode: Size
    """What the Flower SuperNode takes."""
    clientapp: Size
    """What the process that trains takes before there is a model."""
    cores: int
    """CPU cores."""
    precisions: tuple[Precision, ...]
    """Precisions whose products the device computes itself."""
    timed_as: str = ""
    """Device of the paper's Table 2 whose seconds a step say how fast this one is; empty: none."""
    times_faster: float = 1.0
    """How many times as fast as that one."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where each figure is from, by field."""

    @property
    def training_bytes(self) -> int:
        """What is left for the process that trains, above its imports and CUDA context."""
        if self.tensor_fraction is not None:
            return int(self.tensor_fraction * self.memory)
        return self.memory - (self.system or 0) - self.supernode - self.clientapp

    @property
    def process_bytes(self) -> int:
        """What the process that trains may take in all."""
        return self.training_bytes + self.clientapp

    @property
    def system_bytes(self) -> int:
        """What the system and other programs take, also where `tensor_fraction` says it."""
        return self.memory - self.process_bytes - self.supernode

    def validate(self) -> None:
        """Check that the figures fit together.

        Raises:
            UsageError: a figure that is missing, negative, or more than there is.
        """
        where = f"device '{self.name}'"
        for name in _SIZES:
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{where}: {name} must not be below zero")
        if self.memory == 0 or self.cores < 1:
            raise UsageError(f"{where}: memory and cores must be above zero")
        if (self.system is None) == (self.tensor_fraction is None):
            raise UsageError(f"{where}: give one of system and tensor_fraction")
        if self.tensor_fraction is not None and not (self.shared and 0 < self.tensor_fraction < 1):
            raise UsageError(
                f"{where}: tensor_fraction, of a memory that a GPU shares (shared: true), must be "
                f"between 0 and 1, not {self.tensor_fraction}"
            )
        if self.shared and self.accelerator == "cpu":
            raise UsageError(f"{where}: shared is for a GPU; leave it out for accelerator cpu")
        if "fp32" not in self.precisions:
            raise UsageError(f"{where}: precisions must contain fp32, the precision of weights")
        if not 0 < self.times_faster < math.inf:
            raise UsageError(f"{where}: times_faster must be above zero, not {self.times_faster}")
        if self.training_bytes <= 0 or self.system_bytes < 0:
            taken = (self.system or 0) + self.supernode + self.clientapp
            raise UsageError(
                f"{where}: of {format_bytes(self.memory)} nothing is left for training after "
                f"{format_bytes(taken)} for the system, the SuperNode and the ClientApp"
            )
