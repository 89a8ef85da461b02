"""The ConvNeXt blocks that :mod:`dwconv_kernels.self_check` runs, and what is checked of them.

Symbols are those of ``block/README.md``. The convolution and layer norm + linear have checks of their own, to the bit;
a block is held against PyTorch's operators, in float64 and, for what rounding may cost, in the same dtype, on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import runtime, testing
from .block.op import Parameters, composition, convnext_block
from .self_check_common import DTYPES, Launches, Recorder, Results, assert_same_bits, block_sizes, listed, normal

EPS = 1e-6
Shape = tuple[int, int, int, int, int]


class Case(NamedTuple):
    """A block, and what is checked of it."""

    dtype: str  # that is computed in
    shape: Shape  # N, C, H, W and D on a GPU
    small: Shape  # in the interpreter, fewer of everything: the same kernels, as far as those of few channels
    checks: tuple[str, ...] = ("rounding",)
    memory: str = "default"
    given: bool = True  # biases, γ, β and λ; else none of them
    dropped: bool = False  # the branch of every second image
    grn: bool = False
    autocast: bool = False  # x and parameters are fp32
    family = "block"

    def __str__(self) -> str:
        words = [self.dtype, "block", self.memory]
        words += [] if self.given else ["weights only"]
        words += [name for name in ("dropped", "grn", "autocast") if getattr(self, name)]
        return " ".join(words)


_ALL = ("rounding", "dropped images", "same bits", "Inf and NaN")
# Together, every kernel of the family: tails of one kernel (C ≤ 192 in half types), with the weights in shared memory
# where there are 540 blocks of rows and more, and of two; u computed again and kept; GRN. --quick: the first two.
CASES = (
    Case("bf16", (25, 96, 56, 56, 384), (2, 24, 3, 4, 48), _ALL, dropped=True),
    Case("fp16", (9, 256, 14, 14, 1024), (2, 17, 3, 4, 24), _ALL, dropped=True),
    Case("bf16", (16, 192, 28, 28, 768), (2, 40, 3, 5, 64), ("rounding", "same bits")),
    Case("fp16", (14, 128, 28, 28, 512), (2, 32, 3, 5, 64), dropped=True),
    Case("bf16", (25, 80, 28, 30, 320), (2, 16, 3, 5, 24), given=False),
    Case("bf16", (4, 384, 14, 14, 1536), (1, 41, 3, 3, 24), memory="lean", autocast=True),
    Case("bf16", (16, 768, 7, 7, 3072), (1, 17, 3, 4, 24), ("rounding", "same bits"), memory="fast"),
    Case("fp32", (5, 40, 13, 17, 160), (2, 9, 3, 4, 24), _ALL, dropped=True),
    Case("fp32", (3, 97, 9, 11, 131), (2, 17, 3, 4, 13), memory="fast"),
    Case("fp16", (7, 64, 28, 28, 256), (2, 16, 3, 3, 24), _ALL, grn=True, dropped=True),
    Case("fp32", (4, 40, 9, 7, 160), (2, 16, 3, 3, 24), grn=True, given=False),
    Case("bf16", (2, 97, 7, 7, 388), (2, 9, 3, 3, 20), autocast=True),
)


# What the launchers launch, without launching it


def launches(case: Case, shape: Shape, device: str | torch.device) -> Launches:
    """Everything that both passes launch, the convolution's kernels included."""
    launch, recorder = runtime.launchers("block"), Recorder()
    common, backward = launch.launch_common, launch.launch_backward
    modules = launch, common, backward, common.depthwise, launch.norm_linear
    tensors = [None if t is None else t.to(device) for t in _operands(case, shape, torch.zeros)]
    dtype = DTYPES[case.dtype]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "kernels", recorder))
        if (tensor := common.depthwise.tensor) is not None:
            stack.enter_context(mock.patch.object(tensor, "kernels_tables", recorder))
            stack.enter_context(mock.patch.object(tensor, "_run", recorder.note))
        out, *saved = launch.block_forward(*tensors, EPS, case.memory, dtype)
        launch.block_backward(out, *tensors, *saved, EPS, case.memory, dtype, (True,) * 12)
    return recorder.launches


def _named(kernel: str) -> str:
    return kernel.removeprefix("_block_").removesuffix("_kernel")


def configuration(case: Case, shape: Shape, device: str | torch.device) -> str:
    """The kernels of the tail, each with its block of rows, hidden channels and channels, as far as it has them."""

    def text(kernel: str, constants: dict[str, object]) -> str | None:
        return f"{_named(kernel)} {'×'.join(map(str, block_sizes(constants)))}" if _named(kernel) in _REASONS else None

    return listed(lambda: launches(case, shape, device), text)


_REASONS = {
    "fwd": "the whole tail: up to 192 channels, in half types, rows and their sums stay on chip",
    "fwd_resident": "the whole tail, with both weights in shared memory: up to 64 channels, and 96, of many rows",
    "out": "h·W2ᵀ, layer scale and residual, where h is made before",
    "bwd_rows": "dy, h and du of a block of rows: u and dh never leave the chip",
    "bwd_hidden": "h and du of a block of rows and hidden channels, where the rows' sums are too many for one program",
    "grn_sums": "sums over the pixels of each image",
    "grn_apply": "h of an image's norms",
    "grn_bwd": "h and du through the norm over an image",
}


def reasons(case: Case, shape: Shape, device: str | torch.device) -> Iterator[tuple[str, str]]:
    """(kernel, what it is there for) of both passes."""
    with contextlib.suppress(Exception):
        for kernel, _ in launches(case, shape, device):
            if _named(kernel) in _REASONS:
                yield _named(kernel), _REASONS[_named(kernel)]


