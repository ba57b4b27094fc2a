"""`flwr run .` with Flower's own simulation on the demo corpus, from end to end."""

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from transformers import Wav2Vec2ForPreTraining

from benchmarks.flower_processes import FlowerProcesses, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerProcesses]:
    # The demo corpus stays in the user's cache: it takes long to make.
    processes = FlowerProcesses(
        tmp_path_factory.mktemp("simulation") / "home",
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(free_port()),
        FLWR_LOCAL_CONTROL_API_PORT=str(free_port()),
    )
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output") / "run"


@pytest.fixture(scope="module")
def finished(flower: FlowerProcesses, output: Path) -> "CompletedProcess[str]":
    return flower.run(
        "flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=3",
        "-c", f"rounds=2 local-updates=1 eval-crops=8 output='{output}'",
    )  # fmt: skip


def test_it_says_what_it_trains_on_and_where_the_results_are(
    finished: "CompletedProcess[str]", output: Path
) -> None:
    assert finished.returncode == 0, finished.stdout
    assert "the built-in demo corpus" in finished.stdout
    assert "round 2/2  loss" in finished.stdout
    assert f"run directory: {output}" in finished.stdout
    assert "DEPRECATED" not in finished.stdout
    assert "Traceback" not in finished.stdout


def test_the_run_directory_is_complete(finished: "CompletedProcess[str]", output: Path) -> None:
    assert finished.returncode == 0, finished.stdout
    config = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    assert (config["model"], config["rounds"], config["data"]) == ("tiny", 2, None)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert [client["key"] for client in row["clients"]] == [0, 1, 2]
        assert row["failures"] == 0
        assert 0 < row["held_out_loss"] < 10
    weights = []
    for number in (1, 2):
        model, info = Wav2Vec2ForPreTraining.from_pretrained(
            output / "checkpoints" / f"round-0000{number}", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        weights.append(model.state_dict())
    assert all(torch.isfinite(value).all() for value in weights[1].values())
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_error_is_one_line_in_the_stream(flower: FlowerProcesses, tmp_path: Path) -> None:
    output = tmp_path / "run"
    failed = flower.run(
        "flwr", "run", ".", "--stream", "-c", f"data='{tmp_path}/none' output='{output}'"
    )
    lines = failed.stdout.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: no such folder: {tmp_path}/none; give the folder that holds LibriSpeech's subsets"
    ], failed.stdout
    assert not any(line.startswith("  File ") for line in lines)
    assert not output.exists()
