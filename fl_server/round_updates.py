"""The updates of one round: checks each reply, folds its update and averages the metrics."""

from collections.abc import Mapping

import numpy as np
from flwr.app import Message

from fl_client import protocol, updates
from fl_client.encoding import Decoded
from fl_client.federation_settings import RunSettings
from fl_client.protocol import ProtocolError
from fl_server.fold import Fold, RejectedUpdate
from fl_server.replies import metrics_in

_SUMMED = {"samples", "crops", "clips", "test_clips", "updates", "applied", "fallbacks"}
_LARGEST = {"train_seconds", "paused_seconds", "peak_bytes", "predicted_bytes", "memory_bytes"}


class RoundUpdates:
    """What the cohort has sent so far."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], settings: RunSettings, number: int
    ) -> None:
        """Start without updates.

        Args:
            shapes: of the global weights, by parameter name.
            settings: of the run.
            number: round, from 0.
        """
        self.shapes, self.settings, self.number = shapes, settings, number
        self.names = protocol.metrics_of(settings.task)
        self.fold = Fold(shapes)
        self.bytes = 0
        """Size of the updates folded."""
        self._metrics: dict[int, dict[str, float]] = {}

    def add(self, key: int, reply: Message) -> dict[str, float]:
        """Fold a client's update; returns the client's metrics.

        Raises:
            ProtocolError: an error, or a reply that is not as agreed.
            RejectedUpdate: the update must not reach the model.
        """
        metrics = metrics_in(reply, self.names)
        record = reply.content.array_records.get(protocol.UPDATE)
        if record is None:
            raise ProtocolError("the reply has no update")
        if key in self._metrics:
            raise ProtocolError("a second update in the same round")
        if metrics["round"] != self.number:
            raise ProtocolError(f"an update of round {int(metrics['round']) + 1}")
        if not metrics["applied"]:
            raise RejectedUpdate("no update had a finite gradient")
        samples, kind = int(metrics["samples"]), self.settings.encoding
        if kind == "fp32":
            self.fold.add(updates.Views(record), samples)
        else:
            self.fold.add(Decoded(record, self.shapes, kind), samples, partial=True)
        self._metrics[key] = metrics
        self.bytes += updates.size(record)
        return metrics

    def clients(self) -> tuple[dict[str, float], ...]:
        """Metrics of each client whose update was folded, with its `key`, ordered by key."""
        return tuple({"key": float(key), **self._metrics[key]} for key in sorted(self._metrics))

    def averages(self) -> dict[str, float]:
        """Metrics of the round: means weighted by audio, sums of counts, maxima of resources."""
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
        return result
