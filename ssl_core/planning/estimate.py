"""Estimates the peak memory of a training process by part, without allocating it."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import torch

from common.atomic import write_text
from common.cache_folder import cache_folder
from ssl_core.planning import allocator
from ssl_core.planning.cuda_trace import (
    fused_parts,
    of_few_micro_batches,
)
from ssl_core.planning.kernel_choice import choose_here, resolved
from ssl_core.planning.parts import ALLOCATOR, CONTEXT, RESERVED, Estimate
from ssl_core.planning.step_plan import Plan, Precision
from ssl_core.planning.trace import trace
from ssl_core.planning.work import Work
from ssl_core.wav2vec2.cpu.product_library import library

MIB = 2**20
RUNTIME = 505 * MIB
"""Resident after importing torch and this project; torch 2.11 for x86-64, CPU, Python 3.11."""
LIBRARIES = {"fp32": 63 * MIB, "vectors": 118 * MIB, "tiles": 142 * MIB}
"""Buffers and generated code of matrix and convolution libraries, the graph's Python objects, and
small gaps, by how products are computed (`_arithmetic`). Measured for `tiny`: 20 to 65 MiB above
`allocator.spare` in fp32, 88 to 110 in 16 bits with AVX-512."""
FORWARD = {"fp32": 56 * MIB, "vectors": 72 * MIB, "tiles": 122 * MIB}
"""The same with packed weights for a step without convolutions in the backward pass, as for a head
on a frozen backbone. Measured for `base`: 10 to 50 MiB above `allocator.spare`."""
PACKED, PACKED_IN_KEPT = 0.22, 0.06
"""Packed fp32 copies of weights as a fraction of the parameters: with `LIBRARIES` up to 113 MiB for
`base`. If freed memory is kept the copies lie in it: a third of that above `allocator.spare`."""
PIECES, PIECES_FRACTION = 8 * MIB, 0.01
"""Freed memory kept above `allocator.spare` between two checks, if convolutions are recomputed or a
batch is split: bytes, plus a fraction of the memory in use."""
IMPORTED = 112 * MIB
"""Heap bytes allocated while importing."""
_STAYING = ("parameters", "optimizer state")
_ROOMS = ("wav2vec2", "planning", "training", "downstream")


def estimate(work: Work, plan: Plan, runtime: int = RUNTIME, messages: int = 0) -> Estimate:
    """Estimate the peak memory of a training process.

    For a GPU this is the peak of what torch reserves of its memory, beside the CUDA context. With
    fused kernels it follows from a replay of torch's allocator (`cuda_trace`). With plain ones
    `ALLOCATOR` stands for gaps and for cuDNN's workspaces, calibrated on boards and a card.

    Args:
        work: what is trained.
        plan: how a step is taken.
        runtime: bytes resident before the model is built; of a GPU, the CUDA context.
        messages: bytes of Flower's messages that are held while training.

    Returns:
        Bytes of each part.
    """
    if plan.on_gpu and plan.kernels == "auto":
        plan = resolved(plan, choose_here(plan))
    live = {name: size for name, size in _live(work, plan).items() if size}
    parts = {CONTEXT if plan.on_gpu else "imports": runtime, **live}
    if messages:
        parts["message buffers"] = messages
    if plan.on_gpu:
        return Estimate(parts if plan.kernels == "fused" else parts | _around(live))
    kind = _arithmetic(plan.precision)
    if not work.convolves:
        parts["libraries"] = FORWARD[kind]
    else:
        packed = PACKED_IN_KEPT if plan.keep_freed_memory else PACKED
        if plan.precision != "fp32":
            packed /= 2
        parts["libraries"] = LIBRARIES[kind] + int(packed * live["parameters"])
    if plan.keep_freed_memory:
        used = sum(live.values()) + IMPORTED
        kept = allocator.spare(used)
        if plan.is_split or plan.recompute_features:
            kept += PIECES + int(PIECES_FRACTION * used)
        parts["freed memory kept"] = kept // 2 if work.recurs else kept
    return Estimate(parts)


def _around(live: dict[str, int]) -> dict[str, int]:
    """What plain kernels take beside live tensors."""
    moving = sum(size for name, size in live.items() if name not in _STAYING)
    return {RESERVED: int(ALLOCATOR * moving)}


def _arithmetic(precision: Precision) -> str:
    """How a CPU computes products: `fp32`, or 16 bits by `vectors` (AVX-512) or `tiles` (AMX).

    A processor without 16-bit units needs no more memory for them than for fp32.
    """
    if precision == "fp32":
        return "fp32"
    if torch.cpu._is_amx_tile_supported():
        return "tiles"
    return "vectors" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


@functools.lru_cache(maxsize=4096)
def _live(work: Work, plan: Plan) -> dict[str, int]:
    """Bytes of live tensors at the peak, cached on disk: every round is a new process.

    For fused kernels, all of a GPU's memory beside the CUDA context.
    """
    fused = plan.on_gpu and plan.kernels == "fused"
    plan = dataclasses.replace(
        plan,
        length=float(plan.length),
        device="cuda" if plan.on_gpu else "cpu",
        threads=0,
        compile=False,
        keep_freed_memory=True,
        kernels="fused" if fused else "plain",
        graph=plan.graph and fused,
    )
    values: list[object] = [library()]
    values += [[type(part).__name__, dataclasses.asdict(part)] for part in (work, plan)]  # type: ignore[arg-type]
    key = hashlib.sha256(json.dumps(values).encode() + _code_digest()).hexdigest()
    path = cache_folder() / "estimates" / f"{key[:32]}.json"
    try:
        found: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):  # missing or truncated
        found = _traced(work, plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    except OSError:
        pass  # a full or read-only disk costs time only
    return found


def _traced(work: Work, plan: Plan) -> dict[str, int]:
    """Trace a plan with the kernels that it will run."""
    if not plan.on_gpu:
        return trace(work, plan).peak_parts
    if plan.kernels == "fused":
        return fused_parts(work, plan)
    return of_few_micro_batches(plan, lambda few: trace(work, few).peak_parts)


@functools.cache
def _code_digest() -> bytes:
    """Digest of the code that an estimate depends on."""
    here = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(file for room in _ROOMS for file in (here / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
