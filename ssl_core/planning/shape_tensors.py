"""Tensors with shape and type but no data, on which a real training step runs in seconds.

Torch's own FakeTensorMode does the same for any program, at about 0.4 ms an operation. A step of
`base` has 25,000 operations of a few hundred kinds, so here the shapes that an operation returns
are worked out once for each kind of arguments, on torch's meta device, and looked up after that.
"""

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_core.planning.operation_shapes import SHAPES
from ssl_core.wav2vec2.operators import NAMESPACE

_META, _CPU = torch.device("meta"), torch.device("cpu")
_UNKNOWN = object()


class Block:
    """The memory that a tensor and all its views share."""

    __slots__ = ("__weakref__", "size")

    def __init__(self, size: int) -> None:
        """Take `size` bytes."""
        self.size = size


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that torch excludes from compilation as excluded already.

    Otherwise torch imports its compiler, which takes seconds, to exclude it at its first call.
    """
    setattr(function, "__dynamo_disable", function)
    return function


@functools.cache
def _without_compiler() -> None:
    """Let torch's own Python kernels work out shapes without importing the compiler."""
    if "torch._dynamo" in sys.modules:
        return
    excluded = torch._compile._disable_dynamo(lambda: None).__code__
    rooms = (torch._refs, torch._refs.linalg, torch._refs.special, torch._refs.nn.functional)
    for function in (each for room in rooms for each in vars(room).values()):
        code = getattr(function, "__code__", None)
        while code is not None and "fn" in code.co_freevars:  # it wraps a function
            wrapped = function.__closure__[code.co_freevars.index("fn")].cell_contents
            if code is excluded:
                uncompiled(wrapped)
            function, code = wrapped, getattr(wrapped, "__code__", None)


class ShapeTensor(Tensor):
    """A CPU tensor of any shape `[...]` without data; `block` is its memory."""

    block: Block

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse to run outside `Shapes`."""
        raise RuntimeError(f"{func} on a tensor without data, outside of Shapes")


@dataclasses.dataclass(frozen=True)
class _Same:
    """An output that is an argument itself: the number of the argument among all tensors."""

    argument: int


@dataclasses.dataclass(frozen=True)
class _New:
    """An output with memory of its own, or a view of the memory of an argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    size: int
    argument: int | None


