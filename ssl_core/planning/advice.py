"""What to train on a device: a length, a batch, a precision and a plan that fit, and why.

Of pretraining, or of fine-tuning a task where the request says `frozen` or `unfrozen`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from common.errors import UsageError
from common.units import format_bytes, format_length, format_seconds
from ssl_core.downstream.task_work import TaskWork, Work, task_work
from ssl_core.paper.device_seconds import task_seconds, update_seconds
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import Decision, Option, choose, describe, leanest, unit_of
from ssl_core.planning.step_plan import OptimizerState, Plan, Precision
from ssl_core.planning.trace import count_parameters, count_trained
from ssl_core.training.overrides import resolve
from ssl_core.wav2vec2.config import ModelConfig

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the user fixes; None is left to the planner."""

    model: str = "base"
    set: str = ""
    """Single settings of model and recipe, as of `--set`."""
    length: float | None = None
    """Seconds in a crop."""
    longest: float | None = None
    """Where the length is free: seconds that it may be at most."""
    batch: int | None = None
    """Crops in an update, over which one loss is taken."""
    precision: Precision | Literal["auto"] = "auto"
    """`auto`: the first of bf16, fp16 that the device multiplies in itself, else fp32."""
    optimizer_state: OptimizerState | Literal["auto"] = "fp32"
    """`auto`: fp32 if it fits, else bf16, else int8."""
    task: str = ""
    """Downstream task to pretrain for, of `MATCHED`; it decides the length."""
    backbone: Literal["", "frozen", "unfrozen"] = ""
    """Where it is given, the task is not pretrained for but fine-tuned, at its own batch and
    length of clips; what is frozen is computed once, before."""
    time_limit: float | None = None
    """Seconds an update may take on the device."""
    federated: bool = True
    """Whether Flower's messages must fit as well."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """A choice for a device, or what stood in the way of one."""

    profile: DeviceProfile
    request: Request
    decision: Decision
    plan: Plan
    """Of the choice, or of the last that was tried."""
    seconds: float | None
    """An update on the device, estimated from the paper's measurements; None: not known."""
    passed_over: tuple[str, ...]
    """What was tried before, and why not."""
    would_fit: tuple[str, ...] = ()
    """When nothing does: what would."""

    @property
    def chosen(self) -> Option | None:
        """What fits; None when nothing does."""
        return self.decision.chosen


def messages_bytes(profile: DeviceProfile, request: Request) -> int:
    """Bytes of messages that are held while a client trains: the global weights, here and there.

    Both the ClientApp and the SuperNode hold them, in fp32; with a GPU that has memory of its own
    they are in the computer's.
    """
    if not request.federated or (profile.accelerator == "cuda" and not profile.shared):
        return 0
    config, work = work_of(request)
    if isinstance(work, TaskWork):
        return 2 * 4 * count_trained(config, work)
    return 2 * 4 * count_parameters(config)


def work_of(request: Request) -> tuple[ModelConfig, Work]:
    """The architecture, and what it is trained for.

    Raises:
        UsageError: an unknown preset, setting or task, or a backbone without a task.
    """
    config, recipe = resolve(request.model, request.set)
    if not request.backbone:
        return config, recipe
    if not request.task:
        raise UsageError(f"--{request.backbone} is of fine-tuning: say which --task")
    return config, task_work(request.task, unfrozen=request.backbone == "unfrozen", cached=True)


def _seconds(
    profile: DeviceProfile, request: Request, plan: Plan, slowdown: float = 1.0
) -> float | None:
    config, work = work_of(request)
    if isinstance(work, TaskWork):
        return task_seconds(profile, config, work, plan, slowdown)
    return update_seconds(profile, config, plan, slowdown)


def _validate(config: ModelConfig, work: Work, plan: Plan) -> None:
    if isinstance(work, TaskWork):
        work.validate_for(config, plan)
    else:
        plan.validate_for(config, work)


