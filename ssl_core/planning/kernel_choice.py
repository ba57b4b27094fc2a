"""Chooses the kernels of a plan for a GPU, by what the GPU and the machine can do."""

import dataclasses
from typing import NamedTuple

from common.errors import UsageError
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2 import device_kernels
from ssl_core.wav2vec2.device_kernels import Kernels

OLDEST = float("{}.{}".format(*device_kernels.ARCHITECTURE))
"""Oldest compute capability for which there are fused kernels."""


class Choice(NamedTuple):
    """Kernels and why they are chosen."""

    kernels: Kernels
    reason: str


def choose(plan: Plan, capability: float | None, triton: bool = True) -> Choice:
    """Choose the kernels of a plan for a GPU.

    Args:
        plan: how a step is taken.
        capability: compute capability of the GPU, such as 8.6; None if unknown: it is assumed to
            suffice.
        triton: whether Triton is, or can be, installed beside the GPU.

    Raises:
        UsageError: fused kernels are asked for where they cannot run.
    """
    lacks = ""
    if capability is not None and capability < OLDEST:
        lacks = f"compute capability {capability:g} is below {OLDEST:g}"
    elif not triton:
        lacks = "there is no Triton"
    if plan.kernels == "fused" and lacks:
        raise UsageError(f"kernels fused cannot run here: {lacks}; set plan.kernels to auto")
    if plan.kernels != "auto":
        return Choice(plan.kernels, "as asked for")
    if plan.compile:
        return Choice("plain", "torch.compile makes its own")
    if lacks:
        return Choice("plain", lacks)
    if capability is None:
        return Choice("fused", f"a GPU of compute capability {OLDEST:g} or more is assumed")
    return Choice("fused", f"compute capability {capability:g}")


def choose_here(plan: Plan) -> Choice:
    """Choose the kernels of a plan for this machine's GPU; see `choose`."""
    capability = device_kernels.capability(plan.device)
    return choose(plan, capability, capability is None or device_kernels.has_triton())


def resolved(plan: Plan, choice: Choice) -> Plan:
    """The plan with its kernels chosen."""
    return dataclasses.replace(plan, kernels=choice.kernels)
