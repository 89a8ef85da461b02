"""What the kernels of this family are made of: tiles of rows, their statistics, products of matrices."""

import triton
import triton.language as tl

from ..primitives import times


@triton.jit
def _tile(ptr, offs_row, offs_col, mask_row, mask_col):
    """fp32 values at ``offs_row + offs_col``, 0 beside the masks."""
    mask = mask_row[:, None] & mask_col[None, :]
    return tl.load(ptr + (offs_row[:, None] + offs_col[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(ptr, offs, size: tl.constexpr, GIVEN: tl.constexpr, otherwise: tl.constexpr, WHOLE: tl.constexpr):
    """Parameters in fp32, 0 from ``size`` on unless all are inside (WHOLE); ``otherwise`` where there are none."""
    if not GIVEN:
        return tl.full(offs.shape, otherwise, tl.float32)
    elif WHOLE:  # without a mask, neighbours are loaded together
        return tl.load(ptr + offs).to(tl.float32)
    else:
        return tl.load(ptr + offs, mask=offs < size, other=0.0).to(tl.float32)


@triton.jit
def _over(total, C: tl.constexpr):
    """total / C, exact where that is a number: a product with 1 / C, and what it is off by."""
    quotient = total * (1 / C)
    return quotient + (total - quotient * C) * (1 / C)


@triton.jit
def _statistics(x0, mask0, x1, mask1, eps, C: tl.constexpr, C1: tl.constexpr):
    """Mean and 1/√(variance + ε) of rows in one or two tiles.

    In two passes, the second of which corrects the mean: that of a constant row is its constant, to the bit, and
    nothing is lost where the mean is thousands of standard deviations.
    """
    # Up to 2^14 numbers, so their sum does not overflow; what becomes too small that way, the second pass adds.
    total = tl.sum(x0 * 2**-14, 1)
    if C1:
        total += tl.sum(x1 * 2**-14, 1)
    mean = _over(total, C) * 2**14
    d0 = tl.where(mask0[None, :], x0 - mean[:, None], 0.0)
    rest = tl.sum(d0, 1)
    squares = tl.sum(times(d0, d0), 1)
    if C1:
        d1 = tl.where(mask1[None, :], x1 - mean[:, None], 0.0)
        rest += tl.sum(d1, 1)
        squares += tl.sum(times(d1, d1), 1)
    correction = rest * (1 / C)
    variance = tl.maximum(squares - rest * correction, 0.0, propagate_nan=tl.PropagateNan.ALL) * (1 / C)
    # Squares that overflow are an infinite variance, as in PyTorch; computed as above it would be NaN.
    variance = tl.where(squares == float("inf"), squares, variance)
    variance += eps
    rstd = tl.rsqrt(variance)
    # One step of Newton's, as the GPU's root is off by up to two units in the last place, even of 1; not beyond the
    # numbers for which it is one.
    error = tl.where((variance > 1e-37) & (variance < float("inf")), 1.0 - variance * rstd * rstd, 0.0)
    return mean + correction, rstd + 0.5 * rstd * error


@triton.jit
def _standardised(x, mask, mean, rstd, WHOLE: tl.constexpr):
    """x̂; 0 beside the mask, where mean·rstd may be infinite, and what it is multiplied with is 0."""
    xhat = (x - mean[:, None]) * rstd[:, None]
    if not WHOLE:
        xhat = tl.where(mask[None, :], xhat, 0.0)
    return xhat


@triton.jit
def _matrix(
    ptr, offs_m, offs_n, stride_m: tl.constexpr, stride_n: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix (M, N) of any strides, in its own dtype, 0 from M and from N on, unless all are inside."""
    pointers = ptr + (offs_m[:, None] * stride_m + offs_n[None, :] * stride_n)
    if WHOLE_M and WHOLE_N:  # a load without a mask is copied to shared memory in half the instructions
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _weights(ptr, offs_k, offs_c, C: tl.constexpr, D: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_C: tl.constexpr):
    """A tile of Wᵀ, channels × outputs."""
    return _matrix(ptr, offs_c, offs_k, 1, C, C, D, WHOLE_C, WHOLE_K)


@triton.jit
def _product(
    a_ptr, offs_a, mask_a, stride_a: tl.constexpr, b_ptr, offs_b, mask_b, stride_b: tl.constexpr, length,
    end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_q a[m, q]·b[q, n] over q < ``length``, (BLOCK_M, BLOCK_N).

    Args:
        offs_a, offs_b: (BLOCK_M, 1) and (1, BLOCK_N), where each row of a and each column of b begins.
        stride_a, stride_b: from one q to the next.
        length, end: the same, the number of products. As a constant, ``length`` would be unrolled to thousands of
            instructions, while ``end`` as a constant tells which neighbours can be loaded together.
        WHOLE: is it a multiple of BLOCK_K?
    """
    q = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a_ptrs = a_ptr + (offs_a + q[None, :] * stride_a)
    b_ptrs = b_ptr + (offs_b + q[:, None] * stride_b)
    for start in range(0, length, BLOCK_K):
        if WHOLE:
            a = tl.load(a_ptrs, mask=mask_a, other=0.0)
            b = tl.load(b_ptrs, mask=mask_b, other=0.0)
        else:
            inside = start + q < end
            a = tl.load(a_ptrs, mask=mask_a & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_b & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_a
        b_ptrs += BLOCK_K * stride_b
    return sums


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile, to be worked on one after the other: with half of the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _preactivation(
    normed_ptr, weight_ptr, row, p, mask_p, k, mask_k, length, C: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Normalised rows times Wᵀ, (BLOCK_P, BLOCK_D), without the bias."""
    return _product(
        normed_ptr + row.to(tl.int64) * C, p[:, None] * C, mask_p[:, None], 1,
        weight_ptr, k[None, :] * C, mask_k[None, :], 1, length, C,
        BLOCK_P, BLOCK_D, BLOCK_C, C % BLOCK_C == 0, PRECISION,
    )  # fmt: skip
