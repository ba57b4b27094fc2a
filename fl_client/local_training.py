"""A client's round: global weights in, some updates on its own crops, the difference out."""

import collections
import contextlib
import functools
import resource
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
from ssl_core.step import StepReport, TrainingStep
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel


class RoundResult(NamedTuple):
    """What a client sends back."""

    update: ArrayRecord
    metrics: dict[str, float]


@functools.lru_cache(maxsize=1)
def _resident_model(config: ModelConfig) -> PretrainingModel:
    """The model of this process; every round and client passes through it."""
    return PretrainingModel(config)


def train_round(
    weights: ArrayRecord, task: Mapping[str, Any], share: Share, settings: FederationSettings
) -> RoundResult:
    """Train on a client's share from the global weights.

    Args:
        weights: global weights by parameter name. Emptied as the update is made, so that a client
            holds one copy of the model beside the one it trains.
        task: `first_update` (global number of the first update) and `updates` (how many).
        share: the client's audio.
        settings: of the run.

    Raises:
        ProtocolError: weights that do not fit the model.
        DataError: no usable audio.
    """
    started = time.monotonic()
    config, recipe = settings.model_and_recipe()
    plan = settings.resolved_plan()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    model = _resident_model(config)
    _load(model, weights)
    step = TrainingStep(
        model, recipe, plan, seed=settings.seed, total_updates=settings.total_updates
    )
    crops = Crops(share.manifest, share.indices, plan.samples, settings.seed, share.key)
    reports: list[StepReport] = []
    heard: set[int] = set()
    skips: collections.Counter[str] = collections.Counter()
    first = int(task["first_update"])
    numbers = range(first, first + int(task["updates"]))
    with contextlib.closing(ahead(crops.updates(numbers, plan.batch, plan.accumulation))) as read:
        for number, batches in read:
            for batch in batches:
                heard.update(batch.sequences)
                skips.update(batch.skips)
            reports.append(step.update([batch.waveforms for batch in batches], number, share.key))
    del step
    update = _difference(model, weights)
    metrics = _metrics(reports)
    metrics |= {
        "samples": len(heard) * plan.samples,
        "train_seconds": time.monotonic() - started,
        "peak_bytes": _peak_bytes(plan.device),
    }
    for reason in protocol.SKIP_REASONS:
        metrics["skipped_" + reason.replace(" ", "_")] = skips[reason]
    return RoundResult(update, {name: metrics[name] for name in protocol.TRAIN_METRICS})


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
