"""Settings of hardware, precision and memory, common to all trainings."""

import dataclasses
from typing import Literal

from common.errors import UsageError
from ssl_core.planning.step_plan import Plan, Precision, StepOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Compute settings of pretraining and fine-tuning, central and federated."""

    micro_batch: int = 0
    """Crops or clips in memory at a time; 0 for the whole batch. Does not change the result."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; `tf32` (GPUs), `bf16` and `fp16` are not exact; `auto`: bf16 if
    the device multiplies faster in it, else fp32."""
    device: str = "auto"
    """Torch device; `auto` is CUDA if available, else the CPU."""
    threads: int = 0
    """CPU threads; 0 for all cores that the process may use."""
    seed: int = 0
    """Seed of everything random: weights, splits, cohorts, order, crops, masks, dropout."""
    plan: StepOptions = StepOptions()
    """How a step trades time for memory."""

    def plan_for(
        self, *, length: float, batch: int, accumulation: int = 1, to_check: bool = False
    ) -> Plan:
        """The plan of a step on this machine.

        Args:
            length: seconds in a crop or clip.
            batch: crops or clips in a batch.
            accumulation: batches in an update.
            to_check: the plan is not followed. Settings that suit every machine then leave torch
                alone, whose import takes a board seconds; the plan is one for the CPU in fp32.

        Raises:
            UsageError: no such torch device here, or not with this precision.
        """
        device: str = "cpu"
        precision: Precision = "fp32"
        suits_all = self.device in ("auto", "cpu") and self.precision in ("auto", "fp32")
        if not (to_check and suits_all):
            from ssl_core.training.torch_device import choose_device, choose_precision

            device = choose_device(self.device)
            precision = choose_precision(self.precision, device)
        return Plan(
            length=length,
            batch=batch,
            micro_batch=self.micro_batch,
            accumulation=accumulation,
            precision=precision,
            device=device,
            threads=self.threads,
            **vars(self.plan),
        )

    def require_at_least(self, least: int, *names: str) -> None:
        """Check that settings are at least `least`; raises `UsageError`."""
        for name in names:
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}"
                )
