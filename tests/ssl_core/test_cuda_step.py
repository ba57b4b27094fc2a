"""The step on a GPU, without one: launches, host reads, and the same gradient as on a CPU."""

import dataclasses
import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401 (before the kernels)
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_core.planning.step_plan import Plan
from ssl_core.training import pretraining_step
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.step_runner import DirectRunner
from ssl_core.wav2vec2 import device_kernels
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.cuda import launching
from ssl_core.wav2vec2.model import PretrainingModel

READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
"""Operations that wait for a value of the device."""
FREE = ("empty", "new_empty", "prim::", "detach", "alias", "lift_fresh", "_unsafe_view")
"""Operations that launch nothing, besides views."""


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given: operations that are no views, and Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.name()).removeprefix("aten::").split(".")[0]
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        from_gpu = any(x.device.type == "cuda" for x in given)
        to_host = isinstance(result, torch.Tensor) and result.device.type == "cpu" and from_gpu
        if name in READS or to_host:
            self.reads.append(name)
        elif not func.is_view and not name.startswith(FREE):
            self.operations[name] += 1
        return result


def fake_update(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, plan: Plan
) -> tuple[Launches, list[str]]:
    """Take two updates on tensors without data, and count what the second one launches."""
    monkeypatch.setattr(
        pretraining_step,
        "make_runner",
        lambda compute, device, *_: DirectRunner(compute, device, resident=True),
    )
    monkeypatch.setattr(pretraining_step, "addresses", lambda *_: [])
    batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), device_kernels.forced("fused"):
        with torch.device(plan.device):
            model = PretrainingModel(config)
        step = PretrainingStep(model, Recipe(), plan, seed=0, total_updates=10)
        step.take([batch] * plan.accumulation, 0)
        counted = Launches()
        monkeypatch.setattr(launching, "launched", [])
        with counted:
            step.take([batch] * plan.accumulation, 1)
        return counted, launching.launched or []


BASE = dataclasses.replace(preset("base"), layerdrop=0.0)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(batch=12, length=5.0, precision="bf16"),
        Plan(batch=12, length=5.0, precision="fp16"),
        Plan(
            batch=12,
            length=5.0,
            precision="bf16",
            recompute_layers=True,
            recompute_features=True,
        ),
    ],
    ids=["bf16", "fp16", "recomputed"],
)
def test_an_update_of_base_has_at_most_700_launches_and_reads_nothing(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd wants a real GPU for tensors that say they are on one, so these do not."""
    counted, kernels = fake_update(monkeypatch, BASE, plan)
    assert counted.reads == []
    total = sum(counted.operations.values()) + len(kernels)
    recomputed = 200 if plan.recompute_layers else 0
    assert total <= 700 + recomputed, (counted.operations.most_common(), Counter(kernels))


def test_nothing_is_copied_from_the_gpu_during_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that say that they are on a GPU, with gradients made instead of computed."""
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *_: None, raising=False)

    def backward(loss: torch.Tensor) -> None:
        assert loss.device.type == "cuda"
        for leaf in gc.get_objects():
            if isinstance(leaf, FakeTensor) and leaf.is_leaf and leaf.requires_grad:
                leaf.grad = torch.empty_like(leaf)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    plan = Plan(batch=2, length=1.0, precision="bf16", device="cuda:0")
    counted, _ = fake_update(monkeypatch, preset("tiny"), plan)
    assert counted.reads == []
    assert sum(counted.operations.values()) > 100


SMALL = dataclasses.replace(
    preset("tiny"),
    conv_dim=(16,) * 7,
    hidden_size=48,
    num_attention_heads=1,
    intermediate_size=64,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=3,
    codevector_dim=16,
    proj_codevector_dim=16,
    num_codevectors_per_group=8,
    num_hidden_layers=2,
    num_negatives=10,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    feat_proj_dropout=0.1,
    feat_quantizer_dropout=0.1,
    layerdrop=0.4,
)


@pytest.mark.slow
def test_an_update_on_a_gpu_is_that_of_a_cpu() -> None:
    """With all dropout, layerdrop and clipping; the first moment of Adam is a gradient."""
    plan = Plan(batch=2, micro_batch=1, length=0.33, recompute_layers=True)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((plan.batch, plan.samples), dtype=np.float32)
    states, reports = [], []
    kinds: tuple[device_kernels.Kernels, ...] = ("plain", "fused")
    for kernels in kinds:
        torch.manual_seed(0)
        with device_kernels.forced(kernels):
            step = PretrainingStep(
                PretrainingModel(SMALL), Recipe(clip_norm=0.5), plan, seed=0, total_updates=9
            )
            reports.append(step.update([batch], 0).metrics())
        states.append(step.optimizer_state())
    for metric, number in reports[0].items():
        assert reports[1][metric] == pytest.approx(number, rel=1e-5), metric
    for name, value in states[0].items():
        if name.startswith("exp_avg/") and not name.endswith("k_proj.bias"):  # which is 0
            error = (states[1][name].float() - value.float()).norm()
            assert float(error) <= 1e-5 * float(value.float().norm()), name
