"""Messages of server and clients: record names, instructions, the fixed lists of metrics."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from common import strict_json
from common.errors import DataError, ShortwaveError
from ssl_core.wav2vec2.config import ModelConfig

WEIGHTS = "weights"
"""ArrayRecord, server to client: bundles of global weights by parameter name."""
UPDATE = "update"
"""ArrayRecord, client to server: bundles of local minus global weights by parameter name."""
INSTRUCTIONS = "instructions"
"""ConfigRecord, server to client: what the client does in this round."""
METRICS = "metrics"
"""MetricRecord, client to server: only the names below."""

Encoding = Literal["fp32", "bf16", "int8", "int4", "topk"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""How tensors travel, see `encoding`."""

CLIENT_FAILED = 100
"""Error code of a client that could not answer, for example because it has no usable audio."""

SKIP_REASONS = ("missing", "unreadable", "truncated", "not finite", "silent", "empty")
TASK_SKIP_REASONS = (*SKIP_REASONS, "too short")


def skip_metric(reason: str) -> str:
    """Name of the metric that counts the crops or clips skipped for a reason."""
    return "skipped_" + reason.replace(" ", "_")


TRAIN_METRICS = (
    "round",  # round of the instructions
    "samples",  # distinct audio trained on, in samples at 16 kHz; the update's weight
    "crops",  # crops trained on, repeats included
    "updates",  # optimizer updates taken
    "applied",  # updates with a finite gradient
    "loss",
    "contrastive",
    "diversity",
    "penalty",
    "accuracy",
    "perplexity",
    "code_entropy",
    "masked_fraction",
    "distinct_negatives",
    "gradient_norm",
    "train_seconds",
    "paused_seconds",  # part of train_seconds spent waiting for the owner's limits
    "peak_bytes",
    "predicted_bytes",  # the plan's estimated peak; 0 without a memory budget
    "memory_bytes",  # memory budget of the process; 0 without one
    "length",  # seconds in a crop
    "batch",
    "micro_batch",
    "fallbacks",  # changes to a leaner plan because memory ran short or out
    *map(skip_metric, SKIP_REASONS),
)
"""The only numbers that leave a client with an update of pretraining."""

TASK_METRICS = (
    "round",
    "samples",  # distinct audio trained on, in samples at 16 kHz; the update's weight
    "clips",  # clips trained on, repeats included
    "updates",
    "applied",
    "loss",  # mean over the clips trained on
    "test_clips",  # usable clips of the client's own test set
    "test_before",  # score on them of the received weights with the client's personal part; 0 if
    # there are none
    "test_after",  # score on them after training
    "train_seconds",
    "paused_seconds",
    "peak_bytes",
    "predicted_bytes",
    "memory_bytes",
    "length",  # mean seconds of the clips trained on
    "batch",
    "micro_batch",
    "fallbacks",
    *map(skip_metric, TASK_SKIP_REASONS),
)
"""The only numbers that leave a client with an update of a task. Scores are accuracies, or error
rates for tasks that transcribe."""

INFO_METRICS = ("partition", "crops", "seconds")
"""The only numbers that leave a client when it describes itself."""


NOTICE = "notice"
"""What a query asks that only tells the device's owner something."""
_NOTICES = {
    "double": "another device has the same number as this one, {number}: only one of them takes "
    "part. If this card or its state was copied from another device, stop this one, remove "
    "identity-*.json from its state folder (--state) and start it again; with --partition, give "
    "each device its own",
    "version": "the server does not understand this device: install the same version of Shortwave "
    "on both",
    "rejected": "the server could not use this device's update of round {number}; its log says why",
}


def notice(name: str, number: int = 0) -> ConfigRecord:
    """A query that shows its owner one of a fixed list of notices, since servers are not trusted.

    Args:
        name: `double`, `version` or `rejected`.
        number: of the device or round that the notice names.
    """
    return instructions(ask=NOTICE, notice=name, number=number)


def notice_text(values: Mapping[str, object]) -> str:
    """The text of a notice; empty for any other query.

    Raises:
        ProtocolError: an unknown notice.
    """
    if values.get("ask") != NOTICE:
        return ""
    text, number = _NOTICES.get(str(values.get("notice"))), values.get("number")
    if text is None or not isinstance(number, int):
        raise ProtocolError("an unknown notice")
    return text.format(number=number)


def metrics_of(task: str) -> tuple[str, ...]:
    """Names of the metrics sent with an update; `task` is empty in pretraining."""
    return TASK_METRICS if task else TRAIN_METRICS


def skip_reasons_of(task: str) -> tuple[str, ...]:
    """Reasons to skip a crop, or a clip of a task."""
    return TASK_SKIP_REASONS if task else SKIP_REASONS


class ProtocolError(ShortwaveError):
    """A message that breaks the protocol."""


def instructions(**values: int | float | str) -> ConfigRecord:
    """The instructions of a message; train and evaluate messages have the same keys.

    Args:
        values: `run` (identity of the run), `round` (from 0), `first_update` (global number of the
            first update), `updates` (how many to take), `encoding` of the weights, `base_round`
            (round to whose weights they are added; -1 for whole weights), `folded_round` (last
            round in which this client's update was folded; -1 for none); for a task, `backbone`
            (digest of the backbone that all clients start from) and, where the head is shared,
            `labels` (see `labels_digest`); for pretraining, `architecture` (see
            `architecture_text`). A query has only `ask="describe"`, or is a `notice`.
    """
    return ConfigRecord(dict(values))


def labels_digest(labels: Sequence[str]) -> str:
    """Digest of a task's labels in their order, which is that of the head's outputs."""
    return hashlib.sha256(strict_json.dumps(list(labels)).encode()).hexdigest()


def architecture_text(config: ModelConfig) -> str:
    """The architecture as JSON: transformers' `config.json`, with `do_normalize` in it."""
    return strict_json.dumps(config.to_hf() | {"do_normalize": config.do_normalize})


def architecture_in(instructions: Mapping[str, object], default: ModelConfig) -> ModelConfig:
    """The architecture that the server trains; `default` if it does not say, as version 0.1.

    Raises:
        ProtocolError: it is not an architecture that this version knows.
    """
    text = instructions.get("architecture")
    if text is None:
        return default
    try:
        return ModelConfig.from_hf(json.loads(str(text)), "the server's architecture")
    except (ValueError, DataError) as error:
        raise ProtocolError(f"the server's architecture cannot be used: {error}") from None


def check_metrics(content: RecordDict, names: tuple[str, ...]) -> dict[str, float]:
    """The metrics of a reply, checked to be exactly `names` and finite.

    Raises:
        ProtocolError: a metric is missing, unknown or not finite.
    """
    record = content.get(METRICS)
    if not isinstance(record, MetricRecord):
        raise ProtocolError("the reply has no metrics")
    missing, unknown = set(names) - set(record), set(record) - set(names)
    if missing or unknown:
        raise ProtocolError(f"metrics missing: {sorted(missing)}, not agreed: {sorted(unknown)}")
    values = {}
    for name in names:
        value = record[name]
        if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
            raise ProtocolError(f"metric {name} is not a finite number")
        values[name] = float(value)
    return values
