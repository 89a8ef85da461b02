"""What "right" means for the depthwise kernels, as functions of a case: shared by the lanes that run them.

They call the public function under ``backend("triton")``, so the case's device decides what runs: compiled kernels or
Triton's interpreter. Errors are AssertionErrors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import registration, runtime, testing
from tests.cases import CUTS, KernelCase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("y", "dx", "dw", "db")


def map_in_layout(x: Tensor, layout: str, offset: int = 7) -> Tensor:
    """x (N, C, H, W) in one of cases.LAYOUTS, among NaN; "expanded" is one of its values for each image and channel."""
    if layout == "expanded":
        return x[:, :, :1, :1].expand(x.shape)
    if layout == "channels_last_offset":  # read in place; in_layouts has offsets only where the map is copied
        n, c, h, w = x.shape
        place = _among_nan(x, (n, h, w, c), offset).permute(0, 3, 1, 2)
        return place.copy_(x)
    return testing.in_layouts(x)[layout]


def weight_in_layout(weight: Tensor, layout: str, offset: int = 7) -> Tensor:
    """A weight (C, 1, KH, KW) in one of cases.WEIGHT_LAYOUTS."""
    if layout == "expanded":
        return weight[:1].expand(weight.shape)
    if layout == "contiguous":
        return _among_nan(weight, weight.shape, offset).copy_(weight)
    if layout == "channels_last":
        return weight.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    c, _, kh, kw = weight.shape
    parent = weight.new_full((c, 2, kh + 1, 2 * kw), math.nan)
    return parent[:, 1:, 1:, ::2].copy_(weight)


def bias_in_layout(bias: Tensor, layout: str, offset: int = 7) -> Tensor | None:
    """A bias (C,) in one of cases.BIAS_LAYOUTS."""
    if layout == "none":
        return None
    if layout == "expanded":
        return bias[:1].expand(bias.shape)
    if layout == "slice":
        return bias.new_full((2 * len(bias) + offset,), math.nan)[offset::2].copy_(bias)
    return _among_nan(bias, bias.shape, offset).copy_(bias)


def _among_nan(like: Tensor, shape: tuple, offset: int) -> Tensor:
    """An uninitialised tensor without gaps that begins ``offset`` elements after the start of its memory."""
    numel = math.prod(shape)
    return like.new_full((numel + 2 * offset,), math.nan)[offset : offset + numel].view(shape)


def operands(case: KernelCase, make: Callable[[tuple], Tensor], device: str = "cpu") -> tuple[list, Tensor]:
    """([x, weight, bias or None], dy) of values that ``make`` draws for a shape, in the case's dtype and layouts."""
    shapes = (case.n, case.c, case.h, case.w), (case.c, 1, case.kh, case.kw), (case.c,), (case.n, case.c, *case.output)
    x, weight, bias, dy = (make(shape).to(device, DTYPES[case.dtype]) for shape in shapes)
    inputs = [
        map_in_layout(x, case.x, case.offset),
        weight_in_layout(weight, case.weight, case.offset),
        bias_in_layout(bias, case.bias, case.offset),
    ]
    return inputs, map_in_layout(dy, case.dy, case.offset)


def input_gradient(case: KernelCase, weight: Tensor, dy: Tensor, residual: Tensor, dx_dtype: torch.dtype) -> Tensor:
    """dx with the residual added to it, as a block's backward pass asks for it, in the memory format of ``case.x``."""
    like = map_in_layout(torch.empty((case.n, case.c, case.h, case.w), device=dy.device), case.x, case.offset)
    dx = registration.empty_map(like, like.shape, dx_dtype)
    with cut(case.cut), dk.strict() if case.strict else contextlib.nullcontext():
        runtime.launchers("depthwise").depthwise_input_gradient(
            dy, weight, (case.ph, case.pw), dx, residual, case.dilation
        )
    return dx


