"""AdamW for all parameters in one kernel, which also writes their copies in 16 bits.

Parameters, state and gradients stay where they are: the kernel reads their addresses from a table.
A parameter without a gradient, such as one of a dropped layer, is left alone, and so is everything
if the gradient is not finite: the host need not know.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssl_core.wav2vec2.cuda.launching import launch

ROW, BLOCK = 256, 1024
"""Elements with one scale in 8-bit state, and elements of a program."""
COLUMNS = 9
"""Of the table: addresses of the parameter, both moments, their scales, the copy and the gradient,
number of elements, and what the gradient is: 0 for none, 1 in fp32, 2 in the copies' dtype."""


@triton.jit
def _at(address, like, ALIGNED: tl.constexpr):
    """A pointer from an address."""
    pointer = tl.cast(address, like)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw_kernel(
    TABLE, OWNERS, FIRSTS, STEPS, PRESENT, CONTROL, APPLIED, COPIES, beta1, beta2, log_beta1,
    log_beta2, epsilon, decay, KIND: tl.constexpr, COPY: tl.constexpr, COLUMNS: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block of one parameter a program.

    `OWNERS` and `FIRSTS` are the parameter of each block and its first element; `CONTROL` holds
    learning rate and factor of the gradient, `APPLIED` is 0 if it is not finite, `PRESENT` is 0 for
    a parameter without a gradient. `COPIES` is any
    pointer to the dtype of the copies.
    """
    owner = tl.load(OWNERS + tl.program_id(0))
    own = TABLE + owner * COLUMNS
    first_place, count = tl.multiple_of(tl.load(FIRSTS + tl.program_id(0)), BLOCK), tl.load(own + 7)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    place = first_place + (tl.arange(0, BLOCK // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :])
    kind = tl.load(own + 8)
    rate, factor = tl.load(CONTROL), tl.load(CONTROL + 1)
    applied = (tl.load(APPLIED) != 0) & (tl.load(PRESENT + owner) != 0)
    inside = (place < count) & applied
    wide: tl.constexpr = tl.pointer_type(tl.float32)
    half: tl.constexpr = tl.pointer_type(COPIES.dtype.element_ty)
    gradient = tl.load(own + 6)
    g = tl.load(_at(gradient, wide, ALIGNED) + place, mask=inside & (kind == 1), other=0.0)
    if COPY:
        narrow = tl.load(_at(gradient, half, ALIGNED) + place, mask=inside & (kind == 2), other=0.0)
        g += narrow.to(tl.float32)
    g *= factor
    parameter = _at(tl.load(own), wide, ALIGNED) + place
    p = tl.load(parameter, mask=inside, other=0.0)
    first, second = tl.load(own + 1), tl.load(own + 2)
    if KIND == "fp32":
        first_at, second_at = _at(first, wide, ALIGNED) + place, _at(second, wide, ALIGNED) + place
        m = tl.load(first_at, mask=inside, other=0.0)
        v = tl.load(second_at, mask=inside, other=0.0)
    elif KIND == "bf16":
        brief: tl.constexpr = tl.pointer_type(tl.bfloat16)
        first_at, second_at = (
            _at(first, brief, ALIGNED) + place,
            _at(second, brief, ALIGNED) + place,
        )
        m = tl.load(first_at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(second_at, mask=inside, other=0.0).to(tl.float32)
    else:
        first_at = _at(first, tl.pointer_type(tl.int8), ALIGNED) + place
        second_at = _at(second, tl.pointer_type(tl.uint8), ALIGNED) + place
        rows = first_place // ROW + tl.arange(0, BLOCK // ROW)[:, None]
        used = (rows * ROW < count) & applied
        first_scale, second_scale = (
            _at(tl.load(own + 3), wide, ALIGNED) + rows,
            _at(tl.load(own + 4), wide, ALIGNED) + rows,
        )
        m = tl.load(first_at, mask=inside, other=0).to(tl.float32)
        m = m * tl.load(first_scale, mask=used, other=0.0) / 127
        v = tl.load(second_at, mask=inside, other=0).to(tl.float32)
        v = v * tl.load(second_scale, mask=used, other=0.0) / 255
        v = v * v
    m += (1 - beta1) * (g - m)
    v = v * beta2 + (1 - beta2) * g * g
    step = tl.load(STEPS + owner)
    size = rate / (1 - tl.exp2(step * log_beta1))
    root = tl.sqrt(v) / tl.sqrt(1 - tl.exp2(step * log_beta2)) + epsilon
    p = p * (1 - rate * decay) - size * m / root
    tl.store(parameter, p, mask=inside)
    if COPY:
        copy = tl.load(own + 5)
        to_copy = inside & (copy != 0)
        tl.store(_at(copy, half, ALIGNED) + place, p.to(COPIES.dtype.element_ty), mask=to_copy)
    if KIND == "int8":
        tiny = 1.1754943508222875e-38
        s = tl.maximum(tl.max(tl.where(inside, tl.abs(m), 0.0), 1)[:, None], tiny)
        code = tl.floor(m / s * 127 + 0.5)
        tl.store(first_at, code.to(tl.int8), mask=inside)
        tl.store(first_scale, s, mask=used)
        # The second moment is stored as its root, rounded up: that never enlarges a step.
        v = tl.sqrt(tl.where(inside, v, 0.0))
        s = tl.maximum(tl.max(v, 1)[:, None], tiny)
        code = tl.minimum(tl.ceil(v / s * 255), 255.0)
        tl.store(second_at, code.to(tl.uint8), mask=inside)
        tl.store(second_scale, s, mask=used)
    else:
        tl.store(first_at, m.to(first_at.dtype.element_ty), mask=inside)
        tl.store(second_at, v.to(second_at.dtype.element_ty), mask=inside)


@triton.jit
def add_gradients_kernel(
    TABLE, OWNERS, FIRSTS, PRESENT, COPIES, COPY: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add a block of a gradient to its sum, and note in `PRESENT` that there is one."""
    owner = tl.load(OWNERS + tl.program_id(0))
    own = TABLE + owner * 4
    count = tl.load(own + 2)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    start = tl.multiple_of(tl.load(FIRSTS + tl.program_id(0)), BLOCK)
    place = start + tl.arange(0, BLOCK)
    kind = tl.load(own + 3)
    inside = (place < count) & (kind != 0)
    wide: tl.constexpr = tl.pointer_type(tl.float32)
    half: tl.constexpr = tl.pointer_type(COPIES.dtype.element_ty)
    gradient = tl.load(own + 1)
    g = tl.load(_at(gradient, wide, ALIGNED) + place, mask=inside & (kind == 1), other=0.0)
    if COPY:
        is_half = inside & (kind == 2)
        narrow = tl.load(_at(gradient, half, ALIGNED) + place, mask=is_half, other=0.0)
        g += narrow.to(tl.float32)
    total = _at(tl.load(own), wide, ALIGNED) + place
    g += tl.load(total, mask=inside, other=0.0)
    tl.store(total, g, mask=inside)
    tl.store(PRESENT + owner, 1, mask=(start == 0) & (kind != 0))


def add_gradients(
    table: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor], *, aligned: bool
) -> None:
    """Add gradients to their sums.

    Args:
        table: `[parameter, 4]` int64: addresses of sum and gradient, number of elements, and what
            the gradient is, as in `COLUMNS`.
        tensors: parameter and first element of each block, `[block]` int32; which parameters have a
            gradient, `[parameter]` int32, where ones are written; any tensor in the dtype of the
            copies.
        aligned: whether all addresses and numbers of elements are multiples of 16, so that several
            elements can be read at once.
    """
    launch(
        add_gradients_kernel, (len(tensors[0]),), table, *tensors,
        COPY=tensors[3].dtype.itemsize < 4, BLOCK=BLOCK, ALIGNED=aligned, num_warps=4,
    )  # fmt: skip


def adamw(
    table: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    numbers: tuple[float, float, float, float, float, float],
    *,
    kind: str,
    copies: bool,
    aligned: bool,
) -> None:
    """Update all parameters of a table.

    Args:
        table: `[parameter, COLUMNS]` int64.
        tensors: parameter and first element of each block, `[block]` int32; steps of each
            parameter, this one included, `[parameter]` fp32; which parameters have a gradient,
            `[parameter]` int32; learning rate and factor of the
            gradient, `[2]` fp32; whether to update, `[]` int32; any tensor in the dtype of the
            copies.
        numbers: both betas, their binary logarithms, epsilon and weight decay.
        kind: of the state: `fp32`, `bf16` or `int8`.
        copies: whether there are copies or gradients in 16 bits.
        aligned: whether all addresses and numbers of elements are multiples of 16, so that several
            elements can be read at once.
    """
    launch(
        adamw_kernel, (len(tensors[0]),), table, *tensors, *numbers, KIND=kind, COPY=copies,
        COLUMNS=COLUMNS, ROW=ROW, BLOCK=BLOCK, ALIGNED=aligned, num_warps=4,
    )  # fmt: skip
