"""The kernels of layer norm + linear (+ GELU), forward; those of the backward pass are in kernels_backward.py.

Formulas are in this folder's README, how kernels are launched in launch.py. Rows are p < P, channels c < C, outputs
k < D. Matrices other than x have no gaps between their rows; x has ``stride_x`` elements from row to row, C of them
where ``DENSE``. Sums and products are kept in fp32.
"""

import triton
import triton.language as tl

from ..primitives import gelu
from .kernels_backward import (
    _norm_linear_bwd_du_kernel,
    _norm_linear_bwd_weight_kernel,
    _norm_linear_bwd_x_kernel,
    _norm_linear_column_sum_kernel,
    _norm_linear_finish_kernel,
    _norm_linear_norm_sum_kernel,
    _norm_linear_vectors_kernel,
)
from .tiles import _preactivation, _standardised, _statistics, _tile, _vector, _weights

__all__ = [
    "_norm_linear_bwd_du_kernel", "_norm_linear_bwd_weight_kernel", "_norm_linear_bwd_x_kernel",
    "_norm_linear_column_sum_kernel", "_norm_linear_finish_kernel", "_norm_linear_fwd_kernel",
    "_norm_linear_norm_kernel", "_norm_linear_norm_sum_kernel", "_norm_linear_product_kernel",
    "_norm_linear_vectors_kernel",
]  # fmt: skip


