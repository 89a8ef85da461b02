"""Depthwise convolution in Triton: gradients of weight and bias. Formulas: this folder's README; strips: strips.py."""

import triton
import triton.language as tl

from ..primitives import KEEP, fma, plus, prefetch, repeated, take
from .strips import (
    POINTERS,
    SIZES,
    columns_inside,
    columns_owned,
    load_columns,
    load_gradients,
    load_gradients_at,
    phase_of,
    strip_start,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_bwd_weight_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, OH, OW, padding_h, padding_w, rows, strips, images,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of dk and, last, db over parts of the map: partials (parts, KH·KW + groups, C), fp32.

    One program per (``images`` images, ``rows`` rows of x in a phase of the dilation, strip of dy's columns, phase,
    group of GROUP rows of taps, BLOCK_C channels), the last varying fastest; the first four make a part. A program
    keeps GROUP·KW sums and a window of GROUP rows of dy, and reads one row of x at a time; so each group reads all of x
    and dy. From ``phase_of`` on, sizes are those of the phase.
    """
    GROUPS: tl.constexpr = (KH + GROUP - 1) // GROUP
    PIXEL: tl.constexpr = DW * C
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    group = program // CHANNEL_BLOCKS % GROUPS
    part = program // (CHANNEL_BLOCKS * GROUPS)
    chunks = ((H + DH - 1) // DH + rows - 1) // rows
    line_of_x = W.to(tl.int64) * C
    image_of_x = H * line_of_x
    row_of_x = line_of_x * DH
    x_step = W * (DH * C)
    line_of_dy = OW.to(tl.int64) * C
    image_of_dy = OH * line_of_dy
    row_of_dy = line_of_dy * DH
    x_h, x_w, dy_h, dy_w, H, W, OH, OW, padding_h, padding_w = phase_of(
        part % (DH * DW), H, W, OH, OW, padding_h, padding_w, DH, DW
    )
    rest = part // (DH * DW)
    strip = rest % strips
    start = strip_start(strip, strips, OW, BLOCK_W, EDGE)
    rest = rest // strips
    begin = (rest % chunks) * rows
    end = tl.minimum(begin + rows, H)
    first_image = rest // chunks * images
    last_image = tl.minimum(first_image + images, N)
    if DH > 1 and EDGE != "masked":  # there may be no row to read in the place of one that is not there
        last_image = tl.where(H > 0, last_image, first_image)

    # The taps of a group are a kernel whose first row lies that much further down.
    if EDGE == "masked":
        PH = padding_h - group * GROUP
    elif GROUPS > 1:
        PH = KH // 2 - group * GROUP
    else:
        PH: tl.constexpr = KH // 2
    if EDGE == "masked":
        PW = padding_w
        column = start - PW
    else:
        PW: tl.constexpr = KW // 2
        column = start
    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    keeps = columns_inside(start, W, PW, COLUMNS)
    owns = columns_owned(strip, strips, start, OW, BLOCK_W, EDGE)
    to_left = tl.where(start >= KW // 2, -(KW // 2) * PIXEL, 0)
    to_right = tl.where(start + BLOCK_W + KW // 2 <= W, BLOCK_W * PIXEL, 0)

    x_column = (column * DW + x_w).to(tl.int64) * C + offs_c
    dy_column = (start * DW + dy_w).to(tl.int64) * C + offs_c
    zero = tl.zeros((BLOCK_C,), tl.float32)
    dk = repeated(zero, GROUP * KW)
    db = zero
    for n in range(first_image, last_image):
        x_row = x_ptr + (n * image_of_x + begin * row_of_x + x_h * line_of_x + x_column)
        dy_image = dy_ptr + (n * image_of_dy + dy_h * line_of_dy + dy_column)
        # Rows begin + PH − (GROUP − 1) … begin + PH − 1 of dy. In db, the program of the rows above has counted them.
        window = ()
        for a in tl.static_range(GROUP - 1):
            out = begin + PH - (GROUP - 1) + a
            keep = (out >= 0) & (out < OH)
            dy_row = dy_image + tl.minimum(tl.maximum(out, 0), OH - 1) * row_of_dy
            values = load_gradients(dy_row, keep, owns, start, OW, PIXEL, BLOCK_W, EDGE)
            for t in tl.static_range(BLOCK_W):
                db += tl.where(begin == 0, values[t], 0.0)
            window = window + values
        for row in range(begin, end):
            out = row + PH
            keep = out < OH if GROUPS == 1 else (out >= 0) & (out < OH)
            out = out if GROUPS == 1 else tl.maximum(out, 0)
            dy_row = dy_image + tl.minimum(out, OH - 1) * row_of_dy
            values = load_gradients(dy_row, keep, owns, start, OW, PIXEL, BLOCK_W, EDGE)
            # The first group counts all that it meets in db, the others what lies above what those before them meet.
            for t in tl.static_range(BLOCK_W):
                db += values[t] if GROUPS == 1 else tl.where((group == 0) | (row == 0), values[t], 0.0)
            window = window + values
            left = x_row + to_left
            right = x_row + to_right
            xs = load_columns(x_row, left, right, KEEP, keeps[0], keeps[COLUMNS - 1], keeps, PIXEL, KW, BLOCK_W, EDGE)
            dk = _add_products(dk, window, xs, GROUP, KW, BLOCK_W)
            window = take(window, BLOCK_W, (GROUP - 1) * BLOCK_W)
            x_row += x_step
    _store_partial(partials_ptr, part, group, dk, db, channels, C, KH, KW, GROUP)


@triton.jit
def _add_products(dk, window, xs, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr):
    """dk[i,j] += Σ_t dy[newest row − i, t] · x[t + j]; ``window`` has KH rows of dy, the newest last."""
    sums = ()
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            s = dk[i * KW + j]
            for t in tl.static_range(BLOCK_W):
                s = fma(window[(KH - 1 - i) * BLOCK_W + t], xs[t + j], s)
            sums = sums + (s,)
    return sums


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_bwd_weight_pairs_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, rows, strips, images,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """The same for "same" padding, half types and KH = 3, 7, 11, …, two rows at a time: 11 instead of 14 products.

    With P = KH // 2, even rows xe and odd rows xo of x, and t(h) = dy[h] + dy[h+1]::

        A[m] = Σ dy[h+1+P−2m]·xo      B[m] = Σ dy[h+P−2m]·xe      S[m] = Σ t(h+P−2m−1)·(xe+xo)      h even
        dk[2m] = A[m] + B[m]          dk[2m+1] = S[m] − A[m+1] − B[m]

    ``rows`` is even. Strips as in "strips"; W == BLOCK_W is allowed.
    """
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    PIXEL: tl.constexpr = DW * C
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // CHANNEL_BLOCKS
    chunks = ((H + DH - 1) // DH + rows - 1) // rows
    line_of_x = W.to(tl.int64) * C
    image_of_x = H * line_of_x
    row_of_x = line_of_x * DH
    x_step = W * (DH * C)
    x_h, x_w, _, _, H, W, _, _, _, _ = phase_of(part % (DH * DW), H, W, H, W, 0, 0, DH, DW)
    first = x_h * line_of_x + x_w * C
    rest = part // (DH * DW)
    strip = rest % strips
    start = strip_start(strip, strips, W, BLOCK_W, "strips")
    rest = rest // strips
    begin = (rest % chunks) * rows
    end = tl.minimum(begin + rows, H)
    first_image = rest // chunks * images
    last_image = tl.minimum(first_image + images, N)
    if DH > 1:  # there may be no row to read in the place of one that is not there
        last_image = tl.where(H > 0, last_image, first_image)

    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    keep_left = tl.where(start >= PW, KEEP, 0).to(tl.uint32)
    keep_right = tl.where(start + BLOCK_W + PW <= W, KEEP, 0).to(tl.uint32)
    to_left = tl.where(start >= PW, -PW * PIXEL, 0)
    to_right = tl.where(start + BLOCK_W + PW <= W, BLOCK_W * PIXEL, 0)
    owns = columns_owned(strip, strips, start, W, BLOCK_W, "strips")

    # Lanes 0…15 fetch the next two rows of x, 16…31 those of dy, eight columns of each; neighbours fetch the rest.
    lane = tl.arange(0, BLOCK_C)
    of_x = lane < 16
    ahead_row = lane // 8 % 2 + tl.where(of_x, 2, P + 2)
    ahead_column = tl.minimum(start + lane % 8, W - 1) * PIXEL + (program % CHANNEL_BLOCKS) * BLOCK_C

    zero = tl.zeros((BLOCK_C,), tl.float32)
    sums_a = repeated(zero, (P + 1) * KW)
    sums_b = repeated(zero, (P + 1) * KW)
    sums_s = repeated(zero, P * KW)
    db = zero
    for n in range(first_image, last_image):
        image = n * image_of_x + first + ahead_column
        offset = n * image_of_x + first + start.to(tl.int64) * PIXEL + offs_c
        x_row = x_ptr + (offset + begin * row_of_x)
        dy_image = dy_ptr + offset
        ahead = tl.where(of_x, x_ptr, dy_ptr) + (image + (begin + ahead_row) * row_of_x)
        # Windows of dy, the oldest row first: rows begin − P + 1 + 2a, rows begin − P + 2a, and t of the former.
        after = ()
        here = ()
        for a in tl.static_range(P):
            after = after + load_gradients_at(dy_image, begin - P + 1 + 2 * a, H, row_of_x, owns, PIXEL, BLOCK_W)
            here = here + load_gradients_at(dy_image, begin - P + 2 * a, H, row_of_x, owns, PIXEL, BLOCK_W)
        dy_row = dy_image + tl.minimum(begin + P, H - 1) * row_of_x
        for row in range(begin, end, 2):
            if PREFETCH:
                prefetch(ahead, row + ahead_row, H)
                ahead += 2 * x_step
            # Rows below the map are its last one again, times 0.
            here = here + load_gradients(dy_row, row + P < H, owns, start, W, PIXEL, BLOCK_W, "strips")
            dy_row += tl.where(row + P + 1 < H, x_step, 0)
            both = plus(after, 0, here, BLOCK_W, P * BLOCK_W)
            after = after + load_gradients(dy_row, row + P + 1 < H, owns, start, W, PIXEL, BLOCK_W, "strips")
            dy_row += tl.where(row + P + 2 < H, x_step, 0)
            for t in tl.static_range(BLOCK_W):  # rows `row` and `row + 1` of dy
                db += both[(P - 1) // 2 * BLOCK_W + t]
            xe = load_columns(
                x_row, x_row + to_left, x_row + to_right, KEEP, keep_left, keep_right, (), PIXEL, KW, BLOCK_W, "strips"
            )
            there = row + 1 < H
            next_row = x_row + tl.where(there, x_step, 0)
            keep = tl.where(there, KEEP, 0).to(tl.uint32)
            keep_l = tl.where(there, keep_left, 0).to(tl.uint32)
            keep_r = tl.where(there, keep_right, 0).to(tl.uint32)
            left = next_row + to_left
            right = next_row + to_right
            xo = load_columns(next_row, left, right, keep, keep_l, keep_r, (), PIXEL, KW, BLOCK_W, "strips")
            sums_b = _add_products(sums_b, here, xe, P + 1, KW, BLOCK_W)
            sums_a = _add_products(sums_a, after, xo, P + 1, KW, BLOCK_W)
            sums_s = _add_products(sums_s, both, plus(xe, 0, xo, 0, COLUMNS), P, KW, BLOCK_W)
            here = take(here, BLOCK_W, P * BLOCK_W)
            after = take(after, BLOCK_W, P * BLOCK_W)
            x_row += 2 * x_step
    dk = plus(sums_a, 0, sums_b, 0, KW)
    for m in tl.static_range(P):
        for j in tl.static_range(KW):
            dk = dk + (sums_s[m * KW + j] - sums_a[(m + 1) * KW + j] - sums_b[m * KW + j],)
        dk = dk + plus(sums_a, (m + 1) * KW, sums_b, (m + 1) * KW, KW)
    _store_partial(partials_ptr, part, 0, dk, db, channels, C, KH, KW, KH)


@triton.jit
def _store_partial(
    partials_ptr, part, group, dk, db, channels,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP rows of dk, those of number ``group``, and the group's db; the last group may have fewer."""
    GROUPS: tl.constexpr = (KH + GROUP - 1) // GROUP
    row = partials_ptr + (part.to(tl.int64) * ((KH * KW + GROUPS) * C) + channels)
    of_group = row + group * (GROUP * KW * C)
    for q in tl.static_range(GROUP * KW):
        inside = channels < C if GROUPS == 1 else (channels < C) & (group * GROUP + q // KW < KH)
        tl.store(of_group + q * C, dk[q], mask=inside)
    tl.store(row + KH * KW * C + group * C, db, mask=channels < C)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_sum_kernel(
    partials_ptr, dw_ptr, db_ptr, count, wants_dw, wants_db, channels, stride_wc, stride_wh, stride_ww,
    KH: tl.constexpr, KW: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw (C, 1, KH, KW) and db (C,) from partials (count, KH·KW + GROUPS, C), summed in one order whatever ran first.

    One program per (row of a partial, BLOCK_C channels).
    """
    channel_blocks = (channels + BLOCK_C - 1) // BLOCK_C
    q = tl.program_id(0) // channel_blocks
    offs_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    parts = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    is_bias = q == KH * KW
    # What is added up is in one row of each partial, but db in GROUPS of them.
    each = 1 if GROUPS == 1 else tl.where(is_bias, GROUPS, 1)
    for first in range(0, count * each, BLOCK_P):
        number = first + parts
        rows = (number // each).to(tl.int64)[:, None] * (KH * KW + GROUPS) + (q + number % each)[:, None]
        mask = (number < count * each)[:, None] & inside[None, :]
        acc += tl.load(partials_ptr + rows * channels + offs_c[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    i = (q // KW).to(tl.int64)
    j = (q % KW).to(tl.int64)
    pointers = dw_ptr + offs_c.to(tl.int64) * stride_wc + i * stride_wh + j * stride_ww
    tl.store(pointers, total.to(dw_ptr.dtype.element_ty), mask=inside & (is_bias == 0) & (wants_dw != 0))
    tl.store(db_ptr + offs_c, total.to(db_ptr.dtype.element_ty), mask=inside & is_bias & (wants_db != 0))
