"""Depthwise convolution in Triton: forward (and input gradient), weight gradient. Formulas: this folder's README.

Every program is one warp. It owns 32 channels, one per lane, and a strip of BLOCK_W columns, and walks down the rows of
an image ("row streaming"): taps and the sums of all output rows that are not complete yet stay in registers, so an input
is read from memory (BLOCK_W + KW − 1) / BLOCK_W times instead of KH·KW times, and nothing is read twice in H.

Maps are (N, H, W, C) without gaps. Tables of taps are fp32, one row of C per tap, the bias last. What differs between
the kernels' strips is EDGE:

- "masked": any padding up to K − 1, any width; each column of the map has a predicate.
- "strips": "same" padding. Strips are spread evenly over a row and may overlap, so none sticks out of the map, and the
  KW // 2 columns beside a strip are all inside or all outside. Where outside, they are read from a safe place and
  multiplied by 0 in the same instruction that makes fp32 out of bf16.
- "whole": "same" padding and a map that is exactly as wide as the strip. There are no columns beside it.

Programs whose strips overlap store the same bits to the same place.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# What `_widen` multiplies with: bf16 is the upper half of an fp32, so its bits times 2^16 are that fp32, and times 0 are 0.
KEEP = tl.constexpr(65536)

# What Triton must not compile anew for: sizes that are 1 or divisible by 16, pointers that are not (lanes load one
# element each, whatever their alignment).
_SIZES = [
    "N", "H", "W", "OH", "OW", "padding_h", "padding_w", "rows", "strips", "images", "count", "has_bias", "flip",
    "wants_dw", "wants_db", "C", "stride_wc", "stride_wh", "stride_ww", "stride_b",
]  # fmt: skip
_MAPS = ["x_ptr", "dy_ptr", "y_ptr", "taps_ptr", "partials_ptr", "weight_ptr", "bias_ptr", "dw_ptr", "db_ptr"]


@triton.jit
def _fma(a, b, c):
    # Written out because LLVM packs a·b + c into fma.rn.f32x2 for sm_100, pays a MOV per operand for it, and spills.
    # It also saves registers on sm_90. The interpreter cannot run PTX.
    if INTERPRETED:
        return a * b + c
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _widen(v, keep):
    """v as fp32 where keep is KEEP, 0 where it is 0, whatever v is there (an undefined lane, NaN)."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) * keep).to(tl.float32, bitcast=True)
    else:
        return tl.where(keep != 0, v.to(tl.float32), 0.0)


@triton.jit
def _prefetch(pointers, row, H):
    # Brings one sector per lane into L2 while the rows before are computed; lanes whose row is below the map do nothing.
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [pointers, row, H],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _zeros(count: tl.constexpr, like):
    values = ()
    for _ in tl.static_range(count):
        values = values + (like,)
    return values


@triton.jit
def _rows_of(table, first: tl.constexpr, count: tl.constexpr, C: tl.constexpr):
    values = ()
    for q in tl.static_range(count):
        values = values + (tl.load(table + (first + q) * C),)
    return values


@triton.jit
def _drop(values, first: tl.constexpr, count: tl.constexpr):
    """The ``count`` values from number ``first`` on: constexpr slices, which tuples of the language do not have."""
    kept = ()
    for q in tl.static_range(count):
        kept = kept + (values[first + q],)
    return kept


