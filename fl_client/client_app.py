"""Flower's ClientApp: describes a client, trains its rounds and evaluates on its clips.

The same app runs in a SuperNode, in Flower's simulation and in `simulation/`.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from common.errors import ShortwaveError
from fl_client import protocol
from fl_client.client_state import ClientState
from fl_client.federation_settings import TaskFederation, from_run_config
from fl_client.identity import default_folder
from fl_client.limits import Limits
from fl_client.local_data import client_audio, client_key
from fl_client.task_data import client_clips
from partitions.sampling import SAMPLE_RATE
from partitions.speakers import seconds_of

log = logging.getLogger("shortwave.client")
app = ClientApp()
Handler = Callable[[Message, Context], Message]


def answering(handler: Handler) -> Handler:
    """Wrap a handler so that an error's class is sent, but not its text.

    The text may hold paths or names and goes to this device's log only. The system's description of
    an `OSError`, such as a full disk, is sent too. A simulated client (`simulated` in its node
    config) sends the whole text.
    """

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            # Flower would send the text of any error raised from here.
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
    """Answer with this client's number and how much audio it has; or show a notice."""
    told = protocol.notice_text(message.content.config_records.get(protocol.INSTRUCTIONS) or {})
    if told:
        log.warning("%s", told)
        return Message(RecordDict({protocol.METRICS: MetricRecord({})}), reply_to=message)
    settings = from_run_config(context.run_config)
    if isinstance(settings, TaskFederation):
        clips = client_clips(context.node_config, settings)
        key, count = clips.key, len(clips.train)
        seconds = sum(clip.piece.samples for clip in clips.train) / SAMPLE_RATE
    else:
        audio = client_audio(context.node_config, settings)
        key, count = audio.key, len(audio.indices)
        seconds = seconds_of(audio.manifest, audio.indices)
    metrics = MetricRecord({"partition": key, "crops": count, "seconds": seconds})
    return Message(RecordDict({protocol.METRICS: metrics}), reply_to=message)


@app.train()
@answering
def train(message: Message, context: Context) -> Message:
    """Train from the global weights and answer with the update."""
    return _reply(message, context)


@app.evaluate()
@answering
def evaluate(message: Message, context: Context) -> Message:
    """Score a task's global weights, unchanged, on the client's own clips."""
    return _reply(message, context, evaluate_only=True)


def _reply(message: Message, context: Context, evaluate_only: bool = False) -> Message:
    # These import torch, which takes a board seconds: a client describes itself without.
    from fl_client.local_training import train_round
    from fl_client.round_plan import budget_of
    from fl_client.task_training import train_task_round

    settings = from_run_config(context.run_config)
    weights = message.content.array_records[protocol.WEIGHTS]
    instructions = message.content.config_records[protocol.INSTRUCTIONS]
    node = context.node_config
    state = Path(str(node["state"])) if "state" in node else None
    begun = None  # a simulation compares the whole corpus when it is resumed
    if not node.get("simulated"):
        run = str(instructions["run"])
        begun = ClientState(state or default_folder(), run, client_key(node))
    budget, limits = budget_of(node), Limits.of_node(node)
    if isinstance(settings, TaskFederation):
        settings = dataclasses.replace(
            settings, checkpoint=str(node.get("checkpoint", "") or settings.checkpoint)
        )
        clips = client_clips(node, settings, begun)
        result = train_task_round(
            weights, instructions, clips, settings, budget, state, limits, evaluate_only
        )
    else:
        if evaluate_only:
            raise protocol.ProtocolError("pretraining is evaluated on the server")
        audio = client_audio(node, settings, begun)
        result = train_round(weights, instructions, audio, settings, budget, state, limits)
    content = RecordDict(
        {protocol.UPDATE: result.update, protocol.METRICS: MetricRecord(dict(result.metrics))}
    )
    return Message(content, reply_to=message)
