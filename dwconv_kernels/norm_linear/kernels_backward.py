"""The kernels of the backward pass of layer norm + linear (+ GELU); conventions as in kernels.py."""

import triton
import triton.language as tl

from ..primitives import gelu_derivative, times
from .tiles import _halves, _preactivation, _product, _standardised, _tile, _vector


@triton.jit
def _norm_linear_vectors_kernel(
    norm_weight_ptr, norm_bias_ptr, weight_ptr, vectors_ptr,
    C: tl.constexpr, D: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """vectors = (s, t), (2, D): s_k = Σ_c W_kc·γ_c and t_k = Σ_c W_kc·β_c."""
    k = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    t = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        weight = _tile(weight_ptr, k * C, c, k < D, c < C)
        s += weight * _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, C % BLOCK_C == 0)[None, :]
        t += weight * _vector(norm_bias_ptr, c, C, HAS_NORM_BIAS, 0.0, C % BLOCK_C == 0)[None, :]
    tl.store(vectors_ptr + k, tl.sum(s, 1), mask=k < D)
    tl.store(vectors_ptr + D + k, tl.sum(t, 1), mask=k < D)


@triton.jit
def _finish_du(
    product, k, p, mask_p, bias_ptr, dy_ptr, du_ptr, vectors_ptr, partials_ptr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, SUMS: tl.constexpr, PARTIALS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """du of a tile, stored, and two sums of each of its rows."""
    mask_k = k < D
    dtype: tl.constexpr = du_ptr.dtype.element_ty
    du = _tile(dy_ptr, p * D, k, mask_p, mask_k)
    if GELU:
        bias = _vector(bias_ptr, k, D, HAS_BIAS, 0.0, WHOLE).to(dtype).to(tl.float32)
        du = times(du, gelu_derivative(product + bias[None, :], dtype))
        tl.store(du_ptr + (p[:, None] * D + k[None, :]), du.to(dtype), mask=mask_p[:, None] & mask_k[None, :])
    if PARTIALS:
        tl.store(partials_ptr + k, tl.sum(du, 0), mask=mask_k)
    du = du.to(dtype).to(tl.float32)  # g is made of what was stored, and so are the sums of its rows
    if SUMS:
        s = _vector(vectors_ptr, k, D, True, 0.0, WHOLE)
        t = _vector(vectors_ptr + D, k, D, True, 0.0, WHOLE)
        return tl.sum(times(du, s[None, :]), 1), tl.sum(times(du, product - t[None, :]), 1)
    else:
        return 0.0, 0.0


@triton.jit(do_not_specialize=["P", "length"])
def _norm_linear_bwd_du_kernel(
    normed_ptr, weight_ptr, bias_ptr, vectors_ptr, dy_ptr, du_ptr, sums_ptr, partials_ptr, P, length,
    C: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, SUMS: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du = dy∘gelu'(u) (P, D), and what sums over it come for free.

    SUMS: of each row and block of outputs, Σ_k du_k·s_k = Σ_c g_c and Σ_k du_k·(u_k − b_k − t_k) = Σ_c g_c·x̂_c: what
    the layer norm's gradient needs before g = (du·W)∘γ is there.
    PARTIALS: of each block of rows, Σ_p du_pk.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    HALF: tl.constexpr = BLOCK_D // 2
    part, tile = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = part * BLOCK_P
    p, k = tl.arange(0, BLOCK_P), tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_p = row + p < P
    if GELU or SUMS:
        product = _preactivation(
            normed_ptr, weight_ptr, row, p, mask_p, k, k < D, length, C, D, BLOCK_P, BLOCK_D, BLOCK_C, PRECISION
        )
    else:
        product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    left, right = _halves(product, BLOCK_P, BLOCK_D)
    dy_ptr += row.to(tl.int64) * D
    du_ptr += row.to(tl.int64) * D
    partials_ptr += part.to(tl.int64) * D
    k = tile * BLOCK_D + tl.arange(0, HALF)
    sum_g, sum_gx = _finish_du(
        left, k, p, mask_p, bias_ptr, dy_ptr, du_ptr, vectors_ptr, partials_ptr, D, HAS_BIAS, GELU, SUMS, PARTIALS,
        D % BLOCK_D == 0,
    )  # fmt: skip
    more_g, more_gx = _finish_du(
        right, k + HALF, p, mask_p, bias_ptr, dy_ptr, du_ptr, vectors_ptr, partials_ptr, D, HAS_BIAS, GELU, SUMS,
        PARTIALS, D % BLOCK_D == 0,
    )  # fmt: skip
    if SUMS:
        sums_ptr += tile.to(tl.int64) * 2 * P + row
        tl.store(sums_ptr + p, sum_g + more_g, mask=mask_p)
        tl.store(sums_ptr + P.to(tl.int64) + p, sum_gx + more_gx, mask=mask_p)


@triton.jit
def _store_dx(g, xhat, rstd, sum_g, sum_gx, dx_ptr, p, c, mask_p, C: tl.constexpr):
    dx = rstd[:, None] * (g - (sum_g * (1 / C))[:, None] - xhat * (sum_gx * (1 / C))[:, None])
    mask = mask_p[:, None] & (c < C)[None, :]
    tl.store(dx_ptr + (p[:, None] * C + c[None, :]), dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "length", "sum_blocks"])
def _norm_linear_bwd_x_kernel(
    du_ptr, weight_ptr, x_ptr, norm_weight_ptr, mean_ptr, rstd_ptr, sums_ptr, dx_ptr, P, stride_x, length, sum_blocks,
    C: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a block of rows and channels, from g = (du·W)∘γ.

    WHOLE_ROWS: the block has all channels, and the two means over them are taken here. Else they are the sums of
    _norm_linear_bwd_du_kernel, ``sum_blocks`` of them.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    HALF: tl.constexpr = BLOCK_C // 2
    row = tl.program_id(0) // blocks * BLOCK_P
    column = tl.program_id(0) % blocks * BLOCK_C
    p, c = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_C)
    mask_p = row + p < P
    dnormed = _product(
        du_ptr + row.to(tl.int64) * D, p[:, None] * D, mask_p[:, None], 1,
        weight_ptr, c[None, :], (c < C)[None, :], C, length, D,
        BLOCK_P, BLOCK_C, BLOCK_D, D % BLOCK_D == 0, PRECISION,
    )  # fmt: skip
    if DENSE:
        stride_x = C
    mean = tl.load(mean_ptr + row + p, mask=mask_p, other=0.0)
    rstd = tl.load(rstd_ptr + row + p, mask=mask_p, other=0.0)
    x_ptr += row.to(tl.int64) * stride_x
    dx_ptr += row.to(tl.int64) * C
    if WHOLE_ROWS:
        x = _tile(x_ptr, p * stride_x, c, mask_p, c < C)
        xhat = _standardised(x, c < C, mean, rstd, C % BLOCK_C == 0)
        g = times(dnormed, _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, C % BLOCK_C == 0)[None, :])
        _store_dx(g, xhat, rstd, tl.sum(g, 1), tl.sum(times(g, xhat), 1), dx_ptr, p, c, mask_p, C)
    else:
        sum_g = tl.zeros((BLOCK_P,), tl.float32)
        sum_gx = tl.zeros((BLOCK_P,), tl.float32)
        for _ in range(sum_blocks):
            sum_g += tl.load(sums_ptr + row + p, mask=mask_p, other=0.0)
            sum_gx += tl.load(sums_ptr + P.to(tl.int64) + row + p, mask=mask_p, other=0.0)
            sums_ptr += 2 * P.to(tl.int64)
        left, right = _halves(dnormed, BLOCK_P, BLOCK_C)
        c = column + tl.arange(0, HALF)
        for half in tl.static_range(2):
            xhat = _standardised(_tile(x_ptr, p * stride_x, c, mask_p, c < C), c < C, mean, rstd, True)
            g = left if half == 0 else right
            g *= _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, C % BLOCK_C == 0)[None, :]
            _store_dx(g, xhat, rstd, sum_g, sum_gx, dx_ptr, p, c, mask_p, C)
            c += HALF


