"""The layer norms with linear layers that :mod:`dwconv_kernels.self_check` runs, and what is checked of them.

Symbols are those of ``norm_linear/README.md``. What roundings may cost is in ``self_check_norm_linear_bounds.py``.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from . import runtime, testing
from .norm_linear.op import layer_norm_linear
from .self_check_common import DTYPES, Launches, Recorder, Results, assert_same_bits, block_sizes, listed, normal
from .self_check_norm_linear_bounds import Operands, bounds, by_formula, terms, underflow

EPS = 1e-6
Shape = tuple[int, int, int]


class Case(NamedTuple):
    """A layer norm with a linear layer, and what is checked of it."""

    dtype: str  # that is computed in
    shape: Shape  # rows P, channels C, outputs D on a GPU
    small: Shape  # in the interpreter: the same channels, and as many rows and outputs as there have to be
    checks: tuple[str, ...] = ("exact",)
    gelu: bool = False
    given: bool = True  # γ, β and bias; else none of them
    x: str | None = None  # the dtype of x under autocast, where the parameters are fp32
    gap: int = 0  # elements from the end of a row to the next one; they are NaN
    tf32: bool = False
    family = "norm_linear"

    def __str__(self) -> str:
        words = [self.dtype, "norm+linear"]
        words += ["GELU"] if self.gelu else []
        words += [] if self.given else ["W only"]
        words += [f"autocast of {self.x}"] if self.x else []
        words += [f"stride C+{self.gap}"] if self.gap else []
        words += ["TF32"] if self.tf32 else []
        return " ".join(words)


# Together, every kernel with and without GELU, in half types and in fp32: rows that stay (C ≤ 192, fp32 128), in one
# tile of channels and in two, and wide ones; rows of whole vectors and others; tiles for few rows and for many (10 885
# rows are more than one tile for each multiprocessor of any GPU); sizes that fill no block. --quick: the first two.
CASES = (
    Case("bf16", (10885, 200, 136), (3, 200, 24), ("exact", "rounding", "same bits", "Inf and NaN"), gelu=True),
    Case("fp32", (300, 96, 72), (5, 96, 20), ("exact", "rounding", "same bits", "Inf and NaN"), gelu=True),
    Case("fp16", (10885, 256, 192), (3, 256, 24), ("exact", "rounding", "same bits")),
    Case("fp16", (131, 96, 384), (5, 96, 24), ("exact", "rounding", "Inf and NaN"), gelu=True),
    Case("bf16", (10885, 192, 144), (3, 192, 24), ("exact", "rounding", "same bits"), x="fp32", gap=3),
    Case("bf16", (70, 97, 131), (5, 97, 7), ("exact", "rounding", "same bits"), gelu=True),
    Case("fp32", (129, 131, 33), (4, 131, 9), ("exact", "rounding", "Inf and NaN"), gap=5),
    Case("fp16", (129, 203, 64), (4, 203, 16), ("exact", "rounding"), gelu=True, given=False),
    Case("fp32", (140, 160, 68), (4, 160, 12), ("exact", "rounding"), gelu=True, given=False),
    Case("fp16", (129, 64, 200), (4, 64, 24), ("exact", "rounding"), x="fp16", given=False),
    Case("fp32", (4170, 33, 9), (4097, 33, 9), gelu=True),
    Case("bf16", (1, 320, 5), (1, 320, 5), ("exact", "rounding")),
    Case("fp32", (300, 128, 96), (4, 128, 16), tf32=True),
)


# What the launchers launch, without launching it


def launches(case: Case, shape: Shape, device: str | torch.device) -> Launches:
    """Everything that both passes launch."""
    launch, recorder = runtime.launchers("norm_linear"), Recorder()
    x, *parameters, dy = (None if t is None else t.to(device) for t in _operands(case, shape, torch.zeros))
    x = _with_gap(x, case.gap)
    activation = "gelu" if case.gelu else None
    with mock.patch.object(launch, "kernels", recorder), _tf32(case.tf32):
        _, mean, rstd = launch.norm_linear_forward(x, *parameters, EPS, activation, dy.dtype)
        launch.norm_linear_backward(dy, x, mean, rstd, *parameters, activation, (True,) * 5)
    return recorder.launches


def _named(kernel: str) -> str:
    return kernel.removeprefix("_norm_linear_").removesuffix("_kernel")


def configuration(case: Case, shape: Shape, device: str | torch.device) -> str:
    """The kernels, each with its block of rows, outputs and channels, as far as it has them."""

    def text(kernel: str, constants: dict[str, object]) -> str | None:
        if _named(kernel) in _SMALL:
            return None
        sizes = block_sizes(constants)
        if "C0" in constants:
            sizes += [f"({constants['C0']}+{constants['C1']})" if constants["C1"] else constants["C0"]]
        return f"{_named(kernel)} {'×'.join(map(str, sizes))}"

    return listed(lambda: launches(case, shape, device), text)


_SMALL = ("vectors", "column_sum", "finish", "norm_sum")  # kernels whose blocks are always the same
_REASONS = {
    "fwd": "rows stay where they are normalised and are multiplied there, up to 192 channels, fp32 128",
    "norm": "rows are normalised once for all products with them: of wide rows forward, of all rows backward",
    "product": "rows that are too wide to stay are multiplied once they are normalised",
    "vectors": "what is known of the means of g and g∘x̂ before g is",
    "bwd_du": "u is computed again for GELU's derivative; sums of its rows and columns come with it",
    "bwd_x": "(du·W)∘γ, and what the norm subtracts",
    "bwd_weight": "duᵀ·x̂ in parts, as many as keep the GPU busy",
    "column_sum": "the parts of du's column sums, in a fixed order",
    "finish": "dW and db from their parts, in a fixed order, and the parts of dγ and dβ",
    "norm_sum": "dγ and dβ from theirs",
}


def reasons(case: Case, shape: Shape, device: str | torch.device) -> Iterator[tuple[str, str]]:
    """(kernel, what it is there for) of both passes."""
    with contextlib.suppress(Exception):
        for kernel, _ in launches(case, shape, device):
            yield _named(kernel), _REASONS.get(_named(kernel), "")


# Operands are made on the CPU, where float64 says what is right.


NAMES = ("dx", "dγ", "dβ", "dW", "db")


def _operands(case: Case, shape: Shape, make: Callable[[Sequence[int]], Tensor]) -> Operands:
    p, c, d = shape
    norm_weight, norm_bias, bias = (make((size,)) if case.given else None for size in (c, c, d))
    return _cast(case, Operands(make((p, c)), norm_weight, norm_bias, make((d, c)), bias, make((p, d))))


def _cast(case: Case, operands: Operands) -> Operands:
    """In the dtypes of the case: under autocast, parameters are fp32."""
    x, *parameters, dy = operands
    kept = torch.float32 if case.x else DTYPES[case.dtype]
    parameters = (None if t is None else t.to(kept) for t in parameters)
    return Operands(x.to(DTYPES[case.x or case.dtype]), *parameters, dy.to(DTYPES[case.dtype]))


def _with_gap(x: Tensor, gap: int) -> Tensor:
    if not gap:
        return x
    parent = x.new_full((len(x), x.shape[1] + gap), math.nan)
    parent[:, 1 : 1 + x.shape[1]] = x
    return parent[:, 1 : 1 + x.shape[1]]


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """fp32 matrices are multiplied in TF32, or not, whatever the caller's setting is."""
    matmul = torch.backends.cuda.matmul
    name, value = ("allow_tf32", allowed)
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _kernels(case: Case, operands: Operands, device: str | torch.device, eps: float = EPS) -> Results:
    """What the kernels make of the operands, on their device."""
    x, *parameters, dy = (None if t is None else t.to(device) for t in operands)
    autocast = torch.autocast(torch.device(device).type, DTYPES[case.dtype], enabled=case.x is not None)

    def function(*leaves: Tensor | None) -> Tensor:
        with autocast:
            return layer_norm_linear(*leaves, eps=eps, activation="gelu" if case.gelu else None)

    with _tf32(case.tf32), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, in the interpreter, of rows beside the last one
        return _gradients(function, (_with_gap(x, case.gap), *parameters), dy)


