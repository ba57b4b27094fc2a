"""What a device has for a round, the plan that fits it, and the leaner ones to fall back to."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.errors import UsageError
from common.units import format_length
from ssl_core.planning.decision import Decision
from ssl_core.planning.device import AUTO
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import describe, fallbacks
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.planning.this_machine import this_machine
from ssl_core.planning.work import Work

RUNTIME = 640 * 2**20
"""Bytes resident in a ClientApp before its first round; 571 MiB were measured after the imports."""
log = logging.getLogger("shortwave.client")


class Budget(NamedTuple):
    """What a device has for a round; without any, the settings' own plan is taken."""

    memory: int = 0
    """Bytes for this process, for which the step is planned; 0 plans nothing."""
    length: float = 0.0
    """Seconds in a crop, at most the run's; 0 is the run's."""
    threads: int = 0
    """CPU threads; 0 is the run's."""
    plan: str = ""
    """JSON of plan settings, where the step was planned elsewhere (a simulated fleet)."""
    live: bool = False
    """Whether the memory is this machine's own, to be watched while training."""

    def change(self, plan: Plan) -> Plan:
        """A run's plan with the device's own length and threads, and what was planned elsewhere.

        Raises:
            UsageError: the device's length is longer than the run's.
        """
        if self.length:
            if self.length > plan.length:
                raise UsageError(
                    f"--length {format_length(self.length)} is longer than the run's "
                    f"{format_length(plan.length)}: sequences are cut to that"
                )
            plan = dataclasses.replace(plan, length=self.length)
        if self.threads:
            plan = dataclasses.replace(plan, threads=self.threads)
        return dataclasses.replace(plan, **json.loads(self.plan)) if self.plan else plan


NO_BUDGET = Budget()


def to_json(plan: Plan) -> str:
    """How a plan takes a step, for `Budget.plan`; what is compiled, and what a GPU
    takes, is left to the run.
    """
    left = {"compile", "graph", "kernels"}
    names = {field.name for field in dataclasses.fields(StepOptions)} - left
    return json.dumps({name: getattr(plan, name) for name in ("micro_batch", *sorted(names))})


def budget_of(node: Mapping[str, Any]) -> Budget:
    """The budget by Flower's node config: `memory`, `length`, `threads`; `auto` is read live.

    Raises:
        DataError: this machine's limits cannot be read.
    """
    memory, length = int(node.get("memory", 0)), float(node.get("length", 0.0))
    threads = int(node.get("threads", 0))
    if memory or node.get("device") != AUTO:
        return Budget(memory, length, threads, str(node.get("plan", "")))
    return Budget(this_machine().process_bytes, length, threads, live=True)


class RoundPlan:
    """The plan of a round, and the leaner ones it can fall back to."""

    def __init__(self, work: Work | None, plan: Plan, budget: Budget, messages: int) -> None:
        """Plan for the budget, if there is one.

        Args:
            work: what is trained; None for a model without a backbone, for which nothing is
                planned.
            plan: by the settings.
            budget: of the device.
            messages: bytes held beside the step.

        Raises:
            UsageError: nothing fits.
        """
        self.work, self.plan = work, plan
        self.live, self.messages, self.fallbacks, self.predicted = budget.live, messages, 0, 0
        self._leaner: list[Plan] = []
        if work is None:
            return
        if budget.memory:
            option = Decision(work, plan, budget.memory, RUNTIME, messages).require()
            self.plan, self.predicted = option.plan, option.estimate.total
        self._leaner = fallbacks(self.plan, work)

    def step_down(self, reason: str) -> bool:
        """Take the next leaner plan; False when there is none."""
        if not self._leaner:
            return False
        plan = self._leaner.pop(0)
        log.warning("%s with %s; going on with %s", reason, describe(self.plan), describe(plan))
        self.plan, self.fallbacks = plan, self.fallbacks + 1
        if self.predicted and self.work is not None:
            self.predicted = estimate(self.work, plan, RUNTIME, self.messages).total
        return True

    def watch(self) -> bool:
        """Step down until the plan fits what this machine has left now; whether it changed."""
        changed = False
        while self.live and self.predicted > this_machine().process_bytes:
            if not self.step_down("memory has shrunk"):
                break
            changed = True
        return changed
