"""Formats advice as text and as JSON."""

import dataclasses
from typing import Any

from common.units import format_bytes, format_seconds
from ssl_core.planning.advice import Advice, describe_size
from ssl_core.planning.decision import Option
from ssl_core.planning.ladder import describe
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work


def explain(advice: Advice) -> list[str]:
    """The advice as lines of text."""
    profile, decision, work = advice.profile, advice.decision, advice.request.work
    room = format_bytes(decision.available)
    lines = [f"skipped: {line}" for line in advice.tried]
    option = advice.chosen
    if option is None:
        lines.append(f"nothing fits {profile.name}, {room} for the training process")
        lines += [f"would fit: {line}" for line in advice.would_fit] or [
            "no smaller choice would fit either"
        ]
        return lines
    lines.append(f"{describe_size(option.plan)}: {describe(option.plan, work.unit)}")
    if option.plan.on_gpu:
        _, reason = profile.with_kernels(dataclasses.replace(option.plan, kernels="auto"))
        lines.append(f"{option.plan.kernels} kernels: {reason}; {_launching(option.plan, work)}")
    lines.append(f"peak {format_bytes(option.estimate.total)} of {room}")
    if option.plan.inexact:
        lines.append(f"not exact: {', '.join(option.plan.inexact)}")
    if advice.seconds is not None:
        lines.append(
            f"about {format_seconds(advice.seconds)} an update, estimated from the paper's Table 2"
        )
    faster = decision.runner_up
    if faster is not None:
        gain = 100 * (1 - faster.slowdown / option.slowdown)
        lines.append(
            f"runner-up: {describe(faster.plan, work.unit)}, {gain:.0f} % faster, needs "
            f"{format_bytes(faster.estimate.total)}"
        )
    else:
        lines.append("runner-up: none, this is the fastest plan")
    if decision.leanest.plan != option.plan:
        lines.append(
            f"leanest plan: {format_bytes(decision.leanest.estimate.total)} "
            f"({describe(decision.leanest.plan, work.unit)})"
        )
    lines.append(f"as options: {work.options(option.plan)}")
    return lines


def _launching(plan: Plan, work: Work) -> str:
    """How a GPU's kernels are launched, in words."""
    if not work.graphed:
        return f"launched one by one, since {work.unit} differ in length"
    if plan.graph:
        return "updates replayed from CUDA graphs"
    return "launched one by one, not replayed from CUDA graphs"


def advice_result(advice: Advice) -> dict[str, Any]:
    """The advice as JSON values; sizes in bytes."""
    decision, option = advice.decision, advice.chosen
    return {
        "device": advice.profile.name,
        "available": decision.available,
        "fits": option is not None,
        "chosen": _option(option),
        "seconds": advice.seconds,
        "inexact": list(option.plan.inexact) if option else [],
        "options": advice.request.work.options(option.plan) if option else "",
        "runner_up": _option(decision.runner_up),
        "leanest": _option(decision.leanest),
        "skipped": list(advice.tried),
        "would_fit": list(advice.would_fit),
    }


def _option(option: Option | None) -> dict[str, Any] | None:
    if option is None:
        return None
    return {
        "plan": dataclasses.asdict(option.plan),
        "bytes": option.estimate.total,
        "parts": option.estimate.parts,
        "slowdown": option.slowdown,
    }
