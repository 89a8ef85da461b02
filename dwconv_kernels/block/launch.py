"""Launches a ConvNeXt block, forward and backward: the convolution's kernels, then those of the tail.

The tail reads and writes maps as rows: (N·H·W, C), channels side by side. Maps of other layouts are copied.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import registration, runtime
from ..depthwise import launch as depthwise
from ..dtypes import NAMES, name_of
from ..norm_linear import config as norm_linear_config
from ..norm_linear import launch as norm_linear
from . import config, kernels
from .reference import GRN_EPS, Parameters, block_dtype, keeps_u, same_padding

_SCALED = {"BLOCK_D": 64, "BLOCK_C": 64}
_GRADIENT = {"BLOCK_P": 32, "BLOCK_C": 128}
_FINISH = {"BLOCK_D": 32, "BLOCK_C": 32}
_SCALE_SUM = {"BLOCK_P": 32, "BLOCK_C": 32}
_GRN = {"BLOCK_P": 32, "BLOCK_D": 64}
_SMALL = {"num_warps": 4, "num_stages": 1}


def why_not(x: Tensor, p: Parameters, row_scale: Tensor | None) -> str | None:
    """Why no kernel takes this block; None where they do."""
    reason = _why_not(x, p, runtime.autocast_dtype(x) or x.dtype)
    for parameter in (*p, row_scale):  # under autocast, they have dtypes of their own
        if reason is None and parameter is not None and parameter.dtype not in NAMES:
            return f"a parameter is {name_of(parameter.dtype)}; the kernels take bfloat16, float16 and float32"
    return reason


def _why_not(x: Tensor, p: Parameters, computed: torch.dtype) -> str | None:
    n, c, h, w = x.shape
    if n * h * w >= 2**30:
        return f"x has shape {tuple(x.shape)}; the kernels take fewer than 2^30 pixels"
    return config.why_not(name_of(x.dtype), name_of(computed), c, p.fc1_weight.shape[0]) or depthwise.why_not(
        x, p.dw_weight, (1, 1), same_padding(p.dw_weight), (1, 1)
    )


_TAKEN = registration.Memo()  # sizes and dtypes of blocks that were found to be fine


class _Call(NamedTuple):
    """What forward and backward pass share: sizes, parameters, and the dtype that is computed in."""

    p: Parameters
    row_scale: Tensor | None
    rows: int
    c: int
    d: int
    pixels: int  # of an image
    arch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return NAMES[self.dtype]

    @property
    def few(self) -> bool:
        return config.few_rows(self.rows, self.arch)

    def precision(self) -> tuple[bool, str]:
        tf32 = self.dtype == torch.float32 and runtime.tf32()
        return tf32, "tf32" if tf32 else "ieee"


def _call(x: Tensor, p: Parameters, row_scale: Tensor | None, dtype: torch.dtype) -> _Call:
    n, c, h, w = x.shape
    sizes = x.shape, p.dw_weight.shape, p.fc1_weight.shape, x.dtype, dtype
    if sizes not in _TAKEN:  # for callers of the raw operators; the public function has asked why_not before
        reason = _why_not(x, p, dtype)
        if reason is not None:
            raise ValueError(f"the Triton kernels do not take this block: {reason}")
        _TAKEN.remember(sizes, True)
    if not all(t is None or t.is_contiguous() for t in p):
        p = Parameters(*(None if t is None else t.contiguous() for t in p))
    row_scale = None if row_scale is None else row_scale.contiguous()
    return _Call(p, row_scale, n * h * w, c, p.fc1_weight.shape[0], h * w, runtime.arch(x), dtype)


def _given(call: _Call, *names: str) -> dict[str, bool]:
    """HAS_… of those parameters, not to be changed."""
    return _having(names, tuple([_parameter(call, name) is not None for name in names]))


def _parameter(call: _Call, name: str) -> Tensor | None:
    return call.row_scale if name == "row_scale" else getattr(call.p, name)


@lru_cache(maxsize=4096)
def _having(names: tuple[str, ...], given: tuple[bool, ...]) -> dict[str, bool]:
    return {f"HAS_{name.upper()}": there for name, there in zip(names, given, strict=True)}


def _or(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A pointer that is not read stands for what is not there."""
    return like if tensor is None else tensor


