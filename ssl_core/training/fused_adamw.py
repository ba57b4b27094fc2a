"""AdamW on a GPU: all parameters in one kernel, nothing read by the host."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ssl_core.planning.step_plan import OptimizerState
from ssl_core.training.adamw import AdamRecipe, AdamW, Control
from ssl_core.wav2vec2.cuda import adamw_kernel
from ssl_core.wav2vec2.cuda.launching import PinnedTables, addresses


class FusedAdamW(AdamW):
    """Adam with decoupled weight decay, by `cuda.adamw_kernel`; the state is that of `AdamW`."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        recipe: AdamRecipe,
        state: OptimizerState,
        copies: Mapping[str, Tensor],
    ) -> None:
        """Allocate zero state.

        Args:
            parameters: names and parameters to optimize, in fp32, contiguous.
            recipe: Adam's hyperparameters.
            state: precision of the state.
            copies: of parameters by name, in 16 bits, of the same shape `[...]`, kept up to date.
        """
        super().__init__(parameters, recipe, state)
        self.copies = {name: copies[name] for name in self.parameters if name in copies}
        device = next(iter(self.parameters.values())).device
        self._all_steps = torch.zeros(len(self.parameters), device=device)
        self._steps = dict(zip(self.parameters, self._all_steps.unbind(), strict=True))
        owners: list[int] = []
        firsts: list[int] = []
        for number, parameter in enumerate(self.parameters.values()):
            starts = range(0, parameter.numel(), adamw_kernel.BLOCK)
            owners += [number] * len(starts)
            firsts += starts
        self._owners = torch.tensor(owners, dtype=torch.int32, device=device)
        self._firsts = torch.tensor(firsts, dtype=torch.int32, device=device)
        self._like = next(iter(self.copies.values()), self._all_steps)
        betas = (recipe.beta1, recipe.beta2)
        first, second = (math.log2(beta) if beta else -math.inf for beta in betas)
        self._numbers = (*betas, first, second, recipe.epsilon, recipe.weight_decay)
        self._found: dict[str, Tensor] = {}
        self._present: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._all_sums = self._noted = torch.zeros(0)
        self.tables = PinnedTables(device)

    def collect(self, found: Mapping[str, Tensor], first: bool, last: bool) -> None:
        """Take the gradients of a micro-batch, and add them in fp32 if there are several.

        Which parameters have had a gradient is noted on the device: a replayed graph does not know
        what was computed before.

        Args:
            found: gradients `[...]` by name, in the dtype of the copies.
            first: whether this is the update's first micro-batch.
            last: whether the update has no further micro-batch.
        """
        own: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            gradient = found.get(name, parameter.grad)
            if gradient is not None:
                own[name] = gradient if gradient.is_contiguous() else gradient.contiguous()
            parameter.grad = None
        if first and last:
            self._found, self._present = own, None
            return
        if not self._sums:
            self._allocate_sums()
        if first:
            torch._foreach_zero_([self._all_sums, self._noted])
        rows = [
            [*addresses(self._sums[name], own.get(name)), parameter.numel(), _kind(own.get(name))]
            for name, parameter in self.parameters.items()
        ]
        tensors = (self._owners, self._firsts, self._noted, self._like)
        aligned = all(number % 16 == 0 for row in rows for number in row[:3])
        adamw_kernel.add_gradients(self.tables.copied(rows), tensors, aligned=aligned)
        if last:
            self._found, self._present = self._sums, self._noted

    def _allocate_sums(self) -> None:
        """Memory for sums of gradients, each at a multiple of 64 bytes."""
        sizes = [-(-parameter.numel() // 16) * 16 for parameter in self.parameters.values()]
        device = self._owners.device
        self._all_sums = torch.zeros(sum(sizes), device=device)
        self._noted = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        pieces = zip(self.parameters.items(), self._all_sums.split(sizes), strict=True)
        self._sums = {
            name: piece[: parameter.numel()].view(parameter.shape)
            for (name, parameter), piece in pieces
        }

    def drop_gradients(self) -> None:
        """Forget what was collected; memory of sums stays."""
        self._found = {}

    def begin_launches(self) -> None:
        """See `AdamW.begin_launches`."""
        self.tables.begin()

    def begin_capture(self) -> None:
        """See `AdamW.begin_capture`."""
        self.tables.reserve()

    def gradients(self) -> list[Tensor]:
        """All gradients of an update, `[...]` each."""
        return list(self._found.values())

    def apply_on_device(self, control: Control) -> None:
        """Update the parameters that have a gradient, by numbers that stay on the device."""
        rows = self._table()
        table = self.tables.copied(rows)
        present = self._present
        if present is None:
            present = (table[:, 8] > 0).to(torch.int32)
        self._all_steps += present * control.finite
        adamw_kernel.adamw(
            table,
            (
                self._owners,
                self._firsts,
                self._all_steps,
                present,
                torch.stack([control.rate, control.factor]),
                control.finite,
                self._like,
            ),
            self._numbers,
            kind=self.kind,
            copies=bool(self.copies),
            aligned=all(number % 16 == 0 for row in rows for number in row[:8]),
        )

    def _table(self) -> list[list[int]]:
        """The kernel's table, see `adamw_kernel.COLUMNS`."""
        rows = []
        for name, parameter in self.parameters.items():
            first, second = self._moments[name]
            gradient, copy = self._found.get(name), self.copies.get(name)
            parts = (parameter, first.codes, second.codes, first.scales, second.scales)
            rows.append([*addresses(*parts, copy, gradient), parameter.numel(), _kind(gradient)])
        return rows

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore state from a dict of what `state` yielded, shapes `[...]` as there.

        It is copied to where the state is, because a graph knows only that place.
        """
        places = dict(self.state())
        with torch.no_grad():
            for key, value in state.items():
                if key in places:
                    places[key].copy_(value)


def _kind(gradient: Tensor | None) -> int:
    """0 for no gradient, 1 for one in fp32, 2 for one in the dtype of the copies."""
    return 0 if gradient is None else 1 if gradient.dtype == torch.float32 else 2
