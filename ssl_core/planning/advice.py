"""Chooses what to train on a device: a length, batch, precision and plan that fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from common.errors import UsageError
from common.units import format_bytes, format_length, format_seconds
from ssl_core.planning.decision import Decision, Option
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.step_plan import OptimizerState, Plan, Precision
from ssl_core.planning.work import Work

LENGTHS = (15.0, 10.0, 5.0, 1.0)
"""Crop lengths of the paper in seconds, the longest first."""
BATCHES = (12, 8, 4, 2, 1)
"""Batch sizes of the paper, the largest first."""
MATCHED = {
    "kws12": 5.0,
    "kws35": 5.0,
    "slots": 5.0,
    "emotion": 5.0,
    "speaker": 10.0,
    "verification": 10.0,
    "asr": 15.0,
}
"""Crop length in seconds to pretrain on for each downstream task (paper, section 4: matching
lengths). Keyword spotting, with clips of 1 s, is the exception: 1 s is too short to learn from."""

UpdateSeconds = Callable[[DeviceProfile, Work, Plan, float], float | None]
"""Estimates the seconds of an update from device, work, plan and slowdown; None if unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to train, and the choices that are allowed."""

    work: Work
    lengths: Sequence[float] = LENGTHS
    """Lengths of a crop or clip in seconds, in the order to try."""
    batches: Sequence[int] = BATCHES
    """Batch sizes in crops or clips, in the order to try."""
    precision: Precision | Literal["auto"] = "auto"
    """`auto`: the first of bf16 and fp16 that the device supports, else fp32."""
    optimizer_state: OptimizerState | Literal["auto"] = "fp32"
    """`auto`: fp32 if it fits, else bf16, else int8."""
    time_limit: float | None = None
    """Longest time of an update on the device in seconds; None for no limit."""
    federated: bool = True
    """Whether Flower's messages must fit in memory as well."""
    seconds: UpdateSeconds = lambda *_: None
    """Estimates how long an update takes."""
    smaller: Work | None = None
    """Work to suggest when nothing fits: the same with a smaller model."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """The choice for a device, or why nothing fits."""

    profile: DeviceProfile
    request: Request
    decision: Decision
    plan: Plan
    """The chosen plan, or the last one tried."""
    chosen: Option | None
    """The option that fits; None if nothing does."""
    seconds: float | None
    """Estimated seconds of an update on the device; None if unknown."""
    tried: tuple[str, ...]
    """Candidates that were tried and rejected, each with the reason."""
    would_fit: tuple[str, ...] = ()
    """If nothing fits: changes that would."""


def candidate_lengths(
    length: float | None, task: str = "", longest: float | None = None
) -> Sequence[float]:
    """List the crop lengths in seconds to try in pretraining.

    Args:
        length: the only length to try; None tries several.
        task: downstream task whose matching length is the longest to try; empty for none.
        longest: lengths to try are shorter than this; without `task` it is itself tried first.

    Raises:
        UsageError: no such task.
    """
    if length is not None:
        return (length,)
    lengths: Sequence[float] = LENGTHS
    if task:
        if task not in MATCHED:
            raise UsageError(f"no task '{task}': choose from {', '.join(MATCHED)}")
        lengths = [each for each in LENGTHS if each <= MATCHED[task]]
    if longest is None:
        return lengths
    shorter = [each for each in lengths if each < longest]
    return shorter if task else [longest, *shorter]


def messages_bytes(profile: DeviceProfile, request: Request) -> int:
    """Bytes of messages held while a client trains: the global weights, received and sent.

    ClientApp and SuperNode both hold them, in fp32. With a discrete GPU they are in host memory and
    count as 0.
    """
    if not request.federated or profile.discrete:
        return 0
    return 2 * 4 * request.work.trained_parameters()


def advise(profile: DeviceProfile, request: Request) -> Advice:
    """Choose the first length and batch that fit in memory and time, with the fastest plan.

    Raises:
        UsageError: the device does not support the precision, or there is a time limit and the
            device's speed is unknown.
    """
    held, work = messages_bytes(profile, request), request.work
    candidates = list(_candidates(profile, request))
    for plan in candidates:
        work.validate(plan)
    hopeless: set[str] | None = None
    tried: list[str] = []
    advice = None
    for plan in candidates:
        if hopeless and plan.optimizer_state in hopeless and plan != candidates[-1]:
            continue
        decision = _decide(profile, work, held, plan)
        option = decision.chosen
        if option is None:
            if hopeless is None:
                hopeless = _hopeless(profile, work, held, candidates)
            over = decision.leanest.estimate.total - decision.available
            tried.append(f"{describe_size(plan)}: the leanest plan is {format_bytes(over)} over")
            advice = Advice(profile, request, decision, plan, None, None, tuple(tried))
            continue
        seconds = request.seconds(profile, work, option.plan, option.slowdown)
        if request.time_limit is not None:
            if seconds is None:
                raise UsageError(
                    f"device '{profile.name}': the paper did not measure its speed, so a time "
                    "limit cannot be checked; set timed_as and times_faster in its profile"
                )
            if seconds > request.time_limit:
                tried.append(f"{describe_size(plan)}: about {format_seconds(seconds)} an update")
                advice = Advice(profile, request, decision, plan, None, seconds, tuple(tried))
                continue
        return Advice(profile, request, decision, option.plan, option, seconds, tuple(tried))
    assert advice is not None
    return dataclasses.replace(advice, would_fit=_would_fit(profile, request, held))


def _decide(profile: DeviceProfile, work: Work, held: int, plan: Plan) -> Decision:
    return Decision(work, plan, profile.process_bytes, profile.clientapp, held)


def _candidates(profile: DeviceProfile, request: Request) -> Iterator[Plan]:
    states: Sequence[OptimizerState] = ("fp32", "bf16", "int8")
    if request.optimizer_state != "auto":
        states = (request.optimizer_state,)
    precision = choose_precision_for(profile, request.precision)
    for length, batch, state in itertools.product(request.lengths, request.batches, states):
        plan = Plan(
            length=length,
            batch=batch,
            precision=precision,
            optimizer_state=state,
            device=profile.accelerator,
        )
        yield profile.with_kernels(plan)[0]


def choose_precision_for(
    profile: DeviceProfile, precision: Precision | Literal["auto"]
) -> Precision:
    """Choose the precision of matrix products on a device.

    Raises:
        UsageError: the device does not support the precision.
    """
    if precision != "auto":
        if precision not in profile.precisions:
            raise UsageError(
                f"device '{profile.name}' does not multiply in {precision}, only in "
                f"{', '.join(profile.precisions)}"
            )
        return precision
    for known in ("bf16", "fp16"):
        if known in profile.precisions:
            return known
    return "fp32"


def _hopeless(profile: DeviceProfile, work: Work, held: int, candidates: list[Plan]) -> set[str]:
    """Precisions of optimizer state with which not even the smallest candidate fits."""
    smallest = {plan.optimizer_state: plan for plan in candidates}
    return {
        kind
        for kind, plan in smallest.items()
        if _decide(profile, work, held, plan).leanest.estimate.total > profile.process_bytes
    }


def _would_fit(profile: DeviceProfile, request: Request, held: int) -> tuple[str, ...]:
    """List simple changes of a request with which it would fit."""
    unit, found = request.work.unit, []
    *_, last = _candidates(profile, request)
    changes: Sequence[tuple[str, dict[str, Any]]] = (
        ("optimizer state in bf16 (not exact)", {"optimizer_state": "bf16"}),
        ("optimizer state in 8 bits (not exact)", {"optimizer_state": "int8"}),
        (f"{unit} of 5s", {"length": 5.0}),
        (f"{unit} of 1s", {"length": 1.0}),
        ("a batch of 4", {"batch": 4}),
        ("a batch of 1", {"batch": 1}),
        (f"{unit} of 1s in a batch of 1", {"length": 1.0, "batch": 1}),
        (
            f"{unit} of 1s in a batch of 1, optimizer state in 8 bits (not exact)",
            {"length": 1.0, "batch": 1, "optimizer_state": "int8"},
        ),
    )
    for words, change in changes:
        plan = dataclasses.replace(last, **change)
        if plan == last or plan.length > last.length or plan.batch > last.batch:
            continue
        lean = _decide(profile, request.work, held, plan).leanest
        seconds = request.seconds(profile, request.work, lean.plan, 1.0)
        slow = request.time_limit is not None and (seconds or 0) > request.time_limit
        if lean.estimate.total <= profile.process_bytes and not slow:
            found.append(f"{words}: {format_bytes(lean.estimate.total)}")
    if not found and request.smaller is not None:
        smaller = dataclasses.replace(request, work=request.smaller, smaller=None)
        if _would_fit(profile, smaller, messages_bytes(profile, smaller)):
            found = ["the model tiny"]
    return tuple(found)


def describe_size(plan: Plan) -> str:
    """Batch, length and precision of a plan in words."""
    state = "" if plan.optimizer_state == "fp32" else f", optimizer state in {plan.optimizer_state}"
    return f"{plan.batch} x {format_length(plan.length)} in {plan.precision}{state}"