# Operands are made on the CPU, where float64 says what is right.


ROW_SCALE = 10  # its place among the operands
NAMES = ("dx", "dk", "db", "dγ", "dβ", "dW1", "db1", "dW2", "db2", "dλ", "dρ", "dw", "dv")


def _operands(case: Case, shape: Shape, make: Callable[[Sequence[int]], Tensor]) -> list[Tensor | None]:
    """The block's thirteen tensors, in the dtypes of the case: under autocast, all are fp32."""
    n, c, h, w, d = shape
    vector = lambda size, given=case.given: make((size,)) if given else None  # noqa: E731
    tensors = [
        make((n, c, h, w)), make((c, 1, 7, 7)) / 7, vector(c), vector(c), vector(c),
        make((d, c)) / math.sqrt(c), vector(d), make((c, d)) / math.sqrt(d), vector(c), vector(c),
        torch.tensor([1.25, 0.0])[torch.arange(n) % 2] if case.dropped else None,
        vector(d, case.grn), vector(d, case.grn),
    ]  # fmt: skip
    kept = torch.float32 if case.autocast else DTYPES[case.dtype]
    tensors = [None if t is None else t.to(kept) for t in tensors]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors


def _gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], seed: int) -> Results:
    leaves = [t if t is None or at == ROW_SCALE else t.detach().requires_grad_() for at, t in enumerate(tensors)]
    out = function(*leaves)
    dout = normal(seed)(out.shape).to(out)
    wanted = {name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def _kernels(case: Case, tensors: Sequence[Tensor | None], device: str | torch.device) -> Results:
    """What the kernels make of the operands, on their device."""
    autocast = torch.autocast(torch.device(device).type, DTYPES[case.dtype], enabled=case.autocast)

    def function(*leaves: Tensor | None) -> Tensor:
        with autocast:
            return convnext_block(*leaves, eps=EPS, memory=case.memory)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, in the interpreter, of rows beside the last one
        return _gradients(function, [None if t is None else t.to(device) for t in tensors], seed=9)


def _pytorch(case: Case, tensors: Sequence[Tensor | None], dtype: torch.dtype | None) -> Results:
    """The same by PyTorch's operators on the CPU, in the dtypes of the case, or in another one."""
    autocast = torch.autocast("cpu", DTYPES[case.dtype], enabled=case.autocast and dtype is None)

    def function(*leaves: Tensor | None) -> Tensor:
        parameters = Parameters(*leaves[1:ROW_SCALE], *leaves[ROW_SCALE + 1 :])
        with autocast, runtime.backend("torch"):
            return composition(leaves[0], parameters, leaves[ROW_SCALE], EPS)

    return _gradients(function, [t if t is None or dtype is None else t.to(dtype) for t in tensors], seed=9)


# The checks


def _check_rounding(case: Case, shape: Shape, device: str | torch.device) -> None:
    """No further from float64 than PyTorch's own operators; of few numbers, their luck counts."""
    tensors = _operands(case, shape, normal(1))
    exact, peer = _pytorch(case, tensors, torch.float64), _pytorch(case, tensors, None)
    for name, actual in _kernels(case, tensors, device).items():
        expected = exact[name]
        rms, largest = (1.25, 3) if expected.numel() >= 1000 else (2.5, 5)
        testing.assert_no_worse(actual.cpu(), peer[name], expected, rms, largest, name)


def _check_dropped_images(case: Case, shape: Shape, device: str | torch.device) -> None:
    """Of an image whose branch is dropped, out is x and dx is dout, and nothing of it is in the other gradients."""
    tensors = _operands(case, shape, normal(2))
    results = _kernels(case, tensors, device)
    dropped = tensors[ROW_SCALE] == 0
    out = results["out"].cpu()
    testing.assert_exact(out[dropped], tensors[0][dropped].double(), "out of dropped images")
    dout = normal(9)(out.shape).to(out)
    testing.assert_exact(results["dx"].cpu()[dropped], dout[dropped].double(), "dx of dropped images")
    tensors[0] = tensors[0].clone()
    tensors[0][dropped] *= 2
    for name, again in _kernels(case, tensors, device).items():
        if name not in ("out", "dx") and not torch.equal(again, results[name]):
            raise AssertionError(f"{name} changes with x of images whose branch is dropped")


def _check_same_bits(case: Case, shape: Shape, device: str | torch.device) -> None:
    tensors = [None if t is None else t.to(device) for t in _operands(case, shape, normal(3))]
    assert_same_bits(lambda: _kernels(case, tensors, device), device)


def _check_inf_and_nan(case: Case, shape: Shape, device: str | torch.device) -> None:
    """An Inf or NaN in one image reaches no other one."""
    tensors = _operands(case, shape, normal(4))
    clean = _kernels(case, tensors, device)
    tensors[0] = tensors[0].clone()
    tensors[0][0, 0, 0, 0], tensors[0][0, -1, -1, -1] = math.nan, math.inf
    poisoned = _kernels(case, tensors, device)
    for name in ("out", "dx"):
        if not torch.equal(poisoned[name][1:], clean[name][1:]):
            raise AssertionError(f"{name}: NaN and Inf in the first image change others")
    if not poisoned["out"][0].isnan().any():
        raise AssertionError("out: no NaN in the image that has one")


CHECKS = {
    "rounding": _check_rounding,
    "dropped images": _check_dropped_images,
    "same bits": _check_same_bits,
    "Inf and NaN": _check_inf_and_nan,
}
