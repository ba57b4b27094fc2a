"""The project's own operations, each one to torch's tracers, compiler and flop counter.

As with `torch.library.custom_op`; but the first call of one of those imports torch's compiler and
all that it needs, 100 MiB and seconds in every process that takes a step. These import nothing.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shortwave"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

BODIES: dict[str, Callable[..., Any]] = {}
"""What each operation runs, by its full name."""
FLOPS: dict[Any, Callable[..., int]] = {}
"""What each does, from the shapes of its arguments: `custom_mapping` of torch's flop counter."""


class Operator:
    """An operation, called as the function it was made of."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Define it; it changes none of its arguments, and returns none of them."""
        self.name = f"{NAMESPACE}::{name}"
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.overload = self.packet.default
        BODIES[self.name] = function

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        return self.overload(*arguments)

    def shapes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Take a function that makes results of the right shapes, without contents."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def flops(self, function: Callable[..., int]) -> Callable[..., int]:
        """Take a function that says how many operations it is, as the flop counter asks."""
        FLOPS[self.packet] = function
        return function

    def gradient(self, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
        """Take the backward pass, and what keeps the arguments and results that it needs."""
        torch.library.register_autograd(self.name, backward, setup_context=keep, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operation `shortwave::name` of a function with type annotations."""
    return lambda function: Operator(name, function)
