"""The depthwise convolutions that :mod:`dwconv_kernels.self_check` runs, and what is checked of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import runtime, testing
from .depthwise.op import depthwise_conv2d
from .self_check_common import DTYPES, Results, assert_same_bits, kind, normal

Shape = tuple[int, int, int, int]


class Case(NamedTuple):
    """A depthwise convolution, and what is checked of it."""

    dtype: str
    kernel: tuple[int, int]
    shape: Shape  # N, C, H, W on a GPU
    small: Shape  # in the interpreter: another map that leads to the same kernels
    checks: tuple[str, ...] = ("exact",)
    padding: tuple[int, int] | None = None  # None is "same"
    contiguous: bool = False  # the input; else it is channels_last
    strict: bool = False
    stride: int = 1
    dilation: int = 1
    family = "depthwise"

    @property
    def pads(self) -> tuple[int, int]:
        return self.padding or tuple(self.dilation * (k // 2) for k in self.kernel)

    @property
    def geometry(self) -> dict[str, object]:
        return {"stride": self.stride, "padding": self.pads, "dilation": self.dilation}

    def __str__(self) -> str:
        words = [self.dtype, "{}×{}".format(*self.kernel)]
        words += ["padding {},{}".format(*self.padding)] if self.padding else []
        words += [f"{name} {value}" for name in ("stride", "dilation") if (value := getattr(self, name)) > 1]
        words += ["contiguous"] if self.contiguous else []
        words += ["strict"] if self.strict else []
        return " ".join(words)


# Together, every choice of config.py at 7×7, in two of the dtypes or more, each other kernel at least once, and tensor
# cores in the sizes that networks have. What takes long to compile comes first, and the maps are odd: strips that
# overlap, rows that are no pairs, channels that do not fill the last block, several images to a program.
CASES = (
    Case("bf16", (7, 7), (2, 65, 33, 57), (1, 5, 3, 15), ("exact", "rounding", "same bits")),
    Case("fp32", (7, 7), (2, 40, 29, 30), (1, 5, 3, 10), ("exact", "rounding", "same bits", "Inf and NaN")),
    Case("fp16", (7, 7), (3, 41, 20, 28), (1, 5, 4, 10), ("exact", "rounding", "same bits")),
    Case("bf16", (7, 7), (2, 64, 15, 57), (1, 5, 3, 10), ("exact", "Inf and NaN"), strict=True),
    Case("fp32", (9, 9), (1, 40, 25, 23), (1, 5, 3, 7)),
    Case("bf16", (9, 9), (2, 33, 19, 21), (1, 5, 10, 9), padding=(0, 0)),
    Case("bf16", (7, 7), (3, 66, 14, 14), (2, 5, 3, 14), ("exact", "same bits")),
    Case("bf16", (11, 1), (2, 40, 44, 13), (1, 5, 7, 8)),
    Case("bf16", (7, 7), (2, 65, 9, 5), (1, 5, 2, 5)),
    Case("fp32", (7, 7), (2, 40, 9, 23), (1, 5, 2, 6), padding=(6, 2)),
    Case("fp16", (7, 7), (300, 41, 7, 7), (2, 5, 4, 7), ("exact", "same bits")),
    Case("fp16", (5, 5), (2, 31, 17, 22), (1, 5, 6, 5), padding=(0, 4)),
    Case("fp16", (5, 5), (2, 31, 17, 22), (1, 5, 3, 9), contiguous=True),
    Case("bf16", (3, 3), (2, 33, 19, 31), (1, 33, 3, 8), ("exact", "same bits")),
    Case("fp16", (1, 11), (2, 40, 13, 44), (1, 5, 3, 12)),
    # On tensor cores
    Case("bf16", (7, 7), (37, 64, 33, 57), (2, 8, 3, 5), ("exact", "rounding", "same bits")),
    Case("fp16", (7, 7), (300, 40, 7, 7), (3, 8, 2, 7), ("exact", "same bits")),
    Case("bf16", (13, 13), (3, 33, 29, 30), (1, 5, 9, 9), ("exact", "rounding", "same bits")),
    Case("fp16", (31, 31), (5, 40, 33, 28), (1, 3, 16, 16), ("exact", "same bits")),
    Case("bf16", (31, 31), (20, 40, 14, 14), (1, 3, 14, 14)),
    Case("bf16", (51, 51), (2, 17, 60, 57), (1, 3, 26, 26)),
    Case("bf16", (17, 17), (3, 40, 25, 30), (1, 5, 12, 10), padding=(3, 16)),
    Case("fp16", (51, 5), (3, 40, 56, 30), (1, 5, 26, 6)),
    Case("fp16", (5, 51), (3, 40, 30, 56), (1, 5, 6, 26)),
    # On FMAs again: large, dilated, with a stride
    Case("fp32", (13, 13), (2, 40, 29, 30), (1, 5, 7, 8)),
    Case("fp32", (7, 7), (2, 40, 29, 57), (1, 5, 4, 32), dilation=3),
    Case("bf16", (7, 7), (2, 40, 29, 57), (1, 5, 3, 22), dilation=2),
    Case("fp16", (7, 7), (2, 40, 28, 57), (1, 5, 4, 9), stride=2),
    Case("fp32", (3, 3), (2, 40, 29, 56), (1, 5, 4, 9), stride=2),
)


def _choices(case: Case, shape: Shape) -> dict[str, NamedTuple]:
    """What config.py, or config_tensor.py, picks for each of the three passes."""
    launch = runtime.launchers("depthwise")
    config, (kh, kw), (c, h, w) = launch.config, case.kernel, shape[1:]
    strict, dilation = case.strict or runtime.strict_kernels(), (case.dilation,) * 2
    oh, ow = _output(case, shape)
    if case.stride > 1:
        return dict(zip(("y", "dx", "dw"), config.pick_strided((case.stride,) * 2), strict=True))
    same = case.pads == (case.dilation * (kh // 2), case.dilation * (kw // 2))
    at, choices = (case.dtype, kh, kw, same), {}
    for result, columns in {"y": ow, "dx": w, "dw": ow}.items():
        if launch.tensor is not None and config.on_tensor_cores(
            case.dtype, kh, kw, (case.stride,) * 2, dilation, c, strict
        ):
            choices[result] = _on_tensor_cores(case, result, (h, w), (oh, ow), c)
        else:
            pick = config.pick_backward_weight if result == "dw" else config.pick_forward
            choices[result] = pick(*at, columns, strict, dilation)
    return choices


def _on_tensor_cores(case: Case, result: str, size: tuple, out: tuple, c: int) -> NamedTuple:
    config, vectors = runtime.launchers("depthwise").tensor.config, c % 8 == 0
    if result == "dx":  # x and y change places, and the padding goes with the taps that are turned around
        padding, size, out = tuple(k - 1 - p for k, p in zip(case.kernel, case.pads, strict=True)), out, size
    else:
        padding = case.pads
    cuts = config.CUTS[:1] if result == "dw" else config.CUTS
    kernel = [end - first for first, end in config.used_taps(case.kernel, padding, size, out, cuts)]
    if result == "dw":
        return config.pick_backward_weight(*kernel, vectors)
    return config.pick_forward(*kernel, 90, vectors)


def _output(case: Case, shape: Shape) -> tuple[int, int]:
    sizes = zip(shape[2:], case.pads, case.kernel, strict=True)
    return tuple((s + 2 * p - case.dilation * (k - 1) - 1) // case.stride + 1 for s, p, k in sizes)


def _named(choice) -> str:
    if not hasattr(choice, "block_w"):  # of tensor cores
        p = choice.patches
        return f"{choice.name}, patches {p.R}×{p.T}, {p.products} products"
    kernel = choice.kernel.removeprefix("_depthwise_").removesuffix("_kernel")
    return f"{kernel} {choice.block_w} {choice.edge}"


def reasons(case: Case, shape: Shape, device: str | torch.device) -> Iterator[tuple[str, str]]:
    """(kernel, why it was taken) of each pass."""
    for choice in _choices(case, shape).values():
        yield _named(choice), choice.reason


def configuration(case: Case, shape: Shape, device: str | torch.device) -> str:
    """Which kernels make which results."""
    passes: dict[str, list[str]] = {}
    for result, choice in _choices(case, shape).items():
        passes.setdefault(_named(choice), []).append(result)
    return ", ".join(f"{'+'.join(results)}: {name}" for name, results in passes.items())


# The checks. Operands are made on the CPU, where float64 says what is right.


def _operands(case: Case, shape: Shape, make: Callable[[Sequence[int]], Tensor]) -> list[Tensor]:
    """x, weight, bias and the gradient of y, in the dtype of the case."""
    n, c = shape[:2]
    size = _output(case, shape)
    return [make(s).to(DTYPES[case.dtype]) for s in (shape, (c, 1, *case.kernel), (c,), (n, c, *size))]


def _kernels(case: Case, operands: Sequence[Tensor], device: str | torch.device) -> Results:
    """What the kernels make of the operands, on their device."""
    x, weight, bias, dy = (t.to(device) for t in operands)
    if not case.contiguous:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    with runtime.strict() if case.strict else contextlib.nullcontext():
        return _gradients(lambda x, w, b: depthwise_conv2d(x, w, b, **case.geometry), x, weight, bias, dy)


def _pytorch(case: Case, operands: Sequence[Tensor]) -> Results:
    """The same by PyTorch in float64."""
    groups = operands[0].shape[1]
    operands = [t.double() for t in operands]
    return _gradients(lambda x, w, b: F.conv2d(x, w, b, **case.geometry, groups=groups), *operands)


def _gradients(function: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> Results:
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = function(*leaves)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def _check_exact(case: Case, shape: Shape, device: str | torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    operands = _operands(case, shape, partial(testing.integers, generator=generator))
    expected = _pytorch(case, operands)
    for name, actual in _kernels(case, operands, device).items():
        testing.assert_exact(actual.cpu(), expected[name], name)


def _check_rounding(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = _operands(case, shape, normal(1))
    expected, magnitude = _pytorch(case, operands), _pytorch(case, [t.abs() for t in operands])
    taps, pixels = case.kernel[0] * case.kernel[1], operands[3].numel() // shape[1]
    terms = {"y": taps + 1, "dx": taps, "dw": pixels, "db": pixels}
    for name, actual in _kernels(case, operands, device).items():
        testing.assert_componentwise(actual.cpu(), expected[name], magnitude[name], terms[name], name)


def _check_same_bits(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = [t.to(device) for t in _operands(case, shape, normal(2))]
    assert_same_bits(lambda: _kernels(case, operands, device), device)


def _check_inf_and_nan(case: Case, shape: Shape, device: str | torch.device) -> None:
    """y and dx are Inf or NaN exactly where they are in float64; the other channels' dw and db are finite."""
    operands = [t.abs() + 0.1 for t in _operands(case, shape, normal(3))]
    x, dy = operands[0], operands[3]
    for t in (x, dy):
        t[0, 0, t.shape[2] // 2, t.shape[3] // 2] = float("inf")  # inside,
        t[-1, 1, -1, 0] = float("nan")  # at an edge,
        t[-1, 2, 0, -1] = -float("inf")  # and in a corner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, in the interpreter, of Inf · 0
        expected, actual = _pytorch(case, operands), _kernels(case, operands, device)
    for name in ("y", "dx"):
        testing.assert_exact(kind(actual[name].cpu()), kind(expected[name]), f"{name}, as 0 or ±1 (Inf) or 2 (NaN)")
    for name in ("dw", "db"):
        if not actual[name][3:].isfinite().all():
            raise AssertionError(f"{name}: Inf or NaN reached a channel that has none")


CHECKS = {
    "exact": _check_exact,
    "rounding": _check_rounding,
    "same bits": _check_same_bits,
    "Inf and NaN": _check_inf_and_nan,
}
