"""What a worker of `benchmarks.gpu` is asked for, and the tools that its parts share."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.workers import Waveforms, noise
from common.units import format_length
from partitions.sampling import SAMPLE_RATE
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import ModelConfig, preset
from ssl_core.wav2vec2.model import PretrainingModel

OURS = ("graph", "eager", "plain")
"""Variants of this project's step: by CUDA graph, without one, and by graph without Triton."""
PEERS = ("transformers_compiled", "transformers_eager")
CHECKS = "checks"
"""The worker that times nothing; see `gpu_checks`."""
TOTAL_UPDATES = 300_000
"""Of the paper's run, which is the length of the learning-rate schedule here too."""
BATCHES = 3
"""Different batches, taken in turn."""
GIB = 2**30


class Cell(NamedTuple):
    """The length of crops in seconds, and their number in a batch."""

    length: float
    batch: int

    @property
    def name(self) -> str:
        """As in `5s x 12`."""
        return f"{format_length(self.length)} x {self.batch}"

    @property
    def seconds(self) -> float:
        """Of audio in an update."""
        return self.length * self.batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuJob:
    """What a worker does."""

    variant: str
    """One of `OURS` or `PEERS`, or `CHECKS`."""
    cells: tuple[Cell, ...]
    """One cell, which is timed; for `CHECKS` all cells."""
    steps: int
    """Timed updates in a round."""
    dry: bool
    """On the CPU with plain kernels, for a test of the script."""

    @property
    def cell(self) -> Cell:
        """The cell that is timed."""
        return self.cells[0]

    @property
    def device(self) -> str:
        """The torch device."""
        return "cpu" if self.dry else "cuda"

    @property
    def model(self) -> str:
        """The preset."""
        return "tiny" if self.dry else "base"

    @property
    def name(self) -> str:
        """For progress and errors."""
        return self.variant if self.variant == CHECKS else f"{self.variant} {self.cell.name}"

    def config(self, **changes: object) -> ModelConfig:
        """The architecture, without layerdrop, which makes updates shorter by chance."""
        config = preset(self.model)
        if self.dry:
            changes = {"num_hidden_layers": 2, **changes}
        return dataclasses.replace(config, **{"layerdrop": 0.0, **changes})  # type: ignore[arg-type]

    def plan(self, cell: Cell, **changes: object) -> Plan:
        """The default plan in bf16 on this device, with `changes`."""
        plan = Plan(length=cell.length, batch=cell.batch, precision="bf16", device=self.device)
        return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]

    def work(self) -> PretrainingWork:
        """The same for the planner."""
        return PretrainingWork(architecture=self.config(), recipe=RECIPES[self.model])

    def step(self, config: ModelConfig, plan: Plan, weights: int = 0) -> PretrainingStep:
        """A step of a new model.

        Args:
            config: architecture.
            plan: how a step is taken.
            weights: seed of the initial weights; that of the draws is always 0.
        """
        torch.manual_seed(weights)
        model = PretrainingModel(config)
        recipe = RECIPES[self.model]
        return PretrainingStep(model, recipe, plan, seed=0, total_updates=TOTAL_UPDATES)

    def batches(self, cell: Cell) -> list[Waveforms]:
        """Noise, `[batch, sample]` each."""
        rng, samples = np.random.default_rng(0), round(cell.length * SAMPLE_RATE)
        return [noise(rng, cell.batch, samples) for _ in range(BATCHES)]


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds that work takes until its device has done it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, float]:
    """Least and median, in ms."""
    return {"min": 1e3 * min(seconds), "median": 1e3 * statistics.median(seconds)}


def gemm_tflops(device: str, size: int) -> float:
    """Best rate of a bf16 matrix product of `size`, cubed, in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)

    # Ten in a row, so that launching them takes no part.
    def ten() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    best = min(seconds_of(ten, device) for _ in range(3)) / 10
    return 2 * size**3 / best / 1e12


def launches(work: Callable[[], object], device: str) -> dict[str, int] | None:
    """Kernels and copies that a GPU runs for some work, by CUPTI; None on a CPU.

    A graph's are counted one by one, as if each had been launched.
    """
    if device == "cpu":
        return None
    synchronise(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronise(device)
    events = profile.events() or []
    names = [
        e.name
        for e in events
        if e.device_type == torch._C._autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


def release(device: str) -> None:
    """Free what nothing uses, on the device too: steps and their graphs refer to each other."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class PeakMemory:
    """The most memory of a GPU that this process has used, in GiB; None on a CPU."""

    def __init__(self, device: str) -> None:
        """Forget earlier peaks, and memory that is kept but not used."""
        self.device, self.on_gpu = device, device != "cpu"
        self.restart()

    def restart(self) -> None:
        """Forget the peaks up to here."""
        release(self.device)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> float | None:
        """Of tensors."""
        return torch.cuda.max_memory_allocated() / GIB if self.on_gpu else None

    def reserved(self) -> float | None:
        """Of tensors and what torch keeps for later ones, which graphs have their share of."""
        return torch.cuda.max_memory_reserved() / GIB if self.on_gpu else None
