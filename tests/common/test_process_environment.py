"""Restarting a command without glibc's cache of freed objects."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from common.process_environment import VARIABLE, tuned

ROOT = Path(__file__).parents[2]
CACHE = "glibc.malloc.tcache_count"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

FRAGMENTATION = """
import ctypes, torch
from ssl_core.planning import allocator

allocator.keep_freed_memory(True)
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
tensors, small = [], []
for _ in range(8):
    tensors.append(torch.empty(2**18))
    small.append(c.malloc(200))
end = torch.empty(2**18)
low, high = tensors[0].data_ptr(), end.data_ptr()
for place in small:
    c.free(place)
tensors.clear()
print(low <= torch.empty(7 * 2**18).data_ptr() < high)
"""


def run(code: str, *words: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=clean | environment, cwd=ROOT,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout.split()


def test_a_value_set_by_the_user_is_kept() -> None:
    assert tuned({}) == {VARIABLE: f"{CACHE}=0"}
    assert tuned({VARIABLE: "glibc.malloc.hugetlb=1", "A": "b"}) == {
        VARIABLE: f"glibc.malloc.hugetlb=1:{CACHE}=0", "A": "b",
    }  # fmt: skip
    own = {VARIABLE: f"{CACHE}=3"}
    assert tuned(own) == own


def test_a_command_restarts_once_in_the_same_process() -> None:
    code = (
        "import os, sys; from common.process_environment import restart; print(os.getpid()); "
        "sys.stdout.flush(); restart(); print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
    )
    first, second, found, *words = run(code, "--length", "5s")
    assert first == second
    assert found == f"{CACHE}=0"
    assert words == ["--length", "5s"]
    assert len(run(code, **{VARIABLE: f"{CACHE}=7"})) == 2  # set by the user: no restart


def test_freed_tensors_are_merged_to_hold_a_larger_one() -> None:
    assert run(FRAGMENTATION, **tuned({})) == ["True"]
