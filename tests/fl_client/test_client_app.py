"""The ClientApp as Flower calls it: what it answers, and what it keeps to itself."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Writer
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from tone_words import write_words

from fl_client import local_training, protocol, round_plan, updates
from fl_client.client_app import app
from fl_client.federation_settings import PretrainingFederation, from_run_config
from fl_client.protocol import Encoding
from fl_server.broadcast import Broadcast
from ssl_core.planning.step_plan import Plan
from ssl_core.training.planned_step import PlannedStep
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.step_runner import Taken
from ssl_core.wav2vec2.model import Backbone, PretrainingModel

pytestmark = pytest.mark.usefixtures("shared_estimates")

ROOT = Path(__file__).parents[2]
WORDS = "EXTRAORDINARY CIRCUMSTANCES"
SPEAKERS = ("40711", "40712", "40713", "40714")
RUN = {
    "model": "tiny", "architecture.num-hidden-layers": 1, "length": "1s", "batch": 2,
    "local-updates": 2, "held-out": 0.3, "rounds": 3,
}  # fmt: skip


@pytest.fixture
def corpus(root: Path, write: Writer) -> Path:
    """Six speakers with transcripts, 3 s of noise each."""
    for speaker in (*SPEAKERS, "40715", "40716"):
        write("train-secret", speaker, 90817, 0, samples=3 * 16_000, words=WORDS)
    return root


@pytest.fixture(autouse=True)
def in_a_flower_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


@pytest.fixture
def ask(corpus: Path) -> Callable[..., Message]:
    """Send one message to the app of a node."""

    def send(kind: str, content: RecordDict | None = None, **node: Any) -> Message:
        config = {"data": str(corpus), "partition-id": 1, "num-partitions": 2}
        config |= {name.replace("_", "-"): value for name, value in node.items()}
        context = Context(7, 8, config, RecordDict(), {**RUN, "data": "/not/on/this/device"})
        return app(Message(content or RecordDict(), 8, kind, group_id="1"), context)

    return send


def weights() -> dict[str, torch.Tensor]:
    settings = from_run_config(RUN)
    assert isinstance(settings, PretrainingFederation)
    torch.manual_seed(3)
    return PretrainingModel(settings.architecture).state_dict()


INSTRUCTIONS = {
    "run": "secretless", "round": 1, "first_update": 2, "updates": 2, "base_round": -1,
    "encoding": "fp32", "folded_round": -1,
}  # fmt: skip


def round_of(tensors: dict[str, torch.Tensor], **asked: Any) -> RecordDict:
    record = updates.pack((name, value.numpy()) for name, value in tensors.items())
    instructions = ConfigRecord(INSTRUCTIONS | asked)
    return RecordDict({protocol.WEIGHTS: record, protocol.INSTRUCTIONS: instructions})


def wire(reply: Message) -> bytes:
    """Everything of a reply that Flower puts on the wire."""
    return b"\n".join(part.deflate() for part in get_all_nested_objects(reply).values())


def test_a_client_says_its_number_and_how_much_audio_it_has(ask: Callable[..., Message]) -> None:
    reply = ask(MessageType.QUERY)
    assert set(reply.content) == {protocol.METRICS}
    # Two of six speakers are held out, the other four shared by two clients: two with 3 s each.
    assert dict(reply.content[protocol.METRICS]) == {"partition": 1, "crops": 6, "seconds": 6.0}


QUERY = """
import json, sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fl_client import protocol
from fl_client.client_app import app

def ask(kind, run, node, **asked):
    content = RecordDict({protocol.INSTRUCTIONS: protocol.instructions(**asked)} if asked else {})
    return app(Message(content, 8, kind, group_id="1"), Context(7, 8, node, RecordDict(), run))

TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 7
cases = json.loads(sys.argv[1])
for run, node in cases:
    print(json.dumps(dict(ask("query", run, node).content[protocol.METRICS])))
