"""Launches the kernels of layer norm + linear (+ GELU): layouts, allocation, grids. Callable without autograd.

Rows of x may lie anywhere, as long as they are evenly spaced and their channels side by side; all else is copied. The
weight is read in the dtype that is computed in, so under autocast it is cast first, as PyTorch does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import registration, runtime
from ..dtypes import NAMES, name_of
from . import config, kernels

_VECTORS = {"BLOCK_D": 16, "BLOCK_C": 128}
_COLUMN_SUM = {"BLOCK_P": 32, "BLOCK_D": 64}
_FINISH = {"BLOCK_P": 32, "BLOCK_D": 32, "BLOCK_C": 32}
_NORM_SUM = {"BLOCK_P": 32, "BLOCK_C": 32}
_SMALL = {"num_warps": 4, "num_stages": 1}


def why_not(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> str | None:
    """Why no kernel takes this call; None where one does."""
    reason = _why_not(x, weight, runtime.autocast_dtype(x) or x.dtype)
    for parameter in (norm_weight, norm_bias, weight, bias):  # under autocast, they have dtypes of their own
        if reason is None and parameter is not None and parameter.dtype not in NAMES:
            return f"a parameter is {name_of(parameter.dtype)}; the kernels take bfloat16, float16 and float32"
    return reason


def _why_not(x: Tensor, weight: Tensor, computed: torch.dtype) -> str | None:
    if math.prod(x.shape[:-1]) >= 2**30:
        return f"x has shape {tuple(x.shape)}; the kernels take fewer than 2^30 rows"
    return config.why_not(name_of(x.dtype), name_of(computed), x.shape[-1], weight.shape[0])


class _Rows(NamedTuple):
    """x as (P, C), channels side by side, ``stride`` from row to row."""

    x: Tensor
    p: int
    c: int
    stride: int

    @property
    def vectors(self) -> bool:
        """Does every row begin at a multiple of 16 bytes, and does Triton see that (of strides: multiples of 16)?"""
        dense = config.aligned(self.c, NAMES[self.x.dtype]) if self.stride == self.c else self.stride % 16 == 0
        return dense and self.x.data_ptr() % 16 == 0

    @property
    def constants(self) -> dict[str, object]:
        return {"C": self.c, "DENSE": self.stride == self.c}


def _rows(x: Tensor) -> _Rows:
    p, c = math.prod(x.shape[:-1]), x.shape[-1]
    x = x.reshape(p, c)
    if (c > 1 and x.stride(1) != 1) or (p > 1 and x.stride(0) >= 2**23):
        x = x.contiguous()
    return _Rows(x, p, c, c if p == 1 or (c == 1 and x.is_contiguous()) else x.stride(0))


def _dense(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in ``dtype``, without gaps, from a multiple of 16 bytes on."""
    matrix = matrix.to(dtype).contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _parameter(parameter: Tensor | None, like: Tensor) -> Tensor:
    return like if parameter is None else parameter.contiguous()


def _precision(dtype: torch.dtype) -> tuple[bool, str]:
    tf32 = dtype == torch.float32 and runtime.tf32()
    return tf32, "tf32" if tf32 else "ieee"


def _given(**tensors: Tensor | None) -> dict[str, bool]:
    return {f"HAS_{name.upper()}": tensor is not None for name, tensor in tensors.items()}


