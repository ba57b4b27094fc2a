"""The updates of one round: checks each reply, folds its update and averages the metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, Message

from fl_client import protocol, updates
from fl_client.encoding import Decoded
from fl_client.federation_settings import RunSettings
from fl_client.protocol import ProtocolError
from fl_server.fold import Fold, Measured, RejectedUpdate, Update
from fl_server.guards import Guards, judge, largest_weight
from fl_server.replies import metrics_in
from fl_server.roster import Client
from fl_server.spool import Spool
from partitions.sampling import SAMPLE_RATE

_SUMMED = {"samples", "crops", "clips", "test_clips", "updates", "applied", "fallbacks"}
_LARGEST = {"train_seconds", "paused_seconds", "peak_bytes", "predicted_bytes", "memory_bytes"}


class Settled(NamedTuple):
    """What became of the updates of a round, by the clients' keys."""

    refused: dict[int, str]
    """Why an update was not folded after all."""
    bounded: dict[int, str]
    """What of a folded update was bounded."""


class RoundUpdates:
    """What the cohort has sent so far."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        settings: RunSettings,
        number: int,
        guards: Guards,
        folder: Path | None = None,
    ) -> None:
        """Start without updates.

        Args:
            shapes: of the global weights, by parameter name.
            settings: of the run.
            number: round, from 0.
            guards: what earlier rounds say; it learns from this one.
            folder: where updates wait that are not folded at once.
        """
        self.shapes, self.settings, self.number = shapes, settings, number
        self.names = protocol.metrics_of(settings.task)
        self.fold = Fold(shapes)
        self.guards = guards
        self.bytes = 0
        """Size of the updates folded."""
        self._spool = Spool(folder)
        self._metrics: dict[int, dict[str, float]] = {}
        self._measured: dict[int, Measured] = {}
        self._weights_bounded: dict[int, str] = {}
        self._guarded: dict[str, float] = {}

    def add(self, client: Client, reply: Message) -> dict[str, float]:
        """Fold a client's update, or keep it for `settle`; returns the client's metrics.

        Raises:
            ProtocolError: an error, or a reply that is not as agreed.
            RejectedUpdate: the update must not reach the model.
            OSError: no space on disk for an update that waits.
        """
        metrics = metrics_in(reply, self.names)
        record = reply.content.array_records.get(protocol.UPDATE)
        if record is None:
            raise ProtocolError("the reply has no update")
        if client.key in self._metrics:
            raise ProtocolError("a second update in the same round")
        if metrics["round"] != self.number:
            raise ProtocolError(f"an update of round {int(metrics['round']) + 1}")
        if not metrics["applied"]:
            raise RejectedUpdate("no update had a finite gradient")
        weight = self._weight(client, metrics["samples"])
        update, partial = self._tensors(record)
        measured = self.fold.check(update, partial)
        if self.guards.trusts(client.key, measured):
            self.fold.add(update, weight, partial, measured=measured)
        else:
            self._spool.keep(client.key, record)
        self._metrics[client.key] = metrics | {"samples": float(weight)}
        self._measured[client.key] = measured
        self.bytes += updates.size(record)
        return self._metrics[client.key]

    def _weight(self, client: Client, stated: float) -> int:
        """The weight of an update whose client states so many samples; bounds what it may not."""
        if stated <= 0:
            raise RejectedUpdate("the update comes from no audio")
        if stated != int(stated):
            raise ProtocolError(f"metric samples is {stated}, not a whole number")
        most = largest_weight(client, self.settings)
        if most <= 0:
            raise RejectedUpdate("the client said that it has no audio when it joined")
        if stated > most:
            self._weights_bounded[client.key] = (
                f"{stated / SAMPLE_RATE:.3g} s of audio counted as {most / SAMPLE_RATE:.3g} s"
            )
        return min(int(stated), most)

    def _tensors(self, record: ArrayRecord) -> tuple[Update, bool]:
        """The tensors of an update, and whether some may be missing."""
        kind = self.settings.encoding
        if kind == "fp32":
            return updates.Views(record), False
        return Decoded(record, self.shapes, kind), True

    def settle(self) -> Settled:
        """Judge the cohort once all replies are there: fold, bound or refuse what waits."""
        cohort, refused = judge(self._measured), dict[int, str]()
        bounded, shortened = dict(self._weights_bounded), 0
        self.guards.learn(cohort)
        for key in self._spool.waiting():
            record = self._spool.take(key)
            scale = self.guards.scale(self._measured[key], cohort)
            reason = ""
            if self.guards.refuses(key):
                reason = "its updates do not point to the side of the other clients'"
            else:
                try:
                    self._fold(key, record, scale)
                except RejectedUpdate as error:
                    reason = str(error)
            if reason:
                refused[key] = reason
                bounded.pop(key, None)
                del self._metrics[key]
                self.bytes -= updates.size(record)
            elif scale < 1:
                shortened += 1
                times = self._measured[key].norm / cohort.norm
                what = f"a norm of {times:.3g} medians of the cohort scaled down to one"
                bounded[key] = "; ".join(filter(None, (bounded.get(key), what)))
            del record
        self._spool.close()
        self._guarded = {
            "update_norm": cohort.norm,
            "agreement": cohort.agreement,
            "weights_bounded": len(self._weights_bounded.keys() & self._metrics.keys()),
            "norms_bounded": shortened,
            "refused": len(refused),
        }
        return Settled(refused, bounded)

    def _fold(self, key: int, record: ArrayRecord, scale: float) -> None:
        """Fold an update that has waited."""
        weight, measured = int(self._metrics[key]["samples"]), self._measured[key]
        update, partial = self._tensors(record)
        self.fold.add(update, weight, partial, scale=scale, measured=measured)

    def folded(self) -> list[int]:
        """Keys of the clients whose updates count, sorted."""
        return sorted(self._metrics)

    def clients(self) -> tuple[dict[str, float], ...]:
        """Metrics of each client whose update was folded, with its `key`, ordered by key."""
        return tuple({"key": float(key), **self._metrics[key]} for key in sorted(self._metrics))

    def averages(self) -> dict[str, float]:
        """Metrics of the round: means weighted by audio, sums, maxima of resources, the guards'."""
        clients = self.clients()
        weights = np.array([client["samples"] for client in clients])
        result: dict[str, float] = {}
        for name in self.names:
            values = np.array([client[name] for client in clients])
            if name in _SUMMED or name.startswith("skipped_"):
                result[name] = float(values.sum())
            elif name in _LARGEST:
                result[name] = float(values.max())
            else:
                result[name] = float((values * weights).sum() / weights.sum())
        return result | self._guarded