@triton.jit(do_not_specialize=["P"])
def _norm_linear_norm_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, xhat_ptr, mean_ptr, rstd_ptr, P, stride_x, eps,
    C: tl.constexpr, DENSE: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    GIVEN_STATISTICS: tl.constexpr, STORE_NORMED: tl.constexpr, STORE_XHAT: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normed = x̂∘γ + β and x̂, of which products are made next; mean and rstd, too, unless they are given."""
    row = tl.program_id(0) * BLOCK_P
    if DENSE:
        stride_x = C
    p, c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    mask_p, mask_c = row + p < P, c < C
    x = _tile(x_ptr + row.to(tl.int64) * stride_x, p * stride_x, c, mask_p, mask_c)
    if GIVEN_STATISTICS:
        mean = tl.load(mean_ptr + row + p, mask=mask_p, other=0.0)
        rstd = tl.load(rstd_ptr + row + p, mask=mask_p, other=0.0)
    else:
        mean, rstd = _statistics(x, mask_c, x, mask_c, eps, C, 0)
        tl.store(mean_ptr + row + p, mean, mask=mask_p)
        tl.store(rstd_ptr + row + p, rstd, mask=mask_p)
    xhat = _standardised(x, mask_c, mean, rstd, True)
    offs, mask = p[:, None] * C + c[None, :], mask_p[:, None] & mask_c[None, :]
    if STORE_XHAT:
        xhat_ptr += row.to(tl.int64) * C
        tl.store(xhat_ptr + offs, xhat.to(xhat_ptr.dtype.element_ty), mask=mask)
    if STORE_NORMED:
        norm_weight = _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, BLOCK_C == C)
        norm_bias = _vector(norm_bias_ptr, c, C, HAS_NORM_BIAS, 0.0, BLOCK_C == C)
        normed = xhat * norm_weight[None, :] + norm_bias[None, :]
        normed_ptr += row.to(tl.int64) * C
        tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "tiles"])
def _norm_linear_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, P, stride_x, eps, tiles,
    C: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a block of rows, ``tiles`` blocks of outputs one after the other; the rows stay where they were normalised.

    Shared memory holds the rows, and the weights of this block of outputs and the next one.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    groups = (blocks + tiles - 1) // tiles
    row = tl.program_id(0) // groups * BLOCK_P
    first = tl.program_id(0) % groups * tiles
    if DENSE:
        stride_x = C
    p, c0 = tl.arange(0, BLOCK_P), tl.arange(0, C0)
    mask_p, mask0 = row + p < P, c0 < C
    x_ptr += row.to(tl.int64) * stride_x
    x0 = _tile(x_ptr, p * stride_x, c0, mask_p, mask0)
    c1, mask1, x1 = c0, mask0, x0
    if C1:
        c1 = C0 + tl.arange(0, C1)
        mask1 = c1 < C
        x1 = _tile(x_ptr, p * stride_x, c1, mask_p, mask1)
    mean, rstd = _statistics(x0, mask0, x1, mask1, eps, C, C1)
    if first == 0:
        tl.store(mean_ptr + row + p, mean, mask=mask_p)
        tl.store(rstd_ptr + row + p, rstd, mask=mask_p)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    norm_weight = _vector(norm_weight_ptr, c0, C, HAS_NORM_WEIGHT, 1.0, C0 <= C)
    norm_bias = _vector(norm_bias_ptr, c0, C, HAS_NORM_BIAS, 0.0, C0 <= C)
    xhat = _standardised(x0, mask0, mean, rstd, C0 <= C)
    normed0 = (xhat * norm_weight[None, :] + norm_bias[None, :]).to(dtype)
    if C1:
        norm_weight = _vector(norm_weight_ptr, c1, C, HAS_NORM_WEIGHT, 1.0, C0 + C1 == C)
        norm_bias = _vector(norm_bias_ptr, c1, C, HAS_NORM_BIAS, 0.0, C0 + C1 == C)
        xhat = _standardised(x1, mask1, mean, rstd, C0 + C1 == C)
        normed1 = (xhat * norm_weight[None, :] + norm_bias[None, :]).to(dtype)
    y_ptr += row.to(tl.int64) * D
    for tile in range(first, tl.minimum(first + tiles, blocks)):
        k = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_k = k < D
        bias = _vector(bias_ptr, k, D, HAS_BIAS, 0.0, D % BLOCK_D == 0)
        # As the first sum, the bias costs no addition.
        u = tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + bias.to(dtype).to(tl.float32)[None, :]
        weight = _weights(weight_ptr, k, c0, C, D, D % BLOCK_D == 0, C0 <= C)
        u = tl.dot(normed0, weight, u, input_precision=PRECISION)
        if C1:
            weight = _weights(weight_ptr, k, c1, C, D, D % BLOCK_D == 0, C0 + C1 == C)
            u = tl.dot(normed1, weight, u, input_precision=PRECISION)
        if GELU:
            u = gelu(u, dtype)
        tl.store(y_ptr + (p[:, None] * D + k[None, :]), u.to(dtype), mask=mask_p[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["P", "length"])
def _norm_linear_product_kernel(
    normed_ptr, weight_ptr, bias_ptr, y_ptr, product_ptr, factor_ptr, P, length,
    C: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FACTOR: tl.constexpr, GELU: tl.constexpr,
    STORE_PRODUCT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of normalised rows: of rows too wide to be normalised where they are multiplied.

    STORE_PRODUCT: also what the bias is added to. HAS_FACTOR: that is multiplied by a number first.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0) // blocks * BLOCK_P
    p, k = tl.arange(0, BLOCK_P), tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_p, mask_k = row + p < P, k < D
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    u = _preactivation(
        normed_ptr, weight_ptr, row, p, mask_p, k, mask_k, length, C, D, BLOCK_P, BLOCK_D, BLOCK_C, PRECISION
    )
    if HAS_FACTOR:
        u *= tl.load(factor_ptr)
    if STORE_PRODUCT:
        product_ptr += row.to(tl.int64) * D
        tl.store(product_ptr + (p[:, None] * D + k[None, :]), u.to(dtype), mask=mask_p[:, None] & mask_k[None, :])
    u += _vector(bias_ptr, k, D, HAS_BIAS, 0.0, D % BLOCK_D == 0).to(dtype).to(tl.float32)[None, :]
    if GELU:
        u = gelu(u, dtype)
    y_ptr += row.to(tl.int64) * D
    tl.store(y_ptr + (p[:, None] * D + k[None, :]), u.to(dtype), mask=mask_p[:, None] & mask_k[None, :])
