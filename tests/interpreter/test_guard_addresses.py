"""The guard and addresses, with seeded bugs: what is out of bounds, and what lanes hold that are masked out."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter_guard import Misaligned, OutOfBounds

pytestmark = pytest.mark.usefixtures("guard")


@triton.jit
def copy_kernel(x_ptr, y_ptr, shift, x_end, y_end, step, BLOCK: tl.constexpr):
    """y[i] = x[step·(i + shift)], loads masked by x_end, stores by y_end."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (offs + shift) * step, mask=offs + shift < x_end, other=0)
    tl.store(y_ptr + offs, x, mask=offs < y_end)


def copy(x, y, shift=0, x_end=20, y_end=20, step=1, programs=2):
    copy_kernel[(programs,)](x, y, shift, x_end, y_end, step, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_in_bounds(dtype):
    x, y = torch.arange(20).to(dtype), torch.empty(20, dtype=dtype)
    copy(x, y)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "bug, what",
    [
        ({"x_end": 21}, r"load outside of x_ptr in 1 of 5 lanes, the first at element 20"),
        ({"y_end": 1000}, r"store outside of y_ptr in 12 of 16 lanes, the first at element 20"),
        ({"shift": -1}, r"load outside of x_ptr in 1 of 16 lanes, the first at element -1"),
        ({"shift": -100}, r"load outside of x_ptr in 16 of 16 lanes, the first at element -100"),
    ],
)
def test_out_of_bounds(bug, what):
    x, y = torch.ones(20), torch.zeros(20)
    with pytest.raises(OutOfBounds, match=what + r".*test_guard_addresses\.py:\d+, in copy_kernel"):
        copy(x, y, **bug)


def test_nothing_is_stored_out_of_bounds():
    memory = torch.zeros(64)
    with pytest.raises(OutOfBounds, match="y_ptr"):
        copy(torch.ones(32), memory[16:36], x_end=32, y_end=32)
    assert memory[36:].eq(0).all()


def test_a_view_is_its_own_elements_not_its_parents():
    parent, y = torch.ones(64), torch.empty(20)
    copy(parent[4:24], y)
    for bug in ({"shift": -1}, {"x_end": 21}):
        with pytest.raises(OutOfBounds):
            copy(parent[4:24], y, **bug)


def test_what_is_between_a_views_elements_is_not_in_it():
    parent = torch.arange(80.0).reshape(20, 4)
    y = torch.empty(20)
    copy(parent[:, 2], y, step=4)
    assert torch.equal(y, parent[:, 2])
    with pytest.raises(OutOfBounds, match="load between the elements of a view, at element 3 of x_ptr"):
        copy(parent[:, 2], y, step=3)
    # Rows of 3 in a parent of 4: the first row is dense, which the largest offset does not tell from all of them.
    copy(parent[:, :3], y, x_end=3)
    with pytest.raises(OutOfBounds, match="at element 3 of x_ptr"):
        copy(parent[:, :3], y)
    with pytest.raises(OutOfBounds, match="store between the elements of a view, at element 3 of y_ptr"):
        copy(y, parent[:, :3])


def test_views_that_are_not_nested_or_repeat_elements():
    x, y = torch.arange(24.0), torch.empty(20)
    copy(x.as_strided((18, 7), (1, 1)), y)  # windows
    assert torch.equal(y, x[:20])
    copy(x[:20].expand(3, 2, 20), y)
    copy(x.reshape(4, 6).T, y)
    copy(x.reshape(2, 1, 3, 4).permute(0, 3, 1, 2), y)


def test_another_argument_is_out_of_bounds():
    """The two are neighbours in memory, so that the address is valid, but not for a pointer made from x."""
    parent = torch.zeros(40)
    with pytest.raises(OutOfBounds, match="load outside of x_ptr"):
        copy(parent[:20], parent[20:], shift=20, x_end=40)


def test_empty_tensors():
    copy(torch.empty(0), torch.empty(0), x_end=0, y_end=0)
    with pytest.raises(OutOfBounds):
        copy(torch.empty(0), torch.empty(0), x_end=1, y_end=0)


