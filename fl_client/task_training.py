"""A client's round of a task: shared weights in, some updates on its own clips, the difference out.

Its personal part, such as the head, stays in the client's folder.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from ssl_core.downstream.loading import ClipLoader
from torch import Tensor

from common.errors import DataError
from fl_client import protocol, updates
from fl_client.client_state import ClientState, default_folder
from fl_client.exchange import exchange_of
from fl_client.federation_settings import FederationSettings
from fl_client.limits import NO_LIMITS, Limits
from fl_client.local_training import RoundResult, peak_of
from fl_client.round_plan import NO_BUDGET, Budget, Ladder
from fl_client.task_data import TaskShare
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.scoring import NoUsableClips, score_clips
from ssl_core.downstream.sharing import Parts, divide
from ssl_core.downstream.task_model import TaskModel, load_upstream
from ssl_core.downstream.task_step import TaskReport, TaskStep
from ssl_core.downstream.task_work import TaskWork
from ssl_core.planning.allocator import is_out_of_memory

PERSONAL = "personal"
"""What the personal part is called in a client's folder."""


class Resident:
    """The model of this process, its parts, and the personal part as every client begins."""

    def __init__(self, settings: FederationSettings, labels: int) -> None:
        """Load the backbone and divide the model; raises as `load_upstream` and `divide`."""
        upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
        self.backbone = upstream.digest("frames")[:32]
        """Of the backbone that everyone begins with."""
        recipe = settings.task_recipe()
        self.model = TaskModel.new(upstream, recipe, labels, settings.seed)
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
        """Some of the parameters, on their own memory, in the model's order."""
        found = self.model.named_parameters()
        return {name: value.detach() for name, value in found if name in names}

    def state_dict(self) -> dict[str, Tensor]:
        """The shared part."""
        return self.tensors(self.parts.shared)

    def load_personal(self, client: ClientState, number: int) -> None:
        """Take a client's personal part as it was before a round, or as everyone begins."""
        before = [kept for kept in client.rounds(PERSONAL) if kept < number]
        stored = client.load(PERSONAL, before[-1]) if before else self.first
        for name, value in self.tensors(self.parts.personal).items():
            value.copy_(stored[name])


@functools.lru_cache(maxsize=1)
def resident(settings: FederationSettings, labels: int) -> Resident:
    """The one model of this process; every round and client passes through it."""
    return Resident(settings, labels)


def train_task_round(
    weights: ArrayRecord,
    task: Mapping[str, Any],
    share: TaskShare,
    settings: FederationSettings,
    budget: Budget = NO_BUDGET,
    state: Path | None = None,
    limits: Limits = NO_LIMITS,
    evaluate_only: bool = False,
) -> RoundResult:
    """Train on a client's clips, and score the model on its own held-out ones before and after.

    Args:
        weights: of the shared part, emptied as it is used.
        task: of the round, see `protocol.task`.
        share: the client's clips.
        settings: of the run.
        budget: what this device has.
        state: folder for what is kept between rounds; None is `default_folder()`.
        limits: of the device's owner; training waits while one is passed.
        evaluate_only: change nothing but, with fedrep, the head, which is fitted to the weights
            first.

    Raises:
        ProtocolError: weights that do not fit the model.
        StateLost: the message is a difference to weights that are not here.
        DataError: no usable audio.
    """
    started, number = time.monotonic(), int(task["round"])
    recipe = settings.task_recipe()
    plan = settings.task_plan(recipe)
    if plan.threads:
        torch.set_num_threads(plan.threads)
    own = resident(dataclasses.replace(settings, data="", output="", resume=""), len(share.labels))
    longest = max(clip.piece.samples for clip in share.train) / SAMPLE_RATE
    ladder = Ladder(
        own.model.wav2vec2.config if own.model.wav2vec2 is not None else None,
        TaskWork(
            recipe=recipe,
            labels=len(share.labels),
            share=settings.share,
            shared_layers=settings.shared_layers,
            lora_rank=settings.lora_rank,
            cached=True,
        ),
        dataclasses.replace(plan, length=longest),
        budget,
        updates.size(weights),
    )
    plan = ladder.plan
    # Before any tensor of it is taken: moved later, it would leave them behind.
    own.model.to(plan.device)
    if task.get("backbone") != own.backbone:
        raise protocol.ProtocolError(
            f"the checkpoint '{settings.checkpoint}' of this device is not that of the server"
        )
    client = ClientState(state or default_folder(), str(task["run"]), share.key)
    exchange = exchange_of(own, weights, task, client, settings.encoding)
    while True:
        exchange.load()
        own.load_personal(client, number)
        trainer = _Trainer(own, ladder, share, settings, limits, number)
        try:
            before, after = trainer.run(evaluate_only)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not ladder.step_down("out of memory"):
                raise
    if own.parts.personal and not evaluate_only:
        personal = own.tensors(own.parts.personal)
        client.save(PERSONAL, number, personal, int(task["folded_round"]))
    update = ArrayRecord() if evaluate_only else exchange.difference()
    reports = [report for report in trainer.reports if report.applied]
    metrics = {
        "round": number,
        "samples": sum(clip.piece.samples for clip in share.train),
        "clips": sum(report.clips for report in trainer.reports),
        "updates": len(trainer.reports),
        "applied": len(reports),
        "loss": float(np.mean([report.loss for report in reports])) if reports else 0.0,
        "test_clips": trainer.scored,
        "test_before": before,
        "test_after": after,
        "train_seconds": time.monotonic() - started,
        "paused_seconds": sum(trainer.paused),
        "peak_bytes": peak_of(plan.device),
        "predicted_bytes": ladder.predicted,
        "memory_bytes": budget.memory,
        "length": float(np.mean([clip.piece.samples for clip in share.train])) / SAMPLE_RATE,
        "batch": recipe.batch,
        "micro_batch": ladder.plan.chunk,
        "fallbacks": ladder.fallbacks,
    }
    for reason in protocol.TASK_SKIP_REASONS:
        metrics["skipped_" + reason.replace(" ", "_")] = trainer.loader.skips[reason]
    return RoundResult(update, {name: metrics[name] for name in protocol.TASK_METRICS})


