"""Runs Triton's kernels on a CPU, by its interpreter; import this before any kernel.

The interpreter reads a number from an array of one element as NumPy before 2.4 allowed.
"""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest

interpreter: Any = pytest.importorskip(
    "triton.runtime.interpreter", reason="Triton is not installed here"
)
_patch = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched
