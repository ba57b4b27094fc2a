"""Freed memory: kept for the next tensors, and given back when much is needed."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from common.process_environment import tuned

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")

AHEAD = """
import torch
from torch import nn
from ssl_core.planning import allocator
from ssl_core.planning.process_memory import resident_bytes

assert allocator.keep_freed_memory(True)
looked_at, large = nn.Linear(1, 1), nn.Identity()
weight = nn.Parameter(torch.ones(1))
with allocator.settling([looked_at], [], ahead=[(weight, large)]):
    tensors = [torch.ones(2**20) for _ in range(64)]
    looked_at(torch.ones(1))
    tensors.clear()
    looked_at(torch.ones(1))
    kept = resident_bytes()
    large(torch.empty(SIZE))
    weight.sum().backward()
    print((kept - resident_bytes()) >> 20)
"""


@pytest.mark.parametrize(("size", "given_back"), [(2**18, False), (2**25, True)])
def test_freed_memory_is_kept_until_much_is_needed(size: int, given_back: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AHEAD.replace("SIZE", str(size))], cwd=ROOT,
        env=tuned(os.environ), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert (int(done.stdout) > 200) == given_back


PRELOADED = """
import torch
from torch import nn
from ssl_core.planning import allocator

print(allocator.keep_freed_memory(True), allocator.keep_freed_memory(False))
allocator.keep_freed_memory(True)
looked_at = nn.Linear(1, 1)
with allocator.settling([looked_at], list(looked_at.parameters())):
    looked_at(torch.ones(1)).sum().backward()
    print(len(looked_at._forward_pre_hooks), allocator._kept.most > 0)
"""


def test_nothing_is_settled_under_a_preloaded_allocator() -> None:
    ray = importlib.util.find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    if library is None or not library.exists():
        pytest.skip("Ray's jemalloc is not installed")
    for preload, printed in (
        ("", ["True True", "1 True"]),
        (str(library), ["False False", "0 False"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", PRELOADED], cwd=ROOT,
            env=tuned(os.environ) | {"LD_PRELOAD": preload},
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.splitlines() == printed
        assert done.stderr.count("malloc is not glibc's") == bool(preload)