ask("query", *cases[0], ask="notice", notice="version", number=0)
print(json.dumps(sorted({"torch", "transformers"} & sys.modules.keys())))
ask("train", *cases[0])
print(json.dumps(sorted({"torch", "transformers"} & sys.modules.keys())))
"""


def test_a_client_describes_itself_without_torch_and_trains_with_it(
    corpus: Path, tmp_path: Path
) -> None:
    node = {"data": str(corpus), "partition-id": 1, "num-partitions": 2}
    words = write_words(tmp_path / "words")
    task = {"task": "kws35", "checkpoint": "logmel", "batch": 4, "partition": "labels"}
    cases = [
        (RUN, node),
        ({**RUN, "precision": "auto", "device": "cpu", "batch": 4, "micro-batch": 2}, node),
        (task, {**node, "data": str(words)}),
        (task, {"data": str(words), "client-key": 5}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", QUERY, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *described, without, with_it = map(json.loads, done.stdout.splitlines())
    assert [each["partition"] for each in described] == [1, 1, 1, 5]
    assert [each["crops"] for each in described[:2]] == [6, 6]
    assert all(each["crops"] > 0 for each in described)
    assert without == []
    assert with_it == ["torch"]


def test_an_update_is_the_change_of_the_weights_and_the_agreed_metrics(
    ask: Callable[..., Message],
) -> None:
    start = weights()
    # Within an epoch, in which no sequence comes twice.
    reply = ask(MessageType.TRAIN, round_of(start, first_update=0))
    assert set(reply.content) == {protocol.METRICS, protocol.UPDATE}
    metrics = protocol.check_metrics(reply.content, protocol.TRAIN_METRICS)
    assert (metrics["updates"], metrics["applied"], metrics["crops"]) == (2, 2, 4)
    assert metrics["samples"] == 4 * 16_000
    update = updates.Views(reply.content.array_records[protocol.UPDATE])
    assert {name: value.shape for name, value in update.items()} == {
        name: tuple(value.shape) for name, value in start.items()
    }
    assert all(value.dtype == np.float32 for value in update.values())
    assert 0 < max(np.abs(value).max() for value in update.values()) < 0.1


def test_the_same_instructions_give_the_same_update(ask: Callable[..., Message]) -> None:
    first, again, other = (
        ask(MessageType.TRAIN, round_of(weights()), partition_id=part).content[protocol.UPDATE]
        for part in (1, 1, 0)
    )
    assert all(first[name].data == again[name].data for name in first)
    assert any(first[name].data != other[name].data for name in first)


def test_a_client_trains_the_architecture_that_the_server_sends(
    ask: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(**asked: Any) -> dict[str, bytes]:
        reply = ask(MessageType.TRAIN, round_of(weights(), **asked))
        return {name: array.data for name, array in reply.content[protocol.UPDATE].items()}

    settings: Any = from_run_config(RUN)
    wanted = dataclasses.replace(settings.architecture, do_normalize=True, layer_norm_eps=1e-3)
    plain, told = update(), update(architecture=protocol.architecture_text(wanted))
    assert plain != told
    monkeypatch.setitem(RUN, "architecture.do-normalize", True)
    monkeypatch.setitem(RUN, "architecture.layer-norm-eps", 1e-3)
    assert update() == told
    reply = ask(MessageType.TRAIN, round_of(weights(), architecture="{"))
    assert reply.error.reason == "ProtocolError"


def test_a_model_that_is_moved_to_its_device_sends_what_it_has_learned(
    ask: Callable[..., Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are others then; here a move to the CPU is made to do what one to a GPU does."""
    there: set[int] = set()
    init = PlannedStep.__init__

    def move(model: PretrainingModel, device: object) -> PretrainingModel:
        if id(model) not in there:
            there.add(id(model))
            model._apply(torch.clone)
        return model

    def moving(
        step: PlannedStep, model: PretrainingModel, backbone: Backbone, plan: Plan, products: Any
    ) -> None:
        move(model, plan.device)
        init(step, model, backbone, plan, products)

    usual = ask(MessageType.TRAIN, round_of(weights())).content[protocol.UPDATE]
    monkeypatch.setattr(PretrainingModel, "to", move)
    monkeypatch.setattr(PlannedStep, "__init__", moving)
    local_training._resident_model.cache_clear()
    again = ask(MessageType.TRAIN, round_of(weights())).content[protocol.UPDATE]
    local_training._resident_model.cache_clear()
    assert there
    assert all(usual[name].data == again[name].data for name in usual)
    assert any(np.any(value) for value in updates.Views(again).values())


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_no_path_transcript_or_speaker_leaves_the_device(
    ask: Callable[..., Message],
    corpus: Path,
    kind: str,
    encoding: Encoding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RUN, "encoding", encoding)
    content = round_of(
        weights(), run="secretless", base_round=-1, encoding=encoding, folded_round=-1
    )
    record, _ = Broadcast(encoding).pack(weights(), 0, [])
    content[protocol.WEIGHTS] = record
    reply = ask(kind, content, state=str(tmp_path / "kept"))
    assert set(reply.content) <= {protocol.METRICS, protocol.UPDATE}
    names = protocol.TRAIN_METRICS if kind == MessageType.TRAIN else protocol.INFO_METRICS
    assert set(reply.content[protocol.METRICS]) == set(names)
    sent = wire(reply)
    assert b"partition" in sent or b"samples" in sent
    for secret in (
        str(corpus),
        corpus.name,
        "train-secret",
        "90817",
        ".flac",
        "4071",
        *WORDS.split(),
    ):
        assert secret.encode() not in sent, secret


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_an_error_reveals_its_kind_only(
    ask: Callable[..., Message], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    missing = str(tmp_path / "gone")
    reply = ask(kind, round_of(weights()), data=missing)
    assert (reply.error.code, reply.error.reason) == (protocol.CLIENT_FAILED, "DataError")
    assert b"gone" not in wire(reply)
    assert missing in caplog.text  # the device's own log says what is wrong
    simulated = ask(kind, round_of(weights()), data=missing, simulated=True)
    assert simulated.error.reason.startswith(f"DataError: no such folder: {missing}")


def test_an_unknown_speaker_is_named_on_the_device_only(
    ask: Callable[..., Message], caplog: pytest.LogCaptureFixture
) -> None:
    reply = ask(MessageType.QUERY, speakers="40711, 50999")
    assert reply.error.reason == "UsageError"
    assert "50999" in caplog.text


def test_an_unexpected_error_reveals_its_kind_only(
    ask: Callable[..., Message],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*values: object) -> None:
        raise PermissionError(13, "Permission denied", "/home/somebody/private.flac")

    monkeypatch.setattr("fl_client.client_app.client_audio", fail)
    reply = ask(MessageType.QUERY)
    assert reply.error.reason == "PermissionError: Permission denied"
    assert b"private" not in wire(reply)
    assert "/home/somebody/private.flac" in caplog.text


def test_weights_of_another_model_are_refused(ask: Callable[..., Message]) -> None:
    start = weights()
    name = next(iter(start))
    del start[name]
    reply = ask(MessageType.TRAIN, round_of(start), simulated=True)
    assert reply.error.reason == (
        f"ProtocolError: the weights do not fit the model: {name} and others"
    )


def test_named_speakers_are_all_of_a_clients_audio(ask: Callable[..., Message]) -> None:
    replies = [ask(MessageType.QUERY, speakers=name, client_key=5) for name in SPEAKERS]
    described = [reply.content[protocol.METRICS] for reply in replies if not reply.has_error()]
    assert 2 <= len(described) <= 4  # those held out are refused
    assert all(dict(m) == {"partition": 5, "crops": 3, "seconds": 3.0} for m in described)


def distance(one: Message, other: Message) -> float:
    """Between two updates, relative: Adam makes much of the last bits of small gradients."""
    a, b = (
        np.concatenate([a.ravel() for a in updates.Views(reply.content[protocol.UPDATE]).values()])
        for reply in (one, other)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
def test_a_client_plans_its_step_for_the_memory_it_is_given(
    ask: Callable[..., Message],
) -> None:
    plenty = ask(MessageType.TRAIN, round_of(weights()), memory=4 * 2**30, simulated=True)
    plain = ask(MessageType.TRAIN, round_of(weights()), simulated=True)
    assert distance(plenty, plain) < 1e-3
    metrics = plenty.content[protocol.METRICS]
    assert 0 < metrics["predicted_bytes"] < metrics["memory_bytes"] == 4 * 2**30
    assert plain.content[protocol.METRICS]["predicted_bytes"] == 0
    little = ask(MessageType.TRAIN, round_of(weights()), memory=700 * 2**20, simulated=True)
    assert little.error.reason.startswith("UsageError: 2 crops of 1s: nothing fits: ")


def test_a_client_that_runs_out_of_memory_does_the_round_with_a_leaner_plan(
    ask: Callable[..., Message], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = ask(MessageType.TRAIN, round_of(weights()))
    take = PretrainingStep.take

    def tight(step: PretrainingStep, batches: Any, number: int, key: int = 0) -> Taken:
        taken = take(step, batches, number, key)
        if number == 3 and step.plan.effective_micro_batch > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return taken

    monkeypatch.setattr(PretrainingStep, "take", tight)
    reply = ask(MessageType.TRAIN, round_of(weights()))
    assert reply.content[protocol.METRICS]["micro_batch"] == 1
    assert reply.content[protocol.METRICS]["updates"] == 2
    assert "out of memory with 2 at once" in caplog.text
    assert distance(reply, usual) < 1e-3


def test_a_client_takes_a_leaner_plan_when_memory_shrinks(
    ask: Callable[..., Message], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = ask(MessageType.TRAIN, round_of(weights()))
    plenty = ask(MessageType.TRAIN, round_of(weights()), memory=4 * 2**30)
    little = int(plenty.content[protocol.METRICS]["predicted_bytes"]) - 15 * 2**20
    room = iter([4 * 2**30, 4 * 2**30] + [little] * 20)
    monkeypatch.setattr(
        round_plan, "this_machine", lambda: SimpleNamespace(process_bytes=next(room))
    )
    reply = ask(MessageType.TRAIN, round_of(weights()), device="auto")
    metrics = reply.content[protocol.METRICS]
    assert metrics["fallbacks"] >= 1
    assert metrics["predicted_bytes"] <= little
    assert metrics["updates"] == 2
    assert "memory has shrunk" in caplog.text
    assert distance(reply, usual) < 1e-3


def test_a_device_may_take_shorter_crops_but_no_longer_ones(ask: Callable[..., Message]) -> None:
    reply = ask(MessageType.TRAIN, round_of(weights()), length=0.5)
    metrics = reply.content[protocol.METRICS]
    assert metrics["length"] == 0.5
    assert metrics["samples"] % 8000 == 0
    longer = ask(MessageType.TRAIN, round_of(weights()), length=2.0, simulated=True)
    assert longer.error.reason.startswith("UsageError: --length 2s is longer than the run's 1s")


def test_a_kept_optimizer_state_goes_on_after_a_round_that_counted(
    ask: Callable[..., Message], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUN, "keep-optimizer-state", True)
    state = str(tmp_path / "kept")
    ask(MessageType.TRAIN, round_of(weights()), state=state)
    again = round_of(weights(), round=2, first_update=4, folded_round=1)
    went_on = ask(MessageType.TRAIN, again, state=state)
    again = round_of(weights(), round=2, first_update=4, folded_round=0)  # round 1 did not count
    anew = ask(MessageType.TRAIN, again, state=state)
    assert distance(went_on, anew) > 0.05
    files = sorted(path.name for path in (tmp_path / "kept" / "secretless" / "1").iterdir())
    assert files == [*(f"optimizer-0000{n}.safetensors" for n in (1, 2)), "split.json"]
