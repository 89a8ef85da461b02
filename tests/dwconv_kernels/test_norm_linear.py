"""``layer_norm_linear``: the hand-written definition against PyTorch's layer norm, linear layer and GELU."""

import math

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from dwconv_kernels.norm_linear import reference
from tests.cases import CHANNELS, MEANS
from tests.dwconv_kernels.operands import norm_linear_operands, with_gradients

HALF = [torch.bfloat16, torch.float16]


def ours(activation=None, eps=1e-6, backend="reference"):
    def run(*tensors):
        with dk.backend(backend):
            return dk.layer_norm_linear(*tensors, eps=eps, activation=activation)

    return run


def pytorch(activation=None, eps=1e-6):
    def run(x, norm_weight, norm_bias, weight, bias):
        y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
        return F.gelu(y) if activation == "gelu" else y

    return run


def to(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


# Each channel count once, with every mean, leading shape and set of parameters at least once.
ROWS = [(5,), (2, 3), (2, 3, 4), (1, 1, 1), (7,)]
CASES = [
    ((*ROWS[i % 5], c), (c * 7) % 29 + 1, MEANS[i % 4], i % 3 != 1, i % 3 != 2, i % 4 != 3, ("gelu", None)[i % 2])
    for i, c in enumerate(CHANNELS)
]


@pytest.mark.parametrize("shape, d, mean, norm_weight, norm_bias, bias, activation", CASES, ids=str)
def test_float64_gradients_equal_pytorchs(shape, d, mean, norm_weight, norm_bias, bias, activation):
    tensors = norm_linear_operands(shape, d, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias, mean=mean)
    actual = with_gradients(ours(activation), tensors)
    expected = with_gradients(pytorch(activation), tensors)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10 * max(1.0, e.abs().max().item()), msg=f"number {i}")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(activation):
    tensors = [t.requires_grad_() for t in norm_linear_operands((2, 3, 7), 5)]
    assert torch.autograd.gradcheck(ours(activation), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("c", [2, 40, 96, 192, 768])
def test_exact_on_integers(dtype, c):
    """Rows of ±1 with zero mean and ε = 0 are their own normalisation: y, dW, db and dβ are whole numbers."""
    g = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(c // 2)
    x = torch.stack([signs[torch.randperm(c, generator=g)] for _ in range(11)])
    d = 6
    gamma, beta = testing.integers((c,), generator=g), testing.integers((c,), generator=g)
    weight = testing.integers((d, c), generator=g, largest=1)
    bias, dy = testing.integers((d,), generator=g), testing.integers((11, d), generator=g, largest=1)
    y, _dx, _dgamma, dbeta, dweight, dbias = with_gradients(
        ours(eps=0.0), to([x, gamma, beta, weight, bias], dtype), lambda y: dy.to(dtype)
    )
    normed = (x * gamma + beta).double()
    testing.assert_exact(y, normed @ weight.double().t() + bias, "y")
    testing.assert_exact(dbeta, (dy.double() @ weight.double()).sum(0), "dbeta")
    testing.assert_exact(dweight, dy.double().t() @ normed, "dweight")
    testing.assert_exact(dbias, dy.double().sum(0), "dbias")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_half_precision_errors_no_larger_than_pytorchs(dtype, activation):
    tensors = to(norm_linear_operands((6, 20, 96), 96, mean=1.0), dtype)
    dy = torch.randn(6, 20, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = with_gradients(ours(activation), tensors, lambda y: dy)
    peer = with_gradients(pytorch(activation), tensors, lambda y: dy)
    expected = with_gradients(pytorch(activation), to(tensors, torch.float64), lambda y: dy.double())
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        testing.assert_no_worse(a, p, e, 1.1, 2, f"number {i}")
        testing.assert_unbiased(a, e, what=f"number {i}")


@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
def test_fp32_errors_with_a_mean_far_from_zero(mean):
    tensors = norm_linear_operands((300, 192), 8, mean=mean, dtype=torch.float32)
    actual = with_gradients(ours(), tensors)
    peer = with_gradients(pytorch(), tensors)
    dy = torch.randn((300, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().double()
    expected = with_gradients(pytorch(), to(tensors, torch.float64), lambda y: dy)
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        testing.assert_no_worse(a, p, e, 2, 3, f"number {i}")


def test_constant_rows_and_large_halves():
    tensors = norm_linear_operands((4, 33), 5, dtype=torch.float32)
    tensors[0] = torch.full((4, 33), 7.25)
    torch.testing.assert_close(ours()(*tensors), pytorch()(*tensors), rtol=1e-5, atol=1e-5)
    halves = to(norm_linear_operands((4, 33), 5), torch.float16)
    halves[0] = torch.where(torch.arange(33) % 2 == 0, 6e4, -6e4).half().expand(4, 33)  # x² overflows fp16
    expected = pytorch()(*to(halves, torch.float64))
    torch.testing.assert_close(ours()(*halves).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8), (0, 0, 8)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_rows(shape, backend):
    tensors = norm_linear_operands(shape, 5)
    y, dx, *gradients = with_gradients(ours("gelu", backend=backend), tensors)
    assert y.shape == (*shape[:-1], 5)
    assert dx.shape == shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_outputs(backend):
    y, dx, *gradients = with_gradients(ours("gelu", backend=backend), norm_linear_operands((3, 7), 0))
    assert y.shape == (3, 0)
    assert torch.equal(dx, torch.zeros(3, 7, dtype=dx.dtype))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_strided_rows(backend):
    x, *parameters = norm_linear_operands((3, 4, 7), 5)
    expected = with_gradients(pytorch("gelu"), [x, *parameters])
    parent = x.new_full((3, 9, 11), math.nan)
    strided = parent[:, ::2, 2:9][:, :4].copy_(x)
    for view in (
        strided,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        leaf = view.detach().requires_grad_()
        leaves = [p.clone().requires_grad_() for p in parameters]
        y = ours("gelu", backend=backend)(leaf, *leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        strided_dy = torch.full((3, 4, 10), math.nan, dtype=dy.dtype)[..., ::2].copy_(dy)
        for a, e in zip((y, *torch.autograd.grad(y, [leaf, *leaves], strided_dy)), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_gelu_and_its_derivative_on_every_half():
    """All 65 536 patterns of both half types against float64, infinities included."""
    for dtype in HALF:
        u = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
        u = u[~u.isnan()]
        phi = 0.5 * torch.special.erfc(u / -math.sqrt(2))
        density = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        expected = torch.where(u == -math.inf, 0.0, u * phi)
        derivative = phi + torch.where(u.isinf(), 0.0, u * density)
        actual = reference.gelu(u.float())
        finite = u.isfinite() & (u.abs() < 1e30)
        assert torch.equal(actual.isnan(), torch.zeros_like(finite))
        torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=1e-4, atol=1e-38)
        torch.testing.assert_close(reference.gelu_derivative(u.float()).double(), derivative, rtol=1e-5, atol=1e-6)
    assert reference.gelu(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, 0.0]
    assert reference.gelu(torch.tensor(math.nan)).isnan()
    assert reference.gelu_derivative(torch.tensor([math.inf, -math.inf])).tolist() == [1.0, 0.0]
