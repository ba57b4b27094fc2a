"""What server and clients say to each other: names of records, and the fixed list of metrics."""

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from partitions.errors import ShortwaveError

WEIGHTS = "weights"
"""ArrayRecord, server to client: the global weights by parameter name, fp32."""
UPDATE = "update"
"""ArrayRecord, client to server: local minus global weights by parameter name."""
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

INFO_METRICS = ("partition", "crops", "seconds")
"""The only numbers that leave a client when it is asked who it is."""


class ProtocolError(ShortwaveError):
    """A message that is not as agreed."""


def task(**values: int | float | str) -> ConfigRecord:
    """The instructions of a message.

    Of a train message: `run` (identity of the run), `round`, `first_update` (global number of the
    first update), `updates` (how many), `encoding` of the weights in it, `base_round` (round whose
    weights they are to be added to; -1: they are whole) and `folded_round` (last round in which
    this client's update counted; -1: none). Rounds from 0.
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
