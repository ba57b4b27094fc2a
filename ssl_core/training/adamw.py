"""AdamW with state in fp32, bf16 or 8 bits, applied to all parameters or to some of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssl_core.planning.step_plan import OptimizerState

QUANTIZATION_BLOCK = 256
"""Elements per scale of 8-bit state."""


class AdamRecipe(Protocol):
    """Adam's hyperparameters."""

    @property
    def beta1(self) -> float:
        """Decay rate of the first moment."""

    @property
    def beta2(self) -> float:
        """Decay rate of the second moment."""

    @property
    def epsilon(self) -> float:
        """Added to the square root of the second moment."""

    @property
    def weight_decay(self) -> float:
        """Decoupled; multiplied by the learning rate."""


class Control(NamedTuple):
    """What an update on a device is controlled by, there."""

    rate: Tensor
    """Learning rate, `[]` fp32."""
    factor: Tensor
    """Multiplies every gradient, `[]` fp32."""
    finite: Tensor
    """`[]` int32: 1 if the update is applied, 0 if it is skipped."""


class _Packed(NamedTuple):
    """A first or second moment as stored."""

    codes: Tensor
    scales: Tensor | None


def _pack(value: Tensor, kind: OptimizerState, signed: bool) -> _Packed:
    if kind == "bf16":
        return _Packed(value.bfloat16(), None)
    # The second moment is stored as its root, rounded up: rounding up never enlarges a step.
    flat = value.flatten() if signed else value.flatten().sqrt()
    flat = nn.functional.pad(flat, (0, -flat.numel() % QUANTIZATION_BLOCK))
    blocks = flat.view(-1, QUANTIZATION_BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if signed:
        return _Packed((blocks / scales * 127).round_().to(torch.int8), scales)
    return _Packed((blocks / scales * 255).ceil_().clamp_(max=255).to(torch.uint8), scales)


def _unpack(packed: _Packed, shape: torch.Size) -> Tensor:
    if packed.scales is None:
        return packed.codes.float()
    signed = packed.codes.dtype == torch.int8
    blocks = packed.codes.float().mul_(packed.scales).div_(127 if signed else 255)
    value = blocks.flatten()[: shape.numel()].view(shape)
    return value if signed else value.square_()


class AdamW:
    """Adam with decoupled weight decay.

    With fp32 state this is torch's fused AdamW. bf16 state is rounded after every update. 8-bit
    state has a scale per block of 256 elements: the first moment is quantized linearly, the second
    by its square root (after Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
    2022). Only fp32 is exact.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        recipe: AdamRecipe,
        state: OptimizerState,
    ) -> None:
        """Allocate zero state now, before the first step, so that it lies close together in memory.

        Args:
            parameters: names and parameters to optimize.
            recipe: hyperparameters.
            state: precision of the optimizer state.
        """
        self.parameters, self.recipe, self.kind = dict(parameters), recipe, state
        self._steps = {
            name: torch.zeros((), device=value.device) for name, value in self.parameters.items()
        }
        self._moments = {
            name: (self._zero(value, True), self._zero(value, False))
            for name, value in self.parameters.items()
        }

    def _zero(self, parameter: Tensor, signed: bool) -> _Packed:
        zero = torch.zeros_like(parameter, memory_format=torch.contiguous_format).detach()
        return _Packed(zero, None) if self.kind == "fp32" else _pack(zero, self.kind, signed)

    def apply(self, rate: float, names: Iterable[str] | None = None) -> None:
        """Update parameters that have a gradient.

        Args:
            rate: learning rate.
            names: parameters to update; None for all.
        """
        chosen = [
            name
            for name in (self.parameters if names is None else names)
            if self.parameters[name].grad is not None
        ]
        if self.kind == "fp32":
            self._update(chosen, rate)
            return
        for name in chosen:
            self._update([name], rate)

    def _update(
        self, names: list[str], rate: float | Tensor, skipped: Tensor | None = None
    ) -> None:
        with torch.no_grad():
            firsts, seconds, grads = [], [], []
            for name in names:
                parameter = self.parameters[name]
                assert parameter.grad is not None
                grads.append(parameter.grad)
                if self.kind == "fp32":
                    first, second = (part.codes for part in self._moments[name])
                else:
                    first, second = (_unpack(part, parameter.shape) for part in self._moments[name])
                firsts.append(first)
                seconds.append(second)
            if not names:
                return
            steps = [self._steps[name] for name in names]
            torch._foreach_add_(steps, 1 if skipped is None else 1 - skipped)
            torch._fused_adamw_(
                [self.parameters[name] for name in names],
                grads,
                firsts,
                seconds,
                [],
                steps,
                lr=rate,  # type: ignore[arg-type]
                beta1=self.recipe.beta1,
                beta2=self.recipe.beta2,
                weight_decay=self.recipe.weight_decay,
                eps=self.recipe.epsilon,
                amsgrad=False,
                maximize=False,
                found_inf=skipped,
            )
            if self.kind == "fp32":
                return
            for name, first, second in zip(names, firsts, seconds, strict=True):
                packed = _pack(first, self.kind, True), _pack(second, self.kind, False)
                if skipped is None:
                    self._moments[name] = packed
                    continue
                # On a GPU it stays where it is, since a graph knows only that place.
                for own, new in zip(self._moments[name], packed, strict=True):
                    for place, value in zip(own, new, strict=True):
                        if place is not None and value is not None:
                            place.copy_(value)

    def collect(self, found: Mapping[str, Tensor], first: bool, last: bool) -> None:
        """Take the gradients of a micro-batch; torch has added them to those before.

        Args:
            found: gradients `[...]` by name that are not where the parameters have theirs.
            first: whether this is the update's first micro-batch.
            last: whether the update has no further micro-batch.
        """

    def drop_gradients(self) -> None:
        """Forget what was collected."""

    def begin_launches(self) -> None:
        """Prepare to launch an update's kernels one by one."""

    def begin_capture(self) -> None:
        """Prepare to capture the kernels launched last in a CUDA graph."""

    def gradients(self) -> list[Tensor]:
        """All gradients of an update, `[...]` each."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def apply_on_device(self, control: Control) -> None:
        """Update parameters that have a gradient, by numbers that stay on the device."""
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        torch._foreach_mul_(self.gradients(), control.factor)
        skipped = 1 - control.finite.float()
        if self.kind == "fp32":
            self._update(names, control.rate, skipped)
            return
        for name in names:
            self._update([name], control.rate, skipped)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all state by `kind/parameter name`, for a checkpoint.

        `step` is `[]`. `exp_avg` and `exp_avg_sq` have the parameter's shape; in 8 bits they are
        codes `[block, 256]`, with `exp_avg_scales` and `exp_avg_sq_scales` `[block, 1]`.
        """
        for name, (first, second) in self._moments.items():
            yield f"step/{name}", self._steps[name]
            for kind, part in (("exp_avg", first), ("exp_avg_sq", second)):
                yield f"{kind}/{name}", part.codes
                if part.scales is not None:
                    yield f"{kind}_scales/{name}", part.scales

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore state from a dict of what `state` yielded, shapes `[...]` as there."""
        for name, parameter in self.parameters.items():
            if f"step/{name}" not in state:
                continue
            self._steps[name] = state[f"step/{name}"].to(parameter.device, copy=True)
            first, second = (
                _Packed(
                    state[f"{kind}/{name}"].to(parameter.device, copy=True),
                    state[f"{kind}_scales/{name}"].to(parameter.device, copy=True)
                    if f"{kind}_scales/{name}" in state
                    else None,
                )
                for kind in ("exp_avg", "exp_avg_sq")
            )
            self._moments[name] = (first, second)