def norm_linear_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., D) in ``dtype``, and mean and rstd (...) in fp32, of x (..., C)."""
    _refuse_unsupported(x, weight, dtype)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if y.numel() == 0:
        return y, mean, rstd
    with runtime.on_device(x):
        rows, weight = _rows(x), _dense(weight, dtype)
        tile = config.resident(NAMES[dtype], rows.c, weight.shape[0], runtime.arch(x), rows.vectors)
        arguments = (rows, norm_weight, norm_bias, weight, bias, y, mean, rstd, eps, activation)
        if tile is None:
            _forward_of_wide_rows(*arguments)
        else:
            _forward_of_resident_rows(*arguments, tile)
    return y, mean, rstd


def _forward_of_resident_rows(rows, norm_weight, norm_bias, weight, bias, y, mean, rstd, eps, activation, tile) -> None:
    d, (c0, c1) = weight.shape[0], config.split(rows.c)
    blocks, row_blocks = -(-d // tile.n), -(-rows.p // tile.m)
    count = config.blocks_per_program(runtime.arch(y), row_blocks, blocks, rows.c, tile.n)
    kernels._norm_linear_fwd_kernel[(row_blocks * -(-blocks // count),)](
        rows.x, _parameter(norm_weight, mean), _parameter(norm_bias, mean), weight, _parameter(bias, mean), y, mean,
        rstd, rows.p, rows.stride, eps, count,
        **rows.constants, D=d, **_given(norm_weight=norm_weight, norm_bias=norm_bias, bias=bias),
        GELU=activation is not None, C0=c0, C1=c1, BLOCK_P=tile.m, BLOCK_D=tile.n,
        PRECISION=_precision(y.dtype)[1], **tile.options(),
    )  # fmt: skip


def _forward_of_wide_rows(rows, norm_weight, norm_bias, weight, bias, y, mean, rstd, eps, activation) -> None:
    normed = rows.x.new_empty((rows.p, rows.c), dtype=y.dtype)
    _normalise(rows, norm_weight, norm_bias, mean, rstd, eps, normed, None)
    d, (tf32, precision) = weight.shape[0], _precision(y.dtype)
    arch = runtime.arch(y)
    tile = config.product(NAMES[y.dtype], rows.c, d, arch, config.few_rows(rows.p, d, arch), tf32)
    kernels._norm_linear_product_kernel[(-(-rows.p // tile.m) * -(-d // tile.n),)](
        normed, weight, _parameter(bias, mean), y, rows.p, rows.c,
        C=rows.c, D=d, HAS_BIAS=bias is not None, GELU=activation is not None, BLOCK_P=tile.m, BLOCK_D=tile.n,
        BLOCK_C=tile.k, PRECISION=precision, **tile.options(),
    )  # fmt: skip


def _normalise(
    rows: _Rows, norm_weight, norm_bias, mean, rstd, eps: float | None, normed: Tensor | None, xhat: Tensor | None
) -> None:
    """Fills x̂∘γ + β and x̂ (P, C), those that are not None; mean and rstd are filled or, without an ``eps``, given."""
    block_p, block_c, warps = config.normalising(rows.c)
    kernels._norm_linear_norm_kernel[(-(-rows.p // block_p),)](
        rows.x, _parameter(norm_weight, mean), _parameter(norm_bias, mean), mean if normed is None else normed,
        mean if xhat is None else xhat, mean, rstd, rows.p, rows.stride, 0.0 if eps is None else eps,
        **rows.constants, **_given(norm_weight=norm_weight, norm_bias=norm_bias), GIVEN_STATISTICS=eps is None,
        STORE_NORMED=normed is not None, STORE_XHAT=xhat is not None, BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=warps, num_stages=1,
    )  # fmt: skip


def norm_linear_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (..., C), dγ, dβ (C,), dW (D, C), db (D,); of shape (0,) where not ``wanted`` or without a parameter."""
    _refuse_unsupported(x, weight, dy.dtype)
    parameters = (norm_weight, norm_bias, weight, bias)
    wanted = [need and t is not None for need, t in zip(wanted, (x, *parameters), strict=True)]
    dx = x.new_empty(x.shape) if wanted[0] else x.new_empty(0)
    gradients = registration.parameter_gradients(parameters, wanted[1:], x)
    if dy.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return dx, *gradients
    with runtime.on_device(x):
        call = _Backward(dy, x, mean, rstd, parameters, activation, wanted)
        if wanted[0]:
            call.input_gradient(dx)
        if any(wanted[1:]):
            call.parameter_gradients(*gradients)
    return dx, *gradients


