"""A client's round of pretraining: global weights in, updates on its own crops, difference out."""

import collections
import contextlib
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord

from fl_client import protocol, updates
from fl_client.client_round import ClientRound, RoundResult, means
from fl_client.client_state import OPTIMIZER, StateLost
from fl_client.federation_settings import PretrainingFederation
from fl_client.limits import NO_LIMITS, Limits
from fl_client.local_data import ClientAudio
from fl_client.round_plan import NO_BUDGET, Budget, RoundPlan
from ssl_core.planning.processor import use_threads
from ssl_core.training.crops import Crops
from ssl_core.training.loader import ahead
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.training.step_report import StepReport
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel, Undrawn

_AVERAGED = (
    "loss", "contrastive", "diversity", "penalty", "accuracy", "perplexity", "code_entropy",
    "masked_fraction", "distinct_negatives", "gradient_norm",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _resident_model(config: ModelConfig) -> PretrainingModel:
    """The only model of this process, used by every round and client.

    Its weights come with each message, so none are drawn.
    """
    with Undrawn():
        return PretrainingModel(config)


def train_round(
    weights: ArrayRecord,
    instructions: Mapping[str, Any],
    audio: ClientAudio,
    settings: PretrainingFederation,
    budget: Budget = NO_BUDGET,
    state: Path | None = None,
    limits: Limits = NO_LIMITS,
) -> RoundResult:
    """Train on a client's audio from the global weights.

    If memory shrinks between two updates, the next one uses a leaner exact plan. If memory runs out
    during an update, the round starts again with a leaner exact plan.

    Args:
        weights: global weights by parameter name, or their encoded change. Emptied as they are
            used, so that a client holds no second copy of the model.
        instructions: see `protocol.instructions`.
        audio: the client's audio.
        settings: of the run.
        budget: memory and crop length of this device.
        state: folder for what is kept between rounds; None is `default_folder()`.
        limits: the owner's limits; training waits while one is exceeded.

    Raises:
        ProtocolError: the weights do not fit the model.
        StateLost: the weights are a difference to weights that this client no longer has.
        DataError: no usable audio.
        UsageError: no plan fits in memory.
    """
    started = time.monotonic()
    architecture = protocol.architecture_in(instructions, settings.architecture)
    work = PretrainingWork(architecture=architecture, recipe=settings.recipe)
    plan = budget.change(settings.step_plan())
    work.validate(plan)
    chosen = RoundPlan(work, plan, budget, updates.size(weights))
    use_threads(plan.threads)
    model = _resident_model(architecture)
    # Move first: the exchange refers to the model's tensors, and a later move would replace them.
    model.to(plan.device)
    client = ClientRound(settings, instructions, audio.key, chosen, budget, limits, state, started)
    client.receive(model, weights)
    trained = client.run(lambda: _train(model, audio, client, settings))
    update = client.exchange.difference()
    metrics = means(trained.reports, _AVERAGED) | {
        "samples": len(trained.heard) * plan.samples,
        "crops": sum(report.crops for report in trained.reports),
        "length": plan.length,
    }
    return client.result(update, metrics, trained.skips)


class _Trained(NamedTuple):
    reports: list[StepReport]
    heard: set[int]
    """Indices of the sequences trained on."""
    skips: collections.Counter[str]


def _train(
    model: PretrainingModel,
    audio: ClientAudio,
    client: ClientRound,
    settings: PretrainingFederation,
) -> _Trained:
    """Take a round's updates."""
    plan = client.round_plan.plan
    step = PretrainingStep(
        model, settings.recipe, plan, seed=settings.seed, total_updates=settings.total_updates
    )
    if settings.keep_optimizer_state and client.folded >= 0:
        with contextlib.suppress(StateLost):  # a client that was set up anew starts without
            step.load_optimizer_state(dict(client.state.load(OPTIMIZER, client.folded)))
    crops = Crops(audio.manifest, audio.indices, plan.samples, settings.seed, audio.key)
    trained, taken = _Trained([], set(), collections.Counter()), []
    first = int(client.instructions["first_update"])
    numbers = range(first, first + int(client.instructions["updates"]))
    with contextlib.closing(ahead(crops.updates(numbers, plan.batch, plan.accumulation))) as read:
        for number, batches in read:
            client.before_update(step)
            for batch in batches:
                trained.heard.update(batch.sequences)
                trained.skips.update(batch.skips)
            waveforms = [batch.waveforms for batch in batches]
            taken.append(step.take(waveforms, number, audio.key))
    trained.reports.extend(each.report() for each in taken)
    if settings.keep_optimizer_state:
        client.state.save(OPTIMIZER, client.number, step.optimizer_state(), client.folded)
    return trained
