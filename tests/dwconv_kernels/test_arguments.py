"""Bad input: an error that names the argument, what came and what is allowed. Autocast: the dtypes of PyTorch."""

import contextlib

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import dwconv_kernels as dk
from tests.dwconv_kernels.operands import block_operands, norm_linear_operands
from tests.dwconv_kernels.test_block import pytorch as pytorch_block

each_backend = pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
X, W = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3)


@each_backend
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X[0, 0], W), ValueError, r"x has shape \(8, 8\); \(N, C, H, W\) is allowed"),
        ((X[None], W), ValueError, r"x has shape \(1, 2, 4, 8, 8\)"),
        ((X, W[:3]), ValueError, r"weight has shape \(3, 1, 3, 3\); .*C=4"),
        ((X, W[:, 0]), ValueError, r"weight has shape \(4, 3, 3\)"),
        ((X, W.expand(4, 4, 3, 3)), ValueError, r"weight has shape \(4, 4, 3, 3\)"),
        ((X, W[..., :0]), ValueError, r"weight has shape \(4, 1, 3, 0\)"),
        ((X, W, torch.randn(5)), ValueError, r"bias has shape \(5,\); \(C,\) with C=4 is allowed"),
        ((X, W.double()), TypeError, r"weight is torch.float64; the dtype of x, torch.float32, is allowed"),
        ((X, W, torch.randn(4).half()), TypeError, r"bias is torch.float16"),
        ((X.half(), W), TypeError, r"weight is torch.float32; the dtype of x, torch.float16"),
        ((X.numpy(), W), TypeError, r"x is a ndarray; a tensor is allowed"),
        ((X, W.numpy()), TypeError, r"weight is a ndarray; a tensor is allowed"),
        ((X, W.to("meta")), RuntimeError, r"weight is on meta; the device of x, cpu, is allowed"),
        ((X, W, None, 0), ValueError, r"stride is 0; .* at least 1"),
        ((X, W, None, (1, 2, 3)), ValueError, r"stride is \(1, 2, 3\)"),
        (([[1.0]], W), TypeError, r"x is a list; a tensor is allowed"),
        ((None, W), TypeError, r"x is a NoneType"),
        ((X, W, None, 1.5), TypeError, r"stride is 1.5; an integer or a pair of integers"),
        ((X, W, None, 1, (1, 0.5)), TypeError, r"padding is \(1, 0.5\)"),
        ((X, W, None, 1, None), TypeError, r"padding is None"),
        ((X, W, None, 1, -1), ValueError, r"padding is -1; .* at least 0"),
        ((X, W, None, 1, "reflect"), ValueError, r"padding is 'reflect'; \"same\", \"valid\""),
        ((X, W, None, 2, "same"), ValueError, r"stride is \(2, 2\); with padding=\"same\" only stride 1"),
        ((X, W, None, 1, 0, 0), ValueError, r"dilation is 0"),
        ((X, torch.randn(4, 1, 9, 3)), ValueError, r"weight has shape \(4, 1, 9, 3\), which does not fit"),
        ((X, W, None, 1, 0, 4), ValueError, r"does not fit in x of shape \(2, 4, 8, 8\) with padding \(0, 0\)"),
    ],
)
def test_depthwise_conv2d(backend, arguments, error, message):
    with dk.backend(backend), pytest.raises(error, match=message):
        dk.depthwise_conv2d(*arguments)


def norm_linear(**changes):
    names = ("x", "norm_weight", "norm_bias", "weight", "bias")
    arguments = dict(zip(names, norm_linear_operands((3, 7), 5, dtype=torch.float32), strict=True))
    return dk.layer_norm_linear(**{**arguments, **changes})


@each_backend
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": torch.randn(3, 6)}, ValueError, r"norm_weight has shape \(7,\); \(C,\) with C=6"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\); \(\.\.\., C\)"),
        ({"x": torch.randn(3, 0)}, ValueError, r"x has shape \(3, 0\)"),
        ({"norm_bias": torch.randn(7, 1)}, ValueError, r"norm_bias has shape \(7, 1\)"),
        ({"weight": torch.randn(5, 6)}, ValueError, r"weight has shape \(5, 6\); \(D, C\) with C=7"),
        ({"weight": torch.randn(5, 7, 1, 1)}, ValueError, r"weight has shape \(5, 7, 1, 1\)"),
        ({"bias": torch.randn(6)}, ValueError, r"bias has shape \(6,\); \(D,\) with D=5"),
        ({"eps": -1e-6}, ValueError, r"eps is -1e-06; 0 or more"),
        ({"eps": float("nan")}, ValueError, r"eps is nan"),
        ({"eps": None}, TypeError, r"eps is None; a number is allowed"),
        ({"activation": "relu"}, ValueError, r"activation is 'relu'; None or \"gelu\""),
        ({"norm_weight": torch.randn(7).double()}, TypeError, r"norm_weight is torch.float64"),
        ({"weight": numpy.ones((5, 7))}, TypeError, r"weight is a ndarray"),
    ],
)
def test_layer_norm_linear(backend, changes, error, message):
    with dk.backend(backend), pytest.raises(error, match=message):
        norm_linear(**changes)


