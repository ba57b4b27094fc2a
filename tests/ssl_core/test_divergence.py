"""A run that has diverged ends with exit code 1; one that looks for its loss scale does not."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common import command
from common.errors import UsageError
from fl_server.job import Job
from fl_server.loss_guard import LossGuard
from fl_server.round_result import RoundResult
from fl_server.server_app import _log_and_save
from ssl_core.downstream.results import plot_learning
from ssl_core.train import main
from ssl_core.training import checkpoint, divergence
from ssl_core.training.curves import plot_curves
from ssl_core.training.divergence import Diverged, Watch
from ssl_core.training.planned_step import PlannedStep
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.run_directory import RunDirectory
from ssl_core.wav2vec2.config import ModelConfig

OPTIONS = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--batch", "2",
    "--eval-crops", "0", "--threads", "1", "--recipe.warmup", "0",
]  # fmt: skip


class Update(NamedTuple):
    """The report of an update; by default one that fails."""

    loss: float = math.nan
    applied: bool = False
    loss_scale: float = 1.0


GOOD = Update(1.0, True)
SEARCHING = Update(1.0, False, 2.0**16)
"""Skipped by the loss scale."""
OVERFLOW = Update(1.0, False, 1.0)


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def taken(updates: list[Update]) -> Watch:
    watch = Watch(lambda: None)
    for number, update in enumerate(updates, 1):
        watch.take(number, update)
    watch.finish()
    return watch


@pytest.mark.parametrize("bad", [Update(), OVERFLOW, Update(loss_scale=2.0**16)])
def test_ten_updates_in_a_row_without_a_finite_gradient_end_a_run(bad: Update) -> None:
    nine = [GOOD, *[bad] * 9]
    assert taken([*nine, *nine, GOOD]).skipped == 18
    with pytest.raises(Diverged, match=r"not finite from update 12 on \(10 updates\)"):
        taken([*nine, GOOD, *[bad] * 10])


def test_a_run_whose_every_update_failed_has_diverged_however_short() -> None:
    with pytest.raises(Diverged, match=r"from update 1 on.*no checkpoint was saved before"):
        taken([Update(), Update()])
    assert taken([Update(), GOOD, Update()]).skipped == 2


def test_the_search_for_a_loss_scale_is_no_divergence() -> None:
    watch = taken([GOOD, *[SEARCHING] * 30])
    assert (watch.applied, watch.skipped, watch.failed) == (1, 30, 0)
    assert taken([SEARCHING]).skipped == 1
    with pytest.raises(Diverged, match=r"from update 18 on"):
        taken([GOOD, *[SEARCHING] * 16, *[OVERFLOW] * 10])


def test_a_resumed_run_goes_on_counting() -> None:
    watch = Watch(lambda: Path("update-7"))
    for number in range(1, 10):
        watch.take(number, Update())
    resumed = Watch(lambda: Path("update-7"))
    resumed.load(json.loads(json.dumps(watch.state())), 9)
    with pytest.raises(Diverged, match=r"from update 1 on .*finite weights is update-7; try a"):
        resumed.take(10, Update())
    old = Watch(lambda: None)
    old.load({}, 200)
    assert (old.applied, old.failed) == (200, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, value: float) -> None:
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, value])}
    for save in (checkpoint.save_tensors, checkpoint.save):
        place = tmp_path / save.__name__
        good: Any = [place / "round-00001", {"a": torch.ones(3)}]
        bad: Any = [place / "round-00002", weights]
        if save is checkpoint.save:
            good.insert(1, ModelConfig())
            bad.insert(1, ModelConfig())
        save(*good, state={})
        with pytest.raises(Diverged, match=r"round-00002 is not written, as 1 tensors .*such as b"):
            save(*bad, state={})
        assert checkpoint.latest(place) == place / "round-00001"
        assert [path.name for path in place.iterdir()] == ["round-00001"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 1, error
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_central_run_that_diverges_fails_and_says_since_when(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(corpus), *OPTIONS, "--updates", "40", "--output", str(run)]
    rates = ["--recipe.learning-rate", "1e30", "--save-every", "1"]
    error = fails([*arguments, *rates], capsys)
    assert "training has diverged: the gradient is not finite from update 2 on (10 upd" in error
    assert f"with finite weights is {run / 'checkpoints' / 'update-0000001'}; try a lower" in error
    rows = strict(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 12))
    assert rows[0]["contrastive"] > 0
    assert rows[5]["contrastive"] is rows[5]["gradient_norm"] is None
    assert [row["updates_skipped"] for row in rows] == list(range(11))
    plot_curves({"run": rows}, tmp_path / "curves.png", negatives=100)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert RunDirectory(run).metrics() == rows


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--recipe.learning-rate", "1e300"], r"update-0000001 is not written, as \d+ tensors"),
        (["--recipe.learning-rate", "1e30", "--eval-crops", "2"], "held-out loss is not finite af"),
    ],
)
def test_weights_and_held_out_loss_that_are_not_finite_end_a_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    run = tmp_path / "run"
    arguments = ["--data", str(corpus), *OPTIONS, "--updates", "4", "--output", str(run)]
    error = fails([*arguments, "--save-every", "1", "--eval-every", "1", *options], capsys)
    assert re.search(text, error), error
    assert checkpoint.latest(run / "checkpoints") is None
    assert strict(run / "metrics.jsonl")


def test_a_healthy_run_in_fp16_counts_what_its_loss_scale_skips(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = PlannedStep.reset

    def high(step: PlannedStep) -> None:
        reset(step)
        step.loss_scale = 2.0**34

    monkeypatch.setattr(PlannedStep, "reset", high)
    monkeypatch.setattr(divergence, "PATIENCE", 3)
    run = tmp_path / "run"
    options = [*OPTIONS, "--updates", "22", "--precision", "fp16"]
    assert main(["--data", str(corpus), *options, "--output", str(run)]) == 0
    rows = strict(run / "metrics.jsonl")
    skipped = [row for row in rows if not row["applied"]]
    assert len(skipped) > 5
    assert rows[-1]["updates_skipped"] == len(skipped) < 22
    assert all(row["gradient_norm"] is None and row["loss"] > 0 for row in skipped)
    assert rows[-1]["loss_scale"] < 2.0**34


def test_curves_skip_numbers_that_do_not_exist(tmp_path: Path) -> None:
    rows = [
        {"epoch": epoch, "loss": loss, "valid_loss": None, "valid_accuracy": 0.5}
        for epoch, loss in ((1, 2.0), (2, None), (3, 1.0))
    ]
    plot_learning(tmp_path, rows, "accuracy")
    assert (tmp_path / "curves.png").stat().st_size > 1000


class FederatedJob(Job):
    """Whose held-out loss and weights are as given."""

    def __init__(self, loss: float, weight: float) -> None:
        self.loss, self.weights = loss, {"w": torch.tensor([weight])}

    def evaluate(self) -> dict[str, Any]:
        return {"held_out_loss": self.loss}

    def row(self, result: RoundResult) -> dict[str, Any]:
        return {"updates_done": 4, **result.metrics}

    def save(self, path: Path, state: Any, tensors: Any) -> None:
        checkpoint.save_tensors(path, self.weights, state=state)


class Nothing:
    """A federation of which only what is saved matters."""

    settings = type("Settings", (), {"keep": 2})

    def state(self, number: int) -> dict[str, Any]:
        return {"next_round": number + 1}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.mark.parametrize(
    ("loss", "weight", "text"),
    [
        (math.nan, 1.0, "the held-out loss is not finite after update 4"),
        (math.inf, 1.0, "the held-out loss is not finite after update 4"),
        (1.0, math.nan, "round-00002 is not written"),
    ],
)
def test_a_federation_ends_as_a_central_run_does(
    tmp_path: Path, loss: float, weight: float, text: str
) -> None:
    run, federation = RunDirectory.create(tmp_path / "run", ""), Nothing()
    for number, job in enumerate((FederatedJob(1.0, 1.0), FederatedJob(loss, weight))):
        result = RoundResult(number, {"loss": 1.0}, (), ())
        if number:
            with pytest.raises(Diverged, match=text) as error:
                _log_and_save(job, federation, LossGuard(0.0, 0), run, result)  # type: ignore[arg-type]
            assert str(run.checkpoints / "round-00001") in str(error.value)
        else:
            _log_and_save(job, federation, LossGuard(0.0, 0), run, result)  # type: ignore[arg-type]
    rows = strict(run.path / "metrics.jsonl")
    assert rows[1]["held_out_loss"] == (None if not math.isfinite(loss) else loss)
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "round-00001"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["learning_rate", "feature_penalty_weight", "gumbel_start"])
def test_settings_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name.replace('_', '-')} must be finite"):
        Recipe(**{name: value}).validate()  # type: ignore[arg-type]
