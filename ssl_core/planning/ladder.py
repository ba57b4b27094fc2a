"""Choosing how a step is taken: the fastest exact plan whose estimated peak fits."""

import dataclasses
from typing import NamedTuple

from common.errors import UsageError
from common.units import format_bytes
from ssl_core.downstream.task_work import TaskWork, Work
from ssl_core.planning.estimate import RUNTIME, estimate
from ssl_core.planning.parts import Estimate
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import ModelConfig

RECOMPUTED_ATTENTION, SPLIT, RECOMPUTED_LAYERS, GIVEN_BACK = 1.02, 1.09, 1.17, 1.28
"""Time of a step against the fastest, when attention weights are made again, the extractor runs
twice, transformer layers run again, freed memory goes back to the kernel (CPU only). The first
three follow from operations, the last was measured on two cores; `benchmarks/README.md`."""


class Option(NamedTuple):
    """A plan, what it takes, and its time against the fastest plan's."""

    plan: Plan
    estimate: Estimate
    slowdown: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was chosen for a device, and why."""

    available: int
    """Bytes for the whole process."""
    chosen: Option | None
    """The fastest that fits; None when nothing does."""
    faster: Option | None
    """The next faster one, which does not fit; None when the fastest does."""
    leanest: Option
    unit: str = "crops"
    """What a batch is made of."""

    def explain(self) -> str:
        """A few lines for people."""
        room = format_bytes(self.available)
        if self.chosen is None:
            least = self.leanest.estimate.total
            return (
                f"nothing fits: the leanest exact plan takes {format_bytes(least)}, "
                f"{format_bytes(least - self.available)} more than the {room} there are. Shorter "
                f"{self.unit}, a smaller model, or moments in 8 bits (--set "
                "plan.optimizer-state=int8, not exact) take less."
            )
        need = format_bytes(self.chosen.estimate.total)
        lines = [f"{describe(self.chosen.plan, self.unit)}: {need} of {room}"]
        if self.faster is not None:
            gain = 100 * (1 - self.faster.slowdown / self.chosen.slowdown)
            lines.append(
                f"next best, {describe(self.faster.plan, self.unit)}, would be {gain:.0f} % faster "
                f"and takes {format_bytes(self.faster.estimate.total)}"
            )
        return "\n".join(lines)


def describe(plan: Plan, unit: str = "crops") -> str:
    """What a plan does, in words; `unit` is what a batch is made of."""
    split = plan.chunk < plan.batch
    parts = [f"{plan.chunk} of {plan.batch} {unit} at a time" if split else f"{plan.batch} at once"]
    if plan.recompute_features:
        parts.append("convolutions recomputed")
    if plan.recompute_layers:
        parts.append("layers recomputed")
    if plan.keep_attention:
        parts.append("attention kept")
    if plan.apply_in_backward:
        parts.append("gradients applied as they are made")
    if not plan.keep_freed_memory:
        parts.append("freed memory given back")
    return ", ".join(parts)


def unit_of(work: Work) -> str:
    """What a batch is made of: crops, or a task's clips."""
    return "clips" if isinstance(work, TaskWork) else "crops"


def ladder(plan: Plan, work: Work) -> list[tuple[float, Plan]]:
    """Exact plans for the same update, from the fastest to the leanest, with their slowdown."""
    clips = work.recipe.clip_norm if isinstance(work, TaskWork) else work.clip_norm
    whole = dataclasses.replace(
        plan,
        micro_batch=0,
        recompute_features=False,
        recompute_layers=False,
        keep_attention=False,
        apply_in_backward=plan.accumulation == 1 and not clips,
        keep_freed_memory=True,
    )
    if isinstance(work, TaskWork):
        return _task_ladder(whole, work)
    rungs = [(1.0, dataclasses.replace(whole, keep_attention=True)), (RECOMPUTED_ATTENTION, whole)]
    again = dataclasses.replace(whole, recompute_features=True)
    small = [(RECOMPUTED_ATTENTION * SPLIT, again)]
    if work.negative_pool == "utterance":
        small += [(RECOMPUTED_ATTENTION * SPLIT, split) for split in _splits(whole)]
    # Whole, a batch needs no room for gradients; split, less for activations.
    rungs += small
    rungs += [
        (slowdown * RECOMPUTED_LAYERS, dataclasses.replace(rung, recompute_layers=True))
        for slowdown, rung in (small[0], small[-1])[: len(small)]
    ]
    return rungs + _given_back(rungs[-min(2, len(small)) :])


