"""What the block's kernels are made of: rows that are normalised in registers, the end of the branch."""

import triton
import triton.language as tl

from ..norm_linear.tiles import _matrix, _standardised, _statistics, _tile, _vector


@triton.jit
def _affine(
    xhat, c, norm_weight_ptr, norm_bias_ptr, C: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x̂∘γ + β."""
    norm_weight = _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, WHOLE)
    norm_bias = _vector(norm_bias_ptr, c, C, HAS_NORM_BIAS, 0.0, WHOLE)
    return xhat * norm_weight[None, :] + norm_bias[None, :]


@triton.jit
def _normed_rows(
    y_ptr, norm_weight_ptr, norm_bias_ptr, mean_ptr, rstd_ptr, p, mask_p, eps, dtype: tl.constexpr, C: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, STORE_STATISTICS: tl.constexpr, K0: tl.constexpr,
    K1: tl.constexpr,
):  # fmt: skip
    """x̂∘γ + β of a block of rows of y, in one tile of K0 channels or two; all pointers are at its first row."""
    c0 = tl.arange(0, K0)
    mask0 = c0 < C
    y0 = _tile(y_ptr, p * C, c0, mask_p, mask0)
    c1, mask1, y1 = c0, mask0, y0
    if K1:
        c1 = K0 + tl.arange(0, K1)
        mask1 = c1 < C
        y1 = _tile(y_ptr, p * C, c1, mask_p, mask1)
    mean, rstd = _statistics(y0, mask0, y1, mask1, eps, C, K1)
    if STORE_STATISTICS:
        tl.store(mean_ptr + p, mean, mask=mask_p)
        tl.store(rstd_ptr + p, rstd, mask=mask_p)
    xhat = _standardised(y0, mask0, mean, rstd, K0 <= C)
    normed0 = _affine(xhat, c0, norm_weight_ptr, norm_bias_ptr, C, HAS_NORM_WEIGHT, HAS_NORM_BIAS, K0 <= C)
    normed1 = normed0
    if K1:
        WHOLE: tl.constexpr = K0 + K1 == C
        xhat = _standardised(y1, mask1, mean, rstd, WHOLE)
        normed1 = _affine(xhat, c1, norm_weight_ptr, norm_bias_ptr, C, HAS_NORM_WEIGHT, HAS_NORM_BIAS, WHOLE)
    return normed0.to(dtype), normed1.to(dtype)


@triton.jit
def _hidden(
    normed0, normed1, fc1_ptr, fc1_bias_ptr, k, C: tl.constexpr, D: tl.constexpr, HAS_FC1_BIAS: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u of a block of rows and of the hidden channels k."""
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    dtype: tl.constexpr = fc1_ptr.dtype.element_ty
    # As the first sum, the bias costs no addition.
    bias = _vector(fc1_bias_ptr, k, D, HAS_FC1_BIAS, 0.0, WHOLE).to(dtype).to(tl.float32)
    u = tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + bias[None, :]
    c0 = tl.arange(0, K0)
    u = tl.dot(normed0, _matrix(fc1_ptr, c0, k, 1, C, C, D, K0 <= C, WHOLE), u)
    if K1:
        c1 = K0 + tl.arange(0, K1)
        u = tl.dot(normed1, _matrix(fc1_ptr, c1, k, 1, C, C, D, K0 + K1 == C, WHOLE), u)
    return u


@triton.jit
def _row_factors(row_scale_ptr, row, p, mask_p, pixels, HAS_ROW_SCALE: tl.constexpr):
    """ρ of the images that rows are in, in fp32."""
    if HAS_ROW_SCALE:
        return tl.load(row_scale_ptr + (row + p) // pixels, mask=mask_p, other=0.0).to(tl.float32)
    else:
        return tl.where(mask_p, 1.0, 0.0)


@triton.jit
def _all_dropped(factors):
    """Are all of these rows of images whose branch is dropped? A NaN is not 0, and on a GPU no largest one either."""
    return tl.sum((factors != 0.0).to(tl.int32), 0) == 0


@triton.jit
def _store_out(
    branch, factors, fc2_bias_ptr, layer_scale_ptr, x_ptr, out_ptr, p, c, mask_p, dtype: tl.constexpr, C: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out = x + ρ·λ∘(h·W2ᵀ + b2) of a tile; x's and out's pointers are at its first row."""
    branch += _vector(fc2_bias_ptr, c, C, HAS_FC2_BIAS, 0.0, WHOLE).to(dtype).to(tl.float32)[None, :]
    if HAS_LAYER_SCALE:
        branch *= _vector(layer_scale_ptr, c, C, True, 1.0, WHOLE)[None, :]
    if HAS_ROW_SCALE:
        # Of a dropped image, the branch is not computed, or is and may be infinite: 0 is not a factor of it.
        branch = tl.where(factors[:, None] == 0.0, 0.0, branch * factors[:, None])
    out = _tile(x_ptr, p * C, c, mask_p, c < C) + branch
    mask = mask_p[:, None] & (c < C)[None, :]
    tl.store(out_ptr + (p[:, None] * C + c[None, :]), out.to(out_ptr.dtype.element_ty), mask=mask)
