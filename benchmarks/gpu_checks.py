"""What `benchmarks.gpu` finds without a clock: gradients, bytes and memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.gpu_jobs import Cell, GpuJob, PeakMemory, release
from benchmarks.workers import noise
from partitions.sampling import SAMPLE_RATE
from ssl_core.planning.ladder import describe, ladder
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_loss import Weights
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.wav2vec2 import device_kernels
from ssl_core.wav2vec2.chance import draw
from ssl_core.wav2vec2.config import ModelConfig

Finding = dict[str, Any]
NO_CHANCE = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
}
"""Rates of dropout at which a gradient depends on masks, negatives and codes alone."""
UPDATES, DRY_UPDATES = 4, 2
"""Of each run whose bytes are compared; a graph is captured in the second and replayed after it."""
DROPPING = {"layerdrop": 0.3, "num_hidden_layers": 3}
"""Few sets of layers, of which most are drawn several times in `DROPPED_UPDATES`."""
DROPPED_UPDATES = 16
TEMPERATURE = 1.7


def check(job: GpuJob) -> Iterator[Finding]:
    """All findings, the most important first; one that fails is a finding too."""
    if job.dry:
        device_kernels.force("plain")
    torch.backends.cudnn.allow_tf32 = False
    parts: list[tuple[str, Callable[[], Finding]]] = [
        ("gradient_error", lambda: gradient_errors(job)),
        ("same_bytes", lambda: same_bytes(job)),
    ]
    parts += [
        (f"leanest of {cell.name}", lambda cell=cell: leanest(job, cell))  # type: ignore[misc]
        for cell in job.cells
    ]
    for name, part in parts:
        try:
            found = part()
        except Exception as error:
            text = str(error).strip().split("\n")[0][:300]
            found = {"failure": f"{type(error).__name__}: {text}"}
        release(job.device)
        yield {"what": name, **found}


def leanest(job: GpuJob, cell: Cell) -> Finding:
    """Peak of the leanest exact plan, one of the ladder's last two, launched kernel by kernel."""
    found = []
    for rung in ladder(job.plan(cell, graph=False), job.work())[-2:]:
        held = PeakMemory(job.device)
        step, batches = job.step(job.config(), rung.plan), job.batches(cell)
        for update in range(2):
            step.update(batches[update : update + 1], update)
        peaks = held.allocated(), held.reserved()
        found.append((peaks[0] or 0.0, peaks, describe(rung.plan)))
        del step
    _, (peak, reserved), plan = min(found)
    return {"plan": plan, "peak_gib": peak, "reserved_gib": reserved}


