"""A client's round: global weights in, some updates on its own crops, the difference out."""

import collections
import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fl_client import protocol, updates
from fl_client.local_data import Share
from fl_client.settings import FederationSettings
from ssl_core.crops import Crops, ahead
from ssl_core.memory.allocator import is_out_of_memory
from ssl_core.memory.measure import peak_bytes
from ssl_core.memory.plan import Plan
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


@functools.lru_cache(maxsize=1)
def _resident_model(config: ModelConfig) -> PretrainingModel:
    """The model of this process; every round and client passes through it."""
    return PretrainingModel(config)


def train_round(
    weights: ArrayRecord,
    task: Mapping[str, Any],
    share: Share,
    settings: FederationSettings,
    memory: int = 0,
) -> RoundResult:
    """Train on a client's share from the global weights.

    When memory runs out the round begins again with a leaner exact plan.

    Args:
        weights: global weights by parameter name. Emptied as the update is made, so that a client
            holds one copy of the model beside the one it trains.
        task: `first_update` (global number of the first update) and `updates` (how many).
        share: the client's audio.
        settings: of the run.
        memory: bytes for this process, for which the step is planned; 0 takes the settings' plan.

    Raises:
        ProtocolError: weights that do not fit the model.
        DataError: no usable audio.
        UsageError: nothing fits into the memory.
    """
    started = time.monotonic()
    config, recipe = settings.model_and_recipe()
    plan = settings.resolved_plan()
    if memory:
        own = sum(value.nbytes for _, value in updates.unpack(weights))
        plan = fitting(config, recipe, plan, memory, RUNTIME, own).plan
    if plan.threads:
        torch.set_num_threads(plan.threads)
    model = _resident_model(config)
    leaner = fallbacks(plan, recipe)
    while True:
        _load(model, weights)
        try:
            trained = _train(model, plan, task, share, settings)
            break
        except (MemoryError, RuntimeError) as error:
            if not leaner or not is_out_of_memory(error):
                raise
            log.warning("out of memory with %s; again with %s", describe(plan), describe(leaner[0]))
        plan = leaner.pop(0)
    update = _difference(model, weights)
    metrics = _metrics(trained.reports)
    metrics |= {
        "samples": len(trained.heard) * plan.samples,
        "train_seconds": time.monotonic() - started,
        "peak_bytes": _peak_bytes(plan.device),
        "micro_batch": plan.chunk,
    }
    for reason in protocol.SKIP_REASONS:
        metrics["skipped_" + reason.replace(" ", "_")] = trained.skips[reason]
    return RoundResult(update, {name: metrics[name] for name in protocol.TRAIN_METRICS})


class _Trained(NamedTuple):
    reports: list[StepReport]
    heard: set[int]
    skips: collections.Counter[str]


def _train(
    model: PretrainingModel,
    plan: Plan,
    task: Mapping[str, Any],
    share: Share,
    settings: FederationSettings,
) -> _Trained:
    """Take a round's updates."""
    _, recipe = settings.model_and_recipe()
    step = TrainingStep(
        model, recipe, plan, seed=settings.seed, total_updates=settings.total_updates
    )
    crops = Crops(share.manifest, share.indices, plan.samples, settings.seed, share.key)
    trained = _Trained([], set(), collections.Counter())
    first = int(task["first_update"])
    numbers = range(first, first + int(task["updates"]))
    with contextlib.closing(ahead(crops.updates(numbers, plan.batch, plan.accumulation))) as read:
        for number, batches in read:
            for batch in batches:
                trained.heard.update(batch.sequences)
                trained.skips.update(batch.skips)
            waveforms = [batch.waveforms for batch in batches]
            trained.reports.append(step.update(waveforms, number, share.key))
    return trained


def _load(model: PretrainingModel, weights: ArrayRecord) -> None:
    own = model.state_dict()
    if own.keys() != set(weights):
        wrong = sorted(own.keys() ^ set(weights))
        raise protocol.ProtocolError(f"the weights do not fit the model: {wrong[0]} and others")
    for name, value in updates.unpack(weights):
        if tuple(value.shape) != tuple(own[name].shape):
            raise protocol.ProtocolError(f"{name} is {value.shape}, not {tuple(own[name].shape)}")
        own[name].copy_(_tensor(value))


def _difference(model: PretrainingModel, weights: ArrayRecord) -> ArrayRecord:
    result = ArrayRecord()
    own = model.state_dict()
    for name in list(weights):
        start = _tensor(updates.view(weights.pop(name)))
        result[name] = Array(own[name].cpu().sub(start).numpy())
    return result


def _tensor(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor on memory that may be read-only and is only read here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value)


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


def _peak_bytes(device: str) -> int:
    """Largest memory so far: allocated on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_bytes()
