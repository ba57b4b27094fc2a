"""A step on tensors without data takes the same operations, on the same shapes, as a real one."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_core.planning.shape_tensors import Block, Shapes, ShapeTensor, count_parameters
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import LiveMemory
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

NORM = ("aten.linalg_vector_norm.default", [((), (), torch.float32)])
TINY = PretrainingWork(architecture=preset("tiny"), recipe=RECIPES["tiny"])


class Record(TorchDispatchMode):
    """Keeps the name and the outputs' shapes of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.seen.append((str(func), [(tuple(x.shape), x.stride(), x.dtype) for x in leaves]))
        return result


def _compared(record: Record) -> list[tuple[str, list[Any]]]:
    """All operations but detached copies, and norms, of which torch takes several at once."""
    return [
        each
        for each in record.seen
        if "detach" not in each[0] and "norm.Sc" not in each[0] and each != NORM
    ]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(length=1.0, batch=2),
        Plan(length=1.0, batch=3, micro_batch=2, recompute_layers=True, optimizer_state="int8"),
        Plan(length=1.0, batch=2, precision="bf16", apply_in_backward=True),
    ],
    ids=["whole", "split", "bf16"],
)
def test_a_step_without_data_is_the_real_one(plan: Plan) -> None:
    real, shapes = Record(), Record()
    with real:
        TINY.start(plan).update(0)
    with Shapes(), shapes:
        TINY.start(plan).update(0)
    assert len(shapes.seen) > 1000
    assert _compared(shapes) == _compared(real)


def test_views_share_memory_and_results_have_their_own() -> None:
    memory = LiveMemory()
    with memory:
        x = torch.empty(4, 1024)
        assert memory.live == 4 * 4096
        view = x.view(-1)[100:].add_(1.0)
        assert isinstance(view, ShapeTensor)
        assert isinstance(x, ShapeTensor)
        assert view.block is x.block
        assert memory.live == 4 * 4096
        total = x + 1
        assert memory.live == 8 * 4096
        del x, total
        assert memory.live == 4 * 4096, "a view keeps the memory it looks at"
        del view
        assert (memory.live, memory.peak) == (0, 8 * 4096)


def test_memory_of_a_real_tensor_counts_once_while_it_has_views() -> None:
    memory, real = LiveMemory(), torch.zeros(2, 1024)
    with memory:
        parts = list(real)
        assert memory.live == 2 * 4096
        del parts
        gc.collect()
        assert memory.live == 0


def test_lengths_stay_real_and_other_values_are_one() -> None:
    with Shapes():
        lengths = torch.arange(4) * 2
        assert lengths.tolist() == [0, 2, 4, 6]
        assert float(torch.zeros(3).sum()) == 1.0
        assert torch.rand(3, 5)[lengths[1:2]].shape == (1, 5)
        outputs = torch.frexp(torch.rand(3))
        assert [part.dtype for part in outputs] == [torch.float32, torch.int32]


def test_gradients_pass_through() -> None:
    with Shapes():
        weight = torch.nn.Parameter(torch.empty(8, 5))
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.nn.functional.linear(torch.empty(3, 5), weight)
        assert out.dtype is torch.bfloat16
        out.sum().backward()
        assert weight.grad is not None
        assert weight.grad.shape == (8, 5)
        assert isinstance(weight.grad, ShapeTensor)
        assert isinstance(weight.grad.block, Block)


def test_without_the_mode_an_operation_is_refused() -> None:
    with Shapes():
        x = torch.empty(3)
    with pytest.raises(RuntimeError, match="outside of Shapes"):
        x + 1


def test_parameters_are_counted() -> None:
    model = PretrainingModel(TINY.architecture)
    assert count_parameters(lambda: PretrainingModel(TINY.architecture)) == sum(
        p.numel() for p in model.parameters()
    )