@triton.jit
def choose_kernel(pair, y_ptr, threshold, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    pointers = tl.where(offs < threshold, pair[0] + offs, pair[1] + offs)
    tl.store(tl.where(offs < threshold, y_ptr + offs, pair[1] + offs), tl.load(pointers) + 1)


def test_lanes_in_several_tensors_of_a_tuple():
    a, b, y = torch.zeros(4), torch.ones(8), torch.zeros(4)
    choose_kernel[(1,)]((a, b), y, 4, BLOCK=8)
    assert y.tolist() == [1] * 4
    assert b.tolist() == [1] * 4 + [2] * 4
    with pytest.raises(OutOfBounds, match=r"load outside of pair\[0\] in 1 of 8 lanes"):
        choose_kernel[(1,)]((a, b), y, 5, BLOCK=8)


@triton.jit
def made_up_address_kernel(y_ptr):
    address = tl.full((1,), 4096, tl.uint64)
    tl.store(y_ptr + tl.arange(0, 1), tl.load(address.to(tl.pointer_type(tl.float32), bitcast=True)))


def test_an_address_that_is_no_arguments():
    with pytest.raises(OutOfBounds, match="load at an address that no argument is near to"):
        made_up_address_kernel[(1,)](torch.empty(1))


@triton.jit
def bytes_kernel(x_ptr, y_ptr, shift):
    pointer = (x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + shift).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(y_ptr, tl.load(pointer))


def test_misaligned():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(1)
    bytes_kernel[(1,)](x, y, 4)
    assert y.item() == 2
    with pytest.raises(Misaligned, match=r"load of 4 bytes .* x_ptr\[1\]"):
        bytes_kernel[(1,)](x, y, 6)
    with pytest.raises(OutOfBounds):
        bytes_kernel[(1,)](x, y, 9)  # starts inside, ends outside


@triton.jit
def descriptor_kernel(x, y, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    y.store([row, 0], x.load([row, 0]) + 1.0)


def test_tensor_descriptors():
    x, y = torch.ones(6, 8), torch.zeros(6, 8)
    block = [4, 8]
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, block), TensorDescriptor.from_tensor(y, block), 4, 4, 8)
    assert y.sum(1).tolist() == [0, 0, 0, 0, 16, 16]


# Lanes that are masked out


@triton.jit
def undefined_kernel(x_ptr, y_ptr, n, HOW: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if HOW == "undefined":
        x = tl.load(x_ptr + offs, mask=offs < n)
    elif HOW == "zero":
        x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    elif HOW == "three":
        x = tl.load(x_ptr + offs, mask=offs < n, other=3)
    elif HOW == "zero, one lane":  # Triton's interpreter forgets that there is an `other`
        x = tl.load(x_ptr + tl.arange(0, 1) + n, mask=tl.arange(0, 1) > 0, other=0) + offs.to(x_ptr.dtype.element_ty)
        x = tl.where(offs < n, 1, x - offs.to(x_ptr.dtype.element_ty))
    else:
        x = tl.where(offs < n, tl.load(x_ptr + offs, mask=offs < n), 0)
    tl.store(y_ptr + offs, x)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8]
)
def test_lanes_that_are_masked_out(dtype):
    x, y = torch.ones(5, dtype=dtype), torch.empty(8, dtype=dtype)
    expected = {"zero": 0, "three": 3, "where": 0}
    if dtype in (torch.float32, torch.int32):
        expected["zero, one lane"] = 0
    for how, value in expected.items():
        undefined_kernel[(1,)](x, y, 5, HOW=how, BLOCK=8)
        assert y.tolist() == [1] * 5 + [value] * 3
    undefined_kernel[(1,)](x, y, 5, HOW="undefined", BLOCK=8)
    assert y[:5].eq(1).all()
    if dtype.is_floating_point:
        assert y[5:].isnan().all()
    else:
        assert y[5:].eq(torch.iinfo(dtype).max).all()
