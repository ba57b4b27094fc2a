"""A task fine-tuned by several clients, all in this process: results, resume, what is refused."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from tone_words import SAMPLES, WORDS, write_backbone, write_words
from torch import Tensor
from transformers import Wav2Vec2ForSequenceClassification, Wav2Vec2Model

from common.errors import DataError, Interrupted, ShortwaveError, UsageError
from fl_client import protocol
from fl_client.client_app import app
from fl_client.federation_settings import TaskFederation, from_run_config
from fl_client.task_data import Pool, load_pool
from fl_client.task_training import Resident
from fl_client.updates import Views
from fl_server.fine_tuning_job import FineTuning
from fl_server.job import describe_round
from fl_server.personal_report import write_personal_report
from fl_server.roster import RoundFailed
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from fl_server.server_app import job_of, serve
from fl_server.status import view
from ssl_core.downstream.lora import SCALE

CLIENTS = 3
EXACT = {"recipe.head-rate": 0.05, "recipe.final-rate": 0.02, "recipe.backbone-rate": 0.01}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six speakers who say four words twice; to be read only."""
    return write_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "checkpoint")


@pytest.fixture(autouse=True)
def in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


class Grid:
    """The ClientApp of a few clients, called at once and in this process."""

    def __init__(self, run: Mapping[str, Any], state: Path) -> None:
        self.run, self.state = run, state
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}
        self.spoil: Callable[[Message, int], Message | None] = lambda message, key: None
        """What a client answers to a message in place of the app's answer."""

    def get_node_ids(self) -> list[int]:
        return [100 + key for key in range(CLIENTS)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            identifier = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identifier
            self.sent.append(message)
            key = message.metadata.dst_node_id - 100
            node = {
                "partition-id": key, "num-partitions": CLIENTS, "simulated": True,
                "state": str(self.state),
            }  # fmt: skip
            context = Context(7, 100 + key, node, RecordDict(), dict(self.run))
            answer = self.spoil(message, key)
            self.replies[identifier] = answer or app(own_copy(message), context)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, identifiers: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in identifiers if name in self.replies]

    def asked(self, kind: str) -> list[Message]:
        return [message for message in self.sent if message.metadata.message_type == kind]


def own_copy(message: Message) -> Message:
    """Several messages carry one record, which a client empties."""
    content = RecordDict(dict(message.content.items()))
    for name, record in message.content.array_records.items():
        content[name] = ArrayRecord(dict(record.items()))
    return Message(metadata=message.metadata, content=content)


class Lab:
    """Starts runs and goes on with them."""

    def __init__(self, corpus: Path, backbone: Path, folder: Path) -> None:
        self.data, self.backbone, self.folder = corpus, backbone, folder

    def config(self, **changes: Any) -> dict[str, Any]:
        values = {
            "task": "kws35", "data": str(self.data), "checkpoint": str(self.backbone), "rounds": 2,
            "clients-per-round": 2, "local-updates": 2, "batch": 4, **EXACT,
            "share": "lora", "lora-rank": 2, "shared-layers": 1, "wait": 1.0,
        }  # fmt: skip
        return values | {name.replace("_", "-"): value for name, value in changes.items()}

    def settings(self, **changes: Any) -> TaskFederation:
        settings = from_run_config(self.config(**changes))
        assert isinstance(settings, TaskFederation)
        return settings

    def grid(self, name: str, **changes: Any) -> Grid:
        return Grid(self.config(**changes), self.folder / f"{name}-clients")

    def run(self, name: str, grid: Grid | None = None, **changes: Any) -> Path:
        """A run from its beginning, in a directory of this name."""
        settings = self.settings(output=str(self.folder / name), **changes)
        return serve(grid or self.grid(name, **changes), settings)

    def resume(self, name: str, grid: Grid | None = None, **changes: Any) -> Path:
        settings = self.settings(resume=str(self.folder / name), **changes)
        return serve(grid or self.grid(name, **changes), settings)


@pytest.fixture
def lab(corpus: Path, backbone: Path, tmp_path: Path) -> Lab:
    return Lab(corpus, backbone, tmp_path)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "personal.json").read_text(encoding="utf-8"))
    return report


