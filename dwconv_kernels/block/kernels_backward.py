"""The kernels of the backward pass of a block's tail; conventions as in kernels.py.

d = ρ·dout. Of the second linear layer, the backward pass reads M = (λ∘W2)ᵀ (D, C), made once: dh = d·Mᵀ.
"""

import triton
import triton.language as tl

from ..norm_linear.kernels_backward import _sum_of_parts
from ..norm_linear.tiles import _halves, _matrix, _standardised, _tile, _vector
from ..primitives import gelu, gelu_derivative, times
from .tiles import _affine, _all_dropped, _row_factors


@triton.jit
def _block_scaled_kernel(
    fc2_ptr, layer_scale_ptr, scaled_ptr, unscale_ptr,
    C: tl.constexpr, D: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, BALANCED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """scaled = (λ∘W2)ᵀ (D, C).

    BALANCED: times a power of two that brings the largest λ near 1, as λ begins at 1e-6, and products with it would
    vanish in fp16; ``unscale`` is the reciprocal.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    k = tl.program_id(0) // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (k < D)[:, None] & (c < C)[None, :]
    value = tl.load(fc2_ptr + (k[:, None] + c[None, :] * D), mask=mask, other=0.0).to(tl.float32)
    if HAS_LAYER_SCALE:
        value *= _vector(layer_scale_ptr, c, C, True, 0.0, False)[None, :]
    if BALANCED:
        largest = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            offs = start + tl.arange(0, BLOCK_C)
            largest = tl.maximum(largest, tl.abs(_vector(layer_scale_ptr, offs, C, True, 0.0, False)))
        exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23  # and 127 more
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        value *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        if tl.program_id(0) == 0:
            tl.store(unscale_ptr, (exponent << 23).to(tl.float32, bitcast=True))
    tl.store(scaled_ptr + (k[:, None] * C + c[None, :]), value.to(scaled_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "pixels", "rows"])
def _block_bwd_gradient_kernel(
    dout_ptr, row_scale_ptr, d_ptr, partials_ptr, P, pixels, rows,
    C: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d of ``rows`` rows and a block of channels (STORE), and the sums of its columns (SUMS)."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) // blocks
    p, c = tl.arange(0, BLOCK_P), tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dout_ptr += (part * rows).to(tl.int64) * C
    d_ptr += (part * rows).to(tl.int64) * C
    for start in range(part * rows, tl.minimum(part * rows + rows, P), BLOCK_P):
        mask_p = start + p < P
        d = _tile(dout_ptr, p * C, c, mask_p, c < C)
        if HAS_ROW_SCALE:
            factors = _row_factors(row_scale_ptr, start, p, mask_p, pixels, True)[:, None]
            d = tl.where(factors == 0.0, 0.0, d * factors)
        sums += d
        if STORE:
            mask = mask_p[:, None] & (c < C)[None, :]
            tl.store(d_ptr + (p[:, None] * C + c[None, :]), d.to(d_ptr.dtype.element_ty), mask=mask)
        dout_ptr += BLOCK_P * C
        d_ptr += BLOCK_P * C
    if SUMS:
        tl.store(partials_ptr + part.to(tl.int64) * C + c, tl.sum(sums, 0), mask=c < C)


@triton.jit
def _store_zeros(ptr, offs_row, offs_col, mask_row, mask_col):
    zeros = tl.zeros((offs_row.shape[0], offs_col.shape[0]), ptr.dtype.element_ty)
    tl.store(ptr + (offs_row[:, None] + offs_col[None, :]), zeros, mask=mask_row[:, None] & mask_col[None, :])


@triton.jit
def _store_dy(g, xhat, rstd, sum_g, sum_gx, dy_ptr, p, c, mask_p, C: tl.constexpr):
    dy = rstd[:, None] * (g - (sum_g * (1 / C))[:, None] - xhat * (sum_gx * (1 / C))[:, None])
    mask = mask_p[:, None] & (c < C)[None, :]
    tl.store(dy_ptr + (p[:, None] * C + c[None, :]), dy.to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "pixels"])
def _block_bwd_rows_kernel(
    y_ptr, d_ptr, norm_weight_ptr, norm_bias_ptr, fc1_ptr, fc1_bias_ptr, scaled_ptr, unscale_ptr, row_scale_ptr,
    mean_ptr, rstd_ptr, dy_ptr, xhat_ptr, h_ptr, du_ptr, partials_ptr, P, pixels,
    C: tl.constexpr, D: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, BALANCED: tl.constexpr, STORE_XHAT: tl.constexpr,
    STORE_H: tl.constexpr, STORE_DU: tl.constexpr, PARTIALS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dy of a block of rows; u and dh exist on chip only. What the weights' gradients are made of is stored on the way.

    PARTIALS: Σ_p du of these rows.
    """
    WHOLE: tl.constexpr = D % BLOCK_D == 0
    row = tl.program_id(0) * BLOCK_P
    p, c0 = tl.arange(0, BLOCK_P), tl.arange(0, C0)
    c1 = C0 + tl.arange(0, C1 if C1 else 16)
    mask_p = row + p < P
    y_ptr += row.to(tl.int64) * C
    d_ptr += row.to(tl.int64) * C
    dy_ptr += row.to(tl.int64) * C
    xhat_ptr += row.to(tl.int64) * C
    h_ptr += row.to(tl.int64) * D
    du_ptr += row.to(tl.int64) * D
    partials_ptr += tl.program_id(0).to(tl.int64) * D
    factors = _row_factors(row_scale_ptr, row, p, mask_p, pixels, HAS_ROW_SCALE)
    if not HAS_ROW_SCALE or _all_dropped(factors) == 0:
        mean = tl.load(mean_ptr + row + p, mask=mask_p, other=0.0)
        rstd = tl.load(rstd_ptr + row + p, mask=mask_p, other=0.0)
        dtype: tl.constexpr = fc1_ptr.dtype.element_ty
        x0 = _standardised(_tile(y_ptr, p * C, c0, mask_p, c0 < C), c0 < C, mean, rstd, C0 <= C)
        if STORE_XHAT:
            tl.store(xhat_ptr + (p[:, None] * C + c0[None, :]), x0.to(dtype), mask=mask_p[:, None] & (c0 < C)[None, :])
        normed0 = _affine(x0, c0, norm_weight_ptr, norm_bias_ptr, C, HAS_NORM_WEIGHT, HAS_NORM_BIAS, C0 <= C)
        normed0 = _without_dropped(normed0, factors, HAS_ROW_SCALE).to(dtype)
        d0 = _rows_of(d_ptr, p, c0, mask_p, C)
        g0 = tl.zeros((BLOCK_P, C0), tl.float32)
        if C1:
            x1 = _standardised(_tile(y_ptr, p * C, c1, mask_p, c1 < C), c1 < C, mean, rstd, C0 + C1 == C)
            if STORE_XHAT:
                tl.store(
                    xhat_ptr + (p[:, None] * C + c1[None, :]), x1.to(dtype), mask=mask_p[:, None] & (c1 < C)[None, :]
                )
            normed1 = _affine(x1, c1, norm_weight_ptr, norm_bias_ptr, C, HAS_NORM_WEIGHT, HAS_NORM_BIAS, C0 + C1 == C)
            normed1 = _without_dropped(normed1, factors, HAS_ROW_SCALE).to(dtype)
            d1 = _rows_of(d_ptr, p, c1, mask_p, C)
            g1 = tl.zeros((BLOCK_P, C1), tl.float32)
        unscale = tl.load(unscale_ptr) if BALANCED else 1.0
        # The trip count is a constant: where the loop may have no iteration, ptxas waits after every product.
        for start in range(0, D, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            bias = _vector(fc1_bias_ptr, k, D, HAS_FC1_BIAS, 0.0, WHOLE).to(dtype).to(tl.float32)
            weight0 = _matrix(fc1_ptr, k, c0, C, 1, D, C, WHOLE, C0 <= C)
            u = tl.dot(normed0, tl.trans(weight0), tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + bias[None, :])
            dh = tl.dot(d0, _matrix(scaled_ptr, c0, k, 1, C, C, D, C0 <= C, WHOLE))
            if C1:
                weight1 = _matrix(fc1_ptr, k, c1, C, 1, D, C, WHOLE, C0 + C1 == C)
                u = tl.dot(normed1, tl.trans(weight1), u)
                dh = tl.dot(d1, _matrix(scaled_ptr, c1, k, 1, C, C, D, C0 + C1 == C, WHOLE), dh)
            if BALANCED:
                dh *= unscale
            offs, mask = p[:, None] * D + k[None, :], mask_p[:, None] & (k < D)[None, :]
            if STORE_H:
                tl.store(h_ptr + offs, gelu(u, dtype).to(dtype), mask=mask)
            du = times(dh, gelu_derivative(u, dtype))
            if PARTIALS:
                tl.store(partials_ptr + k, tl.sum(du, 0), mask=k < D)
            du = du.to(dtype)
            if STORE_DU:
                tl.store(du_ptr + offs, du, mask=mask)
            g0 = tl.dot(du, weight0, g0)
            if C1:
                g1 = tl.dot(du, weight1, g1)
        g0 = times(g0, _vector(norm_weight_ptr, c0, C, HAS_NORM_WEIGHT, 1.0, C0 <= C)[None, :])
        x0 = _standardised(_tile(y_ptr, p * C, c0, mask_p, c0 < C), c0 < C, mean, rstd, C0 <= C)
        sum_g, sum_gx = tl.sum(g0, 1), tl.sum(times(g0, x0), 1)
        if C1:
            g1 = times(g1, _vector(norm_weight_ptr, c1, C, HAS_NORM_WEIGHT, 1.0, C0 + C1 == C)[None, :])
            x1 = _standardised(_tile(y_ptr, p * C, c1, mask_p, c1 < C), c1 < C, mean, rstd, C0 + C1 == C)
            sum_g += tl.sum(g1, 1)
            sum_gx += tl.sum(times(g1, x1), 1)
            _store_dy(g1, x1, rstd, sum_g, sum_gx, dy_ptr, p, c1, mask_p, C)
        _store_dy(g0, x0, rstd, sum_g, sum_gx, dy_ptr, p, c0, mask_p, C)
    else:
        _store_zeros(dy_ptr, p * C, c0, mask_p, c0 < C)
        if STORE_XHAT:
            _store_zeros(xhat_ptr, p * C, c0, mask_p, c0 < C)
        if C1:
            _store_zeros(dy_ptr, p * C, c1, mask_p, c1 < C)
            if STORE_XHAT:
                _store_zeros(xhat_ptr, p * C, c1, mask_p, c1 < C)
        for start in range(0, D, BLOCK_D):
            k = start + tl.arange(0, BLOCK_D)
            if STORE_H:
                _store_zeros(h_ptr, p * D, k, mask_p, k < D)
            if STORE_DU:
                _store_zeros(du_ptr, p * D, k, mask_p, k < D)
            if PARTIALS:
                tl.store(partials_ptr + k, tl.zeros((BLOCK_D,), tl.float32), mask=k < D)


@triton.jit
def _without_dropped(normed, factors, HAS_ROW_SCALE: tl.constexpr):
    """Of dropped images in a block that is not all of such, u is the bias: it could be infinite, and dh is 0."""
    if HAS_ROW_SCALE:
        normed = tl.where(factors[:, None] == 0.0, 0.0, normed)
    return normed


@triton.jit
def _rows_of(ptr, p, c, mask_p, C: tl.constexpr):
    return tl.load(ptr + (p[:, None] * C + c[None, :]), mask=mask_p[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _finish_hidden(
    product, dh, k, p, mask_p, factors, fc1_bias_ptr, product_ptr, vectors_ptr, h_ptr, du_ptr, partials_ptr,
    D: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, GIVEN_PRODUCT: tl.constexpr,
    SUMS: tl.constexpr, PARTIALS: tl.constexpr, STORE_H: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """h and du of a tile, stored, and two sums of each of its rows, as in norm_linear's _finish_du."""
    mask_k = k < D
    dtype: tl.constexpr = du_ptr.dtype.element_ty
    offs, mask = p[:, None] * D + k[None, :], mask_p[:, None] & mask_k[None, :]
    bias = _vector(fc1_bias_ptr, k, D, HAS_FC1_BIAS, 0.0, WHOLE).to(dtype).to(tl.float32)[None, :]
    if GIVEN_PRODUCT:
        product = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_ROW_SCALE:  # what is infinite in a dropped image is not to be multiplied by 0
        product = tl.where(factors[:, None] == 0.0, 0.0, product)
    u = product + bias
    if STORE_H:
        tl.store(h_ptr + offs, gelu(u, dtype).to(dtype), mask=mask)
    du = times(dh, gelu_derivative(u, dtype))
    tl.store(du_ptr + offs, du.to(dtype), mask=mask)
    if PARTIALS:
        tl.store(partials_ptr + k, tl.sum(du, 0), mask=mask_k)
    if SUMS:
        du = du.to(dtype).to(tl.float32)  # g is made of what was stored, and so are the sums of its rows
        s = _vector(vectors_ptr, k, D, True, 0.0, WHOLE)[None, :]
        t = _vector(vectors_ptr + D, k, D, True, 0.0, WHOLE)[None, :]
        return tl.sum(times(du, s), 1), tl.sum(times(du, product - t), 1)
    else:
        return 0.0, 0.0


@triton.jit(do_not_specialize=["P", "pixels", "length"])
def _block_bwd_hidden_kernel(
    normed_ptr, fc1_ptr, fc1_bias_ptr, product_ptr, d_ptr, scaled_ptr, unscale_ptr, row_scale_ptr, vectors_ptr, h_ptr,
    du_ptr, sums_ptr, partials_ptr, P, pixels, length,
    C: tl.constexpr, D: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, BALANCED: tl.constexpr,
    GIVEN_PRODUCT: tl.constexpr, SUMS: tl.constexpr, PARTIALS: tl.constexpr, STORE_H: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h and du of a block of rows and hidden channels, from u and dh, two products in one loop; ``length`` is C.

    GIVEN_PRODUCT: u without its bias was kept, and dh is the only product.
    SUMS, PARTIALS: as in _norm_linear_bwd_du_kernel.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    HALF: tl.constexpr = BLOCK_D // 2
    WHOLE_C: tl.constexpr = C % BLOCK_C == 0
    part, tile = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = part * BLOCK_P
    p, k, q = tl.arange(0, BLOCK_P), tile * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    mask_p, mask_k = (row + p < P)[:, None], (k < D)[None, :]
    factors = _row_factors(row_scale_ptr, row, p, row + p < P, pixels, HAS_ROW_SCALE)
    end = tl.where(_all_dropped(factors), 0, length)
    rows, columns = p[:, None] * C + q[None, :], k[None, :] * C + q[:, None]
    normed_ptr += row.to(tl.int64) * C
    d_ptr += row.to(tl.int64) * C
    u = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dh = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, end, BLOCK_C):
        inside_a = mask_p if WHOLE_C else mask_p & (start + q < C)[None, :]
        inside_b = mask_k if WHOLE_C else mask_k & (start + q < C)[:, None]
        a = tl.load(d_ptr + rows, mask=inside_a, other=0.0)
        b = tl.load(scaled_ptr + columns, mask=inside_b, other=0.0)
        if not GIVEN_PRODUCT:
            a_u = tl.load(normed_ptr + rows, mask=inside_a, other=0.0)
            b_u = tl.load(fc1_ptr + columns, mask=inside_b, other=0.0)
            u = tl.dot(a_u, b_u, u, input_precision=PRECISION)
        dh = tl.dot(a, b, dh, input_precision=PRECISION)
        rows += BLOCK_C
        columns += BLOCK_C
    if BALANCED:
        dh *= tl.load(unscale_ptr)
    h_ptr += row.to(tl.int64) * D
    du_ptr += row.to(tl.int64) * D
    product_ptr += row.to(tl.int64) * D
    partials_ptr += part.to(tl.int64) * D
    mask_p = row + p < P
    k = tile * BLOCK_D + tl.arange(0, HALF)
    u_left, u_right = _halves(u, BLOCK_P, BLOCK_D)
    dh_left, dh_right = _halves(dh, BLOCK_P, BLOCK_D)
    sum_g, sum_gx = _finish_hidden(
        u_left, dh_left, k, p, mask_p, factors, fc1_bias_ptr, product_ptr, vectors_ptr, h_ptr, du_ptr, partials_ptr, D,
        HAS_FC1_BIAS, HAS_ROW_SCALE, GIVEN_PRODUCT, SUMS, PARTIALS, STORE_H, D % BLOCK_D == 0,
    )  # fmt: skip
    more_g, more_gx = _finish_hidden(
        u_right, dh_right, k + HALF, p, mask_p, factors, fc1_bias_ptr, product_ptr, vectors_ptr, h_ptr, du_ptr,
        partials_ptr, D, HAS_FC1_BIAS, HAS_ROW_SCALE, GIVEN_PRODUCT, SUMS, PARTIALS, STORE_H, D % BLOCK_D == 0,
    )  # fmt: skip
    if SUMS:
        sums_ptr += tile.to(tl.int64) * 2 * P + row
        tl.store(sums_ptr + p, sum_g + more_g, mask=mask_p)
        tl.store(sums_ptr + P.to(tl.int64) + p, sum_gx + more_gx, mask=mask_p)


@triton.jit(do_not_specialize=["parts"])
def _block_bwd_finish_kernel(
    parts_ptr, fc2_ptr, layer_scale_ptr, dfc2_ptr, scale_parts_ptr, parts,
    C: tl.constexpr, D: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, STORE_DFC2: tl.constexpr,
    SCALE_PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW2 = λ∘Q (C, D), where Qᵀ (D, C) is the sum of ``parts``; of each block of hidden channels, Σ_k W2_ck·Q_ck."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block_k, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    k, c = block_k * BLOCK_D + tl.arange(0, BLOCK_D), block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (k < D)[:, None] & (c < C)[None, :]
    offs = k[:, None] * C + c[None, :]
    q = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for start in range(0, parts, 8):
        for ahead in tl.static_range(8):  # loads that wait together
            q += tl.load(parts_ptr + ahead * D * C + offs, mask=mask & (start + ahead < parts), other=0.0)
        parts_ptr += 8 * D * C
    offs = k[:, None] + c[None, :] * D
    if STORE_DFC2:
        dfc2 = q * _vector(layer_scale_ptr, c, C, HAS_LAYER_SCALE, 1.0, C % BLOCK_C == 0)[None, :]
        tl.store(dfc2_ptr + offs, dfc2.to(dfc2_ptr.dtype.element_ty), mask=mask)
    if SCALE_PARTS:
        fc2 = tl.load(fc2_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(scale_parts_ptr + block_k * C + c, tl.sum(times(fc2, q), 0), mask=c < C)


@triton.jit(do_not_specialize=["scale_parts", "sum_parts"])
def _block_bwd_scale_sum_kernel(
    scale_parts_ptr, sum_parts_ptr, fc2_ptr, fc2_bias_ptr, layer_scale_ptr, dlayer_scale_ptr, dfc2_bias_ptr,
    scale_parts, sum_parts,
    C: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, STORE_SCALE: tl.constexpr,
    STORE_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dλ_c = Σ_k W2_ck·Q_ck + b2_c·Σ_p d_pc and db2 = λ∘Σ_p d, from their parts; b2 is rounded to the dtype of fc2."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_FC2_BIAS:
        sums = _sum_of_parts(sum_parts_ptr, C, sum_parts, c, c < C, BLOCK_P, BLOCK_C)
    if STORE_SCALE:
        bias = _vector(fc2_bias_ptr, c, C, HAS_FC2_BIAS, 0.0, False).to(fc2_ptr.dtype.element_ty).to(tl.float32)
        scale = _sum_of_parts(scale_parts_ptr, C, scale_parts, c, c < C, BLOCK_P, BLOCK_C) + bias * sums
        tl.store(dlayer_scale_ptr + c, scale.to(dlayer_scale_ptr.dtype.element_ty), mask=c < C)
    if STORE_BIAS:
        dbias = sums * _vector(layer_scale_ptr, c, C, HAS_LAYER_SCALE, 1.0, False)
        tl.store(dfc2_bias_ptr + c, dbias.to(dfc2_bias_ptr.dtype.element_ty), mask=c < C)
