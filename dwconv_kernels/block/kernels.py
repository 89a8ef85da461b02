"""The kernels of a block's tail, forward: y, the convolution's output, to out. The rest: kernels_*.py, tiles.py.

Formulas are in this folder's README, how kernels are launched in launch.py. Rows p < P are the pixels of all images,
``pixels`` of them in each; channels c < C, hidden channels k < D. Matrices have no gaps between rows, sums are fp32.
"""

import triton
import triton.language as tl

from ..norm_linear.tiles import _halves, _matrix, _product
from ..primitives import gelu
from .kernels_backward import (
    _block_bwd_finish_kernel,
    _block_bwd_gradient_kernel,
    _block_bwd_hidden_kernel,
    _block_bwd_rows_kernel,
    _block_bwd_scale_sum_kernel,
    _block_scaled_kernel,
)
from .kernels_grn import _block_grn_apply_kernel, _block_grn_bwd_kernel, _block_grn_sums_kernel
from .tiles import _all_dropped, _hidden, _normed_rows, _row_factors, _store_out

__all__ = [
    "_block_bwd_finish_kernel", "_block_bwd_gradient_kernel", "_block_bwd_hidden_kernel", "_block_bwd_rows_kernel",
    "_block_bwd_scale_sum_kernel", "_block_fwd_kernel", "_block_fwd_resident_kernel", "_block_grn_apply_kernel",
    "_block_grn_bwd_kernel", "_block_grn_sums_kernel", "_block_out_kernel", "_block_scaled_kernel",
]  # fmt: skip