def weights_of(run: Path, number: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"round-{number:05d}" / "weights.safetensors")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_leaves_all_it_promises(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    grid = lab.grid("run")
    run = lab.run("run", grid)
    names = set(Resident(lab.settings(), len(WORDS)).state_dict())
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["updates_done"] for row in rows] == [2, 4]
    for row in rows:
        # Two of three clients, each two speakers who said four words twice, a quarter kept.
        assert (row["cohort"], row["failures"], row["applied"]) == (2, 0, 4)
        assert (row["clips"], row["test_clips"], row["samples"]) == (16, 8, 2 * 12 * SAMPLES)
        assert [client["seconds"] for client in row["clients"]] == pytest.approx([3.6, 3.6])
        # Names and shapes beside the numbers: these tensors are small.
        size = 4 * sum(value.numel() for value in weights_of(run, 1).values())
        assert 2 * size < row["bytes_received"] < 2 * (size + 200 * len(names))
    for number in (1, 2):
        assert set(weights_of(run, number)) == names
    report = report_of(run)
    scores = {key: entry["score"] for key, entry in report["by_client"].items()}
    assert set(scores) == {"0", "1", "2"}  # all of them, not a cohort
    assert report["mean"] == pytest.approx(sum(scores.values()) / 3, abs=1e-12)
    spread = torch.tensor(list(scores.values()), dtype=torch.float64).std(correction=0)
    assert report["deviation"] == pytest.approx(float(spread), abs=1e-12)
    assert [entry["clips"] for entry in report["by_client"].values()] == [4, 4, 4]
    assert {name: report[name] for name in ("clients", "test_clips", "failures", "metric")} == {
        "clients": 3, "test_clips": 12, "failures": [], "metric": "accuracy",
    }  # fmt: skip
    assert (report["task"], report["method"], report["share"]) == ("kws35", "fedper", "lora")
    assert (run / "personal.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().err
    assert "round 2/2  loss " in said
    assert f"fedper, 3 clients on their own clips: accuracy {100 * report['mean']:.2f} %" in said
    shown = [part for part in view(run).renderables if hasattr(part, "plain")]
    assert "on the clients' own clips" in shown[1].plain


def test_the_model_is_a_plain_backbone_with_the_shared_changes_in_it(lab: Lab) -> None:
    run = lab.run("run")
    model, info = Wav2Vec2Model.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    start = load_file(lab.backbone / "model.safetensors")
    shared = weights_of(run, 2)
    changed = {name.rpartition(".")[0] for name in shared}
    assert len(changed) == 4
    for name, value in model.state_dict().items():
        before = start["wav2vec2." + name]
        layer = "wav2vec2." + name.removesuffix(".weight")
        if layer not in changed:
            assert torch.equal(value, before), name
            continue
        change = SCALE * shared[f"{layer}.lora_b"] @ shared[f"{layer}.lora_a"]
        assert change.abs().max() > 1e-4
        assert torch.allclose(value, before + change, rtol=0, atol=1e-6)
    held = set(load_file(run / "model" / "model.safetensors"))
    assert not any(name.startswith("head.") or "lora" in name for name in held)
    assert json.loads((run / "model" / "task.json").read_text())["labels"] == []


def test_every_client_scores_the_last_weights(lab: Lab) -> None:
    grid = lab.grid("run")
    run = lab.run("run", grid)
    asked = grid.asked(MessageType.EVALUATE)
    assert [message.metadata.dst_node_id for message in asked] == [100, 101, 102]
    folded = dict.fromkeys(range(CLIENTS), -1)
    for row in rows_of(run):
        folded |= {client["key"]: row["step"] - 1 for client in row["clients"]}
    for key, message in enumerate(asked):
        instructions = dict(message.content.config_records[protocol.INSTRUCTIONS])
        assert instructions == {
            "run": (run / "identity").read_text().strip(), "round": 2, "first_update": 4,
            "updates": 0, "base_round": -1, "encoding": "fp32", "folded_round": folded[key],
            "backbone": Resident(lab.settings(), 4).backbone,
        }  # fmt: skip
        sent = Views(message.content.array_records[protocol.WEIGHTS])
        for name, value in weights_of(run, 2).items():
            assert sent[name].tobytes() == value.numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedrep", "server_optimizer": "fedadam"},
        {"method": "fedper", "encoding": "int8"},
        {"method": "fedavg", "share": "layers", "encoding": "topk"},
        {"method": "local"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(lab: Lab, changes: dict[str, Any]) -> None:
    changes = {"rounds": 3, "clients_per_round": 3, **changes}
    whole = lab.run("whole", **changes)
    grid = lab.grid("stopped", **changes)

    def stop(message: Message, key: int) -> Message | None:
        """At the last client's answer of round 2, as at a Ctrl-C."""
        instructions = message.content.config_records[protocol.INSTRUCTIONS]
        if message.metadata.message_type == MessageType.TRAIN and (instructions["round"], key) == (
            1,
            2,
        ):
            raise KeyboardInterrupt
        return None

    grid.spoil = stop
    with pytest.raises(Interrupted, match="interrupted; go on with --resume "):
        lab.run("stopped", grid, **changes)
    stopped = lab.folder / "stopped"
    assert not (stopped / "personal.json").exists()
    assert len(rows_of(stopped)) == 1
    # Clients 0 and 1 have done round 2 already: it is taken again.
    assert len(list((lab.folder / "stopped-clients").rglob("*-00001.safetensors"))) > 0 or (
        changes["method"] == "fedavg"
    )
    lab.resume("stopped", **changes)
    for number in (2, 3):
        name = f"checkpoints/round-{number:05d}"
        assert files_of(stopped / name) == files_of(whole / name)
    assert files_of(stopped / "model") == files_of(whole / "model")
    assert report_of(stopped) == report_of(whole)
    one, other = (
        {name.split("/", 1)[1]: data for name, data in files_of(folder).items()}
        for folder in (lab.folder / "whole-clients", lab.folder / "stopped-clients")
    )
    assert one == other
    assert [row["step"] for row in rows_of(stopped)] == [1, 2, 3]


def test_a_finished_run_is_evaluated_again_and_stays_as_it_is(lab: Lab) -> None:
    run = lab.run("run")
    kept = {name: files_of(run / name) for name in ("checkpoints", "model")}
    report, rows = report_of(run), rows_of(run)
    (run / "personal.json").unlink()
    grid = lab.grid("run")
    lab.resume("run", grid)
    assert not grid.asked(MessageType.TRAIN)
    assert {name: files_of(run / name) for name in kept} == kept
    assert report_of(run) == report
    assert rows_of(run) == rows


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedrep"},
        {"share": "layers"},
        {"lora_rank": 3},
        {"own_test": 0.5},
    ],
    ids=str,
)
def test_a_run_does_not_go_on_with_other_settings(lab: Lab, changes: dict[str, Any]) -> None:
    run = lab.run("run", rounds=1)
    kept = files_of(run)
    name = next(iter(changes)).replace("_", "-")
    with pytest.raises(UsageError, match=f"{name} was .* there and is .* now"):
        lab.resume("run", rounds=1, **changes)
    assert files_of(run) == kept


