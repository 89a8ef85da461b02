"""Runs Gluon kernels on the CPU: for Gluon, Triton has no interpreter.

A kernel's Python body is run with this module's ``gl`` in place of Gluon's, one program after another, on NumPy arrays.
It covers the part of Gluon that this package's kernels are written in, and knows nothing of layouts: they say where a
value is, never what it is. What it is strict about, because a GPU is not:

- memory is read and written within the tensor that a pointer came from, where the mask allows; two programs never
  write the same element;
- shared memory is NaN until it is written, and what is copied asynchronously arrives when it has been waited for;
- int32 does not overflow, and nothing negative is divided (Python rounds down, a GPU toward zero);
- half types are converted, stored and multiplied as matrices, and nothing else; products are summed in fp32.

Races between threads, bank conflicts and whether a layout is possible show in compiled code alone.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterable

import numpy as np
import torch

from .interpreter import _to_bf16, _widen

_NUMPY = {"bf16": np.float32, "fp16": np.float16, "fp32": np.float32, "int1": np.bool_}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_HALF = ("bf16", "fp16")


class EmulationError(Exception):
    """The kernel did what it must not do."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise EmulationError(message)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 values in another floating-point type; bf16 is kept as the fp32 it is the upper half of."""
    if dtype == "bf16":
        return _widen(_to_bf16(np.asarray(values, np.float32), False))
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(_NUMPY[dtype])


class Value:
    """A tensor or a number at run time: integers are kept as int64, whatever their type."""

    __slots__ = ("data", "dtype")

    def __init__(self, data, dtype: str):
        self.data, self.dtype = np.asarray(data), dtype

    def to(self, dtype: str) -> Value:
        if dtype in ("int32", "int64") and self.dtype in ("int1", "int32", "int64"):
            return _integer(self.data.astype(np.int64), dtype)
        _check(self.dtype in ("bf16", "fp16", "fp32") and dtype in _NUMPY, f"{self.dtype} is converted to {dtype}")
        return self if dtype == self.dtype else Value(_rounded(self.data, dtype), dtype)

    def reshape(self, shape) -> Value:
        return Value(self.data.reshape(shape), self.dtype)

    def permute(self, order) -> Value:
        return Value(self.data.transpose(order), self.dtype)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        _check(self.data.ndim == 0, "a branch depends on a tensor")
        return bool(self.data)


def _integer(data: np.ndarray, dtype: str) -> Value:
    if dtype == "int32" and data.size:
        _check(data.min() >= -(2**31) and data.max() < 2**31, "int32 overflows")
    return Value(data, dtype)


def _value(operand) -> Value:
    if isinstance(operand, Value):
        return operand
    if isinstance(operand, (bool, np.bool_)):
        return Value(operand, "int1")
    if isinstance(operand, int):
        return Value(np.int64(operand), "int32" if -(2**31) <= operand < 2**31 else "int64")
    raise EmulationError(f"{type(operand).__name__} cannot be calculated with")


def _arithmetic(function: Callable, divides: bool = False) -> Callable:
    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = _value(self), _value(other)
        if a.dtype in _NUMPY or b.dtype in _NUMPY:
            _check(a.dtype == b.dtype == "fp32" and not divides, f"{a.dtype} and {b.dtype} are calculated with")
            return Value(function(a.data, b.data), "fp32")
        if divides:
            _check(a.data.size == 0 or (a.data.min() >= 0 and b.data.min() > 0), "something negative is divided")
        return _integer(function(a.data, b.data), "int64" if "int64" in (a.dtype, b.dtype) else "int32")

    return method


def _comparison(function: Callable) -> Callable:
    def method(self, other):
        a, b = _value(self), _value(other)
        _check("bf16" not in (a.dtype, b.dtype), "bf16 is compared")
        return Value(function(a.data, b.data), "int1")

    return method


def _reflected(method: Callable) -> Callable:
    return lambda self, other: method(_value(other), self)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _method = _arithmetic(getattr(operator, _name), _name in ("floordiv", "mod"))
    setattr(Value, f"__{_name}__", _method)
    setattr(Value, f"__r{_name}__", _reflected(_method))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name in ("and_", "or_"):
    setattr(Value, f"__{_name.strip('_')}__", _comparison(getattr(operator, _name)))
Value.__neg__ = lambda self: _value(0) - self