@triton.jit(do_not_specialize=["P", "pixels", "length"])
def _block_fwd_kernel(
    y_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_ptr, fc1_bias_ptr, fc2_ptr, fc2_bias_ptr, layer_scale_ptr,
    row_scale_ptr, out_ptr, mean_ptr, rstd_ptr, P, pixels, length, eps,
    C: tl.constexpr, D: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, STORE_STATISTICS: tl.constexpr, AHEAD: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tail of a block of rows, a block of hidden channels after the other; ``length`` is D.

    AHEAD: u of the next hidden channels is computed before GELU of these, so that the tensor cores have something to
    do meanwhile. That takes channels in one tile (K0); the channels of the result are in one or two (N0, N1).
    """
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    row = tl.program_id(0) * BLOCK_P
    p, k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    mask_p = row + p < P
    factors = _row_factors(row_scale_ptr, row, p, mask_p, pixels, HAS_ROW_SCALE)
    base = row.to(tl.int64) * C
    dtype: tl.constexpr = fc1_ptr.dtype.element_ty
    normed0, normed1 = _normed_rows(
        y_ptr + base, norm_weight_ptr, norm_bias_ptr, mean_ptr + row, rstd_ptr + row, p, mask_p, eps, dtype, C,
        HAS_NORM_WEIGHT, HAS_NORM_BIAS, STORE_STATISTICS, K0, K1,
    )  # fmt: skip
    n0, n1 = tl.arange(0, N0), tl.arange(0, N0)
    sums0 = tl.zeros((BLOCK_P, N0), tl.float32)
    if N1:
        n1 = N0 + tl.arange(0, N1)
        sums1 = tl.zeros((BLOCK_P, N1), tl.float32)
    # Nothing to do where all of these rows are of images whose branch is dropped.
    end = tl.where(_all_dropped(factors), 0, length)
    if AHEAD:
        u = _hidden(normed0, normed1, fc1_ptr, fc1_bias_ptr, k, C, D, HAS_FC1_BIAS, K0, K1, BLOCK_P, BLOCK_D)
    for start in range(0, end, BLOCK_D):
        # After the last block, the first one again: a load without a mask.
        first = start if not AHEAD else tl.where(start + BLOCK_D < end, start + BLOCK_D, 0)
        ahead = _hidden(
            normed0, normed1, fc1_ptr, fc1_bias_ptr, first + k, C, D, HAS_FC1_BIAS, K0, K1, BLOCK_P, BLOCK_D
        )
        if AHEAD:
            h = gelu(u, dtype).to(dtype)
            u = ahead
        else:
            h = gelu(ahead, dtype).to(dtype)
        sums0 = tl.dot(h, _matrix(fc2_ptr, start + k, n0, 1, D, D, C, WHOLE, N0 <= C), sums0)
        if N1:
            sums1 = tl.dot(h, _matrix(fc2_ptr, start + k, n1, 1, D, D, C, WHOLE, N0 + N1 == C), sums1)
    _store_out(
        sums0, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr + base, out_ptr + base, p, n0, mask_p, dtype, C,
        HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_ROW_SCALE, N0 <= C,
    )  # fmt: skip
    if N1:
        _store_out(
            sums1, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr + base, out_ptr + base, p, n1, mask_p, dtype, C,
            HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_ROW_SCALE, N0 + N1 == C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "pixels", "programs"])
def _block_fwd_resident_kernel(
    y_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_ptr, fc1_bias_ptr, fc2_ptr, fc2_bias_ptr, layer_scale_ptr,
    row_scale_ptr, out_ptr, mean_ptr, rstd_ptr, P, pixels, programs, eps,
    C: tl.constexpr, D: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, STORE_STATISTICS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tail of every ``programs``-th block of rows, with both weights in shared memory all the time.

    There is no barrier between two blocks of hidden channels, so the two halves of a program drift apart, and one
    multiplies while the other is at its GELU. D is a multiple of BLOCK_D.
    """
    BLOCKS: tl.constexpr = D // BLOCK_D
    dtype: tl.constexpr = fc1_ptr.dtype.element_ty
    p, k, c0 = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D), tl.arange(0, C0)
    c1 = C0 + tl.arange(0, C1 if C1 else 16)
    up0, up1, down0, down1 = (), (), (), ()
    for block in tl.static_range(BLOCKS):
        up0 = up0 + (_matrix(fc1_ptr, c0, block * BLOCK_D + k, 1, C, C, D, C0 <= C, True),)
        down0 = down0 + (_matrix(fc2_ptr, block * BLOCK_D + k, c0, 1, D, D, C, True, C0 <= C),)
        if C1:
            up1 = up1 + (_matrix(fc1_ptr, c1, block * BLOCK_D + k, 1, C, C, D, C0 + C1 == C, True),)
            down1 = down1 + (_matrix(fc2_ptr, block * BLOCK_D + k, c1, 1, D, D, C, True, C0 + C1 == C),)
    for tile in range(tl.program_id(0), tl.cdiv(P, BLOCK_P), programs):
        row = tile * BLOCK_P
        mask_p = row + p < P
        base = tl.cast(row, tl.int64) * C
        normed0, normed1 = _normed_rows(
            y_ptr + base, norm_weight_ptr, norm_bias_ptr, mean_ptr + row, rstd_ptr + row, p, mask_p, eps, dtype, C,
            HAS_NORM_WEIGHT, HAS_NORM_BIAS, STORE_STATISTICS, C0, C1,
        )  # fmt: skip
        sums0 = tl.zeros((BLOCK_P, C0), tl.float32)
        if C1:
            sums1 = tl.zeros((BLOCK_P, C1), tl.float32)
        for block in tl.static_range(BLOCKS):
            bias = _bias(fc1_bias_ptr, block * BLOCK_D + k, HAS_FC1_BIAS, dtype)
            u = tl.dot(normed0, up0[block], tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + bias[None, :])
            if C1:
                u = tl.dot(normed1, up1[block], u)
            h = gelu(u, dtype).to(dtype)
            sums0 = tl.dot(h, down0[block], sums0)
            if C1:
                sums1 = tl.dot(h, down1[block], sums1)
        factors = _row_factors(row_scale_ptr, row, p, mask_p, pixels, HAS_ROW_SCALE)
        if C1:
            _store_out(
                sums1, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr + base, out_ptr + base, p, c1, mask_p, dtype, C,
                HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_ROW_SCALE, C0 + C1 == C,
            )  # fmt: skip
        # In halves: x in fp32, as under autocast, takes as many registers as the sums.
        left, right = _halves(sums0, BLOCK_P, C0)
        c = tl.arange(0, C0 // 2)
        for half in tl.static_range(2):
            _store_out(
                left if half == 0 else right, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr + base, out_ptr + base, p,
                c + half * (C0 // 2), mask_p, dtype, C, HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_ROW_SCALE, C0 <= C,
            )  # fmt: skip


@triton.jit
def _bias(ptr, offs, GIVEN: tl.constexpr, dtype: tl.constexpr):
    if GIVEN:
        return tl.load(ptr + offs).to(dtype).to(tl.float32)
    else:
        return tl.zeros(offs.shape, tl.float32)


@triton.jit(do_not_specialize=["P", "pixels", "length"])
def _block_out_kernel(
    h_ptr, fc2_ptr, fc2_bias_ptr, layer_scale_ptr, row_scale_ptr, x_ptr, out_ptr, P, pixels, length,
    C: tl.constexpr, D: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out of a block of rows and channels, from h (P, D); ``length`` is D."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // blocks * BLOCK_P
    p, c = tl.arange(0, BLOCK_P), tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p = row + p < P
    factors = _row_factors(row_scale_ptr, row, p, mask_p, pixels, HAS_ROW_SCALE)
    branch = _product(
        h_ptr + row.to(tl.int64) * D, p[:, None] * D, mask_p[:, None], 1,
        fc2_ptr, c[None, :] * D, (c < C)[None, :], 1,
        tl.where(_all_dropped(factors), 0, length), D,
        BLOCK_P, BLOCK_C, BLOCK_D, D % BLOCK_D == 0, PRECISION,
    )  # fmt: skip
    base = row.to(tl.int64) * C
    _store_out(
        branch, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr + base, out_ptr + base, p, c, mask_p,
        h_ptr.dtype.element_ty, C, HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_ROW_SCALE, C % BLOCK_C == 0,
    )  # fmt: skip
