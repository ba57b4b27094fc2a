"""A client's round of a task: what is sent, what stays in its folder, and what its messages say."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from tone_words import SAMPLES, SPEAKERS, WORDS, write_backbone, write_words
from torch import Tensor

from common.errors import DataError
from common.settings import from_mapping
from fl_client import protocol, task_training, updates
from fl_client.client_app import app
from fl_client.client_round import RoundResult
from fl_client.encoding import Decoded
from fl_client.federation_settings import TaskFederation, from_run_config
from fl_client.task_data import ClientClips, client_clips
from fl_client.task_training import Resident, train_task_round
from fl_server.broadcast import WHOLE, Broadcast
from ssl_core.downstream.task_model import TaskModel
from ssl_core.downstream.task_recipe import Method
from ssl_core.downstream.task_step import TaskStep
from ssl_core.planning.step_plan import Plan
from ssl_core.training.planned_step import PlannedStep
from ssl_core.training.tensor_file import TensorFile
from ssl_core.wav2vec2.model import Backbone

HEAD = {"head.linear.weight", "head.linear.bias"}
RATES = {"head-rate": 0.05, "final-rate": 0.05, "backbone-rate": 0.01}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six speakers who say four words twice; to be read only."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "checkpoint")


class Lab:
    """A server's weights, and clients who train on them in this process."""

    def __init__(self, corpus: Path, backbone: Path, state: Path) -> None:
        self.data, self.backbone, self.state = corpus, backbone, state

    def settings(self, **changes: Any) -> TaskFederation:
        values = {
            "task": "kws35", "data": str(self.data), "checkpoint": str(self.backbone), "rounds": 4,
            "local_updates": 3, "batch": 4, "recipe": RATES, "lora_rank": 2, "shared_layers": 1,
        }  # fmt: skip
        return from_mapping(TaskFederation, {**values, **changes}, "this test")

    def server(self, settings: TaskFederation) -> Resident:
        return Resident(settings, len(WORDS))

    def instructions(self, settings: TaskFederation, number: int, **asked: Any) -> ConfigRecord:
        values = {
            "run": "secretless", "round": number, "first_update": 3 * number, "updates": 3,
            "base_round": -1, "encoding": WHOLE[settings.encoding], "folded_round": number - 1,
            "backbone": self.server(settings).backbone,
        }  # fmt: skip
        return protocol.instructions(**{**values, **asked})

    def clips(self, settings: TaskFederation, client: int = 0, clients: int = 3) -> ClientClips:
        return client_clips({"partition-id": client, "num-partitions": clients}, settings)

    def round(
        self,
        settings: TaskFederation,
        number: int = 0,
        client: int = 0,
        weights: Mapping[str, Tensor] | None = None,
        evaluate_only: bool = False,
        clips: ClientClips | None = None,
        **asked: Any,
    ) -> RoundResult:
        """From the weights that the server begins with, where there are no others."""
        weights = self.server(settings).state_dict() if weights is None else weights
        record, _ = Broadcast(settings.encoding).pack(weights, number, [client])
        return train_task_round(
            record,
            self.instructions(settings, number, **asked),
            clips or self.clips(settings, client),
            settings,
            state=self.state,
            evaluate_only=evaluate_only,
        )

    def personal(self, number: int, client: int = 0) -> TensorFile:
        folder = self.state / "secretless" / str(client)
        return TensorFile(folder / f"personal-{number:05d}.safetensors")

    def files(self) -> dict[str, bytes]:
        """All that is in the clients' folders."""
        return {
            str(path.relative_to(self.state)): path.read_bytes()
            for path in self.state.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def lab(corpus: Path, backbone: Path, tmp_path: Path) -> Lab:
    return Lab(corpus, backbone, tmp_path / "state")


def arrays(record: ArrayRecord) -> dict[str, "np.ndarray[Any, Any]"]:
    return dict(updates.Views(record))


def same(one: RoundResult, other: RoundResult) -> bool:
    """To the last bit."""
    a, b = arrays(one.update), arrays(other.update)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def moved(record: ArrayRecord) -> set[str]:
    return {name for name, value in arrays(record).items() if value.any()}


UNREACHED = {"wav2vec2.encoder.layers.1.attention.k_proj.bias"}
"""A constant added to every key changes attention by rounding at most."""


@pytest.mark.parametrize("share", ["backbone", "layers", "lora"])
@pytest.mark.parametrize("method", ["fedavg", "fedper", "fedrep"])
def test_an_update_is_of_the_shared_part_and_of_nothing_else(
    lab: Lab, method: Method, share: str
) -> None:
    settings = lab.settings(method=method, share=share)
    server = lab.server(settings)
    result = lab.round(settings)
    sent = updates.Views(result.update)
    assert set(sent) == server.parts.shared
    assert (set(sent) & HEAD == HEAD) == (method == "fedavg")
    assert not set(sent) & server.parts.personal
    for name, start in server.state_dict().items():
        value = sent[name]
        assert value.dtype == np.float32
        assert value.shape == tuple(start.shape)
    factors = {name for name in sent if name.endswith("lora_a")}
    assert moved(result.update) >= set(sent) - UNREACHED - factors
    assert moved(result.update) & factors == factors  # from the second update on


def test_a_shared_head_alone(lab: Lab) -> None:
    result = lab.round(lab.settings(method="fedavg", share="none"))
    assert moved(result.update) == set(arrays(result.update)) == HEAD
    assert lab.files() == {}


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_local_training_sends_nothing_and_keeps_all(lab: Lab, encoding: str) -> None:
    settings = lab.settings(method="local", share="lora", encoding=encoding)
    server = lab.server(settings)
    losses = []
    for number in range(3):
        result = lab.round(settings, number)
        assert len(result.update) == 0
        losses.append(result.metrics["loss"])
    assert set(lab.personal(2)) == HEAD | {n for n in server.parts.personal if ".lora_" in n}
    assert losses[2] < losses[1] < losses[0]


def test_metrics_are_those_agreed_and_say_what_was_done(lab: Lab) -> None:
    settings = lab.settings()
    result = lab.round(settings, 1)
    assert tuple(result.metrics) == protocol.TASK_METRICS
    content = RecordDict({protocol.METRICS: MetricRecord(dict(result.metrics))})
    metrics = protocol.check_metrics(content, protocol.TASK_METRICS)
    # Two speakers said four words twice each: of each word one in four is kept to be tested on.
    done = {
        "round": 1, "samples": 12 * SAMPLES, "clips": 12, "updates": 3, "applied": 3,
        "test_clips": 4, "batch": 4, "micro_batch": 4, "length": 0.3, "fallbacks": 0,
    }  # fmt: skip
    assert {name: metrics[name] for name in done} == done
    assert 0 < metrics["loss"] < 3
    assert metrics["test_before"] in (0, 0.25, 0.5, 0.75, 1)
    assert not any(metrics[name] for name in metrics if name.startswith("skipped_"))


def test_a_client_whose_test_clips_are_broken_trains_and_is_not_scored(
    lab: Lab, tmp_path: Path
) -> None:
    settings = lab.settings()
    clips = lab.clips(settings)
    broken = dataclasses.replace(
        clips.test[0], piece=dataclasses.replace(clips.test[0].piece, path="gone.wav")
    )
    whole = lab.round(settings)
    result = lab.round(settings, clips=clips._replace(test=(broken,)))
    assert same(result, whole)
    metrics = result.metrics
    assert [metrics[name] for name in ("test_clips", "test_before", "test_after")] == [0, 0, 0]
    assert sum(metrics[name] for name in metrics if name.startswith("skipped_")) == 1
    some = lab.round(settings, clips=clips._replace(test=(broken, *clips.test[1:])))
    assert some.metrics["test_clips"] == len(clips.test) - 1


def test_a_personal_head_is_kept_and_taken_up_in_the_next_round(lab: Lab) -> None:
    settings = lab.settings()
    lab.round(settings, 0)
    kept = lab.personal(0)
    assert set(kept) == HEAD
    first = lab.server(settings).first
    assert any(not torch.equal(kept[name], first[name]) for name in HEAD)
    losses = [lab.round(settings, 1).metrics["loss"]]
    went_on = {name: lab.personal(1)[name] for name in HEAD}
    for file in lab.state.rglob("personal-*"):
        file.unlink()
    losses.append(lab.round(settings, 1).metrics["loss"])
    anew = lab.personal(1)
    assert all(not torch.equal(went_on[name], anew[name]) for name in HEAD)
    assert losses[0] < losses[1]


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_a_round_taken_again_is_the_same(lab: Lab, method: str, encoding: str) -> None:
    settings = lab.settings(method=method, share="lora", encoding=encoding)
    lab.round(settings, 0)
    first = lab.round(settings, 1)
    kept = lab.files()
    again = lab.round(settings, 1)
    assert same(first, again)
    assert lab.files() == kept
    assert again.metrics["test_before"] == first.metrics["test_before"]
    later = lab.round(settings, 2)
    assert not same(first, later)
    assert same(lab.round(settings, 2), later)


def test_clients_of_one_process_keep_their_heads_apart(lab: Lab, tmp_path: Path) -> None:
    settings = lab.settings()
    mixed = [lab.round(settings, number, client) for number in (0, 1) for client in (0, 1)]
    heads = [{name: lab.personal(1, client)[name] for name in HEAD} for client in (0, 1)]
    assert not any(torch.equal(heads[0][name], heads[1][name]) for name in HEAD)
    alone = Lab(lab.data, lab.backbone, tmp_path / "alone")
    for place, (client, number) in enumerate(((1, 0), (1, 1))):
        result = alone.round(settings, number, client)
        assert same(result, mixed[1 + 2 * place])
        assert result.metrics["test_before"] == mixed[1 + 2 * place].metrics["test_before"]
    assert all(torch.equal(alone.personal(1, 1)[name], heads[1][name]) for name in HEAD)


def test_runs_keep_their_heads_apart(lab: Lab) -> None:
    settings = lab.settings()
    first = lab.round(settings, 0)
    lab.round(settings, 1)
    assert same(lab.round(settings, 0, run="another"), first)
    unaware = lab.round(settings, 1, run="third")
    assert not same(unaware, lab.round(settings, 1))


def test_another_backbone_than_the_servers_is_refused(lab: Lab, tmp_path: Path) -> None:
    settings = lab.settings(share="lora")
    other = str(write_backbone(tmp_path / "other", seed=1))
    changed = dataclasses.replace(settings, checkpoint=other)
    # Its low-rank changes have the same names and shapes, so nothing else would tell.
    assert set(lab.server(changed).state_dict()) == set(lab.server(settings).state_dict())
    asked = lab.server(settings).backbone
    with pytest.raises(protocol.ProtocolError, match=rf"'{other}' of this device is not that of"):
        lab.round(changed, backbone=asked)
    copied = write_backbone(tmp_path / "copy")
    moved_there = dataclasses.replace(settings, checkpoint=str(copied))
    assert same(lab.round(moved_there, backbone=asked), lab.round(settings))


def test_weights_of_another_share_are_refused(lab: Lab) -> None:
    weights = lab.server(lab.settings(share="layers")).state_dict()
    with pytest.raises(protocol.ProtocolError, match="the weights do not fit the model"):
        lab.round(lab.settings(share="lora"), weights=weights)


@pytest.mark.parametrize("method", ["fedavg", "fedper", "fedrep", "local"])
def test_an_evaluation_changes_nothing_on_disk(lab: Lab, method: str) -> None:
    settings = lab.settings(method=method, share="lora")
    trained = lab.round(settings, 0)
    kept = lab.files()
    result = lab.round(settings, 1, evaluate_only=True)
    assert lab.files() == kept
    assert len(result.update) == 0
    assert tuple(result.metrics) == protocol.TASK_METRICS
    assert result.metrics["updates"] == (3 if method == "fedrep" else 0)
    if method == "local":  # nothing came in between
        assert result.metrics["test_before"] == trained.metrics["test_after"]
    if method != "fedrep":
        assert result.metrics["test_after"] == result.metrics["test_before"]
    assert same(lab.round(settings, 1), lab.round(settings, 1))


def test_an_evaluation_fits_the_head_of_fedrep_to_the_weights(lab: Lab) -> None:
    settings = lab.settings(method="fedrep", rounds=2, head_updates=60)
    result = lab.round(settings, 2, evaluate_only=True, clips=client_clips({}, settings))
    assert result.metrics["updates"] == 60
    assert result.metrics["test_after"] > result.metrics["test_before"]


def test_the_last_evaluation_fits_at_the_last_rounds_rate(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows the last round; a schedule drawn on to there would go below zero."""
    settings = lab.settings(
        method="fedrep", rounds=2, recipe={"head-rate": 0.05, "final-rate": 0.02}
    )
    rates = []
    update = TaskStep.update

    def noted(step: Any, batch: Any, number: int, given: Mapping[str, float], key: int) -> Any:
        rates.append(given["head"])
        return update(step, batch, number, given, key)

    monkeypatch.setattr(TaskStep, "update", noted)
    for number in (0, 1):
        lab.round(settings, number)
    lab.round(settings, 2, evaluate_only=True)
    assert rates == pytest.approx([0.05] * 6 + [0.02] * 6 + [0.02] * 3)


def test_fedrep_trains_the_head_then_the_shared_part(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = lab.settings(method="fedrep", share="layers", head_updates=2)
    taken: list[set[str]] = []
    update = TaskStep.update

    def noted(step: Any, *given: Any) -> Any:
        before = {name: value.clone() for name, value in step.model.named_parameters()}
        report = update(step, *given)
        now = dict(step.model.named_parameters())
        taken.append({name for name, value in now.items() if not value.equal(before[name])})
        return report

    monkeypatch.setattr(TaskStep, "update", noted)
    result = lab.round(settings)
    assert result.metrics["updates"] == 5
    assert taken[:2] == [HEAD, HEAD]
    shared = lab.server(settings).parts.shared
    assert all(shared >= names >= shared - UNREACHED for names in taken[2:])


def test_features_of_a_backbone_that_changes_are_not_kept(
    lab: Lab, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file a round would fill a device's disk."""
    settings = lab.settings(method="fedrep", share="lora")
    passes: list[int] = []
    extract = TaskModel.extract

    def noted(model: TaskModel, waveforms: list[Tensor]) -> Tensor:
        passes.append(len(waveforms))
        return extract(model, waveforms)

    monkeypatch.setattr(TaskModel, "extract", noted)
    weights = lab.server(settings).state_dict()
    for number in range(3):
        changed = {name: value + 0.01 * number for name, value in weights.items()}
        lab.round(settings, number, weights=changed)
    (kept,) = (cache / "shortwave" / "features").glob("*.sqlite")
    assert "-extracted-" in kept.name
    assert sum(passes) == 16  # every clip once, in all rounds


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4", "topk"])
def test_the_shared_part_travels_in_fewer_bits(lab: Lab, encoding: str) -> None:
    plain, settings = lab.settings(), lab.settings(encoding=encoding)
    server = lab.server(settings)
    expected = arrays(lab.round(plain).update)
    result = lab.round(settings)
    sent = arrays(result.update)
    assert set(sent) <= server.parts.shared
    assert len(sent) >= len(expected) - 2
    assert updates.size(result.update) < 0.8 * sum(value.nbytes for value in expected.values())
    shapes = {name: value.shape for name, value in expected.items()}
    decoded = Decoded(result.update, shapes, settings.encoding)
    found = np.concatenate([decoded[name].ravel() for name in sent])
    wanted = np.concatenate([expected[name].ravel() for name in sent])
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.3
    folder = lab.state / "secretless" / "0"
    residual = TensorFile(folder / "residual-00000.safetensors")
    assert set(residual) == set(sent)  # their encoding errors, and of no head


@pytest.mark.parametrize("encoding", ["int8", "topk"])
def test_a_difference_to_the_weights_before_is_added_to_those_on_disk(
    lab: Lab, encoding: str
) -> None:
    settings = lab.settings(encoding=encoding, share="lora")
    weights = {n: v.clone() for n, v in lab.server(settings).state_dict().items()}
    broadcast = Broadcast(settings.encoding)
    for number in (0, 1):
        record, base = broadcast.pack(weights, number, [0])
        assert base == number - 1
        how = settings.encoding if base >= 0 else WHOLE[settings.encoding]
        asked = lab.instructions(settings, number, base_round=base, encoding=how)
        train_task_round(record, asked, lab.clips(settings), settings, state=lab.state)
        broadcast.held[0] = number
        held = TensorFile(lab.state / "secretless" / "0" / f"weights-{number:05d}.safetensors")
        assert set(held) == set(weights)
        assert all(torch.equal(held[name], broadcast.sent[name]) for name in held)
        for value in weights.values():
            value += 0.01


def with_bad_clips(lab: Lab, tmp_path: Path, client: int = 0) -> tuple[Lab, ClientClips]:
    """A corpus of its own in which the client has a clip cut short and a test clip of silence."""
    own = Lab(write_words(tmp_path / "broken"), lab.backbone, lab.state)
    clips = own.clips(own.settings(), client)
    path = clips.root / clips.train[0].piece.path
    path.write_bytes(path.read_bytes()[: SAMPLES // 2])
    path = clips.root / clips.test[0].piece.path
    data = path.read_bytes()
    path.write_bytes(data[:44] + bytes(len(data) - 44))
    return own, clips


@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_a_clip_that_cannot_be_used_is_counted_once(lab: Lab, tmp_path: Path, method: str) -> None:
    own, clips = with_bad_clips(lab, tmp_path)
    settings = own.settings(method=method, share="layers", local_updates=6)
    metrics = own.round(settings, clips=clips).metrics
    counted = {n: v for n, v in metrics.items() if n.startswith("skipped_") and v}
    assert counted == {"skipped_truncated": 1, "skipped_silent": 1}
    times = 2 if method == "fedrep" else 1
    # Six batches of four are two passes over twelve clips, each without the one that is broken.
    assert metrics["clips"] == times * 2 * 11
    assert metrics["updates"] == times * 6


def test_a_client_without_a_clip_that_can_be_used_says_so(lab: Lab, tmp_path: Path) -> None:
    own = Lab(write_words(tmp_path / "gone"), lab.backbone, lab.state)
    clips = own.clips(own.settings())
    for clip in clips.train:
        (clips.root / clip.piece.path).unlink()
    with pytest.raises(DataError, match=r"none of the clips to train on can be used, such as: "):
        own.round(own.settings(), clips=clips)
    assert own.files() == {}


def test_a_model_that_is_moved_to_its_device_sends_what_it_has_learned(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are others then; here a move to the CPU is made to do what one to a GPU does."""
    there: set[int] = set()
    init = PlannedStep.__init__

    def move(model: TaskModel, device: object) -> TaskModel:
        if id(model) not in there:
            there.add(id(model))
            model._apply(torch.clone)
        return model

    def moving(
        step: PlannedStep, model: TaskModel, backbone: Backbone | None, plan: Plan, products: Any
    ) -> None:
        move(model, plan.device)
        init(step, model, backbone, plan, products)

    settings = lab.settings(share="layers")
    usual = lab.round(settings)
    kept = lab.files()
    monkeypatch.setattr(TaskModel, "to", move)
    monkeypatch.setattr(PlannedStep, "__init__", moving)
    task_training.resident.cache_clear()
    again = lab.round(settings)
    task_training.resident.cache_clear()
    assert there
    assert moved(again.update)
    assert same(again, usual)
    assert lab.files() == kept


RUN = MappingProxyType(
    {
        "task": "kws35", "method": "fedper", "share": "lora", "lora-rank": 2, "rounds": 3,
        "local-updates": 1, "batch": 4, "recipe.head-rate": 0.05,
    }
)  # fmt: skip


@pytest.fixture
def ask(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Message]:
    """Send one message to the app of a node."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)

    def send(kind: str, run: Mapping[str, Any] = RUN, **node: Any) -> Message:
        given = {**run, "checkpoint": str(lab.backbone)}
        settings = from_run_config(given | {"data": str(lab.data)})
        assert isinstance(settings, TaskFederation)
        content = RecordDict()
        if kind != MessageType.QUERY:
            weights = lab.server(settings).state_dict()
            record, _ = Broadcast(settings.encoding).pack(weights, 0, [])
            content[protocol.WEIGHTS] = record
            content[protocol.INSTRUCTIONS] = lab.instructions(settings, 0)
        config = {
            "data": str(lab.data), "state": str(lab.state), "partition-id": 1, "num-partitions": 3,
        }  # fmt: skip
        config |= {name.replace("_", "-"): value for name, value in node.items()}
        context = Context(7, 8, config, RecordDict(), {**given, "data": "/not/on/this/device"})
        return app(Message(content, 8, kind, group_id="1"), context)

    return send


def test_a_client_says_its_number_and_what_it_trains_on(ask: Callable[..., Message]) -> None:
    reply = ask(MessageType.QUERY)
    assert set(reply.content) == {protocol.METRICS}
    # Of the 16 clips of two speakers, twelve.
    assert dict(reply.content[protocol.METRICS]) == {
        "partition": 1, "crops": 12, "seconds": pytest.approx(12 * 0.3),
    }  # fmt: skip


def texts(value: Any) -> list[str]:
    """Every text in a record, and every name."""
    if isinstance(value, Array):
        return [value.dtype, value.stype]
    if isinstance(value, Mapping):
        return [*map(str, value), *(text for part in value.values() for text in texts(part))]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
@pytest.mark.parametrize("method", ["fedavg", "fedrep"])
@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_no_audio_path_label_or_speaker_leaves_the_device(
    ask: Callable[..., Message], lab: Lab, kind: str, method: str, encoding: str
) -> None:
    reply = ask(kind, {**RUN, "method": method, "encoding": encoding})
    assert not reply.has_error()
    assert set(reply.content) == {protocol.METRICS} | (
        set() if kind == MessageType.QUERY else {protocol.UPDATE}
    )
    names = protocol.INFO_METRICS if kind == MessageType.QUERY else protocol.TASK_METRICS
    assert set(reply.content[protocol.METRICS]) == set(names)
    sent = b"\n".join(part.deflate() for part in get_all_nested_objects(reply).values())
    assert b"partition" in sent or b"samples" in sent
    found = "\n".join(texts(reply.content))
    assert "samples" in found or "seconds" in found
    for secret in (lab.data.name, str(lab.backbone), "nohash", ".wav", *SPEAKERS, *WORDS):
        assert secret.encode() not in sent, secret
        assert secret not in found, secret
    update = arrays(reply.content.array_records.get(protocol.UPDATE, ArrayRecord()))
    assert any(name.startswith("head.") for name in update) == (
        method == "fedavg" and kind == MessageType.TRAIN
    )
    for secret in (lab.data.name, "nohash", *SPEAKERS, *WORDS):
        assert not any(secret in name for name in update), secret
    # Nothing that leaves is as large as the shortest clip.
    assert all(value.nbytes < 2 * SAMPLES for value in update.values())


@pytest.mark.usefixtures("ask")
def test_pretraining_is_not_evaluated_on_a_client() -> None:
    content = RecordDict(
        {
            protocol.WEIGHTS: ArrayRecord(),
            protocol.INSTRUCTIONS: protocol.instructions(run="secretless", round=0),
        }
    )
    context = Context(7, 8, {"simulated": True}, RecordDict(), {"model": "tiny"})
    reply = app(Message(content, 8, MessageType.EVALUATE, group_id="1"), context)
    assert reply.error.reason == "ProtocolError: pretraining is evaluated on the server"


def test_an_error_reveals_its_kind_only(
    ask: Callable[..., Message], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reply = ask(MessageType.TRAIN, speakers="zz99")
    assert (reply.error.code, reply.error.reason) == (protocol.CLIENT_FAILED, "UsageError")
    assert "zz99" in caplog.text
    other = str(write_backbone(tmp_path / "other", seed=1))
    reply = ask(MessageType.EVALUATE, checkpoint=other)
    assert reply.error.reason == "ProtocolError"
    assert other in caplog.text


def test_a_device_may_have_its_own_copy_of_the_backbone(
    ask: Callable[..., Message], lab: Lab, tmp_path: Path
) -> None:
    usual = ask(MessageType.TRAIN)
    (tmp_path / "here").symlink_to(lab.backbone)
    for file in lab.state.rglob("personal-*"):
        file.unlink()
    copied = ask(MessageType.TRAIN, checkpoint=str(tmp_path / "here"))
    assert not copied.has_error()
    one, other = (reply.content[protocol.UPDATE] for reply in (usual, copied))
    assert all(one[name].data == other[name].data for name in one)
