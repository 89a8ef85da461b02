"""Depthwise 2-D convolution and its gradients, written out. The formulas are in this folder's README.

Half-precision inputs are computed in fp32 and rounded once at the end; fp32 and float64 in their own precision. A
weight or bias may have a wider dtype than x (the fp32 parameters of mixed-precision training): it is rounded to x's
dtype first, and its gradient comes back in its own dtype, unrounded in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dtypes import sum_dtype

Pair = tuple[int, int]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Rows or columns of the result, 0 where the kernel does not fit."""
    return max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)


def _taps(shape: tuple, kernel: Pair, stride: Pair, dilation: Pair) -> Iterator[tuple[int, int, tuple]]:
    """(i, j, index of the padded input under tap i, j for every output) for outputs of ``shape`` (N, C, OH, OW)."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * dilation[0], i * dilation[0] + (shape[2] - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (shape[3] - 1) * stride[1] + 1, stride[1])
            yield i, j, (..., rows, columns)


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """y (N, C, OH, OW) of x (N, C, H, W), weight (C, 1, KH, KW), bias (C,) or None; in x's dtype.

    ``y[n,c,h,w] = bias[c] + Σ_ij x[n, c, h·s+i·d−p, w·s+j·d−p] · weight[c,0,i,j]``
    """
    dtype = sum_dtype(x.dtype)
    kernel = weight.shape[2:]
    size = [output_size(x.shape[2 + k], kernel[k], stride[k], padding[k], dilation[k]) for k in range(2)]
    y = torch.zeros(*x.shape[:2], *size, dtype=dtype, device=x.device)
    if y.numel() > 0:
        padded = F.pad(x.to(dtype), (padding[1], padding[1], padding[0], padding[0]))
        taps = weight.to(x.dtype).to(dtype)[:, 0, :, :, None, None]  # (C, KH, KW, 1, 1)
        for i, j, under in _taps(y.shape, kernel, stride, dilation):
            y += padded[under] * taps[:, i, j]
    if bias is not None:
        y += bias.to(x.dtype).to(dtype)[:, None, None]
    return y.to(x.dtype)


def depthwise_conv2d_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (N, C, H, W), dw (C, 1, KH, KW), db (C,) from dy (N, C, OH, OW), each None where not ``wanted``.

    They come in the dtype they were summed in; whoever stores them rounds.

    - ``dx[n,c,h·s+i·d−p,w·s+j·d−p] += dy[n,c,h,w] · weight[c,0,i,j]``
    - ``dw[c,0,i,j] = Σ_nhw dy[n,c,h,w] · x[n, c, h·s+i·d−p, w·s+j·d−p]``
    - ``db[c] = Σ_nhw dy[n,c,h,w]``
    """
    dtype = sum_dtype(x.dtype)
    dy, kernel = dy.to(dtype), weight.shape[2:]
    padded = F.pad(x.to(dtype), (padding[1], padding[1], padding[0], padding[0]))
    taps = weight.to(x.dtype).to(dtype)[:, 0, :, :, None, None]  # (C, KH, KW, 1, 1)
    dpadded, dw = torch.zeros_like(padded), torch.zeros_like(weight, dtype=dtype)
    if dy.numel() > 0:
        for i, j, under in _taps(dy.shape, kernel, stride, dilation):
            if wanted[0]:
                dpadded[under] += dy * taps[:, i, j]
            if wanted[1]:
                dw[:, 0, i, j] = (dy * padded[under]).sum((0, 2, 3))
    rows = slice(padding[0], padding[0] + x.shape[2])
    columns = slice(padding[1], padding[1] + x.shape[3])
    return (
        dpadded[:, :, rows, columns] if wanted[0] else None,
        dw if wanted[1] else None,
        dy.sum((0, 2, 3)) if wanted[2] else None,
    )
