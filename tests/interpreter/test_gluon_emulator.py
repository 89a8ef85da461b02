"""The emulator of Gluon: right on what a kernel may do, and an error for what a GPU would let pass."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dwconv_kernels.gluon_emulator import EmulationError, emulate

LAYOUT = None  # the emulator knows nothing of them


@gluon.constexpr_function
def layout_of(size):
    return gl.BlockedLayout([1], [32], [size // 32], [0])


@gluon.jit
def numbers(SIZE: gl.constexpr):
    return gl.arange(0, SIZE, layout=layout_of(SIZE))


@gluon.jit
def scale_kernel(x_ptr, y_ptr, n, SIZE: gl.constexpr, REACH: gl.constexpr, SPREAD: gl.constexpr):
    offsets = gl.program_id(0) * SPREAD + numbers(SIZE)
    inside = offsets < n
    x = gl.load(x_ptr + (offsets + REACH), mask=inside, other=0.0).to(gl.float32)
    gl.store(y_ptr + offsets, (x * x + x).to(y_ptr.dtype.element_ty), mask=inside)


def scale(n, programs, dtype=torch.float32, size=32, reach=0, spread=32, order=None):
    x = torch.arange(-5, n - 5).to(dtype)
    y = torch.full((n,), float("nan"), dtype=dtype)
    emulate(scale_kernel, programs, x, y, n, order=order, SIZE=size, REACH=reach, SPREAD=spread)
    return y, (x.double() ** 2 + x.double()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loads_calculates_rounds_and_stores(dtype):
    actual, expected = scale(70, 3, dtype)
    assert torch.equal(actual, expected)


def test_programs_run_in_the_order_asked_for():
    actual, expected = scale(70, 3, order=[2, 0, 1])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("more, message", [
    ({"reach": 1}, "memory outside of the tensor"),
    ({"reach": -1}, "memory outside of the tensor"),
    ({"spread": 31}, "two programs write the same element"),
    ({"spread": 2**30}, "int32 overflows"),
], ids=str)  # fmt: skip
def test_memory_is_used_as_it_must_be(more, message):
    with pytest.raises(EmulationError, match=message):
        scale(70, 3, **more)


def test_a_masked_lane_may_point_anywhere():
    actual, expected = scale(33, 2)
    assert torch.equal(actual, expected)


@gluon.jit
def shared_kernel(x_ptr, y_ptr, WRITE: gl.constexpr, FIRST: gl.constexpr, LENGTH: gl.constexpr, AT: gl.constexpr):
    at = numbers(32)
    buffer = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, 4, 8], LAYOUT)
    if WRITE:
        buffer.index(1).store(gl.load(x_ptr + at).reshape([4, 8]))
    part = buffer.index(AT).slice(FIRST, LENGTH, dim=0).permute([1, 0]).load(LAYOUT)
    gl.store(y_ptr + gl.arange(0, 8 * LENGTH, layout=LAYOUT), part.permute([1, 0]).reshape([8 * LENGTH]))


def shared(write=True, first=2, length=2, at=1):
    x, y = torch.arange(32.0), torch.full((8 * length,), -1.0)
    emulate(shared_kernel, 1, x, y, WRITE=write, FIRST=first, LENGTH=length, AT=at)
    return y


def test_views_of_shared_memory():
    assert torch.equal(shared(), torch.arange(16.0, 32.0))


def test_shared_memory_is_nan_until_it_is_written():
    assert shared(write=False).isnan().all()
    assert shared(at=0).isnan().all()


@pytest.mark.parametrize("more", [{"first": 1}, {"first": 3, "length": 2}, {"first": 4, "length": 2}], ids=str)
def test_slices_are_inside_and_aligned(more):
    with pytest.raises(EmulationError, match="not aligned"):
        shared(**more)


def test_buffers_are_there():
    with pytest.raises(EmulationError, match="a buffer is asked for"):
        shared(at=2)


@gluon.jit
def copy_kernel(x_ptr, y_ptr, WAIT: gl.constexpr, COMMIT: gl.constexpr):
    at = numbers(32)
    buffer = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, 32], LAYOUT)
    for i in gl.static_range(2):
        async_copy.async_copy_global_to_shared(buffer.index(i), x_ptr + (at + 32 * i), mask=at < 30)
        if COMMIT:
            async_copy.commit_group()
    async_copy.wait_group(WAIT)
    for i in gl.static_range(2):
        gl.store(y_ptr + (at + 32 * i), buffer.index(i).load(LAYOUT))


def copied(wait, commit=True):
    x, y = torch.arange(64.0), torch.zeros(64)
    emulate(copy_kernel, 1, x, y, WAIT=wait, COMMIT=commit)
    return x, y


def test_copies_arrive_when_they_have_been_waited_for():
    x, y = copied(0)
    expected = torch.where(torch.arange(64) % 32 < 30, x, torch.zeros(()))  # zeros where masked
    assert torch.equal(y, expected)
    _, y = copied(1)
    assert torch.equal(y[:32], expected[:32])
    assert y[32:].isnan().all()
    assert copied(2)[1].isnan().all()


def test_copies_are_committed():
    with pytest.raises(EmulationError, match="never committed"):
        copied(0, commit=False)


@gluon.jit
def product_kernel(a_ptr, b_ptr, y_ptr):
    a = gl.load(a_ptr + gl.arange(0, 256, layout=LAYOUT)).reshape([1, 16, 16])
    b = gl.load(b_ptr + gl.arange(0, 128, layout=LAYOUT)).reshape([1, 16, 8])
    y = mma_v2(a, b, gl.zeros([1, 16, 8], gl.float32, layout=LAYOUT))
    gl.store(y_ptr + gl.arange(0, 128, layout=LAYOUT), y.reshape([128]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_are_summed_in_fp32(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    y = torch.zeros(16, 8)
    emulate(product_kernel, 1, a, b, y)
    torch.testing.assert_close(y, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def test_fp32_is_not_multiplied_as_a_matrix():
    with pytest.raises(EmulationError, match="are not multiplied"):
        emulate(product_kernel, 1, torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8))


@gluon.jit
def wrong_kernel(x_ptr, y_ptr, n, WHAT: gl.constexpr):
    at = numbers(32)
    x = gl.load(x_ptr + at)
    if WHAT == "sum of bf16":
        x = x + x
    if WHAT == "comparison of bf16":
        x = gl.where(x > x, at, at)
    if WHAT == "division of what is negative":
        at = (at - 1) // 2
    if WHAT == "another dtype":
        x = x.to(gl.float32)
    if WHAT == "branch":  # noqa: SIM102 (WHAT is a constant, and at is not)
        if at > 0:
            x = x
    if WHAT == "twice":
        at = at // 2
    if WHAT == "other":
        x = gl.load(x_ptr + at, mask=at < n, other=1.0)
    gl.store(y_ptr + at, x)


@pytest.mark.parametrize("what, message", [
    ("sum of bf16", "bf16 and bf16 are calculated with"),
    ("comparison of bf16", "bf16 is compared"),
    ("division of what is negative", "something negative is divided"),
    ("another dtype", "fp32 is stored as bf16"),
    ("branch", "a branch depends on a tensor"),
    ("twice", "a store writes an element twice"),
    ("other", "only zeros"),
])  # fmt: skip
def test_what_a_gpu_would_do_otherwise_is_an_error(what, message):
    x = torch.zeros(32, dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match=message):
        emulate(wrong_kernel, 1, x, torch.zeros_like(x), 30, WHAT=what)


@gluon.jit
def unknown_kernel(x_ptr):
    gl.histogram(gl.load(x_ptr + numbers(32)), 4)


def test_what_the_emulator_does_not_know_is_named():
    with pytest.raises(AttributeError, match=r"no gl\.histogram"):
        emulate(unknown_kernel, 1, torch.zeros(32))
