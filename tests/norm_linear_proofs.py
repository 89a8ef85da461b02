"""What "right" means for the kernels of layer norm + linear (+ GELU), as functions of a case; see depthwise_proofs.py.

Results are dicts by the names of NAMES: of y, and of the gradients of what is given and wanted.
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
from dwconv_kernels import runtime, testing
from dwconv_kernels.norm_linear import reference
from tests.depthwise_proofs import DTYPES, fp32_ratios
from tests.dwconv_kernels.operands import norm_linear_operands
from tests.norm_linear_cases import NormLinearCase

NAMES = ("y", "dx", "dnorm_weight", "dnorm_bias", "dweight", "dbias")
EPS = 1e-6
EXACT = 2.0**-24


def _slice(like: Tensor, shape: tuple[int, ...], widths: tuple[int, ...], offset: int) -> Tensor:
    """A view of ``shape`` whose last dimensions are cut out of ``widths`` among NaN, ``offset`` after their start."""
    parent = like.new_full((offset + math.prod(widths),), math.nan)[offset:].view(widths)
    for dimension, size in enumerate(shape):
        parent = parent.narrow(dimension, 0, size)
    return parent


def in_layout(x: Tensor, layout: str, offset: int = 7) -> Tensor:
    """x (..., C) in one of cases.LAYOUTS, among NaN; "expanded" is its first row, everywhere."""
    *leading, c = x.shape
    if layout == "expanded":
        return x.reshape(-1, c)[0].expand(x.shape)
    if layout == "contiguous":
        return x.contiguous()
    if layout == "offset":
        return _slice(x, x.shape, x.shape, offset).copy_(x)
    if layout == "slice":
        return _slice(x, x.shape, (*leading, c + 5), offset).copy_(x)
    if layout == "every_other":
        return x.new_full((*leading, 2 * c), math.nan)[..., ::2].copy_(x)
    return x.movedim(-1, 0).contiguous().movedim(0, -1)  # channels_first


def parameter_in_layout(parameter: Tensor, layout: str, offset: int = 7) -> Tensor:
    """A parameter (D, C), (C,) or (D,) in one of cases.PARAMETER_LAYOUTS."""
    if layout == "transposed":
        return parameter.t().contiguous().t() if parameter.ndim == 2 else in_layout(parameter, "every_other")
    return in_layout(parameter, layout, offset)


def placed(case: NormLinearCase, inputs: list[Tensor | None], dy: Tensor, device: str) -> tuple[list, Tensor]:
    """Float64 inputs and dy in the case's dtypes and layouts."""
    dtype = DTYPES[case.dtype]
    kept = dtype if case.x_dtype is None else torch.float32
    x_dtype = DTYPES[case.x_dtype or case.dtype]
    x, *parameters = inputs
    return [
        in_layout(x.to(device, x_dtype), case.x, case.offset),
        *(
            None if t is None else parameter_in_layout(t.to(device, kept), case.parameters, case.offset)
            for t in parameters
        ),
    ], in_layout(dy.to(device, dtype), case.dy, case.offset)


def normal_operands(case: NormLinearCase, device: str = "cpu", seed: int = 0) -> tuple[list, Tensor]:
    """([x, γ, β, W, bias], dy) of normal values, None for what is not given."""
    flags = dict(zip(("norm_weight", "norm_bias", "bias"), case.given, strict=True))
    inputs = norm_linear_operands((*case.shape, case.c), case.d, mean=case.mean, seed=seed, **flags)
    random = torch.Generator().manual_seed(seed + 1)
    dy = torch.randn((*case.shape, case.d), generator=random, dtype=torch.float64)
    return placed(case, inputs, dy, device)


@contextlib.contextmanager
def chosen(case: NormLinearCase) -> Iterator[None]:
    """Tiles are chosen as the case says; on a GPU, as there is one."""
    launch = runtime.launchers("norm_linear")
    with contextlib.ExitStack() as stack:
        if runtime.INTERPRETER:
            stack.enter_context(mock.patch.object(runtime, "arch", return_value=case.arch))
            stack.enter_context(mock.patch.object(runtime, "tf32", return_value=case.tf32))
        stack.enter_context(mock.patch.object(launch.config, "PARTS_PER_SUM", case.group))
        if case.few is not None:
            stack.enter_context(mock.patch.object(launch.config, "few_rows", return_value=case.few))
        yield


def in_autocast(case: NormLinearCase, device: str):
    return contextlib.nullcontext() if case.x_dtype is None else torch.autocast(device, DTYPES[case.dtype])


