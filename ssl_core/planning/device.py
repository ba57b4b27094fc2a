"""Device profiles: the memory of a device, and how much of it is left for training."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from common.errors import UsageError
from common.units import Size, format_bytes
from ssl_core.planning.kernel_choice import OLDEST, choose, resolved
from ssl_core.planning.step_plan import Plan, Precision

AUTO = "auto"
"""Name of the profile of this machine."""

_SIZES = ("memory", "system", "supernode", "clientapp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A device; sizes in bytes. Exactly one of `system` and `tensor_fraction` is set."""

    name: str
    description: str
    accelerator: Literal["cpu", "cuda"]
    """Where a step runs."""
    shared: bool = False
    """Whether CPU and GPU share one memory (Jetson)."""
    memory: Size
    """Total memory that the system reports; for a discrete GPU, its own memory."""
    system: Size | None = None
    """Memory of the system and other programs."""
    tensor_fraction: float | None = None
    """If memory is shared: the fraction of it available to the step's tensors."""
    supernode: Size
    """Memory of the Flower SuperNode."""
    clientapp: Size
    """Memory of the training process before the model is built."""
    cores: int
    """CPU cores."""
    precisions: tuple[Precision, ...]
    """Precisions in which the device computes matrix products natively."""
    capability: float | None = None
    """Compute capability of a GPU, such as 8.6; None if unknown."""
    triton: bool = True
    """Whether Triton, in which fused kernels are written, can be installed."""
    timed_as: str = ""
    """Device of the paper's Table 2 from which step times are estimated; empty for none."""
    times_faster: float = 1.0
    """Speed relative to the device `timed_as`."""
    software: str = ""
    """Limits of software: which system and torch reach the GPU; empty for none."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Source of each figure, by field."""

    @property
    def discrete(self) -> bool:
        """Whether it is a GPU with its own memory."""
        return self.accelerator == "cuda" and not self.shared

    def with_kernels(self, plan: Plan) -> tuple[Plan, str]:
        """The plan with kernels that run on this device, and why these.

        Raises:
            UsageError: fused kernels are asked for where they cannot run.
        """
        if not plan.on_gpu:
            return plan, ""
        known = self.capability
        if known is None and "bf16" not in self.precisions:
            known = OLDEST - 1  # both came with Ampere
        choice = choose(plan, known, self.triton)
        return resolved(plan, choice), choice.reason

    @property
    def training_bytes(self) -> int:
        """Bytes left for the training process above its imports and CUDA context."""
        if self.tensor_fraction is not None:
            return int(self.tensor_fraction * self.memory)
        return self.memory - (self.system or 0) - self.supernode - self.clientapp

    @property
    def process_bytes(self) -> int:
        """Bytes the training process may use in total."""
        return self.training_bytes + self.clientapp

    @property
    def system_bytes(self) -> int:
        """Bytes of the system and other programs, also if `tensor_fraction` is set instead."""
        return self.memory - self.process_bytes - self.supernode

    def validate(self) -> None:
        """Check that the figures are consistent.

        Raises:
            UsageError: a figure is missing, negative, or larger than the memory.
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
        if self.capability is not None and (self.accelerator == "cpu" or self.capability <= 0):
            raise UsageError(f"{where}: capability is that of a GPU, such as 8.6")
        if not 0 < self.times_faster < math.inf:
            raise UsageError(f"{where}: times_faster must be above zero, not {self.times_faster}")
        if self.training_bytes <= 0 or self.system_bytes < 0:
            taken = (self.system or 0) + self.supernode + self.clientapp
            raise UsageError(
                f"{where}: of {format_bytes(self.memory)} nothing is left for training after "
                f"{format_bytes(taken)} for the system, the SuperNode and the ClientApp"
            )
