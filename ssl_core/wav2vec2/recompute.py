"""Activation checkpointing without importing torch's compiler."""

import sys
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, saving only its arguments; the backward pass calls it again.

    `function` must not draw random numbers. torch's `checkpoint` excludes itself from compilation,
    which imports the compiler (100 MiB) even if nothing is compiled. Unless the compiler is already
    imported, this marks `checkpoint` as excluded beforehand.
    """
    if "torch._dynamo" not in sys.modules:
        for name in ("checkpoint", "_run_fn_with_dynamo_disabled"):
            guarded = getattr(getattr(checkpoint, name, None), "__wrapped__", None)
            if guarded is not None:
                setattr(guarded, "__dynamo_disable", guarded)
    return checkpoint.checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False
    )
