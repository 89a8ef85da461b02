"""Launches the backward pass of a ConvNeXt block: that of its tail, then the convolution's. Layouts as in launch.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registration, runtime
from ..depthwise import launch as depthwise
from ..norm_linear import config as norm_linear_config
from ..norm_linear import launch as norm_linear
from . import config, kernels
from .launch_common import (
    GRN,
    SMALL,
    Call,
    as_map,
    as_rows,
    call_of,
    convolved,
    given,
    grn_launch,
    grn_scales,
    grn_sums,
    pointer,
)
from .reference import Parameters, keeps_u, same_padding

_SCALED = {"BLOCK_D": 64, "BLOCK_C": 64}
_GRADIENT = {"BLOCK_P": 32, "BLOCK_C": 128}
_FINISH = {"BLOCK_D": 32, "BLOCK_C": 32}
_SCALE_SUM = {"BLOCK_P": 32, "BLOCK_C": 32}


def block_backward(dout: Tensor, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    """dx in x's memory format and the gradients of all :class:`Parameters`; of shape (0,) where not ``wanted``."""
    *parameters, row_scale, grn_weight, grn_bias, y, mean, rstd, u, eps, memory, dtype, wanted = arguments
    p = Parameters(*parameters, grn_weight, grn_bias)
    call = call_of(x, p, row_scale, dtype)
    wanted = [need and t is not None for need, t in zip(wanted, (x, *p), strict=True)]
    dx = registration.empty_map(x, x.shape) if wanted[0] else x.new_empty(0)
    gradients = Parameters(*registration.parameter_gradients(p, wanted[1:], x))
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return dx, *gradients
    with runtime.on_device(x):
        if memory == "lean":
            y = convolved(x, call.p, dtype)
            mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
            norm_linear.normalise(norm_linear.as_rows(y), None, None, mean, rstd, eps, None, None)
        saved = y, mean, rstd, u if keeps_u(memory, call.c) else None
        dy = _Tail(call, dout, saved, Parameters(*wanted[1:]), any(wanted[:3])).gradients(gradients)
        if any(wanted[:3]):
            _convolution_gradients(call, dout, x, as_map(dy, x), wanted, dx, gradients)
    return dx, *gradients


def _convolution_gradients(call: Call, dout, x, dy, wanted, dx, gradients: Parameters) -> None:
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

    def __init__(self, call: Call, dout: Tensor, saved, wanted: Parameters, wants_dy: bool):
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
        rows = as_rows(dout)
        sums = call.p.fc2_bias is not None and (wanted.fc2_bias or wanted.layer_scale)
        store = call.row_scale is not None or rows.dtype != call.dtype or rows.data_ptr() % 16 != 0
        d = torch.empty_like(rows, dtype=call.dtype) if store else rows
        blocks = -(-call.c // _GRADIENT["BLOCK_C"])
        part = config.rows_per_part(call.rows, blocks, call.arch)
        partials = rows.new_empty((-(-call.rows // part), call.c), dtype=torch.float32)
        if store or sums:
            kernels._block_bwd_gradient_kernel[(len(partials) * blocks,)](
                rows, pointer(call.row_scale, rows), d, partials, call.rows, call.pixels, part,
                C=call.c, **given(call, "row_scale"), STORE=store, SUMS=sums, **_GRADIENT, **SMALL,
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
            self._blocks_of_rows(dy, scaled, unscale, tile)
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
            fc2, pointer(p.layer_scale, fc2), scaled, unscale,
            C=call.c, D=call.d, **given(call, "layer_scale"), BALANCED=self._balanced(), **_SCALED, **SMALL,
        )  # fmt: skip
        return scaled, unscale

    def _balanced(self) -> bool:
        return self.call.dtype == torch.float16 and self.call.p.layer_scale is not None

    def _empty_hidden(self) -> Tensor:
        return self.d.new_empty((self.call.rows, self.call.d))

    def _blocks_of_rows(self, dy: Tensor, scaled: Tensor, unscale: Tensor, tile) -> None:
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
            self.y, self.d, pointer(p.norm_weight, self.y), pointer(p.norm_bias, self.y), first.weight,
            pointer(p.fc1_bias, self.y), scaled, unscale, pointer(call.row_scale, self.y), first.mean, first.rstd, dy,
            first.xhat, self.h, first.du, first.partials, call.rows, call.pixels,
            C=call.c, D=call.d, **given(call, "norm_weight", "norm_bias", "fc1_bias", "row_scale"),
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
            pointer(normed, self.d), first.weight, pointer(p.fc1_bias, self.d), pointer(self.u, self.d), self.d, scaled,
            unscale, pointer(call.row_scale, self.d), first.vectors() if first.sums else first.mean, self.h, first.du,
            first.row_sums, first.partials, call.rows, call.pixels, call.c,
            C=call.c, D=call.d, **given(call, "fc1_bias", "row_scale"), BALANCED=self._balanced(),
            GIVEN_PRODUCT=self.u is not None, SUMS=first.sums, PARTIALS=parameters, STORE_H=self.needs_h,
            BLOCK_P=tile.m, BLOCK_D=tile.n, BLOCK_C=tile.k, PRECISION=precision, **tile.options(),
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
        squares, products, totals = grn_sums(call, u, dh)
        norm, mean, relative, scale = grn_scales(call, squares)
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
        block_p, block_d = GRN["BLOCK_P"], GRN["BLOCK_D"]
        first.allocate_sums(block_p, block_d, False)
        if parameters:
            first.partials = first.mean.new_empty((images * -(-call.pixels // block_p), call.d))
        grn_launch(
            call, kernels._block_grn_bwd_kernel, u, dh, scale, direction, p.grn_bias, pointer(p.fc1_bias, u),
            first.vectors() if first.sums else first.mean, first.row_sums, first.partials, call.pixels, images,
            **given(call, "fc1_bias"), SUMS=first.sums, PARTIALS=parameters,
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
                parts, fc2, pointer(p.layer_scale, fc2), gradients.fc2_weight, scale_parts, len(parts),
                C=call.c, D=call.d, **given(call, "layer_scale"), STORE_DFC2=wanted.fc2_weight,
                SCALE_PARTS=wanted.layer_scale, **_FINISH, **SMALL,
            )  # fmt: skip
        if wanted.layer_scale or wanted.fc2_bias:
            kernels._block_bwd_scale_sum_kernel[(blocks_c,)](
                scale_parts, self.sums, fc2, pointer(p.fc2_bias, fc2), pointer(p.layer_scale, fc2),
                gradients.layer_scale, gradients.fc2_bias, len(scale_parts), len(self.sums),
                C=call.c, **given(call, "fc2_bias", "layer_scale"), STORE_SCALE=wanted.layer_scale,
                STORE_BIAS=wanted.fc2_bias, **_SCALE_SUM, **SMALL,
            )  # fmt: skip
