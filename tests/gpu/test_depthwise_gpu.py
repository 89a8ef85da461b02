"""The values that the compiled depthwise kernels compute: exact on integers, within their rounding, in every layout."""

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import runtime, testing
from dwconv_kernels.depthwise import config
from tests import depthwise_proofs as proofs
from tests.cases import DEPTHWISE, DTYPES, EMPTY_MAPS, MEANS, KernelCase, geometry_cases, kernel_cases
from tests.gpu.conftest import BACKEND, DEVICE, ON_GPU, parameters, skip_without_gpu
from tests.gpu.workers import Proof
from tests.tensor_cases import tensor_cases

pytestmark = pytest.mark.gpu
skip_without_gpu()

HALF = ["bf16", "fp16"]


def on_kernels(*tensors, **settings):
    with dk.backend(BACKEND):
        return dk.depthwise_conv2d(*tensors, **settings)


def fits(case) -> bool:
    return config.why_not("fp32", case.kh, case.kw, case.stride, case.padding, case.dilation) is None


def rows(dtypes: list[str]) -> list[KernelCase]:
    """The rows of cases.DEPTHWISE that the kernels take."""
    rows = [(c, (c.n, c.c, c.h, c.w, c.kh, c.kw, *c.padding), "contiguous" if c.bias else "none") for c in DEPTHWISE]
    return [
        KernelCase(dtype, *sizes, bias=bias, stride=c.stride, dilation=c.dilation)
        for c, sizes, bias in rows
        if fits(c)
        for dtype in dtypes
    ]


# Stages of ConvNeXt at 224 and 384 pixels, isotropic ConvNeXt; many images, of which a program takes several.
STAGES = [(2, 96, 56, 56), (2, 192, 28, 28), (4, 384, 14, 14), (4, 768, 7, 7), (1, 96, 96, 96), (2, 768, 12, 12)]
STAGES += [(256, 384, 14, 14)]
SMALL = [KernelCase("bf16", 2, 33, 5, 10, 7, 7, 3, 3), KernelCase("fp32", 2, 5, 6, 8, 3, 3, 1, 1)]


def stages(dtype: str, shapes) -> list[KernelCase]:
    return [KernelCase(dtype, *shape, 7, 7, 3, 3) for shape in shapes]


def exact_cases() -> tuple[list[KernelCase], list[KernelCase]]:
    """Those of any run, and all. What takes longest to compile comes first.

    Half types differ, where there are FMAs, in how a number is loaded and stored: of large kernels, one is enough.
    """
    if not ON_GPU:  # a few that are quick
        quick = [case for case in [*kernel_cases(), *rows(DTYPES), *geometry_cases()] if case.seconds() < 0.3]
        return SMALL + quick[::4] + tensor_cases()[::16], []
    by_fma = {dtype: stages(dtype, STAGES) for dtype in DTYPES}
    usual = by_fma["bf16"] + by_fma["fp32"] + rows(["fp32"]) + rows(["bf16"])[::2] + rows(["fp16"])[1::2]
    usual += tensor_cases()
    usual += [case._replace(cut="tensor whole") for dtype in HALF for case in by_fma[dtype]]
    covers = kernel_cases() + geometry_cases()
    return usual + covers[::9], covers + by_fma["fp16"] + rows(DTYPES)


def rounded_cases() -> tuple[list[KernelCase], list[KernelCase]]:
    """The same of those that are rounded."""
    if not ON_GPU:
        return [case._replace(n=1, h=8, w=14) for case in SMALL], []
    sizes = [(7, 7, 1, 4), (3, 3, 1, 1), (5, 5, 2, 2), (1, 11, 0, 5), (11, 1, 5, 0), (5, 3, 4, 0)]
    others = [(7, 7, 9, 9, (1, 1), (3, 3)), (7, 7, 3, 3, (2, 2), (1, 1))]

    def by_fma(dtype: str) -> list[KernelCase]:
        cases = stages(dtype, STAGES[:6]) + [KernelCase(dtype, 4, 40, 29, 31, *size) for size in sizes]
        cases += [KernelCase(dtype, 4, 40, 29, 42, *size, stride=s, dilation=d) for *size, s, d in others]
        return cases + [case._replace(strict=True) for case in stages(dtype, STAGES[1:2]) if dtype in HALF]

    # Which half types have on tensor cores, unless they are to be strict.
    large = {
        dtype: [KernelCase(dtype, 4, 40, 29, 31, 9, 9, 4, 4), KernelCase(dtype, 4, 40, 29, 42, 13, 13, 6, 6)]
        for dtype in DTYPES
    }
    usual = large["fp32"] + by_fma("fp32") + by_fma("bf16")
    kernels = ((11, 11), (13, 13), (17, 17), (21, 21), (31, 31), (51, 51), (51, 5), (5, 51), (1, 51), (51, 1))
    for dtype in HALF:
        on_tensor_cores = [KernelCase(dtype, 4, 40, 57, 58, kh, kw, kh // 2, kw // 2) for kh, kw in kernels]
        usual += [case._replace(cut="tensor whole") for case in stages(dtype, STAGES[:6]) + on_tensor_cores]
    return usual, large["bf16"] + large["fp16"] + by_fma("fp16")


def all_proofs() -> tuple[list[Proof], list[Proof]]:
    """Those of any run, and all."""
    return tuple(
        [Proof("exact", case, DEVICE) for case in exact]
        + [Proof("rounding", case, DEVICE, MEANS[i % len(MEANS)]) for i, case in enumerate(rounded)]
        for exact, rounded in zip(exact_cases(), rounded_cases(), strict=True)
    )


@pytest.mark.parametrize("proof", parameters(*all_proofs()))
def test_values(proof, proof_of):
    """T0: every element exact. T1, T2, T3: within its bound, no further off than PyTorch's operator, not biased."""
    proof_of(proof)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.full)])