# Rows and tiles (of the weight gradient: tiles of so many rows) that a program of the tensor cores' kernels takes.
TENSOR_CUTS = {"whole": None, "8 rows": (8, 1), "16 rows, 2 tiles": (16, 2), "3 tiles": (512, 3), "sm_90": None}


@contextlib.contextmanager
def on_tensor_cores(name: str = "whole") -> Iterator[None]:
    """The same for tensor cores, which compute whatever they can; an error where Triton does not compile for them."""
    launch = runtime.launchers("depthwise")
    assert launch.tensor is not None, launch._NO_GLUON
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch.tensor.config, "pays", return_value=True))
        if name == "sm_90":
            stack.enter_context(mock.patch.object(runtime, "arch", return_value=90))
        elif TENSOR_CUTS[name] is not None:
            for function in ("cut_stream", "cut_weight"):
                stack.enter_context(mock.patch.object(launch.tensor.config, function, return_value=TENSOR_CUTS[name]))
        yield
    # Others take the place of what is refused, and are right: what was to be proved would not have run.
    assert not launch.tensor._refusals, launch.tensor._refusals


@contextlib.contextmanager
def cut(name: str) -> Iterator[None]:
    """Maps are cut up as cases.CUTS says, whatever there would be to gain from it, and computed by FMAs.

    "tensor ", then one of TENSOR_CUTS: by tensor cores.
    """
    if name.startswith("tensor "):
        with on_tensor_cores(name.removeprefix("tensor ")):
            yield
        return
    launch = runtime.launchers("depthwise")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch.config, "on_tensor_cores", return_value=False))
        if name == "sm_90":
            stack.enter_context(mock.patch.object(runtime, "arch", return_value=90))
        elif name != "whole":
            rows, images = CUTS[name]
            stack.enter_context(mock.patch.object(launch.config, "rows_per_program", return_value=rows))
            stack.enter_context(mock.patch.object(launch.config, "cut_backward_weight", return_value=(images, rows)))
        yield


def on_kernels(case: KernelCase, inputs: list, dy: Tensor, wanted: tuple[bool, bool, bool] = (True, True, True)):
    """y, and of dx, dw and, where there is a bias, db those that are ``wanted``. The inputs' strides are kept."""
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    with dk.backend("triton"), cut(case.cut), dk.strict() if case.strict else contextlib.nullcontext():
        y = dk.depthwise_conv2d(*leaves, **case.geometry)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy)]


def by_pytorch(case: KernelCase, inputs: list, dy: Tensor) -> list[Tensor]:
    """y, dx, dw and, where there is a bias, db by PyTorch's own convolution, in the inputs' dtype."""

    def convolved() -> list[Tensor]:
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
        y = F.conv2d(*leaves, **case.geometry, groups=case.c)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]

    try:
        return convolved()
    except RuntimeError:  # cuDNN may have nothing for large kernels in half types, and PyTorch's own kernels have
        with torch.backends.cudnn.flags(enabled=False):
            return convolved()


