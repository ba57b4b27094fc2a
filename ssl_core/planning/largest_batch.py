"""Finds the largest batch that a GPU's memory holds at once."""

import dataclasses

from ssl_core.planning.advice import Request, choose_precision_for
from ssl_core.planning.decision import Decision
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.parts import Estimate
from ssl_core.planning.step_plan import Plan

UPDATE_SECONDS = 1.6 * 3600
"""Seconds of audio in an update of the paper's base model (wav2vec 2.0, section 4.2). A batch need
not be larger than an update."""
STEP = 8
"""Batches are multiples of this."""
_FIRST = 8


def largest_batch(profile: DeviceProfile, request: Request) -> int:
    """Find the largest batch whose fastest plan fits on a discrete GPU.

    Memory grows almost evenly with the batch, so a few traces of small batches and one of the
    batch itself find it.

    Returns:
        Crops of the request's first length; 0 if not even the smallest batch fits.
    """
    length = request.lengths[0]
    plan = Plan(
        length=length,
        precision=choose_precision_for(profile, request.precision),
        optimizer_state="fp32" if request.optimizer_state == "auto" else request.optimizer_state,
        device=profile.accelerator,
    )
    plan, _ = profile.with_kernels(plan)

    def estimated(batch: int) -> Estimate:
        whole = dataclasses.replace(plan, batch=batch)
        decision = Decision(request.work, whole, profile.process_bytes, profile.clientapp)
        return decision.fastest.estimate

    small = estimated(_FIRST)
    slope = small.growing / _FIRST
    most = max(STEP, int(UPDATE_SECONDS / length) // STEP * STEP)
    fits, misses = 0, most + STEP
    while fits + STEP < misses:
        left = profile.process_bytes - small.total
        batch = _FIRST + int(left / slope) if slope else most
        batch = min(max(batch // STEP * STEP, fits + STEP), misses - STEP)
        total = estimated(batch).total
        if batch > _FIRST:
            slope = (total - small.total) / (batch - _FIRST)
        if total > profile.process_bytes:
            misses = batch
        else:
            fits = batch
            if total + slope * STEP > profile.process_bytes:  # the next batch would not fit
                break
    return fits