@pytest.mark.parametrize("dx_dtype", ["fp32", "same"])
def test_input_gradient_with_a_residual(dtype, dx_dtype):
    """T0 and T1, for each kernel: whole maps, strips that overlap, rows in pairs, masks; a copied residual."""
    dx_dtype = dtype if dx_dtype == "same" else dx_dtype
    sizes = [(4, 40, 14, 14), (4, 40, 7, 7), (2, 40, 33, 57), (2, 64, 56, 56)] if ON_GPU else [(1, 5, 3, 10)]
    cases = [KernelCase(dtype, *size, 7, 7, 3, 3, strict=strict) for size in sizes for strict in (False, True)]
    cases += [case._replace(kh=3, kw=5, ph=2, pw=1) for case in cases[:1]]
    for case in cases:
        for layout in ("channels_last_offset", "contiguous"):
            proofs.prove_residual(case, dx_dtype, dx_dtype, layout, DEVICE)
    proofs.prove_residual_rounding(cases[-3], dx_dtype, dx_dtype, DEVICE)


# Kernels whose taps stay in registers, and those whose taps pass by; loaded in vectors, and element by element.
TENSOR_RESIDUALS = [(4, 40, 14, 14, 7, 7), (2, 33, 20, 31, 13, 13), (2, 40, 33, 29, 21, 21), (1, 9, 27, 40, 31, 31)]


