"""A client's round of a task: shared weights in, updates on its own clips, difference out.

The personal part, such as the head, stays in the client's folder.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from torch import Tensor

from common.errors import DataError
from fl_client import protocol, updates
from fl_client.client_round import ClientRound, RoundResult, means
from fl_client.client_state import ClientState
from fl_client.federation_settings import TaskFederation
from fl_client.limits import NO_LIMITS, Limits
from fl_client.round_plan import NO_BUDGET, Budget, RoundPlan
from fl_client.task_data import ClientClips
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.scoring import NoUsableClips, score_clips
from ssl_core.downstream.sharing import Parts, divide
from ssl_core.downstream.task_model import TaskModel, load_upstream
from ssl_core.downstream.task_step import TaskReport, TaskStep
from ssl_core.downstream.task_work import TaskWork
from ssl_core.planning.processor import use_threads
from ssl_core.planning.step_plan import Plan

PERSONAL = "personal"
"""Kind of the files with a client's personal part."""


class Resident:
    """The model of this process, its parts, and the initial personal part of every client."""

    def __init__(self, settings: TaskFederation, labels: int) -> None:
        """Load the backbone and divide the model.

        Raises:
            ShortwaveError: as `load_upstream` and `divide`.
        """
        upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
        self.backbone = upstream.digest("frames")[:32]
        """Digest of the backbone that all clients start from."""
        self.model = TaskModel.new(upstream, settings.recipe, labels, settings.seed)
        self.parts: Parts = divide(
            self.model,
            settings.method,
            settings.share,
            layers=settings.shared_layers,
            rank=settings.lora_rank,
            seed=settings.seed,
        )
        own = self.tensors(self.parts.personal)
        self.first = {name: value.clone() for name, value in own.items()}

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """The named parameters, each `[...]`, in the model's order; they share its memory."""
        found = self.model.named_parameters()
        return {name: value.detach() for name, value in found if name in names}

    def state_dict(self) -> dict[str, Tensor]:
        """The shared part by parameter name, each `[...]`; it shares the model's memory."""
        return self.tensors(self.parts.shared)

    def load_personal(self, client: ClientState, number: int) -> None:
        """Load a client's personal part from before round `number`, or the initial one."""
        before = [kept for kept in client.rounds(PERSONAL) if kept < number]
        stored = client.load(PERSONAL, before[-1]) if before else self.first
        for name, value in self.tensors(self.parts.personal).items():
            value.copy_(stored[name])


@functools.lru_cache(maxsize=1)
def resident(settings: TaskFederation, labels: int) -> Resident:
    """The only model of this process, used by every round and client."""
    return Resident(settings, labels)


def train_task_round(
    weights: ArrayRecord,
    instructions: Mapping[str, Any],
    clips: ClientClips,
    settings: TaskFederation,
    budget: Budget = NO_BUDGET,
    state: Path | None = None,
    limits: Limits = NO_LIMITS,
    evaluate_only: bool = False,
) -> RoundResult:
    """Train on a client's clips, and score the model on its own test clips before and after.

    If memory runs out, the round starts again with a leaner exact plan.

    Args:
        weights: of the shared part; emptied as they are used.
        instructions: see `protocol.instructions`.
        clips: the client's clips.
        settings: of the run.
        budget: memory of this device.
        state: folder for what is kept between rounds; None is `default_folder()`.
        limits: the owner's limits; training waits while one is exceeded.
        evaluate_only: train nothing except, with fedrep, the head, which is first fitted to the
            received weights; keep nothing.

    Raises:
        ProtocolError: the weights do not fit the model.
        StateLost: the weights are a difference to weights that this client no longer has.
        DataError: no usable audio.
    """
    started = time.monotonic()
    plan = settings.step_plan()
    use_threads(budget.threads or plan.threads)
    same = dataclasses.replace(settings, data=None, output=None, resume=None)
    own = resident(same, len(clips.labels))
    chosen = _round_plan(own, clips, settings, plan, budget, updates.size(weights))
    # Move first: the exchange refers to the model's tensors, and a later move would replace them.
    own.model.to(plan.device)
    if instructions.get("backbone") != own.backbone:
        raise protocol.ProtocolError(
            f"the checkpoint '{settings.checkpoint}' of this device is not that of the server"
        )
    labels = instructions.get("labels")
    if labels is not None and labels != protocol.labels_digest(clips.labels):
        raise protocol.ProtocolError(
            f"the {len(clips.labels)} labels of this device's corpus are not those of the server, "
            "with which it shares a head"
        )
    client = ClientRound(settings, instructions, clips.key, chosen, budget, limits, state, started)
    client.receive(own, weights)
    trained = client.run(lambda: _train(own, clips, client, settings, evaluate_only))
    if own.parts.personal and not evaluate_only:
        personal = own.tensors(own.parts.personal)
        client.state.save(PERSONAL, client.number, personal, client.folded)
    update = ArrayRecord() if evaluate_only else client.exchange.difference()
    samples = [clip.piece.samples for clip in clips.train]
    metrics = means(trained.reports, ("loss",)) | {
        "samples": sum(samples),
        "clips": sum(report.clips for report in trained.reports),
        "test_clips": trained.scored,
        "test_before": trained.before,
        "test_after": trained.after,
        "length": float(np.mean(samples)) / SAMPLE_RATE,
    }
    return client.result(update, metrics, trained.loader.skips)