@triton.jit(do_not_specialize=["P", "rows"])
def _norm_linear_bwd_weight_kernel(
    du_ptr, xhat_ptr, parts_ptr, P, rows,
    C: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """parts (parts, D, C) of G = duᵀ·x̂, each over ``rows`` rows, a multiple of BLOCK_P."""
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part, tile = tl.program_id(0) // (blocks_d * blocks_c), tl.program_id(0) % (blocks_d * blocks_c)
    k = tile // blocks_c * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tile % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part.to(tl.int64) * rows
    length = tl.minimum(rows, P - part * rows)
    sums = _product(
        du_ptr + first * D, k[:, None], (k < D)[:, None], D,
        xhat_ptr + first * C, c[None, :], (c < C)[None, :], C, length, length,
        BLOCK_D, BLOCK_C, BLOCK_P, False, PRECISION,
    )  # fmt: skip
    parts_ptr += part.to(tl.int64) * (D * C)
    tl.store(parts_ptr + (k[:, None] * C + c[None, :]), sums, mask=(k < D)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_of_parts(ptr, stride, parts, offs, mask, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Σ over ``parts`` rows of what is at ``offs``, (SIZE,), in a fixed order."""
    part = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, SIZE), tl.float32)
    for start in range(0, parts, BLOCK):
        pointers = ptr + ((start + part).to(tl.int64)[:, None] * stride + offs[None, :])
        sums += tl.load(pointers, mask=(start + part < parts)[:, None] & mask[None, :], other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["parts", "group"])
def _norm_linear_column_sum_kernel(
    partials_ptr, out_ptr, parts, group,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (groups, D): sums of ``group`` rows of partials (parts, D) each, where those are too many to go on with."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) // blocks * group
    k = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    partials_ptr += first.to(tl.int64) * D
    sums = _sum_of_parts(partials_ptr, D, tl.minimum(group, parts - first), k, k < D, BLOCK_P, BLOCK_D)
    tl.store(out_ptr + (tl.program_id(0) // blocks).to(tl.int64) * D + k, sums, mask=k < D)


@triton.jit(do_not_specialize=["parts", "row_blocks"])
def _norm_linear_finish_kernel(
    parts_ptr, partials_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr, dw_ptr, db_ptr, norm_parts_ptr, parts,
    row_blocks,
    C: tl.constexpr, D: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_PARTS: tl.constexpr, STORE_DW: tl.constexpr, STORE_DB: tl.constexpr, NORM_PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW = G∘γ + db⊗β and db; of each block of outputs, the parts of dγ_c = Σ_k W_kc·G_kc and dβ_c = Σ_k W_kc·db_k.

    G is the sum of ``parts``, db that of ``partials`` (row_blocks, D); the parts for the norm are (blocks, 2, C).
    """
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block_k, block_c = tl.program_id(0) // blocks_c, tl.program_id(0) % blocks_c
    k, c = block_k * BLOCK_D + tl.arange(0, BLOCK_D), block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    db = _sum_of_parts(partials_ptr, D, row_blocks, k, k < D, BLOCK_P, BLOCK_D)
    if STORE_DB and block_c == 0:
        tl.store(db_ptr + k, db.to(db_ptr.dtype.element_ty), mask=k < D)
    offs, mask = k[:, None] * C + c[None, :], (k < D)[:, None] & (c < C)[None, :]
    if HAS_PARTS:
        g = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
        for start in range(0, parts, 8):
            for ahead in tl.static_range(8):  # loads that wait together
                g += tl.load(parts_ptr + ahead * D * C + offs, mask=mask & (start + ahead < parts), other=0.0)
            parts_ptr += 8 * D * C
    if STORE_DW:
        dw = g * _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0, C % BLOCK_C == 0)[None, :]
        if HAS_NORM_BIAS:
            dw += db[:, None] * _vector(norm_bias_ptr, c, C, True, 0.0, C % BLOCK_C == 0)[None, :]
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if NORM_PARTS:
        weight = _tile(weight_ptr, k * C, c, k < D, c < C)
        norm_parts_ptr += block_k * 2 * C
        if HAS_PARTS:
            tl.store(norm_parts_ptr + c, tl.sum(times(weight, g), 0), mask=c < C)
        tl.store(norm_parts_ptr + C + c, tl.sum(times(weight, db[:, None]), 0), mask=c < C)


@triton.jit
def _norm_linear_norm_sum_kernel(
    norm_parts_ptr, dnorm_weight_ptr, dnorm_bias_ptr, parts,
    C: tl.constexpr, STORE_WEIGHT: tl.constexpr, STORE_BIAS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dγ and dβ from their parts (parts, 2, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if STORE_WEIGHT:
        sums = _sum_of_parts(norm_parts_ptr, 2 * C, parts, c, c < C, BLOCK_P, BLOCK_C)
        tl.store(dnorm_weight_ptr + c, sums.to(dnorm_weight_ptr.dtype.element_ty), mask=c < C)
    if STORE_BIAS:
        sums = _sum_of_parts(norm_parts_ptr + C, 2 * C, parts, c, c < C, BLOCK_P, BLOCK_C)
        tl.store(dnorm_bias_ptr + c, sums.to(dnorm_bias_ptr.dtype.element_ty), mask=c < C)
