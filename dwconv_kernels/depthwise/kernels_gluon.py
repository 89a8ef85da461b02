"""Depthwise convolution on tensor cores, in Gluon: forward (also the input gradient), and weight gradient.

The sums of a patch of R × T outputs over a block of R × T inputs are the products of a 16 × 8 by an 8 × 8 matrix: 16
strips of the map, the 8 pixels of a block, the 8 outputs of the patch, and between them a matrix of taps that depends
on nothing but where the block lies from the patch ("banded": a tap has the same place relative to each output). Two
blocks side by side make one mma.m16n8k16. Formulas and tables: this folder's README; layouts: tiles_gluon.py.

A patch row is R rows of outputs; strips are T columns wide. Patch row g of the outputs needs patch rows g … g + GROUPS
− 1 of the inputs, counted from ``padding_h`` rows above, and strip s needs blocks s … s + 2·PAIRS − 1, counted from
``padding_w`` columns to the left. Second factors come from a table (depthwise/kernels_tables.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .tiles_gluon import (
    along,
    bias_of,
    copy_layout,
    load_first,
    load_first_turned,
    load_second,
    load_tile,
    load_window,
    product_layout,
    rows_of,
    second_layout,
    store_block,
    store_tile,
    table_lanes,
    tile_layout,
    tile_pixels,
    zeros,
)

# What Triton must not compile anew for: sizes that are 1 or divisible by 16.
SIZES = [
    "N", "H", "W", "HB", "WB", "OH", "OW", "padding_h", "padding_w", "rows", "strips", "tiles", "tiles_per_program",
    "jobs_per_program", "shift_h", "shift_w", "column_groups", "pairs",
]  # fmt: skip

# Triton 3.9 has another name for it.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit(do_not_specialize=SIZES)
def _depthwise_fwd_stream_kernel(
    x_ptr, table_ptr, bias_ptr, residual_ptr, y_ptr, N, H, W, OH, OW, padding_h, padding_w, rows, strips, tiles,
    tiles_per_program,
    C: gl.constexpr, R: gl.constexpr, T: gl.constexpr, GROUPS: gl.constexpr, PAIRS: gl.constexpr,
    J: gl.constexpr, PIXELS: gl.constexpr, WARPS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """y (N, OH, OW, C) of x (N, H, W, C): taps stay in registers, the rows of the map pass by. HAS_RESIDUAL: plus one.

    Each input is read once per block of a window it is in (2·PAIRS times, from L1 but for the first). One program per
    (``tiles_per_program`` tiles of 16 strips, ``rows`` rows of y, BLOCK_C channels), the last varying fastest; ``rows``
    is a multiple of R. Sums of GROUPS patch rows of y are open at a time.
    """
    BLOCK_C: gl.constexpr = J * WARPS
    STEPS: gl.constexpr = WARPS * 32 * PIXELS // (16 * BLOCK_C)
    BLOCKS: gl.constexpr = 2 * PAIRS
    CHANNEL_BLOCKS: gl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PADDED: gl.constexpr = CHANNEL_BLOCKS * BLOCK_C
    TILE: gl.constexpr = tile_layout(STEPS, PIXELS, BLOCK_C, WARPS)
    STAGED: gl.constexpr = gl.float32 if HAS_RESIDUAL else y_ptr.dtype.element_ty
    program = gl.program_id(0)
    first_channel = (program % CHANNEL_BLOCKS) * BLOCK_C
    channel = first_channel + along(BLOCK_C, TILE, 4, 3)
    rest = program // CHANNEL_BLOCKS
    chunks = (OH + rows - 1) // rows
    first_row = (rest % chunks) * rows
    end_row = gl.minimum(first_row + rows, OH)
    first_tile = rest // chunks * tiles_per_program

    lanes = table_ptr + first_channel * 128 + table_lanes(WARPS)
    taps = ()
    for at in gl.static_range(GROUPS * PAIRS):
        for j in gl.static_range(J):
            taps = taps + (load_second(lanes + (at * PADDED + j * WARPS) * 128, WARPS),)
    fresh = ()
    for j in gl.static_range(J):
        fresh = fresh + (bias_of(bias_ptr + first_channel + j * WARPS, WARPS),)

    # Step t reads patch row t of the inputs and completes patch row t − (GROUPS − 1) of y. Those above the map add
    # nothing; those below it would not either, but hand out the last rows of y.
    begin = gl.maximum(padding_h - first_row, 0) // R
    end = (end_row - first_row + R - 1) // R + GROUPS - 1
    pixels = tile_pixels(W, C, R, T, STEPS, TILE)
    out_pixels = tile_pixels(OW, C, R, T, STEPS, TILE)
    inputs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [PAIRS, STEPS, BLOCK_C, 2, 16, 8], rows_of(5))
    outputs = gl.allocate_shared_memory(STAGED, [STEPS, BLOCK_C, 16, 8], rows_of(4))
    for tile in range(first_tile, gl.minimum(first_tile + tiles_per_program, tiles)):
        strip = tile * 16 + along(16, TILE, 4, 1)
        image = strip // strips
        column = strip % strips * T
        row = first_row - padding_h + begin * R
        x_base = ((image.to(gl.int64) * H + row) * W + (column - padding_w)) * C
        x_end = gl.where(image < N, H, 0)
        out_row = first_row + (begin - (GROUPS - 1)) * R
        y_base = ((image.to(gl.int64) * OH + out_row) * OW + column) * C
        y_end = gl.where(image < N, end_row, 0)
        acc = ()
        for _q in gl.static_range(GROUPS):
            acc = acc + fresh
        x = load_window(x_ptr, x_base, row, x_end, column - padding_w, W, pixels, channel, C, T, BLOCKS, BLOCK_C)
        for _step in range(begin, end, STEPS):
            for b in gl.static_range(BLOCKS):
                store_block(inputs.index(b // 2), x[b], b % 2, STEPS, BLOCK_C)
            row += STEPS * R
            x_base += STEPS * R * W * C
            # Of the next steps, while these are multiplied.
            x = load_window(x_ptr, x_base, row, x_end, column - padding_w, W, pixels, channel, C, T, BLOCKS, BLOCK_C)
            residual = None
            if HAS_RESIDUAL:  # early: at the end of the steps they would wait for it
                residual = load_tile(residual_ptr, y_base, out_row, y_end, column, OW, out_pixels, channel, C, BLOCK_C)
            for s in gl.static_range(STEPS):
                for pair in gl.static_range(PAIRS):
                    sums = ()
                    first = ()
                    for j in gl.static_range(J):
                        first = first + (load_first(inputs.index(pair), s, j, WARPS),)
                    for q in gl.static_range(GROUPS):
                        for j in gl.static_range(J):
                            sums = sums + (mma_v2(first[j], taps[(pair * GROUPS + q) * J + j], acc[q * J + j]),)
                    acc = sums
                done = acc[(GROUPS - 1) * J].to(STAGED)
                if J == 2:
                    done = gl.join(done, acc[(GROUPS - 1) * J + 1].to(STAGED)).permute([3, 0, 1, 2])
                outputs.slice(s, 1, dim=0).store(done.reshape([1, BLOCK_C, 16, 8]))
                opened = fresh
                for q in gl.static_range((GROUPS - 1) * J):
                    opened = opened + (acc[q],)
                acc = opened
            y = outputs.permute([0, 2, 3, 1]).load(TILE)
            if HAS_RESIDUAL:
                y = (y + residual.to(gl.float32)).to(y_ptr.dtype.element_ty)
            store_tile(y_ptr, y, y_base, out_row, first_row, y_end, column, OW, out_pixels, channel, C, BLOCK_C)
            out_row += STEPS * R
            y_base += STEPS * R * OW * C


@gluon.jit(do_not_specialize=SIZES)
def _depthwise_bwd_weight_stream_kernel(
    x_ptr, dy_ptr, partials_ptr, N, H, W, OH, OW, padding_h, padding_w, rows, strips, tiles, jobs_per_program,
    C: gl.constexpr, R: gl.constexpr, T: gl.constexpr, GROUPS: gl.constexpr, PAIRS: gl.constexpr,
    COLUMN_GROUPS: gl.constexpr, J: gl.constexpr, PIXELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Sums over parts of the map of what the gradients of taps and bias are made of; dy (N, OH, OW, C), fp32 sums.

    For a pair of blocks and a patch row q of the window: (16 pixels, 8 outputs) products of inputs and dy, summed over
    all strips. Each tap is the sum of eight of these. A program does PAIRS of the pairs of blocks, for ``jobs_per_
    program`` of (tiles of 16 strips, ``rows`` rows of dy), for BLOCK_C channels, which vary fastest, then the columns.
    ``partials_ptr`` is (parts, COLUMN_GROUPS, PAIRS · GROUPS + 1, channels, 16, 8), the last one for the bias.
    """
    BLOCK_C: gl.constexpr = J * WARPS
    STEPS: gl.constexpr = WARPS * 32 * PIXELS // (16 * BLOCK_C)
    BLOCKS: gl.constexpr = 2 * PAIRS
    CHANNEL_BLOCKS: gl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TILE: gl.constexpr = tile_layout(STEPS, PIXELS, BLOCK_C, WARPS)
    PRODUCT: gl.constexpr = product_layout(WARPS)
    SECOND: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    program = gl.program_id(0)
    first_channel = (program % CHANNEL_BLOCKS) * BLOCK_C
    channel = first_channel + along(BLOCK_C, TILE, 4, 3)
    group = program // CHANNEL_BLOCKS % COLUMN_GROUPS
    part = program // (CHANNEL_BLOCKS * COLUMN_GROUPS)
    shift = group * (BLOCKS * T) - padding_w
    pixels = tile_pixels(W, C, R, T, STEPS, TILE)
    dy_pixels = tile_pixels(OW, C, R, T, STEPS, TILE)
    xs = gl.allocate_shared_memory(dtype, [PAIRS, STEPS, BLOCK_C, 2, 16, 8], rows_of(5))
    dys = gl.allocate_shared_memory(dtype, [STEPS, BLOCK_C, 16, 8], rows_of(4))
    ones = gl.full([WARPS, 16, 16], 1.0, dtype, layout=gl.DotOperandLayout(0, PRODUCT, 2))

    sums = ()
    for _at in gl.static_range((PAIRS * GROUPS + 1) * J):
        sums = sums + (zeros(WARPS),)
    chunks = (OH + rows - 1) // rows
    for job in range(part * jobs_per_program, gl.minimum((part + 1) * jobs_per_program, tiles * chunks)):
        strip = job % tiles * 16 + along(16, TILE, 4, 1)
        image = strip // strips
        column = strip % strips * T
        dy_row = job // tiles * rows
        end_row = gl.minimum(dy_row + rows, OH)
        row = dy_row - padding_h
        x_base = ((image.to(gl.int64) * H + row) * W + (column + shift)) * C
        dy_base = ((image.to(gl.int64) * OH + dy_row) * OW + column) * C
        x_end = gl.where(image < N, H, 0)
        dy_end = gl.where(image < N, end_row, 0)
        # The patch rows of dy that the newest one of the inputs meets, the newest first.
        window = ()
        for _q in gl.static_range(GROUPS * J):
            window = window + (gl.zeros([WARPS, 16, 8], dtype, layout=SECOND),)
        x = load_window(x_ptr, x_base, row, x_end, column + shift, W, pixels, channel, C, T, BLOCKS, BLOCK_C)
        dy = load_tile(dy_ptr, dy_base, dy_row, dy_end, column, OW, dy_pixels, channel, C, BLOCK_C)
        # To the last patch row of the inputs that is in the map; dy has ended before, as its padding is less than KH.
        end = gl.minimum((end_row - dy_row + R - 1) // R + GROUPS - 1, (H - row + R - 1) // R)
        for _step in range(0, end, STEPS):
            for b in gl.static_range(BLOCKS):
                store_block(xs.index(b // 2), x[b], b % 2, STEPS, BLOCK_C)
            dys.store(dy.permute([0, 3, 1, 2]))
            row += STEPS * R
            x_base += STEPS * R * W * C
            dy_row += STEPS * R
            dy_base += STEPS * R * OW * C
            # Of the next steps, while these are multiplied.
            x = load_window(x_ptr, x_base, row, x_end, column + shift, W, pixels, channel, C, T, BLOCKS, BLOCK_C)
            dy = load_tile(dy_ptr, dy_base, dy_row, dy_end, column, OW, dy_pixels, channel, C, BLOCK_C)
            for s in gl.static_range(STEPS):
                newest = ()
                for j in gl.static_range(J):
                    patch = dys.slice(s, 1, dim=0).slice(j * WARPS, WARPS, dim=1).load(second_layout(WARPS))
                    newest = newest + (gl.convert_layout(patch.reshape([WARPS, 16, 8]), SECOND, assert_trivial=True),)
                for q in gl.static_range((GROUPS - 1) * J):
                    newest = newest + (window[q],)
                window = newest
                new = ()
                for pair in gl.static_range(PAIRS):
                    for j in gl.static_range(J):
                        first = load_first_turned(xs.index(pair), s, j, WARPS)
                        for q in gl.static_range(GROUPS):
                            new = new + (mma_v2(first, window[q * J + j], sums[(pair * J + j) * GROUPS + q]),)
                for j in gl.static_range(J):
                    new = new + (mma_v2(ones, window[j], sums[PAIRS * J * GROUPS + j]),)
                sums = new
    PADDED: gl.constexpr = CHANNEL_BLOCKS * BLOCK_C
    inside = (along(WARPS, PRODUCT, 3, 0) * 16 + along(16, PRODUCT, 3, 1)) * 8 + along(8, PRODUCT, 3, 2)
    first = (part * COLUMN_GROUPS + group).to(gl.int64) * (PAIRS * GROUPS + 1)
    for at in gl.static_range(PAIRS * GROUPS + 1):
        for j in gl.static_range(J):
            to = ((first + at) * PADDED + first_channel + j * WARPS) * 128
            if at < PAIRS * GROUPS:
                gl.store(partials_ptr + (to + inside), sums[(at // GROUPS * J + j) * GROUPS + at % GROUPS])
            else:
                gl.store(partials_ptr + (to + inside), sums[PAIRS * J * GROUPS + j])


@gluon.jit(do_not_specialize=SIZES)
def _depthwise_fwd_large_kernel(
    blocks_ptr, table_ptr, bias_ptr, residual_ptr, y_ptr, N, HB, WB, OH, OW, shift_h, shift_w, column_groups, pairs,
    C: gl.constexpr, R: gl.constexpr, T: gl.constexpr, GROUPS: gl.constexpr,
    PATCH_ROWS: gl.constexpr, STRIPS: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """y (N, OH, OW, C) for large kernels: the sums of PATCH_ROWS × STRIPS patches stay in registers, taps pass by.

    ``blocks_ptr`` is the map in blocks, (N, HB, WB, channels, 8 pixels), channels a multiple of 8: as they are there,
    blocks are copied into shared memory. The first factor's 16 rows are *groups* of STRIPS strips; a group takes every
    other strip, and its neighbour those between, so that its strips begin at even blocks and a pair of blocks is one
    ldmatrix. The windows of ``pairs`` pairs of blocks overlap: one more pair comes with each round, in a ring.

    One program per (16 groups, PATCH_ROWS patch rows of y, 8 channels), the last varying fastest. Block (u, v) of an
    image begins at row u·R and column v·T; ``shift_h``, ``shift_w`` blocks above and left of it, windows begin.
    """
    BLOCK_C: gl.constexpr = WARPS
    STEPS: gl.constexpr = 4
    CHANNEL_BLOCKS: gl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PADDED: gl.constexpr = CHANNEL_BLOCKS * BLOCK_C
    COPY: gl.constexpr = copy_layout(CHUNK, WARPS)
    TILE: gl.constexpr = tile_layout(STEPS, 2, BLOCK_C, WARPS)
    dtype: gl.constexpr = blocks_ptr.dtype.element_ty
    program = gl.program_id(0)
    first_channel = (program % CHANNEL_BLOCKS) * BLOCK_C
    rest = program // CHANNEL_BLOCKS
    chunks = (OH + PATCH_ROWS * R - 1) // (PATCH_ROWS * R)
    first_row = (rest % chunks) * (PATCH_ROWS * R)
    end_row = gl.minimum(first_row + PATCH_ROWS * R, OH)
    first_group = rest // chunks * 16

    group = first_group + along(16, COPY, 5, 3)
    image = group // column_groups
    block = _first_strip(group % column_groups, STRIPS) - shift_w + along(2, COPY, 5, 2)
    block_end = gl.where(image < N, WB, 0)
    block_row = first_row // R - shift_h + along(CHUNK, COPY, 5, 0)
    inside = (first_channel + along(8, COPY, 5, 1)) * 8 + along(8, COPY, 5, 4)

    bias = bias_of(bias_ptr + first_channel, WARPS)
    acc = ()
    for _at in gl.static_range(PATCH_ROWS * STRIPS):
        acc = acc + (bias,)
    ring = gl.allocate_shared_memory(dtype, [STRIPS + 1, CHUNK, BLOCK_C, 2, 16, 8], rows_of(5))
    for chunk in gl.static_range((PATCH_ROWS + GROUPS - 1 + CHUNK - 1) // CHUNK):
        top = first_row // R - shift_h + chunk * CHUNK
        if (top < HB) & (top + CHUNK > 0):
            row = block_row + chunk * CHUNK
            there = (row >= 0) & (row < HB)
            source = blocks_ptr + (((image.to(gl.int64) * HB + row) * WB + block) * (PADDED * 8) + inside)
            for z in gl.static_range(STRIPS):
                _copy_pair(ring.index(z), source, block, 2 * z, there, block_end, PADDED)
            async_copy.commit_group()
            lanes = table_ptr + first_channel * 128 + table_lanes(WARPS)
            for pair in range(pairs):
                taps = ()
                for q in gl.static_range(GROUPS):
                    taps = taps + (load_second(lanes + q * (PADDED * 128), WARPS),)
                lanes += GROUPS * PADDED * 128
                async_copy.wait_group(0)
                behind = pair + STRIPS
                slot = ring.index(behind % (STRIPS + 1))
                _copy_pair(slot, source, block, 2 * behind, there, block_end, PADDED)
                async_copy.commit_group()
                for f in gl.static_range(STRIPS):
                    slot = ring.index((pair + f) % (STRIPS + 1))
                    for s in gl.static_range(CHUNK):
                        first = load_first(slot, s, 0, WARPS)
                        acc = _add_products(acc, first, taps, chunk * CHUNK + s, f, PATCH_ROWS, STRIPS, GROUPS)
            async_copy.wait_group(0)

    STAGED: gl.constexpr = gl.float32 if HAS_RESIDUAL else y_ptr.dtype.element_ty
    outputs = gl.allocate_shared_memory(STAGED, [STEPS, BLOCK_C, 16, 8], rows_of(4))
    channel = first_channel + along(BLOCK_C, TILE, 4, 3)
    group = first_group + along(16, TILE, 4, 1)
    image = group // column_groups
    y_end = gl.where(image < N, end_row, 0)
    pixels = tile_pixels(OW, C, R, T, STEPS, TILE)
    for f in gl.static_range(STRIPS):
        column = (_first_strip(group % column_groups, STRIPS) + 2 * f) * T
        for batch in gl.static_range((PATCH_ROWS + STEPS - 1) // STEPS):
            for s in gl.static_range(STEPS):
                if batch * STEPS + s < PATCH_ROWS:
                    done = acc[(batch * STEPS + s) * STRIPS + f].to(STAGED)
                    outputs.slice(s, 1, dim=0).store(done.reshape([1, BLOCK_C, 16, 8]))
            y = outputs.permute([0, 2, 3, 1]).load(TILE)
            row = first_row + batch * STEPS * R
            base = ((image.to(gl.int64) * OH + row) * OW + column) * C
            if HAS_RESIDUAL:
                residual = load_tile(residual_ptr, base, row, y_end, column, OW, pixels, channel, C, BLOCK_C)
                y = (y + residual.to(gl.float32)).to(y_ptr.dtype.element_ty)
            store_tile(y_ptr, y, base, row, first_row, y_end, column, OW, pixels, channel, C, BLOCK_C)


@gluon.jit
def _first_strip(group, STRIPS: gl.constexpr):
    """The first strip of a group, counted in a row of strips; its next ones are the second, the fourth … after it."""
    return group // 2 * (2 * STRIPS) + group % 2


@gluon.jit
def _copy_pair(slot, source, block, behind, there, end, C: gl.constexpr):
    """The pair ``behind`` blocks further on than ``source``; zeros where it is not in the map."""
    mask = there & (block >= -behind) & (block < end - behind)
    copy_to_shared(slot, source + behind * (C * 8), mask=mask)


@gluon.jit
def _add_products(
    acc, first, taps, row: gl.constexpr, strip: gl.constexpr,
    PATCH_ROWS: gl.constexpr, STRIPS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Patch row ``row`` of the inputs of strip number ``strip`` into all patch rows of its sums that it touches."""
    sums = ()
    for at in gl.static_range(PATCH_ROWS * STRIPS):
        if at % STRIPS == strip and row >= at // STRIPS and row - at // STRIPS < GROUPS:
            sums = sums + (mma_v2(first, taps[row - at // STRIPS], acc[at]),)
        else:
            sums = sums + (acc[at],)
    return sums
