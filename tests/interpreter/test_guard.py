"""The guard is tested with seeded bugs: each kernel passes as it should be, and its broken twin is caught."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as machine
from triton.runtime.errors import InterpreterError

from tests.interpreter_guard import (
    AtomicOperation,
    DeviceAssertion,
    Guard,
    GuardError,
    IntegerOverflow,
    Launch,
    OutOfBounds,
    ReadWriteRace,
    WriteConflict,
)

pytestmark = pytest.mark.usefixtures("guard")


# Integers


@triton.jit
def integers_kernel(x_ptr, y_ptr, n, stride, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if OPERATION == "scalar product":
        i = n * stride
    elif OPERATION == "scalar sum":
        i = n + stride
    elif OPERATION == "vector product":
        i = (offs + n) * stride
    elif OPERATION == "vector difference":
        i = offs - n - stride
    elif OPERATION == "unsigned product":
        i = (offs + n).to(tl.uint32) * stride.to(tl.uint32)
    elif OPERATION == "unsigned difference":
        i = offs.to(tl.uint32) - n.to(tl.uint32)
    elif OPERATION == "index of a loop":
        i = n
        for row in range(n, n + 2):
            i = row * stride
    elif OPERATION == "in int64":
        i = (offs + n).to(tl.int64) * stride * stride
    elif OPERATION == "wraps on purpose":
        i = tl.mul(offs + n, stride, sanitize_overflow=False)
    tl.store(y_ptr + offs, (i + offs).to(tl.int64))


OVERFLOWS = {
    "scalar product": (2**16, 2**15, "mul in int32 would have to be 2147483648"),
    "scalar sum": (2**31 - 1, 1, "add in int32"),
    "vector product": (2**30 - 3, 2, r"mul in int32 would have to be 2147483648"),
    "vector difference": (2**31 - 1, 2, "sub in int32 would have to be -2147483649"),
    "unsigned product": (2**31 - 4, 3, "mul in uint32"),
    "unsigned difference": (1, 1, "sub in uint32 would have to be -1"),
    "index of a loop": (2**16 - 1, 2**15, "mul in int32"),
}


@pytest.mark.parametrize("operation", OVERFLOWS)
def test_integer_overflow(operation):
    n, stride, what = OVERFLOWS[operation]
    y = torch.empty(4, dtype=torch.int64)
    with pytest.raises(IntegerOverflow, match=what):
        integers_kernel[(1,)](y, y, n, stride, OPERATION=operation, BLOCK=4)
    integers_kernel[(1,)](y, y, 0, 2, OPERATION=operation, BLOCK=4)


@pytest.mark.parametrize("operation", ["in int64", "wraps on purpose"])
def test_no_integer_overflow(operation):
    y = torch.empty(4, dtype=torch.int64)
    integers_kernel[(1,)](y, y, 2**28, 2**14, OPERATION=operation, BLOCK=4)


# Lanes and programs


@triton.jit
def lanes_kernel(y_ptr, divisor, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // divisor, offs * 0)


def test_lanes_of_one_store_meet():
    """Also where they store the same: which of the lanes is the one that stores is nobody's business."""
    y = torch.empty(8, dtype=torch.int32)
    lanes_kernel[(1,)](y, 1, BLOCK=8)
    with pytest.raises(WriteConflict, match=r"lanes of one store meet at y_ptr\[0\]"):
        lanes_kernel[(1,)](y, 2, BLOCK=8)


