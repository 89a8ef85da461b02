"""What the tensor-core kernels need before and after them: tables of taps, maps in blocks, taps out of products.

Patches of R × T outputs, blocks of R × T inputs, pairs of blocks: kernels_gluon.py and this folder's README.
"""

import triton
import triton.language as tl

SIZES = [
    "has_bias", "flip", "channels", "padded", "groups", "kh", "kw", "stride_wc", "stride_wh", "stride_ww", "stride_b",
    "log_r", "N", "H", "W", "HB", "WB", "above", "left", "pairs", "groups", "column_groups", "wants_dw", "wants_db",
]  # fmt: skip
POINTERS = ["x_ptr", "weight_ptr", "bias_ptr", "blocks_ptr", "sums_ptr", "dw_ptr", "db_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_fragments_kernel(
    weight_ptr, bias_ptr, table_ptr, table_bias_ptr, has_bias, flip, channels, padded, groups, kh, kw,
    stride_wc, stride_wh, stride_ww, stride_b, log_r,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Second factors (pairs · groups, padded, 128) of weight (C, 1, KH, KW), in the table's dtype, and the bias.

    Row k of the factor for pair m of blocks and patch row q is pixel (rr, cc) of block b = 2m + k // 8, its column n is
    output (r, c) of the patch; the entry is tap (q·R + rr − r, b·T + cc − c), 0 where there is none. Stored lane by
    lane: lane 4n + t has rows 2t, 2t + 1, 2t + 8, 2t + 9. ``flip`` turns the taps around. One program per (factor,
    BLOCK_C channels); channels from C to ``padded`` are zeros.
    """
    log_t = 3 - log_r  # R and T are powers of 2, and divisions by them shifts
    in_row = (1 << log_t) - 1
    DTYPE: tl.constexpr = table_ptr.dtype.element_ty
    blocks = (padded + BLOCK_C - 1) // BLOCK_C
    at = tl.program_id(0) // blocks
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    entry = tl.arange(0, 128)
    n = entry // 16
    inner = entry // 4 % 4 * 2 + entry % 2
    block = at // groups * 2 + entry // 2 % 2
    i = (at % groups << log_r) + (inner >> log_t) - (n >> log_t)
    j = (block << log_t) + (inner & in_row) - (n & in_row)
    there = (i >= 0) & (i < kh) & (j >= 0) & (j < kw)
    i = tl.where(flip != 0, kh - 1 - i, i)
    j = tl.where(flip != 0, kw - 1 - j, j)
    inside = (offs_c < channels)[:, None] & there[None, :]
    of_tap = i.to(tl.int64) * stride_wh + j.to(tl.int64) * stride_ww
    pointers = weight_ptr + (offs_c.to(tl.int64) * stride_wc)[:, None] + of_tap[None, :]
    value = tl.load(pointers, mask=inside, other=0.0).to(DTYPE)
    to = (at.to(tl.int64) * padded + offs_c)[:, None] * 128 + entry[None, :]
    tl.store(table_ptr + to, value, mask=(offs_c < padded)[:, None])
    first = at == 0
    given = first & (offs_c < channels) & (has_bias != 0)
    bias = tl.load(bias_ptr + offs_c.to(tl.int64) * stride_b, mask=given, other=0.0).to(DTYPE).to(tl.float32)
    tl.store(table_bias_ptr + offs_c, bias, mask=first & (offs_c < padded))


@triton.jit(do_not_specialize=SIZES)
def _depthwise_blocks_kernel(
    x_ptr, blocks_ptr, N, H, W, HB, WB, above, left,
    C: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A map (N, H, W, C) in blocks of R × T pixels, (N, HB, WB, PADDED, 8); zeros outside of the map and beyond C.

    PADDED is C rounded up to a multiple of 8. Block (u, v) begins at row u·R − ``above`` and column v·T − ``left``. One
    program per (BLOCK_P blocks, BLOCK_C channels); there are less than 2^31 blocks.
    """
    T: tl.constexpr = 8 // R
    PADDED: tl.constexpr = (C + 7) // 8 * 8
    CHANNEL_BLOCKS: tl.constexpr = (PADDED + BLOCK_C - 1) // BLOCK_C
    offs_c = tl.program_id(0) % CHANNEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tl.program_id(0) // CHANNEL_BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    n = at // (HB * WB)
    u = at // WB % HB
    v = at % WB
    e = tl.arange(0, 8)
    row = (u * R - above)[:, None] + (e // T)[None, :]
    column = (v * T - left)[:, None] + (e % T)[None, :]
    there = (n < N)[:, None] & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    pixel = (n[:, None].to(tl.int64) * H + row) * W + column
    pointers = x_ptr + pixel[:, :, None] * C + offs_c[None, None, :]
    x = tl.load(pointers, mask=there[:, :, None] & (offs_c < C)[None, None, :], other=0.0)
    to = blocks_ptr + (at[:, None].to(tl.int64) * PADDED + offs_c[None, :])[:, :, None] * 8 + e[None, None, :]
    tl.store(to, tl.permute(x, (0, 2, 1)), mask=((n < N)[:, None] & (offs_c < PADDED)[None, :])[:, :, None])


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_diagonals_kernel(
    sums_ptr, dw_ptr, db_ptr, wants_dw, wants_db, channels, padded, pairs, groups, kh, kw, log_r,
    stride_wc, stride_wh, stride_ww,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw (C, 1, KH, KW) and db (C,) from sums of products (column groups, pairs · groups + 1, padded, 16, 8), fp32.

    Tap (i, j) is the product of output (r, c) of a patch with input (i + r, j + c) of its window, summed over the eight
    outputs. ``pairs`` is that of one column group. One program per (tap or, last, the bias,
    BLOCK_C channels).
    """
    log_t = 3 - log_r
    in_row = (1 << log_t) - 1
    in_column = (1 << log_r) - 1
    channel_blocks = (channels + BLOCK_C - 1) // BLOCK_C
    tap = tl.program_id(0) // channel_blocks
    offs_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    i = tap // kw
    j = tap % kw
    is_bias = i == kh
    n = tl.arange(0, 8)
    row = i + (n >> log_t)
    column = j + (n & in_row)
    block = column >> log_t
    pair = block // 2
    at = tl.where(is_bias, pairs * groups, pair % pairs * groups + (row >> log_r))
    factor = tl.where(is_bias, 0, pair // pairs) * (pairs * groups + 1) + at
    pixel = tl.where(is_bias, 0, block % 2 * 8 + ((row & in_column) << log_t) + (column & in_row))
    pointers = (
        sums_ptr + (factor.to(tl.int64) * padded)[None, :] * 128 + offs_c[:, None] * 128 + (pixel * 8 + n)[None, :]
    )
    total = tl.sum(tl.load(pointers, mask=inside[:, None], other=0.0), axis=1)
    to = dw_ptr + offs_c.to(tl.int64) * stride_wc + i.to(tl.int64) * stride_wh + j.to(tl.int64) * stride_ww
    tl.store(to, total.to(dw_ptr.dtype.element_ty), mask=inside & (is_bias == 0) & (wants_dw != 0))
    tl.store(db_ptr + offs_c, total.to(db_ptr.dtype.element_ty), mask=inside & is_bias & (wants_db != 0))
