"""Launches the depthwise kernels: layouts, allocation, grids. Callable without autograd; arguments are checked above.

The kernels read and write maps that are channels_last without gaps. Other layouts are copied on the way in, and out:
for a contiguous (N, C, H, W) map that is two more passes over memory in each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registration, runtime
from ..dtypes import NAMES, name_of
from . import config, kernels

Pair = tuple[int, int]

_SUM_BLOCK = {"BLOCK_P": 32, "BLOCK_C": 32}  # partial sums are read as tiles of 4 KB, whole sectors of 32 channels
_TAPS_BLOCK_C = 128


def why_not(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    """Why no kernel takes this convolution; None where one does."""
    name = name_of(runtime.autocast_dtype(x) or x.dtype)
    n, c, h, w = x.shape
    if w + 2 * padding[1] > config.MAX_W or c * (w + 2 * padding[1]) >= 2**30 or max(n, h) >= 2**30:
        return (
            f"x has shape {tuple(x.shape)}; with padding, the kernels take W up to {config.MAX_W}, and C·W, N and H "
            f"below 2^30"
        )
    return config.why_not(name, *weight.shape[2:], stride, padding, dilation)


def depthwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """y (N, C, OH, OW) in x's memory format; stride and dilation are 1."""
    _refuse_unsupported(x, weight, stride, padding, dilation)
    kernel = weight.shape[2:]
    size = [x.shape[2 + k] + 2 * padding[k] - kernel[k] + 1 for k in range(2)]
    y = registration.empty_map(x, (*x.shape[:2], *size))
    convolve(x, weight, bias, padding, y, flip=False)
    return y


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in x's memory format, dw and db in the layouts of the parameters; of shape (0,) where not ``wanted``."""
    _refuse_unsupported(x, weight, stride, padding, dilation)
    wants_db = wanted[2] and bias is not None
    dx = registration.empty_map(x, x.shape) if wanted[0] else x.new_empty(0)
    dw, db = registration.parameter_gradients((weight, bias), wanted[1:], x)
    dy = dy.contiguous(memory_format=torch.channels_last)  # once for both passes
    if wanted[0]:
        depthwise_input_gradient(dy, weight, padding, dx)
    if wanted[1] or wants_db:
        kernel = weight.shape[2:]
        depthwise_weight_gradient(dy, x, kernel, padding, dw if wanted[1] else None, db if wants_db else None)
    return dx, dw, db


def depthwise_input_gradient(
    dy: Tensor, weight: Tensor, padding: Pair, dx: Tensor, residual: Tensor | None = None
) -> None:
    """Fills dx (N, C, H, W) with the gradient for dy (N, C, OH, OW), plus ``residual`` (N, C, H, W) where there is one.

    dy, dx and ``residual`` may each have any layout and any dtype that the kernels take; the taps are rounded to dy's.
    The sum is made in fp32 and rounded once, to dx's dtype.

    Raises:
        ValueError: ``residual`` is dx. Where strips overlap, two programs add it to the same element.
    """
    if residual is not None and residual.numel() > 0 and residual.data_ptr() == dx.data_ptr():
        raise ValueError("residual is dx; a map in memory of its own is allowed")
    # The same operator on dy, with the taps turned around.
    turned = tuple(k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True))
    convolve(dy, weight, None, turned, dx, flip=True, residual=residual)