def test_a_checkpoint_of_other_tensors_is_refused(lab: Lab) -> None:
    run = lab.run("run", rounds=1)
    saved = run / "checkpoints" / "round-00001"
    job = job_of(lab.settings(share="layers"), "")
    with pytest.raises(DataError, match=r"round-00001 holds other tensors than the run shares"):
        job.restore(saved)
    (saved / "weights.safetensors").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"round-00001 is broken"):
        job_of(lab.settings(), "").restore(saved)


def test_local_training_shares_nothing_and_leaves_no_model(lab: Lab) -> None:
    grid = lab.grid("run", method="local")
    run = lab.run("run", grid, method="local")
    assert all(row["bytes_sent"] == row["bytes_received"] == 0 for row in rows_of(run))
    assert len(report_of(run)["by_client"]) == CLIENTS
    assert not (run / "model").exists()


def test_with_fedavg_the_model_has_the_shared_head(lab: Lab, corpus: Path) -> None:
    run = lab.run("run", method="fedavg", share="layers")
    model, info = Wav2Vec2ForSequenceClassification.from_pretrained(
        run / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(WORDS))
    assert torch.equal(model.classifier.weight, weights_of(run, 2)["head.linear.weight"])
    with pytest.raises(UsageError, match="with fedavg the server needs the task's corpus"):
        job_of(lab.settings(method="fedavg", data=""), "")
    job_of(lab.settings(method="fedper", data=""), "")


def test_log_mel_frames_with_a_shared_head(lab: Lab) -> None:
    changes: dict[str, Any] = {"checkpoint": "logmel", "method": "fedavg", "share": "none"}
    run = lab.run("run", **changes)
    assert set(weights_of(run, 2)) == {"head.linear.weight", "head.linear.bias"}
    held = load_file(run / "model" / "model.safetensors")
    assert torch.equal(held["head.linear.weight"], weights_of(run, 2)["head.linear.weight"])
    assert not (run / "model" / "config.json").exists()


