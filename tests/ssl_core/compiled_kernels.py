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

from ssl_core.wav2vec2.cuda.extractor import (  # noqa: E402
    activated_convolution,
    first_convolutions,
)
from ssl_core.wav2vec2.cuda.fused_attention import (  # noqa: E402
    fused_cross_attention,
    fused_self_attention,
)
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


CASES: dict[str, Callable[[], Tensor]] = {
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
"""Each is run forward and backward."""


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
        out.backward(torch.empty_like(out))
        for kernel, arguments, constants in LAUNCHES:
            types = [x.dtype if isinstance(x, Tensor) else type(x) for x in arguments]
            if (kernel, types, constants) not in seen:
                seen.append((kernel, types, dict(constants)))
                print(json.dumps({"case": name, **_compiled(kernel, arguments, constants)}))
        LAUNCHES.clear()


if __name__ == "__main__":
    main()
