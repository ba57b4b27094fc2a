"""Settings that say on what hardware a step is taken, and how."""

import dataclasses
from typing import Literal

from common.errors import UsageError
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.training.torch_device import choose_device, choose_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """What pretraining and fine-tuning, central and federated, have in common."""

    micro_batch: int = 0
    """Crops or clips in memory at a time; 0 is the whole batch. Does not change the result."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """`bf16`, `fp16`: matrix products in 16 bits (not exact); `auto`: bf16 where the device is
    made for it."""
    device: str = "auto"
    """Torch device; `auto` is CUDA where there is one, else the CPU."""
    threads: int = 0
    """CPU threads; 0 is torch's choice."""
    seed: int = 0
    """Seeds everything: weights, splits, cohorts, order, crops, masks, dropout."""
    plan: StepOptions = StepOptions()
    """How a step trades time for memory."""

    def plan_for(self, *, length: float, batch: int, accumulation: int = 1) -> Plan:
        """How this machine takes a step.

        Args:
            length: seconds in a crop or clip.
            batch: crops or clips over which one loss is taken.
            accumulation: batches in an update.

        Raises:
            UsageError: no such torch device here.
        """
        device = choose_device(self.device)
        return Plan(
            length=length,
            batch=batch,
            micro_batch=self.micro_batch,
            accumulation=accumulation,
            precision=choose_precision(self.precision, device),
            device=device,
            threads=self.threads,
            **vars(self.plan),
        )

    def require_at_least(self, least: int, *names: str) -> None:
        """Check whole numbers; raises `UsageError` for one below `least`."""
        for name in names:
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}"
                )