class Shapes(TorchDispatchMode):
    """Runs operations on shapes alone.

    Floating point tensors made inside it have no data. Integer tensors, which hold lengths, stay
    real as long as they are computed from real ones. A value read from a tensor without data is 1.
    """

    _known: ClassVar[dict[tuple[Any, ...], Any]] = {}
    """What operations return, by operation and arguments; for all traces of a process."""
    _composite: ClassVar[dict[Any, bool]] = {}

    def __init__(self) -> None:
        """Hold no memory yet."""
        super().__init__()
        _without_compiler()
        self._real: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()

    def take(self, size: int) -> Block:
        """Return memory of `size` bytes for a new tensor."""
        return Block(size)

    @uncompiled
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return tensors of the shapes that `func` would return."""
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        key = (func, *arguments_key(args, tensors), *arguments_key(kwargs.items(), tensors))
        if self._is_real(func, tensors, kwargs):
            with no_dispatch():
                return func(*args, **kwargs)
        outputs = self._known.get(key, _UNKNOWN)
        if outputs is _UNKNOWN:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].dtype.is_floating_point else 1
            if func in SHAPES:
                with self:
                    return SHAPES[func](*args)
            if self._is_composite(func):
                with self:
                    return func.decompose(*args, **kwargs)
            outputs = self._known[key] = _outputs(func, args, kwargs, tensors)
        if type(outputs) is _New:
            return self._make(outputs, tensors)
        return _map(outputs, lambda output: self._make(output, tensors))

    @staticmethod
    def _is_real(func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        """Whether an operation takes real integer tensors alone, or makes an integer tensor.

        Masks, which the project's own operations make of integers, are long and need no values.
        """
        if func.namespace == NAMESPACE:
            return False
        if tensors:
            for tensor in tensors:
                if type(tensor) is ShapeTensor or tensor.dtype.is_floating_point:
                    return False
            return True
        return (
            func.overloadpacket is torch.ops.aten.arange or kwargs.get("dtype") is torch.int64
        ) and torch.device(kwargs.get("device") or "cpu").type == "cpu"

    def _is_composite(self, func: Any) -> bool:
        if func not in self._composite:
            self._composite[func] = torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"
            )
        return self._composite[func]

    def _make(self, output: Any, tensors: list[Tensor]) -> Any:
        if type(output) is _Same:
            return tensors[output.argument]
        if type(output) is not _New:
            return output
        made = Tensor._make_wrapper_subclass(
            ShapeTensor,
            output.shape,
            strides=output.stride,
            storage_offset=output.offset,
            dtype=output.dtype,
            device=_CPU,
        )
        if output.argument is None:
            made.block = self.take(output.size)
        else:
            made.block = self._block(tensors[output.argument])
        return made

    def _block(self, tensor: Tensor) -> Block:
        """The memory of an argument; that of a real tensor counts while it has views."""
        if type(tensor) is ShapeTensor:
            return tensor.block
        storage = tensor.untyped_storage()
        block = self._real.get(storage._cdata)
        if block is None:
            block = self._real[storage._cdata] = self.take(storage.nbytes())
        return block


def arguments_key(values: Any, tensors: list[Tensor]) -> Iterator[Any]:
    """Parts of a cache key: layout and type of tensors, which are added to `tensors`; values."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            yield value.shape
            yield value.stride()
            yield value.storage_offset()
            yield value.dtype
        elif isinstance(value, (list, tuple)):
            yield len(value)
            yield from arguments_key(value, tensors)
        else:
            yield type(value)
            yield value


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change all leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: _map(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(part, change) for part in value)
    return change(value)


def _outputs(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """Work out what an operation returns by running it on torch's meta device."""
    returns = func._schema.returns
    if returns and all(each.alias_info and each.alias_info.is_write for each in returns):
        return _written(func, args, kwargs, tensors)
    metas: dict[int, int] = {}

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return _META
        if not isinstance(value, Tensor):
            return value
        number = next(place for place, tensor in enumerate(tensors) if tensor is value)
        stored = torch.empty(_extent(value), dtype=value.dtype, device=_META)
        copy = stored.as_strided(value.shape, value.stride(), value.storage_offset())
        metas[copy.untyped_storage()._cdata] = number
        return copy

    with no_dispatch():
        positions, names = _map(args, to_meta), _map(kwargs, to_meta)
        if not tensors and any(each.name == "device" for each in func._schema.arguments):
            names["device"] = _META
        result = func(*positions, **names)

    def describe(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        return _New(
            tuple(value.shape),
            value.stride(),
            int(value.storage_offset()),
            value.dtype,
            storage.nbytes(),
            metas.get(storage._cdata),
        )

    return _map(result, describe)


def _written(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """What an operation returns that writes to its arguments: those arguments."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            written.append(next(i for i, tensor in enumerate(tensors) if tensor is value))
    found = tuple(_Same(number) for number in written[: len(func._schema.returns)])
    return found[0] if len(found) == 1 else found


def _extent(tensor: Tensor) -> int:
    """Elements from the start of a tensor's memory to the last one that it reaches."""
    offset = int(tensor.storage_offset())
    if not tensor.numel():
        return offset
    reach = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return offset + 1 + sum(reach)


def count_parameters(build: Callable[[], nn.Module], trained_only: bool = False) -> int:
    """Count the parameters, or only the trained ones, of a model built without data."""
    with Shapes():
        parameters = build().parameters()
        return sum(p.numel() for p in parameters if p.requires_grad or not trained_only)
