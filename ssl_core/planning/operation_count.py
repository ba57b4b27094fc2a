"""Counts the floating point operations of a training step with torch's flop counter.

A separate module because torch's counter imports a compiler (50 MiB), which a step does not need.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.planning.shape_tensors import Shapes
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import on_cpu, without_layerdrop
from ssl_core.planning.work import Work
from ssl_core.wav2vec2.operators import FLOPS


def _lstm_operations(x: Any, own: Any, recurrent: Any, *_: Any, **__: Any) -> int:
    """Operations of an LSTM's forward pass; its backward pass has twice as many."""
    return 2 * x[0] * x[1] * int(own[0] * own[1] + recurrent[0] * recurrent[1])


def _linear_operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Operations of a linear layer by oneDNN."""
    return 2 * math.prod(x) * int(weight[0])


_OPERATIONS = {
    torch.ops.mkldnn._linear_pointwise: _linear_operations,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_operations,
    torch.ops.aten.mkldnn_rnn_layer_backward: lambda *a, **k: 2 * _lstm_operations(*a, **k),
}
"""Counts for operations that torch's flop counter does not know."""


def counter() -> FlopCounterMode:
    """Torch's flop counter, extended by the project's own operations."""
    return FlopCounterMode(display=False, custom_mapping=FLOPS | _OPERATIONS)


def count_operations(work: Work, plan: Plan) -> int:
    """Count the operations of matrix products and convolutions in one update.

    The update runs on tensors without data. Operations that the plan recomputes are included.
    """
    work, plan = without_layerdrop(work), on_cpu(plan)
    counted = counter()
    with Shapes():
        started = work.start(plan)
        with counted:
            started.update(0)
    return int(counted.get_total_flops())