BLOCK_NAMES = (
    "x", "dw_weight", "dw_bias", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
    "layer_scale", "row_scale", "grn_weight", "grn_bias",
)  # fmt: skip


def block(**changes):
    arguments = dict(zip(BLOCK_NAMES, block_operands((2, 4, 5, 5), dtype=torch.float32), strict=True))
    return dk.convnext_block(**{**arguments, **changes})


@each_backend
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": torch.randn(4, 5, 5)}, ValueError, r"x has shape \(4, 5, 5\); \(N, C, H, W\)"),
        ({"x": torch.randn(2, 3, 5, 5)}, ValueError, r"dw_weight has shape \(4, 1, 7, 7\); .*C=3"),
        ({"dw_weight": torch.randn(4, 1, 6, 7)}, ValueError, r"dw_weight has shape \(4, 1, 6, 7\); .*odd sizes"),
        ({"dw_bias": torch.randn(3)}, ValueError, r"dw_bias has shape \(3,\)"),
        ({"norm_weight": torch.randn(3)}, ValueError, r"norm_weight has shape \(3,\); \(C,\) with C=4"),
        ({"fc1_weight": torch.randn(16, 5)}, ValueError, r"fc1_weight has shape \(16, 5\)"),
        ({"fc1_bias": torch.randn(5)}, ValueError, r"fc1_bias has shape \(5,\); \(D,\) with D=16"),
        ({"fc2_weight": torch.randn(4, 15)}, ValueError, r"fc2_weight has shape \(4, 15\); \(D, C\) with C=16"),
        ({"fc2_weight": torch.randn(5, 16), "fc2_bias": None}, ValueError, r"fc2_weight has shape \(5, 16\)"),
        ({"layer_scale": torch.randn(4, 1, 1)}, ValueError, r"layer_scale has shape \(4, 1, 1\); \(4,\) is allowed"),
        ({"row_scale": torch.randn(3)}, ValueError, r"row_scale has shape \(3,\); \(2,\) is allowed"),
        ({"row_scale": 0.5}, TypeError, r"row_scale is a float; a tensor is allowed"),
        ({"row_scale": torch.ones(2, requires_grad=True)}, ValueError, r"row_scale requires a gradient"),
        ({"grn_weight": torch.randn(16)}, ValueError, r"one of grn_weight and grn_bias is None"),
        (
            {"grn_weight": torch.randn(4), "grn_bias": torch.randn(4)},
            ValueError,
            r"grn_weight has shape \(4,\); \(16,\)",
        ),
        ({"memory": "little"}, ValueError, r"memory is 'little'; allowed: default, lean, fast"),
        ({"layer_scale": torch.randn(4).bfloat16()}, TypeError, r"layer_scale is torch.bfloat16"),
        ({"row_scale": torch.ones(2, device="meta")}, RuntimeError, r"row_scale is on meta"),
    ],
)
def test_convnext_block(backend, changes, error, message):
    with dk.backend(backend), pytest.raises(error, match=message):
        block(**changes)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool], ids=str)
def test_the_definitions_are_for_floating_point(dtype):
    x, weight = X.to(dtype), W.to(dtype)
    with dk.backend("reference"):
        with pytest.raises(TypeError, match=r"x is torch\..*; floating-point dtypes are allowed"):
            dk.depthwise_conv2d(x, weight)
        with pytest.raises(TypeError, match=r"x is torch\..*; floating-point dtypes are allowed"):
            dk.layer_norm_linear(x, None, None, torch.ones(3, 8).to(dtype))
    if dtype.is_complex:  # of which PyTorch's convolution is capable
        torch.testing.assert_close(dk.depthwise_conv2d(x, weight), F.conv2d(x, weight, groups=4))


def test_numpys_integers_are_integers():
    one = numpy.int64(1)
    assert dk.depthwise_conv2d(X, W, None, one, (one, one), one).shape == X.shape