def advise(profile: DeviceProfile, request: Request) -> Advice:
    """Choose for a device.

    Lengths are tried from the longest (or from the one that matches the task), batches from the
    largest; the first that fits into memory and time is taken, in the fastest plan that fits.

    Raises:
        UsageError: an unknown task, or a time limit on a device of which no times are known.
    """
    config, work = work_of(request)
    held = messages_bytes(profile, request)
    passed: list[str] = []
    advice = None
    candidates = list(_candidates(profile, request))
    for plan in candidates:
        _validate(config, work, plan)
    hopeless = _hopeless(profile, request, candidates)
    for plan in candidates:
        if plan.optimizer_state in hopeless and plan != candidates[-1]:
            continue
        decision = choose(config, work, plan, profile.process_bytes, profile.clientapp, held)
        if decision.chosen is None:
            over = decision.leanest.estimate.total - decision.available
            passed.append(f"{_size(plan)}: {format_bytes(over)} too much at the leanest")
            advice = Advice(profile, request, decision, plan, None, tuple(passed))
            continue
        option = decision.chosen
        seconds = _seconds(profile, request, option.plan, option.slowdown)
        if request.time_limit is not None:
            if seconds is None:
                raise UsageError(
                    f"device '{profile.name}': the paper says nothing of how fast it is, so a time "
                    "limit cannot be kept; give its profile timed_as and times_faster"
                )
            if seconds > request.time_limit:
                passed.append(f"{_size(plan)}: about {format_seconds(seconds)} an update")
                advice = Advice(
                    profile, request, dataclasses.replace(decision, chosen=None), plan, seconds,
                    tuple(passed),
                )  # fmt: skip
                continue
        return Advice(profile, request, decision, option.plan, seconds, tuple(passed))
    assert advice is not None
    return dataclasses.replace(advice, would_fit=_would_fit(profile, request))


def _candidates(profile: DeviceProfile, request: Request) -> Iterator[Plan]:
    lengths: Sequence[float] = LENGTHS
    batches: Sequence[int] = BATCHES
    _, work = work_of(request)
    if isinstance(work, TaskWork):
        lengths, batches = (work.length,), (work.recipe.batch,)
    if request.length is not None:
        lengths = (request.length,)
    elif request.task and not request.backbone:
        if request.task not in MATCHED:
            raise UsageError(f"no task '{request.task}': choose from {', '.join(MATCHED)}")
        lengths = [length for length in LENGTHS if length <= MATCHED[request.task]]
    if request.length is None and request.longest is not None and not request.backbone:
        shorter = [length for length in lengths if length < request.longest]
        lengths = [*([request.longest] if not request.task else []), *shorter]
    if request.batch is not None:
        batches = (request.batch,)
    states: Sequence[OptimizerState] = ("fp32", "bf16", "int8")
    if request.optimizer_state != "auto":
        states = (request.optimizer_state,)
    for length, batch, state in itertools.product(lengths, batches, states):
        yield Plan(
            length=length,
            batch=batch,
            precision=choose_for(profile, request.precision),
            optimizer_state=state,
            device=profile.accelerator,
        )


def choose_for(profile: DeviceProfile, precision: Precision | Literal["auto"]) -> Precision:
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


def _hopeless(profile: DeviceProfile, request: Request, candidates: list[Plan]) -> set[str]:
    """Kinds of optimiser state with which not even the smallest candidate fits."""
    config, work = work_of(request)
    held = messages_bytes(profile, request)
    smallest = {plan.optimizer_state: plan for plan in candidates}
    return {
        kind
        for kind, plan in smallest.items()
        if estimate(config, work, leanest(config, work, plan), profile.clientapp, held).total
        > profile.process_bytes
    }


def _would_fit(profile: DeviceProfile, request: Request) -> tuple[str, ...]:
    """Changes of a request that fit, of those a person would think of."""
    config, work = work_of(request)
    unit = unit_of(work)
    held, found = messages_bytes(profile, request), []
    *_, last = _candidates(profile, request)
    for words, changes in (
        ("moments in bf16 (not exact)", {"optimizer_state": "bf16"}),
        ("moments in 8 bits (not exact)", {"optimizer_state": "int8"}),
        (f"{unit} of 5s", {"length": 5.0}),
        (f"{unit} of 1s", {"length": 1.0}),
        ("a batch of 4", {"batch": 4}),
        ("a batch of 1", {"batch": 1}),
        (f"{unit} of 1s in a batch of 1", {"length": 1.0, "batch": 1}),
        (
            f"{unit} of 1s in a batch of 1, moments in 8 bits (not exact)",
            {"length": 1.0, "batch": 1, "optimizer_state": "int8"},
        ),
    ):
        plan = dataclasses.replace(last, **changes)
        if plan == last or plan.length > last.length or plan.batch > last.batch:
            continue
        lean = leanest(config, work, plan)
        need = estimate(config, work, lean, profile.clientapp, held).total
        seconds = _seconds(profile, request, lean)
        slow = request.time_limit is not None and (seconds or 0) > request.time_limit
        if need <= profile.process_bytes and not slow:
            found.append(f"{words}: {format_bytes(need)}")
    if not found and request.model != "tiny":
        found = list(_would_fit(profile, dataclasses.replace(request, model="tiny", set="")))
        found = ["the model tiny"] if found else []
    return tuple(found)