def test_who_cannot_be_evaluated_is_listed(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    grid = lab.grid("run")

    def fail(message: Message, key: int) -> Message | None:
        if message.metadata.message_type == MessageType.EVALUATE and key == 1:
            return Message(Error(protocol.CLIENT_FAILED, "DataError"), reply_to=message)
        return None

    grid.spoil = fail
    report = report_of(lab.run("run", grid))
    assert set(report["by_client"]) == {"0", "2"}
    assert report["failures"] == ["client 1: DataError"]
    assert report["mean"] == pytest.approx(
        sum(entry["score"] for entry in report["by_client"].values()) / 2, abs=1e-12
    )
    assert "client 1: DataError" in capsys.readouterr().err


def test_without_any_evaluation_the_model_is_still_there(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = lab.grid("run")
    grid.spoil = lambda message, key: (
        Message(Error(protocol.CLIENT_FAILED, "gone"), reply_to=message)
        if message.metadata.message_type == MessageType.EVALUATE
        else None
    )
    run = lab.run("run", grid)
    report = report_of(run)
    assert (report["clients"], report["mean"], report["by_client"]) == (0, None, {})
    assert len(report["failures"]) == CLIENTS
    assert not (run / "personal.png").exists()
    assert (run / "model" / "model.safetensors").is_file()
    assert "no client could be evaluated" in capsys.readouterr().err


def test_an_evaluation_with_other_metrics_does_not_count(lab: Lab) -> None:
    grid = lab.grid("run")

    def more(message: Message, key: int) -> Message | None:
        if message.metadata.message_type != MessageType.EVALUATE or key != 2:
            return None
        grid.spoil = lambda message, key: None
        context = Context(
            7, 102, {"partition-id": 2, "num-partitions": 3, "state": str(grid.state)},
            RecordDict(), dict(grid.run),
        )  # fmt: skip
        reply = app(own_copy(message), context)
        reply.content[protocol.METRICS]["label_follow"] = 3
        return reply

    grid.spoil = more
    report = report_of(lab.run("run", grid))
    assert set(report["by_client"]) == {"0", "1"}
    (failure,) = report["failures"]
    assert "not agreed: ['label_follow']" in failure


def test_scores_of_a_round_are_means_over_clients_each_counting_once(lab: Lab) -> None:
    job = FineTuning(lab.settings())
    clients: list[dict[str, float]] = []
    for key, (before, after, samples) in enumerate(((0.25, 0.5, 16_000), (0.75, 1.0, 160_000))):
        values = dict.fromkeys(protocol.TASK_METRICS, 1.0)
        clients.append(
            {**values, "key": key, "test_before": before, "test_after": after, "samples": samples}
        )
    values = dict.fromkeys(protocol.TASK_METRICS, 1.0) | {"test_before": 0.7, "test_after": 0.9}
    metrics = {
        **values, "skipped_silent": 2.0, "round_seconds": 1.0, "bytes_sent": 1024.0,
        "bytes_received": 2048.0, "cohort": 3.0,
    }  # fmt: skip
    result = RoundResult(4, metrics, tuple(clients), ("client 2: DataError",))
    row = job.row(result)
    found = [row[name] for name in ("test_before", "test_before_deviation", "test_after",
                                    "test_after_deviation", "updates_done")]  # fmt: skip
    assert found == [0.5, 0.25, 0.75, 0.25, 10]
    assert [client["seconds"] for client in row["clients"]] == [1, 10]
    skipped = sum(1 for name in protocol.TASK_METRICS if name.startswith("skipped_")) + 1
    assert describe_round(job, result, row, lab.settings()) == (
        "round 5/2  loss 1.000  | clients' own clips: accuracy 50.0 % before training, 75.0 % "
        "after (spread 25.0)  | 1 s, sent 1 KiB, received 2 KiB, "
        f"{skipped} clips skipped, 1 of 3 clients failed"
    )
    assert row["clients_not_scored"] == 0
    clients.append({**values, "key": 2, "test_clips": 0.0, "test_before": 0.0, "test_after": 0.0})
    row = job.row(RoundResult(4, metrics, tuple(clients), ()))
    assert (row["test_after"], row["clients_not_scored"]) == (0.75, 1)
    assert "(spread 25.0), 1 clients without a usable test clip" in job.line(row)


def test_a_report_says_what_each_client_got(tmp_path: Path) -> None:
    settings = TaskFederation(task="speaker", method="local")
    found = {
        10: {"test_after": 1.0, "test_clips": 2.0},
        2: {"test_after": 0.5, "test_clips": 6.0},
        7: {"test_after": 0.0, "test_clips": 1.0},
        8: {"test_after": 0.0, "test_clips": 0.0},
    }
    lines = write_personal_report(tmp_path, settings, "eer", found, ("client 3: gone",))
    assert lines == [
        "  client 3: gone",
        "  client 8: none of its test clips can be used, not scored",
        "local, 3 clients on their own clips: accuracy 50.00 % (spread 40.82, from 0.0 to 100.0)",
    ]
    report = report_of(tmp_path)
    assert report["metric"] == "accuracy"  # a client has no trials of its own
    assert report["by_client"] == {
        "2": {"score": 0.5, "clips": 6},
        "7": {"score": 0.0, "clips": 1},
        "10": {"score": 1.0, "clips": 2},
    }
    assert (report["mean"], report["test_clips"], report["not_scored"]) == (0.5, 9, [8])


def test_a_report_of_thousands_of_clients_has_a_figure(tmp_path: Path) -> None:
    """All speakers of Speech Commands; a bar and a number for each would be too wide to draw."""
    found = {key: {"test_after": (key % 11) / 10, "test_clips": 4.0} for key in range(4000)}
    write_personal_report(tmp_path, TaskFederation(task="kws35"), "accuracy", found, ())
    png = (tmp_path / "personal.png").read_bytes()
    assert 100 < int.from_bytes(png[16:20], "big") < 4000
    assert len(report_of(tmp_path)["by_client"]) == 4000


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing shared": ({"share": "none"}, "fedper keeps the head on the device"),
    "too many layers": ({"share": "layers", "shared_layers": 3}, "shared-layers must be from 1 to"),
    "a high rank": ({"lora_rank": 16}, "lora-rank must be from 1 to 15, not 16"),
    "no backbone": ({"checkpoint": "logmel"}, "logmel has no backbone to train"),
    "no checkpoint": ({"checkpoint": "/nowhere"}, "/nowhere"),
    "no corpus for labels": ({"method": "fedavg", "data": "/nowhere"}, "no such folder: /nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_there_is_a_run(lab: Lab, case: str) -> None:
    changes, reason = WRONG[case]
    with pytest.raises(ShortwaveError, match=reason):
        lab.run("run", **changes)
    assert not (lab.folder / "run").exists()


def test_a_client_with_another_backbone_takes_no_part(lab: Lab, tmp_path: Path) -> None:
    other = str(write_backbone(tmp_path / "other", seed=1))
    grid = lab.grid("run", checkpoint=other)
    with pytest.raises(ShortwaveError, match="0 updates could be used, 1 are needed: client "):
        lab.run("run", grid)
    assert len(grid.asked(MessageType.TRAIN)) == 2


def test_weights_of_all_rounds_come_from_one_federation(lab: Lab) -> None:
    """The mean of what clients send, by the audio they have: here they have as much."""
    settings = dataclasses.replace(lab.settings(clients_per_round=3), rounds=1)
    job = FineTuning(settings)
    grid = lab.grid("run", clients_per_round=3, rounds=1)
    updates: list[dict[str, Tensor]] = []
    run = grid.push_messages

    def noted(messages: Iterable[Message]) -> list[str]:
        identifiers = run(messages)
        for name in identifiers:
            record = grid.replies[name].content.array_records.get(protocol.UPDATE)
            if record is not None:
                updates.append({n: torch.tensor(a) for n, a in Views(record).items()})
        return identifiers

    grid.push_messages = noted  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in job.weights.items()}
    serve(grid, dataclasses.replace(settings, output=lab.folder / "run"))
    after = weights_of(lab.folder / "run", 1)
    trained = updates[:3]
    assert len(updates) == 6
    assert all(not update for update in updates[3:])
    for name, start in before.items():
        mean = sum(update[name].double() for update in trained) / 3
        assert torch.allclose(after[name], (start + mean).float(), rtol=0, atol=1e-7)


def test_a_federation_says_on_which_backbone_it_is_built(lab: Lab) -> None:
    job = FineTuning(lab.settings())
    assert job.told["backbone"]
    assert Federation(job.weights, None, lab.settings(), "run", job.told).told == {  # type: ignore[arg-type]
        "backbone": job.told["backbone"]
    }
    assert Federation({}, None, lab.settings()).told == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fedavg", "fedper"])
def test_labels_in_another_order_are_refused_where_the_head_is_shared(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def another_order(*given: Any) -> Pool:
        pool = load_pool(*given)
        return pool._replace(labels=pool.labels[::-1])

    monkeypatch.setattr("fl_server.fine_tuning_job.load_pool", another_order)
    if method == "fedper":  # a head of its own may have labels of its own
        lab.run("run", method=method, rounds=1)
        return
    with pytest.raises(RoundFailed, match="4 labels of this device's corpus are not those of the"):
        lab.run("run", method=method, rounds=1)
