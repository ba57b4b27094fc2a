"""Controls whether glibc keeps freed tensor memory or returns it to the kernel.

A block that glibc maps separately is unmapped when it is freed, and the kernel clears each page
again at its next use. With its own settings glibc does so for tensors larger than any freed so far,
always above 32 MiB; a step of which all large tensors are mapped takes 1.28 times as long
(`ladder.GIVEN_BACK`). But kept memory is fragmented, and can grow to two thirds of what a step
needs (measured). Freed memory is therefore returned to the kernel whenever the process exceeds its
peak use by more than `spare`. This costs a step a few per cent of its speed and bounds its peak.
Small freed objects must not fragment the heap either, see `common.process_environment`.

No library to preload was shown to do as well in both time and memory: tcmalloc takes 2 to 5 % less
memory, but a step of 5 s x 4 takes over 10 % longer; jemalloc and mimalloc clear more pages or take
more memory, but for one setting that is not measured in full ("Memory allocators" in
`benchmarks/README.md`).
"""

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssl_core.planning.process_memory import resident_bytes
from ssl_core.planning.processor import warn_once

_MXFAST, _TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = 1, -1, -2, -3  # glibc's malloc.h
_LARGE, _SMALL = 2**24, 2**18
"""Bytes from which a tensor is mapped separately, with freed memory kept and not kept; in the heap,
larger tensors would leave gaps that others cannot use."""
_FAST = 128
"""Largest object in bytes that glibc puts in fast bins when freed (its default)."""
SPARE, SPARE_SHARE = 8 * 2**20, 0.09
"""Freed memory that may be kept: bytes, plus this fraction of peak use."""


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`; bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _glibc() -> ctypes.CDLL:
    """The functions of glibc itself, even if a preloaded library defines some of the same names."""
    return ctypes.CDLL("libc.so.6")


def _used_bytes() -> int:
    """Bytes in use in glibc's heap and in blocks that it has mapped separately."""
    usage = _glibc().mallinfo2
    usage.restype = _Usage
    found = usage()
    return int(found.uordblks + found.hblkhd)


@functools.cache
def _manages_heap() -> bool:
    """Whether this process's malloc is glibc's; warns if not.

    With a preloaded allocator (jemalloc, mimalloc, tcmalloc) glibc's functions still succeed, but
    neither change nor describe the heap that tensors are in.
    """
    process = ctypes.CDLL(None)
    process.malloc.restype, process.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = _used_bytes()
    block = process.malloc(ctypes.c_size_t(_LARGE))
    added = _used_bytes() - before
    process.free(block)
    # Other threads allocate as well, but hardly half as much in this moment.
    if added > _LARGE // 2:
        return True
    warn_once(
        "malloc is not glibc's (LD_PRELOAD?): the allocator in its place decides how much freed "
        "memory is kept, and estimates do not count it"
    )
    return False


class _Kept:
    """The freed memory that this process keeps."""

    def __init__(self) -> None:
        self.active = False
        self.reset()

    def reset(self) -> None:
        """Forget peak use: another model or plan needs different memory."""
        self.most = 0
        self.other = 0

    def trim(self) -> None:
        """Return all freed memory to the kernel."""
        _glibc().malloc_trim(0)

    def settle(self, ahead: int = 0) -> None:
        """Return freed memory if more than `spare` is kept or would be after `ahead` more bytes."""
        resident = resident_bytes() + ahead
        if self.most and resident <= self.most + self.other + spare(self.most):
            return
        used = _used_bytes()
        self.most = max(self.most, used)
        if not self.other or resident > self.most + self.other + spare(self.most):
            self.trim()
            self.other = max(resident_bytes() - used, 1)


_kept = _Kept()


def spare(used: int) -> int:
    """Bytes of freed memory that may be kept at a peak use of `used` bytes."""
    return SPARE + int(SPARE_SHARE * used)


def keep_freed_memory(keep: bool) -> bool:
    """Make this process keep freed memory for its next tensors, or return it to the kernel at once.

    Args:
        keep: True for speed; False for the least memory.

    Returns:
        Whether this process's malloc supports it; only glibc's does (Linux).
    """
    _kept.active = False
    if platform.libc_ver()[0] != "glibc":
        return False
    library = _glibc()
    bounded = hasattr(library, "mallinfo2")
    # Without mallinfo2 (glibc before 2.33) malloc is taken for glibc's, and more may be kept than
    # planned.
    if bounded and not _manages_heap():
        return False
    done = library.mallopt(_MMAP_THRESHOLD, _LARGE if keep else _SMALL)
    done &= library.mallopt(_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**20)
    done &= library.mallopt(_TOP_PAD, 2**26 if keep else 0)
    done &= library.mallopt(_MXFAST, 0 if keep else _FAST)
    if not keep:
        library.malloc_trim(0)
    _kept.reset()
    _kept.active = keep and bounded
    return bool(done)


@contextlib.contextmanager
def settling(
    modules: Sequence[nn.Module],
    weights: Sequence[nn.Parameter],
    recurrent: Sequence[nn.Module] = (),
    ahead: Sequence[tuple[nn.Parameter, nn.Module]] = (),
) -> Iterator[None]:
    """Keep no more freed memory than `spare` allows; a context manager for a training step.

    Args:
        modules: checked before each of their forward passes.
        weights: checked whenever the gradient of one of them has been accumulated.
        recurrent: LSTMs, before whose forward passes all freed memory is returned: their workspace
            is mapped separately and cannot use it.
        ahead: pairs of a weight and a module; right after the weight's gradient the step allocates
            as many bytes as the module's input takes.
    """
    if not _kept.active:
        yield
        return
    handles = [module.register_forward_pre_hook(lambda *_: _kept.settle()) for module in modules]
    handles += [module.register_forward_pre_hook(lambda *_: _kept.trim()) for module in recurrent]
    handles += [
        weight.register_post_accumulate_grad_hook(lambda _: _kept.settle()) for weight in weights
    ]
    for weight, module in ahead:
        handles += _settle_ahead(weight, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _settle_ahead(weight: nn.Parameter, module: nn.Module) -> list[RemovableHandle]:
    size = 0

    def note_size(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal size
        size = inputs[0].nbytes

    return [
        module.register_forward_pre_hook(note_size),
        weight.register_post_accumulate_grad_hook(lambda _: _kept.settle(size)),
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error of the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