class _Backward:
    """One backward pass: what its steps share, computed once.

    x̂, x̂∘γ + β and du are matrices of their own for as long as they are needed.
    """

    def __init__(self, dy, x, mean, rstd, parameters, activation, wanted):
        self.norm_weight, self.norm_bias, weight, self.bias = parameters
        self.rows, self.mean, self.rstd = _rows(x), mean.contiguous(), rstd.contiguous()
        self.weight, self.wanted = _dense(weight, dy.dtype), wanted
        self.name, (self.tf32, self.precision) = NAMES[dy.dtype], _precision(dy.dtype)
        self.d, self.arch = weight.shape[0], runtime.arch(x)
        self.dy = _dense(dy.reshape(self.rows.p, self.d), dy.dtype)
        self.whole = config.whole_rows(self.rows.c, self.arch, self.tf32)
        self.sums = wanted[0] and not self.whole
        self.needs_g = wanted[1] or wanted[3]
        gelu = activation is not None
        normed = self._normalised(gelu or self.sums)
        self._hidden(normed, gelu, any(wanted[1:]))

    def _normalised(self, needed: bool) -> Tensor:
        """x̂∘γ + β where it is ``needed``; x̂, where G is made of it, is kept."""
        plain = self.norm_weight is None and self.norm_bias is None
        empty = lambda: self.dy.new_empty((self.rows.p, self.rows.c))  # noqa: E731
        self.xhat = empty() if self.needs_g or (needed and plain) else None
        normed = empty() if needed and not plain else None
        if self.xhat is not None or normed is not None:
            parameters = self.norm_weight, self.norm_bias
            _normalise(self.rows, *parameters, self.mean, self.rstd, None, normed, self.xhat)
        matrices = (normed, self.xhat, self.dy)  # the last is not read
        return next(matrix for matrix in matrices if matrix is not None)

    def _tile(self, length: int, n: int) -> config.Tile:
        few = config.few_rows(self.rows.p, n, self.arch)
        return config.product(self.name, length, n, self.arch, few, self.tf32)

    def _vectors(self) -> Tensor:
        vectors = self.mean.new_empty((2, self.d))
        kernels._norm_linear_vectors_kernel[(-(-self.d // _VECTORS["BLOCK_D"]),)](
            _parameter(self.norm_weight, self.mean), _parameter(self.norm_bias, self.mean), self.weight, vectors,
            C=self.rows.c, D=self.d, **_given(norm_weight=self.norm_weight, norm_bias=self.norm_bias), **_VECTORS,
            **_SMALL,
        )  # fmt: skip
        return vectors

    def _hidden(self, normed: Tensor, gelu: bool, parameters: bool) -> None:
        """du, the sums of its rows that the input gradient needs, and those of its columns."""
        p, c, d = self.rows.p, self.rows.c, self.d
        tile = self._tile(c, d)
        self.row_blocks, self.column_blocks = -(-p // tile.m), -(-d // tile.n)
        self.du = torch.empty_like(self.dy) if gelu else self.dy
        self.row_sums = self.mean.new_empty((self.column_blocks, 2, p) if self.sums else 0)
        self.partials = self.mean.new_empty((self.row_blocks, d) if parameters else 0)
        if not (gelu or self.sums or parameters):
            return
        kernels._norm_linear_bwd_du_kernel[(self.row_blocks * self.column_blocks,)](
            normed, self.weight, _parameter(self.bias, self.mean), self._vectors() if self.sums else self.mean,
            self.dy, self.du, self.row_sums, self.partials, p, c,
            C=c, D=d, **_given(bias=self.bias), GELU=gelu, SUMS=self.sums, PARTIALS=parameters, BLOCK_P=tile.m,
            BLOCK_D=tile.n, BLOCK_C=tile.k, PRECISION=self.precision, **tile.options(),
        )  # fmt: skip

    def input_gradient(self, dx: Tensor) -> None:
        """Fills dx."""
        rows, tile = self.rows, self._tile(self.d, self.rows.c)
        if self.whole:
            tile = config.widened(tile, rows.c)
        kernels._norm_linear_bwd_x_kernel[(-(-rows.p // tile.m) * -(-rows.c // tile.n),)](
            self.du, self.weight, rows.x, _parameter(self.norm_weight, self.mean), self.mean, self.rstd,
            self.row_sums, dx, rows.p, rows.stride, self.d, self.column_blocks,
            **rows.constants, D=self.d, **_given(norm_weight=self.norm_weight), WHOLE_ROWS=self.whole, BLOCK_P=tile.m,
            BLOCK_D=tile.k, BLOCK_C=tile.n, PRECISION=self.precision, **tile.options(),
        )  # fmt: skip
        self.row_sums = None  # so that its memory can be that of the parts of G

    def _weight_parts(self) -> Tensor:
        """G in parts (parts, D, C)."""
        p, c, d = self.rows.p, self.rows.c, self.d
        tile = config.weight_gradient(self.name, c, d, self.arch)
        tiles = -(-d // tile.m) * -(-c // tile.n)
        rows = config.rows_per_part(self.arch, tiles, p, tile.k)
        parts = self.mean.new_empty((-(-p // rows), d, c))
        kernels._norm_linear_bwd_weight_kernel[(len(parts) * tiles,)](
            self.du, self.xhat, parts, p, rows,
            C=c, D=d, BLOCK_P=tile.k, BLOCK_D=tile.m, BLOCK_C=tile.n, PRECISION=self.precision, **tile.options(),
        )  # fmt: skip
        return parts

    def _fewer_partials(self) -> Tensor:
        """The parts of db, so few that a program that finishes a block of dW can add up those of its own outputs."""
        group = config.PARTS_PER_SUM
        if self.row_blocks <= group:
            return self.partials
        fewer = self.mean.new_empty((-(-self.row_blocks // group), self.d))
        kernels._norm_linear_column_sum_kernel[(len(fewer) * -(-self.d // _COLUMN_SUM["BLOCK_D"]),)](
            self.partials, fewer, self.row_blocks, group, D=self.d, **_COLUMN_SUM, **_SMALL,
        )  # fmt: skip
        return fewer

    def parameter_gradients(self, dnorm_weight: Tensor, dnorm_bias: Tensor, dw: Tensor, db: Tensor) -> None:
        """Fills those that are wanted."""
        c, d, (_, wants_norm_weight, wants_norm_bias, wants_dw, wants_db) = self.rows.c, self.d, self.wanted
        parts = self._weight_parts() if self.needs_g else self.mean.new_empty((0, d, c))
        partials = self._fewer_partials()
        blocks_d, blocks_c = -(-d // _FINISH["BLOCK_D"]), -(-c // _FINISH["BLOCK_C"])
        norm_parts = self.mean.new_empty((blocks_d, 2, c))
        kernels._norm_linear_finish_kernel[(blocks_d * blocks_c,)](
            parts, partials, self.weight, _parameter(self.norm_weight, self.mean),
            _parameter(self.norm_bias, self.mean), dw, db, norm_parts, len(parts), len(partials),
            C=c, D=d, **_given(norm_weight=self.norm_weight, norm_bias=self.norm_bias), HAS_PARTS=self.needs_g,
            STORE_DW=wants_dw, STORE_DB=wants_db, NORM_PARTS=wants_norm_weight or wants_norm_bias, **_FINISH, **_SMALL,
        )  # fmt: skip
        if wants_norm_weight or wants_norm_bias:
            kernels._norm_linear_norm_sum_kernel[(-(-c // _NORM_SUM["BLOCK_C"]),)](
                norm_parts, dnorm_weight, dnorm_bias, blocks_d,
                C=c, STORE_WEIGHT=wants_norm_weight, STORE_BIAS=wants_norm_bias, **_NORM_SUM, **_SMALL,
            )  # fmt: skip


def _refuse_unsupported(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """For callers of the raw operators; the public function has asked :func:`why_not` before."""
    reason = _why_not(x, weight, dtype)
    if reason is not None:
        raise ValueError(f"the Triton kernels do not take this layer norm with linear layer: {reason}")
