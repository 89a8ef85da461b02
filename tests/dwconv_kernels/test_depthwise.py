"""``depthwise_conv2d``: the hand-written definition against PyTorch's convolution, in every dtype and layout."""

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests.cases import DEPTHWISE, EMPTY_MAPS
from tests.dwconv_kernels.operands import with_gradients

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]


def ours(case, backend="reference"):
    def run(x, weight, bias=None):
        with dk.backend(backend):
            return dk.depthwise_conv2d(x, weight, bias, case.stride, case.padding, case.dilation)

    return run


def pytorch(case):
    def run(x, weight, bias=None):
        return F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation, groups=x.shape[1])

    return run


def operands(case, make):
    tensors = [make((case.n, case.c, case.h, case.w)), make((case.c, 1, case.kh, case.kw))]
    return [*tensors, make((case.c,))] if case.bias else tensors


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(case, dtype):
    tensors = operands(case, testing.integers)
    dy = testing.integers(pytorch(case)(*tensors).shape)
    expected = with_gradients(pytorch(case), [t.double() for t in tensors], lambda y: dy.double())
    actual = with_gradients(ours(case), [t.to(dtype) for t in tensors], lambda y: dy.to(dtype))
    for name, a, e in zip(("y", "dx", "dw", "db"), actual, expected, strict=False):
        assert a.dtype == dtype
        testing.assert_exact(a, e, name)


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_element_within_its_rounding_bound(case, dtype):
    tensors = operands(case, lambda shape: normal(shape, dtype))
    exact = [t.double() for t in tensors]
    actual = with_gradients(ours(case), tensors)
    upstream = torch.randn(actual[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dy = upstream.to(dtype).double()
    expected = with_gradients(pytorch(case), exact, lambda y: dy)
    magnitude = with_gradients(pytorch(case), [t.abs() for t in exact], lambda y: dy.abs())
    pixels = actual[0].shape[0] * actual[0].shape[2] * actual[0].shape[3]
    terms = [case.kh * case.kw + 1, case.kh * case.kw, pixels, pixels]
    for name, a, e, m, n in zip(("y", "dx", "dw", "db"), actual, expected, magnitude, terms, strict=False):
        testing.assert_componentwise(a, e, m, n, name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_errors_no_larger_than_pytorchs_and_unbiased(dtype):
    case = DEPTHWISE[0]._replace(n=4, h=28, w=28)
    tensors = operands(case, lambda shape: normal(shape, dtype))
    dy = normal((case.n, case.c, case.h, case.w), dtype)
    actual = with_gradients(ours(case), tensors, lambda y: dy)
    peer = with_gradients(pytorch(case), tensors, lambda y: dy)
    expected = with_gradients(pytorch(case), [t.double() for t in tensors], lambda y: dy.double())
    bounds = {"y": (1.5, 2), "dx": (1.5, 2), "dw": (2, 3), "db": (2, 3)}
    if dtype in HALF:
        bounds = dict.fromkeys(bounds, (1.05, 1.25))
    for (name, (rms, maximum)), a, p, e in zip(bounds.items(), actual, peer, expected, strict=True):
        testing.assert_no_worse(a, p, e, rms, maximum, name)
        if a.numel() >= 1e5:
            testing.assert_unbiased(a, e, what=name)


@pytest.mark.parametrize("case", [c for c in DEPTHWISE if c.c <= 40 and c.kh < 31], ids=str)
def test_gradcheck(case):
    case = case._replace(n=1, c=min(case.c, 3), h=min(case.h, 9), w=min(case.w, 9)) if case.dilation == (1, 1) else case
    case = case._replace(c=min(case.c, 2))
    tensors = operands(case, lambda shape: normal(shape, torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(ours(case), tensors, fast_mode=True)


def test_adjoint_identity_in_integers():
    """⟨y(x, w), g⟩ = ⟨x, dx(g)⟩ = ⟨w, dw(g)⟩, exactly: what links the three passes to each other."""
    for case in DEPTHWISE:
        x, w, *_ = operands(case._replace(bias=False), lambda s: testing.integers(s, torch.float64))
        g = testing.integers(pytorch(case)(x, w).shape, torch.float64)
        y, dx, dw = with_gradients(ours(case), [x, w], lambda y, g=g: g)
        assert (y * g).sum() == (x * dx).sum() == (w * dw).sum()


@pytest.mark.parametrize("layout", list(testing.in_layouts(torch.zeros(2, 4, 5, 6))))
@pytest.mark.parametrize("dy_layout", list(testing.in_layouts(torch.zeros(2, 4, 5, 6))))
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layouts_of_input_and_gradient(layout, dy_layout, backend):
    case = DEPTHWISE[0]._replace(n=2, c=5, h=8, w=6)
    x, w, b = operands(case, testing.integers)
    dy = testing.integers(x.shape)
    expected = with_gradients(pytorch(case), [x, w, b], lambda y: dy)
    leaf = testing.in_layouts(x)[layout].requires_grad_()  # not cloned: the strides are the point
    w, b = w.requires_grad_(), b.requires_grad_()
    y = ours(case, backend)(leaf, w, b)
    gradients = torch.autograd.grad(y, (leaf, w, b), testing.in_layouts(dy)[dy_layout])
    for name, a, e in zip(("y", "dx", "dw", "db"), (y.detach(), *gradients), expected, strict=True):
        testing.assert_exact(a, e, name)
    last = "channels_last" in layout
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_that_of_x_alone(backend, grad, x_format, w_format):
    x = torch.randn(2, 16, 9, 9).to(memory_format=x_format)
    w = torch.randn(16, 1, 7, 7).to(memory_format=w_format).requires_grad_()
    with torch.set_grad_enabled(grad), dk.backend(backend):
        assert dk.depthwise_conv2d(x, w, padding=3).is_contiguous(memory_format=x_format)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("head", ["sum", "mean", "slice", "cat", "permute", "expand"])
def test_gradients_that_arrive_from_other_operators(backend, head):
    heads = {
        "sum": lambda y: y.sum(),
        "mean": lambda y: y.mean((2, 3)).square().sum(),
        "slice": lambda y: y[..., ::2].square().sum(),
        "cat": lambda y: torch.cat([y, 2 * y], 1)[:, 3:].square().sum(),
        "permute": lambda y: (y.permute(0, 2, 3, 1) * torch.arange(y.shape[1])).sum(),
        "expand": lambda y: y.sum((2, 3), keepdim=True).expand_as(y).square().sum(),
    }
    case = DEPTHWISE[0]._replace(n=2, c=5, h=6, w=8)
    tensors = operands(case, lambda s: testing.integers(s, torch.float64))
    results = []
    for function in (ours(case, backend), pytorch(case)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(heads[head](function(*leaves)), leaves))
    for name, a, e in zip(("dx", "dw", "db"), *results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=name)


def test_expanded_inputs():
    case = DEPTHWISE[0]._replace(n=3, c=4, h=6, w=5)
    x = testing.integers((1, 1, 6, 5)).expand(3, 4, 6, 5)
    w = testing.integers((1, 1, 7, 7)).expand(4, 1, 7, 7)
    b = testing.integers((1,)).expand(4)
    testing.assert_exact(ours(case)(x, w, b), pytorch(case)(x.double(), w.double(), b.double()))


@pytest.mark.parametrize("shape", EMPTY_MAPS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_empty_maps(shape, backend):
    c = shape[1]
    x, w, b = (
        torch.randn(shape).requires_grad_(),
        torch.randn(c, 1, 7, 7).requires_grad_(),
        torch.randn(c).requires_grad_(),
    )
    with dk.backend(backend):
        y = dk.depthwise_conv2d(x, w, b, padding=3)
    assert y.shape == shape
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert dx.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (2, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_given_as_a_word(kernel, dilation, backend):
    x, w = testing.integers((2, 3, 14, 17)), testing.integers((3, 1, *kernel))
    with dk.backend(backend):
        for padding in ("same", "valid"):
            y = dk.depthwise_conv2d(x, w, padding=padding, dilation=dilation)
            expected = F.conv2d(x.double(), w.double(), padding=padding, dilation=dilation, groups=3)
            testing.assert_exact(y, expected, padding)


def test_without_a_batch_dimension():
    x, w = testing.integers((3, 9, 8)), testing.integers((3, 1, 3, 3))
    testing.assert_exact(dk.depthwise_conv2d(x, w, padding=1), F.conv2d(x.double(), w.double(), padding=1, groups=3))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_gradient_has_the_strides_of_the_weight(backend, x_format, w_format):
    x = torch.randn(2, 16, 9, 9).to(memory_format=x_format)
    w = torch.nn.Parameter(torch.randn(16, 1, 7, 7).to(memory_format=w_format))
    with dk.backend(backend):
        dk.depthwise_conv2d(x, w, padding=3).square().sum().backward()
    assert w.grad.stride() == w.stride()


def test_gradients_with_the_other_tensors_frozen():
    x, w, b = torch.randn(1, 3, 8, 8), torch.randn(3, 1, 3, 3), torch.randn(3)
    full = with_gradients(ours(DEPTHWISE[4]), [x, w, b])
    for i in range(3):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, w, b))]
        y = ours(DEPTHWISE[4])(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.dtype)
        (gradient,) = torch.autograd.grad(y, [leaves[i]], dy)
        assert torch.equal(gradient, full[1 + i])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_reaches_its_window_and_nothing_else(value):
    x = torch.randn(2, 3, 16, 16)
    x[1, 2, 8, 9] = value
    y = ours(DEPTHWISE[0])(x, torch.randn(3, 1, 7, 7).abs() + 0.1)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 2, 5:12, 6:13] = True
    assert torch.equal(~y.isfinite(), reached)


def test_same_bits_on_every_run_and_in_every_batch():
    x, w, b = torch.randn(3, 7, 11, 13), torch.randn(7, 1, 7, 7), torch.randn(7)
    first = with_gradients(ours(DEPTHWISE[0]), [x, w, b])
    second = with_gradients(ours(DEPTHWISE[0]), [x, w, b])
    assert all(torch.equal(a, e) for a, e in zip(first, second, strict=True))
    alone = ours(DEPTHWISE[0])(x[1:2], w, b)
    assert torch.equal(alone[0], first[0][1])
