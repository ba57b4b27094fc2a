"""The plan of a round: what a device may change of it, and what it falls back to."""

import dataclasses
import json
from typing import Any

import pytest

from common.errors import UsageError
from fl_client.round_plan import NO_BUDGET, RUNTIME, Budget, RoundPlan, budget_of, to_json
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import ladder
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

pytestmark = pytest.mark.usefixtures("shared_estimates")

OTHER: dict[str, Any] = {
    "recompute_features": True, "recompute_layers": True, "keep_attention": True,
    "optimizer_state": "int8", "apply_in_backward": True,
    "keep_freed_memory": False,
}  # fmt: skip
ARCHITECTURE = dataclasses.replace(preset("tiny"), num_hidden_layers=1)
WORK = PretrainingWork(architecture=ARCHITECTURE, recipe=RECIPES["tiny"])


def test_a_plan_made_elsewhere_carries_every_option_of_a_step_but_those_of_the_run() -> None:
    names = [field.name for field in dataclasses.fields(StepOptions)]
    assert sorted([*OTHER, "compile", "graph", "kernels"]) == sorted(names)
    made = Plan(length=2.0, batch=6, micro_batch=2, accumulation=3, threads=5, **OTHER)
    assert all(getattr(made, name) != getattr(Plan(), name) for name in OTHER)
    assert json.loads(to_json(made)) == {"micro_batch": 2, **OTHER}
    run = Plan(length=1.0, batch=6, accumulation=2, threads=1, compile=True, graph=False)
    changed = Budget(plan=to_json(made)).change(run)
    assert changed == dataclasses.replace(run, micro_batch=2, **OTHER)
    assert changed.compile  # as the run says
    assert not changed.graph


@pytest.mark.parametrize("name", OTHER)
def test_a_plan_made_elsewhere_changes_each_option_alone(name: str) -> None:
    made = dataclasses.replace(Plan(), **{name: OTHER[name]})
    assert Budget(plan=to_json(made)).change(Plan()) == made


def test_a_device_changes_nothing_but_a_shorter_length() -> None:
    plan = Plan(length=2.0, batch=3)
    assert NO_BUDGET.change(plan) == plan
    assert Budget(length=0.5).change(plan) == dataclasses.replace(plan, length=0.5)
    with pytest.raises(UsageError, match="--length 3s is longer than the run's 2s"):
        Budget(length=3.0).change(plan)


def test_a_nodes_budget_is_what_its_config_says() -> None:
    text = to_json(Plan(recompute_layers=True))
    node = {"device": "rpi4", "memory": 7, "length": 0.5, "threads": 2, "plan": text}
    assert budget_of(node) == Budget(7, 0.5, 2, text)
    assert budget_of({}) == NO_BUDGET
    live = budget_of({"device": "auto", "length": 2.0})
    assert live.live
    assert live.memory > 0
    assert live.length == 2.0


@pytest.mark.slow
def test_stepping_down_takes_every_leaner_exact_plan_in_turn() -> None:
    run, messages = Plan(length=1.0, batch=2), 9 * 2**20
    chosen = RoundPlan(WORK, run, Budget(memory=2**40), messages)
    rungs = [rung.plan for rung in ladder(run, WORK)]
    taken, predicted = [chosen.plan], [chosen.predicted]
    while chosen.step_down("out of memory"):
        taken.append(chosen.plan)
        predicted.append(chosen.predicted)
    assert taken == rungs
    for place in (0, -1):
        assert predicted[place] == estimate(WORK, rungs[place], RUNTIME, messages).total
    assert chosen.fallbacks == len(rungs) - 1 >= 5
    assert (chosen.plan, chosen.plan.inexact) == (rungs[-1], ())
    assert predicted[-1] < predicted[0]


def test_without_a_budget_the_runs_own_plan_is_taken_and_nothing_is_predicted() -> None:
    run = Plan(length=1.0, batch=2, keep_attention=True)
    chosen = RoundPlan(WORK, run, NO_BUDGET, 0)
    assert (chosen.plan, chosen.predicted) == (run, 0)
    assert chosen.step_down("out of memory")
    assert (chosen.predicted, chosen.fallbacks) == (0, 1)
    assert not chosen.watch()


def test_without_a_backbone_nothing_is_planned() -> None:
    plan = Plan(batch=4)
    chosen = RoundPlan(None, plan, Budget(memory=1), 0)
    assert (chosen.plan, chosen.predicted) == (plan, 0)
    assert not chosen.step_down("out of memory")
    assert (chosen.plan, chosen.fallbacks) == (plan, 0)