class _Trainer:
    """Updates and scores of one client in one round."""

    def __init__(
        self,
        own: Resident,
        ladder: Ladder,
        share: TaskShare,
        settings: FederationSettings,
        limits: Limits,
        number: int,
    ) -> None:
        self.own, self.ladder, self.share, self.settings = own, ladder, share, settings
        self.limits, self.number = limits, number
        self.reports: list[TaskReport] = []
        self.scored = 0
        """Test clips that could be used."""
        self.paused: list[float] = []
        # The last evaluation comes after the last round; the schedule ends with that.
        self.rates = Rates(own.model.recipe).at(min(number, settings.rounds - 1))
        # What it keeps on disk no round changes: features of a backbone that is trained would
        # never be asked for again.
        self.names = own.parts.shared if settings.method == "fedrep" else own.parts.trained
        self.loader = ClipLoader(share.root, share.labels, self._step(self.names))

    def _step(self, names: Collection[str]) -> TaskStep:
        seed = self.settings.seed
        return TaskStep(self.own.model, self.ladder.plan, unfrozen=False, seed=seed, trained=names)

    def run(self, evaluate_only: bool) -> tuple[float, float]:
        """Take the round; the scores before and after."""
        settings, parts = self.settings, self.own.parts
        with contextlib.closing(self.loader.cache):
            before = self.score()
            if settings.method == "fedrep":
                self.train(parts.personal, settings.head_updates or settings.local_updates)
                if not evaluate_only:
                    self.train(parts.shared, settings.local_updates)
            elif not evaluate_only:
                self.train(parts.trained, settings.local_updates)
            return before, self.score() if self.reports else before

    def score(self) -> float:
        """Of the model as it is on the client's own test clips; 0 when none can be used."""
        recipe = self.own.model.recipe
        try:
            found = score_clips(self.loader, self.share.test, recipe.batch)
        except NoUsableClips:
            return 0.0
        self.scored = len(found.clips)
        return found.score(recipe.metric)

    def train(self, names: Collection[str], updates: int) -> None:
        """Take updates of some of the parameters, passing through the clips in a seeded order.

        Raises:
            DataError: none of the clips that came up can be used.
        """
        share, settings, model = self.share, self.settings, self.own.model
        step = self.loader.step if names == self.names else self._step(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        size = model.recipe.batch
        batches = -(-len(share.train) // size)
        first, taken = self.number * updates, len(self.reports)
        for update in range(first, first + updates):
            self.paused.append(self.limits.wait())
            if self.ladder.watch():
                step.change_plan(self.ladder.plan)
            epoch, place = divmod(update, batches)
            clips = self.loader.order(share.train, settings.seed, share.key, epoch)
            made = self.loader.batch(clips[place * size : (place + 1) * size])
            if made is not None:
                self.reports.append(step.update(made[0], update, self.rates, share.key))
        if len(self.reports) == taken:
            examples = self.loader.examples
            raise DataError(f"none of the clips to train on can be used, such as: {examples[-1]}")
