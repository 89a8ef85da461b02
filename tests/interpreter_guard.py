"""Triton's interpreter made strict, for tests: what a GPU would punish, sometimes or silently, is an error here.

::

    with Guard():                  # or the fixture ``guard`` of tests/interpreter
        y = dk.depthwise_conv2d(x, w)
    with Guard(order="reverse"):   # the same programs, the last one first
        assert torch.equal(dk.depthwise_conv2d(x, w), y)

Errors, all of them :class:`GuardError`:

- :class:`OutOfBounds`: a load or store outside of the tensor that its pointer was made from. A view is its own
  elements: not its parent's before, after and between them, nor those of another argument. Raised before it happens;
  for what lies between a view's elements, which is the test's own memory, when the program ends.
- :class:`Misaligned`: an address that is no multiple of the size of what is loaded or stored.
- :class:`IntegerOverflow`: a sum, difference or product that does not fit its type of less than 64 bits, unless it was
  made by ``tl.add(..., sanitize_overflow=False)`` and the like. Python integers, which in the interpreter the variable
  of ``range`` and constexprs are, do not overflow before they meet a tensor.
- :class:`WriteConflict`: several lanes of one store, or several programs, store to one address.
- :class:`ReadWriteRace`: a program loads from an address to which another one stores, in whatever order they ran.
- :class:`DeviceAssertion`: a false ``tl.device_assert``.
- :class:`AtomicOperation`: kernels of this package have none, as they make results depend on the order of programs.

And where a load has a mask but no ``other``, the lanes that are masked out hold NaN (integers: their largest value) and
not zero: what they are is undefined, and a kernel that uses them gives wrong results in its test.

Rule for programs: **the same bits from two programs to one address are allowed.** Kernels on purpose let neighbouring
strips overlap, so that none needs a mask, and store what both of them computed; whichever comes last, memory holds the
same. ``Guard(overlap=False)`` forbids that too. Lanes of one store must never meet.

How: each tensor argument gets made-up addresses of its own, 2^44 bytes from the next one's, in place of its real ones,
so that a stray pointer cannot end up in another argument. An access costs one look at its largest offset; all offsets
are kept and compared when a program and when the launch ends.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as machine
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from dwconv_kernels.interpreter import repair
from tests.interpreter_accesses import (
    SLOT_BITS,
    Argument,
    AtomicOperation,
    DeviceAssertion,
    GuardError,
    IntegerOverflow,
    Misaligned,
    OutOfBounds,
    ReadWriteRace,
    WriteConflict,
    compare_programs,
)

__all__ = [
    "ORDERS", "AtomicOperation", "DeviceAssertion", "Guard", "GuardError", "IntegerOverflow", "Launch", "Misaligned",
    "OutOfBounds", "ReadWriteRace", "WriteConflict",
]  # fmt: skip

ORDERS = ("forward", "reverse", "shuffled")
_TRITON = os.path.dirname(triton.__file__)


class Launch(NamedTuple):
    """A kernel that ran to its end: its name, its grid (three numbers), how many loads and stores it executed."""

    kernel: str
    grid: tuple[int, int, int]
    loads: int
    stores: int


class Guard:
    """Context manager: every kernel that the interpreter launches inside of it is checked, see this module's docstring.

    Guards may be nested; the innermost one counts. Only kernels defined under ``TRITON_INTERPRET=1`` are interpreted.

    Args:
        order: in which the programs of a grid run: ``forward``, ``reverse`` or ``shuffled``.
        seed: for ``shuffled``.
        overlap: may two programs store the same bits to the same address?

    Attributes:
        launches: a :class:`Launch` for each kernel that ran to its end.
    """

    def __init__(self, order: str = "forward", *, seed: int = 0, overlap: bool = True):
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
        self.order, self.overlap = order, overlap
        self.launches: list[Launch] = []
        self._random = np.random.default_rng(seed)
        self._elements: dict[str, tuple[tl.dtype, np.dtype]] = {}
        self._undefined: dict[tuple, np.ndarray] = {}
        self._ones: dict[tuple, np.ndarray] = {}
        self._other_given = False
        self._begin("")

    def __enter__(self) -> Guard:
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Guard needs TRITON_INTERPRET=1, set before the kernels are defined")
        repair()
        patches = self._patches()
        self._before = [(owner, name, getattr(owner, name)) for owner, name in patches]
        for (owner, name), replacement in patches.items():
            setattr(owner, name, replacement)
        return self

    def __exit__(self, *_) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)

    def _patches(self) -> dict[tuple[object, str], object]:
        """What this guard puts in place of which names of the interpreter.

        Functions, not bound methods, where the owner is a class. Arguments that are not looked at differ with versions.
        """
        return {
            (GridExecutor, "__call__"): lambda executor, *args, **kwargs: self._launch(executor, args, kwargs),
            (GridExecutor, "_init_args_hst"): lambda executor, *args: self._host_arguments(executor, *args),
            (machine, "_implicit_cvt"): self._convert_argument,
            (machine.interpreter_builder, "options"): dataclasses.replace(_OPTIONS, debug=True),  # for device_assert
            (InterpreterBuilder, "set_grid_idx"): lambda builder, x, y, z: self._next_program(builder, x, y, z),
            (InterpreterBuilder, "create_load"): lambda _, ptr, *rest: self._load(ptr, None, None),
            (InterpreterBuilder, "create_masked_load"): lambda _, ptr, mask, other, *rest, **more: self._load(
                ptr, mask, other
            ),
            (InterpreterBuilder, "create_store"): lambda _, ptr, value, *rest: self._store(ptr, value, None),
            (InterpreterBuilder, "create_masked_store"): lambda _, ptr, value, mask, *rest, **more: self._store(
                ptr, value, mask
            ),
            (InterpreterBuilder, "create_atomic_rmw"): lambda *_: self._refuse_atomics(),
            (InterpreterBuilder, "create_atomic_cas"): lambda *_: self._refuse_atomics(),
            (InterpreterBuilder, "create_assert"): lambda _, condition, message: self._assert(condition, message),
            (TritonSemantic, "load"): self._note_other(),
            (TritonSemantic, "binary_op_sanitize_overflow_impl"): lambda _, *args: self._check_overflow(*args),
        }

    # A launch

    def _begin(self, kernel: str) -> None:
        self._kernel = kernel
        self._names: dict[int, tuple[str, object]] = {}  # by id; holding the tensor keeps the id its own
        self._arguments: dict[int, Argument] = {}
        self._programs: list[tuple[int, int, int]] = []
        self._loads = self._stores = 0

    def _launch(self, executor, args, kwargs):
        self._begin(executor.fn.__name__)
        try:
            result = _PRISTINE[GridExecutor, "__call__"](executor, *args, **kwargs)
            self._end_program()
            compare_programs(self._kernel, self._programs, self._arguments.values(), self.overlap)
            grid = machine.interpreter_builder.grid_dim
            self.launches.append(Launch(self._kernel, grid, self._loads, self._stores))
            return result
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for each kernel function that called another
                cause = cause.__cause__
            if isinstance(cause, GuardError):
                raise cause from None
            raise
        finally:
            self._begin("")

    def _host_arguments(self, executor, args, kwargs):
        args, kwargs = _PRISTINE[GridExecutor, "_init_args_hst"](executor, args, kwargs)
        for name, value in (*zip(executor.arg_names, args, strict=False), *kwargs.items()):
            self._name(name, value)
        return args, kwargs

    def _name(self, name: str, value: object) -> None:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self._name(f"{name}[{i}]", item)
        elif isinstance(value, machine.TensorDescriptor):
            self._name(name, value.base)
        else:
            self._names[id(value)] = (name, value)

    def _convert_argument(self, value):
        converted = _PRISTINE[machine, "_implicit_cvt"](value)
        if hasattr(value, "data_ptr"):
            number = len(self._arguments) + 1
            name = self._names.get(id(value), (f"tensor {number}",))[0]
            argument = Argument(number, name, machine._unwrap_tensor(value))
            self._arguments[number] = argument
            converted.handle.data = np.array([argument.base], dtype=np.uint64)
        return converted

    def _next_program(self, builder, x: int, y: int, z: int) -> None:
        self._end_program()
        position, (nx, ny, nz) = len(self._programs), builder.grid_dim
        if self.order == "reverse":
            position = nx * ny * nz - 1 - position
        elif self.order == "shuffled":
            if position == 0:
                self._permutation = self._random.permutation(nx * ny * nz)
            position = int(self._permutation[position])
        at = (position // (ny * nz), position // nz % ny, position % nz)
        _PRISTINE[InterpreterBuilder, "set_grid_idx"](builder, *at)
        self._programs.append(at)

    # Loads and stores: these run thousands of times in a program.

    def _load(self, ptr: TensorHandle, mask: TensorHandle | None, other: TensorHandle | None) -> TensorHandle:
        dtype, kept = self._element(ptr)
        pointers = ptr.data
        mask = self._lanes(pointers.shape, mask)
        values = self._filling(dtype, kept, pointers.shape) if other is None else other.data
        self._loads += 1
        addresses = self._touch(pointers, mask, kept.itemsize, None)
        return TensorHandle(machine._interpreter.load(addresses, mask, values, kept), dtype)

    def _store(self, ptr: TensorHandle, value: TensorHandle, mask: TensorHandle | None) -> None:
        pointers, values = ptr.data, value.data
        mask = self._lanes(pointers.shape, mask)
        if values.shape != pointers.shape:
            values = np.broadcast_to(values, pointers.shape)
        self._stores += 1
        addresses = self._touch(pointers, mask, values.itemsize, values)
        machine._interpreter.store(addresses, values, mask)

    def _touch(self, pointers: np.ndarray, mask: np.ndarray, size: int, values: np.ndarray | None) -> np.ndarray:
        """Checks and remembers one load (``values`` is None) or store; returns the real addresses."""
        whole = np.count_nonzero(mask) == mask.size
        active = pointers if whole else pointers[mask]
        if not active.size:
            return pointers
        argument = self._arguments.get(active.item(0) >> SLOT_BITS)
        if argument is not None:
            offsets = active - argument.base
            # Unsigned: what is before the argument, or in another one, is very far behind it.
            if int(np.maximum.reduce(offsets, axis=None)) <= argument.span - size:
                if values is None:
                    argument.loads.append((size, offsets.ravel()))
                else:
                    argument.stores.append((offsets.ravel(), (values if whole else values[mask]).ravel()))
                return pointers + argument.to_real
        return self._touch_each(pointers, mask, size, values)

    def _touch_each(self, pointers: np.ndarray, mask: np.ndarray, size: int, values: np.ndarray | None) -> np.ndarray:
        """The same for lanes that are in several arguments, or out of bounds."""
        what = "load" if values is None else "store"
        real = pointers.copy()
        numbers = np.where(mask, pointers >> np.uint64(SLOT_BITS), 0)
        for number in np.unique(numbers[mask]).tolist():
            lanes = numbers == number
            argument = self._arguments.get(number)
            if argument is None:
                raise OutOfBounds(f"{self._here()}: {what} at an address that no argument is near to; {_where()}")
            offsets = pointers[lanes] - argument.base
            signed = offsets.astype(np.int64)
            outside = signed[(signed < 0) | (signed > argument.span - size)]
            if outside.size:
                raise OutOfBounds(
                    f"{self._here()}: {what} outside of {argument.name} in {outside.size} of {mask.sum()} lanes, the "
                    f"first at {argument.element(int(outside[0]))}; {_where()}"
                )
            if values is None:
                argument.loads.append((size, offsets))
            else:
                argument.stores.append((offsets, values[lanes]))
            real[lanes] += argument.to_real
        return real

    def _element(self, ptr: TensorHandle) -> tuple[tl.dtype, np.dtype]:
        known = self._elements.get(ptr.dtype.name)
        if known is None:
            dtype = ptr.get_element_ty()
            known = self._elements[ptr.dtype.name] = dtype, machine._get_np_dtype(dtype)
        return known

    def _lanes(self, shape: tuple, mask: TensorHandle | np.ndarray | None) -> np.ndarray:
        if mask is not None:
            lanes = mask.data if isinstance(mask, TensorHandle) else mask
            return lanes if lanes.dtype == np.bool_ else lanes != 0
        lanes = self._ones.get(shape)
        if lanes is None:
            lanes = self._ones[shape] = np.ones(shape, dtype=bool)
        return lanes

    def _filling(self, dtype: tl.dtype, kept: np.dtype, shape: tuple) -> np.ndarray:
        """What a load without ``other`` puts into lanes that are masked out."""
        # Triton takes an `other` of one element that is zero for none.
        key = (dtype.name, shape, self._other_given)
        values = self._undefined.get(key)
        if values is None:
            if self._other_given:
                fill = 0
            elif dtype.name == "bf16":
                fill = np.array(0x7FC0, np.uint16).view(kept)
            elif kept.kind == "f":
                fill = np.nan
            else:
                fill = True if kept.kind == "b" else np.iinfo(kept).max
            values = self._undefined[key] = np.full(shape, fill, dtype=kept)
        return values

    def _note_other(self):
        def load(semantic, ptr, mask, other, *rest, **more):
            self._other_given = other is not None
            return _PRISTINE[TritonSemantic, "load"](semantic, ptr, mask, other, *rest, **more)

        return load

    # Other operations

    def _refuse_atomics(self) -> None:
        raise AtomicOperation(f"{self._here()}: atomic operation; {_where()}")

    def _assert(self, condition: TensorHandle, message: str) -> None:
        if not np.all(condition.data):
            raise DeviceAssertion(f"{self._here()}: {message}; {_where()}")

    def _check_overflow(self, lhs: tl.tensor, rhs: tl.tensor, binary_op) -> None:
        """In place of Triton's own check, which costs several operations of the interpreter for each one."""
        dtype, operation = lhs.type.scalar, binary_op.__name__
        if dtype.int_bitwidth in (1, 64):
            return
        a, b = lhs.handle.data, rhs.handle.data
        if a.size == b.size == 1:
            a, b = a.item(), b.item()
            low = high = a + b if operation == "add" else a - b if operation == "sub" else a * b
        else:
            wide = np.uint64 if operation == "mul" and dtype.is_int_unsigned() else np.int64
            function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation]
            exact = function(a.astype(wide), b.astype(wide))
            low, high = int(exact.min()), int(exact.max())
        if low < dtype.get_int_min_value() or high > dtype.get_int_max_value():
            value = high if high > dtype.get_int_max_value() else low
            raise IntegerOverflow(f"{self._here()}: {operation} in {dtype} would have to be {value}; {_where()}")

    def _end_program(self) -> None:
        for argument in self._arguments.values():
            argument.end_program(len(self._programs) - 1, self._here())

    def _here(self) -> str:
        return f"{self._kernel}, program {self._programs[-1] if self._programs else '?'}"


def _where() -> str:
    """The line of the kernel that is running."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TRITON):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, in {frame.f_code.co_name}"


# As they are without any guard, so that a guard inside of another one does not stand on it.
_OPTIONS = machine.interpreter_builder.options
_PRISTINE = {
    (owner, name): getattr(owner, name)
    for owner, name in (
        (GridExecutor, "__call__"),
        (GridExecutor, "_init_args_hst"),
        (InterpreterBuilder, "set_grid_idx"),
        (TritonSemantic, "load"),
        (machine, "_implicit_cvt"),
    )
}
