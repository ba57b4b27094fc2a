"""Triton's kernels on a CPU: import this before any kernel.

Triton decides at its import whether kernels are interpreted. Its interpreter multiplies bf16 as
integers, so kernels can be checked in fp32 only.
"""

import os
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"
interpreter: Any = pytest.importorskip(
    "triton.runtime.interpreter", reason="Triton is not installed"
)

_patch_tensor = interpreter._patch_lang_tensor


def _with_numbers_of_one_element(tensor: Any, scope: Any) -> None:
    """Let bounds of loops be arrays of one element, which NumPy 2.4 no longer turns to `int`."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_numbers_of_one_element
