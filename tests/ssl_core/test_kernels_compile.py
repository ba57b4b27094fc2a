"""The kernels for GPUs compile for an H100, without one: see `compiled_kernels`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compiles_for_cuda() -> bool:
    """Whether this Triton has the assembler of NVIDIA's GPUs."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return False
    return (Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@pytest.mark.slow
@pytest.mark.skipif(not compiles_for_cuda(), reason="Triton cannot compile for CUDA here")
def test_all_kernels_compile_for_tensor_cores_without_spills(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, HERE / "compiled_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels if kernel["multiplies"]} == {
        "attention_forward",
        "attention_query_gradient",
        "attention_key_gradient",
        "convolve_groups",
        "grouped_weight_gradient",
        "first_convolution",
        "first_kernel_gradient",
    }
    for kernel in kernels:
        half = "*bf16" in kernel["signature"]
        assert kernel["on tensor cores"] == (kernel["multiplies"] and half), kernel
        assert kernel.get("stack", 0) == 0, kernel
