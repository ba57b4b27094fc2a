"""What this machine's processor can multiply in, how fast, and with how many threads."""

import ctypes
import functools
import logging
import platform

import torch

from ssl_core.planning.step_plan import Precision
from ssl_core.wav2vec2.cpu.products import affine
from ssl_core.wav2vec2.cpu.timing import one_thread, seconds_in_turn

log = logging.getLogger("shortwave.device")
FASTER = 1.5
"""A precision is worth taking if a product is at least so many times as fast as in fp32. A step has
other work too: at 0.8 (AVX-512 without bf16 units) it is slower, at 4.5 (with them) 3 times as
fast; in between nothing was met."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS, _WIDTH, _TIMES = 256, 768, 4
_AT_HWCAP, _ATOMICS = 16, 1 << 8  # getauxval(3), HWCAP_ATOMICS of arm64


@functools.cache
def product_speed(precision: Precision) -> float:
    """How many times as fast as in fp32 one thread computes a product; 0 if it cannot.

    Timed once: a product of `[256, 768]` and `[768, 768]`, as in a layer of `base`, the fastest of
    several, in turn with fp32. Asking the processor is not enough: with AVX-512 but without bf16
    units oneDNN supports bf16 and is slower in it.
    """
    with one_thread():
        calls = []
        try:
            for dtype in (torch.float32, _DTYPES[precision]):
                ones = torch.ones(_ROWS + _WIDTH, _WIDTH, dtype=dtype, device="cpu")
                x, weight = ones[:_ROWS], ones[_ROWS:]
                affine(x[:1], weight, None)
                calls.append(functools.partial(affine, x, weight, None))
            trials = seconds_in_turn(calls, _TIMES)
        except RuntimeError:  # no such product in this library for this processor
            return 0.0
    fp32, other = (min(seconds) for seconds in zip(*trials, strict=True))
    return fp32 / other


def cpu_precisions() -> tuple[Precision, ...]:
    """Precisions in which this processor multiplies at least as fast as in fp32."""
    # Without any support a product takes up to fifty times as long: do not time it.
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and product_speed("bf16") >= FASTER:
        return ("fp32", "bf16")
    return ("fp32",)


def usable_threads() -> int:
    """The most threads that products may use here; 0 for no limit.

    torch's wheels for arm64 since 2.11 multiply by NVIDIA's NVPL, which uses atomic instructions of
    ARMv8.1 when it has more than one thread: a Raspberry Pi 4 ends with SIGILL.
    """
    if platform.machine() != "aarch64" or "BLAS_INFO=nvpl" not in torch.__config__.show():
        return 0
    return 0 if _hardware_capabilities() & _ATOMICS else 1


def use_threads(threads: int) -> None:
    """Compute with so many threads; 0 for all cores that this process may use.

    It is one thread where torch's library would end the process with more.
    """
    most = usable_threads()
    if most and (threads or torch.get_num_threads()) > most:
        warn_once(
            f"one thread only: to use more, torch {torch.__version__} needs instructions of "
            "ARMv8.1, which this processor lacks; torch 2.9.1 uses all cores"
        )
        threads = most
    if threads:
        torch.set_num_threads(threads)


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning that this process has not logged before."""
    log.warning("%s", text)


def _hardware_capabilities() -> int:
    """Bits of AT_HWCAP; all if the C library cannot say."""
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return ~0
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return int(getauxval(_AT_HWCAP))