def depthwise_weight_gradient(
    dy: Tensor, x: Tensor, kernel: Pair, padding: Pair, dw: Tensor | None, db: Tensor | None
) -> None:
    """Fills dw (C, 1, KH, KW) and db (C,), each unless it is None, in their own dtypes; dy and x agree in theirs."""
    if dy.numel() == 0:
        for gradient in (dw, db):
            if gradient is not None:
                gradient.zero_()
        return
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, dy.shape[2:], kernel
    choice = config.pick_backward_weight(
        NAMES[x.dtype], kh, kw, _is_same(kernel, padding), ow, runtime.strict_kernels()
    )
    strips = choice.strips(ow)
    images, rows = config.cut_backward_weight(runtime.arch(x), strips * _blocks(c), n, h, kh)
    parts = strips * -(-h // rows) * -(-n // images)
    with runtime.on_device(x):
        partials = torch.empty((parts, kh * kw + 1, c), dtype=torch.float32, device=x.device)
        settings = config.settings(choice, c, kh, kw)
        grid = (parts * _blocks(c),)
        launch = getattr(kernels, choice.kernel)[grid]
        if choice.pairs:
            launch(x, dy, partials, n, h, w, rows, strips, images, **settings)
        else:
            launch(
                x, dy, partials, n, h, w, oh, ow, padding[0], padding[1], rows, strips, images,
                **settings,
            )  # fmt: skip
        kernels._depthwise_sum_kernel[((kh * kw + 1) * -(-c // _SUM_BLOCK["BLOCK_C"]),)](
            partials, db if dw is None else dw, dw if db is None else db, parts,
            int(dw is not None), int(db is not None), c,
            *((0, 0, 0) if dw is None else (dw.stride(0), dw.stride(2), dw.stride(3))),
            KH=kh, KW=kw, **_SUM_BLOCK, num_warps=4, num_stages=1,
        )  # fmt: skip


def _refuse_unsupported(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> None:
    """For callers of the raw operators; the public function has asked :func:`why_not` before."""
    reason = "x is empty" if 0 in x.shape[1:] else why_not(x, weight, stride, padding, dilation)
    if reason is not None:
        raise ValueError(f"the Triton kernels do not take this depthwise convolution: {reason}")


def _blocks(c: int) -> int:
    return -(-c // config.BLOCK_C)


def _is_same(kernel: Pair, padding: Pair) -> bool:
    return tuple(padding) == (kernel[0] // 2, kernel[1] // 2)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    out: Tensor,
    flip: bool,
    residual: Tensor | None = None,
) -> None:
    """Fills ``out`` (N, C, OH, OW), of any layout, with x convolved with the weight, or the weight turned around.

    Plus ``residual`` (N, C, OH, OW), of any layout, where there is one. All of them have dtypes of their own.
    """
    if out.numel() == 0:
        return
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    y = out if out.is_contiguous(memory_format=torch.channels_last) else _empty_channels_last(out)
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, out.shape[2:], weight.shape[2:]
    choice = config.pick_forward(NAMES[x.dtype], kh, kw, _is_same((kh, kw), padding), ow, runtime.strict_kernels())
    strips = choice.strips(ow)
    columns = n * strips * _blocks(c)
    rows = config.rows_per_program(runtime.arch(x), columns, oh, kh)
    grid = (columns * -(-oh // rows),)
    with runtime.on_device(x):
        taps = _taps(x, weight, bias, choice.pairs, flip)
        settings = config.settings(choice, c, kh, kw, residual is not None)
        kernel = getattr(kernels, choice.kernel)
        added = y if residual is None else residual  # what is not read needs a type all the same
        if choice.pairs:
            kernel[grid](x, taps, added, y, h, w, rows, strips, **settings)
        else:
            kernel[grid](x, taps, added, y, h, w, oh, ow, padding[0], padding[1], rows, strips, **settings)
    if y is not out:
        out.copy_(y)


def _empty_channels_last(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: bool, flip: bool) -> Tensor:
    """The fp32 table that the forward kernels read: one row of C per tap (and per sum of taps), the bias last."""
    c, _, kh, kw = weight.shape
    count = kh * kw + 1 + (kh // 2 * kw if pairs else 0)
    taps = torch.empty((count, c), dtype=torch.float32, device=x.device)
    kernels._depthwise_taps_kernel[(count * -(-c // _TAPS_BLOCK_C),)](
        x, weight, weight if bias is None else bias, taps,
        int(bias is not None), int(flip), int(pairs), c,
        weight.stride(0), weight.stride(2), weight.stride(3), 0 if bias is None else bias.stride(0),
        KH=kh, KW=kw, BLOCK_C=_TAPS_BLOCK_C, num_warps=4, num_stages=1,
    )  # fmt: skip
    return taps
