"""Repairs of Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on the CPU: bf16 made right.

The interpreter keeps bf16 as uint16 and forgets about it: sums and products, those of ``tl.dot`` too, are those of the
bit patterns, and what is converted to bf16 is truncated, where NaN can become infinity. :func:`repair` replaces the
methods that do so. Which these are is found out by trying, not from a version number: a Triton that does one of these
things right keeps its own way of doing it, and one that cannot be repaired from here is an error, not a wrong result.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as machine
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_FLOATS = ("bf16", "fp16", "fp32", "fp64")


def repair() -> None:
    """Make Triton's interpreter right where it is silently wrong; the second call finds nothing left to do.

    - Conversions to bf16 round to nearest, ties to even, and once (also from fp64), or toward zero where the kernel
      says so; NaN stays NaN, finite values that are too large become infinity, subnormals are kept. Conversions from
      bf16 are exact. Those to fp16 are right already, but for ``fp_downcast_rounding="rtz"``, which is repaired too.
    - ``tl.dot`` of bf16 operands multiplies and adds in the dtype of the sum, fp32.
    - Arithmetic, comparisons and reductions of bf16 raise TypeError: no kernel should need them, and what a GPU would
      make of them depends on the GPU. ``tl.where``, bitcasts and everything else that only moves bits stays allowed.
    - Comparisons of scalars are of type int1 also when they are broadcast, which Triton 3.9 insists on in a mask.
    - Kernel functions that call others, and integer arithmetic, take a fifth of the time.
    - ``tl.full`` with a bf16 value works, and so do loops over sizes under NumPy ≥ 2.4 (neither does in Triton 3.6).

    It concerns this process and no compiled kernel. As with everything that goes wrong in an interpreted kernel, what a
    caller sees is Triton's ``InterpreterError``, with the TypeError in its message and as its cause.

    Raises:
        RuntimeError: this version of Triton has an interpreter that these repairs do not fit.
    """
    try:
        wrong = [(name, mend) for name, (is_right, mend) in _REPAIRS.items() if not is_right()]
        for _, mend in wrong:
            mend()
        wrong = [name for name, _ in wrong if not _REPAIRS[name][0]()]
    except AttributeError as error:
        raise RuntimeError(_unknown(f"it has no {error.name}")) from error
    if wrong:
        raise RuntimeError(_unknown(f"still wrong: {', '.join(wrong)}"))


def _unknown(what: str) -> str:
    return f"the interpreter of Triton {triton.__version__} cannot be repaired ({what}); kernels cannot run under it"


# What is tried: a Triton that keeps bf16 in a dtype of its own would be given that


def _bf16(patterns: list) -> TensorHandle:
    kept = machine._get_np_dtype(tl.bfloat16)
    return TensorHandle(np.array(patterns, np.uint16).view(kept), tl.bfloat16)


def _bits(handle: TensorHandle) -> list[int]:
    return handle.data.view(np.uint16).tolist()


# Conversions


def _widen(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bit patterns, exact: a bf16 is the upper half of an fp32."""
    return (np.atleast_1d(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(bits))


def _to_bf16(values: np.ndarray, toward_zero: bool) -> np.ndarray:
    """Bit patterns (uint16) of fp32 or fp64 values rounded to bf16, once."""
    bits = _round_to_odd(values) if values.dtype == np.float64 else np.atleast_1d(values).view(np.uint32)
    upper = bits >> np.uint32(16)
    # Adding half a unit, less one where the result would be odd, carries into the upper half exactly where that is
    # nearest or even; from the largest finite values it carries into the exponent of infinity.
    rounded = upper if toward_zero else (bits + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    # The quiet bit, because the bits that make it a NaN may be in the lower half.
    rounded = np.where(nan, upper | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16).reshape(np.shape(values))


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint32) of fp64 values as fp32, toward zero, the last bit set where that is not exact.

    Rounding the result to a shorter type is then the same as rounding the fp64 value, as the last bit says on which
    side of a tie it is (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    bits = _step_toward_zero(values, np.dtype(np.float32)).view(np.uint32)
    return bits | (bits.view(np.float32) != values)


def _step_toward_zero(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in a shorter floating-point dtype, rounded toward zero."""
    values = np.atleast_1d(values)
    with np.errstate(over="ignore"):
        nearest = values.astype(dtype)
    too_large = np.abs(nearest.astype(values.dtype)) > np.abs(values)
    # Bit patterns are ordered like magnitudes, infinity after the largest finite value.
    return (nearest.view(f"u{nearest.itemsize}") - too_large).view(dtype)


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, toward_zero: bool = False) -> np.ndarray:
    """What the interpreter keeps for values of one type, converted to what it keeps for another."""
    if source.name == "bf16":
        data = _widen(data)
    if target.name == "bf16":
        # Integers by way of fp32, as compiled kernels do.
        return _to_bf16(data if data.dtype in (np.float32, np.float64) else data.astype(np.float32), toward_zero)
    dtype = machine._get_np_dtype(target)
    if toward_zero and dtype.itemsize < data.itemsize:
        return _step_toward_zero(data, dtype).reshape(data.shape)
    with np.errstate(over="ignore"):
        return data.astype(dtype)


def _repair_conversions() -> None:
    def either_is_bf16(cast_impl: Callable) -> Callable:
        @functools.wraps(cast_impl)
        def repaired(self, src, dst_type):
            source, target = src.dtype.scalar, dst_type.scalar
            if (source.name == "bf16") == (target.name == "bf16") or source.is_fp8() or target.is_fp8():
                return cast_impl(self, src, dst_type)
            return TensorHandle(_convert(src.data, source, target), target)

        return repaired

    def between_floats(create_fp_to_fp: Callable) -> Callable:
        @functools.wraps(create_fp_to_fp)
        def repaired(self, src, dst_type, rounding_mode):
            source, target = src.dtype.scalar, dst_type.scalar
            if source.name not in _FLOATS or target.name not in _FLOATS:
                return create_fp_to_fp(self, src, dst_type, rounding_mode)
            toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
            return TensorHandle(_convert(src.data, source, target, toward_zero), target)

        return repaired

    InterpreterBuilder.cast_impl = either_is_bf16(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = between_floats(InterpreterBuilder.create_fp_to_fp)


def _conversions_are_right() -> bool:
    builder, bits = machine.interpreter_builder, _bits
    # A tie to even, a tie up to even, past a tie, too large, subnormal, NaN whose bits are all in the lower half.
    patterns = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00018000, 0x7F800001], np.uint32)
    singles = TensorHandle(patterns.view(np.float32), tl.float32)
    doubles = TensorHandle(np.array([1.00390625000001, 3.4e38]), tl.float64)  # by way of fp32, the first is a tie
    halves = TensorHandle(np.array([0x3C04, 0x0001, 0x7C01], np.uint16).view(np.float16), tl.float16)
    brains = _bf16([0xBFC0, 0x0001, 0x4049])
    rtz, rtne = ir.ROUNDING_MODE.RTZ, ir.ROUNDING_MODE.RTNE
    return (
        bits(builder.cast_impl(singles, tl.bfloat16)) == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x0002, 0x7FC0]
        and bits(builder.create_fp_to_fp(singles, tl.bfloat16, rtz)) == [0x3F80, 0x3F81, 0x3F80, 0x7F7F, 0x0001, 0x7FC0]
        and bits(builder.create_fp_to_fp(singles, tl.float16, rtz))[:5] == [0x3C04, 0x3C0C, 0x3C04, 0x7BFF, 0]
        and bits(builder.cast_impl(doubles, tl.bfloat16)) == [0x3F81, 0x7F80]
        and bits(builder.create_fp_to_fp(halves, tl.bfloat16, rtne))[:2] == [0x3F80, 0x3380]
        and builder.cast_impl(brains, tl.float32).data.tolist() == [-1.5, 2.0**-133, 3.140625]
        and builder.cast_impl(brains, tl.int32).data.tolist() == [-1, 0, 3]
        and bits(builder.cast_impl(TensorHandle(np.array([-3, 257]), tl.int64), tl.bfloat16)) == [0xC040, 0x4380]
    )


# Products of matrices


def _repair_dot() -> None:
    def widened(operand: TensorHandle) -> TensorHandle:
        return TensorHandle(_widen(operand.data), tl.float32) if _is_bf16(operand) else operand

    def of_bf16(create_dot: Callable) -> Callable:
        @functools.wraps(create_dot)
        def repaired(self, a, b, *rest):
            return create_dot(self, widened(a), widened(b), *rest)

        return repaired

    InterpreterBuilder.create_dot = of_bf16(InterpreterBuilder.create_dot)


def _dot_is_right() -> bool:
    minus_three = _bf16([[0xC040]])
    one = TensorHandle(np.ones((1, 1), np.float32), tl.float32)
    return machine.interpreter_builder.create_dot(minus_three, minus_three, one, None, 0).data.tolist() == [[10.0]]


# Arithmetic


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar.name == "bf16"


def _complain(what: str) -> None:
    raise TypeError(
        f"{what} of bf16 values: Triton's interpreter would compute with their bit patterns. Kernels convert to fp32 "
        "first, x.to(tl.float32), and round once at the store"
    )


def _repair_arithmetic() -> None:
    def refusing(method: Callable) -> Callable:
        @functools.wraps(method)
        def repaired(self, *args):
            if any(_is_bf16(arg) for arg in args) and args[-1] is not np.where:  # tl.where only moves bits
                _complain(getattr(args[-1], "__name__", method.__name__))
            return method(self, *args)

        return repaired

    def refusing_tensors(check_tensor: Callable) -> Callable:
        @functools.wraps(check_tensor)
        def repaired(self, tensors):
            check_tensor(self, tensors)
            if any(tensor.dtype.name == "bf16" for tensor in tensors):
                _complain("a reduction or scan")

        return repaired

    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))
    reduction = machine.ReduceScanOpInterface
    reduction.check_tensor = refusing_tensors(reduction.check_tensor)


def _arithmetic_is_right() -> bool:
    """Two and a half added to itself is five, or an error."""
    value = _bf16([0x4020])
    with contextlib.suppress(TypeError):
        return _bits(machine.interpreter_builder.create_fadd(value, value)) == [0x40A0]
    return True


# What else stops kernels


def _repair_comparisons() -> None:
    """What comes of comparing int32 is called int32, which nobody minds before it is broadcast and becomes int32."""

    def as_int1(binary_op: Callable) -> Callable:
        @functools.wraps(binary_op)
        def repaired(self, *args):
            result = binary_op(self, *args)
            if result.data.dtype == np.bool_:
                result.dtype = tl.int1
            return result

        return repaired

    InterpreterBuilder.binary_op = as_int1(InterpreterBuilder.binary_op)


def _comparisons_are_right() -> bool:
    three = TensorHandle(np.array([3], np.int32), tl.int32)
    return machine.interpreter_builder.create_icmpEQ(three, three).dtype == tl.int1


def _repair_constants() -> None:
    def get_bf16(self, value: float) -> TensorHandle:
        return self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)

    InterpreterBuilder.get_bf16 = get_bf16


def _constants_are_right() -> bool:
    return hasattr(InterpreterBuilder, "get_bf16")


def _repair_indices() -> None:
    """``range(size)`` in a kernel: sizes are arrays of one element, which NumPy ≥ 2.4 does not convert to integers."""

    def with_index(patch_lang_tensor: Callable) -> Callable:
        @functools.wraps(patch_lang_tensor)
        def repaired(tensor, scope):
            patch_lang_tensor(tensor, scope)
            tensor.__index__ = lambda self: int(self.handle.data.item())  # restored by the scope

        return repaired

    machine._patch_lang_tensor = with_index(machine._patch_lang_tensor)


def _indices_are_right() -> bool:
    class Tensor:
        handle = TensorHandle(np.array([3], np.int32), tl.int32)
        dtype = T = None

    machine._patch_lang_tensor(Tensor, machine._LangPatchScope())
    with contextlib.suppress(TypeError, DeprecationWarning), warnings.catch_warnings():
        warnings.simplefilter("error")  # older versions of NumPy only warn, at every iteration
        return range(Tensor())[-1] == 2
    return False


# What only takes time, but most of it


def _repair_calls() -> None:
    """Triton patches its language anew whenever one kernel function calls another, which is two thirds of the time.

    The mark is set like every other patch, so it goes when a launch ends and its patches are taken back.
    """

    def once(patch_lang: Callable) -> Callable:
        @functools.wraps(patch_lang)
        def repaired(function):
            modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            if modules and all(hasattr(module, _PATCHED) for module in modules):
                return machine._LangPatchScope()
            scope = patch_lang(function)
            for module in modules:
                scope.set_attr(module, _PATCHED, True)
            return scope

        return repaired

    machine._patch_lang = once(machine._patch_lang)


_PATCHED = "_patched_for_the_interpreter"
_PATCH_LANG = machine._patch_lang
_OVERFLOW_CHECK = TritonSemantic.binary_op_sanitize_overflow_impl


def _calls_are_quick() -> bool:
    return machine._patch_lang is not _PATCH_LANG


def _repair_overflow_checks() -> None:
    """Triton computes integer sums and products again in 64 bits, and forgets the result unless asked to check it."""

    def only_if_asked(check: Callable) -> Callable:
        @functools.wraps(check)
        def repaired(self, *args):
            if machine.interpreter_builder.options.sanitize_overflow and machine.interpreter_builder.options.debug:
                check(self, *args)

        return repaired

    TritonSemantic.binary_op_sanitize_overflow_impl = only_if_asked(TritonSemantic.binary_op_sanitize_overflow_impl)


def _overflow_checks_are_quick() -> bool:
    return TritonSemantic.binary_op_sanitize_overflow_impl is not _OVERFLOW_CHECK


_REPAIRS: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "conversions of bf16": (_conversions_are_right, _repair_conversions),
    "tl.dot of bf16": (_dot_is_right, _repair_dot),
    "types of comparisons": (_comparisons_are_right, _repair_comparisons),
    "constants in bf16": (_constants_are_right, _repair_constants),
    "arithmetic of bf16": (_arithmetic_is_right, _repair_arithmetic),
    "sizes as integers": (_indices_are_right, _repair_indices),
    "time of calls": (_calls_are_quick, _repair_calls),
    "time of overflow checks": (_overflow_checks_are_quick, _repair_overflow_checks),
}
