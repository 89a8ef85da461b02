"""Depthwise convolution in Triton: forward, and input gradient. Formulas: this folder's README; strips: strips.py.

Every program is one warp. It owns 32 channels, one per lane, and a strip of BLOCK_W columns, and walks down the rows of
an image ("row streaming"): taps and the sums of all rows of the result that are not complete yet stay in registers, so
an input is read (BLOCK_W + KW − 1) / BLOCK_W times instead of KH·KW times, and no row is read twice.

Maps are (N, H, W, C) without gaps. Tables of taps are fp32, one row of C per tap, the bias last.
"""

import triton
import triton.language as tl

from ..primitives import KEEP, fma, plus, prefetch, repeated, take
from .kernels_strided import (  # noqa: F401 (launch.py finds all kernels in this module)
    _depthwise_bwd_input_strided_kernel,
    _depthwise_bwd_weight_strided_kernel,
    _depthwise_fwd_strided_kernel,
)
from .kernels_weight import (  # noqa: F401 (the same)
    _depthwise_bwd_weight_kernel,
    _depthwise_bwd_weight_pairs_kernel,
    _depthwise_sum_kernel,
)
from .strips import (
    POINTERS,
    SIZES,
    columns_inside,
    load_columns,
    load_residual,
    load_rows,
    phase_of,
    store_row,
    store_row_where,
    strip_start,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_fwd_kernel(
    x_ptr, taps_ptr, residual_ptr, y_ptr, H, W, OH, OW, padding_h, padding_w, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr, CACHED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y (N, OH, OW, C) of x (N, H, W, C) and taps (KH·KW + 1, C); HAS_RESIDUAL: plus one like y.

    Any padding ≤ D·(K − 1). CACHED: taps are read anew for each row of x, from L1, as they would not fit in registers
    beside the sums; each serves BLOCK_W products.

    One program per (image, ``rows`` rows of y in a phase of the dilation, strip, phase, BLOCK_C channels), the last
    varying fastest. From ``phase_of`` on, sizes are those of the phase.
    """
    PIXEL: tl.constexpr = DW * C
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    # The first of the columns that are read: without those beside the strip, "whole" starts at the padding.
    FIRST: tl.constexpr = KW // 2 if EDGE == "whole" else 0
    READ: tl.constexpr = BLOCK_W if EDGE == "whole" else COLUMNS
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    all_h = H
    all_w = W
    all_oh = OH
    all_ow = OW
    x_h, x_w, y_h, y_w, H, W, OH, OW, padding_h, padding_w = phase_of(
        rest % (DH * DW), H, W, OH, OW, padding_h, padding_w, DH, DW
    )
    rest = rest // (DH * DW)
    start = strip_start(rest % strips, strips, OW, BLOCK_W, EDGE)
    rest = rest // strips
    chunks = ((all_oh + DH - 1) // DH + rows - 1) // rows
    first_row = (rest % chunks) * rows
    end_row = tl.minimum(first_row + rows, OH)
    n = (rest // chunks).to(tl.int64)

    if EDGE == "masked":
        PH = padding_h
        PW = padding_w
    else:
        PH: tl.constexpr = KH // 2
        PW: tl.constexpr = KW // 2
    # Lanes beyond C do the work of the last channel again, and do not store it.
    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    owned = None if C % BLOCK_C == 0 and EDGE != "masked" else channels < C
    taps_ptr += offs_c
    taps = () if CACHED else load_rows(taps_ptr, 0, KH * KW, C)
    bias = tl.load(taps_ptr + KH * KW * C)

    # Rows of x that rows first_row … end_row − 1 of y need.
    begin = tl.maximum(first_row - PH, 0)
    end = tl.minimum(end_row - PH + KH - 1, H)
    if DH > 1:  # a phase may end with the program above
        end = tl.where(first_row < end_row, end, begin)
    line_of_x = all_w.to(tl.int64) * C
    x_step = all_w * (DH * C)
    line_of_y = all_ow.to(tl.int64) * C
    y_step = all_ow * (DH * C)
    keeps = columns_inside(start, W, PW, COLUMNS)
    column = start - PW if EDGE == "masked" else start
    x_row = x_ptr + ((n * all_h + begin * DH + x_h) * line_of_x + (column * DW + x_w).to(tl.int64) * C + offs_c)
    left = x_row + tl.where(start >= KW // 2, -(KW // 2) * PIXEL, 0)
    right = x_row + tl.where(start + BLOCK_W + KW // 2 <= W, BLOCK_W * PIXEL, 0)
    y_column = (start * DW + y_w).to(tl.int64) * C
    # Row `row` of x completes row `row + PH − (KH − 1)` of y.
    y_row = y_ptr + ((n * all_oh + (begin + PH - (KH - 1)) * DH + y_h) * line_of_y + y_column + offs_c)
    # The same row of the residual, but never one above this program's: loads in the loop need no mask for rows.
    residual_row = residual_ptr + ((n * all_oh + first_row * DH + y_h) * line_of_y + y_column + offs_c)

    acc = repeated(bias, (KH - 1) * BLOCK_W)
    for row in range(begin, end):
        xs = load_columns(x_row, left, right, KEEP, keeps[0], keeps[COLUMNS - 1], keeps, PIXEL, KW, BLOCK_W, EDGE)
        complete = row + PH - (KH - 1) >= first_row
        residual = load_residual(residual_row, owned, start, OW, PIXEL, BLOCK_W, EDGE, HAS_RESIDUAL)
        sums = ()
        for a in tl.static_range(KH):
            if CACHED:
                row_of_taps = load_rows(taps_ptr, (KH - 1 - a) * KW, KW, C)
            else:
                row_of_taps = take(taps, (KH - 1 - a) * KW, KW)
            for t in tl.static_range(BLOCK_W):
                s = acc[a * BLOCK_W + t] if a < KH - 1 else bias
                for j in tl.static_range(KW):
                    if t + j >= FIRST and t + j < FIRST + READ:
                        s = fma(xs[t + j - FIRST], row_of_taps[j], s)
                sums = sums + (s,)
        store_row_where(complete, y_row, sums, 0, residual, owned, start, OW, PIXEL, BLOCK_W, EDGE)
        acc = take(sums, BLOCK_W, (KH - 1) * BLOCK_W)
        x_row += x_step
        y_row += y_step
        residual_row += tl.where(complete, y_step, 0)
        if EDGE == "strips":
            left += x_step
            right += x_step
    # Rows of y that reach below the map.
    row_of_y = line_of_y * DH
    residual_row -= tl.maximum(first_row - (end + PH - (KH - 1)), 0) * row_of_y
    for a in tl.static_range(KH - 1 if EDGE == "masked" else KH // 2):
        out = end + PH - (KH - 1) + a
        inside = (out >= first_row) & (out < end_row) & (channels < C)
        residual = load_residual(residual_row + a * row_of_y, inside, start, OW, PIXEL, BLOCK_W, EDGE, HAS_RESIDUAL)
        store_row(y_row + a * row_of_y, acc, a * BLOCK_W, residual, inside, start, OW, PIXEL, BLOCK_W, EDGE)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_fwd_pairs_kernel(
    x_ptr, taps_ptr, residual_ptr, y_ptr, H, W, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The same for "same" padding and half types, two rows at a time: 11 instead of 14 products of rows for KH = 7.

    With E[m] = k[2m], O[m] = k[2m+1], P = KH // 2, and pairs of rows xe[q] = x[2q], xo[q] = x[2q+1]::

        p0[q] = Σ_m E[m]·xe[q−P+m]      p1[q] = Σ_m O[m]·xo[q−P+m]      p2[q] = Σ_m (E[m]+O[m−1])·(xe+xo)[q−P+m]
        y[2q−P] = p0[q] + p1[q]         y[2q−P+1] = p2[q] − p0[q] − p1[q+1]

    (the one-dimensional fast FIR algorithm of 2 × KH, over rows). ``taps_ptr`` holds E, O, E[m] + O[m−1] for 0 ≤ m ≤ P,
    and the bias. ``rows`` is even, P odd. Strips as in "strips"; W == BLOCK_W is allowed.
    """
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    PIXEL: tl.constexpr = DW * C
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    chunks = ((H + DH - 1) // DH + rows - 1) // rows
    line_of_x = W.to(tl.int64) * C
    image_of_x = H * line_of_x
    row_of_x = line_of_x * DH
    x_step = W * (DH * C)
    x_h, x_w, _, _, H, W, _, _, _, _ = phase_of(rest % (DH * DW), H, W, H, W, 0, 0, DH, DW)
    rest = rest // (DH * DW)
    start = strip_start(rest % strips, strips, W, BLOCK_W, "strips")
    rest = rest // strips
    first_row = (rest % chunks) * rows
    end_row = tl.minimum(first_row + rows, H)
    n = (rest // chunks).to(tl.int64)

    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    owned = None if C % BLOCK_C == 0 else channels < C
    even = load_rows(taps_ptr + offs_c, 0, (P + 1) * KW, C)
    odd = load_rows(taps_ptr + offs_c, (P + 1) * KW, P * KW, C)
    # E[0] + O[−1] is E[0].
    both = take(even, 0, KW) + load_rows(taps_ptr + offs_c, KH * KW, P * KW, C)
    bias = tl.load(taps_ptr + (KH + P) * KW * C + offs_c)
    zero = tl.zeros((BLOCK_C,), tl.float32)

    begin = tl.maximum(first_row - (P + 1) // 2 * 2, 0)
    end = tl.minimum(end_row + P, H)
    if DH > 1:  # a phase may end with the program above
        end = tl.where(first_row < end_row, end, begin)
    keep_left = tl.where(start >= PW, KEEP, 0).to(tl.uint32)
    keep_right = tl.where(start + BLOCK_W + PW <= W, KEEP, 0).to(tl.uint32)
    image = n * image_of_x + x_h * line_of_x + x_w * C
    offset = image + start.to(tl.int64) * PIXEL + offs_c
    x_row = x_ptr + (offset + begin * row_of_x)
    left = x_row + tl.where(start >= PW, -PW * PIXEL, 0)
    right = x_row + tl.where(start + BLOCK_W + PW <= W, BLOCK_W * PIXEL, 0)
    y_row = y_ptr + (offset + (begin - P) * row_of_x)
    # Of the residual, the second row of the pair, but never one above this program's: loads need no mask. As P is odd,
    # a program's first row is the second one of a pair; the one below its last is in the map, if the loop gets there.
    residual_row = residual_ptr + (offset + first_row * row_of_x)
    # Lanes 0…15 fetch the columns of the next pair's first row, lanes 16…31 those of its second.
    lane = tl.arange(0, BLOCK_C)
    column = tl.minimum(tl.maximum(start + lane % 16 - PW, 0), W - 1)
    column = column * PIXEL + (program % CHANNEL_BLOCKS) * BLOCK_C
    ahead = x_ptr + (image + (begin + 2 + lane // 16) * row_of_x + column)

    p0 = repeated(zero, P * BLOCK_W)
    p1 = repeated(bias, P * BLOCK_W)
    p2 = repeated(bias + bias, P * BLOCK_W)
    for row in range(begin, end, 2):
        prefetch(ahead, row + 2 + lane // 16, H)
        ahead += 2 * x_step
        xe = load_columns(x_row, left, right, KEEP, keep_left, keep_right, (), PIXEL, KW, BLOCK_W, "strips")
        # Where H is odd, the last pair's second row is the first one again, times 0.
        there = row + 1 < H
        step = tl.where(there, x_step, 0)
        keep = tl.where(there, KEEP, 0).to(tl.uint32)
        keep_l = tl.where(there, keep_left, 0).to(tl.uint32)
        keep_r = tl.where(there, keep_right, 0).to(tl.uint32)
        xo = load_columns(
            x_row + step, left + step, right + step, keep, keep_l, keep_r, (), PIXEL, KW, BLOCK_W, "strips"
        )
        first_there = row - P >= first_row
        second_there = (row - P + 1 >= first_row) & (row - P + 1 < end_row)
        above = tl.where(first_there, -x_step, 0)
        r0 = load_residual(residual_row + above, None, start, W, PIXEL, BLOCK_W, "strips", HAS_RESIDUAL)
        r1 = load_residual(residual_row, None, start, W, PIXEL, BLOCK_W, "strips", HAS_RESIDUAL)
        s0 = _add_row(p0, xe, even, zero, P + 1, KW, BLOCK_W)
        s1 = take(p1, 0, BLOCK_W) + _add_row(take(p1, BLOCK_W, (P - 1) * BLOCK_W), xo, odd, bias, P, KW, BLOCK_W)
        s2 = _add_row(p2, plus(xe, 0, xo, 0, COLUMNS), both, bias + bias, P + 1, KW, BLOCK_W)
        y0, y1 = _pair_of_rows(s0, s1, s2, 0, BLOCK_W)
        store_row_where(first_there, y_row, y0, 0, r0, owned, start, W, PIXEL, BLOCK_W, "strips")
        store_row_where(second_there, y_row + x_step, y1, 0, r1, owned, start, W, PIXEL, BLOCK_W, "strips")
        p0 = take(s0, BLOCK_W, P * BLOCK_W)
        p1 = take(s1, BLOCK_W, P * BLOCK_W)
        p2 = take(s2, BLOCK_W, P * BLOCK_W)
        x_row += 2 * x_step
        left += 2 * x_step
        right += 2 * x_step
        y_row += 2 * x_step
        residual_row += tl.where(row - P + 1 >= first_row, 2 * x_step, 0)
    # Rows of y that reach below the map.
    out = begin + (end - begin + 1) // 2 * 2 - P
    p1 = p1 + repeated(bias, BLOCK_W)
    residual_row += (out - tl.maximum(out + 1, first_row)) * row_of_x
    for a in tl.static_range((P + 1) // 2):
        y0, y1 = _pair_of_rows(p0, p1, p2, a * BLOCK_W, BLOCK_W)
        inside = (out + 2 * a >= first_row) & (out + 2 * a < end_row) & (channels < C)
        r0 = load_residual(residual_row + 2 * a * row_of_x, inside, start, W, PIXEL, BLOCK_W, "strips", HAS_RESIDUAL)
        store_row(y_row + 2 * a * row_of_x, y0, 0, r0, inside, start, W, PIXEL, BLOCK_W, "strips")
        inside = (out + 2 * a + 1 >= first_row) & (out + 2 * a + 1 < end_row) & (channels < C)
        r1 = residual_row + (2 * a + 1) * row_of_x
        r1 = load_residual(r1, inside, start, W, PIXEL, BLOCK_W, "strips", HAS_RESIDUAL)
        store_row(y_row + (2 * a + 1) * row_of_x, y1, 0, r1, inside, start, W, PIXEL, BLOCK_W, "strips")


@triton.jit
def _add_row(acc, xs, taps, fresh, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr):
    """A row of x into the KH rows of sums it touches: KH − 1 in ``acc``, the oldest first, and one that begins."""
    sums = ()
    for a in tl.static_range(KH):
        for t in tl.static_range(BLOCK_W):
            s = acc[a * BLOCK_W + t] if a < KH - 1 else fresh
            for j in tl.static_range(KW):
                s = fma(xs[t + j], taps[(KH - 1 - a) * KW + j], s)
            sums = sums + (s,)
    return sums


@triton.jit
def _pair_of_rows(s0, s1, s2, first: tl.constexpr, BLOCK_W: tl.constexpr):
    """The two rows of y whose parts begin at number ``first``."""
    y0 = ()
    y1 = ()
    for t in tl.static_range(BLOCK_W):
        y0 = y0 + (s0[first + t] + s1[first + t],)
        y1 = y1 + (s2[first + t] - s0[first + t] - s1[first + BLOCK_W + t],)
    return y0, y1


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_taps_kernel(
    x_ptr, weight_ptr, bias_ptr, taps_ptr, has_bias, flip, pairs, channels, stride_wc, stride_wh, stride_ww, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The table of taps that the forward kernels read: weight (C, 1, KH, KW) and bias (C,), rounded to the dtype of x.

    ``flip`` turns the taps around, for the input gradient; ``pairs`` is for the kernel that takes rows in pairs. One
    program per (row of the table, BLOCK_C channels).
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    channel_blocks = (channels + BLOCK_C - 1) // BLOCK_C
    q = tl.program_id(0) // channel_blocks
    offs_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    # For pairs, rows 0, 2, 4, … of k (E), 1, 3, 5, … (O), then E[m] + O[m − 1] for m ≥ 1; else the rows as they are.
    EVEN: tl.constexpr = (KH + 1) // 2
    row = q // KW
    j = q % KW
    in_pairs = pairs != 0
    added = tl.where(in_pairs & (row >= KH), 2 * (row - KH) + 1, -1)
    paired = tl.where(row < EVEN, 2 * row, tl.where(row < KH, 2 * (row - EVEN) + 1, 2 * (row - KH) + 2))
    i = tl.where(in_pairs, paired, row)
    is_bias = q == tl.where(in_pairs, KH + KH // 2, KH) * KW
    weight_ptr += offs_c.to(tl.int64) * stride_wc
    is_tap = inside & (is_bias == 0)
    value = _tap(weight_ptr, i, j, flip, is_tap, stride_wh, stride_ww, KH, KW, DTYPE)
    value += _tap(weight_ptr, added, j, flip, is_tap & (added >= 0), stride_wh, stride_ww, KH, KW, DTYPE)
    bias = tl.load(bias_ptr + offs_c.to(tl.int64) * stride_b, mask=inside & is_bias & (has_bias != 0), other=0.0)
    value += bias.to(DTYPE).to(tl.float32)
    tl.store(taps_ptr + q.to(tl.int64) * channels + offs_c, value, mask=inside)


@triton.jit
def _tap(
    weight_ptr, i, j, flip, mask, stride_wh, stride_ww, KH: tl.constexpr, KW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i = tl.where(flip != 0, KH - 1 - i, i)
    j = tl.where(flip != 0, KW - 1 - j, j)
    pointers = weight_ptr + (i.to(tl.int64) * stride_wh + j.to(tl.int64) * stride_ww)
    return tl.load(pointers, mask=mask, other=0.0).to(DTYPE).to(tl.float32)
