"""Floating point operations of a training step, counted by torch's flop counter.

Apart from the step, which runs without it: torch's counter brings a compiler along, 50 MiB of it.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.downstream.task_work import TaskWork, Work, make_batch, make_model, make_step, rates
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import Scalars
from ssl_core.training.pretraining_step import TrainingStep
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel
from ssl_core.wav2vec2.operators import FLOPS


def _lstm_operations(x: Any, own: Any, recurrent: Any, *_: Any, **__: Any) -> int:
    """Of a forward pass; a backward pass has twice as many."""
    return 2 * x[0] * x[1] * int(own[0] * own[1] + recurrent[0] * recurrent[1])


_OPERATIONS = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm_operations,
    torch.ops.aten.mkldnn_rnn_layer_backward: lambda *a, **k: 2 * _lstm_operations(*a, **k),
}
"""Of operations that torch's flop counter does not know."""


def counter() -> FlopCounterMode:
    """Torch's counter, which knows the project's own operations as well."""
    return FlopCounterMode(display=False, custom_mapping=FLOPS | _OPERATIONS)


def count_operations(config: ModelConfig, work: Work, plan: Plan) -> int:
    """Floating point operations of matrix products and convolutions in one update.

    Counted by torch's flop counter on fake tensors; what a plan recomputes is in it.
    """
    config = dataclasses.replace(config, layerdrop=0.0)
    plan = dataclasses.replace(plan, device="cpu")
    counted = counter()
    with FakeTensorMode(allow_non_fake_inputs=True), Scalars():
        if isinstance(work, TaskWork):
            task_step = make_step(make_model(config, work), work, plan)
            with counted:
                task_step.update(make_batch(task_step, work, torch.zeros), 0, rates(work))
        else:
            step = TrainingStep(PretrainingModel(config), work, plan, seed=0, total_updates=1)
            batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
            with counted:
                step.update([batch] * plan.accumulation, 0)
    return int(counted.get_total_flops())
