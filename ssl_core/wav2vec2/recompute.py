"""Activations made again in the backward pass instead of being kept."""

import sys
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of which only the arguments are kept; it must not draw random numbers.

    torch's checkpoint imports torch's compiler, 100 MiB, to keep it away from what is run, even
    where nothing is compiled; where nothing has imported it yet, it is told that nothing is to do.
    """
    if "torch._dynamo" not in sys.modules:
        for name in ("checkpoint", "_run_fn_with_dynamo_disabled"):
            guarded = getattr(getattr(checkpoint, name, None), "__wrapped__", None)
            if guarded is not None:
                setattr(guarded, "__dynamo_disable", guarded)
    return checkpoint.checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False
    )