class Memory:
    """What a tensor occupies, dense; and which program has written what."""

    def __init__(self, tensor: torch.Tensor):
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
        self.dtype = _TYPES[tensor.dtype]
        self.data = (flat.view(torch.uint16) if self.dtype == "bf16" else flat).numpy()
        self.writer = np.full(self.data.size, -1, np.int64)

    def read(self, offsets: np.ndarray) -> np.ndarray:
        return _widen(self.data[offsets]) if self.dtype == "bf16" else self.data[offsets]

    def write(self, offsets: np.ndarray, values: np.ndarray, program: int) -> None:
        before = self.writer[offsets]
        _check(bool(((before < 0) | (before == program)).all()), "two programs write the same element")
        self.writer[offsets] = program
        self.data[offsets] = _to_bf16(values, False) if self.dtype == "bf16" else values


class Pointer:
    """Addresses in a :class:`Memory`, in elements."""

    def __init__(self, memory: Memory, offset: Value):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def checked(self, mask: Value | None) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and mask in one shape; offsets are 0 where masked."""
        offset, inside = np.broadcast_arrays(self.offset.data, True if mask is None else mask.data)
        used = offset[inside]
        size = self.memory.data.size
        _check(used.size == 0 or (used.min() >= 0 and used.max() < size), "memory outside of the tensor is used")
        return np.where(inside, offset, 0), inside

    def load(self, mask: Value | None) -> np.ndarray:
        offsets, inside = self.checked(mask)
        if not inside.any():
            return np.zeros(offsets.shape, _NUMPY[self.memory.dtype])
        return np.where(inside, self.memory.read(offsets), _NUMPY[self.memory.dtype](0))


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: np.ndarray, dtype: str):
        self.data, self.dtype, self.shape = data, dtype, list(data.shape)

    def index(self, at) -> Shared:
        _check(0 <= operator.index(at) < self.shape[0], "a buffer is asked for that is not there")
        return Shared(self.data[operator.index(at)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        _check(start >= 0 and start + length <= self.shape[dim] and start % length == 0, "a slice is not aligned")
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)], self.dtype)

    def permute(self, order) -> Shared:
        return Shared(self.data.transpose(order), self.dtype)

    def load(self, layout) -> Value:
        return Value(self.data.copy(), self.dtype)

    def store(self, value: Value) -> None:
        _check(list(value.data.shape) == self.shape and value.dtype == self.dtype, "a store does not fit")
        self.data[...] = value.data


class Program:
    """What one program sees as ``gl`` and ``async_copy``, and ``mma_v2``."""

    constexpr, int64, int32, float32 = object, "int64", "int32", "fp32"

    def __init__(self):
        self.number, self.copies, self.groups = 0, [], []

    # gl

    def __getattr__(self, name: str):
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(f"the emulator has no gl.{name}")

    def program_id(self, axis: int) -> Value:
        return _value(self.number)

    static_range = staticmethod(range)

    def arange(self, start: int, end: int, layout=None) -> Value:
        return Value(np.arange(start, end), "int32")

    def expand_dims(self, value: Value, axis: int) -> Value:
        return Value(np.expand_dims(value.data, axis), value.dtype)

    def full(self, shape, number: float, dtype: str, layout=None) -> Value:
        return Value(np.full(shape, number, _NUMPY[dtype]), dtype)

    def zeros(self, shape, dtype: str, layout=None) -> Value:
        return self.full(shape, 0, dtype)

    def minimum(self, a, b) -> Value:
        return self._extreme(np.minimum, a, b)

    def maximum(self, a, b) -> Value:
        return self._extreme(np.maximum, a, b)

    def _extreme(self, function: Callable, a, b) -> Value:
        a, b = _value(a), _value(b)
        return _integer(function(a.data, b.data), "int64" if "int64" in (a.dtype, b.dtype) else "int32")

    def where(self, condition: Value, a, b) -> Value:
        a, b = _value(a), _value(b)
        return _integer(np.where(condition.data, a.data, b.data), "int64" if "int64" in (a.dtype, b.dtype) else "int32")

    def join(self, a: Value, b: Value) -> Value:
        _check(a.dtype == b.dtype and a.data.shape == b.data.shape, "what is joined does not fit together")
        return Value(np.stack([a.data, b.data], -1), a.dtype)

    def convert_layout(self, value: Value, layout, assert_trivial: bool = False) -> Value:
        return value

    def load(self, pointer: Pointer, mask: Value | None = None, other: float = 0.0) -> Value:
        _check(other == 0, "only zeros take the place of what is masked")
        return Value(pointer.load(mask), pointer.memory.dtype)

    def store(self, pointer: Pointer, value: Value, mask: Value | None = None) -> None:
        _check(value.dtype == pointer.memory.dtype, f"{value.dtype} is stored as {pointer.memory.dtype}")
        offsets, inside = pointer.checked(mask)
        _check(offsets.shape == value.data.shape, "a value and its pointers differ in shape")
        used = offsets[inside]
        _check(np.unique(used).size == used.size, "a store writes an element twice")
        pointer.memory.write(used, value.data[inside], self.number)

    def allocate_shared_memory(self, dtype: str, shape, layout) -> Shared:
        return Shared(np.full(shape, np.nan, _NUMPY[dtype]), dtype)

    # async_copy

    def async_copy_global_to_shared(self, smem: Shared, pointer: Pointer, mask: Value | None = None) -> None:
        _check(list(np.broadcast_shapes(pointer.offset.data.shape)) == smem.shape, "a copy does not fit")
        smem.data[...] = np.nan
        self.copies.append((smem, pointer.load(mask)))

    def commit_group(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, outstanding: int = 0) -> None:
        arrived = self.groups[: len(self.groups) - outstanding]
        self.groups = self.groups[len(arrived) :]
        for smem, values in (copy for group in arrived for copy in group):
            smem.data[...] = values

    # mma_v2

    def mma(self, a: Value, b: Value, acc: Value) -> Value:
        _check(a.dtype == b.dtype and a.dtype in _HALF and acc.dtype == "fp32", "these types are not multiplied")
        with np.errstate(invalid="ignore", over="ignore"):
            return Value(np.matmul(a.data.astype(np.float32), b.data.astype(np.float32)) + acc.data, "fp32")


def _body(function) -> Callable | None:
    """The Python function that a ``@gluon.jit`` function was made from."""
    inner = getattr(function, "fn", None)
    return inner if isinstance(inner, types.FunctionType) else None


@functools.lru_cache(maxsize=64)
def _bound(kernel) -> tuple[Callable, Program]:
    """The kernel's body with everything it calls replaced, and the program that all of that is bound to."""
    program = Program()
    copier = types.SimpleNamespace(
        async_copy_global_to_shared=program.async_copy_global_to_shared,
        async_load=program.async_copy_global_to_shared,
        commit_group=program.commit_group,
        wait_group=program.wait_group,
    )
    scopes: dict[int, dict] = {}

    def scope_of(function: types.FunctionType) -> dict:
        if id(function.__globals__) in scopes:
            return scopes[id(function.__globals__)]
        scope = scopes[id(function.__globals__)] = dict(function.__globals__)
        scope.update({"gl": program, "mma_v2": program.mma, "async_copy": copier})
        scope["copy_to_shared"] = program.async_copy_global_to_shared  # what kernels call it, as versions differ
        for name, value in function.__globals__.items():
            if type(value).__name__ == "ConstexprFunction":  # makes layouts
                scope[name] = lambda *_, **__: None
            elif _body(value) is not None and type(value).__name__.endswith("JITFunction"):
                scope[name] = _replaced(_body(value), scope_of(_body(value)))
        return scope

    body = _body(kernel)
    return _replaced(body, scope_of(body)), program


def _replaced(function: types.FunctionType, scope: dict) -> types.FunctionType:
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)


def emulate(kernel, programs: int, *args, order: Iterable[int] | None = None, **constants) -> None:
    """Runs ``programs`` programs of a ``@gluon.jit`` kernel, in ``order``: 0, 1, 2, … unless it says otherwise.

    Args:
        args: what a launch passes: CPU tensors, dense in memory, in bf16, fp16 or fp32, and integers.
        constants: the constexpr arguments.

    Raises:
        EmulationError: the kernel does something that would be wrong on a GPU, or that this emulator does not know.
    """
    body, program = _bound(kernel)
    memories: dict[int, Memory] = {}
    prepared = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            memory = memories.setdefault(arg.data_ptr(), Memory(arg))
            prepared.append(Pointer(memory, Value(np.int64(0), "int64")))
        else:
            prepared.append(_value(arg))
    for number in range(programs) if order is None else order:
        program.number, program.copies, program.groups = number, [], []
        with np.errstate(invalid="ignore"):
            body(*prepared, **constants)
        _check(not program.copies, "copies are left that were never committed")
