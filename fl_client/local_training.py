"""A client's round: global weights in, some updates on its own crops, the difference out."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord

from fl_client import protocol, updates
from fl_client.exchange import exchange_of
from fl_client.limits import Limits
from fl_client.local_data import Share
from fl_client.settings import FederationSettings
from fl_client.state import ClientState, StateLost, default_folder
from partitions.errors import UsageError
from partitions.units import format_length
from ssl_core.crops import Crops, ahead
from ssl_core.memory.allocator import is_out_of_memory
from ssl_core.memory.devices import AUTO, this_machine
from ssl_core.memory.estimate import estimate
from ssl_core.memory.measure import peak_bytes
from ssl_core.memory.planner import describe, fallbacks, fitting
from ssl_core.step import StepReport, TrainingStep
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

RUNTIME = 640 * 2**20
"""Bytes resident in a ClientApp before its first round; 571 MiB were measured after the imports."""
log = logging.getLogger("shortwave.client")


class RoundResult(NamedTuple):
    """What a client sends back."""

    update: ArrayRecord
    metrics: dict[str, float]


class Budget(NamedTuple):
    """What a device has for a round; without any, the settings' own plan is taken."""

    memory: int = 0
    """Bytes for this process, for which the step is planned; 0 plans nothing."""
    length: float = 0.0
    """Seconds in a crop, at most the run's; 0 is the run's."""
    plan: str = ""
    """JSON: how the step is taken, where that was planned elsewhere (a simulated fleet)."""
    live: bool = False
    """Whether the memory is this machine's own, to be watched while training."""


NO_BUDGET = Budget()
NO_LIMITS = Limits()


def budget_of(node: Mapping[str, Any]) -> Budget:
    """The budget by Flower's node config: `memory`, `length`; device `auto` is read live.

    Raises:
        DataError: this machine's limits cannot be read.
    """
    memory, length = int(node.get("memory", 0)), float(node.get("length", 0.0))
    if memory or node.get("device") != AUTO:
        return Budget(memory, length, str(node.get("plan", "")))
    return Budget(this_machine().process_bytes, length, live=True)


@functools.lru_cache(maxsize=1)
def _resident_model(config: ModelConfig) -> PretrainingModel:
    """The model of this process; every round and client passes through it."""
    return PretrainingModel(config)


def train_round(
    weights: ArrayRecord,
    task: Mapping[str, Any],
    share: Share,
    settings: FederationSettings,
    budget: Budget = NO_BUDGET,
    state: Path | None = None,
    limits: Limits = NO_LIMITS,
) -> RoundResult:
    """Train on a client's share from the global weights.

    When memory runs short between two updates a leaner exact plan takes the next one; when it runs
    out in the middle of one the round begins again with a leaner exact plan.

    Args:
        weights: global weights by parameter name, or what changed of them, encoded. Emptied as it
            is used, so that a client holds no copy of the model beside the one it trains.
        task: of the round, see `protocol.task`.
        share: the client's audio.
        settings: of the run.
        budget: what this device has.
        state: folder for what is kept between rounds; None is `default_folder()`.
        limits: of the device's owner; training waits while one is passed.

    Raises:
        ProtocolError: weights that do not fit the model.
        StateLost: the message is a difference to weights that are not here.
        DataError: no usable audio.
        UsageError: nothing fits into the memory.
    """
    started = time.monotonic()
    config, _ = settings.model_and_recipe()
    ladder = _Ladder(settings, budget, updates.size(weights))
    if ladder.plan.threads:
        torch.set_num_threads(ladder.plan.threads)
    model = _resident_model(config)
    client = ClientState(state or default_folder(), str(task["run"]), share.key)
    exchange = exchange_of(model, weights, task, client, settings.encoding)
    while True:
        exchange.load()
        try:
            trained = _train(model, ladder, task, share, settings, limits, client)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not ladder.step_down("out of memory"):
                raise
    plan = ladder.plan
    update = exchange.difference()
    metrics = _metrics(trained.reports)
    metrics |= {
        "round": int(task["round"]),
        "samples": len(trained.heard) * plan.samples,
        "train_seconds": time.monotonic() - started,
        "paused_seconds": sum(trained.paused),
        "peak_bytes": peak_of(plan.device),
        "predicted_bytes": ladder.predicted,
        "memory_bytes": budget.memory,
        "length": plan.length,
        "batch": plan.batch,
        "micro_batch": plan.chunk,
        "fallbacks": ladder.fallbacks,
    }
    for reason in protocol.SKIP_REASONS:
        metrics["skipped_" + reason.replace(" ", "_")] = trained.skips[reason]
    return RoundResult(update, {name: metrics[name] for name in protocol.TRAIN_METRICS})