@triton.jit
def _strip_start(strip, strips, W, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    if EDGE == "masked":
        return strip * BLOCK_W
    elif EDGE == "whole":
        return strip * 0
    else:
        return strip * (W - BLOCK_W) // tl.maximum(strips - 1, 1)


@triton.jit
def _keeps(start, W, PW, COLUMNS: tl.constexpr):
    """KEEP for each of the COLUMNS columns from ``start − PW`` on that is inside the map, else 0."""
    keeps = ()
    for u in tl.static_range(COLUMNS):
        column = start + u - PW
        keeps = keeps + (tl.where((column >= 0) & (column < W), KEEP, 0).to(tl.uint32),)
    return keeps


@triton.jit
def _load_columns(
    row, left, right, keep, keep_left, keep_right, keeps,
    C: tl.constexpr, PW: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One row of a strip as fp32, left to right: "whole" BLOCK_W columns, else COLUMNS.

    ``row`` points at column ``start − padding`` ("masked") or ``start``; ``keep`` is for the whole row.
    """
    values = ()
    for u in tl.static_range(COLUMNS):
        if EDGE == "masked":
            inside = tl.where(keep != 0, keeps[u], 0)
            values = values + (_widen(tl.load(row + u * C, mask=inside != 0), inside),)
        elif u < PW:
            if EDGE == "strips":
                values = values + (_widen(tl.load(left + u * C), keep_left),)
        elif u < PW + BLOCK_W:
            values = values + (_widen(tl.load(row + (u - PW) * C), keep),)
        elif EDGE == "strips":
            values = values + (_widen(tl.load(right + (u - PW - BLOCK_W) * C), keep_right),)
    return values


@triton.jit
def _store_row(row, values, first: tl.constexpr, mask, start, OW, C: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    for t in tl.static_range(BLOCK_W):
        value = values[first + t].to(row.dtype.element_ty)
        if EDGE == "masked":
            tl.store(row + t * C, value, mask=mask & (start + t < OW))
        elif mask is None:
            tl.store(row + t * C, value)
        else:
            tl.store(row + t * C, value, mask=mask)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_fwd_kernel(
    x_ptr, taps_ptr, y_ptr, H, W, OH, OW, padding_h, padding_w, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """y (N, OH, OW, C) of x (N, H, W, C) and taps (KH·KW + 1, C), any padding ≤ K − 1.

    One program per (image, ``rows`` rows of y, strip, BLOCK_C channels), the last varying fastest.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    # The first of the columns that are read: without those beside the strip, "whole" starts at the padding.
    FIRST: tl.constexpr = KW // 2 if EDGE == "whole" else 0
    READ: tl.constexpr = BLOCK_W if EDGE == "whole" else COLUMNS
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    start = _strip_start(rest % strips, strips, OW, BLOCK_W, EDGE)
    rest = rest // strips
    chunks = (OH + rows - 1) // rows
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
    taps = _rows_of(taps_ptr + offs_c, 0, KH * KW, C)
    bias = tl.load(taps_ptr + KH * KW * C + offs_c)

    # Rows of x that rows first_row … end_row − 1 of y need.
    begin = tl.maximum(first_row - PH, 0)
    end = tl.minimum(end_row - PH + KH - 1, H)
    row_of_x = W.to(tl.int64) * C
    row_of_y = OW.to(tl.int64) * C
    keep = KEEP
    keeps = _keeps(start, W, PW, COLUMNS)
    column = start - PW if EDGE == "masked" else start
    x_row = x_ptr + ((n * H + begin) * row_of_x + column.to(tl.int64) * C + offs_c)
    left = x_row + tl.where(start >= KW // 2, -(KW // 2) * C, 0)
    right = x_row + tl.where(start + BLOCK_W + KW // 2 <= W, BLOCK_W * C, 0)
    # Row `row` of x completes row `row + PH − (KH − 1)` of y.
    y_row = y_ptr + ((n * OH + (begin + PH - (KH - 1))) * row_of_y + start.to(tl.int64) * C + offs_c)

    acc = _zeros((KH - 1) * BLOCK_W, bias)
    for row in range(begin, end):
        xs = _load_columns(x_row, left, right, keep, keeps[0], keeps[COLUMNS - 1], keeps, C, KW // 2, COLUMNS, BLOCK_W, EDGE)  # fmt: skip
        sums = ()
        for a in tl.static_range(KH):
            for t in tl.static_range(BLOCK_W):
                s = acc[a * BLOCK_W + t] if a < KH - 1 else bias
                for j in tl.static_range(KW):
                    if t + j >= FIRST and t + j < FIRST + READ:
                        s = _fma(xs[t + j - FIRST], taps[(KH - 1 - a) * KW + j], s)
                sums = sums + (s,)
        if row + PH - (KH - 1) >= first_row:
            _store_row(y_row, sums, 0, owned, start, OW, C, BLOCK_W, EDGE)
        acc = _drop(sums, BLOCK_W, (KH - 1) * BLOCK_W)
        x_row += row_of_x
        y_row += row_of_y
        if EDGE == "strips":
            left += row_of_x
            right += row_of_x
    # Rows of y that reach below the map.
    for a in tl.static_range(KH - 1 if EDGE == "masked" else KH // 2):
        out = end + PH - (KH - 1) + a
        inside = (out >= first_row) & (out < end_row) & (channels < C)
        _store_row(y_row + a * row_of_y, acc, a * BLOCK_W, inside, start, OW, C, BLOCK_W, EDGE)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_fwd_pairs_kernel(
    x_ptr, taps_ptr, y_ptr, H, W, rows, strips,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for "same" padding and half types, two rows at a time: 11 instead of 14 products of rows for KH = 7.

    With E[m] = k[2m], O[m] = k[2m+1], P = KH // 2, and pairs of rows xe[q] = x[2q], xo[q] = x[2q+1]::

        p0[q] = Σ_m E[m]·xe[q−P+m]      p1[q] = Σ_m O[m]·xo[q−P+m]      p2[q] = Σ_m (E[m]+O[m−1])·(xe+xo)[q−P+m]
        y[2q−P] = p0[q] + p1[q]         y[2q−P+1] = p2[q] − p0[q] − p1[q+1]

    (the one-dimensional fast FIR algorithm of 2 × KH, over rows). ``taps_ptr`` holds E, O, E[m] + O[m−1] for 0 ≤ m ≤ P,
    and the bias. ``rows`` is even. Strips as in "strips"; W == BLOCK_W is allowed.
    """
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = program // CHANNEL_BLOCKS
    start = _strip_start(rest % strips, strips, W, BLOCK_W, "strips")
    rest = rest // strips
    chunks = (H + rows - 1) // rows
    first_row = (rest % chunks) * rows
    end_row = tl.minimum(first_row + rows, H)
    n = (rest // chunks).to(tl.int64)

    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    owned = None if C % BLOCK_C == 0 else channels < C
    even = _rows_of(taps_ptr + offs_c, 0, (P + 1) * KW, C)
    odd = _rows_of(taps_ptr + offs_c, (P + 1) * KW, P * KW, C)
    # E[0] + O[−1] is E[0].
    both = _drop(even, 0, KW) + _rows_of(taps_ptr + offs_c, KH * KW, P * KW, C)
    bias = tl.load(taps_ptr + (KH + P) * KW * C + offs_c)
    zero = tl.zeros((BLOCK_C,), tl.float32)

    begin = tl.maximum(first_row - (P + 1) // 2 * 2, 0)
    end = tl.minimum(end_row + P, H)
    row_of_x = W.to(tl.int64) * C
    keep_left = tl.where(start >= PW, KEEP, 0).to(tl.uint32)
    keep_right = tl.where(start + BLOCK_W + PW <= W, KEEP, 0).to(tl.uint32)
    image = n * H * row_of_x
    offset = image + start.to(tl.int64) * C + offs_c
    x_row = x_ptr + (offset + begin * row_of_x)
    left = x_row + tl.where(start >= PW, -PW * C, 0)
    right = x_row + tl.where(start + BLOCK_W + PW <= W, BLOCK_W * C, 0)
    y_row = y_ptr + (offset + (begin - P) * row_of_x)
    # Lanes 0…15 fetch the columns of the next pair's first row, lanes 16…31 those of its second.
    lane = tl.arange(0, BLOCK_C)
    column = tl.minimum(tl.maximum(start + lane % 16 - PW, 0), W - 1)
    ahead = x_ptr + (image + (begin + 2 + lane // 16) * row_of_x + column * C + (program % CHANNEL_BLOCKS) * BLOCK_C)

    p0 = _zeros(P * BLOCK_W, zero)
    p1 = _zeros(P * BLOCK_W, bias)
    p2 = _zeros(P * BLOCK_W, bias + bias)
    for row in range(begin, end, 2):
        _prefetch(ahead, row + 2 + lane // 16, H)
        ahead += 2 * row_of_x
        keep = KEEP
        xe = _load_columns(x_row, left, right, keep, keep_left, keep_right, (), C, PW, COLUMNS, BLOCK_W, "strips")
        # Where H is odd, the last pair's second row is the first one again, times 0.
        there = row + 1 < H
        step = tl.where(there, row_of_x, 0)
        keep = tl.where(there, KEEP, 0).to(tl.uint32)
        keep_l = tl.where(there, keep_left, 0).to(tl.uint32)
        keep_r = tl.where(there, keep_right, 0).to(tl.uint32)
        xo = _load_columns(x_row + step, left + step, right + step, keep, keep_l, keep_r, (), C, PW, COLUMNS, BLOCK_W, "strips")  # fmt: skip
        xs = ()
        for u in tl.static_range(COLUMNS):
            xs = xs + (xe[u] + xo[u],)
        s0 = _add_row(p0, xe, even, zero, P + 1, KW, BLOCK_W)
        s1 = _drop(p1, 0, BLOCK_W) + _add_row(_drop(p1, BLOCK_W, (P - 1) * BLOCK_W), xo, odd, bias, P, KW, BLOCK_W)
        s2 = _add_row(p2, xs, both, bias + bias, P + 1, KW, BLOCK_W)
        y0, y1 = _pair_of_rows(s0, s1, s2, 0, BLOCK_W)
        if row - P >= first_row:
            _store_row(y_row, y0, 0, owned, start, W, C, BLOCK_W, "strips")
        if (row - P + 1 >= first_row) & (row - P + 1 < end_row):
            _store_row(y_row + row_of_x, y1, 0, owned, start, W, C, BLOCK_W, "strips")
        p0 = _drop(s0, BLOCK_W, P * BLOCK_W)
        p1 = _drop(s1, BLOCK_W, P * BLOCK_W)
        p2 = _drop(s2, BLOCK_W, P * BLOCK_W)
        x_row += 2 * row_of_x
        left += 2 * row_of_x
        right += 2 * row_of_x
        y_row += 2 * row_of_x
    # Rows of y that reach below the map.
    out = begin + (end - begin + 1) // 2 * 2 - P
    p1 = p1 + _zeros(BLOCK_W, bias)
    for a in tl.static_range((P + 1) // 2):
        y0, y1 = _pair_of_rows(p0, p1, p2, a * BLOCK_W, BLOCK_W)
        _store_row(y_row + 2 * a * row_of_x, y0, 0, (channels < C) & (out + 2 * a >= first_row) & (out + 2 * a < end_row), start, W, C, BLOCK_W, "strips")  # fmt: skip
        _store_row(y_row + (2 * a + 1) * row_of_x, y1, 0, (channels < C) & (out + 2 * a + 1 >= first_row) & (out + 2 * a + 1 < end_row), start, W, C, BLOCK_W, "strips")  # fmt: skip


@triton.jit
def _add_row(acc, xs, taps, fresh, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr):
    """A row of x into the KH rows of sums it touches: KH − 1 in ``acc``, the oldest first, and one that begins."""
    sums = ()
    for a in tl.static_range(KH):
        for t in tl.static_range(BLOCK_W):
            s = acc[a * BLOCK_W + t] if a < KH - 1 else fresh
            for j in tl.static_range(KW):
                s = _fma(xs[t + j], taps[(KH - 1 - a) * KW + j], s)
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


@triton.jit
def _load_gradients(row, keep, owns, start, OW, C: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    """A row of dy in a strip as fp32; 0 in columns that are another strip's, and everywhere where ``keep`` is 0."""
    values = ()
    for t in tl.static_range(BLOCK_W):
        own = tl.where(keep != 0, owns[t], 0)
        if EDGE == "masked":
            values = values + (_widen(tl.load(row + t * C, mask=own != 0), own),)
        else:
            values = values + (_widen(tl.load(row + t * C), own),)
    return values


@triton.jit
def _owned_columns(strip, strips, start, OW, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    """KEEP for each column of a strip that no strip before it has, else 0."""
    first = start
    if EDGE != "masked":
        previous = _strip_start(strip - 1, strips, OW, BLOCK_W, EDGE)
        first = tl.where(strip > 0, previous + BLOCK_W, 0)
    owns = ()
    for t in tl.static_range(BLOCK_W):
        column = start + t
        owns = owns + (tl.where((column >= first) & (column < OW), KEEP, 0).to(tl.uint32),)
    return owns


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_bwd_weight_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, OH, OW, padding_h, padding_w, rows, strips, images,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Sums of dk and, last, db over parts of the map: partials (programs / channel blocks, KH·KW + 1, C), fp32.

    One program per (``images`` images, ``rows`` rows of x, strip of dy's columns, BLOCK_C channels), the last varying
    fastest. It keeps KH·KW sums and a window of KH rows of dy, and reads one row of x at a time.
    """
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // CHANNEL_BLOCKS
    strip = part % strips
    start = _strip_start(strip, strips, OW, BLOCK_W, EDGE)
    rest = part // strips
    chunks = (H + rows - 1) // rows
    begin = (rest % chunks) * rows
    end = tl.minimum(begin + rows, H)
    first_image = rest // chunks * images
    last_image = tl.minimum(first_image + images, N)

    if EDGE == "masked":
        PH = padding_h
        PW = padding_w
        column = start - PW
    else:
        PH: tl.constexpr = KH // 2
        PW: tl.constexpr = KW // 2
        column = start
    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    row_of_x = W.to(tl.int64) * C
    row_of_dy = OW.to(tl.int64) * C
    keeps = _keeps(start, W, PW, COLUMNS)
    owns = _owned_columns(strip, strips, start, OW, BLOCK_W, EDGE)
    to_left = tl.where(start >= KW // 2, -(KW // 2) * C, 0)
    to_right = tl.where(start + BLOCK_W + KW // 2 <= W, BLOCK_W * C, 0)

    zero = tl.zeros((BLOCK_C,), tl.float32)
    dk = _zeros(KH * KW, zero)
    db = zero
    for n in range(first_image, last_image):
        x_row = x_ptr + (n * (H * row_of_x) + begin * row_of_x + column.to(tl.int64) * C + offs_c)
        dy_image = dy_ptr + (n * (OH * row_of_dy) + start.to(tl.int64) * C + offs_c)
        # Rows begin + PH − (KH − 1) … begin + PH − 1 of dy; the first chunk counts them into db, others have been counted.
        window = ()
        for a in tl.static_range(KH - 1):
            out = begin + PH - (KH - 1) + a
            keep = tl.where((out >= 0) & (out < OH), KEEP, 0).to(tl.uint32)
            dy_row = dy_image + tl.minimum(tl.maximum(out, 0), OH - 1) * row_of_dy
            values = _load_gradients(dy_row, keep, owns, start, OW, C, BLOCK_W, EDGE)
            for t in tl.static_range(BLOCK_W):
                db += tl.where(begin == 0, values[t], 0.0)
            window = window + values
        for row in range(begin, end):
            out = row + PH
            keep = tl.where(out < OH, KEEP, 0).to(tl.uint32)
            dy_row = dy_image + tl.minimum(out, OH - 1) * row_of_dy
            values = _load_gradients(dy_row, keep, owns, start, OW, C, BLOCK_W, EDGE)
            for t in tl.static_range(BLOCK_W):
                db += values[t]
            window = window + values
            xs = _load_columns(x_row, x_row + to_left, x_row + to_right, KEEP, keeps[0], keeps[COLUMNS - 1], keeps, C, KW // 2, COLUMNS, BLOCK_W, EDGE)  # fmt: skip
            dk = _add_products(dk, window, xs, KH, KW, BLOCK_W)
            window = _drop(window, BLOCK_W, (KH - 1) * BLOCK_W)
            x_row += row_of_x
    _store_partial(partials_ptr, part, dk, db, channels, C, KH, KW)


@triton.jit
def _add_products(dk, window, xs, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr):
    """dk[i,j] += Σ_t dy[newest row − i, t] · x[t + j]; ``window`` has KH rows of dy, the newest last."""
    sums = ()
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            s = dk[i * KW + j]
            for t in tl.static_range(BLOCK_W):
                s = _fma(window[(KH - 1 - i) * BLOCK_W + t], xs[t + j], s)
            sums = sums + (s,)
    return sums


@triton.jit
def _store_partial(partials_ptr, part, dk, db, channels, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    row = partials_ptr + (part.to(tl.int64) * ((KH * KW + 1) * C) + channels)
    for q in tl.static_range(KH * KW):
        tl.store(row + q * C, dk[q], mask=channels < C)
    tl.store(row + KH * KW * C, db, mask=channels < C)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_bwd_weight_pairs_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, rows, strips, images,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """The same for "same" padding, half types and KH = 3, 7, 11, …, two rows at a time: 11 instead of 14 products.

    With P = KH // 2, even rows xe and odd rows xo of x, and t(h) = dy[h] + dy[h+1]::

        A[m] = Σ dy[h+1+P−2m]·xo      B[m] = Σ dy[h+P−2m]·xe      S[m] = Σ t(h+P−2m−1)·(xe+xo)      over pairs (h, h+1) of rows
        dk[2m] = A[m] + B[m]          dk[2m+1] = S[m] − A[m+1] − B[m]

    ``rows`` is even. Strips as in "strips"; W == BLOCK_W is allowed.
    """
    P: tl.constexpr = KH // 2
    PW: tl.constexpr = KW // 2
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channels = (program % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // CHANNEL_BLOCKS
    strip = part % strips
    start = _strip_start(strip, strips, W, BLOCK_W, "strips")
    rest = part // strips
    chunks = (H + rows - 1) // rows
    begin = (rest % chunks) * rows
    end = tl.minimum(begin + rows, H)
    first_image = rest // chunks * images
    last_image = tl.minimum(first_image + images, N)

    offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)
    row_of_x = W.to(tl.int64) * C
    keep_left = tl.where(start >= PW, KEEP, 0).to(tl.uint32)
    keep_right = tl.where(start + BLOCK_W + PW <= W, KEEP, 0).to(tl.uint32)
    to_left = tl.where(start >= PW, -PW * C, 0)
    to_right = tl.where(start + BLOCK_W + PW <= W, BLOCK_W * C, 0)
    owns = _owned_columns(strip, strips, start, W, BLOCK_W, "strips")

    # Lanes 0…15 fetch the next two rows of x, 16…31 those of dy, eight columns of each; neighbours fetch the rest.
    lane = tl.arange(0, BLOCK_C)
    of_x = lane < 16
    ahead_row = lane // 8 % 2 + tl.where(of_x, 2, P + 2)
    ahead_column = tl.minimum(start + lane % 8, W - 1) * C + (program % CHANNEL_BLOCKS) * BLOCK_C

    zero = tl.zeros((BLOCK_C,), tl.float32)
    sums_a = _zeros((P + 1) * KW, zero)
    sums_b = _zeros((P + 1) * KW, zero)
    sums_s = _zeros(P * KW, zero)
    db = zero
    for n in range(first_image, last_image):
        image = n * (H * row_of_x) + ahead_column
        offset = n * (H * row_of_x) + start.to(tl.int64) * C + offs_c
        x_row = x_ptr + (offset + begin * row_of_x)
        dy_image = dy_ptr + offset
        ahead = tl.where(of_x, x_ptr, dy_ptr) + (image + (begin + ahead_row) * row_of_x)
        # Windows of dy, the oldest row first: rows begin − P + 1 + 2a, rows begin − P + 2a, and t of the former.
        after = ()
        here = ()
        for a in tl.static_range(P):
            after = after + _load_gradients_at(dy_image, begin - P + 1 + 2 * a, H, row_of_x, owns, C, BLOCK_W)
            here = here + _load_gradients_at(dy_image, begin - P + 2 * a, H, row_of_x, owns, C, BLOCK_W)
        both = _add(after, 0, here, BLOCK_W, (P - 1) * BLOCK_W)
        for row in range(begin, end, 2):
            if PREFETCH:
                _prefetch(ahead, row + ahead_row, H)
                ahead += 2 * row_of_x
            here = here + _load_gradients_at(dy_image, row + P, H, row_of_x, owns, C, BLOCK_W)
            both = both + _add(after, (P - 1) * BLOCK_W, here, P * BLOCK_W, BLOCK_W)
            after = after + _load_gradients_at(dy_image, row + P + 1, H, row_of_x, owns, C, BLOCK_W)
            for t in tl.static_range(BLOCK_W):  # rows `row` and `row + 1` of dy
                db += both[(P - 1) // 2 * BLOCK_W + t]
            keep = KEEP
            xe = _load_columns(x_row, x_row + to_left, x_row + to_right, keep, keep_left, keep_right, (), C, PW, COLUMNS, BLOCK_W, "strips")  # fmt: skip
            there = row + 1 < H
            next_row = x_row + tl.where(there, row_of_x, 0)
            keep = tl.where(there, KEEP, 0).to(tl.uint32)
            keep_l = tl.where(there, keep_left, 0).to(tl.uint32)
            keep_r = tl.where(there, keep_right, 0).to(tl.uint32)
            xo = _load_columns(next_row, next_row + to_left, next_row + to_right, keep, keep_l, keep_r, (), C, PW, COLUMNS, BLOCK_W, "strips")  # fmt: skip
            sums_b = _add_products(sums_b, here, xe, P + 1, KW, BLOCK_W)
            sums_a = _add_products(sums_a, after, xo, P + 1, KW, BLOCK_W)
            sums_s = _add_products(sums_s, both, _add(xe, 0, xo, 0, COLUMNS), P, KW, BLOCK_W)
            here = _drop(here, BLOCK_W, P * BLOCK_W)
            after = _drop(after, BLOCK_W, P * BLOCK_W)
            both = _drop(both, BLOCK_W, (P - 1) * BLOCK_W)
            x_row += 2 * row_of_x
    dk = _add(sums_a, 0, sums_b, 0, KW)
    for m in tl.static_range(P):
        for j in tl.static_range(KW):
            dk = dk + (sums_s[m * KW + j] - sums_a[(m + 1) * KW + j] - sums_b[m * KW + j],)
        dk = dk + _add(sums_a, (m + 1) * KW, sums_b, (m + 1) * KW, KW)
    _store_partial(partials_ptr, part, dk, db, channels, C, KH, KW)


@triton.jit
def _add(a, first_a: tl.constexpr, b, first_b: tl.constexpr, count: tl.constexpr):
    sums = ()
    for q in tl.static_range(count):
        sums = sums + (a[first_a + q] + b[first_b + q],)
    return sums


@triton.jit
def _load_gradients_at(image, row, H, row_of_x, owns, C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row ``row`` of dy in a strip, 0 outside of the map, where any of its rows is read instead."""
    keep = tl.where((row >= 0) & (row < H), KEEP, 0).to(tl.uint32)
    pointers = image + tl.minimum(tl.maximum(row, 0), H - 1) * row_of_x
    return _load_gradients(pointers, keep, owns, 0, 0, C, BLOCK_W, "strips")


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_taps_kernel(
    x_ptr, weight_ptr, bias_ptr, taps_ptr, has_bias, flip, C, stride_wc, stride_wh, stride_ww, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, PAIRS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The table of taps that the forward kernels read: weight (C, 1, KH, KW) and bias (C,), rounded to the dtype of x.

    ``flip`` turns the taps around, for the input gradient. One program per (row of the table, BLOCK_C channels).
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    channel_blocks = (C + BLOCK_C - 1) // BLOCK_C
    q = tl.program_id(0) // channel_blocks
    channels = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    if PAIRS:
        # Rows of k: 0, 2, 4, … (E), 1, 3, 5, … (O), then E[m] + O[m − 1] for m ≥ 1.
        even: tl.constexpr = (KH + 1) // 2
        i = q // KW
        added = tl.where(i >= KH, 2 * (i - KH) + 1, -1)
        i = tl.where(i < even, 2 * i, tl.where(i < KH, 2 * (i - even) + 1, 2 * (i - KH) + 2))
        is_bias = q == (KH + KH // 2) * KW
    else:
        i = q // KW
        added = -1
        is_bias = q == KH * KW
    j = q % KW
    value = _tap(weight_ptr, i, j, flip, channels, inside & (is_bias == 0), stride_wc, stride_wh, stride_ww, KH, KW, DTYPE)  # fmt: skip
    value += _tap(weight_ptr, added, j, flip, channels, inside & (added >= 0) & (is_bias == 0), stride_wc, stride_wh, stride_ww, KH, KW, DTYPE)  # fmt: skip
    bias = tl.load(bias_ptr + channels.to(tl.int64) * stride_b, mask=inside & is_bias & (has_bias != 0), other=0.0)
    value += bias.to(DTYPE).to(tl.float32)
    tl.store(taps_ptr + q.to(tl.int64) * C + channels, value, mask=inside)


@triton.jit
def _tap(
    weight_ptr, i, j, flip, channels, mask, stride_wc, stride_wh, stride_ww,
    KH: tl.constexpr, KW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i = tl.where(flip != 0, KH - 1 - i, i)
    j = tl.where(flip != 0, KW - 1 - j, j)
    pointers = weight_ptr + channels.to(tl.int64) * stride_wc + i.to(tl.int64) * stride_wh + j.to(tl.int64) * stride_ww
    return tl.load(pointers, mask=mask, other=0.0).to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_MAPS)
def _depthwise_sum_kernel(
    partials_ptr, dw_ptr, db_ptr, count, wants_dw, wants_db, C, stride_wc, stride_wh, stride_ww,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dw (C, 1, KH, KW) and db (C,) from partials (count, KH·KW + 1, C), summed in one order whatever ran first.

    One program per (row of a partial, BLOCK_C channels).
    """
    channel_blocks = (C + BLOCK_C - 1) // BLOCK_C
    q = tl.program_id(0) // channel_blocks
    channels = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    parts = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        rows = (first + parts).to(tl.int64)[:, None] * (KH * KW + 1) + q
        mask = (first + parts < count)[:, None] & inside[None, :]
        acc += tl.load(partials_ptr + rows * C + channels[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    i = (q // KW).to(tl.int64)
    j = (q % KW).to(tl.int64)
    is_bias = q == KH * KW
    pointers = dw_ptr + channels.to(tl.int64) * stride_wc + i * stride_wh + j * stride_ww
    tl.store(pointers, total.to(dw_ptr.dtype.element_ty), mask=inside & (is_bias == 0) & (wants_dw != 0))
    tl.store(db_ptr + channels, total.to(db_ptr.dtype.element_ty), mask=inside & is_bias & (wants_db != 0))
