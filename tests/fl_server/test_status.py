"""What a federation does, for those who look on."""

import math
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import UsageError
from fl_client import protocol
from fl_server.__main__ import main
from fl_server.roster import Client
from fl_server.status import Status, is_done, view
from ssl_core.training.run_directory import RunDirectory

TWO = [Client(key, 100 + key, 5, 5.0) for key in (3, 7)]


def shown(path: Path) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(view(path))
    return capture.get()


def test_who_trains_with_what_and_who_failed_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path / "run", "rounds: 2\n")
    assert "waiting for the first round" in shown(run.path)
    done: list[int] = []
    status = Status(run.path, 2, lambda: done.append(1))
    status.began(0, TWO)
    assert shown(run.path).count("training") == 2
    metrics = dict.fromkeys(protocol.TRAIN_METRICS, 1.0)
    metrics |= {"length": 5.0, "batch": 4.0, "peak_bytes": 2.0**31, "predicted_bytes": 2.0**32}
    status.replied(3, metrics)
    status.replied(7, None, "DataError")
    text = shown(run.path)
    assert "4 x 5s" in text
    assert "2.00 GiB" in text
    assert "4.00 GiB" in text
    assert "DataError" in text
    assert "round 1 of 2, 0 done" in text
    assert len(done) == 2
    row = {"contrastive": 1.5, "accuracy": 0.1, "round_seconds": 30.0}
    for step in (1, 2):
        assert not is_done(run.path)
        run.log(step, row)
    assert is_done(run.path)
    assert main(["watch", str(run.path)]) == 0
    assert capsys.readouterr().out.endswith(f"{run.path}\n")
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "loss 1.500" in capsys.readouterr().out


def test_numbers_that_do_not_exist_are_shown_as_such(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "rounds: 2\n")
    status = Status(run.path, 2)
    status.began(0, TWO)
    metrics = dict.fromkeys(protocol.TRAIN_METRICS, 1.0) | {"predicted_bytes": math.nan}
    status.replied(3, metrics)
    held_out = {"held_out_loss": math.nan, "held_out_accuracy": math.inf, "round_seconds": 3.0}
    run.log(1, {"contrastive": math.nan, "accuracy": 0.25, **held_out})
    for file in ("status.json", "metrics.jsonl"):
        text = (run.path / file).read_text()
        assert "null" in text
        assert "NaN" not in text
    text = " ".join(shown(run.path).split())
    assert "loss not finite, accuracy 0.250; held out: loss not finite, accuracy not fin" in text
    run.log(2, {"loss": 1.0, "test_after": math.nan, "round_seconds": 3.0})
    assert "loss 1.000, on the clients' own clips not finite" in shown(run.path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run is there"):
        main(["watch", str(tmp_path)])