def _pytorch(case: Case, operands: Operands, eps: float = EPS) -> Results:
    """The same by PyTorch in float64."""

    def function(x, norm_weight, norm_bias, weight, bias):
        y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
        return F.gelu(y) if case.gelu else y

    *leaves, dy = _double(case, operands)
    return _gradients(function, leaves, dy)


def _double(case: Case, operands: Operands) -> Operands:
    """The values that are computed with: autocast rounds W and b, all else is taken as it came."""
    dtype = DTYPES[case.dtype]
    operands = operands._replace(
        weight=operands.weight.to(dtype), bias=None if operands.bias is None else operands.bias.to(dtype)
    )
    return Operands(*(None if t is None else t.double() for t in operands))


def _gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor | None], dy: Tensor) -> Results:
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    given = {name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad(y, list(given.values()), dy)
    return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def _integers(case: Case, shape: Shape) -> Operands:
    """Operands of which u, and with ε = 0 all results but dx, are exact in fp32.

    Rows are ±1 or, of an odd number of channels, 0, ±1, ±2, ±3 and pairs of ±2, whose variance is 4; times 1, 2 or 4,
    plus −3, 0 or 3. With GELU, a bias that is a power of two and larger than all else has it pass u, or be 0.
    """
    p, c, d = shape
    generator = torch.Generator().manual_seed(0)
    x, norm_weight, norm_bias, weight, bias, dy = _operands(case, shape, partial(testing.integers, generator=generator))
    values = [1.0, -1.0] * (c // 2) if c % 2 == 0 else [0.0, 1, -1, 2, -2, 3, -3] + [2.0, -2.0] * ((c - 7) // 2)
    order, row = torch.rand((p, c), generator=generator).argsort(1), torch.arange(p)[:, None]
    x = torch.tensor(values)[order] * 2.0 ** (row % 3) + 3.0 * (row % 5 % 3 - 1)
    if case.gelu:
        most = 32 + 8 * weight.double().abs().sum(1).max().item()  # |x̂·γ + β| ≤ 3·2 + 2
        bias = torch.where(torch.arange(d) % 3 > 0, 1.0, -1.0) * 2.0 ** math.ceil(math.log2(most))
    return _cast(case, Operands(x, norm_weight, norm_bias, weight, bias, dy))


# The checks


def _check_exact(case: Case, shape: Shape, device: str | torch.device) -> None:
    """All but dx to the bit. Of dx, the means are not exact: each of its three terms within four roundings.

    Then rows of one value, whatever it is, have x̂ = 0, and give y = β·Wᵀ + b, to the bit.
    """
    operands = _integers(case, shape)
    t = terms(_double(case, operands), case.gelu, eps=0.0)
    expected, actual = by_formula(t, case.gelu), _kernels(case, operands, device, eps=0.0)
    for name in [name for name in actual if name != "dx"]:
        testing.assert_exact(actual[name].cpu(), expected[name], name)
    means = t.g.mean(1, keepdim=True).abs() + (t.normed * (t.g * t.normed).mean(1, keepdim=True)).abs()
    testing.assert_componentwise(actual["dx"].cpu(), expected["dx"], (t.g.abs() + means) * t.rstd, 4, "dx")
    values = normal(4)((shape[0], 1)).mul(1000).to(operands.x.dtype)
    actual = _kernels(case, operands._replace(x=values.expand(shape[:2])), device)
    t = terms(_double(case, operands._replace(x=torch.zeros_like(operands.x))), case.gelu, EPS)
    testing.assert_exact(actual["y"].cpu(), by_formula(t, case.gelu)["y"], "y of rows of one value")


def _check_rounding(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = _operands(case, shape, normal(1))
    # u is to be where GELU bends, from −4 to 4: by the bias, if there is one, as errors of x̂ then matter less.
    operands = operands._replace(weight=operands.weight * (1 / 4 if case.given else 2) / math.sqrt(shape[1]))
    if case.given:
        operands = operands._replace(bias=operands.bias * 2)
    expected, t = _pytorch(case, operands), terms(_double(case, operands), case.gelu, EPS)
    off = bounds(t, case.gelu, DTYPES[case.dtype])
    for name, actual in _kernels(case, operands, device).items():
        _assert_within(actual.cpu(), expected[name], off[name], name)


def _assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Within ``bound``, and once rounded to its dtype."""
    error = (actual.double() - expected).abs()
    bound = bound + testing.UNIT_ROUNDOFF[actual.dtype] * (expected.abs() + bound) + underflow(actual.dtype)
    wrong = ~(error <= bound)  # a NaN is wrong, too
    if wrong.any():
        worst = (error / bound).nan_to_num(math.inf).max().item()
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are further from the exact value than rounding "
            f"explains, up to {worst:.3g} times, the first at {place}: {actual[place].item()} instead of "
            f"{expected[place].item()}"
        )


def _check_same_bits(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = _operands(case, shape, normal(2))
    operands = Operands(*(None if t is None else t.to(device) for t in operands))
    assert_same_bits(lambda: _kernels(case, operands, device), device)


def _check_inf_and_nan(case: Case, shape: Shape, device: str | torch.device) -> None:
    """Rows of x with an Inf or NaN are NaN in y and dx, and no others; a bias of ±Inf is one of its outputs alone."""
    operands = _operands(case, shape, normal(3))
    x = operands.x.clone()
    x[0, -1], x[-1, 0] = math.nan, math.inf
    poisoned, clean = _kernels(case, operands._replace(x=x), device), _kernels(case, operands, device)
    for name in ("y", "dx"):
        expected = clean[name].clone()
        expected[0], expected[-1] = math.nan, math.nan
        same = poisoned[name].eq(expected) | (poisoned[name].isnan() & expected.isnan())
        if not same.all():
            row = int(same.logical_not().nonzero()[0, 0])
            raise AssertionError(f"{name}: row {row} is wrong; NaN is in the first row of x, Inf in the last")
    if not poisoned["dW"].isnan().all():
        raise AssertionError("dW: every element is a sum over rows of which one is NaN, and some are numbers")
    if not case.given:
        return
    bias = operands.bias.clone()
    bias[0], bias[-1] = math.inf, -math.inf
    results = _kernels(case, operands._replace(bias=bias), device)
    y = clean["y"].clone()
    y[:, 0], y[:, -1] = math.inf, 0 if case.gelu else -math.inf
    testing.assert_exact(results["y"].cpu(), y.cpu(), "y with biases of ±Inf")
    for name in NAMES:
        if not results[name].isfinite().all():
            raise AssertionError(f"{name}: Inf or NaN, though only a bias is infinite")


CHECKS = {
    "exact": _check_exact,
    "rounding": _check_rounding,
    "same bits": _check_same_bits,
    "Inf and NaN": _check_inf_and_nan,
}