def by_name(results: list[Tensor], inputs: list[Tensor | None], wanted: tuple[bool, ...]) -> dict[str, Tensor]:
    names = [name for name, t, need in zip(NAMES[1:], inputs, wanted, strict=True) if need and t is not None]
    return dict(zip((NAMES[0], *names), results, strict=True))


def on_kernels(
    case: NormLinearCase, inputs: list, dy: Tensor, wanted: tuple[bool, ...] = (True,) * 5, eps: float = EPS
) -> dict[str, Tensor]:
    """y, and the gradients that are ``wanted``. The inputs' strides are kept."""
    leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(inputs, wanted, strict=True)]
    with dk.backend("triton"), chosen(case):
        with in_autocast(case, inputs[0].device.type):
            y = dk.layer_norm_linear(*leaves, eps=eps, activation=case.activation)
        gradients = torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy)
    return by_name([y.detach(), *gradients], inputs, wanted)


def by_pytorch(case: NormLinearCase, inputs: list, dy: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """The same by PyTorch's own operators, in the inputs' dtype; as autocast does it on CUDA where they are fp32."""
    x, norm_weight, norm_bias, weight, bias = leaves = [
        t if t is None else t.detach().clone().requires_grad_() for t in inputs
    ]
    wide = x if x.dtype == weight.dtype else x.to(weight.dtype)
    normed = F.layer_norm(wide, (case.c,), norm_weight, norm_bias, eps).to(dy.dtype)
    y = F.linear(normed, weight.to(dy.dtype), bias if bias is None else bias.to(dy.dtype))
    y = F.gelu(y) if case.activation == "gelu" else y
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    return by_name([y.detach(), *gradients], inputs, (True,) * 5)


def in_float64(case: NormLinearCase, inputs: list) -> list:
    """The values that are computed with: W and bias as autocast rounds them, all else as it came."""
    x, norm_weight, norm_bias, *linear = inputs
    linear = [None if t is None else t.to(DTYPES[case.dtype]) for t in linear]
    return [None if t is None else t.double() for t in (x, norm_weight, norm_bias, *linear)]


def exactly(case: NormLinearCase, inputs: list, dy: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """The same in float64."""
    return by_pytorch(case, in_float64(case, inputs), dy.double(), eps)


# T0


def _integer_rows(p: int, c: int, mean: float, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float]:
    """x (P, C) of whole numbers, the mean and 1/√(variance + ε) of its rows, ε: all exact.

    Even C: ±1. Odd C: 0, ±1, ±2, ±3 and pairs of ±2, of variance 4. Times 1, 2 and 4, by row; rows of less than 7
    channels, of which no odd number has a variance whose root is exact, are constant.
    """
    scale = 2.0 ** (torch.arange(p, dtype=torch.float64) % 3)
    means = mean * (1.0 - 2.0 * (torch.arange(p, dtype=torch.float64) % 2))
    if c % 2 and c < 7:
        return means[:, None].expand(p, c).contiguous(), means, torch.ones(p, dtype=torch.float64), 1.0
    pairs = [1.0, -1.0] * (c // 2) if c % 2 == 0 else [0.0, 1, -1, 2, -2, 3, -3] + [2.0, -2.0] * ((c - 7) // 2)
    values = torch.tensor(pairs, dtype=torch.float64)
    order = torch.rand((p, c), generator=random).argsort(1)
    return values[order] * scale[:, None] + means[:, None], means, 1 / (scale * (2 if c % 2 else 1)), 0.0


def integer_operands(case: NormLinearCase, device: str, seed: int = 0):
    """(inputs, dy, ε), and their results in float64, which are what kernels have to find to the bit.

    With GELU, a bias that is a power of two and more than all else keeps u away from what is not 0 or u.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return testing.integers(shape, torch.float64, random)

    p, c, d = case.rows, case.c, case.d
    x, mean, rstd, eps = _integer_rows(p, c, case.mean, random)
    parameters = [integers(c), integers(c), integers(d, c), integers(d)]
    for i, given in zip((0, 1, 3), case.given, strict=True):
        parameters[i] = parameters[i] if given else None
    x, mean, rstd = (t[:1].expand_as(t) if case.x == "expanded" else t for t in (x, mean, rstd))
    dy = integers(p, d)
    dy = dy[:1].expand_as(dy) if case.dy == "expanded" else dy
    norm_weight, norm_bias, weight, bias = parameters
    normed = reference.scaled(reference.normalised(x, mean, rstd), norm_weight, norm_bias)
    if case.activation == "gelu":
        most = (normed @ weight.t()).abs().max().item() + 32
        parameters[3] = bias = torch.where(integers(d) > 0, 1.0, -1.0) * 2.0 ** math.ceil(math.log2(most))
    u = reference.linear(normed, weight, bias, torch.float64)
    passes = u > 0 if case.activation == "gelu" else torch.ones_like(u)
    gradients = reference.layer_norm_linear_backward_reference(dy * passes, x, mean, rstd, *parameters, None)
    shape = lambda t: t.reshape(*case.shape, t.shape[-1])  # noqa: E731
    inputs, dy_placed = placed(case, [shape(x), *parameters], shape(dy), device)
    y, dx, *gradients = (t.to(device) for t in (u * passes, *gradients))
    expected = by_name([shape(y), *(g for g, t in zip((shape(dx), *gradients), inputs, strict=True) if t is not None)],
                       inputs, (True,) * 5)  # fmt: skip
    g = reference.scaled((dy * passes) @ weight, norm_weight, None)
    xhat = reference.normalised(x, mean, rstd)
    means = g.mean(1, keepdim=True).abs() + (xhat * (g * xhat).mean(1, keepdim=True)).abs()
    return inputs, dy_placed, eps, expected, shape((g.abs() + means) * rstd[:, None]).to(device)


def prove_exact(case: NormLinearCase, device: str = "cpu", seed: int = 0) -> None:
    """T0: on integers, every element is the float64 result rounded once; dtypes and strides are as promised.

    dx is exact where C is a power of two. Else its two means are not, and each of its three terms may be off by 4 units
    in the last place, whatever was summed up for them.
    """
    if not case.given[2]:
        case = case._replace(activation=None)
    inputs, dy, eps, expected, terms_of_dx = integer_operands(case, device, seed)
    actual = on_kernels(case, inputs, dy, eps=eps)
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        if name == "dx" and case.c & (case.c - 1):
            testing.assert_componentwise(a, expected[name], terms_of_dx, 4, name)
        else:
            testing.assert_exact(a, expected[name], name)
    assert_layouts(case, inputs, actual)


def assert_layouts(case: NormLinearCase, inputs: list, actual: dict[str, Tensor]) -> None:
    """y and dx without gaps; gradients in the dtype of what they are of, and in the strides of a dense parameter."""
    assert actual["y"].dtype == DTYPES[case.dtype], f"y is {actual['y'].dtype}"
    for name, t in zip(NAMES[1:], inputs, strict=True):
        if name in actual:
            assert actual[name].dtype == t.dtype, f"{name} is {actual[name].dtype}"
            assert actual[name].is_contiguous(), f"{name} has strides {actual[name].stride()}"
    assert actual["y"].is_contiguous(), f"y has strides {actual['y'].stride()}"


# T1


class Bounds:
    """Magnitudes and numbers of terms for :func:`testing.assert_componentwise`, without activation.

    x̂ is computed with an error of at most (C + 8)·2⁻²⁴·X, X = |x̂| + 1 + |μ|·r. For the mean is off by its rounding,
    2⁻²⁴·|μ|, which times r is the last term, and by what the sum of its correction is off by, at most
    (C + 3)·2⁻²⁴·mean|x − μ| ≤ (C + 3)·2⁻²⁴/r, which times r is the second one; and 1/√(variance) has the relative
    error of a sum of C squares, halved, and of 5 more operations. In half types, what is multiplied was rounded to them
    once: x̂∘γ+β for y, and for the second mean of dx; x̂ for dγ and dW: u·Σ|…| more, which counts as u·2²⁴ terms.
    """

    def __init__(self, case: NormLinearCase, inputs: list, dy: Tensor, eps: float = EPS):
        x, gamma, beta, weight, bias = in_float64(case, inputs)
        self.half = 0.0 if case.dtype == "fp32" else testing.UNIT_ROUNDOFF[DTYPES[case.dtype]] / EXACT
        self.case, x, dy = case, x.reshape(-1, case.c), dy.double().reshape(-1, case.d).abs()
        mean, rstd = reference.statistics(x, eps)
        self.xhat = reference.normalised(x, mean, rstd).abs()
        self.wide = self.xhat + 1 + (mean.abs() * rstd)[:, None]
        self.gamma = torch.ones_like(x[0]) if gamma is None else gamma.abs()
        self.beta = torch.zeros_like(x[0]) if beta is None else beta.abs()
        self.bias = torch.zeros_like(dy[0]) if bias is None else bias.abs()
        self.weight, self.dy, self.rstd = weight.abs(), dy, rstd

    def _y(self):
        terms = 2 * self.case.c + 10
        rounded = self.xhat * self.gamma + self.beta
        wide = self.wide * self.gamma + self.beta
        return terms, (wide + self.half / (terms + 2) * rounded) @ self.weight.t() + self.bias

    def _dx(self):
        terms = 2 * self.case.c + self.case.d + 20
        dnormed = self.dy @ self.weight
        g = dnormed * self.gamma
        # mean(g∘x̂) may have been made of rounded x̂∘γ+β less β, and x̂ is multiplied with it: errors of three x̂.
        sums = g + g.mean(1, keepdim=True) + 3 * self.wide * (g * self.wide).mean(1, keepdim=True)
        sums += self.wide * (dnormed * self.beta).mean(1, keepdim=True)
        return terms, (1 + 2 * self.half / (terms + 2)) * sums * self.rstd[:, None]

    def _parameters(self) -> dict[str, tuple[int, Tensor]]:
        p, c, d = self.case.rows, self.case.c, self.case.d
        terms = p + c + d + 20
        xhat = self.wide + self.half / (terms + 2) * self.xhat
        sums = self.dy.t() @ xhat
        db = self.dy.sum(0)
        return {
            "dnorm_weight": (terms, (self.weight * sums).sum(0)),
            "dnorm_bias": (p + d, self.weight.t() @ db),
            "dweight": (terms, sums * self.gamma + db[:, None] * self.beta),
            "dbias": (p, db),
        }

    def check(self, actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        bounds = {"y": self._y(), "dx": self._dx(), **self._parameters()}
        for name, a in actual.items():
            terms, magnitude = bounds[name]
            testing.assert_componentwise(a, exact[name], magnitude.reshape(a.shape), terms, name)


# T2, T3

ENOUGH = 30  # elements, for a ratio of root mean squares to say something
# Standard errors take elements for independent. Rows and columns of dx share the rounding of du: its means,
# over 10 seeds, spread 2.6 times as far, and PyTorch's 4 times. Truncation is 100 of them off, of 20 000 elements.
SIGMAS = {"y": 5.0, "dx": 15.0}
# ... times √numel: tensor cores cut off what a sum does not hold, at every step, which in fp16 is up to 0.003.
CUT_OFF = 0.02


def prove_rounding(
    case: NormLinearCase, device: str = "cpu", seed: int = 0, far: bool = False,
    make: Callable[..., tuple[list, Tensor]] = normal_operands,
) -> None:  # fmt: skip
    """T1 without activation, T2, T3: within the rounding bound, no further off than PyTorch, not biased.

    ``far``: the mean is many standard deviations, and fp32 rows lose what they lose in x − μ.
    """
    inputs, dy = make(case, device, seed)
    actual, exact = on_kernels(case, inputs, dy), exactly(case, inputs, dy)
    peer = by_pytorch(case, inputs, dy)
    if case.activation is None:
        Bounds(case, inputs, dy).check(actual, exact)
    for name, a in actual.items():
        if a.numel() >= ENOUGH:
            testing.assert_no_worse(a, peer[name], exact[name], *_ratios(case, name, a, far), name)
        # fp32 results, dx of an fp32 x among them, are not rounded when they are stored.
        if a.dtype != torch.float32 and name in SIGMAS and a.numel() >= 500:
            testing.assert_unbiased(a, exact[name], SIGMAS[name] + CUT_OFF * math.sqrt(a.numel()), name)
    assert_layouts(case, inputs, actual)


def _ratios(case: NormLinearCase, name: str, result: Tensor, far: bool) -> tuple[float, float]:
    """Of the root mean square and of the maximum of errors to PyTorch's."""
    if case.dtype != "fp32" and (case.x_dtype is None or name in ("y", "dx")):
        return 1.1, 2  # parameters' gradients in fp32 of half x̂: the rounding of either, by no store made alike
    return fp32_ratios(result, (2, 3) if far or name not in ("y", "dx") else (1.5, 2))


def one_pass(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What statistics must not be: the mean, and 1/√(Σx²/C − μ² + ε)."""
    mean = x.mean(-1)
    return mean, torch.rsqrt((x.square().mean(-1) - mean.square()).clamp_min(0) + eps)
