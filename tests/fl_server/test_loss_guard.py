"""Rounds that harm the model are undone, and a run of such rounds stops and can be resumed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_grid import FakeGrid, Reply, description, update
from flwr.app import Message, MessageType
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import Tensor

from common.errors import Interrupted
from fl_client import protocol
from fl_client.federation_settings import from_run_config
from fl_server import server_app
from fl_server.job import Job, client_rows
from fl_server.loss_guard import LossGuard, ModelHarmed
from fl_server.round_result import RoundResult
from fl_server.status import view
from ssl_core.training import checkpoint


@pytest.fixture(autouse=True)
def in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


class Small(Job):
    """A model of three weights whose held-out loss is 1 plus their distance to [4, 0]."""

    def __init__(self) -> None:
        self.weights = {"w": torch.zeros(2), "b": torch.zeros(())}

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, weights, tensors = checkpoint.load_tensors(path)
        for name, value in weights.items():
            self.weights[name].copy_(value)
        return state, tensors

    def save(self, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        checkpoint.save_tensors(path, self.weights, state=state, optimizer_state=tensors)

    def evaluate(self) -> dict[str, Any]:
        loss = 1 + float((self.weights["w"] - torch.tensor([4.0, 0.0])).norm())
        return {"held_out_loss": loss, "held_out_accuracy": 0.5, "held_out_perplexity": 20.0}

    def row(self, result: RoundResult) -> dict[str, Any]:
        return {
            "updates_done": result.number + 1,
            **result.metrics,
            "clients": client_rows(result),
        }

    def line(self, row: Mapping[str, Any]) -> str:
        return f"held out: loss {row['held_out_loss']:.3f}"


GOOD, BAD = [1.0, 0.0], [-1.0, 3.0]


class Lab:
    """Runs whose clients all send the same update in a round."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(server_app, "job_of", lambda settings, manifest: Small())
        self.interrupt_at = -1

    def grid(self, rounds: Mapping[int, list[float]]) -> FakeGrid:
        def client(key: int) -> Reply:
            described = description(key, 100.0)

            def answer(message: Message) -> Message:
                asked = message.content.config_records[protocol.INSTRUCTIONS]
                if asked.get("ask") == "describe":
                    return described(message)
                if message.metadata.message_type == MessageType.TRAIN:
                    number = asked["round"]
                    assert isinstance(number, int)
                    if number == self.interrupt_at:
                        raise KeyboardInterrupt
                    return update(rounds.get(number, GOOD), 16000)(message)
                return update(GOOD, 1)(message)

            return answer

        return FakeGrid({100 + key: [client(key)] for key in range(4)})

    def run(self, name: str, bad: Mapping[int, list[float]], **changes: Any) -> Path:
        path = self.folder / name
        place = "resume" if path.exists() else "output"
        values = {
            "model": "tiny", "length": "1s", "rounds": 4, "wait": 1.0, place: str(path),
            "server-optimizer": "fedavgm", "server-momentum": 0.0, "against-bound": 0.0,
        }  # fmt: skip
        values |= {key.replace("_", "-"): value for key, value in changes.items()}
        grid: Any = self.grid(bad)
        return server_app.serve(grid, from_run_config(values))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, bytes]:
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None
    return {path.name: path.read_bytes() for path in last.iterdir()}


def weights_of(run: Path) -> list[float]:
    last = checkpoint.latest(run / "checkpoints")
    assert last is not None
    values: list[float] = load_file(last / checkpoint.PART)["w"].tolist()
    return values


