"""Two real faults of `benchmarks.faults`: a ClientApp and a ServerApp that are killed."""

import random
from pathlib import Path

import pytest

from benchmarks.fault_injection import take
from benchmarks.fault_outcome import Outcome, summary
from benchmarks.fault_trial import Trial
from benchmarks.flower_processes import write_tones

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("corpus"))


def run(fault: str, folder: Path, data: Path, encoding: str) -> Outcome:
    trial = Trial(
        fault, folder / "lab", data, random.Random(1), encoding,
        deadline=200, patience=2, rounds=3, limit=500, latest=0,
    )  # fmt: skip
    outcome = take(trial)
    assert not trial.lab.mine()
    return outcome


def test_a_killed_client_app_costs_one_answer_and_no_round(tmp_path: Path, data: Path) -> None:
    # Flower takes a minute to see that it is gone; by its patience the round ends before.
    outcome = run("clientapp", tmp_path, data, "int8")
    assert outcome.completed, outcome.notes
    assert outcome.rounds_lost == 0
    assert outcome.updates_lost >= 1, "the fault hit nothing"
    assert not outcome.audio_counted_twice, outcome.notes
    assert not outcome.state_lost, outcome.notes


def test_a_killed_server_app_costs_the_round_it_was_in(tmp_path: Path, data: Path) -> None:
    outcome = run("serverapp", tmp_path, data, "fp32")
    assert outcome.completed, outcome.notes
    assert (outcome.resumed, outcome.rounds_lost) == (1, 1), outcome.notes
    assert not outcome.audio_counted_twice, outcome.notes
    assert not outcome.state_lost, outcome.notes


def test_sums_over_runs() -> None:
    outcomes = [Outcome("hang", "int8", True, 2, False, True), Outcome("hang", "fp32")]
    assert summary(outcomes) == {
        "runs": 2, "completed": 1, "rounds_lost": 2, "audio_counted_twice": 0, "state_lost": 1,
        "updates_lost": 0, "clients_not_back": 0, "bad_updates_folded": 0, "bad_updates_bounded": 0,
        "resumed": 0,
    }  # fmt: skip
