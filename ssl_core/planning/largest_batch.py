"""Finds the largest batch that a GPU's memory holds at once."""

import dataclasses

from ssl_core.planning.advice import Request, choose_precision_for
from ssl_core.planning.decision import Decision
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.step_plan import Plan

UPDATE_SECONDS = 1.6 * 3600
"""Seconds of audio in an update of the paper's base model (wav2vec 2.0, section 4.2). A batch need
not be larger than an update."""
STEP = 4
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

    def over(batch: int) -> int:
        whole = dataclasses.replace(plan, batch=batch)
        decision = Decision(request.work, whole, profile.process_bytes, profile.clientapp)
        return decision.fastest.estimate.total - decision.available

    most = max(STEP, int(UPDATE_SECONDS / length) // STEP * STEP)
    fits, misses = (0, 0), (most + STEP, 0)
    before, last = (STEP, over(STEP)), (_FIRST, over(_FIRST))
    if before[1] > 0:
        return 0
    while fits[0] + STEP < misses[0]:
        slope = (last[1] - before[1]) / (last[0] - before[0])
        wanted = last[0] - last[1] / slope if slope > 0 else most
        batch = int(wanted) // STEP * STEP
        batch = min(max(batch, fits[0] + STEP), misses[0] - STEP)
        before, last = last, (batch, over(batch))
        if last[1] > 0:
            misses = last
        else:
            fits = last
            if last[1] + slope * STEP > 0:  # the next batch would not fit
                break
    return fits[0]
