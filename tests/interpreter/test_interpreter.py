"""The repairs of Triton's interpreter: what it does with bf16 is what a GPU does, or an error."""

import math
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from dwconv_kernels import interpreter

interpreter.repair()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of what becomes infinity

BITS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
BF16, FP16 = BITS.view(torch.bfloat16), BITS.view(torch.float16)
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


@triton.jit
def convert_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    if ROUNDING is None:
        tl.store(y_ptr + offs, x, mask=offs < n)  # a store converts as .to() does
    else:
        tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < n)


def convert(x, dtype, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(triton.cdiv(x.numel(), 65536),)](x, y, x.numel(), BLOCK=65536, ROUNDING=rounding)
    return y


def assert_same(y, expected):
    """Bit for bit, but NaN may be any NaN."""
    assert y.dtype == expected.dtype
    assert torch.equal(y.isnan(), expected.isnan())
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()]
    number = ~expected.isnan()
    assert torch.equal(y[number].view(as_integers), expected[number].view(as_integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_every_bf16_converts(dtype):
    assert_same(convert(BF16, dtype), BF16.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_fp16_converts(dtype):
    assert_same(convert(FP16, dtype), FP16.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_bf16_to_integers(dtype):
    x = BF16[BF16.float().abs() <= torch.iinfo(dtype).max]
    assert torch.equal(convert(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_to_bf16(dtype):
    small = torch.arange(-(2**17), 2**17)
    x = torch.cat([small, small * 2**14 + 1]).to(dtype)
    assert_same(convert(x, torch.bfloat16), x.float().bfloat16())


def test_fp32_to_bf16_rounds_to_nearest_even():
    """Each upper half of an fp32 with lower halves at, beside and between the ties; those make NaNs, too."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (BITS.long()[:, None] << 16 | lower).flatten().to(torch.int32).view(torch.float32)
    assert x.isnan().sum() > 1000
    assert_same(convert(x, torch.bfloat16), x.bfloat16())


def test_fp32_to_fp16_rounds_to_nearest_even():
    """All values of fp16, the ties between them, and what is one bit beside those; 65520 is the tie to infinity."""
    values = FP16[:0x7C00].double()
    ties = (values + torch.cat([values[1:], torch.tensor([65536.0], dtype=torch.float64)])) / 2
    exact = (torch.cat([values, ties])[:, None] * SIGNS).flatten().float()
    up, down = torch.nextafter(exact, torch.tensor(math.inf)), torch.nextafter(exact, torch.tensor(-math.inf))
    x = torch.cat([exact, up, down, torch.tensor([math.inf, -math.inf, math.nan, 1e30])])
    assert_same(convert(x, torch.float16), x.half())


def test_fp64_to_bf16_rounds_once():
    """Values a little beside a tie: as fp32, they would be the tie. The expected one is the nearer neighbour."""
    lower = BF16[:0x7F7F]
    upper = BITS[1:0x7F80].view(torch.bfloat16)
    ties = (lower.double() + upper.double()) / 2
    even = torch.where(BITS[:0x7F7F].int() % 2 == 0, lower, upper)
    for x, expected in ((ties, even), (ties * (1 + 2.0**-40), upper), (ties * (1 - 2.0**-40), lower)):
        assert_same(convert(x, torch.bfloat16), expected)
        assert_same(convert(-x, torch.bfloat16), -expected)
    extremes = torch.tensor([1e300, -1e300, 1e-300, -1e-300, math.inf, math.nan], dtype=torch.float64)
    expected = torch.tensor([math.inf, -math.inf, 0.0, -0.0, math.inf, math.nan], dtype=torch.bfloat16)
    assert_same(convert(extremes, torch.bfloat16), expected)


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_toward_zero(source, target):
    values = BITS.view(target)
    values = values[values.isfinite() & (values > 0)].double()
    between = (values[1:] + values[:-1]) / 2
    too_large = values[-1:] * (1 + 3 * 2.0**-10)  # nearest is infinity
    x = torch.cat([between, values, too_large]).to(source)  # exact: fp32 has more than a bit to spare
    expected = torch.cat([values[:-1], values, values[-1:]]).to(target)
    assert_same(convert(x, target, "rtz"), expected)
    assert_same(convert(-x, target, "rtz"), -expected)
    special = torch.tensor([math.inf, -math.inf, math.nan], dtype=source)
    assert_same(convert(special, target, "rtz"), special.to(target))


@triton.jit
def bits_kernel(x_ptr, bits_ptr, y_ptr, BLOCK: tl.constexpr, INTEGER: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + offs).to(INTEGER, bitcast=True)
    tl.store(bits_ptr + offs, bits)
    tl.store(y_ptr + offs, bits.to(tl.bfloat16, bitcast=True))


@pytest.mark.parametrize("dtype, integer", [(torch.uint16, tl.uint16), (torch.int16, tl.int16)])
def test_bitcasts_keep_every_pattern(dtype, integer):
    bits, y = torch.empty(65536, dtype=dtype), torch.empty(65536, dtype=torch.bfloat16)
    bits_kernel[(1,)](BF16, bits, y, BLOCK=65536, INTEGER=integer)
    assert torch.equal(bits.view(torch.int16), BITS.view(torch.int16))
    assert torch.equal(y.view(torch.int16), BITS.view(torch.int16))


@triton.jit
def widen_by_bits_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + offs).to(tl.uint16, bitcast=True).to(tl.uint32)
    tl.store(y_ptr + offs, (bits * 65536).to(tl.float32, bitcast=True))


def test_bf16_is_the_upper_half_of_fp32():
    """The trick of the depthwise kernels."""
    y = torch.empty(65536)
    widen_by_bits_kernel[(1,)](BF16, y, BLOCK=65536)
    assert torch.equal(y.view(torch.int32), BITS.int() << 16)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BATCH: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if BATCH == 0:
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
        c = c_ptr + m[:, None] * N + n[None, :]
    else:
        i = tl.arange(0, BATCH)[:, None, None]
        a = tl.load(a_ptr + i * M * K + m[None, :, None] * K + k[None, None, :])
        b = tl.load(b_ptr + i * K * N + k[None, :, None] * N + n[None, None, :])
        c = c_ptr + i * M * N + m[None, :, None] * N + n[None, None, :]
    tl.store(c, tl.dot(a, b, acc=tl.load(c)))


@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot(dtype, batch):
    """Sums of 64 products of integers up to 127: exact in fp32, and nowhere near in half precision."""
    shape = (batch,) if batch else ()
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (*shape, 16, 64), generator=random)
    b = torch.randint(-127, 128, (*shape, 64, 32), generator=random)
    c = torch.randint(-127, 128, (*shape, 16, 32), generator=random)
    sums = c.float()
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), sums, M=16, N=32, K=64, BATCH=batch)
    assert torch.equal(sums, (a @ b + c).float())


@triton.jit
def moves_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=-2.5)
    tl.store(y_ptr + offs, tl.where(offs % 2 == 0, x, tl.full((BLOCK,), 1.5, tl.bfloat16)))
    tl.store(y_ptr + BLOCK + offs, tl.abs(x))
    tl.store(y_ptr + 2 * BLOCK + offs, tl.zeros((BLOCK,), tl.bfloat16))


def test_what_only_moves_bf16_is_right():
    x = torch.tensor([-1.0, 2.0, 0.5, -3.0], dtype=torch.bfloat16)
    y = torch.empty(12, dtype=torch.bfloat16)
    moves_kernel[(1,)](x, y, 3, BLOCK=4)
    assert y.tolist() == [-1, 1.5, 0.5, 1.5, 1, 2, 0.5, 2.5, 0, 0, 0, 0]


@triton.jit
def first(a, b):
    return a


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr):
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + offs)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "add to a number":
        y = x + 1.0
    elif OPERATION == "multiply":
        y = x * x
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "compare":
        y = x < x
    elif OPERATION == "fma":
        y = tl.fma(x, x, x)
    elif OPERATION == "sum":
        y = x + tl.sum(x, 0)
    elif OPERATION == "scan":
        y = tl.associative_scan(x, 0, first)
    tl.store(y_ptr + offs, y)


OPERATIONS = ("add", "add to a number", "multiply", "negate", "compare", "fma", "sum", "scan")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_of_bf16_is_an_error(operation):
    y = torch.empty(8)
    with pytest.raises(InterpreterError, match=r"TypeError.*of bf16 values.*x\.to\(tl\.float32\)") as error:
        arithmetic_kernel[(1,)](torch.ones(8, dtype=torch.bfloat16), y, OPERATION=operation)
    cause = error.value
    while isinstance(cause, InterpreterError):
        cause = cause.__cause__
    assert isinstance(cause, TypeError)
    arithmetic_kernel[(1,)](torch.ones(8, dtype=torch.float16), y, OPERATION=operation)


@triton.jit
def loop_kernel(x_ptr, y_ptr, begin, end, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(begin, end):
        total += tl.load(x_ptr + row * BLOCK + offs)
    tl.store(y_ptr + offs, total)


def test_loops_over_sizes():
    x, y = torch.arange(32.0).reshape(8, 4), torch.empty(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_kernel[(1,)](x, y, 2, 7, BLOCK=4)
    assert torch.equal(y, x[2:7].sum(0))


@triton.jit
def scalar_masks_kernel(x_ptr, y_ptr, n, enabled, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    mask = (offs < n) & (enabled != 0) & ((program == 5) == 0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, tl.where(program == 0, x + (n > 2), -1.0), mask=(program < 1) | (offs < 0))


def test_masks_of_scalar_comparisons():
    y = torch.empty(4)
    for enabled, expected in ((1, [2, 2, 2, 1]), (0, [1, 1, 1, 1])):
        scalar_masks_kernel[(2,)](torch.ones(4), y, 3, enabled, BLOCK=4)
        assert y.tolist() == expected


def test_repairing_again_changes_nothing():
    names = (
        "cast_impl",
        "create_fp_to_fp",
        "create_dot",
        "binary_op",
        "unary_op",
        "ternary_op",
        "create_fma",
        "get_bf16",
    )
    before = [getattr(InterpreterBuilder, name) for name in names]
    interpreter.repair()
    assert [getattr(InterpreterBuilder, name) for name in names] == before


def test_what_is_right_is_left_alone(monkeypatch):
    """A Triton that does everything right, bf16 arithmetic included, is not touched."""
    repairs = {name: (lambda: True, None) for name in interpreter._REPAIRS}
    monkeypatch.setattr(interpreter, "_REPAIRS", repairs)
    interpreter.repair()


def test_an_interpreter_that_cannot_be_repaired_is_an_error(monkeypatch):
    monkeypatch.setitem(interpreter._REPAIRS, "tl.dot of bf16", (lambda: False, lambda: None))
    with pytest.raises(RuntimeError, match=r"Triton .* cannot be repaired \(still wrong: tl\.dot of bf16\)"):
        interpreter.repair()
    monkeypatch.undo()
    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    with pytest.raises(RuntimeError, match=r"cannot be repaired \(it has no create_dot\)"):
        interpreter.repair()


def test_scalars_and_broadcasts_convert():
    """Arrays of the interpreter that are no plain rows: one element, and strides of zero."""
    one = interpreter._widen(np.array(0x3FC0, np.uint16))
    assert one.shape == ()
    assert one == 1.5
    rows = np.broadcast_to(np.array([1.5, -2.0], np.float32), (3, 2))
    assert interpreter._to_bf16(rows, False).tolist() == [[0x3FC0, 0xC000]] * 3
    assert interpreter._to_bf16(rows.astype(np.float64), True).tolist() == [[0x3FC0, 0xC000]] * 3
