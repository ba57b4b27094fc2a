"""Settings of a federation, as Flower's run config holds them."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

from common.errors import UsageError
from common.settings import flat, from_mapping
from common.units import Names, Seconds
from fl_client.federation_settings import (
    PretrainingFederation,
    TaskFederation,
    from_run_config,
)
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.wav2vec2.config import preset

ROOT = Path(__file__).parents[2]
TASK = {"task": "kws12", "checkpoint": "random", "model": "tiny"}


def pretraining(**values: Any) -> PretrainingFederation:
    """Settings of a run config whose names are written with `__` and `_`."""
    found = from_run_config(written(values))
    assert isinstance(found, PretrainingFederation)
    return found


def task(**values: Any) -> TaskFederation:
    found = from_run_config(TASK | written(values))
    assert isinstance(found, TaskFederation)
    return found


def written(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}


def test_dotted_names_change_one_setting_of_a_preset() -> None:
    found = pretraining(
        model="tiny", architecture__num_hidden_layers=1, architecture__conv_bias=False,
        recipe__learning_rate=0.25, plan__optimizer_state="int8", plan__recompute_layers=True,
    )  # fmt: skip
    assert found.architecture == dataclasses.replace(
        preset("tiny"), num_hidden_layers=1, conv_bias=False
    )
    assert found.recipe == dataclasses.replace(RECIPES["tiny"], learning_rate=0.25)
    plan = found.step_plan()
    assert (plan.optimizer_state, plan.recompute_layers) == ("int8", True)
    of_a_task = task(recipe__head="x-vector", recipe__head_rate=0.5, plan__keep_attention=True)
    assert of_a_task.recipe == dataclasses.replace(
        recipe_of("kws12"), head="x-vector", head_rate=0.5, epochs=10
    )
    assert of_a_task.step_plan().keep_attention


def test_a_value_is_of_its_settings_type() -> None:
    found = pretraining(
        length="500ms", time_limit=60, subset="train-a, train-b", data="/a/b", deadline=3,
        architecture__conv_dim=str([16] * 7), held_out=0.25,
    )  # fmt: skip
    assert found.length == Seconds(0.5)
    assert found.time_limit == Seconds(60)
    assert found.subset == Names(("train-a", "train-b"))
    assert found.data == Path("/a/b")
    assert found.deadline == 3.0
    assert found.architecture.conv_dim == (16,) * 7


def test_an_empty_text_is_a_setting_that_was_not_given() -> None:
    empty = dict.fromkeys(flat(PretrainingFederation()), "")
    assert from_run_config(empty) == from_run_config({}) == PretrainingFederation()
    assert pretraining(**{"model": "tiny", "recipe.learning-rate": ""}).recipe == RECIPES["tiny"]
    empty = dict.fromkeys(flat(TaskFederation()), "") | TASK
    assert from_run_config(empty) == from_run_config(TASK)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"round": 3}, "run config: unknown setting 'round'; did you mean 'rounds'?"),
        (
            {"architecture.num-hidden-layer": 1},
            "run config: unknown setting 'architecture.num-hidden-layer'; did you mean "
            "'architecture.num-hidden-layers'?",
        ),
        (
            TASK | {"recipe.head-rat": 1.0},
            "run config: unknown setting 'recipe.head-rat'; did you mean 'recipe.head-rate'?",
        ),
        (
            {"set": "model.num-hidden-layers=1"},
            "run config: unknown setting 'set'; did you mean 'subset'?",
        ),
        ({"rounds": "many"}, "run config: --rounds: 'many' is not a whole number"),
        ({"length": "long"}, "'long' is not a length"),
        ({"architecture": "tiny"}, "run config: architecture must be a mapping of settings"),
        (
            TASK | {"recipe": "head-rate=1", "batch": 3},
            "run config: recipe must be a mapping of settings",
        ),
        ({"model": "tiney"}, "no model 'tiney': choose from base, tiny; did you mean 'tiny'?"),
        ({"held-out": 1.0}, "run config: held-out is a fraction of speakers in [0, 1), not 1.0"),
        ({"clients": 0}, "run config: clients must be at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_that_is_right(
    values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError) as refused:
        from_run_config(values)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", "2s"), ("accumulation", 2), ("held-out", 0.1), ("eval-crops", 4),
        ("fleet", "rpi4:4"), ("time-limit", "60s"), ("architecture.hidden-size", 48),
        ("recipe.learning-rate", 0.1), ("held_out", 0.1),
    ],
)  # fmt: skip
def test_a_task_refuses_settings_of_pretraining(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^run config: {name} is for pretraining$"):
        from_run_config(TASK | {name: value})
    assert from_run_config(TASK | {name: ""}) == from_run_config(TASK)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "fedavg"), ("share", "lora"), ("shared-layers", 1), ("lora-rank", 2),
        ("head-updates", 3), ("own-test", 0.5), ("recipe.head", "x-vector"),
        ("recipe.head-rate", 0.1), ("recipe.epochs", 3), ("own_test", 0.5),
    ],
)  # fmt: skip
def test_pretraining_refuses_settings_of_a_task(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^run config: {name} is for a task$"):
        from_run_config({name: value})
    assert from_run_config({name: ""}) == from_run_config({})


def test_every_setting_of_one_kind_only_is_refused_by_the_other() -> None:
    names = [flat(PretrainingFederation()).keys(), flat(TaskFederation()).keys()]
    both = [(names[0] - names[1] - {"batch"}, TASK), (names[1] - names[0] - {"task"}, {})]
    for unknown, good in both:
        assert len(unknown) > 10
        for name in unknown:
            with pytest.raises(UsageError, match=f"^run config: {name} is for "):
                from_run_config({**good, name: 1})


def test_a_run_config_is_parsed_once_a_process() -> None:
    for values in ({"model": "tiny", "rounds": 3}, TASK | {"rounds": 3}):
        first = from_run_config(values)
        assert from_run_config(dict(reversed(values.items()))) is first
        other = from_run_config(values | {"rounds": 4})
        assert other is not first
        assert (first.rounds, other.rounds) == (3, 4)


def test_a_batch_that_is_not_given_is_the_recipes() -> None:
    assert recipe_of("kws12").batch == 32
    assert task().recipe.batch == task(batch="").recipe.batch == task().step_plan().batch == 32
    given = task(batch=4)
    assert given.recipe.batch == given.step_plan().batch == 4
    assert task(recipe__batch=5).recipe.batch == 5
    assert dataclasses.replace(given.recipe, batch=32) == task().recipe
    assert pretraining(batch=6).step_plan().batch == 6


def test_epochs_follow_the_rounds_unless_given() -> None:
    assert recipe_of("kws12").epochs == 100
    assert (task().rounds, task().recipe.epochs) == (10, 10)
    assert task(rounds=7).recipe.epochs == 7
    assert task(rounds=7, recipe__epochs=9).recipe.epochs == 9
    assert task(rounds=7, batch=3, recipe__head_rate=0.5).recipe.epochs == 7


@pytest.mark.parametrize(
    "settings",
    [
        from_mapping(PretrainingFederation, {}, "this test"),
        from_mapping(
            PretrainingFederation,
            {
                "model": "tiny", "data": "/d", "length": 2.5, "subset": ["a", "b"], "batch": 3,
                "time-limit": "60s", "checkpoint": "/c", "output": "/o", "encoding": "int8",
                "architecture": {"num-hidden-layers": 1, "conv-dim": [16] * 7},
                "recipe": {"warmup": 0.0, "learning-rate": 1e-5}, "plan": {"compile": True},
            },
            "this test",
        ),
        from_mapping(
            TaskFederation,
            {
                "task": "slots", "checkpoint": "logmel", "data": "/d", "rounds": 3, "batch": 5,
                "recipe": {"train-extractor": True}, "own-test": 0.5, "partition": "skewed",
            },
            "this test",
        ),
    ],
    ids=["defaults", "pretraining", "task"],
)  # fmt: skip
def test_settings_come_back_from_a_run_config(
    settings: PretrainingFederation | TaskFederation,
) -> None:
    config = flat(settings)
    assert all(isinstance(value, str | int | float | bool) for value in config.values())
    assert from_run_config(config) == settings
    resumed = dataclasses.replace(settings, resume=Path("/not/on/this/device"))
    assert from_run_config(flat(resumed)) == resumed  # whose folder no client reads


def packaged() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config: dict[str, Any] = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    return config


def test_flowers_run_config_names_every_setting() -> None:
    config = packaged()
    names = flat(PretrainingFederation()).keys() | flat(TaskFederation()).keys()
    assert sorted(config) == sorted(names)
    given = {name: value for name, value in config.items() if value != ""}
    assert given == {"model": "tiny", "min-clients": 2}
    found = from_run_config(config)
    assert isinstance(found, PretrainingFederation)
    assert found == from_run_config(given)
    assert {name: flat(found)[name] for name in given} == given
    of_a_task = from_run_config(config | TASK)
    assert isinstance(of_a_task, TaskFederation)
    assert of_a_task == from_run_config(given | TASK)
    assert {name: flat(of_a_task)[name] for name in given} == given


def test_flwr_run_can_change_every_kind_of_value() -> None:
    asked = (
        "length='2s' batch=3 architecture.num-hidden-layers=1 recipe.warmup=0.5 plan.compile=true"
    )
    found = from_run_config(fuse_dicts(packaged(), parse_config_args([asked])))
    assert found == pretraining(
        model="tiny", min_clients=2, length="2s", batch=3, architecture__num_hidden_layers=1,
        recipe__warmup=0.5, plan__compile=True,
    )  # fmt: skip
    asked = "task='kws12' checkpoint='random' recipe.head='x-vector' recipe.head-rate=0.01"
    found = from_run_config(fuse_dicts(packaged(), parse_config_args([asked])))
    assert found == task(min_clients=2, recipe__head="x-vector", recipe__head_rate=0.01)
