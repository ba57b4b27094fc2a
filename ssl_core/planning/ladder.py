"""Exact plans for the same update, from the fastest to the leanest."""

import dataclasses

from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Rung, Work

RECOMPUTED_ATTENTION, SPLIT, RECOMPUTED_LAYERS, GIVEN_BACK = 1.02, 1.09, 1.17, 1.28
"""Slowdowns: attention weights recomputed, feature extractor recomputed, transformer layers
recomputed, freed memory returned to the kernel (CPU only). The first three follow from operation
counts, the last was measured on two cores; `benchmarks/README.md`."""


def ladder(plan: Plan, work: Work) -> list[Rung]:
    """List the exact plans for the update of `plan`, the fastest first."""
    whole = dataclasses.replace(
        plan,
        micro_batch=0,
        recompute_features=False,
        recompute_layers=False,
        keep_attention=False,
        apply_in_backward=plan.accumulation == 1 and not work.clip_norm,
        keep_freed_memory=True,
    )
    return work.rungs(whole)


def fallbacks(plan: Plan, work: Work) -> list[Plan]:
    """List leaner exact plans to fall back on when memory runs out; the leanest is last."""
    rungs = [rung.plan for rung in ladder(plan, work)]
    # For a plan that is not on the ladder: one of the last two rungs is the leanest.
    leaner = rungs[rungs.index(plan) + 1 :] if plan in rungs else rungs[-2:]
    return [rung for rung in leaner if rung != plan]


def describe(plan: Plan, unit: str = "crops") -> str:
    """Describe a plan in words; `unit` is "crops" or "clips"."""
    size = plan.effective_micro_batch
    parts = [f"{size} of {plan.batch} {unit} at a time"]
    if not plan.is_split:
        parts = [f"{plan.batch} at once"]
    if plan.recompute_features:
        parts.append("convolutions recomputed")
    if plan.recompute_layers:
        parts.append("layers recomputed")
    if plan.keep_attention:
        parts.append("attention kept")
    if plan.apply_in_backward:
        parts.append("gradients applied in the backward pass")
    if not plan.keep_freed_memory:
        parts.append("freed memory returned to the kernel")
    return ", ".join(parts)


def splits(whole: Plan) -> list[Plan]:
    """List plans for the same update in ever smaller micro-batches."""
    found, size = [], whole.batch
    while size > 1:
        size = -(-size // 2)
        found.append(dataclasses.replace(whole, micro_batch=size, apply_in_backward=False))
    return found


def with_layers_recomputed(rungs: list[Rung]) -> list[Rung]:
    """Change plans so that the transformer layers are recomputed."""
    return [
        Rung(slowdown * RECOMPUTED_LAYERS, dataclasses.replace(plan, recompute_layers=True))
        for slowdown, plan in rungs
    ]


def with_memory_given_back(rungs: list[Rung]) -> list[Rung]:
    """Change plans so that freed memory is returned to the kernel."""
    return [
        Rung(
            slowdown * (1.0 if plan.device.startswith("cuda") else GIVEN_BACK),
            dataclasses.replace(plan, keep_freed_memory=False),
        )
        for slowdown, plan in rungs
    ]