@pytest.mark.parametrize("size", TENSOR_RESIDUALS if ON_GPU else [(1, 5, 7, 9, 13, 13), (1, 8, 7, 9, 21, 21)], ids=str)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dx_dtype", ["fp32", "same"])
def test_input_gradient_with_a_residual_on_tensor_cores(dtype, dx_dtype, size):
    """The same, T0, T1 and T3; the layouts are those above."""
    dx_dtype, (kh, kw) = dtype if dx_dtype == "same" else dx_dtype, size[4:]
    case = KernelCase(dtype, *size, kh // 2, kw // 2, cut="tensor whole")
    for layout in ("channels_last_offset", "contiguous"):
        proofs.prove_residual(case, dx_dtype, dx_dtype, layout, DEVICE)
    proofs.prove_residual_rounding(case, dx_dtype, dx_dtype, DEVICE)


@pytest.mark.parametrize("shape", [(8, 40, 56, 56), (3, 40, 29, 5)] if ON_GPU else [(1, 5, 4, 10)], ids=str)
def test_adjoint_identity_in_integers(shape):
    """⟨y(x, w), g⟩ = ⟨x, dx(g)⟩ = ⟨w, dw(g)⟩, exactly: what links the three passes to each other."""
    case = KernelCase("fp32", *shape, 7, 7, 3, 3, bias="none")
    inputs, g = proofs.operands(case, testing.integers, DEVICE)
    y, dx, dw = (t.double() for t in proofs.on_kernels(case, inputs, g))
    x, w, _ = inputs
    assert (y * g).sum() == (x * dx).sum() == (w * dw).sum() != 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("x_dtype", ["fp32", "same"])
def test_autocast_with_parameters_in_fp32(dtype, x_dtype):
    """Results in autocast's dtype; gradients of parameters in fp32, without having been rounded to the half one."""
    case = KernelCase(dtype, *((2, 40, 17, 28) if ON_GPU else (2, 5, 3, 10)), 7, 7, 3, 3)
    inputs, dy = proofs.operands(case, testing.integers, DEVICE)
    x, w, b = (t.float().requires_grad_() for t in inputs)
    x = x if x_dtype == "fp32" else inputs[0].detach().requires_grad_()
    with torch.autocast(DEVICE, proofs.DTYPES[dtype]):
        y = on_kernels(x, w, b, padding=3)
    results = [y.detach(), *torch.autograd.grad(y, (x, w, b), dy)]
    assert [t.dtype for t in results] == [proofs.DTYPES[dtype], x.dtype, torch.float32, torch.float32]
    for name, a, e in zip(proofs.NAMES, results, proofs.exactly(case, inputs, dy), strict=True):
        e = e.to(proofs.DTYPES[dtype]).double() if name == "dx" else e  # it was rounded on its way to the fp32 of x
        testing.assert_exact(a, e, name)


HEADS = {
    "sum": lambda y: y.sum(),
    "mean": lambda y: y.mean((2, 3)).square().sum(),
    "slice": lambda y: y[..., ::2].square().sum(),
    "cat": lambda y: torch.cat([y, 2 * y], 1)[:, 3:].square().sum(),
    "permute": lambda y: (y.permute(0, 2, 3, 1) * torch.arange(y.shape[1], device=y.device)).sum(),
    "expand": lambda y: y.sum((2, 3), keepdim=True).expand_as(y).square().sum(),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_that_arrive_from_other_operators(head, x_format):
    tensors = [testing.integers(s).to(DEVICE) for s in ((2, 5, 6, 10), (5, 1, 3, 3), (5,))]
    tensors[0] = tensors[0].to(memory_format=x_format)
    results = []
    for dtype, convolution in ((torch.float32, on_kernels), (torch.float64, by_pytorch)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(HEADS[head](convolution(*leaves, padding=1)), leaves))
    for name, a, e in zip(("dx", "dw", "db"), *results, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * e.abs().max().item(), msg=name)


def by_pytorch(x, weight, bias, padding):
    return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("w_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_of_results(x_format, w_format):
    """Those of F.conv2d: y and dx in the memory format of x, dw in the strides of the weight."""
    x = testing.integers((2, 5, 6, 10)).to(DEVICE, memory_format=x_format).requires_grad_()
    w = testing.integers((5, 1, 3, 3)).to(DEVICE, memory_format=w_format).requires_grad_()
    y = on_kernels(x, w, padding=1)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.is_contiguous(memory_format=x_format)
    assert dx.stride() == x.stride()
    assert dw.stride() == w.stride()


@pytest.mark.parametrize("shape", EMPTY_MAPS, ids=str)
def test_empty_maps(shape):
    x, w, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (shape, (shape[1], 1, 7, 7), (shape[1],)))
    y = on_kernels(x, w, b, padding=3)
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert y.shape == dx.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_with_the_other_tensors_frozen(wanted):
    case = KernelCase("fp32", 2, 5, 6, 10, 3, 3, 1, 1)
    inputs, dy = proofs.operands(case, torch.randn, DEVICE)
    full = proofs.on_kernels(case, inputs, dy)
    _, gradient = proofs.on_kernels(case, inputs, dy, wanted)
    assert torch.equal(gradient, full[1 + wanted.index(True)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strict_kernels_let_inf_and_nan_reach_their_windows_alone(dtype):
    case = KernelCase(dtype, 2, 40, 16, 28, 7, 7, 3, 3, strict=True)
    case = case if ON_GPU else case._replace(c=5, h=7, w=10)
    (x, w, b), dy = proofs.operands(case, torch.randn, DEVICE)
    for t in (x, dy):
        t[1, 0, case.h // 2, case.w // 2], t[1, 1, 0, 0], t[0, 2, -1, -1] = float("inf"), float("nan"), -float("inf")
    y, dx, dw, db = proofs.on_kernels(case, [x, w, b], dy)
    for name, a, e in zip(("y", "dx"), (y, dx), proofs.exactly(case, [x, w, b], dy), strict=False):
        assert torch.equal(a.isnan(), e.isnan()), name
        assert torch.equal(a.isposinf(), e.isposinf()), name
        assert torch.equal(a.isneginf(), e.isneginf()), name
    assert dw[3:].isfinite().all()
    assert db[3:].isfinite().all()


def test_what_supports_says_is_what_runs(launches):
    """auto takes the kernels where supports says so, and PyTorch's operator, with a reason, where not."""
    for case in DEPTHWISE:
        tensors = [testing.integers((case.n, case.c, case.h, case.w)), testing.integers((case.c, 1, case.kh, case.kw))]
        x, w = (t.to(DEVICE) for t in tensors)
        settings = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        supported, reason = dk.supports(dk.depthwise_conv2d, x, w, **settings)
        assert (supported, reason == "") == (fits(case), fits(case)), reason
        if ON_GPU:
            before = launches["depthwise_forward"]
            y = dk.depthwise_conv2d(x, w, **settings)
            assert launches["depthwise_forward"] - before == supported
            # PyTorch may compute in any way; where its operator was to run, that is what did, to the bit.
            expected = F.conv2d(*((x.double(), w.double()) if supported else (x, w)), groups=case.c, **settings)
            testing.assert_exact(y, expected, str(case))
        if not supported:
            with dk.backend("triton"), pytest.raises(RuntimeError, match="cannot run under backend"):
                dk.depthwise_conv2d(x, w, **settings)
    assert "x is float64" in dk.supports(dk.depthwise_conv2d, x.double(), w.double(), **settings)[1]
    assert runtime.current_backend() == "auto"
