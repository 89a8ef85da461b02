"""How the depthwise kernels cut rows of a map (N, H, W, C) into strips of BLOCK_W columns, read and write them.

A program is one warp with a channel per lane, so a value below is a vector over channels, and a strip of a row is a
tuple of BLOCK_W of them. Neighbouring columns are PIXEL elements apart: C, or with dilation DW·C, see `phase_of`.
Strips differ in EDGE:

- "masked": any padding up to K − 1, any width; each column of the map has a predicate.
- "strips": "same" padding. Strips are spread evenly over a row and may overlap, so none sticks out of the map, and the
  KW // 2 columns beside a strip are all inside or all outside. Where outside, they are read from a safe place and
  multiplied by 0 in the same instruction that makes fp32 out of bf16.
- "whole": "same" padding and a map that is exactly as wide as the strip. There are no columns beside it.

Programs whose strips overlap store the same bits to the same place.
"""

import triton
import triton.language as tl

from ..primitives import KEEP, widen

# What Triton must not compile anew for: sizes that are 1 or divisible by 16, pointers that are not aligned (lanes load
# one element each, whatever the alignment).
SIZES = [
    "N", "H", "W", "OH", "OW", "padding_h", "padding_w", "rows", "strips", "images", "count", "has_bias", "flip",
    "pairs", "wants_dw", "wants_db", "channels", "stride_wc", "stride_wh", "stride_ww", "stride_b",
]  # fmt: skip
POINTERS = [
    "x_ptr", "dy_ptr", "dx_ptr", "residual_ptr", "y_ptr", "taps_ptr", "partials_ptr", "weight_ptr", "bias_ptr",
    "dw_ptr", "db_ptr",
]  # fmt: skip


@triton.jit
def load_rows(table, first: tl.constexpr, count: tl.constexpr, C: tl.constexpr):
    """Rows of a table of taps, one row of C per tap."""
    values = ()
    for q in tl.static_range(count):
        values = values + (tl.load(table + (first + q) * C),)
    return values


