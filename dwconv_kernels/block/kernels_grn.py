"""Global response normalisation of a block's hidden channels: h = a·s + v with s = 1 + w∘R of each image.

Conventions as in kernels.py. Programs take a block of pixels of one image, and a block of hidden channels. The sums
over an image are finished by launch.py: they are N·D numbers.
"""

import triton
import triton.language as tl

from ..norm_linear.tiles import _tile, _vector
from ..primitives import gelu, gelu_derivative, times


@triton.jit(do_not_specialize=["pixels", "images"])
def _block_grn_sums_kernel(
    a_ptr, dh_ptr, fc1_bias_ptr, sums_ptr, pixels, images,
    D: tl.constexpr, BACKWARD: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums (images, D) = Σ a² over the pixels of each image.

    BACKWARD: (3, images, D): of Σ a², Σ dh·a and Σ dh, where ``a_ptr`` has u without its bias, and a = gelu(u).
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    n = tl.program_id(0) // blocks
    p, k = tl.arange(0, BLOCK_P), tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    fc1_bias = _vector(fc1_bias_ptr, k, D, HAS_FC1_BIAS, 0.0, False).to(dtype).to(tl.float32)
    a_ptr += n.to(tl.int64) * pixels * D
    dh_ptr += n.to(tl.int64) * pixels * D
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    totals = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        mask_p = start + p < pixels
        a = _tile(a_ptr, p * D, k, mask_p, k < D)
        if BACKWARD:
            a = tl.where(mask_p[:, None], a + fc1_bias[None, :], 0.0)
            a = gelu(a, dtype).to(dtype).to(tl.float32)
            dh = _tile(dh_ptr, p * D, k, mask_p, k < D)
            products += dh * a
            totals += dh
        squares += a * a
        a_ptr += BLOCK_P * D
        dh_ptr += BLOCK_P * D
    offset = n.to(tl.int64) * D
    tl.store(sums_ptr + offset + k, tl.sum(squares, 0), mask=k < D)
    if BACKWARD:
        size = images.to(tl.int64) * D
        tl.store(sums_ptr + size + offset + k, tl.sum(products, 0), mask=k < D)
        tl.store(sums_ptr + 2 * size + offset + k, tl.sum(totals, 0), mask=k < D)


@triton.jit
def _place(pixels, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Image, first pixel in it and first hidden channel of this program."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    chunks = (pixels + BLOCK_P - 1) // BLOCK_P
    rest = tl.program_id(0) // blocks
    return rest // chunks, rest % chunks * BLOCK_P, tl.program_id(0) % blocks * BLOCK_D


@triton.jit(do_not_specialize=["pixels"])
def _block_grn_apply_kernel(
    a_ptr, scale_ptr, grn_bias_ptr, pixels,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """a becomes h."""
    n, first, column = _place(pixels, D, BLOCK_P, BLOCK_D)
    p, k = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_D)
    mask_p = first + p < pixels
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    a_ptr += (n.to(tl.int64) * pixels + first) * D
    scale = _vector(scale_ptr + n.to(tl.int64) * D, k, D, True, 0.0, False)
    bias = _vector(grn_bias_ptr, k, D, True, 0.0, False).to(dtype).to(tl.float32)
    h = _tile(a_ptr, p * D, k, mask_p, k < D) * scale[None, :] + bias[None, :]
    mask = mask_p[:, None] & (k < D)[None, :]
    tl.store(a_ptr + (p[:, None] * D + k[None, :]), h.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["pixels", "images"])
def _block_grn_bwd_kernel(
    product_ptr, dh_ptr, scale_ptr, direction_ptr, grn_bias_ptr, fc1_bias_ptr, vectors_ptr, sums_ptr, partials_ptr,
    pixels, images,
    D: tl.constexpr, HAS_FC1_BIAS: tl.constexpr, SUMS: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u without its bias becomes h, dh becomes du = (dh·s + a·dG/G)∘gelu'(u); ``direction`` is dG/G of each image.

    SUMS, PARTIALS: as in _norm_linear_bwd_du_kernel, with a block of rows for each block of pixels of each image.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part, tile = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, first, column = _place(pixels, D, BLOCK_P, BLOCK_D)
    p, k = tl.arange(0, BLOCK_P), column + tl.arange(0, BLOCK_D)
    mask_p, mask_k = first + p < pixels, k < D
    dtype: tl.constexpr = product_ptr.dtype.element_ty
    row = n.to(tl.int64) * pixels + first
    product_ptr += row * D
    dh_ptr += row * D
    scale = _vector(scale_ptr + n.to(tl.int64) * D, k, D, True, 0.0, False)[None, :]
    direction = _vector(direction_ptr + n.to(tl.int64) * D, k, D, True, 0.0, False)[None, :]
    grn_bias = _vector(grn_bias_ptr, k, D, True, 0.0, False).to(dtype).to(tl.float32)[None, :]
    fc1_bias = _vector(fc1_bias_ptr, k, D, HAS_FC1_BIAS, 0.0, False).to(dtype).to(tl.float32)[None, :]
    product = _tile(product_ptr, p * D, k, mask_p, mask_k)
    u = product + fc1_bias
    a = gelu(u, dtype).to(dtype).to(tl.float32)
    du = _tile(dh_ptr, p * D, k, mask_p, mask_k) * scale + a * direction
    du = times(du, gelu_derivative(u, dtype))
    offs, mask = p[:, None] * D + k[None, :], mask_p[:, None] & mask_k[None, :]
    tl.store(product_ptr + offs, (a * scale + grn_bias).to(dtype), mask=mask)
    tl.store(dh_ptr + offs, du.to(dtype), mask=mask)
    if PARTIALS:
        tl.store(partials_ptr + part.to(tl.int64) * D + k, tl.sum(tl.where(mask, du, 0.0), 0), mask=mask_k)
    if SUMS:
        du = tl.where(mask, du.to(dtype).to(tl.float32), 0.0)
        s = _vector(vectors_ptr, k, D, True, 0.0, False)[None, :]
        t = _vector(vectors_ptr + D, k, D, True, 0.0, False)[None, :]
        rows = images.to(tl.int64) * pixels
        sums_ptr += tile.to(tl.int64) * 2 * rows + row
        tl.store(sums_ptr + p, tl.sum(times(du, s), 1), mask=mask_p)
        tl.store(sums_ptr + rows + p, tl.sum(times(du, product - t), 1), mask=mask_p)
