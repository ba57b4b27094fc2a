"""What the C library does with memory that tensors give back.

A tensor of more than a few hundred KiB gets pages of its own from the kernel, and gives them back.
The kernel clears every page again at its next use, which in a training step takes longer than what
is done with them. Keeping them makes a step of base half as long again faster on a CPU, for a few
per cent more memory.
"""

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGE, _SMALL = 2**24, 2**18
"""Bytes from which a tensor has pages of its own; larger ones leave gaps that others cannot use."""


def keep_freed_memory(keep: bool) -> bool:
    """Let this process keep freed memory for its next tensors, or give it back at once.

    Args:
        keep: True for speed; False for the least memory.

    Returns:
        Whether the C library could be told; only glibc can (Linux).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    done = library.mallopt(_MMAP_THRESHOLD, _LARGE if keep else _SMALL)
    done &= library.mallopt(_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**20)
    done &= library.mallopt(_TOP_PAD, 2**26 if keep else 0)
    if not keep:
        library.malloc_trim(0)
    return bool(done)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
