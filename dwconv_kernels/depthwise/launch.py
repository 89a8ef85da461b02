"""Launches the depthwise kernels: layouts, allocation, grids. Callable without autograd; arguments are checked above.

The kernels read and write maps that are channels_last without gaps. Other layouts are copied on the way in, and out:
for a contiguous (N, C, H, W) map that is two more passes over memory in each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from .. import registration, runtime
from ..dtypes import NAMES, name_of
from . import config, kernels

try:
    from . import launch_tensor as tensor
except Exception as error:  # Gluon is experimental: whatever it is made of may change
    tensor, _NO_GLUON = None, f"this version of Triton has another Gluon ({error})"

Pair = tuple[int, int]

_SUM_BLOCK = {"BLOCK_P": 32, "BLOCK_C": 32}  # partial sums are read as tiles of 4 KB, whole sectors of 32 channels
_TAPS_BLOCK_C = 128


def why_not(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, begun: bool = False) -> str | None:
    """Why no kernel takes this convolution; None where one does.

    One that has ``begun``, as a forward pass, goes on, whatever strict mode and what Triton has compiled say since.
    """
    name = name_of(runtime.autocast_dtype(x) or x.dtype)
    (n, c, h, w), kernel = x.shape, weight.shape[2:]
    reason = config.why_not(name, *kernel, stride, padding, dilation, not begun and runtime.strict_kernels())
    if reason is not None:
        return reason
    wide = w + 2 * padding[1]
    rows = config.dilation_of(*kernel, dilation)[0]  # that a step from row to row goes down
    if wide > config.MAX_W or c * wide * rows >= 2**30 or max(n, h) >= 2**30:
        return (
            f"x has shape {tuple(x.shape)}; with padding, the kernels take W up to {config.MAX_W}, and C·W"
            f"{'' if rows == 1 else ' times the dilation'}, N and H below 2^30"
        )
    if config.is_too_large(*kernel):
        return _why_not_tensor(x, kernel) or (None if begun else tensor.why_refused(*kernel))
    return None


def _why_not_tensor(x: Tensor, kernel: Pair) -> str | None:
    """Why tensor cores are not to be used for these maps, or their gradients; None where they can be."""
    if tensor is None:
        return _NO_GLUON
    (n, c, h, w), (most, pixels) = x.shape, (tensor.config.MAX_ROW, tensor.config.MAX_PIXELS)
    wide, tall = w + 2 * kernel[1] + 8, h + 2 * kernel[0] + 8  # at most, of y, dx and maps in blocks
    if c * wide >= most or n * tall * wide >= pixels:
        return (
            f"x has shape {tuple(x.shape)}; kernels for tensor cores take C·W to 2^26 and N·H·W to 2^33, with margins"
        )
    return None


def _on_tensor_cores(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> bool:
    strict = runtime.strict_kernels()
    if not config.on_tensor_cores(NAMES[x.dtype], *kernel, stride, dilation, x.shape[1], strict):
        return False
    # What only tensor cores take has been looked at before the first pass.
    return config.is_too_large(*kernel) or _why_not_tensor(x, kernel) is None


def depthwise_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """y (N, C, OH, OW) in x's memory format."""
    _refuse_unsupported(x, weight, stride, padding, dilation)
    kernel = weight.shape[2:]
    size = [(x.shape[2 + k] + 2 * padding[k] - dilation[k] * (kernel[k] - 1) - 1) // stride[k] + 1 for k in range(2)]
    y = registration.empty_map(x, (*x.shape[:2], *size))
    if _has(stride):
        _strided_map(0, x, weight, bias, stride, padding, y)
    else:
        convolve(x, weight, bias, padding, y, flip=False, dilation=dilation)
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
    if wanted[0] and _has(stride):
        _strided_map(1, dy, weight, None, stride, padding, dx)
    elif wanted[0]:
        depthwise_input_gradient(dy, weight, padding, dx, dilation=dilation)
    if wanted[1] or wants_db:
        wanted_of = (dw if wanted[1] else None, db if wants_db else None)
        depthwise_weight_gradient(dy, x, weight.shape[2:], padding, *wanted_of, dilation=dilation, stride=stride)
    return dx, dw, db


def depthwise_input_gradient(
    dy: Tensor, weight: Tensor, padding: Pair, dx: Tensor, residual: Tensor | None = None, dilation: Pair = (1, 1)
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
    turned = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
    convolve(dy, weight, None, turned, dx, flip=True, residual=residual, dilation=dilation)


def depthwise_weight_gradient(
    dy: Tensor,
    x: Tensor,
    kernel: Pair,
    padding: Pair,
    dw: Tensor | None,
    db: Tensor | None,
    dilation: Pair = (1, 1),
    stride: Pair = (1, 1),
) -> None:
    """Fills dw (C, 1, KH, KW) and db (C,), each unless it is None, in their own dtypes; dy and x agree in theirs."""
    if dy.numel() == 0:
        for gradient in (dw, db):
            if gradient is not None:
                gradient.zero_()
        return
    dy = dy.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    if not _weight_gradient_tensor(dy, x, kernel, padding, dw, db, dilation, stride):
        _weight_gradient_fma(dy, x, kernel, padding, dw, db, dilation, stride)


def _weight_gradient_tensor(dy, x, kernel, padding, dw, db, dilation, stride) -> bool:
    """Has it been done, on tensor cores, or by PyTorch where Triton compiles no kernel and no other is left?"""
    if not _on_tensor_cores(x, kernel, stride, dilation):
        return False
    try:
        tensor.weight_gradient(dy, x, kernel, padding, dw, db)
    except tensor.Refused:
        if not config.is_too_large(*kernel):
            return False
        if dw is not None:
            dw.copy_(conv2d_weight(x, (x.shape[1], 1, *kernel), dy, padding=tuple(padding), groups=x.shape[1]))
        if db is not None:
            db.copy_(dy.sum((0, 2, 3), dtype=torch.float32))
    return True


def _weight_gradient_fma(dy, x, kernel, padding, dw, db, dilation, stride) -> None:
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, dy.shape[2:], kernel
    dilation = config.dilation_of(kh, kw, dilation)
    if _has(stride):
        choice, tall = config.pick_strided(stride)[2], -(-kh // stride[0])
        high = oh + tall - 1  # groups of rows of x, see kernels_strided.py
    else:
        same = _is_same(kernel, padding, dilation)
        choice = config.pick_backward_weight(NAMES[x.dtype], kh, kw, same, ow, runtime.strict_kernels(), dilation)
        high, tall = -(-h // dilation[0]), kh
    strips, groups = choice.strips(ow), choice.groups(kh)
    columns = strips * choice.phases * groups * _blocks(c)
    images, rows = config.cut_backward_weight(runtime.arch(x), columns, n, high, tall)
    parts = strips * choice.phases * -(-high // rows) * -(-n // images)
    with runtime.on_device(x):
        partials = torch.empty((parts, kh * kw + groups, c), dtype=torch.float32, device=x.device)
        settings = config.settings(choice, c, kh, kw)
        launch = getattr(kernels, choice.kernel)[(parts * groups * _blocks(c),)]
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
            KH=kh, KW=kw, GROUPS=groups, **_SUM_BLOCK, num_warps=4, num_stages=1,
        )  # fmt: skip


def _has(stride: Pair) -> bool:
    return tuple(stride) != (1, 1)


def _strided_map(
    which: int, source: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, out: Tensor
) -> None:
    """Fills ``out``, of any layout: y of x (``which`` is 0), or dx of dy (1)."""
    if out.numel() == 0:
        return
    source = source.contiguous(memory_format=torch.channels_last)
    result = out if out.is_contiguous(memory_format=torch.channels_last) else _empty_channels_last(out)
    (h, w), (oh, ow) = (t.shape[2:] for t in ((source, out), (out, source))[which])
    n, c, kh, kw = *source.shape[:2], *weight.shape[2:]
    choice = config.pick_strided(stride)[which]
    # Rows and columns that programs share out: of y, or groups of those of dx, see kernels_strided.py.
    high, wide = oh, ow
    if which == 1:
        high, wide = ((s - 1 + p) // d + 1 - p // d for s, p, d in zip((h, w), padding, stride, strict=True))
    strips = choice.strips(wide)
    columns = n * strips * _blocks(c)
    rows = config.rows_per_program(runtime.arch(source), columns, high, -(-kh // stride[0]))
    with runtime.on_device(source):
        taps = _taps(source, weight, bias, pairs=False, flip=False)
        getattr(kernels, choice.kernel)[(columns * -(-high // rows),)](
            source, taps, result, h, w, oh, ow, padding[0], padding[1], rows, strips,
            **config.settings(choice, c, kh, kw),
        )  # fmt: skip
    if result is not out:
        out.copy_(result)


def _refuse_unsupported(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> None:
    """For callers of the raw operators; the public function has asked :func:`why_not` before."""
    reason = "x is empty" if 0 in x.shape[1:] else why_not(x, weight, stride, padding, dilation, begun=True)
    if reason is not None:
        raise ValueError(f"the Triton kernels do not take this depthwise convolution: {reason}")


def _blocks(c: int) -> int:
    return -(-c // config.BLOCK_C)


def _is_same(kernel: Pair, padding: Pair, dilation: Pair) -> bool:
    return tuple(padding) == (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    out: Tensor,
    flip: bool,
    residual: Tensor | None = None,
    dilation: Pair = (1, 1),
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
    if not _convolve_tensor(x, weight, bias, padding, y, flip, residual, dilation):
        _convolve_fma(x, weight, bias, padding, y, flip, residual, dilation)
    if y is not out:
        out.copy_(y)


def _convolve_tensor(x, weight, bias, padding, y, flip, residual, dilation) -> bool:
    """Has it been done, on tensor cores, or by PyTorch where Triton compiles no kernel and no other is left?"""
    kernel = weight.shape[2:]
    if not _on_tensor_cores(x, kernel, (1, 1), dilation):
        return False
    try:
        tensor.convolve(x, weight, bias, padding, y, flip, residual)
    except tensor.Refused:
        if not config.is_too_large(*kernel):
            return False
        weight = (weight.flip(2, 3) if flip else weight).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        result = F.conv2d(x, weight, bias, padding=tuple(padding), groups=x.shape[1])
        y.copy_(result if residual is None else result.float() + residual)
    return True


def _convolve_fma(x, weight, bias, padding, y, flip, residual, dilation) -> None:
    (n, c, h, w), (oh, ow), (kh, kw) = x.shape, y.shape[2:], weight.shape[2:]
    dilation = config.dilation_of(kh, kw, dilation)
    same = _is_same((kh, kw), padding, dilation)
    choice = config.pick_forward(NAMES[x.dtype], kh, kw, same, ow, runtime.strict_kernels(), dilation)
    strips, high = choice.strips(ow), -(-oh // dilation[0])
    columns = n * strips * choice.phases * _blocks(c)
    rows = config.rows_per_program(runtime.arch(x), columns, high, kh)
    grid = (columns * -(-high // rows),)
    with runtime.on_device(x):
        taps = _taps(x, weight, bias, choice.pairs, flip)
        settings = config.settings(choice, c, kh, kw, residual is not None)
        kernel = getattr(kernels, choice.kernel)
        added = y if residual is None else residual  # what is not read needs a type all the same
        if choice.pairs:
            kernel[grid](x, taps, added, y, h, w, rows, strips, **settings)
        else:
            kernel[grid](x, taps, added, y, h, w, oh, ow, padding[0], padding[1], rows, strips, **settings)


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