class _Ladder:
    """The plan of a round, and the leaner ones it can fall back to."""

    def __init__(self, settings: FederationSettings, budget: Budget, messages: int) -> None:
        """Plan for the budget, if there is one; `messages` are bytes held beside the step."""
        self.config, self.recipe = settings.model_and_recipe()
        self.live, self.messages, self.fallbacks, self.predicted = budget.live, messages, 0, 0
        plan = settings.resolved_plan()
        if budget.length:
            if budget.length > plan.length:
                raise UsageError(
                    f"--length {format_length(budget.length)} is longer than the run's "
                    f"{settings.length}: sequences are cut to that"
                )
            plan = dataclasses.replace(plan, length=budget.length)
        if budget.plan:
            plan = dataclasses.replace(plan, **json.loads(budget.plan))
            plan.validate_for(self.config, self.recipe)
        if budget.memory:
            option = fitting(self.config, self.recipe, plan, budget.memory, RUNTIME, messages)
            plan, self.predicted = option.plan, option.estimate.total
        self.plan = plan
        self._leaner = fallbacks(plan, self.recipe)

    def step_down(self, reason: str) -> bool:
        """Take the next leaner plan; False when there is none."""
        if not self._leaner:
            return False
        plan = self._leaner.pop(0)
        log.warning("%s with %s; going on with %s", reason, describe(self.plan), describe(plan))
        self.plan, self.fallbacks = plan, self.fallbacks + 1
        if self.predicted:
            self.predicted = self._need()
        return True

    def _need(self) -> int:
        return estimate(self.config, self.recipe, self.plan, RUNTIME, self.messages).total

    def watch(self) -> bool:
        """Step down until the plan fits what this machine has left now; whether it changed."""
        changed = False
        while self.live and self.predicted > this_machine().process_bytes:
            if not self.step_down("memory has shrunk"):
                break
            changed = True
        return changed


class _Trained(NamedTuple):
    reports: list[StepReport]
    heard: set[int]
    skips: collections.Counter[str]
    paused: list[float]


def _train(
    model: PretrainingModel,
    ladder: _Ladder,
    task: Mapping[str, Any],
    share: Share,
    settings: FederationSettings,
    limits: Limits,
    client: ClientState,
) -> _Trained:
    """Take a round's updates."""
    _, recipe = settings.model_and_recipe()
    plan = ladder.plan
    step = TrainingStep(
        model, recipe, plan, seed=settings.seed, total_updates=settings.total_updates
    )
    folded = int(task["folded_round"])
    if settings.keep_moments and folded >= 0:
        with contextlib.suppress(StateLost):  # a client that was set up anew begins with none
            step.load_moments(dict(client.load("moments", folded)))
    crops = Crops(share.manifest, share.indices, plan.samples, settings.seed, share.key)
    trained = _Trained([], set(), collections.Counter(), [])
    first = int(task["first_update"])
    numbers = range(first, first + int(task["updates"]))
    with contextlib.closing(ahead(crops.updates(numbers, plan.batch, plan.accumulation))) as read:
        for number, batches in read:
            trained.paused.append(limits.wait())
            if ladder.watch():
                step.change_plan(ladder.plan)
            for batch in batches:
                trained.heard.update(batch.sequences)
                trained.skips.update(batch.skips)
            waveforms = [batch.waveforms for batch in batches]
            trained.reports.append(step.update(waveforms, number, share.key))
    if settings.keep_moments:
        client.save("moments", int(task["round"]), step.moments(), folded)
    return trained


def _metrics(reports: list[StepReport]) -> dict[str, float]:
    names = (
        "loss", "contrastive", "diversity", "penalty", "accuracy", "perplexity",
        "code_entropy", "masked_share", "distinct_negatives", "gradient_norm",
    )  # fmt: skip
    kept = [report for report in reports if report.applied]
    values = {
        name: float(np.mean([getattr(report, name) for report in kept])) if kept else 0.0
        for name in names
    }
    return values | {
        "crops": sum(report.crops for report in reports),
        "updates": len(reports),
        "applied": len(kept),
    }


def peak_of(device: str) -> int:
    """Largest memory so far: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes()
