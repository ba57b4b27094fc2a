"""The peak of a training process before a byte is allocated, part by part."""

import dataclasses
import functools

from partitions.units import format_bytes
from ssl_core.memory.plan import Plan
from ssl_core.memory.trace import trace
from ssl_core.wav2vec2.config import ModelConfig, Recipe

MIB = 2**20
RUNTIME = 545 * MIB
"""Resident after importing torch and this project; torch 2.11 for x86-64, CPU, Python 3.11."""
LIBRARIES = {"fp32": 122 * MIB, "bf16": 182 * MIB, "fp16": 182 * MIB}
"""What matrix and convolution libraries keep for themselves, generated code, Python's part of the
graph, tensors of less than a page: 107 to 113 MiB (fp32) and 170 MiB (bf16) measured, `tiny`."""
PACKED = 0.12
"""Packed copies of weights, as a share of all parameters: 10 to 45 MiB measured for `base`."""
KEPT = 0.7
"""Share of what comes and goes by which freed memory that is kept for reuse grows the process: gaps
that nothing fits into. 0.37 to 0.68 were measured, `base`, 5 s x 4, fp32, four plans."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, by name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the whole process."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """A line for each part, the largest first."""
        order = sorted(self.parts.items(), key=lambda item: -item[1])
        return "\n".join(f"{format_bytes(size):>10}  {name}" for name, size in order)


@functools.lru_cache(maxsize=1024)
def estimate(config: ModelConfig, recipe: Recipe, plan: Plan, runtime: int = RUNTIME) -> Estimate:
    """Estimate the peak of a training process.

    Args:
        config: architecture.
        recipe: of training.
        plan: how a step is taken.
        runtime: bytes resident before the model is made.
    """
    memory = trace(config, recipe, plan)
    libraries = LIBRARIES[plan.precision] + int(PACKED * memory.peak_parts["parameters"])
    parts = {"imports": runtime, **memory.peak_parts, "libraries": libraries}
    if plan.keep_freed_memory:
        moving = sum(
            size
            for name, size in memory.peak_parts.items()
            if name not in ("parameters", "optimizer state")
        )
        parts["freed and kept"] = int(KEPT * moving)
    return Estimate(parts)
