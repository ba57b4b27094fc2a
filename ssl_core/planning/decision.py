"""Chooses the plan of an update: the fastest exact plan whose estimated peak fits in memory."""

import dataclasses
from functools import cached_property
from typing import Literal, NamedTuple

from common.errors import UsageError
from common.units import format_bytes, format_length
from ssl_core.planning.estimate import RUNTIME, estimate
from ssl_core.planning.ladder import ladder
from ssl_core.planning.parts import Estimate
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Rung, Work

PlanName = Literal["default", "fastest", "leanest"]


class Option(NamedTuple):
    """A plan, its estimated memory, and its time relative to the fastest plan's."""

    plan: Plan
    estimate: Estimate
    slowdown: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """The choice of a plan for an update within available memory; estimates are made lazily."""

    work: Work
    plan: Plan
    """Length, batch, accumulation, precision and device; the rest is decided."""
    available: int
    """Bytes for the whole process."""
    runtime: int = RUNTIME
    """Bytes resident before the model is built."""
    messages: int = 0
    """Bytes of Flower's messages that are held while training."""

    @cached_property
    def rungs(self) -> list[Rung]:
        """All exact plans, the fastest first."""
        return ladder(self.plan, self.work)

    def option(self, rung: Rung) -> Option:
        """Estimate the memory of a rung."""
        found = estimate(self.work, rung.plan, self.runtime, self.messages)
        return Option(rung.plan, found, rung.slowdown)

    def _fits(self, option: Option) -> bool:
        return option.estimate.total <= self.available

    @cached_property
    def fastest(self) -> Option:
        """The fastest plan, the first rung."""
        return self.option(self.rungs[0])

    @cached_property
    def leanest(self) -> Option:
        """The plan that needs the least memory: one of the last two rungs."""
        rungs = [self.option(rung) for rung in self.rungs[-2:]]
        return min(rungs, key=lambda option: option.estimate.total)

    @cached_property
    def _search(self) -> tuple[Option | None, Option | None]:
        """The chosen option and the next faster one."""
        if self._fits(self.fastest):
            return self.fastest, None
        if not self._fits(self.leanest):
            return None, None
        faster = self.fastest
        for rung in self.rungs[1:]:
            option = self.option(rung)
            if self._fits(option):
                return option, faster
            faster = option
        return self.leanest, faster

    @property
    def chosen(self) -> Option | None:
        """The fastest option that fits; None if nothing does."""
        return self._search[0]

    @property
    def runner_up(self) -> Option | None:
        """The next faster option, which does not fit; None if the fastest fits or nothing does."""
        return self._search[1]

    def require(self) -> Option:
        """Return the chosen option.

        Raises:
            UsageError: nothing fits; the message says by how much, and what to do.
        """
        if self.chosen is not None:
            return self.chosen
        least = self.leanest.estimate.total
        raise UsageError(
            f"{self.plan.batch} {self.work.unit} of {format_length(self.plan.length)}: nothing "
            f"fits: the leanest exact plan takes {format_bytes(least)}, "
            f"{format_bytes(least - self.available)} more than the {format_bytes(self.available)} "
            f"there are. Shorter {self.work.unit}, a smaller model, or optimizer state in 8 bits "
            "(--plan.optimizer-state int8, not exact) take less."
        )


def as_planned(name: PlanName, work: Work, plan: Plan) -> Plan:
    """Return a plan unchanged, or the fastest or leanest of the planner's ladder for it.

    Args:
        name: which plan.
        work: what is trained.
        plan: length, batch, precision and threads.
    """
    if name == "default":
        return plan
    decision = Decision(work, plan, available=0)
    return decision.fastest.plan if name == "fastest" else decision.leanest.plan