@triton.jit
def strips_kernel(x_ptr, y_ptr, W, count, OFF: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2·x in strips of BLOCK; the last one is moved left, so that it ends at W."""
    strip = tl.program_id(0)
    offs = tl.minimum(strip * BLOCK, W - BLOCK) + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 0.0)  # not what remains
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2 + OFF * strip)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_same_bits_from_two_programs(value):
    x, y = torch.full((12,), value), torch.empty(12)
    strips_kernel[(2,)](x, y, 12, 2, OFF=0, BLOCK=8)
    with Guard(overlap=False), pytest.raises(WriteConflict, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) both store"):
        strips_kernel[(2,)](x, y, 12, 2, OFF=0, BLOCK=8)
    with Guard(overlap=False):
        strips_kernel[(2,)](torch.ones(16), torch.empty(16), 16, 2, OFF=0, BLOCK=8)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_different_bits_from_two_programs(order):
    x, y = torch.arange(12.0), torch.empty(12)
    with Guard(order), pytest.raises(WriteConflict, match=r"both store to y_ptr\[4\], bits 0x41\w+ and 0x41\w+"):
        strips_kernel[(2,)](x, y, 12, 2, OFF=1, BLOCK=8)
    strips_kernel[(2,)](torch.arange(16.0), torch.empty(16), 16, 2, OFF=1, BLOCK=8)


@triton.jit
def one_place_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_zeros_of_different_sign_are_different_bits():
    one_place_kernel[(2,)](torch.tensor([-0.0, -0.0]), torch.empty(1))
    with pytest.raises(WriteConflict, match="bits 0x0 and 0x80000000"):
        one_place_kernel[(2,)](torch.tensor([0.0, -0.0]), torch.empty(1))


@triton.jit
def widths_kernel(y_ptr, element):
    """Program 0 stores the first fp32 number, program 1 the upper half of one."""
    if tl.program_id(0) == 0:
        tl.store(y_ptr, 1.0)
    else:
        tl.store(y_ptr.to(tl.pointer_type(tl.uint16), bitcast=True) + 2 * element + 1, tl.full((), 1, tl.uint16))


def test_stores_of_different_widths():
    widths_kernel[(2,)](torch.empty(2), 1)
    with pytest.raises(WriteConflict, match=r"y_ptr\[0\], bits 0x3f80 and 0x1"):
        widths_kernel[(2,)](torch.empty(2), 0)


@triton.jit
def neighbours_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.num_programs(0) * BLOCK
    there = (offs + shift >= 0) & (offs + shift < n)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift, mask=there, other=0.0) + 1)


@pytest.mark.parametrize("shift", [1, -1, 16, -16])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_a_program_loads_what_another_stores(order, shift):
    """Whichever of the two comes first."""
    x, y = torch.zeros(32), torch.zeros(32)
    with Guard(order):
        neighbours_kernel[(4,)](x, y, shift, BLOCK=8)
        neighbours_kernel[(4,)](x, x, 0, BLOCK=8)  # in place, each its own
        with pytest.raises(ReadWriteRace, match=r"loads (x|y)_ptr\[\d+\], to which program \(\d, 0, 0\) stores"):
            neighbours_kernel[(4,)](x, x, shift, BLOCK=8)


def test_arguments_that_share_memory():
    memory = torch.zeros(48)
    neighbours_kernel[(4,)](memory[:32], memory[:32], 0, BLOCK=8)
    with pytest.raises(ReadWriteRace):
        neighbours_kernel[(4,)](memory[:32], memory[4:36], 0, BLOCK=8)
    with pytest.raises(ReadWriteRace):
        neighbours_kernel[(4,)](memory[:32].view(8, 4), memory[16:], 0, BLOCK=8)


@triton.jit
def order_kernel(y_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2)
    tl.store(y_ptr + tl.arange(0, BLOCK), program)


def test_order_of_programs():
    last = {}
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 0), ("shuffled", 1), ("shuffled", 0)):
        y = torch.full((4,), -1, dtype=torch.int32)
        with Guard(order, seed=seed), pytest.raises(WriteConflict):
            order_kernel[(4, 3, 2)](y, BLOCK=4)
        if (order, seed) in last:
            assert last[order, seed] == y[0].item()
        last[order, seed] = y[0].item()
    assert last["forward", 0] == 23
    assert last["reverse", 0] == 0
    assert len(set(last.values())) == 4


def test_every_order_runs_every_program_once():
    for order in ("forward", "reverse", "shuffled"):
        y = torch.zeros(32)
        with Guard(order):
            neighbours_kernel[(4,)](y, y, 0, BLOCK=8)
        assert y.eq(1).all()


# Assertions, atomics


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_assert(x > 0, "x must be positive")


def test_device_assert():
    x = torch.ones(4)
    assert_kernel[(2,)](x, BLOCK=4)
    x[3] = -1
    with pytest.raises(
        DeviceAssertion, match=r"assert_kernel, program \(0, 0, 0\): x must be positive; test_guard\.py"
    ):
        assert_kernel[(2,)](x, BLOCK=4)


@triton.jit
def atomic_kernel(y_ptr, SWAP: tl.constexpr):
    if SWAP:
        tl.atomic_cas(y_ptr, 0, 1)
    else:
        tl.atomic_add(y_ptr, 1)


@pytest.mark.parametrize("swap", [True, False])
def test_atomics(swap):
    with pytest.raises(AtomicOperation):
        atomic_kernel[(1,)](torch.zeros(1, dtype=torch.int32), SWAP=swap)


# The guard itself


@triton.jit
def inner(x_ptr, shift):
    return tl.load(x_ptr + shift)


@triton.jit
def outer_kernel(x_ptr, y_ptr, shift):
    tl.store(y_ptr, inner(x_ptr, shift))


def test_messages_name_the_line_in_a_function_of_the_kernel():
    with pytest.raises(OutOfBounds, match=r"^outer_kernel, program \(0, 0, 0\): load outside of x_ptr.*, in inner$"):
        outer_kernel[(1,)](torch.zeros(1), torch.zeros(1), 1)


@triton.jit
def failing_kernel(x_ptr):
    tl.load(x_ptr + tl.arange(0, 3))  # no power of two


def test_errors_that_are_not_the_guards_stay_what_they_are():
    with pytest.raises(InterpreterError):
        failing_kernel[(1,)](torch.zeros(3))
    neighbours_kernel[(4,)](torch.ones(32), torch.empty(32), 0, BLOCK=8)


def test_launches(guard):
    x, y = torch.zeros(32), torch.zeros(32)
    neighbours_kernel[(4,)](x, y, 0, BLOCK=8)
    with pytest.raises(GuardError):
        neighbours_kernel[(4,)](x, x, 1, BLOCK=8)
    neighbours_kernel[(0,)](x, y, 0, BLOCK=8)
    assert guard.launches == [
        Launch("neighbours_kernel", (4, 1, 1), loads=4, stores=4),
        Launch("neighbours_kernel", (0, 1, 1), loads=0, stores=0),
    ]


def test_everything_is_restored(guard):
    def names():
        owners = (machine, machine.InterpreterBuilder, machine.GridExecutor, TritonSemantic)
        return [dict(vars(owner)) for owner in owners] + [machine.interpreter_builder.options]

    before = names()
    with pytest.raises(InterpreterError), Guard("reverse"):
        failing_kernel[(1,)](torch.zeros(3))
    assert names() == before
    with Guard() as inner_guard:
        neighbours_kernel[(4,)](torch.ones(32), torch.empty(32), 0, BLOCK=8)
    assert len(inner_guard.launches) == 1
    assert not guard.launches


def test_wrong_use(monkeypatch):
    with pytest.raises(ValueError, match="order is 'backward'; allowed: forward, reverse, shuffled"):
        Guard("backward")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), Guard():
        pass
