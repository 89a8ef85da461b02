"""Depthwise convolution in Triton with stride: the three passes. Formulas: this folder's README; masks: strips.py.

Rows of x are taken in groups of SH, group q being rows q·SH − padding … q·SH − padding + SH − 1: output row h lies over
groups h … h + TALL − 1, and row e of group h + m meets its row of taps m·SH + e, where there is one. Columns likewise.
So what is streamed are groups, with TALL instead of KH rows of sums, and no product is computed that nobody needs: the
input gradient, which has SH·SW phases of its own, makes all of them from one row of dy.

Programs, strips and lanes are those of kernels.py with "masked" edges: any size, any padding ≤ K − 1.
"""

import triton
import triton.language as tl

from ..primitives import KEEP, fma, repeated, take
from .kernels_weight import _store_partial
from .strips import (
    POINTERS,
    SIZES,
    columns_inside,
    columns_owned,
    load_columns,
    load_gradients,
    load_rows,
    store_row,
)


@triton.jit
def load_row_of_group(row, number, H, keeps, C: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of row ``number`` of a map of H rows, to which ``row`` points; 0 where there is none."""
    keep = tl.where((number >= 0) & (number < H), KEEP, 0).to(tl.uint32)
    return load_columns(row, row, row, keep, keep, keep, keeps, C, 1, COLUMNS, "masked")


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_fwd_strided_kernel(
    x_ptr, taps_ptr, y_ptr, H, W, OH, OW, padding_h, padding_w, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (N, OH, OW, C) of x (N, H, W, C) and taps (KH·KW + 1, C).

    One program per (image, ``rows`` rows of y, strip, BLOCK_C channels), the last varying fastest.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TALL: tl.constexpr = (KH + SH - 1) // SH
    COLUMNS: tl.constexpr = (BLOCK_W - 1) * SW + KW
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    start = rest % strips * BLOCK_W
    rest = rest // strips
    chunks = (OH + rows - 1) // rows
    first_row = (rest % chunks) * rows
    end_row = tl.minimum(first_row + rows, OH)
    n = (rest // chunks).to(tl.int64)

    offs_c = tl.minimum(channels, C - 1)
    taps = load_rows(taps_ptr + offs_c, 0, KH * KW, C)
    bias = tl.load(taps_ptr + KH * KW * C + offs_c)
    row_of_x = W.to(tl.int64) * C
    row_of_y = OW.to(tl.int64) * C
    keeps = columns_inside(start * SW, W, padding_w, COLUMNS)
    top = first_row * SH - padding_h
    x_row = x_ptr + ((n * H + top) * row_of_x + (start * SW - padding_w).to(tl.int64) * C + offs_c)
    # Group `step` completes row `step − (TALL − 1)` of y.
    y_row = y_ptr + ((n * OH + (first_row - (TALL - 1))) * row_of_y + start.to(tl.int64) * C + offs_c)
    acc = repeated(bias, (TALL - 1) * BLOCK_W)
    for step in range(first_row, end_row + TALL - 1):
        sums = acc + repeated(bias, BLOCK_W)
        for e in tl.static_range(SH):
            xs = load_row_of_group(x_row, step * SH - padding_h + e, H, keeps, C, COLUMNS)
            x_row += row_of_x
            added = ()
            for a in tl.static_range(TALL):
                for t in tl.static_range(BLOCK_W):
                    s = sums[a * BLOCK_W + t]
                    if (TALL - 1 - a) * SH + e < KH:
                        for j in tl.static_range(KW):
                            s = fma(xs[t * SW + j], taps[((TALL - 1 - a) * SH + e) * KW + j], s)
                    added = added + (s,)
            sums = added
        if step - (TALL - 1) >= first_row:
            store_row(y_row, sums, 0, (), channels < C, start, OW, C, BLOCK_W, "masked")
        acc = take(sums, BLOCK_W, (TALL - 1) * BLOCK_W)
        y_row += row_of_y


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_bwd_input_strided_kernel(
    dy_ptr, taps_ptr, dx_ptr, H, W, OH, OW, padding_h, padding_w, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C) of dy (N, OH, OW, C) and taps (KH·KW + 1, C), the bias of which is not read.

    One program per (image, ``rows`` groups of rows of dx, BLOCK_W groups of columns, BLOCK_C channels), the last
    varying fastest. Row h of dy reaches groups h … h + TALL − 1, and completes the first of them.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TALL: tl.constexpr = (KH + SH - 1) // SH
    WIDE: tl.constexpr = (KW + SW - 1) // SW
    GROUP: tl.constexpr = SH * BLOCK_W * SW  # sums of a group of rows
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    # Groups that are not wholly above or left of the map begin with number padding // stride.
    start = padding_w // SW + rest % strips * BLOCK_W
    rest = rest // strips
    above = padding_h // SH
    groups = (H - 1 + padding_h) // SH + 1
    chunks = (groups - above + rows - 1) // rows
    first = above + (rest % chunks) * rows
    end = tl.minimum(first + rows, groups)
    n = (rest // chunks).to(tl.int64)

    offs_c = tl.minimum(channels, C - 1)
    taps = load_rows(taps_ptr + offs_c, 0, KH * KW, C)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    row_of_x = W.to(tl.int64) * C
    row_of_dy = OW.to(tl.int64) * C
    keeps = columns_inside(start, OW, WIDE - 1, BLOCK_W + WIDE - 1)
    columns = columns_inside(start * SW, W, padding_w, BLOCK_W * SW)
    begin = first - (TALL - 1)
    dy_row = dy_ptr + ((n * OH + begin) * row_of_dy + (start - (WIDE - 1)).to(tl.int64) * C + offs_c)
    top = begin * SH - padding_h
    dx_row = dx_ptr + ((n * H + top) * row_of_x + (start * SW - padding_w).to(tl.int64) * C + offs_c)
    acc = repeated(zero, (TALL - 1) * GROUP)
    for h in range(begin, end):
        dys = load_row_of_group(dy_row, h, OH, keeps, C, BLOCK_W + WIDE - 1)
        dy_row += row_of_dy
        sums = ()
        for m in tl.static_range(TALL):
            for e in tl.static_range(SH):
                for t in tl.static_range(BLOCK_W):
                    for f in tl.static_range(SW):
                        s = acc[m * GROUP + (e * BLOCK_W + t) * SW + f] if m < TALL - 1 else zero
                        if m * SH + e < KH:
                            for j in tl.static_range(f, KW, SW):
                                s = fma(dys[t + WIDE - 1 - j // SW], taps[(m * SH + e) * KW + j], s)
                        sums = sums + (s,)
        for e in tl.static_range(SH):
            row = h * SH - padding_h + e
            inside = (channels < C) & (h >= first) & (row >= 0) & (row < H)
            for u in tl.static_range(BLOCK_W * SW):
                value = sums[e * BLOCK_W * SW + u].to(dx_ptr.dtype.element_ty)
                tl.store(dx_row + u * C, value, mask=inside & (columns[u] != 0))
            dx_row += row_of_x
        acc = take(sums, GROUP, (TALL - 1) * GROUP)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _depthwise_bwd_weight_strided_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, OH, OW, padding_h, padding_w, rows, strips, images,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dk and, last, db over parts of the map: partials (programs / channel blocks, KH·KW + 1, C), fp32.

    One program per (``images`` images, ``rows`` of the OH + TALL − 1 groups of rows of x, strip of dy's columns,
    BLOCK_C channels), the last varying fastest. It keeps KH·KW sums and a window of TALL rows of dy.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TALL: tl.constexpr = (KH + SH - 1) // SH
    COLUMNS: tl.constexpr = (BLOCK_W - 1) * SW + KW
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // CHANNEL_BLOCKS
    strip = part % strips
    start = strip * BLOCK_W
    rest = part // strips
    chunks = (OH + TALL - 1 + rows - 1) // rows
    begin = (rest % chunks) * rows
    end = tl.minimum(begin + rows, OH + TALL - 1)
    first_image = rest // chunks * images
    last_image = tl.minimum(first_image + images, N)

    offs_c = tl.minimum(channels, C - 1)
    row_of_x = W.to(tl.int64) * C
    row_of_dy = OW.to(tl.int64) * C
    keeps = columns_inside(start * SW, W, padding_w, COLUMNS)
    owns = columns_owned(strip, strips, start, OW, BLOCK_W, "masked")
    zero = tl.zeros((BLOCK_C,), tl.float32)
    dk = repeated(zero, KH * KW)
    db = zero
    for n in range(first_image, last_image):
        top = (begin * SH - padding_h) * row_of_x
        x_row = x_ptr + (n * (H * row_of_x) + top + (start * SW - padding_w).to(tl.int64) * C + offs_c)
        dy_image = dy_ptr + (n * (OH * row_of_dy) + start.to(tl.int64) * C + offs_c)
        window = ()
        for a in tl.static_range(TALL - 1):
            out = begin - (TALL - 1) + a
            keep = (out >= 0) & (out < OH)
            window = window + load_gradients(dy_image + out * row_of_dy, keep, owns, start, OW, C, BLOCK_W, "masked")
        for step in range(begin, end):
            values = load_gradients(dy_image + step * row_of_dy, step < OH, owns, start, OW, C, BLOCK_W, "masked")
            for t in tl.static_range(BLOCK_W):
                db += values[t]
            window = window + values
            for e in tl.static_range(SH):
                xs = load_row_of_group(x_row, step * SH - padding_h + e, H, keeps, C, COLUMNS)
                x_row += row_of_x
                sums = ()
                for i in tl.static_range(KH):
                    for j in tl.static_range(KW):
                        s = dk[i * KW + j]
                        if i % SH == e:
                            for t in tl.static_range(BLOCK_W):
                                s = fma(window[(TALL - 1 - i // SH) * BLOCK_W + t], xs[t * SW + j], s)
                        sums = sums + (s,)
                dk = sums
            window = take(window, BLOCK_W, (TALL - 1) * BLOCK_W)
    _store_partial(partials_ptr, part, 0, dk, db, channels, C, KH, KW, KH)