def _map(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (N·H·W, C) as the channels_last map (N, C, H, W) that they are, x's size."""
    n, c, h, w = x.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """A map as rows, without a copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def _convolved(x: Tensor, p: Parameters, dtype: torch.dtype) -> Tensor:
    """y (N, H, W, C) in ``dtype``."""
    n, c, h, w = x.shape
    y = torch.empty((n, h, w, c), dtype=dtype, device=x.device)
    depthwise.convolve(x.to(dtype), p.dw_weight, p.dw_bias, same_padding(p.dw_weight), y.permute(0, 3, 1, 2), False)
    return y


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
    call = _call(x, p, row_scale, dtype)
    n, c, h, w = x.shape
    kept = memory != "lean"
    out = registration.empty_map(x, x.shape, block_dtype(x, p.layer_scale, dtype))
    u = x.new_empty((n, h, w, call.d), dtype=dtype) if keeps_u(memory, c) else None
    if x.numel() == 0:
        mean, rstd = (x.new_empty((n, h, w), dtype=torch.float32) for _ in range(2))
        return out, (x.new_empty((n, h, w, c), dtype=dtype), mean, rstd, u)
    with runtime.on_device(x):
        y = _convolved(x, call.p, dtype)
        in_place = out.is_contiguous(memory_format=torch.channels_last)
        result = out if in_place else torch.empty_like(out, memory_format=torch.channels_last)
        mean, rstd = _tail(call, _rows(x), y, _rows(result), eps, kept, u)
        if not in_place:
            out.copy_(result)
    return out, (y, mean.view(n, h, w), rstd.view(n, h, w), u) if kept else (None,) * 4


def _tail(call: _Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, u: Tensor | None):
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
        scale = _grn_scales(call, *_grn_sums(call, h, None))[-1]
        _grn_launch(call, kernels._block_grn_apply_kernel, h, scale, p.grn_bias, call.pixels)
    _out(call, h, x, out)
    return mean, rstd


def _fused_arguments(call: _Call, x: Tensor, y: Tensor, out: Tensor, kept: bool):
    """Arguments and constants that the two kernels of the whole tail have in common; the statistics to fill."""
    p = call.p
    statistics = [y.new_empty(call.rows, dtype=torch.float32) if kept else y for _ in range(2)]
    arguments = (
        y, x, _or(p.norm_weight, y), _or(p.norm_bias, y), norm_linear.dense(p.fc1_weight, call.dtype),
        _or(p.fc1_bias, y), norm_linear.dense(p.fc2_weight, call.dtype), _or(p.fc2_bias, y), _or(p.layer_scale, y),
        _or(call.row_scale, y), out, *statistics, call.rows, call.pixels,
    )  # fmt: skip
    constants = _given(call, "norm_weight", "norm_bias", "fc1_bias", "fc2_bias", "layer_scale", "row_scale")
    return arguments, constants, statistics


def _fused_tail(call: _Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, tile):
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


def _resident_tail(call: _Call, x: Tensor, y: Tensor, out: Tensor, eps: float, kept: bool, tile):
    arguments, constants, statistics = _fused_arguments(call, x, y, out, kept)
    c0, c1 = norm_linear_config.split(call.c)
    programs = min(config.multiprocessors(call.arch), -(-call.rows // tile.m))
    kernels._block_fwd_resident_kernel[(programs,)](
        *arguments, programs, eps,
        C=call.c, D=call.d, **constants, STORE_STATISTICS=kept, C0=c0, C1=c1, BLOCK_P=tile.m, BLOCK_D=tile.n,
        **tile.options(),
    )  # fmt: skip
    return statistics


def _out(call: _Call, h: Tensor, x: Tensor, out: Tensor) -> None:
    """Fills out = x + ρ·λ∘(h·W2ᵀ + b2)."""
    p, (tf32, precision) = call.p, call.precision()
    few = norm_linear_config.few_rows(call.rows, call.c, call.arch)
    tile = norm_linear_config.product(call.name, call.d, call.c, call.arch, few, tf32)
    kernels._block_out_kernel[(-(-call.rows // tile.m) * -(-call.c // tile.n),)](
        h, norm_linear.dense(p.fc2_weight, call.dtype), _or(p.fc2_bias, h), _or(p.layer_scale, h),
        _or(call.row_scale, h), x, out, call.rows, call.pixels, call.d,
        C=call.c, D=call.d, **_given(call, "fc2_bias", "layer_scale", "row_scale"), BLOCK_P=tile.m, BLOCK_C=tile.n,
        BLOCK_D=tile.k, PRECISION=precision, **tile.options(),
    )  # fmt: skip


# Global response normalisation. What is computed by PyTorch's operators here are (N, D) numbers.


def _grn_sums(call: _Call, a: Tensor, dh: Tensor | None) -> Tensor:
    """Σ a² of each image (1, N, D). With dh, also Σ dh·a and Σ dh (3, N, D); a is then u without its bias."""
    images = call.rows // call.pixels
    sums = a.new_empty((1 if dh is None else 3, images, call.d), dtype=torch.float32)
    kernels._block_grn_sums_kernel[(images * -(-call.d // _GRN["BLOCK_D"]),)](
        a, _or(dh, a), _or(call.p.fc1_bias, a), sums, call.pixels, images,
        D=call.d, BACKWARD=dh is not None, **_given(call, "fc1_bias"), **_GRN, **_SMALL,
    )  # fmt: skip
    return sums


def _grn_scales(call: _Call, squares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, its mean + ε, R and s = 1 + w∘R of each image, from Σ a² (N, D)."""
    norm = squares.sqrt()
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    relative = norm / mean
    return norm, mean, relative, (1 + relative * call.p.grn_weight.float()).contiguous()


def _grn_launch(call: _Call, kernel, *arguments, **constants) -> None:
    images, blocks = call.rows // call.pixels, -(-call.d // _GRN["BLOCK_D"])
    grid = (images * -(-call.pixels // _GRN["BLOCK_P"]) * blocks,)
    kernel[grid](*arguments, D=call.d, **constants, **_GRN, **_SMALL)


def block_backward(dout: Tensor, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    """dx in x's memory format and the gradients of all :class:`Parameters`; of shape (0,) where not ``wanted``."""
    *parameters, row_scale, grn_weight, grn_bias, y, mean, rstd, u, eps, memory, dtype, wanted = arguments
    p = Parameters(*parameters, grn_weight, grn_bias)
    call = _call(x, p, row_scale, dtype)
    wanted = [need and t is not None for need, t in zip(wanted, (x, *p), strict=True)]
    dx = registration.empty_map(x, x.shape) if wanted[0] else x.new_empty(0)
    gradients = Parameters(*registration.parameter_gradients(p, wanted[1:], x))
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return dx, *gradients
    with runtime.on_device(x):
        if memory == "lean":
            y = _convolved(x, call.p, dtype)
            mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
            norm_linear.normalise(norm_linear.as_rows(y), None, None, mean, rstd, eps, None, None)
        saved = y, mean, rstd, u if keeps_u(memory, call.c) else None
        dy = _Tail(call, dout, saved, Parameters(*wanted[1:]), any(wanted[:3])).gradients(gradients)
        if any(wanted[:3]):
            _convolution_gradients(call, dout, x, _map(dy, x), wanted, dx, gradients)
    return dx, *gradients


def _convolution_gradients(call: _Call, dout, x, dy, wanted, dx, gradients: Parameters) -> None:
    padding = same_padding(call.p.dw_weight)
    if wanted[0]:
        depthwise.depthwise_input_gradient(dy, call.p.dw_weight, padding, dx, residual=dout)
    if wanted[1] or wanted[2]:
        depthwise.depthwise_weight_gradient(
            dy, x.to(call.dtype), tuple(call.p.dw_weight.shape[2:]), padding,
            gradients.dw_weight if wanted[1] else None, gradients.dw_bias if wanted[2] else None,
        )  # fmt: skip


class _Tail:
    """The backward pass of a block's tail: dy, and the gradients of its parameters."""

    def __init__(self, call: _Call, dout: Tensor, saved, wanted: Parameters, wants_dy: bool):
        self.call, self.wanted, self.wants_dy = call, wanted, wants_dy
        self.y, self.mean, self.rstd, self.u = saved
        p = call.p
        below = (wants_dy, wanted.norm_weight, wanted.norm_bias, wanted.fc1_weight, wanted.fc1_bias)
        self.needs_h = wanted.fc2_weight or wanted.layer_scale
        self.needs_du = any(below)
        self.needs_grn = wanted.grn_weight or wanted.grn_bias
        self.d, self.sums = self._gradient(dout)
        self.first = norm_linear.Backward(
            self.y.view(call.rows, call.c), self.mean.view(-1), self.rstd.view(-1),
            (p.norm_weight, p.norm_bias, p.fc1_weight, p.fc1_bias), call.dtype, below,
        )  # fmt: skip
        self.h = None

    def _gradient(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        """d (rows, C), and the sums of its columns, in parts."""
        call, wanted = self.call, self.wanted
        rows = _rows(dout)
        sums = call.p.fc2_bias is not None and (wanted.fc2_bias or wanted.layer_scale)
        store = call.row_scale is not None or rows.dtype != call.dtype or rows.data_ptr() % 16 != 0
        d = torch.empty_like(rows, dtype=call.dtype) if store else rows
        blocks = -(-call.c // _GRADIENT["BLOCK_C"])
        part = config.rows_per_part(call.rows, blocks, call.arch)
        partials = rows.new_empty((-(-call.rows // part), call.c), dtype=torch.float32)
        if store or sums:
            kernels._block_bwd_gradient_kernel[(len(partials) * blocks,)](
                rows, _or(call.row_scale, rows), d, partials, call.rows, call.pixels, part,
                C=call.c, **_given(call, "row_scale"), STORE=store, SUMS=sums, **_GRADIENT, **_SMALL,
            )  # fmt: skip
        return d, partials

    def gradients(self, gradients: Parameters) -> Tensor | None:
        """Fills those of the tail's parameters; dy (rows, C), where it is wanted."""
        call, first = self.call, self.first
        dy = self.y.new_empty((call.rows, call.c)) if self.wants_dy else None
        if self.needs_du or self.needs_h or self.needs_grn:
            self._hidden(dy, gradients)
        if self.needs_du:
            if any(first.wanted[1:]):
                first.parameter_gradients(
                    gradients.norm_weight, gradients.norm_bias, gradients.fc1_weight, gradients.fc1_bias
                )
            first.du = first.xhat = None  # so that its memory can be used
        self._second(gradients)
        return dy

    def _hidden(self, dy: Tensor | None, gradients: Parameters) -> None:
        """h and du, and dy where it is wanted."""
        call, first = self.call, self.first
        scaled, unscale = self._scaled()
        tile = None
        if self.call.p.grn_weight is None and self.u is None and self.wants_dy:
            tile = config.fused_backward(call.name, call.c, call.d, call.arch, call.few)
        if tile is not None:
            self._rows(dy, scaled, unscale, tile)
            return
        if call.p.grn_weight is not None:
            self._hidden_with_grn(scaled, unscale, gradients)
        else:
            self._hidden_channels(scaled, unscale)
        if self.wants_dy:
            first.input_gradient(dy)

    def _scaled(self) -> tuple[Tensor, Tensor]:
        """(λ∘W2)ᵀ (D, C); in fp16, times a power of two, and the reciprocal of that."""
        call, p = self.call, self.call.p
        fc2 = norm_linear.dense(p.fc2_weight, call.dtype)
        scaled = fc2.new_empty((call.d, call.c))
        unscale = fc2.new_empty(1, dtype=torch.float32)
        blocks = -(-call.d // _SCALED["BLOCK_D"]) * -(-call.c // _SCALED["BLOCK_C"])
        kernels._block_scaled_kernel[(blocks,)](
            fc2, _or(p.layer_scale, fc2), scaled, unscale,
            C=call.c, D=call.d, **_given(call, "layer_scale"), BALANCED=self._balanced(), **_SCALED, **_SMALL,
        )  # fmt: skip
        return scaled, unscale

    def _balanced(self) -> bool:
        return self.call.dtype == torch.float16 and self.call.p.layer_scale is not None

    def _empty_hidden(self) -> Tensor:
        return self.d.new_empty((self.call.rows, self.call.d))

    def _rows(self, dy: Tensor, scaled: Tensor, unscale: Tensor, tile) -> None:
        """dy, h, du and x̂, each made once, of blocks of rows."""
        call, first, p = self.call, self.first, self.call.p
        parameters = any(first.wanted[1:])
        self.h = self._empty_hidden() if self.needs_h else self.d
        first.du = self._empty_hidden() if first.needs_g else self.d
        first.xhat = torch.empty_like(self.d) if first.needs_g else self.d
        blocks = -(-call.rows // tile.m)
        first.partials = first.mean.new_empty((blocks, call.d) if parameters else 0)
        c0, c1 = norm_linear_config.split(call.c)
        kernels._block_bwd_rows_kernel[(blocks,)](
            self.y, self.d, _or(p.norm_weight, self.y), _or(p.norm_bias, self.y), first.weight,
            _or(p.fc1_bias, self.y), scaled, unscale, _or(call.row_scale, self.y), first.mean, first.rstd, dy,
            first.xhat, self.h, first.du, first.partials, call.rows, call.pixels,
            C=call.c, D=call.d, **_given(call, "norm_weight", "norm_bias", "fc1_bias", "row_scale"),
            BALANCED=self._balanced(), STORE_XHAT=first.needs_g, STORE_H=self.needs_h, STORE_DU=first.needs_g,
            PARTIALS=parameters, C0=c0, C1=c1, BLOCK_P=tile.m, BLOCK_D=tile.n, **tile.options(),
        )  # fmt: skip

    def _hidden_channels(self, scaled: Tensor, unscale: Tensor) -> None:
        """h and du, of blocks of rows and hidden channels."""
        call, first, p = self.call, self.first, self.call.p
        (tf32, precision), parameters = call.precision(), any(first.wanted[1:])
        few = norm_linear_config.few_rows(call.rows, call.d, call.arch)
        tile = config.hidden(call.name, call.c, call.d, call.arch, few, self.u is not None, tf32)
        normed = first.normalised(self.u is None)
        self.h = self._empty_hidden() if self.needs_h else self.d
        first.du = self._empty_hidden()
        blocks = first.allocate_sums(tile.m, tile.n, parameters) * first.column_blocks
        kernels._block_bwd_hidden_kernel[(blocks,)](
            _or(normed, self.d), first.weight, _or(p.fc1_bias, self.d), _or(self.u, self.d), self.d, scaled, unscale,
            _or(call.row_scale, self.d), first.vectors() if first.sums else first.mean, self.h, first.du,
            first.row_sums, first.partials, call.rows, call.pixels, call.c,
            C=call.c, D=call.d, **_given(call, "fc1_bias", "row_scale"), BALANCED=self._balanced(),
            GIVEN_PRODUCT=self.u is not None, SUMS=first.sums, PARTIALS=parameters, STORE_H=self.needs_h, BLOCK_P=tile.m,
            BLOCK_D=tile.n, BLOCK_C=tile.k, PRECISION=precision, **tile.options(),
        )  # fmt: skip

    def _hidden_with_grn(self, scaled: Tensor, unscale: Tensor, gradients: Parameters) -> None:
        """The same through the norm over an image: its sums take u and dh of all pixels first."""
        call, first, p = self.call, self.first, self.call.p
        parameters = any(first.wanted[1:])
        u = self._empty_hidden()
        normed = first.normalised(self.u is None)
        if self.u is None:
            norm_linear.product(normed, first.weight, None, u)
        else:
            u.copy_(self.u.view_as(u))  # what was kept stays what it is, for a second backward pass
        dh = self._empty_hidden()
        norm_linear.product(self.d, scaled, None, dh, factor=unscale if self._balanced() else None)
        squares, products, totals = _grn_sums(call, u, dh)
        norm, mean, relative, scale = _grn_scales(call, squares)
        for wanted, gradient, value in (
            (self.wanted.grn_weight, gradients.grn_weight, products * relative),
            (self.wanted.grn_bias, gradients.grn_bias, totals),
        ):
            if wanted:
                gradient.copy_(value.sum(0))
        t = products * p.grn_weight.float()
        dnorm = t / mean - (t * norm).mean(-1, keepdim=True) / mean.square()
        direction = torch.where(norm > 0, dnorm / norm, 0.0).contiguous()
        images = call.rows // call.pixels
        block_p, block_d = _GRN["BLOCK_P"], _GRN["BLOCK_D"]
        first.allocate_sums(block_p, block_d, False)
        if parameters:
            first.partials = first.mean.new_empty((images * -(-call.pixels // block_p), call.d))
        _grn_launch(
            call, kernels._block_grn_bwd_kernel, u, dh, scale, direction, p.grn_bias, _or(p.fc1_bias, u),
            first.vectors() if first.sums else first.mean, first.row_sums, first.partials, call.pixels, images,
            **_given(call, "fc1_bias"), SUMS=first.sums, PARTIALS=parameters,
        )  # fmt: skip
        self.h, first.du = u, dh

    def _second(self, gradients: Parameters) -> None:
        """dW2, dλ and db2."""
        call, p, wanted = self.call, self.call.p, self.wanted
        blocks_d, blocks_c = -(-call.d // _FINISH["BLOCK_D"]), -(-call.c // _FINISH["BLOCK_C"])
        scale_parts = self.sums.new_empty((blocks_d if wanted.layer_scale else 0, call.c))
        fc2 = norm_linear.dense(p.fc2_weight, call.dtype)
        if self.needs_h:
            parts = norm_linear.weight_parts(self.h, self.d)
            kernels._block_bwd_finish_kernel[(blocks_d * blocks_c,)](
                parts, fc2, _or(p.layer_scale, fc2), gradients.fc2_weight, scale_parts, len(parts),
                C=call.c, D=call.d, **_given(call, "layer_scale"), STORE_DFC2=wanted.fc2_weight,
                SCALE_PARTS=wanted.layer_scale, **_FINISH, **_SMALL,
            )  # fmt: skip
        if wanted.layer_scale or wanted.fc2_bias:
            kernels._block_bwd_scale_sum_kernel[(blocks_c,)](
                scale_parts, self.sums, fc2, _or(p.fc2_bias, fc2), _or(p.layer_scale, fc2), gradients.layer_scale,
                gradients.fc2_bias, len(scale_parts), len(self.sums),
                C=call.c, **_given(call, "fc2_bias", "layer_scale"), STORE_SCALE=wanted.layer_scale,
                STORE_BIAS=wanted.fc2_bias, **_SCALE_SUM, **_SMALL,
            )  # fmt: skip