@pytest.mark.parametrize("round_", [0, 1, 3])
def test_a_round_that_raises_the_loss_is_undone(
    lab: Lab, round_: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lab.run("run", {round_: BAD})
    assert weights_of(run) == [3.0, 0.0]  # as after three good rounds
    rows = rows_of(run)
    assert [row["undone"] for row in rows] == [int(number == round_) for number in range(4)]
    losses, good = [row["held_out_loss"] for row in rows], iter([4.0, 3.0, 2.0])
    kept = 5.0
    for number, loss in enumerate(losses):
        kept = kept if number == round_ else next(good)
        assert loss == kept, "the logged loss is that of the weights that were kept"
    said = capsys.readouterr().err
    assert f"round {round_ + 1} is undone: the held-out loss rose from" in said
    assert said.count(", undone") == 1
    text = "".join(str(part) for part in view(run).renderables)
    assert ("the last round was undone" in text) == (round_ == 3)


def test_without_a_margin_nothing_is_undone(lab: Lab) -> None:
    run = lab.run("run", {1: BAD}, loss_margin=0.0)
    assert weights_of(run) == [2.0, 3.0]
    assert not any(row["undone"] for row in rows_of(run))


def test_a_guard_that_undoes_nothing_changes_no_byte_of_the_weights(lab: Lab) -> None:
    runs = [lab.run(f"run-{margin}", {}, loss_margin=margin) for margin in (0.0, 0.1)]
    first, second = (saved(run) for run in runs)
    assert {n: d for n, d in first.items() if n.endswith("safetensors")} == {
        n: d for n, d in second.items() if n.endswith("safetensors")
    }


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_undoes_the_same_rounds(lab: Lab, stop: int) -> None:
    bad = {1: BAD, 2: BAD}
    whole = saved(lab.run("whole", bad))
    lab.interrupt_at = stop
    with pytest.raises(Interrupted):
        lab.run("stopped", bad)
    lab.interrupt_at = -1
    run = lab.run("stopped", bad)
    assert saved(run) == whole
    assert [row["undone"] for row in rows_of(run)] == [0, 1, 1, 0]


def test_rounds_undone_in_a_row_stop_the_run_which_can_be_resumed(lab: Lab) -> None:
    bad = {1: BAD, 2: BAD, 3: BAD}
    with pytest.raises(ModelHarmed, match="the last 2 rounds were undone") as raised:
        lab.run("run", bad, rounds=6, undone_rounds=2)
    for advice in ("Resume it to try other cohorts", "loss-margin", "learning-rate"):
        assert advice in str(raised.value)
    run = lab.folder / "run"
    assert [row["undone"] for row in rows_of(run)] == [0, 1, 1]
    assert weights_of(run) == [1.0, 0.0]
    # Resumed, it may undo as many again; and other limits may be set.
    lab.run("run", bad, rounds=6, undone_rounds=2, loss_margin=0.3)
    assert [row["undone"] for row in rows_of(run)] == [0, 1, 1, 1, 0, 0]
    assert weights_of(run) == [3.0, 0.0]


def metrics(loss: float, perplexity: float = 40.0) -> dict[str, float]:
    return {"held_out_loss": loss, "held_out_perplexity": perplexity}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (metrics(4.0), ""),
        (metrics(4.39), ""),
        (metrics(4.41), "the held-out loss rose from 4.000 to 4.410"),
        (metrics(math.nan), "the held-out loss is not finite any more"),
        (metrics(math.inf), "the held-out loss is not finite any more"),
        (metrics(3.0, 3.9), "the held-out perplexity fell from 40.0 to 3.9"),
        (metrics(3.0, 4.1), ""),
        (metrics(3.0, math.nan), ""),
    ],
)
def test_what_counts_as_harm(found: dict[str, float], why: str) -> None:
    guard = LossGuard(0.1, 3, 4.0, kept=metrics(4.0), trained=True)
    assert guard.check(found) == why
    assert guard.kept == (metrics(4.0) if why else found)
    assert guard.in_a_row == int(bool(why))


def test_random_weights_may_lose_their_perplexity_in_the_first_round() -> None:
    guard = LossGuard(0.1, 3, 4.0, kept=metrics(4.0, 40.0))
    assert guard.check(metrics(4.0, 3.0)) == ""
    assert guard.check(metrics(4.0, 40.0)) == ""
    assert guard.check(metrics(4.0, 3.0)) == "the held-out perplexity fell from 40.0 to 3.0"
    given = {"model": "tiny", "checkpoint": "/somewhere"}
    assert LossGuard.of(from_run_config(given)).trained
    assert not LossGuard.of(from_run_config({"model": "tiny"})).trained


def test_a_codebook_that_is_small_from_the_start_is_not_the_rounds_doing() -> None:
    guard = LossGuard(0.1, 3, 4.0, kept=metrics(4.0, 5.0), trained=True)
    for perplexity in (3.9, 3.0, 2.1):
        assert guard.check(metrics(4.0, perplexity)) == ""


@pytest.mark.parametrize(
    ("loss", "perplexity", "harmed"),
    [(4.5, 8.0, False), (5.05, 8.0, False), (5.1, 8.0, True), (4.5, 5.4, True)],
)
def test_a_loss_that_rises_as_more_codes_come_into_use_is_no_harm_up_to_chance(
    loss: float, perplexity: float, harmed: bool
) -> None:
    guard = LossGuard(0.1, 3, 4.0, chance=4.615, kept=metrics(3.9, 5.0), trained=True)
    why = f"the held-out loss rose from 3.900 to {loss:.3f}" if harmed else ""
    assert guard.check(metrics(loss, perplexity)) == why


def test_a_good_round_ends_the_row() -> None:
    guard = LossGuard(0.1, 2, 4.0, kept=metrics(4.0))
    for loss in (9.0, 4.0, 9.0):
        guard.check(metrics(loss))
        guard.require_progress("runs/one")
    guard.check(metrics(9.0))
    with pytest.raises(ModelHarmed, match="runs/one"):
        guard.require_progress("runs/one")


def test_a_server_without_held_out_crops_undoes_nothing() -> None:
    guard = LossGuard(0.1, 3, 4.0)
    assert not guard.watches
    assert guard.check({}) == ""
    assert guard.state() == {}
    task = LossGuard.of(from_run_config({"task": "kws12", "checkpoint": "random"}))
    assert (task.watches, task.check({})) == (False, "")
