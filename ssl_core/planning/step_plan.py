"""The plan of a training step: batch, micro-batch, recomputation, precision and device."""

import dataclasses
from typing import Literal, get_args

from common.errors import UsageError
from partitions.sampling import SAMPLE_RATE

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
HALF: tuple[Precision, ...] = ("bf16", "fp16")
"""Precisions in which products take and give 16 bits."""
OptimizerState = Literal["fp32", "bf16", "int8"]
KernelSetting = Literal["auto", "fused", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step trades time for memory.

    "Exact" options give the same masks, negatives and dropout, and the same gradient up to fp32
    rounding.
    """

    recompute_features: bool = False
    """Recompute the convolutions in the backward pass instead of keeping their output. Exact. A
    pretraining batch in several micro-batches always does this."""
    recompute_layers: bool = False
    """Keep only the input of each transformer layer and recompute the layer. Exact."""
    keep_attention: bool = False
    """Keep the attention weights, frames x frames a head (CPU only). Exact; needs the most
    memory."""
    optimizer_state: OptimizerState = "fp32"
    """Precision of the optimizer state: 8, 4 or 2 bytes a parameter for `fp32`, `bf16` (not exact)
    and `int8` (not exact)."""
    apply_in_backward: bool = False
    """Apply and free each gradient as soon as it is computed, so that they are never all in memory.
    Exact; only on a CPU, for updates of one batch that is not split. After a gradient that is not
    finite the rest of the update is skipped."""
    graph: bool = True
    """Replay an update's kernels from a CUDA graph instead of launching each anew (GPU only; the
    same bytes)."""
    kernels: KernelSetting = "auto"
    """Kernels of a GPU: `fused` in Triton, `plain` of torch; `auto` takes fused ones from compute
    capability 8.0 on, where Triton is installed. Both give the same masks."""
    compile: bool = False
    """Compile the transformer layers with torch.compile (needs a C++ compiler, takes minutes); on a
    GPU, not with fused kernels."""
    keep_freed_memory: bool = True
    """Keep freed memory for the next tensors instead of returning it to the kernel: faster on
    Linux (CPU only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(StepOptions):
    """How a step is taken. Only `precision` and `optimizer_state` change results."""

    length: float = 5.0
    """Length of every crop or clip in seconds."""
    batch: int = 8
    """Crops in a batch, over which one loss is computed (its diversity term depends on all)."""
    micro_batch: int = 0
    """Crops in memory at a time, at most `batch`; 0 for the whole batch. Exact."""
    accumulation: int = 1
    """Batches in an update."""
    precision: Precision = "fp32"
    """Precision of matrix products and of activations between them; weights are in fp32. `bf16`,
    `fp16` (with a scaled loss, for GPUs) and `tf32` (GPUs: products of fp32 numbers round them to
    10 bits) are not exact."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`, `cuda:1`."""
    threads: int = 0
    """CPU threads; 0 for torch's choice. Results depend on it in the last bits."""

    @property
    def samples(self) -> int:
        """Samples in a crop."""
        return round(self.length * SAMPLE_RATE)

    @property
    def crops(self) -> int:
        """Crops in an update."""
        return self.batch * self.accumulation

    @property
    def effective_micro_batch(self) -> int:
        """Crops in memory at a time."""
        return min(self.micro_batch or self.batch, self.batch)

    @property
    def is_split(self) -> bool:
        """Whether a batch is split into several micro-batches."""
        return self.effective_micro_batch < self.batch

    @property
    def on_gpu(self) -> bool:
        """Whether the step runs on a GPU."""
        return self.device.startswith("cuda")

    @property
    def inexact(self) -> tuple[str, ...]:
        """The settings that are not exact, as on the command line."""
        return tuple(
            f"{name.replace('_', '-')} {getattr(self, name)}"
            for name in ("precision", "optimizer_state")
            if getattr(self, name) != "fp32"
        )

    def validate(self) -> None:
        """Check ranges and combinations of settings.

        Raises:
            UsageError: what is wrong and what to do.
        """
        for name in ("batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch < 0 or self.threads < 0:
            raise UsageError("micro-batch and threads must not be below zero")
        choices = (
            ("precision", Precision),
            ("optimizer_state", OptimizerState),
            ("kernels", KernelSetting),
        )
        for name, known in choices:
            if getattr(self, name) not in get_args(known):
                raise UsageError(
                    f"{name.replace('_', '-')} '{getattr(self, name)}' is not one of "
                    f"{', '.join(get_args(known))}"
                )
        if self.precision == "tf32" and not self.device.startswith("cuda"):
            raise UsageError(f"precision tf32 is for GPUs, not {self.device}: choose fp32 or bf16")
        if self.apply_in_backward and (self.accumulation > 1 or self.is_split):
            raise UsageError(
                "apply-in-backward is for updates of one batch, not split: set accumulation to 1 "
                "and micro-batch to 0"
            )

        if self.on_gpu:
            self._validate_on_gpu()

    def _validate_on_gpu(self) -> None:
        default = StepOptions()
        for name in ("keep_attention", "apply_in_backward", "keep_freed_memory"):
            if getattr(self, name) != getattr(default, name):
                option, value = name.replace("_", "-"), str(getattr(default, name)).lower()
                raise UsageError(f"{option} is for a CPU: leave it at {value} on a GPU")
        if self.compile and self.kernels == "fused":
            raise UsageError(
                "compile cannot compile fused kernels: leave it out, they are faster; or set "
                "kernels to plain"
            )

    def validate_clipping(self, clip_norm: float) -> None:
        """Check the plan against a recipe's gradient clipping; `clip_norm` 0 is none.

        Raises:
            UsageError: gradients would be applied before their norm is known.
        """
        if self.apply_in_backward and clip_norm:
            raise UsageError(
                "apply-in-backward cannot clip: it applies gradients before their norm is known; "
                "set recipe.clip-norm to 0"
            )
