"""Lets kernels be imported for a trace where Triton is not installed, as on most computers.

A plan for a GPU can thus be made on a laptop. Nothing is launched in a trace.
"""

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from ssl_core.wav2vec2 import cuda


class _Constant:
    """A constant of a kernel, and an annotation."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """A kernel that cannot be launched."""
    return _jit if function is None else function


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@contextlib.contextmanager
def triton_or_stand_in() -> Iterator[None]:
    """Context in which the kernels' modules can be imported, and are if Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
        vars(triton).update(jit=_jit, language=language, next_power_of_2=_next_power_of_2)
        vars(language).update(constexpr=_Constant)
        sys.modules |= {"triton": triton, "triton.language": language}
        try:
            for module in pkgutil.iter_modules(cuda.__path__, f"{cuda.__name__}."):
                importlib.import_module(module.name)
        finally:
            del sys.modules["triton"], sys.modules["triton.language"]
    yield
