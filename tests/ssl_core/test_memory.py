"""What a step takes is known before it is taken, and a plan that fits is found."""

import dataclasses

import psutil
import pytest

from common.errors import UsageError
from ssl_core.planning.decision import Decision, Option
from ssl_core.planning.estimate import MIB, estimate
from ssl_core.planning.ladder import describe, ladder
from ssl_core.planning.measure import measure
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import trace
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

pytestmark = pytest.mark.usefixtures("shared_estimates")

TINY = PretrainingWork(architecture=preset("tiny"), recipe=RECIPES["tiny"])
BASE = PretrainingWork(architecture=preset("base"), recipe=RECIPES["base"])
PARAMETERS = 1_956_608


def peak(plan: Plan) -> int:
    return trace(TINY, plan).peak


def test_the_parts_have_the_sizes_they_must_have() -> None:
    parts = trace(TINY, Plan(length=1.0, batch=2)).peak_parts
    # Each of 120 tensors is rounded up to a page.
    assert parts["parameters"] == pytest.approx(4 * PARAMETERS, rel=0.05)
    assert parts["optimizer state"] == pytest.approx(8 * PARAMETERS, rel=0.1)
    bytes_ = trace(TINY, Plan(length=1.0, batch=2, optimizer_state="int8")).peak_parts
    assert bytes_["optimizer state"] < 0.4 * parts["optimizer state"]


@pytest.mark.slow
def test_every_way_to_save_memory_saves_it() -> None:
    plan = Plan(length=5.0, batch=4)
    whole = peak(plan)
    assert peak(dataclasses.replace(plan, micro_batch=1)) < 0.6 * whole
    assert peak(dataclasses.replace(plan, precision="bf16")) < 0.8 * whole
    assert peak(dataclasses.replace(plan, recompute_layers=True)) < 0.9 * whole
    assert peak(Decision(TINY, plan, available=0).leanest.plan) < 0.5 * whole
    architecture = dataclasses.replace(TINY.architecture, attention_dropout=0.1)
    dropping = dataclasses.replace(TINY, architecture=architecture)
    kept = dataclasses.replace(plan, keep_attention=True)
    assert trace(dropping, kept).peak > trace(dropping, plan).peak


@pytest.mark.slow
def test_an_estimate_allocates_nothing() -> None:
    trace(TINY, Plan(length=1.0, batch=1))  # what is imported late
    before = psutil.Process().memory_info().rss
    found = trace(BASE, Plan(length=15.0, batch=8))
    assert sum(found.peak_parts.values()) > 4400 * MIB
    assert psutil.Process().memory_info().rss - before < 500 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "batch", "changes"),
    [
        (1.0, 2, {}),
        (5.0, 4, {"keep_freed_memory": False}),
        (15.0, 2, {"micro_batch": 1, "recompute_layers": True, "keep_freed_memory": False}),
        (5.0, 4, {"precision": "bf16", "keep_freed_memory": False}),
    ],
)
def test_the_measured_peak_is_below_the_estimate_and_near_it(
    length: float, batch: int, changes: dict[str, object]
) -> None:
    plan = dataclasses.replace(Plan(length=length, batch=batch, threads=1), **changes)  # type: ignore[arg-type]
    measured = measure(TINY, plan)
    expected = estimate(TINY, plan, measured.imports)
    assert 0.85 * expected.total < measured.peak <= expected.total


@pytest.mark.slow
def test_the_fastest_plan_that_fits_is_chosen() -> None:
    plan = Plan(length=5.0, batch=8)
    rungs = [rung.plan for rung in ladder(plan, TINY)]
    sizes = [estimate(TINY, p).total for p in rungs]
    slowdowns = [rung.slowdown for rung in ladder(plan, TINY)]
    assert slowdowns == sorted(slowdowns)
    roomy = Decision(TINY, plan, 64 * 2**30)
    assert roomy.chosen == Option(rungs[0], estimate(TINY, rungs[0]), 1.0)
    assert roomy.runner_up is None
    tight = Decision(TINY, plan, sizes[3] + 1)
    assert tight.chosen is not None
    assert tight.require() == tight.chosen
    assert tight.chosen.estimate.total <= sizes[3] + 1
    assert tight.runner_up is not None
    assert tight.runner_up.estimate.total > sizes[3] + 1
    assert tight.runner_up.slowdown <= tight.chosen.slowdown
    assert tight.fastest == roomy.chosen
    assert "at a time" in describe(tight.chosen.plan)


@pytest.mark.slow
def test_when_nothing_fits_the_missing_memory_is_named() -> None:
    decision = Decision(TINY, Plan(length=15.0, batch=4), 500 * MIB)
    assert decision.chosen is None
    assert decision.runner_up is None
    missing = decision.leanest.estimate.total - 500 * MIB
    with pytest.raises(UsageError, match=f"{missing / MIB:.3g} MiB more"):
        decision.require()
