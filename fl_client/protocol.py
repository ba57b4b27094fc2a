"""What server and clients say to each other: names of records, and the fixed list of metrics."""

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from common.errors import ShortwaveError

WEIGHTS = "weights"
"""ArrayRecord, server to client: bundles of the global weights by parameter name."""
UPDATE = "update"
"""ArrayRecord, client to server: bundles of local minus global weights by parameter name."""
TASK = "task"
"""ConfigRecord, server to client: what to do."""
METRICS = "metrics"
"""MetricRecord, client to server: nothing but the names below."""

CLIENT_FAILED = 100
"""Error code of a client that could not do its task, such as for want of usable audio."""

SKIP_REASONS = ("missing", "unreadable", "truncated", "not finite", "silent", "empty")

TRAIN_METRICS = (
    "round",  # that was asked for
    "samples",  # different audio trained on, in samples at 16 kHz; the update's weight
    "crops",  # crops trained on, repeats included
    "updates",  # updates taken
    "applied",  # of those, the ones with a finite gradient
    "loss",
    "contrastive",
    "diversity",
    "penalty",
    "accuracy",
    "perplexity",
    "code_entropy",
    "masked_share",
    "distinct_negatives",
    "gradient_norm",
    "train_seconds",
    "paused_seconds",  # of them, waited while a limit of the device's owner was passed
    "peak_bytes",
    "predicted_bytes",  # of the plan's estimate; 0 where nothing was planned
    "memory_bytes",  # that the process may take; 0 where nothing was planned
    "length",  # seconds in a crop
    "batch",
    "micro_batch",
    "fallbacks",  # times that memory ran out or short and a leaner plan was taken
    *("skipped_" + reason.replace(" ", "_") for reason in SKIP_REASONS),
)
"""The only numbers that leave a client with an update."""

TASK_SKIP_REASONS = (*SKIP_REASONS, "too short")

TASK_METRICS = (
    "round",
    "samples",  # different audio trained on, in samples at 16 kHz; the update's weight
    "clips",  # clips trained on, repeats included
    "updates",
    "applied",
    "loss",  # mean over the clips trained on
    "test_clips",  # of the client's own that it does not train on, as far as they can be used
    "test_before",  # score on them of the model as received, with the client's personal part; 0
    # without any
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
    *("skipped_" + reason.replace(" ", "_") for reason in TASK_SKIP_REASONS),
)
"""The only numbers that leave a client with an update of a task. Scores are accuracies, or error
rates of tasks that transcribe."""

INFO_METRICS = ("partition", "crops", "seconds")
"""The only numbers that leave a client when it is asked who it is."""


def metrics_of(task: str) -> tuple[str, ...]:
    """The metrics that come with an update, in pretraining (no task) or in a task."""
    return TASK_METRICS if task else TRAIN_METRICS


class ProtocolError(ShortwaveError):
    """A message that is not as agreed."""


def task(**values: int | float | str) -> ConfigRecord:
    """The instructions of a message.

    Of a train message: `run` (identity of the run), `round`, `first_update` (global number of the
    first update), `updates` (how many), `encoding` of the weights in it, `base_round` (round whose
    weights they are to be added to; -1: they are whole) and `folded_round` (last round in which
    this client's update counted; -1: none), and of a task `backbone` (digest of the backbone that
    everyone begins with). Rounds from 0. An evaluate message of a task is the same.
    """
    return ConfigRecord(dict(values))


def check_metrics(content: RecordDict, names: tuple[str, ...]) -> dict[str, float]:
    """The metrics of a reply, exactly the names agreed and all finite.

    Raises:
        ProtocolError: missing, unexpected or not finite.
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
