"""Compile the kernels that steps launch for sm_90 (H100), without a GPU; JSON of each to stdout.

The functions of `CASES` run on tensors without data. What they would launch is compiled with the
types, constants and alignments of that launch.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_core.wav2vec2.cuda import launching

LAUNCHES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


OPTIONS = {"num_warps", "num_stages", "maxnreg"}


def _record(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    LAUNCHES.append((kernel, arguments, constants))


launching.launch = _record  # before the modules below take it

from ssl_core.wav2vec2.cuda import adamw_kernel, drawing_kernels  # noqa: E402
from ssl_core.wav2vec2.cuda.extractor import (  # noqa: E402
    activated_convolution,
    first_convolutions,
)
from ssl_core.wav2vec2.cuda.fused_attention import (  # noqa: E402
    fused_cross_attention,
    fused_self_attention,
)
from ssl_core.wav2vec2.cuda.fused_dropout import Drop, fused_dropout  # noqa: E402
from ssl_core.wav2vec2.cuda.fused_feed_forward import fused_feed_forward  # noqa: E402
from ssl_core.wav2vec2.cuda.fused_norm import Norm, normed_sum  # noqa: E402
from ssl_core.wav2vec2.cuda.grouped_convolution import grouped_convolution  # noqa: E402


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


def _fp32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


def _attention(joined: Tensor, heads: int, rate: float) -> Tensor:
    seeds = torch.empty(len(joined), device="meta", dtype=torch.int64)
    return fused_self_attention(joined, heads=heads, rate=rate, seeds=seeds, site=3)


def _cross_attention() -> Tensor:
    seeds = torch.empty(12, device="meta", dtype=torch.int64)
    query, joined = _bf16(12, 122, 768), _bf16(12, 249, 2 * 768)
    return fused_cross_attention(query, joined, heads=12, rate=0.1, seeds=seeds, site=3)


def _seeds(count: int) -> Tensor:
    return torch.empty(count, device="meta", dtype=torch.int64)


def _int32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.int32)


def _norm(width: int, *, half: bool, before: bool = False, after: bool = False) -> Tensor:
    drop = Drop(_seeds(12), None, 5, 0.1)
    dtype = torch.bfloat16 if half else torch.float32
    norm = torch.nn.LayerNorm(width, device="meta")
    how = Norm(norm, dtype, before=drop if before else None, after=drop if after else None)
    y = _bf16(12, 249, width) if half else _fp32(12, 249, width)
    wide, narrow = normed_sum(_fp32(12, 249, width), y, how, _fp32(width))
    return wide + narrow


def _draws() -> None:
    drawing_kernels.gumbel_noise(_seeds(12), 3, 110 * 640)
    drawing_kernels.sample_negatives(_seeds(12), 4, 12, 110, 100)


def _optimizer(kind: str) -> None:
    table = torch.empty(218, adamw_kernel.COLUMNS, device="meta", dtype=torch.int64)
    blocks, like = (_int32(92_900), _int32(92_900)), torch.empty(8, device="meta").bfloat16()
    steps, control, applied = _fp32(218), _fp32(2), _int32()
    numbers = (0.9, 0.98, -0.152, -0.029, 1e-6, 0.01)
    tensors = (*blocks, steps, _int32(218), control, applied, like)
    adamw_kernel.adamw(table, tensors, numbers, kind=kind, copies=True, aligned=True)
    adamw_kernel.add_gradients(table, (*blocks, _int32(218), like), aligned=True)


CASES: dict[str, Callable[[], Tensor | None]] = {
    "norm with dropout before": lambda: _norm(768, half=True, before=True),
    "norm with dropout after": lambda: _norm(768, half=True, after=True),
    "norm in fp32, tiny": lambda: _norm(192, half=False),
    "norm of features": lambda: normed_sum(
        _bf16(12, 249, 512), None, Norm(torch.nn.LayerNorm(512, device="meta"), torch.bfloat16)
    )[0],
    "dropout": lambda: fused_dropout(_bf16(12, 249, 768), Drop(_seeds(12), None, 5, 0.1)),
    "dropout of packed crops": lambda: fused_dropout(
        _fp32(1, 249, 768), Drop(_seeds(249), _int32(249), 5, 0.1)
    ),
    "feed-forward": lambda: fused_feed_forward(
        _bf16(12, 249, 768), _bf16(3072, 768), _fp32(3072), _bf16(768, 3072)
    ),
    "draws": _draws,
    "AdamW": lambda: _optimizer("fp32"),
    "AdamW with state in bf16": lambda: _optimizer("bf16"),
    "AdamW with state in 8 bits": lambda: _optimizer("int8"),
    "attention": lambda: _attention(_bf16(12, 249, 3 * 768), 12, 0.1),
    "attention, 1 s": lambda: _attention(_bf16(96, 49, 3 * 768), 12, 0.1),
    "attention without dropout, tiny": lambda: _attention(_bf16(12, 249, 3 * 192), 4, 0.0),
    "attention in fp32": lambda: _attention(_fp32(12, 249, 3 * 768), 12, 0.1),
    "cross-attention": _cross_attention,
    "positions": lambda: grouped_convolution(_bf16(12, 249, 768), _fp32(768, 48, 128), 16),
    "positions, tiny": lambda: grouped_convolution(_bf16(12, 249, 192), _fp32(192, 12, 64), 16),
    "positions in fp32": lambda: grouped_convolution(_fp32(12, 249, 768), _fp32(768, 48, 128), 16),
    "first convolutions": lambda: first_convolutions(
        _bf16(12, 16000, 16), _fp32(12, 16, 512), _fp32(512, 512, 3), 2
    ),
    "first convolutions, tiny": lambda: first_convolutions(
        _bf16(12, 16000, 16), _fp32(12, 16, 32), _fp32(48, 32, 3), 2
    ),
    "a convolution": lambda: activated_convolution(_bf16(12, 8000, 512), _fp32(512, 512, 3), 2),
}
"""Each is run, and backward too if it returns something."""


def _specialised(parameter: Any) -> bool:
    return not parameter.do_not_specialize


def _type(value: Any, parameter: Any) -> str:
    """As Triton types an argument of a launch."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return "*" + str(triton.runtime.jit.type_canonicalisation_dict[name])
    if value is None or (isinstance(value, int) and value == 1 and _specialised(parameter)):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def _compiled(kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]) -> dict[str, Any]:
    """Compile as a launch would, and describe the result."""
    options = {name: constants.pop(name) for name in OPTIONS & constants.keys()}
    signature: dict[str, str] = {}
    fixed: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[place] if place < len(arguments) else constants[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _type(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            fixed[place,] = value
        elif (kind[0] == "*" and not parameter.do_not_specialize_on_alignment) or (
            kind == "i32" and _specialised(parameter) and value % 16 == 0
        ):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "kernel": kernel.__name__,
        "signature": list(signature.values()),
        "constants": constants,
        "multiplies": "tt.dot" in result.asm["ttir"],
        "on tensor cores": bool(re.search(r"wgmma|mma\.sync", result.asm["ptx"])),
        **_resources(result.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, to which registers are spilled."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def main() -> None:
    """Run the cases named in the arguments, or all."""
    seen = []
    for name, case in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        out = case()
        if out is not None:
            out.backward(torch.empty_like(out))
        for kernel, arguments, constants in LAUNCHES:
            types = [x.dtype if isinstance(x, Tensor) else type(x) for x in arguments]
            if (kernel, types, constants) not in seen:
                seen.append((kernel, types, dict(constants)))
                print(json.dumps({"case": name, **_compiled(kernel, arguments, constants)}))
        LAUNCHES.clear()


if __name__ == "__main__":
    main()
