"""Launches a ConvNeXt block: the convolution's kernels, then those of the tail. Backward: launch_backward.py.

The tail reads and writes maps as rows: (N·H·W, C), channels side by side. Maps of other layouts are copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registration, runtime
from ..dtypes import NAMES, name_of
from ..norm_linear import config as norm_linear_config
from ..norm_linear import launch as norm_linear
from . import config, kernels, launch_backward, launch_common
from .launch_common import (
    Call,
    as_rows,
    call_of,
    convolved,
    given,
    grn_launch,
    grn_scales,
    grn_sums,
    pointer,
)
from .reference import Parameters, block_dtype, keeps_u

block_backward = launch_backward.block_backward  # op.py finds all launchers in this module


def why_not(x: Tensor, p: Parameters, row_scale: Tensor | None) -> str | None:
    """Why no kernel takes this block; None where they do."""
    reason = launch_common.why_not_sizes(x, p, runtime.autocast_dtype(x) or x.dtype)
    for parameter in (*p, row_scale):  # under autocast, they have dtypes of their own
        if reason is None and parameter is not None and parameter.dtype not in NAMES:
            return f"a parameter is {name_of(parameter.dtype)}; the kernels take bfloat16, float16 and float32"
    return reason


def block_forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (N, C, H, W) in x's memory format, and what is saved: y, mean, rstd, u, of shape (0,) where it is not."""
    *_, memory, dtype = arguments
    out, saved = _forward(x, *arguments)
    kept = memory != "lean"
    y, mean, rstd, u = saved if kept else (None,) * 4
    empty = lambda t, dtype: x.new_empty(0, dtype=dtype) if t is None else t  # noqa: E731
    return out, empty(y, dtype), empty(mean, torch.float32), empty(rstd, torch.float32), empty(u, dtype)


def block_inference(x: Tensor, *arguments) -> Tensor:
    """out alone; arguments as of :func:`block_forward`."""
    return _forward(x, *arguments)[0]


def _forward(x: Tensor, *arguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    *parameters, row_scale, grn_weight, grn_bias, eps, memory, dtype = arguments
    p = Parameters(*parameters, grn_weight, grn_bias)
    call = call_of(x, p, row_scale, dtype)
    n, c, h, w = x.shape
    kept = memory != "lean"
    out = registration.empty_map(x, x.shape, block_dtype(x, p.layer_scale, dtype))
    u = x.new_empty((n, h, w, call.d), dtype=dtype) if keeps_u(memory, c) else None
    if x.numel() == 0:
        mean, rstd = (x.new_empty((n, h, w), dtype=torch.float32) for _ in range(2))
        return out, (x.new_empty((n, h, w, c), dtype=dtype), mean, rstd, u)
    with runtime.on_device(x):
        y = convolved(x, call.p, dtype)
        in_place = out.is_contiguous(memory_format=torch.channels_last)
        result = out if in_place else torch.empty_like(out, memory_format=torch.channels_last)
        mean, rstd = _tail(call, as_rows(x), y, as_rows(result), eps, kept, u)
        if not in_place:
            out.copy_(result)
    return out, (y, mean.view(n, h, w), rstd.view(n, h, w), u) if kept else (None,) * 4


def _tail(call: Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, u: Tensor | None):
    """Fills out (rows, C); the statistics of y, where they are ``kept``."""
    p, d = call.p, call.d
    tile = None
    if p.grn_weight is None and u is None:
        tile = config.resident(call.name, call.c, d, call.arch, call.rows)
        if tile is not None:
            return _resident_tail(call, x, y, out, eps, kept, tile)
        tile = config.fused_forward(call.name, call.c, d, call.arch, call.few)
    if tile is not None:
        return _fused_tail(call, x, y, out, eps, kept, tile)
    h, mean, rstd = norm_linear.norm_linear_forward(
        y, p.norm_weight, p.norm_bias, p.fc1_weight, p.fc1_bias, eps, "gelu", call.dtype, u
    )
    h = h.view(-1, d)
    if p.grn_weight is not None:
        scale = grn_scales(call, *grn_sums(call, h, None))[-1]
        grn_launch(call, kernels._block_grn_apply_kernel, h, scale, p.grn_bias, call.pixels)
    _out(call, h, x, out)
    return mean, rstd


def _fused_arguments(call: Call, x: Tensor, y: Tensor, out: Tensor, kept: bool):
    """Arguments and constants that the two kernels of the whole tail have in common; the statistics to fill."""
    p = call.p
    statistics = [y.new_empty(call.rows, dtype=torch.float32) if kept else y for _ in range(2)]
    arguments = (
        y, x, pointer(p.norm_weight, y), pointer(p.norm_bias, y), norm_linear.dense(p.fc1_weight, call.dtype),
        pointer(p.fc1_bias, y), norm_linear.dense(p.fc2_weight, call.dtype), pointer(p.fc2_bias, y),
        pointer(p.layer_scale, y), pointer(call.row_scale, y), out, *statistics, call.rows, call.pixels,
    )  # fmt: skip
    constants = given(call, "norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale", "row_scale")
    return arguments, constants, statistics


def _fused_tail(call: Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, tile):
    arguments, constants, statistics = _fused_arguments(call, x, y, out, kept)
    c0, c1 = norm_linear_config.split(call.c)
    ahead = config.ahead(call.arch)
    kernels._block_fwd_kernel[(-(-call.rows // tile.m),)](
        *arguments, call.d, eps,
        C=call.c, D=call.d, **constants, STORE_STATISTICS=kept, AHEAD=ahead,
        K0=config.whole(call.c) if ahead else c0, K1=0 if ahead else c1, N0=c0, N1=c1, BLOCK_P=tile.m,
        BLOCK_D=tile.n, **tile.options(),
    )  # fmt: skip
    return statistics


def _resident_tail(call: Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, tile):
    arguments, constants, statistics = _fused_arguments(call, x, y, out, kept)
    c0, c1 = norm_linear_config.split(call.c)
    programs = min(config.multiprocessors(call.arch), -(-call.rows // tile.m))
    kernels._block_fwd_resident_kernel[(programs,)](
        *arguments, programs, eps,
        C=call.c, D=call.d, **constants, STORE_STATISTICS=kept, C0=c0, C1=c1, BLOCK_P=tile.m, BLOCK_D=tile.n,
        **tile.options(),
    )  # fmt: skip
    return statistics


def _out(call: Call, h: Tensor, x: Tensor, out: Tensor) -> None:
    """Fills out = x + ρ·λ∘(h·W2ᵀ + b2)."""
    p, (tf32, precision) = call.p, call.precision()
    few = norm_linear_config.few_rows(call.rows, call.c, call.arch)
    tile = norm_linear_config.product(call.name, call.d, call.c, call.arch, few, tf32)
    kernels._block_out_kernel[(-(-call.rows // tile.m) * -(-call.c // tile.n),)](
        h, norm_linear.dense(p.fc2_weight, call.dtype), pointer(p.fc2_bias, h), pointer(p.layer_scale, h),
        pointer(call.row_scale, h), x, out, call.rows, call.pixels, call.d,
        C=call.c, D=call.d, **given(call, "fc2_bias", "layer_scale", "row_scale"), BLOCK_P=tile.m, BLOCK_C=tile.n,
        BLOCK_D=tile.k, PRECISION=precision, **tile.options(),
    )  # fmt: skip