def _round_plan(
    own: Resident,
    clips: ClientClips,
    settings: TaskFederation,
    plan: Plan,
    budget: Budget,
    messages: int,
) -> RoundPlan:
    """The plans of a round, whose longest clip decides what fits in memory."""
    longest = max(clip.piece.samples for clip in clips.train) / SAMPLE_RATE
    plan = dataclasses.replace(plan, length=longest)
    if own.model.wav2vec2 is None:
        return RoundPlan(None, plan, budget, messages)
    work = TaskWork(
        task=settings.task,
        architecture=own.model.wav2vec2.config,
        recipe=own.model.recipe,
        labels=len(clips.labels),
        share=settings.share,
        shared_layers=settings.shared_layers,
        lora_rank=settings.lora_rank,
        cached=True,
    )
    return RoundPlan(work, plan, budget, messages)


def _train(
    own: Resident,
    clips: ClientClips,
    client: ClientRound,
    settings: TaskFederation,
    evaluate_only: bool,
) -> "_Trainer":
    """Take a round from the received weights and the client's personal part."""
    own.load_personal(client.state, client.number)
    trainer = _Trainer(own, clips, client, settings)
    trainer.run(evaluate_only)
    return trainer


class _Trainer:
    """Updates and scores of one client in one round."""

    def __init__(
        self, own: Resident, clips: ClientClips, client: ClientRound, settings: TaskFederation
    ) -> None:
        self.own, self.clips, self.client, self.settings = own, clips, client, settings
        self.reports: list[TaskReport] = []
        self.before = self.after = 0.0
        """Scores before and after training."""
        self.scored = 0
        """Usable test clips."""
        # The final evaluation has number `rounds`, which is past the end of the schedule.
        self.rates = Rates(own.model.recipe).at(min(client.number, self.settings.rounds - 1))
        # The loader caches on disk the features that do not depend on `trained`. With fedrep the
        # backbone must count as trained from the start, although the head is trained first.
        self.trained = own.parts.shared if self.settings.method == "fedrep" else own.parts.trained
        self.step = self._step(self.trained)
        recipe, frozen = own.model.recipe, FrozenPart(self.step)
        self.loader = ClipLoader(clips.root, clips.labels, recipe, frozen)

    def _step(self, names: Collection[str]) -> TaskStep:
        plan, seed = self.client.round_plan.plan, self.settings.seed
        return TaskStep(self.own.model, plan, unfrozen=False, seed=seed, trained=names)

    def run(self, evaluate_only: bool) -> None:
        """Score, train, and score again."""
        settings, parts = self.settings, self.own.parts
        with contextlib.closing(self.loader.cache):
            self.before = self.score()
            if settings.method == "fedrep":
                self.train(parts.personal, settings.head_updates or settings.local_updates)
                if not evaluate_only:
                    self.train(parts.shared, settings.local_updates)
            elif not evaluate_only:
                self.train(parts.trained, settings.local_updates)
            self.after = self.score() if self.reports else self.before

    def score(self) -> float:
        """Score of the model on the client's test clips; 0 if none is usable."""
        recipe = self.own.model.recipe
        try:
            found = score_clips(self.step, self.loader, self.clips.test, recipe.batch)
        except NoUsableClips:
            return 0.0
        self.scored = len(found.clips)
        return found.score(recipe.metric)

    def train(self, names: Collection[str], updates: int) -> None:
        """Take updates of the named parameters, passing through the clips in a seeded order.

        Raises:
            DataError: none of the clips drawn is usable.
        """
        settings, model, key = self.settings, self.own.model, self.clips.key
        step = self.step if names == self.trained else self._step(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        size = model.recipe.batch
        batches = -(-len(self.clips.train) // size)
        first, taken = self.client.number * updates, len(self.reports)
        for update in range(first, first + updates):
            self.client.before_update(step)
            epoch, place = divmod(update, batches)
            clips = self.loader.order(self.clips.train, settings.seed, key, epoch)
            made = self.loader.batch(clips[place * size : (place + 1) * size])
            if made is not None:
                self.reports.append(step.update(made[0], update, self.rates, key))
        if len(self.reports) == taken:
            examples = self.loader.examples
            raise DataError(f"none of the clips to train on can be used, such as: {examples[-1]}")
