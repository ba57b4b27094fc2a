"""Exact plans for the same update, from the fastest to the leanest."""

import dataclasses

from ssl_core.planning.kernel_choice import choose_here
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Rung, Work

RECOMPUTED_ATTENTION, SPLIT, RECOMPUTED_LAYERS, GIVEN_BACK = 1.02, 1.09, 1.17, 1.28
"""Slowdowns: attention weights recomputed, feature extractor recomputed, transformer layers
recomputed, freed memory returned to the kernel. The first three follow from operation
counts, the last was measured on two cores; `benchmarks/README.md`."""


GPU_FEATURES, GPU_SPLIT, GPU_LAYERS, GPU_LAUNCHES = 1.03, 1.21, 1.2, 2.0
"""Slowdowns on a GPU with fused kernels: feature extractor recomputed, batch in micro-batches,
transformer layers recomputed, no CUDA graph. Measured on an H200 with a prototype (the first, the
second and the last: 15 s x 12 or x 48), or from operation counts."""


def ladder(plan: Plan, work: Work) -> list[Rung]:
    """List the exact plans for the update of `plan`, the fastest first."""
    whole = dataclasses.replace(
        plan,
        micro_batch=0,
        recompute_features=False,
        recompute_layers=False,
        keep_attention=False,
        apply_in_backward=plan.accumulation == 1 and not work.clip_norm and not plan.on_gpu,
        keep_freed_memory=True,
    )
    return work.rungs(whole)


def gpu_rungs(whole: Plan, *, features: bool, layers: bool, split: bool, graph: bool) -> list[Rung]:
    """List the exact plans for an update on a GPU, from the fastest to the leanest.

    Its gradients stay until all are there, and its kernels never keep attention weights. A small
    whole batch can be leaner than its parts, whose gradients are summed in fp32: both ways end the
    list.

    Args:
        whole: plan of the update with nothing recomputed or split.
        features: whether the convolutions can be recomputed.
        layers: whether the transformer layers can be.
        split: whether the batch can be split.
        graph: whether updates are replayed from graphs.
    """
    again = dataclasses.replace(whole, recompute_features=True)
    rungs = [Rung(1.0, whole), *([Rung(GPU_FEATURES, again)] if features else [])]
    # A split batch of pretraining recomputes its features in any case.
    parts = [Rung(GPU_SPLIT, part) for part in splits(rungs[-1].plan) if split]
    ends = [rungs[-1], *parts[-1:]]
    rungs += parts
    if layers:
        ends = [
            Rung(slowdown * GPU_LAYERS, dataclasses.replace(plan, recompute_layers=True))
            for slowdown, plan in ends
        ]
        rungs += ends
    if graph and whole.graph:
        rungs += [
            Rung(slowdown * GPU_LAUNCHES, dataclasses.replace(plan, graph=False))
            for slowdown, plan in ends
        ]
    return rungs


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
    if plan.on_gpu:
        kernels = choose_here(plan).kernels if plan.kernels == "auto" else plan.kernels
        parts.append(f"{kernels} kernels")
        if not plan.graph:
            parts.append("no CUDA graph")
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
        Rung(slowdown * GIVEN_BACK, dataclasses.replace(plan, keep_freed_memory=False))
        for slowdown, plan in rungs
    ]