# -- autocast: the dtypes that PyTorch's own operators give ----------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_results_and_gradients(backend, dtype, x_dtype):
    """Results in autocast's dtype, gradients in that of the parameter, both about as near as PyTorch's."""
    w, b = W.clone().requires_grad_(), torch.randn(4, requires_grad=True)
    x = X.to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype), dk.backend(backend):
        y = dk.depthwise_conv2d(x, w, b, padding=1)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y.float().square().sum(), (x, w, b))
    assert [g.dtype for g in gradients] == [x_dtype, torch.float32, torch.float32]
    rounded = [t.detach().to(dtype).double() for t in (x, w, b)]
    torch.testing.assert_close(y.double(), F.conv2d(*rounded, padding=1, groups=4), rtol=1e-2, atol=1e-2)

    p = [t.requires_grad_() for t in norm_linear_operands((3, 7), 5, dtype=torch.float32)]
    p[0] = p[0].detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype), dk.backend(backend):
        y = dk.layer_norm_linear(*p, activation="gelu")
    assert y.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), p)] == [x_dtype] + [torch.float32] * 4


def test_the_norm_of_autocast_reads_x_before_it_is_rounded():
    """A mean of 300 eats every bit of bf16's variance of 1; x in fp32 must reach the statistics as it is."""
    tensors = norm_linear_operands((64, 32), 8, mean=300.0, dtype=torch.float32)
    exact = F.linear(F.layer_norm(tensors[0].double(), (32,)), torch.eye(32, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16), dk.backend("reference"):
        y = dk.layer_norm_linear(tensors[0], None, None, torch.eye(32))
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


@contextlib.contextmanager
def cuda_autocast(dtype):
    """What ``torch.autocast("cuda", dtype)`` switches on, which that does not do where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this build of PyTorch asks CUDA's driver even for fake tensors, and there is none",
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("grn", [True, False])
@pytest.mark.parametrize("row_scale", [True, False])
def test_block_dtypes_under_cuda_autocast(backend, x_dtype, layer_scale, grn, row_scale):
    """On fake CUDA tensors: PyTorch's composition decides, V1's residual stream being fp32 is part of it."""
    options = {"layer_scale": layer_scale, "grn": grn, "row_scale": row_scale, "dtype": torch.float32}
    tensors = block_operands((2, 4, 5, 5), **options)
    with FakeTensorMode(), cuda_autocast(torch.bfloat16):
        tensors = [
            t if t is None else torch.empty(t.shape, device="cuda", dtype=x_dtype if i in (0, 10) else t.dtype)
            for i, t in enumerate(tensors)
        ]
        expected = pytorch_block(*tensors)
        with dk.backend(backend):
            actual = dk.convnext_block(*tensors)
        assert (actual.dtype, actual.shape, actual.device.type) == (expected.dtype, expected.shape, "cuda")


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_under_cpu_autocast_is_as_near_as_pytorchs(x_dtype):
    tensors = block_operands((3, 16, 9, 9), dtype=torch.float32)
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    x = leaves[0].detach().to(x_dtype).requires_grad_()
    results, dy = {}, torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for name, function in (("ours", dk.convnext_block), ("pytorch", pytorch_block)):
        with torch.autocast("cpu", torch.bfloat16), dk.backend("reference"):
            y = function(x, *leaves[1:])
        wanted = [x, *[t for t in leaves[1:] if t is not None]]
        results[name] = [y, *torch.autograd.grad(y, wanted, dy)]
    assert results["ours"][0].dtype == torch.float32
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, *leaves[1:])]
    y = pytorch_block(*exact)
    expected = [y, *torch.autograd.grad(y, [t for t in exact if t is not None], dy.double())]
    for i, (a, p, e) in enumerate(zip(results["ours"], results["pytorch"], expected, strict=True)):
        assert a.dtype == p.dtype
        ours, theirs = ((t.double() - e).square().mean().sqrt() for t in (a, p))
        bound = 1.1 if e.numel() >= 1000 else 2  # a ratio of two errors of a few numbers is itself noise
        assert ours <= bound * theirs + 1e-6 * e.abs().max(), f"number {i}: {ours} against PyTorch's {theirs}"


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16), dk.backend("reference"):
        assert dk.depthwise_conv2d(X.double(), W.double()).dtype == torch.float64
        with pytest.raises(TypeError, match=r"weight is torch\.float64"):
            dk.depthwise_conv2d(X, W.double())
