"""What to train on a device: a length, a batch, a precision and a plan that fit, and why."""

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
"""The paper's, the longest first."""
BATCHES = (12, 8, 4, 2, 1)
"""The paper's, the largest first."""
MATCHED = {
    "kws12": 5.0,
    "kws35": 5.0,
    "slots": 5.0,
    "emotion": 5.0,
    "speaker": 10.0,
    "verification": 10.0,
    "asr": 15.0,
}
"""By downstream task, the length to pretrain on (paper, section 4: lengths matching). Keyword
spotting, of 1 s clips, is its exception: 1 s is too short to learn from."""

UpdateSeconds = Callable[[DeviceProfile, Work, Plan, float], float | None]
"""Seconds of an update on a device by a plan with a slowdown; None where nothing is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be trained, and what may be chosen."""

    work: Work
    lengths: Sequence[float] = LENGTHS
    """Seconds in a crop or clip, in the order they are tried."""
    batches: Sequence[int] = BATCHES
    """Crops or clips over which one loss is taken, in the order they are tried."""
    precision: Precision | Literal["auto"] = "auto"
    """`auto`: the first of bf16, fp16 that the device multiplies in itself, else fp32."""
    optimizer_state: OptimizerState | Literal["auto"] = "fp32"
    """`auto`: fp32 if it fits, else bf16, else int8."""
    time_limit: float | None = None
    """Seconds an update may take on the device."""
    federated: bool = True
    """Whether Flower's messages must fit as well."""
    seconds: UpdateSeconds = lambda *_: None
    """How long an update takes."""
    smaller: Work | None = None
    """What to suggest when nothing fits, such as a smaller model."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """A choice for a device, or what stood in the way of one."""

    profile: DeviceProfile
    request: Request
    decision: Decision
    plan: Plan
    """Of the choice, or of the last that was tried."""
    chosen: Option | None
    """What fits; None when nothing does."""
    seconds: float | None
    """Of an update on the device; None where nothing is known."""
    tried: tuple[str, ...]
    """What was tried before, and why it is not chosen."""
    would_fit: tuple[str, ...] = ()
    """When nothing fits: what would."""


def candidate_lengths(
    length: float | None, task: str = "", longest: float | None = None
) -> Sequence[float]:
    """Lengths of crops to try in pretraining.

    Args:
        length: seconds that are fixed; None leaves them free.
        task: downstream task whose matching length is the longest to try; empty is none.
        longest: where the length is free, the first to try.

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

    Both the ClientApp and the SuperNode hold them, in fp32; with a GPU that has memory of its own
    they are in the computer's.
    """
    if not request.federated or (profile.accelerator == "cuda" and not profile.shared):
        return 0
    return 2 * 4 * request.work.trained_parameters()


def advise(profile: DeviceProfile, request: Request) -> Advice:
    """Choose for a device: the first length and batch that fit into memory and time.

    Each is taken by the fastest plan that fits.

    Args:
        profile: of the device.
        request: what to train.

    Raises:
        UsageError: a precision the device has not, or a time limit on a device of which no times
            are known.
    """
    held, work = messages_bytes(profile, request), request.work
    candidates = list(_candidates(profile, request))
    for plan in candidates:
        work.validate(plan)
    hopeless = _hopeless(profile, work, held, candidates)
    tried: list[str] = []
    advice = None
    for plan in candidates:
        if plan.optimizer_state in hopeless and plan != candidates[-1]:
            continue
        decision = _decide(profile, work, held, plan)
        option = decision.chosen
        if option is None:
            over = decision.leanest.estimate.total - decision.available
            tried.append(f"{describe_size(plan)}: {format_bytes(over)} too much at the leanest")
            advice = Advice(profile, request, decision, plan, None, None, tuple(tried))
            continue
        seconds = request.seconds(profile, work, option.plan, option.slowdown)
        if request.time_limit is not None:
            if seconds is None:
                raise UsageError(
                    f"device '{profile.name}': the paper says nothing of how fast it is, so a time "
                    "limit cannot be kept; give its profile timed_as and times_faster"
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
        yield Plan(
            length=length,
            batch=batch,
            precision=precision,
            optimizer_state=state,
            device=profile.accelerator,
        )


def choose_precision_for(
    profile: DeviceProfile, precision: Precision | Literal["auto"]
) -> Precision:
    """The precision of a device's products.

    Raises:
        UsageError: the device does not multiply in it.
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
    """Kinds of optimizer state with which not even the smallest candidate fits."""
    smallest = {plan.optimizer_state: plan for plan in candidates}
    return {
        kind
        for kind, plan in smallest.items()
        if _decide(profile, work, held, plan).leanest.estimate.total > profile.process_bytes
    }


def _would_fit(profile: DeviceProfile, request: Request, held: int) -> tuple[str, ...]:
    """Changes of a request that fit, of those a person would think of."""
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
    """Batch, length and precision of a plan, for people."""
    state = "" if plan.optimizer_state == "fp32" else f", optimizer state in {plan.optimizer_state}"
    return f"{plan.batch} x {format_length(plan.length)} in {plan.precision}{state}"
