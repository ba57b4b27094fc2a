"""Simulated devices: who is which, what each plans, and a run of different lengths."""

import json
from collections import Counter
from pathlib import Path

import pytest
from test_run import SMALL, Simulate, environment, simulate  # noqa: F401

from common.errors import UsageError
from fl_client.federation_settings import PretrainingFederation, from_run_config
from fl_client.round_plan import budget_of
from simulation.fleet import make_fleet, parse_fleet
from ssl_core.planning.step_plan import Plan

pytestmark = pytest.mark.usefixtures("shared_estimates")

THREE = "rpi4:2,jetson-xavier-nx:1,rtx2080ti:1"


def settings(**changes: object) -> PretrainingFederation:
    values = {"model": "tiny", "length": "5s", "clients": 4, "batch": 2, "fleet": THREE}
    found = from_run_config({**values, **changes})
    assert isinstance(found, PretrainingFederation)
    return found


@pytest.mark.slow
def test_devices_are_dealt_by_the_seed() -> None:
    first, again, other = (make_fleet(settings(seed=seed)).devices for seed in (0, 0, 3))
    assert first == again
    assert first != other
    assert Counter(first) == Counter(other) == parse_fleet(THREE, 4)


def test_a_device_that_would_take_too_long_trains_on_shorter_crops() -> None:
    fleet = make_fleet(settings(time_limit="5.7s"))
    lengths = {name: advice.plan.length for name, advice in fleet.advice.items()}
    assert lengths == {"rpi4": 1.0, "jetson-xavier-nx": 5.0, "rtx2080ti": 5.0}
    assert all((advice.seconds or 9) <= 5.7 for advice in fleet.advice.values())
    budget = budget_of(fleet.node(fleet.devices.index("rpi4")))
    assert budget.length == 1.0
    assert json.loads(budget.plan)["micro_batch"] == 0
    assert budget.change(Plan(compile=True)).compile  # which is for the run to say


@pytest.mark.parametrize(
    ("fleet", "reason"),
    [
        ("rpi4", "not DEVICE:CLIENTS"),
        ("rpi4:x", "not DEVICE:CLIENTS"),
        ("rpi4:0", "not DEVICE:CLIENTS"),
        ("rpi5:4", "did you mean 'rpi5-8gb'"),
        ("rpi4:3", "--fleet has 3 devices, --clients is 4"),
    ],
)
def test_a_wrong_fleet_is_refused(fleet: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        make_fleet(settings(fleet=fleet))


@pytest.mark.slow
def test_a_device_that_nothing_fits_stops_the_run_and_says_what_would() -> None:
    with pytest.raises(UsageError, match=r"nothing fits rpi4-2gb.*would fit: the model tiny"):
        make_fleet(settings(model="base", fleet="rpi4-2gb:4"))
    with pytest.raises(UsageError, match=r"an update.*nothing fits rpi4"):
        make_fleet(settings(fleet="rpi4:4", time_limit="1s"))


@pytest.mark.slow
def test_a_mixed_fleet_trains_together(
    simulate: Simulate,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    own = [*SMALL, "--length", "2s", "--clients-per-round", "4"]
    done = simulate(
        *own, "--fleet", THREE, "--time-limit", "5.53s", "--rounds", "1", "--output", str(run)
    )
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(client["length"] for client in row["clients"]) == [1.0, 1.0, 2.0, 2.0]
    report = (run / "report.md").read_text()
    assert "| rpi4 | 2 | 2 x 1s, fp32 |" in report
    assert "| rtx2080ti | 1 | 2 x 2s, fp32 |" in report
    assert simulate(*own, "--time-limit", "9s", "--rounds", "1").returncode == 2
