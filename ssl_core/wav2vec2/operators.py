"""Registration of custom torch operators, which tracers, compiler and flop counter see as one.

They replace `torch.library.custom_op`, whose first call imports torch's compiler: 100 MiB and
several seconds in each process that takes a step.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shortwave"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

BODIES: dict[str, Callable[..., Any]] = {}
"""The function of each operator, by its full name."""
FLOPS: dict[Any, Callable[..., int]] = {}
"""FLOP formulas by operator: the `custom_mapping` of torch's flop counter."""


class Operator:
    """A custom operator, called like the function it was made from."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Register `function`, which must neither modify nor return its arguments."""
        self.name = f"{NAMESPACE}::{name}"
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.overload = self.packet.default
        BODIES[self.name] = function

    def __call__(self, *arguments: Any) -> Any:
        """Call the operator through torch's dispatcher."""
        return self.overload(*arguments)

    def shapes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register a function that returns results of the right shapes, without contents."""
        torch.library.register_fake(self.name, function, lib=_LIBRARY)
        return function

    def flops(self, function: Callable[..., int]) -> Callable[..., int]:
        """Register a function that maps the shapes of a call's arguments to its FLOPs."""
        FLOPS[self.packet] = function
        return function

    def gradient(self, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
        """Register the backward pass, and the function that saves what it needs."""
        torch.library.register_autograd(self.name, backward, setup_context=keep, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate a function with type annotations as the operator `shortwave::name`."""
    return lambda function: Operator(name, function)