def _task_ladder(whole: Plan, work: TaskWork) -> list[tuple[float, Plan]]:
    """Clips are independent of each other: a batch in micro-batches computes nothing twice."""
    if not work.unfrozen:
        rungs = [(1.0, rung) for rung in (whole, *_splits(whole))]
        return rungs + _given_back(rungs[-1:])
    rungs = [(1.0, dataclasses.replace(whole, keep_attention=True))]
    rungs += [(RECOMPUTED_ATTENTION, rung) for rung in (whole, *_splits(whole))]
    small = rungs[-1:]
    if work.trains_extractor:
        small = [
            (slowdown * SPLIT, dataclasses.replace(rung, recompute_features=True))
            for slowdown, rung in small
        ]
        rungs += small
    small = [
        (slowdown * RECOMPUTED_LAYERS, dataclasses.replace(rung, recompute_layers=True))
        for slowdown, rung in small
    ]
    rungs += small
    return rungs + _given_back(rungs[-2:])


def _splits(whole: Plan) -> list[Plan]:
    """The same update in smaller and smaller micro-batches."""
    found, size = [], whole.batch
    while size > 1:
        size = -(-size // 2)
        found.append(dataclasses.replace(whole, micro_batch=size, apply_in_backward=False))
    return found


def _given_back(rungs: list[tuple[float, Plan]]) -> list[tuple[float, Plan]]:
    """The same plans without memory that is kept for the next tensors."""
    return [
        (
            slowdown * (1.0 if rung.device.startswith("cuda") else GIVEN_BACK),
            dataclasses.replace(rung, keep_freed_memory=False),
        )
        for slowdown, rung in rungs
    ]


def choose(
    config: ModelConfig,
    work: Work,
    plan: Plan,
    available: int,
    runtime: int = RUNTIME,
    messages: int = 0,
) -> Decision:
    """The fastest exact plan for an update that fits.

    Args:
        config: architecture.
        work: what the model is trained for, a recipe of pretraining or a task.
        plan: length, batch, accumulation, precision and device; how the step is taken is chosen.
        available: bytes for the whole process.
        runtime: bytes of it before the model is made.
        messages: bytes of it that Flower's messages take.
    """
    rungs, unit = ladder(plan, work), unit_of(work)

    def option(rung: tuple[float, Plan]) -> Option:
        return Option(rung[1], estimate(config, work, rung[1], runtime, messages), rung[0])

    least = option((rungs[-1][0], leanest(config, work, plan)))
    if least.estimate.total > available:
        return Decision(available, None, None, least, unit)
    faster = None
    for rung in rungs:
        candidate = option(rung)
        if candidate.estimate.total <= available:
            return Decision(available, candidate, faster, least, unit)
        faster = candidate
    return Decision(available, least, faster, least, unit)


def fastest(plan: Plan, work: Work) -> Plan:
    """The same update, exactly, in the least time."""
    return ladder(plan, work)[0][1]


def leanest(config: ModelConfig, work: Work, plan: Plan) -> Plan:
    """The same update, exactly, in the least memory."""
    rungs = [rung for _, rung in ladder(plan, work)[-2:]]
    return min(rungs, key=lambda rung: estimate(config, work, rung).total)


def fallbacks(plan: Plan, work: Work) -> list[Plan]:
    """Leaner exact plans for the same update, for when memory runs out; the leanest is last."""
    rungs = [rung for _, rung in ladder(plan, work)]
    # Of a plan that is not on the ladder no more is known than that the last two are lean.
    leaner = rungs[rungs.index(plan) + 1 :] if plan in rungs else rungs[-2:]
    return [rung for rung in leaner if rung != plan]


def fitting(
    config: ModelConfig, work: Work, plan: Plan, room: int, runtime: int, messages: int = 0
) -> Option:
    """What `choose` chooses, without the rest of the decision.

    Raises:
        UsageError: nothing fits; the message says by how much, and what would.
    """
    for slowdown, rung in ladder(plan, work):
        found = estimate(config, work, rung, runtime, messages)
        if found.total <= room:
            return Option(rung, found, slowdown)
    decision = choose(config, work, plan, room, runtime, messages)
    raise UsageError(f"{plan.batch} {unit_of(work)} of {plan.length:g}s: {decision.explain()}")