class SameCodes(TorchFunctionMode):
    """Context in which every `argmax` returns what it returned the first time.

    Where rounding changes a frame's code, that outweighs all other rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[Tensor] = []
        self.changed = 0.0
        """Fraction of codes that would have been others, the last time."""
        self._again: Iterator[Tensor] | None = None

    def repeat(self) -> None:
        """Return the codes found up to here from now on."""
        self._again = iter(self.codes)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, or repeat its result.

        Args:
            func: the torch function.
            types: types that override it, unused.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        result = func(*args, **(kwargs or {}))
        if func not in (Tensor.argmax, torch.argmax):
            return result
        if self._again is None:
            self.codes.append(result)
            return result
        first = next(self._again)
        self.changed = float((first != result).double().mean())
        return first


def gradient_errors(job: GpuJob) -> Finding:
    """Distance of gradients from that in fp32 on the same device, as fractions of its norm.

    Of one batch, the same masks, negatives, Gumbel noise and codes, without dropout: in bf16; in
    fp32 by plain kernels; and a second time in fp32, which must be 0.
    """
    cell = Cell(min(job.cell.length, 5.0), 2)
    codes = SameCodes()
    kernels: device_kernels.Kernels | None = "plain" if job.dry else None
    exact = _gradient(job, cell, "fp32", kernels, codes)
    found: Finding = {"cell": cell.name, "codes_pinned": len(codes.codes) > 0}
    for name, precision, chosen in (
        ("bf16", "bf16", kernels),
        ("fp32_plain_kernels", "fp32", "plain"),
        ("fp32_again", "fp32", kernels),
    ):
        codes.repeat()
        gradient = _gradient(job, cell, precision, chosen, codes)
        above = sum(
            float((gradient[k].double() - v.double()).norm() ** 2) for k, v in exact.items()
        )
        below = sum(float(v.double().norm() ** 2) for v in exact.values())
        found |= {name: (above / below) ** 0.5, f"codes_changed_in_{name}": codes.changed}
    return found


def _gradient(
    job: GpuJob,
    cell: Cell,
    precision: str,
    kernels: device_kernels.Kernels | None,
    codes: SameCodes,
) -> dict[str, Tensor]:
    """The gradient of every parameter by name, `[...]`.

    Args:
        job: its model and device.
        cell: shape of the batch.
        precision: of products.
        kernels: those to take; None chooses by device.
        codes: the codes to record or to repeat.
    """
    config = job.config(**NO_CHANCE)
    rng = np.random.default_rng(1)
    waveforms = torch.from_numpy(noise(rng, cell.batch, round(cell.length * SAMPLE_RATE)))
    draws = draw(config, cell.batch, waveforms.shape[1], rng).to(torch.device(job.device))
    recipe = RECIPES[job.model]
    weights = Weights(
        config.diversity_loss_weight,
        recipe.feature_penalty_weight,
        TEMPERATURE,
        recipe.code_entropy_weight,
    )
    with device_kernels.forced(kernels):
        step = job.step(config, job.plan(cell, precision=precision))
        with step.computing(), codes:
            step.accumulate(waveforms.to(job.device), draws, weights, draws.masked.numel())
        optimizer = step.optimizers["model"]
        return dict(zip(optimizer.parameters, optimizer.gradients(), strict=True))


def same_bytes(job: GpuJob) -> Finding:
    """Whether runs of one seed end with the same SHA-256 of weights and optimizer state.

    The last two have layerdrop and two batches an update, so that graphs alternate.
    """
    cell = Cell(min(job.cell.length, 1.0), min(job.cell.batch, 4))
    eager, graph = job.plan(cell, graph=False), job.plan(cell)
    config, dropping = job.config(), job.config(**DROPPING)
    updates, dropped_updates = (DRY_UPDATES, DRY_UPDATES) if job.dry else (UPDATES, DROPPED_UPDATES)
    by_graph = _run(job, config, graph, updates)
    one_by_one = _run(job, config, eager, updates)
    dropped = [
        _run(job, dropping, dataclasses.replace(plan, accumulation=2), dropped_updates)
        for plan in (eager, graph)
    ]
    return {
        "cell": cell.name,
        "updates": updates,
        "sha256": by_graph,
        "eager_twice": one_by_one == _run(job, config, eager, updates),
        "graph_twice": by_graph == _run(job, config, graph, updates),
        "graph_as_eager": by_graph == one_by_one,
        "resumed": by_graph == _run(job, config, graph, updates, stop=updates // 2),
        "graph_as_eager_with_layerdrop_and_accumulation": dropped[0] == dropped[1],
    }


def _run(job: GpuJob, config: ModelConfig, plan: Plan, updates: int, stop: int = 0) -> str:
    """Take updates and return the SHA-256 of weights and optimizer state.

    Args:
        job: its model and device.
        config: architecture.
        plan: of the step.
        updates: how many.
        stop: update before which all is copied to the host and to a new step; 0 for none.
    """
    release(job.device)
    step = job.step(config, plan)
    batches = job.batches(Cell(plan.length, plan.batch))
    for update in range(updates):
        if stop and update == stop:
            weights, state = _on_host(step.model.state_dict()), _on_host(step.optimizer_state())
            step = job.step(config, plan, weights=1)
            step.model.load_state_dict(weights)
            step.load_optimizer_state(state)
        first = update * plan.accumulation
        step.update([batches[(first + i) % len(batches)] for i in range(plan.accumulation)], update)
    return _digest(step)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


def _digest(step: PretrainingStep) -> str:
    digest = hashlib.sha256()
    everything = step.model.state_dict() | step.optimizer_state()
    for name, x in sorted(_on_host(everything).items()):
        digest.update(name.encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
