"""Flower's ClientApp: says what a client has, and trains a round on it.

The same app runs in a SuperNode, in Flower's simulation and in `simulation/`.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from common.errors import ShortwaveError
from fl_client import protocol
from fl_client.federation_settings import FederationSettings
from fl_client.limits import Limits
from fl_client.local_data import share_of
from fl_client.local_training import train_round
from fl_client.round_plan import budget_of
from fl_client.task_data import task_share_of
from fl_client.task_training import train_task_round
from partitions.sampling import SAMPLE_RATE
from partitions.speakers import seconds_of

log = logging.getLogger("shortwave.client")
app = ClientApp()
Handler = Callable[[Message, Context], Message]


def answering(handler: Handler) -> Handler:
    """Answer an error with its kind; the text, which may hold paths or names, stays here.

    Of the system's errors, such as a full disk, its own words go along.

    A simulated client (`simulated` in its node config) sends the text as well.
    """

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            # Flower would send the text of whatever comes out of here.
            if isinstance(error, ShortwaveError):
                log.error("%s", error)
            else:
                log.exception("the client failed")
            reason = type(error).__name__
            if context.node_config.get("simulated"):
                reason += f": {error}"
            elif isinstance(error, OSError) and error.errno:
                reason += f": {os.strerror(error.errno)}"  # without the path
            return Message(Error(code=protocol.CLIENT_FAILED, reason=reason), reply_to=message)

    return handle


@app.query()
@answering
def describe(message: Message, context: Context) -> Message:
    """Answer who this client is: its number and how much audio it has."""
    settings = FederationSettings.from_run_config(context.run_config)
    if settings.task:
        own = task_share_of(context.node_config, settings)
        key, count = own.key, len(own.train)
        seconds = sum(clip.piece.samples for clip in own.train) / SAMPLE_RATE
    else:
        share = share_of(context.node_config, settings)
        key, count = share.key, len(share.indices)
        seconds = seconds_of(share.manifest, share.indices)
    metrics = MetricRecord({"partition": key, "crops": count, "seconds": seconds})
    return Message(RecordDict({protocol.METRICS: metrics}), reply_to=message)


@app.train()
@answering
def train(message: Message, context: Context) -> Message:
    """Train from the global weights and answer with the difference."""
    return _reply(message, context)


@app.evaluate()
@answering
def evaluate(message: Message, context: Context) -> Message:
    """Score a task's global weights on the client's own clips; nothing of them changes."""
    return _reply(message, context, evaluate_only=True)


def _reply(message: Message, context: Context, evaluate_only: bool = False) -> Message:
    settings = FederationSettings.from_run_config(context.run_config)
    weights = message.content.array_records[protocol.WEIGHTS]
    task: ConfigRecord = message.content.config_records[protocol.TASK]
    node = context.node_config
    state = Path(str(node["state"])) if "state" in node else None
    budget, limits = budget_of(node), Limits.of_node(node)
    if settings.task:
        settings = dataclasses.replace(
            settings, checkpoint=str(node.get("checkpoint", "") or settings.checkpoint)
        )
        own = task_share_of(node, settings)
        result = train_task_round(
            weights, task, own, settings, budget, state, limits, evaluate_only
        )
    else:
        if evaluate_only:
            raise protocol.ProtocolError("pretraining is evaluated on the server")
        share = share_of(node, settings)
        result = train_round(weights, task, share, settings, budget, state, limits)
    content = RecordDict(
        {protocol.UPDATE: result.update, protocol.METRICS: MetricRecord(dict(result.metrics))}
    )
    return Message(content, reply_to=message)
