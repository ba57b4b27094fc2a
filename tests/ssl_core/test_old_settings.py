"""The settings of a run that the version before wrote are read as this version names them."""

import dataclasses
from pathlib import Path

import pytest

from common.errors import UsageError
from common.units import Names, Seconds, Size
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.planning.step_plan import StepOptions
from ssl_core.training.central import CentralSettings
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_settings import PretrainingSettings
from ssl_core.training.run_directory import open_run
from ssl_core.training.stored_settings import stored_settings
from ssl_core.wav2vec2.config import preset

TRAIN = """\
# not exact: precision bf16, optimizer-state int8
data: /corpora/LibriSpeech
subset: train-clean-100,dev-clean
length: 10s
model: tiny
checkpoint: ''
batch: 8
micro-batch: 0
accumulation: 2
precision: bf16
device: cpu
threads: 0
held-out: 0.05
eval-crops: 16
seed: 3
keep: 2
output: ''
resume: ''
set: recipe.learning-rate=5e-4 model.layerdrop=0.1 plan.recompute-layers=true
  plan.optimizer-state=int8 model.conv-dim=[32,48,64,96,128,128,160]
updates: 500
eval-every: 50
save-every: 200
"""
FINETUNE = """\
task: asr
data: /corpora/LibriSpeech
fold: '1'
split: paper
train: train-clean-100,train-clean-360
valid: ''
test: test-clean
recipe: ''
set: head=linear-ctc head-rate=1e-3
epochs: 3
batch: 0
micro-batch: 2
precision: fp32
device: cpu
threads: 0
seed: 0
cache: 8GiB
checkpoint: random
model: tiny
backbone: unfrozen
beam: 50
words: /texts/words.txt
ngram: ''
score-train: 'yes'
keep: 3
output: ''
resume: ''
"""
SIMULATION = """\
data: ''
subset: ''
length: 5s
model: tiny
checkpoint: ''
batch: 4
micro-batch: 0
accumulation: 1
precision: fp32
device: cpu
threads: 1
held-out: 0.1
eval-crops: 32
seed: 0
keep: 2
output: ''
resume: ''
set: recipe.negative-pool=batch
rounds: 20
clients: 100
clients-per-round: 4
local-updates: 2
partition: speaker
task: ''
method: fedper
share: backbone
shared-layers: 2
lora-rank: 8
head-updates: 0
own-test: 0.25
recipe: ''
server-optimizer: fedavg
server-rate: 0.0
server-momentum: 0.9
min-clients: 1
encoding: fp32
keep-moments: true
deadline: 0.0
patience: 0.0
fleet: ''
time-limit: 60s
wait: 600.0
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingFederation(PretrainingSettings):
    """Stands for the settings of a federation, which are on a floor above."""

    rounds: int = 10
    keep_optimizer_state: bool = False
    time_limit: Seconds | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFederation(TaskSettings):
    """The same for a task."""

    checkpoint: str = ""
    rounds: int = 10
    method: str = "fedper"


def run_with(path: Path, config: str) -> Path:
    """A run directory with that `config.yaml`."""
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(config)
    return path


def test_a_centralised_run(tmp_path: Path) -> None:
    found = stored_settings(CentralSettings, run_with(tmp_path, TRAIN))
    tiny = preset("tiny")
    assert found == CentralSettings(
        data=Path("/corpora/LibriSpeech"),
        subset=Names(("train-clean-100", "dev-clean")),
        length=Seconds(10),
        model="tiny",
        batch=8,
        accumulation=2,
        precision="bf16",
        device="cpu",
        eval_crops=16,
        seed=3,
        updates=500,
        architecture=dataclasses.replace(
            tiny, layerdrop=0.1, conv_dim=(32, 48, 64, 96, 128, 128, 160)
        ),
        recipe=dataclasses.replace(RECIPES["tiny"], learning_rate=5e-4),
        plan=StepOptions(recompute_layers=True, optimizer_state="int8"),
    )


def test_fine_tuning(tmp_path: Path) -> None:
    recipe = recipe_of("asr")
    expected = FinetuneSettings(
        task="asr",
        data=Path("/corpora/LibriSpeech"),
        train=Names(("train-clean-100", "train-clean-360")),
        valid=Names(),
        recipe=dataclasses.replace(recipe, head="linear-ctc", head_rate=1e-3, epochs=3),
        micro_batch=2,
        device="cpu",
        cache=Size(8 * 2**30),
        checkpoint="random",
        model="tiny",
        backbone="unfrozen",
        beam=50,
        words=Path("/texts/words.txt"),
        score_train=True,
        keep=3,
    )
    assert stored_settings(FinetuneSettings, run_with(tmp_path, FINETUNE)) == expected
    changed = FINETUNE.replace("'yes'", "'no'").replace("epochs: 3", "epochs: 0")
    changed = changed.replace("batch: 0", "batch: 7", 1).replace("=1e-3", "=1e-3 epochs=5")
    assert stored_settings(FinetuneSettings, run_with(tmp_path, changed)) == dataclasses.replace(
        expected,
        recipe=dataclasses.replace(expected.recipe, epochs=5, batch=7),
        score_train=False,
    )


def test_options_of_the_recipe_came_before_its_set(tmp_path: Path) -> None:
    both = FINETUNE.replace("head-rate=1e-3", "epochs=9 batch=2").replace("batch: 0", "batch: 4", 1)
    found = stored_settings(FinetuneSettings, run_with(tmp_path, both))
    assert (found.recipe.epochs, found.recipe.batch) == (3, 4)


def test_a_simulation_of_pretraining(tmp_path: Path) -> None:
    found = stored_settings(PretrainingFederation, run_with(tmp_path, SIMULATION))
    assert found == PretrainingFederation(
        model="tiny",
        device="cpu",
        threads=1,
        held_out=0.1,
        architecture=preset("tiny"),
        recipe=dataclasses.replace(RECIPES["tiny"], negative_pool="batch"),
        rounds=20,
        keep_optimizer_state=True,
        time_limit=Seconds(60),
    )


def test_a_simulation_of_a_task(tmp_path: Path) -> None:
    config = SIMULATION.replace("task: ''", "task: kws35").replace("fedper", "fedrep")
    config = config.replace("recipe: ''", "recipe: head-rate=2e-3 weight-decay=0 epochs=9")
    config = config.replace("checkpoint: ''", "checkpoint: random")
    found = stored_settings(TaskFederation, run_with(tmp_path, config))
    recipe = dataclasses.replace(recipe_of("kws35"), head_rate=2e-3, weight_decay=0.0, batch=4)
    assert found == TaskFederation(
        task="kws35",
        recipe=recipe,
        checkpoint="random",
        rounds=20,
        method="fedrep",
        device="cpu",
        threads=1,
    )


def test_a_quoted_word_of_set_is_one_value(tmp_path: Path) -> None:
    config = TRAIN.replace("[32,48,64,96,128,128,160]", '"[32, 48, 64, 96, 128, 128, 192]"')
    found = stored_settings(CentralSettings, run_with(tmp_path, config))
    assert found.architecture.conv_dim == (32, 48, 64, 96, 128, 128, 192)


def test_settings_of_this_version_stay_as_they_are(tmp_path: Path) -> None:
    now = CentralSettings(model="tiny", architecture=preset("tiny"), recipe=RECIPES["tiny"])
    assert stored_settings(CentralSettings, run_with(tmp_path, now.as_config())) == now


def test_what_neither_version_knows_is_refused(tmp_path: Path) -> None:
    run_with(tmp_path, TRAIN.replace("recipe.learning-rate", "recipe.learnin-rate"))
    with pytest.raises(UsageError, match=r"config.yaml: .* did you mean 'recipe.learning-rate'"):
        stored_settings(CentralSettings, tmp_path)
    run_with(tmp_path, "updats: 5\n")
    with pytest.raises(UsageError, match=r"config.yaml: .*'updats'; did you mean 'updates'"):
        stored_settings(CentralSettings, tmp_path)
    with pytest.raises(UsageError, match="no run is there"):
        stored_settings(CentralSettings, tmp_path / "none")


def test_a_run_of_the_version_before_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    run_with(tmp_path, TRAIN)
    stored = stored_settings(CentralSettings, tmp_path)
    same = dataclasses.replace(stored, resume=tmp_path, keep=5)
    free = ("output", "resume", "keep")
    assert open_run(same, "unused", free).path == tmp_path.resolve()
    other = dataclasses.replace(same, length=Seconds(5))
    with pytest.raises(UsageError, match=r"--resume .*: length was '10s' there and is '5s' now"):
        open_run(other, "unused", free)
    nested = dataclasses.replace(same, recipe=RECIPES["tiny"])
    with pytest.raises(UsageError, match=r"recipe.learning-rate was 0.0005 there and is 0.001 now"):
        open_run(nested, "unused", free)