def _size(plan: Plan) -> str:
    moments = "" if plan.optimizer_state == "fp32" else f", moments in {plan.optimizer_state}"
    return f"{plan.batch} x {format_length(plan.length)} in {plan.precision}{moments}"


def settings(plan: Plan) -> str:
    """The options of `ssl_core.train` and `simulation/run.py` that ask for this plan."""
    words = [
        f"--length {format_length(plan.length)} --batch {plan.batch}",
        f"--precision {plan.precision}",
    ]
    if plan.chunk < plan.batch:
        words.append(f"--micro-batch {plan.chunk}")
    plain, changed = Plan(), []
    for name in (
        "recompute_features", "recompute_layers", "keep_attention", "optimizer_state",
        "apply_in_backward", "keep_freed_memory",
    ):  # fmt: skip
        value = getattr(plan, name)
        if value != getattr(plain, name):
            text = str(value).lower() if isinstance(value, bool) else value
            changed.append(f"plan.{name.replace('_', '-')}={text}")
    if changed:
        words.append(f'--set "{" ".join(changed)}"')
    return " ".join(words)


def task_settings(request: Request, plan: Plan) -> str:
    """The options of `ssl_core.finetune` that ask for this plan, as far as it has them."""
    words = f"--task {request.task} --{request.backbone} --batch {plan.batch}"
    split = f" --micro-batch {plan.chunk}" if plan.chunk < plan.batch else ""
    return f"{words} --precision {plan.precision}{split}"


def _options(advice: Advice, plan: Plan) -> str:
    request = advice.request
    return task_settings(request, plan) if request.backbone else settings(plan)


def explain(advice: Advice) -> list[str]:
    """Lines for people."""
    profile, decision = advice.profile, advice.decision
    room = format_bytes(decision.available)
    lines = [f"passed over: {line}" for line in advice.passed_over]
    if decision.chosen is None:
        lines.append(f"nothing fits {profile.name}, {room} for the training process")
        lines += [f"would fit: {line}" for line in advice.would_fit] or [
            "nothing smaller would fit either"
        ]
        return lines
    option = decision.chosen
    unit = decision.unit
    lines.append(f"{_size(option.plan)}: {describe(option.plan, unit)}")
    lines.append(f"peak {format_bytes(option.estimate.total)} of {room}")
    if option.plan.inexact:
        lines.append(f"not exact: {', '.join(option.plan.inexact)}")
    if advice.seconds is not None:
        lines.append(
            f"about {format_seconds(advice.seconds)} an update, estimated from the paper's Table 2"
        )
    if decision.faster is not None:
        gain = 100 * (1 - decision.faster.slowdown / option.slowdown)
        lines.append(
            f"runner-up: {describe(decision.faster.plan, unit)}, {gain:.0f} % faster, takes "
            f"{format_bytes(decision.faster.estimate.total)}"
        )
    else:
        lines.append("runner-up: none, this is the fastest plan there is")
    if decision.leanest.plan != option.plan:
        lines.append(
            f"when memory shrinks: down to {format_bytes(decision.leanest.estimate.total)} "
            f"({describe(decision.leanest.plan, unit)})"
        )
    lines.append(f"as options: {_options(advice, option.plan)}")
    return lines


def result(advice: Advice) -> dict[str, Any]:
    """Everything as JSON; sizes in bytes."""

    def of(option: Option | None) -> dict[str, Any] | None:
        if option is None:
            return None
        return {
            "plan": dataclasses.asdict(option.plan),
            "bytes": option.estimate.total,
            "parts": option.estimate.parts,
            "slowdown": option.slowdown,
        }

    decision = advice.decision
    return {
        "device": advice.profile.name,
        "model": advice.request.model,
        "task": advice.request.task,
        "backbone": advice.request.backbone,
        "available": decision.available,
        "fits": decision.chosen is not None,
        "chosen": of(decision.chosen),
        "seconds": advice.seconds,
        "inexact": list(decision.chosen.plan.inexact) if decision.chosen else [],
        "options": _options(advice, decision.chosen.plan) if decision.chosen else "",
        "runner_up": of(decision.faster),
        "leanest": of(decision.leanest),
        "passed_over": list(advice.passed_over),
        "would_fit": list(advice.would_fit),
    }