@triton.jit
def strip_start(strip, strips, W, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    if EDGE == "masked":
        return strip * BLOCK_W
    elif EDGE == "whole":
        return strip * 0
    else:
        return strip * (W - BLOCK_W) // tl.maximum(strips - 1, 1)


@triton.jit
def columns_inside(start, W, PW, COLUMNS: tl.constexpr):
    """KEEP for each of the COLUMNS columns from ``start − PW`` on that is inside the map, else 0."""
    keeps = ()
    for u in tl.static_range(COLUMNS):
        column = start + u - PW
        keeps = keeps + (tl.where((column >= 0) & (column < W), KEEP, 0).to(tl.uint32),)
    return keeps


@triton.jit
def columns_owned(strip, strips, start, OW, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    """KEEP for each column of a strip that no strip before it has, else 0."""
    first = start
    if EDGE != "masked":
        previous = strip_start(strip - 1, strips, OW, BLOCK_W, EDGE)
        first = tl.where(strip > 0, previous + BLOCK_W, 0)
    owns = ()
    for t in tl.static_range(BLOCK_W):
        column = start + t
        owns = owns + (tl.where((column >= first) & (column < OW), KEEP, 0).to(tl.uint32),)
    return owns


@triton.jit
def phase_of(phase, H, W, OH, OW, padding_h, padding_w, DH: tl.constexpr, DW: tl.constexpr):
    """What of a dilated convolution is one without dilation: rows a, a + DH, … and columns b, b + DW, … of the result.

    Under them lie rows u, u + DH, … and columns v, v + DW, … of x, and no others. The DH·DW phases of a map differ by
    up to one row or column in size, and in their paddings where these are not multiples of the dilation.

    Returns:
        u, v, a, b; H, W, OH, OW and the paddings of this phase.
    """
    if DH == 1 and DW == 1:
        return 0, 0, 0, 0, H, W, OH, OW, padding_h, padding_w
    else:
        a = phase // DW
        b = phase % DW
        u = (a + (DH - 1) * padding_h) % DH  # a − padding_h, of which % would make something negative
        v = (b + (DW - 1) * padding_w) % DW
        high = (H - u + DH - 1) // DH
        wide = (W - v + DW - 1) // DW
        out_high = (OH - a + DH - 1) // DH
        out_wide = (OW - b + DW - 1) // DW
        top = (padding_h + u - a) // DH
        left = (padding_w + v - b) // DW
        return u, v, a, b, high, wide, out_high, out_wide, top, left


@triton.jit
def load_columns(
    row, left, right, keep, keep_left, keep_right, keeps,
    PIXEL: tl.constexpr, KW: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One row of x under a strip as fp32, left to right: BLOCK_W columns ("whole"), else KW − 1 more.

    Args:
        row: pointers to column ``start − padding`` ("masked") or ``start``.
        left, right: where the columns beside the strip begin, or, where they are outside, any that are inside.
        keep, keep_left, keep_right: KEEP or 0, for the columns of the strip, and those beside it.
        keeps: KEEP or 0 for each column ("masked").
    """
    COLUMNS: tl.constexpr = BLOCK_W + KW - 1
    PW: tl.constexpr = KW // 2
    values = ()
    for u in tl.static_range(COLUMNS):
        if EDGE == "masked":
            inside = tl.where(keep != 0, keeps[u], 0)
            values = values + (widen(tl.load(row + u * PIXEL, mask=inside != 0), inside),)
        elif u < PW:
            if EDGE == "strips":
                values = values + (widen(tl.load(left + u * PIXEL), keep_left),)
        elif u < PW + BLOCK_W:
            values = values + (widen(tl.load(row + (u - PW) * PIXEL), keep),)
        elif EDGE == "strips":
            values = values + (widen(tl.load(right + (u - PW - BLOCK_W) * PIXEL), keep_right),)
    return values


@triton.jit
def load_gradients(row, keep, owns, start, OW, PIXEL: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr):
    """A row of dy in a strip as fp32; 0 in columns that are another strip's, and everywhere where not ``keep``."""
    values = ()
    for t in tl.static_range(BLOCK_W):
        own = tl.where(keep, owns[t], 0)
        if EDGE == "masked":
            values = values + (widen(tl.load(row + t * PIXEL, mask=own != 0), own),)
        else:
            values = values + (widen(tl.load(row + t * PIXEL), own),)
    return values


@triton.jit
def load_gradients_at(image, row, H, row_of_x, owns, PIXEL: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row ``row`` of dy in a strip, 0 outside of the map, where any of its rows is read instead."""
    keep = (row >= 0) & (row < H)
    pointers = image + tl.minimum(tl.maximum(row, 0), H - 1) * row_of_x
    return load_gradients(pointers, keep, owns, 0, 0, PIXEL, BLOCK_W, "strips")


@triton.jit
def load_residual(
    row, mask, start, OW,
    PIXEL: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What is to be added to a row of y: BLOCK_W values in their own dtype; () where there is no residual.

    Undefined where masked, and right of the map. Loops load it together with x, as at the store they would wait for it.
    """
    values = ()
    if HAS_RESIDUAL:
        for t in tl.static_range(BLOCK_W):
            if EDGE == "masked":
                values = values + (tl.load(row + t * PIXEL, mask=mask & (start + t < OW)),)
            elif mask is None:
                values = values + (tl.load(row + t * PIXEL),)
            else:
                values = values + (tl.load(row + t * PIXEL, mask=mask),)
    return values


@triton.jit
def store_row(
    row, values, first: tl.constexpr, residual, mask, start, OW,
    PIXEL: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """BLOCK_W values, from number ``first`` on, to where ``row`` points, in its dtype; plus ``residual``, unless ()."""
    for t in tl.static_range(BLOCK_W):
        value = values[first + t]
        if len(residual) > 0:
            value += residual[t].to(tl.float32)
        value = value.to(row.dtype.element_ty)
        if EDGE == "masked":
            tl.store(row + t * PIXEL, value, mask=mask & (start + t < OW))
        elif mask is None:
            tl.store(row + t * PIXEL, value)
        else:
            tl.store(row + t * PIXEL, value, mask=mask)


@triton.jit
def store_row_where(
    there, row, values, first: tl.constexpr, residual, owned, start, OW,
    PIXEL: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The same, if ``there``, a condition for the whole row; ``owned`` is the mask of lanes."""
    if len(residual) > 0:
        # Into a branch ptxas would move the loads of the residual, next to the stores, which then wait for memory.
        mask = there if owned is None else owned & there
        store_row(row, values, first, residual, mask, start, OW, PIXEL, BLOCK_W, EDGE)
    else:
        if there:
            store_row(row, values, first, residual, owned, start, OW, PIXEL, BLOCK_W, EDGE)