def exactly(case: KernelCase, inputs: list, dy: Tensor, of: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """The same in float64, ``of`` the inputs as they are."""
    return by_pytorch(case, [t if t is None else of(t.double()) for t in inputs], of(dy.double()))


def prove_exact(case: KernelCase, device: str = "cpu", seed: int = 0) -> None:
    """T0: on integers, every element is the float64 result rounded once; dtypes and strides are as promised."""
    random = torch.Generator().manual_seed(seed)
    inputs, dy = operands(case, lambda shape: testing.integers(shape, generator=random), device)
    actual = on_kernels(case, inputs, dy)
    for name, a, e in zip(NAMES, actual, exactly(case, inputs, dy), strict=False):
        assert a.dtype == DTYPES[case.dtype], f"{name} is {a.dtype}"
        testing.assert_exact(a, e, name)
    weight = inputs[1]
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    assert not dense or actual[2].stride() == weight.stride(), f"dw has strides {actual[2].stride()}"


def prove_residual(
    case: KernelCase, residual: str, dx: str, layout: str = "channels_last", device: str = "cpu", seed: int = 0
) -> None:
    """T0 for an input gradient that a residual is added to, in dtypes ``residual`` and ``dx`` of their own."""
    random = torch.Generator().manual_seed(seed)
    inputs, dy = operands(case, lambda shape: testing.integers(shape, generator=random), device)
    added = testing.integers(inputs[0].shape, generator=random).to(device, DTYPES[residual])
    added = map_in_layout(added, layout, case.offset)
    actual = input_gradient(case, inputs[1], dy, added, DTYPES[dx])
    assert actual.dtype == DTYPES[dx]
    testing.assert_exact(actual, exactly(case, inputs, dy)[1] + added.double(), "dx with the residual")


def prove_residual_rounding(case: KernelCase, residual: str, dx: str, device: str = "cpu", seed: int = 0) -> None:
    """T1, T3 for the same: the sum is rounded once, to the dtype of dx, however much of it cancels."""
    random = torch.Generator().manual_seed(seed)
    inputs, dy = operands(case, lambda shape: torch.randn(shape, generator=random, dtype=torch.float64), device)
    exact, magnitude = (exactly(case, inputs, dy, of)[1] for of in (lambda t: t, torch.abs))
    noise = torch.randn(exact.shape, generator=random, dtype=torch.float64).to(device)
    added = (noise / 8 - exact).to(DTYPES[residual])
    actual = input_gradient(case, inputs[1], dy, added, DTYPES[dx])
    exact, magnitude = exact + added.double(), magnitude + added.double().abs()
    testing.assert_componentwise(actual, exact, magnitude, case.kh * case.kw + 1, "dx with the residual")
    testing.assert_unbiased(actual, exact, sigmas(case, actual), "dx with the residual")


def prove_rounding(case: KernelCase, mean: float, device: str = "cpu", seed: int = 0) -> None:
    """T1, T2, T3: every element within its rounding bound, errors no larger than PyTorch's, and no bias."""
    random = torch.Generator().manual_seed(seed)
    means = iter((mean, 0, 0, 0))  # of x, weight, bias, dy
    inputs, dy = operands(
        case, lambda shape: torch.randn(shape, generator=random, dtype=torch.float64) + next(means), device
    )
    actual, exact = on_kernels(case, inputs, dy), exactly(case, inputs, dy)
    magnitude, peer = exactly(case, inputs, dy, torch.abs), by_pytorch(case, inputs, dy)
    pixels = case.n * case.output[0] * case.output[1]
    terms = (case.kh * case.kw + 1, case.kh * case.kw, pixels, pixels)
    for name, a, p, e, m, n in zip(NAMES, actual, peer, exact, magnitude, terms, strict=False):
        testing.assert_componentwise(a, e, m, n, name)
        if case.dtype == "fp32":
            ratios = fp32_ratios(a, (1.5, 2) if name in ("y", "dx") else (2, 3))
        else:
            ratios = 1.05, 1.25
        testing.assert_no_worse(a, p, e, *ratios, name)
        if a.numel() >= 500:
            testing.assert_unbiased(a, e, sigmas(case, a), name)


def fp32_ratios(result: Tensor, ratios: tuple[float, float]) -> tuple[float, float]:
    """Of an fp32 result's errors to PyTorch's; on a GPU, its libraries may add up a few partial sums, and err less."""
    return (max(3, ratios[0]), max(4, ratios[1])) if result.is_cuda else ratios


def sigmas(case: KernelCase, result: Tensor) -> float:
    """Standard errors that a result may be biased by.

    Tensor cores cut off what a sum does not hold, at every step: of 51×51 taps in fp16, 0.02·√numel of them, where
    results that are cut off when they are stored are 0.87·√numel off.
    """
    return 5 + 0.05 * math.sqrt(result.numel()) * case.cut.startswith("tensor ")
