"""A client's round: global weights in, some updates on its own crops, the difference out."""

import collections
import contextlib
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord

from fl_client import protocol, updates
from fl_client.client_state import ClientState, StateLost, default_folder
from fl_client.exchange import exchange_of
from fl_client.federation_settings import FederationSettings
from fl_client.limits import NO_LIMITS, Limits
from fl_client.local_data import Share
from fl_client.round_plan import NO_BUDGET, Budget, Ladder
from ssl_core.planning.allocator import is_out_of_memory
from ssl_core.planning.process_memory import peak_bytes
from ssl_core.training.crops import Crops
from ssl_core.training.loader import ahead
from ssl_core.training.pretraining_step import PretrainingStep, StepReport
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel, Undrawn


class RoundResult(NamedTuple):
    """What a client sends back."""

    update: ArrayRecord
    metrics: dict[str, float]


@functools.lru_cache(maxsize=1)
def _resident_model(config: ModelConfig) -> PretrainingModel:
    """The model of this process; every round and client passes through it.

    Its weights come with each message, so it begins without any.
    """
    with Undrawn():
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
    config, recipe = settings.model_and_recipe()
    plan = budget.change(settings.resolved_plan(), settings.length)
    plan.validate_for(config, recipe)
    ladder = Ladder(config, recipe, plan, budget, updates.size(weights))
    if ladder.plan.threads:
        torch.set_num_threads(ladder.plan.threads)
    model = _resident_model(config)
    # Before any tensor of it is taken: moved later, it would leave them behind.
    model.to(ladder.plan.device)
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


class _Trained(NamedTuple):
    reports: list[StepReport]
    heard: set[int]
    skips: collections.Counter[str]
    paused: list[float]


def _train(
    model: PretrainingModel,
    ladder: Ladder,
    task: Mapping[str, Any],
    share: Share,
    settings: FederationSettings,
    limits: Limits,
    client: ClientState,
) -> _Trained:
    """Take a round's updates."""
    _, recipe = settings.model_and_recipe()
    plan = ladder.plan
    step = PretrainingStep(
        model, recipe, plan, seed=settings.seed, total_updates=settings.total_updates
    )
    folded = int(task["folded_round"])
    if settings.keep_moments and folded >= 0:
        with contextlib.suppress(StateLost):  # a client that was set up anew begins with none
            step.load_optimizer_state(dict(client.load("moments", folded)))
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
        client.save("moments", int(task["round"]), step.optimizer_state(), folded)
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
