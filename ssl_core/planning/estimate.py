"""The peak memory of a training process before a byte is allocated, part by part."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import torch

from common.atomic import write_text
from common.cache_folder import cache_folder
from ssl_core.planning import allocator
from ssl_core.planning.parts import ALLOCATOR, Estimate
from ssl_core.planning.step_plan import Plan, Precision
from ssl_core.planning.trace import trace
from ssl_core.planning.work import Work

MIB = 2**20
RUNTIME = 505 * MIB
"""Resident after importing torch and this project; torch 2.11 for x86-64, CPU, Python 3.11."""
LIBRARIES = {"fp32": 63 * MIB, "vectors": 118 * MIB, "tiles": 142 * MIB}
"""What matrix and convolution libraries keep for themselves, generated code, Python's part of the
graph and small gaps, by how products are computed (`_arithmetic`). Measured for `tiny`: 20 to
65 MiB above `allocator.spare` in fp32, 88 to 110 in 16 bits with AVX-512."""
FORWARD = {"fp32": 56 * MIB, "vectors": 72 * MIB, "tiles": 122 * MIB}
"""The same where no convolution is in the backward pass, packed weights included, as with a head on
a frozen backbone. Measured for `base`: 10 to 50 MiB above `allocator.spare`."""
PACKED, PACKED_IN_KEPT = 0.22, 0.06
"""Packed copies of weights in fp32, as a fraction of the parameters: with the above up to 113 MiB
for `base`. Where freed memory is kept they lie in it: a third of that above `allocator.spare`."""
PIECES, PIECES_FRACTION = 8 * MIB, 0.01
"""Freed memory that may be kept above `allocator.spare` between two looks at it, where convolutions
run again or a batch is split: bytes, and a fraction of what is in use."""
IMPORTED = 112 * MIB
"""Heap bytes allocated while importing."""
_STAYING = ("parameters", "optimizer state")
_ROOMS = ("wav2vec2", "planning", "training", "downstream")


def estimate(work: Work, plan: Plan, runtime: int = RUNTIME, messages: int = 0) -> Estimate:
    """Estimate the peak of a training process.

    On a GPU: of its memory, with what the CUDA allocator takes above tensors as in `ALLOCATOR`; not
    measured by this project yet.

    Args:
        work: what is trained.
        plan: how a step is taken.
        runtime: bytes resident before the model is built.
        messages: bytes of Flower's messages that are held while training.
    """
    live = {name: size for name, size in _live(work, plan).items() if size}
    parts = {"imports": runtime, **live}
    if messages:
        parts["message buffers"] = messages
    if plan.device.startswith("cuda"):
        moving = sum(size for name, size in live.items() if name not in _STAYING)
        return Estimate(parts | {"CUDA allocator": int(ALLOCATOR * moving)})
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
        parts["freed and kept"] = kept // 2 if work.recurs else kept
    return Estimate(parts)


def _arithmetic(precision: Precision) -> str:
    """How a CPU computes products: in `fp32`, in 16 bits by `vectors` (AVX-512) or `tiles` (AMX).

    A processor without units for 16 bits takes as little memory in them as in fp32.
    """
    if precision == "fp32":
        return "fp32"
    if torch.cpu._is_amx_tile_supported():
        return "tiles"
    return "vectors" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


@functools.lru_cache(maxsize=4096)
def _live(work: Work, plan: Plan) -> dict[str, int]:
    """Tensors at the peak, kept on disk: a client is a new process in every round."""
    plan = dataclasses.replace(
        plan,
        length=float(plan.length),
        device="cpu",
        threads=0,
        compile=False,
        keep_freed_memory=True,
    )
    values = [[type(part).__name__, dataclasses.asdict(part)] for part in (work, plan)]  # type: ignore[arg-type]
    key = hashlib.sha256(json.dumps(values).encode() + _code()).hexdigest()
    path = cache_folder() / "estimates" / f"{key[:32]}.json"
    try:
        found: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):  # not there, or cut short
        found = trace(work, plan).peak_parts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
    except OSError:
        pass  # a full or read-only disk costs time only
    return found


@functools.cache
def _code() -> bytes:
    """Digest of the code that an estimate follows from."""
    here = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(file for room in _ROOMS for file in (here / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
