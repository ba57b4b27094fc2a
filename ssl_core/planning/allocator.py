"""What the C library does with memory that tensors give back.

A tensor of more than a few hundred KiB gets pages of its own from the kernel, and gives them back.
The kernel clears every page again at its next use, which in a training step takes longer than what
is done with them. Keeping them makes a step of base half as long again faster on a CPU. But what is
kept lies in pieces that do not fit what comes next, and can grow to two thirds of what a step needs
(as measured); so it is given back whenever the process is larger than its tensors ever were by more
than a fixed part. A step loses a few per cent of its speed by that, and its peak is known. Small
freed objects must not stand between the pieces, see `common.process_environment`.
"""

import contextlib
import ctypes
import platform
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssl_core.planning.process_memory import resident_bytes

_MXFAST, _TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = 1, -1, -2, -3  # glibc's malloc.h
_LARGE, _SMALL = 2**24, 2**18
"""Bytes from which a tensor has pages of its own; larger ones leave gaps that others cannot use."""
_FAST = 128
"""Objects of up to so many bytes glibc keeps in fast bins when freed (its default)."""
SPARE, SPARE_SHARE = 8 * 2**20, 0.09
"""Freed memory that may be kept: so many bytes, and this share of the most that was in use."""


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`; bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


class _Kept:
    """Freed memory of this process, while it is kept."""

    def __init__(self) -> None:
        self.active = False
        self.forget()

    def forget(self) -> None:
        """Begin again: another model or plan needs other memory."""
        self.most = 0
        self.other = 0

    def give_back(self) -> None:
        """Give all freed memory back."""
        ctypes.CDLL(None).malloc_trim(0)

    def settle(self, ahead: int = 0) -> None:
        """Give freed memory back where more than its share is kept, or will be `ahead` bytes on."""
        resident = resident_bytes() + ahead
        if self.most and resident <= self.most + self.other + spare(self.most):
            return
        usage = ctypes.CDLL(None).mallinfo2
        usage.restype = _Usage
        found = usage()
        used = found.uordblks + found.hblkhd
        self.most = max(self.most, used)
        if not self.other or resident > self.most + self.other + spare(self.most):
            self.give_back()
            self.other = max(resident_bytes() - used, 1)


_kept = _Kept()


def spare(used: int) -> int:
    """Bytes of freed memory that are kept beside so many in use."""
    return SPARE + int(SPARE_SHARE * used)


def keep_freed_memory(keep: bool) -> bool:
    """Let this process keep freed memory for its next tensors, or give it back at once.

    Args:
        keep: True for speed; False for the least memory.

    Returns:
        Whether the C library could be told; only glibc can (Linux).
    """
    _kept.active = False
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    done = library.mallopt(_MMAP_THRESHOLD, _LARGE if keep else _SMALL)
    done &= library.mallopt(_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**20)
    done &= library.mallopt(_TOP_PAD, 2**26 if keep else 0)
    done &= library.mallopt(_MXFAST, 0 if keep else _FAST)
    if not keep:
        library.malloc_trim(0)
    _kept.forget()
    # Without mallinfo2 (glibc before 2.33) more may be kept than is planned for.
    _kept.active = keep and hasattr(library, "mallinfo2")
    return bool(done)


@contextlib.contextmanager
def settling(
    modules: Sequence[nn.Module],
    weights: Sequence[nn.Parameter],
    recurrent: Sequence[nn.Module] = (),
    ahead: Sequence[tuple[nn.Parameter, nn.Module]] = (),
) -> Iterator[None]:
    """See that no more freed memory is kept than `spare` says.

    Args:
        modules: before each of their forward passes,
        weights: and whenever the gradient of one of these is made.
        recurrent: LSTMs, before whose forward passes all of it is given back: their workspace has
            pages of its own, and what was kept would lie beside it.
        ahead: after the gradient of each of these weights as much memory is about to be needed as
            the module's input took.
    """
    if not _kept.active:
        yield
        return
    handles = [module.register_forward_pre_hook(lambda *_: _kept.settle()) for module in modules]
    handles += [
        module.register_forward_pre_hook(lambda *_: _kept.give_back()) for module in recurrent
    ]
    handles += [
        weight.register_post_accumulate_grad_hook(lambda _: _kept.settle()) for weight in weights
    ]
    for weight, module in ahead:
        handles += _looking_ahead(weight, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _looking_ahead(weight: nn.Parameter, module: nn.Module) -> list[RemovableHandle]:
    seen = 0

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen = inputs[0].nbytes

    return [
        module.register_forward_pre_hook(see),
        weight.register_post_accumulate_grad_hook(lambda _: _kept.settle(seen)),
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
