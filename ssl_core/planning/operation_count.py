"""Floating point operations of a training step, counted by torch's flop counter.

Apart from the step, which runs without it: torch's counter imports a compiler, 50 MiB of it.
"""

import dataclasses
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.planning.fake_tensors import Scalars
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import without_layerdrop
from ssl_core.planning.work import Work
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


def count_operations(work: Work, plan: Plan) -> int:
    """Floating point operations of matrix products and convolutions in one update.

    Counted by torch's flop counter on fake tensors; what a plan recomputes is included.

    Args:
        work: what is trained.
        plan: how the step is taken.
    """
    work, plan = without_layerdrop(work), dataclasses.replace(plan, device="cpu")
    counted = counter()
    with FakeTensorMode(allow_non_fake_inputs=True), Scalars():
        started = work.start(plan)
        with counted:
            started.update(0)
    return int(counted.get_total_flops())
