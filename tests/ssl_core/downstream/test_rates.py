"""Learning rates by epoch, as exact numbers."""

import dataclasses

import pytest

from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.downstream.task_step import BACKBONE, HEAD


def test_linear_rates_fall_to_the_last_epochs() -> None:
    recipe = dataclasses.replace(recipe_of("kws12"), epochs=4, backbone_rate=2e-5)
    rates = [Rates(recipe).at(epoch) for epoch in range(4)]
    assert [rate[HEAD] for rate in rates] == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4])
    assert [rate[BACKBONE] for rate in rates] == pytest.approx([2e-5, 1.4e-5, 8e-6, 2e-6])
    alone = Rates(dataclasses.replace(recipe, epochs=1)).at(0)
    assert alone == {HEAD: 1e-3, BACKBONE: 2e-5}


def test_newbob_multiplies_after_an_epoch_that_improves_too_little() -> None:
    recipe = recipe_of("asr")
    assert (recipe.anneal, recipe.backbone_anneal, recipe.improvement) == (0.7, 0.5, 0.0025)
    rates, heads, backbones = Rates(recipe), [], []
    # Better, too little better, worse, better than the previous but not the best, perfect.
    for epoch, error in enumerate((0.8, 0.7, 0.699, 0.75, 0.72, 0.0, 0.0)):
        heads.append(rates.at(epoch)[HEAD] / recipe.head_rate)
        backbones.append(rates.at(epoch)[BACKBONE] / recipe.backbone_rate)
        rates.after(error)
    assert heads == pytest.approx([1, 1, 1, 0.7, 0.49, 0.49, 0.49])
    assert backbones == pytest.approx([1, 1, 1, 0.5, 0.25, 0.25, 0.25])
    assert rates.at(7)[HEAD] == pytest.approx(0.343 * recipe.head_rate)


def test_a_schedule_goes_on_from_its_state() -> None:
    first, second = Rates(recipe_of("slots")), Rates(recipe_of("slots"))
    for error in (0.5, 0.6):
        first.after(error)
    second.load(first.state())
    for rates in (first, second):
        rates.after(0.6)
    assert first.at(3) == second.at(3) == pytest.approx({HEAD: 4e-4 * 0.81, BACKBONE: 1e-5 * 0.81})
