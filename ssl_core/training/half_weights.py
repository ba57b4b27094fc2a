"""Copies in 16 bits of the weights that products use, from one update to the next.

Under autocast every product casts its weights anew, and every cast's gradient is cast back. On a
GPU the optimizer writes the copies beside the weights instead, and gradients stay in 16 bits. The
weights of an attention's queries, keys and values lie side by side, so that one product takes the
place of three.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ssl_core.wav2vec2.context import Attention
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.feed_forward import FeedForward

_JOINED = ("q_proj", "k_proj", "v_proj")


class HalfWeights:
    """The copies of all linear layers of a model, and their gradients."""

    def __init__(self, root: nn.Module, names: Mapping[nn.Parameter, str], dtype: torch.dtype):
        """Allocate and fill the copies.

        Args:
            root: whose linear layers compute in 16 bits.
            names: of all parameters.
            dtype: of the copies.
        """
        self.copies: dict[str, Tensor] = {}
        self._sources: list[nn.Parameter] = []
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        self._attentions: list[tuple[Attention, tuple[Tensor, Tensor]]] = []
        self._leaves: list[tuple[Tensor, list[str]]] = []
        done: set[nn.Module] = set()
        # Kernels other than those of products add these layers' biases, in fp32.
        wide = {
            layer
            for part in root.modules()
            for layer in (
                [part.out_proj]
                if isinstance(part, Attention)
                else [part.intermediate_dense, part.output_dense]
                if isinstance(part, FeedForward)
                else []
            )
        }
        for module in root.modules():
            if isinstance(module, Attention):
                layers = [module.get_submodule(name) for name in _JOINED]
                if all(type(layer) is Linear for layer in layers):
                    self._join(module, layers, names, dtype)
                    done.update(layers)
        for module in root.modules():
            if type(module) is Linear and module not in done:
                for key, parameter in module.named_parameters():
                    if key == "bias" and module in wide:
                        continue
                    leaf = self._copy([parameter], names, dtype)
                    self._places.append((module, key, leaf))
        self._versions = -1
        self.refresh()

    def _join(
        self,
        attention: Attention,
        layers: list[nn.Module],
        names: Mapping[nn.Parameter, str],
        dtype: torch.dtype,
    ) -> None:
        weight = self._copy([layer.get_parameter("weight") for layer in layers], names, dtype)
        bias = self._copy([layer.get_parameter("bias") for layer in layers], names, dtype)
        self._attentions.append((attention, (weight, bias)))

    def _copy(
        self, parameters: list[nn.Parameter], names: Mapping[nn.Parameter, str], dtype: torch.dtype
    ) -> Tensor:
        """A leaf that holds copies of parameters, along their first dimension."""
        rows = [len(parameter) for parameter in parameters]
        shape = (sum(rows), *parameters[0].shape[1:])
        leaf = torch.empty(shape, dtype=dtype, device=parameters[0].device)
        own = [names[parameter] for parameter in parameters]
        self.copies |= dict(zip(own, leaf.split(rows), strict=True))
        self._sources += parameters
        self._leaves.append((leaf, own))
        leaf.requires_grad_(any(parameter.requires_grad for parameter in parameters))
        return leaf

    @property
    def leaves(self) -> list[Tensor]:
        """The copies as autograd knows them, `[...]` each; joined weights are one."""
        return [leaf for leaf, _ in self._leaves]

    def refresh(self) -> None:
        """Copy the weights again, if anything but the optimizer has changed them."""
        versions = sum(source._version for source in self._sources)
        if versions == self._versions:
            return
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), [*self._sources])
        self._versions = versions

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the copies: forward and backward passes."""
        self.refresh()
        before = [module._parameters[key] for module, key, _ in self._places]
        for module, key, leaf in self._places:
            module._parameters[key] = leaf  # type: ignore[assignment]
        for attention, joined in self._attentions:
            attention.joined = joined
        try:
            yield
        finally:
            for (module, key, _), parameter in zip(self._places, before, strict=True):
                module._parameters[key] = parameter
            for attention, _ in self._attentions:
                attention.joined = None

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients of the copies by parameter name, `[...]`; they are no longer kept here."""
        found: dict[str, Tensor] = {}
        for leaf, own in self._leaves:
            if leaf.grad is not None:
                rows = [len(self.copies[name]) for name in own]
                found |= dict(zip(own, leaf.grad.split(rows), strict=True))
                leaf.grad = None
        return found
