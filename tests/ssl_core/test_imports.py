"""What a step imports: every megabyte of it is taken on every device."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = """
import dataclasses
import sys
from pathlib import Path
import numpy as np
import torch
from ssl_core.downstream.task_model import TaskModel, load_upstream
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.downstream.task_step import Batch, TaskStep
from ssl_core.planning.step_plan import Plan
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

plan = Plan(length=1.0, batch=2, recompute_layers=True, recompute_features=True)
crops = np.random.default_rng(0).standard_normal((2, 16000), dtype="f")
step = PretrainingStep(PretrainingModel(preset("tiny")), Recipe(), plan, seed=0, total_updates=1)
for size in (0, 1):
    step.change_plan(dataclasses.replace(plan, micro_batch=size))
    assert step.update([crops], 0).applied
hf.save_model(Path(sys.argv[1]), step.model.config, step.model.state_dict())
model = TaskModel.new(load_upstream(sys.argv[1], "", 0), recipe_of("emotion"), 4, 0)
clips = Batch([torch.randn(16000)] * 2, "waveform", [16000] * 2, torch.tensor([0, 1]))
rates = {"head": 1e-3, "backbone": 1e-3}
assert TaskStep(model, plan, unfrozen=True, seed=0).update(clips, 0, rates).applied
print(*sys.modules)
"""


@pytest.mark.parametrize("name", ["torch._dynamo", "torch._inductor", "triton", "sympy"])
def test_a_step_imports_no_compiler(name: str, imported: frozenset[str]) -> None:
    assert name not in imported


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    folder = tmp_path_factory.mktemp("backbone")

    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(done.stdout.split())
