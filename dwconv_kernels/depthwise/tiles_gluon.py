"""What the tensor-core kernels of kernels_gluon.py share: layouts, and the way of a tile between memory and registers.

A *patch* is R rows × T columns of outputs, R·T = 8, and so is a *block* of inputs: 8 pixels, 16 bytes of one channel. A
*tile* is STEPS patch rows × 16 strips × 8 pixels × BLOCK_C channels. In memory its channels lie side by side, in shared
memory its pixels, as (STEPS, BLOCK_C, 16 strips, 8 pixels): so a block is a row of ldmatrix, and of stmatrix. A thread
holds 8 channels of PIXELS pixels, and turns them around in its registers on the way.

A warp multiplies for one channel at a time, number ``j · WARPS + warp`` of the BLOCK_C of its program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Layouts. Each line of a "basis" says where in the tensor the next bit of a thread's registers, of the number of its
# lane, or of its warp leads.


@gluon.constexpr_function
def _bits(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _warps_along(axis, rank, warps):
    return [[w if a == axis else 0 for a in range(rank)] for w in _bits(warps)]


@gluon.constexpr_function
def tile_layout(steps, pixels, block_c, warps):
    """Of a tile as it is read or written, (steps, 16, 8, block_c): each thread 8 channels of ``pixels`` pixels."""
    registers = [[0, 0, 0, c] for c in (1, 2, 4)] + [[0, 0, e, 0] for e in _bits(pixels)]
    rest = [[0, 0, e * pixels, 0] for e in _bits(8 // pixels)] + [[0, m, 0, 0] for m in (1, 2, 4, 8)]
    rest += [[0, 0, 0, 8 * c] for c in _bits(block_c // 8)] + [[s, 0, 0, 0] for s in _bits(steps)]
    return gl.DistributedLinearLayout(registers, rest[:5], rest[5:], [], [steps, 16, 8, block_c])


@gluon.constexpr_function
def copy_layout(rows, warps):
    """Of pairs of blocks that are copied as they are, (rows, 8 channels, 2, 16 groups, 8 pixels): 16 bytes a thread."""
    registers = [[0, 0, 0, 0, e] for e in (1, 2, 4)]
    rest = [[0, 0, 0, m, 0] for m in (1, 2, 4)] + [[0, c, 0, 0, 0] for c in (1, 2, 4)]
    rest += [[0, 0, 0, 8, 0], [0, 0, 1, 0, 0]] + [[r, 0, 0, 0, 0] for r in _bits(rows)]
    end = 5 + len(_bits(warps))
    return gl.DistributedLinearLayout(registers + rest[end:], rest[:5], rest[5:end], [], [rows, 8, 2, 16, 8])


@gluon.constexpr_function
def pair_layout(warps):
    """Of a pair of blocks of each group, (1, warps, 2, 16, 8), as ldmatrix hands them out: a first factor."""
    lanes = [[0, 0, 0, 0, 2], [0, 0, 0, 0, 4], [0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 4, 0]]
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 8, 0], [0, 0, 1, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _warps_along(1, 5, warps), [], [1, warps, 2, 16, 8])


@gluon.constexpr_function
def turned_layout(warps):
    """Of the same pair, (1, warps, 2, 8 pixels, 16 strips), from ldmatrix.trans: a first factor turned around."""
    lanes = [[0, 0, 0, 0, 2], [0, 0, 0, 0, 4], [0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 4, 0]]
    registers = [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 8]]
    return gl.DistributedLinearLayout(registers, lanes, _warps_along(1, 5, warps), [], [1, warps, 2, 8, 16])


@gluon.constexpr_function
def second_layout(warps):
    """Of a patch of each strip, (1, warps, 16, 8), from ldmatrix.trans: a second factor."""
    lanes = [[0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4]]
    registers = [[0, 0, 1, 0], [0, 0, 8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _warps_along(1, 4, warps), [], [1, warps, 16, 8])


@gluon.constexpr_function
def fragment_layout(warps):
    """Of a table of second factors, (warps · 32, 4): what a lane multiplies with lies side by side."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(warps):
    """Of products, (warps, 16, 8): one mma.m16n8k16 per warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def rows_of(rank):
    """Shared memory without swizzling, the last dimension fastest: as it is, nothing conflicts."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def _axis_layout(layout, rank, axis):
    for a in range(rank - 1, axis, -1):
        layout = gl.SliceLayout(a, layout)
    for _ in range(axis):
        layout = gl.SliceLayout(0, layout)
    return layout


@gluon.jit
def along(SIZE: gl.constexpr, LAYOUT: gl.constexpr, RANK: gl.constexpr, AXIS: gl.constexpr):
    """0 … SIZE − 1 along one axis of a tensor with RANK axes in LAYOUT, the other axes of size 1."""
    values = gl.arange(0, SIZE, layout=_axis_layout(LAYOUT, RANK, AXIS))
    for _ in gl.static_range(AXIS):
        values = gl.expand_dims(values, 0)
    for a in gl.static_range(AXIS + 1, RANK):
        values = gl.expand_dims(values, a)
    return values


# Tiles


@gluon.jit
def tile_pixels(W, C: gl.constexpr, R: gl.constexpr, T: gl.constexpr, STEPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Row and column of each pixel of a tile, from the first of its strip, and how far it is from that in memory.

    Shapes (STEPS, 1, 8, 1), (1, 1, 8, 1) and (STEPS, 1, 8, 1), for a map with W columns.
    """
    e = along(8, LAYOUT, 4, 2)
    row = along(STEPS, LAYOUT, 4, 0) * R + e // T
    return row, e % T, row * (W * C) + e % T * C


@gluon.jit
def load_tile(
    x_ptr, base, row, end, column, W, pixels, channel,
    C: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """A tile of a map (N, H, W, C); 0 outside of rows 0 ≤ r < ``end`` and columns 0 ≤ c < W.

    Args:
        base: (1, 16, 1, 1) int64, where the first pixel of each strip is.
        row: the first row, that of all strips.
        end, column: (1, 16, 1, 1), for each strip the row to end before, and its first column.
        pixels: from :func:`tile_pixels`.
        channel: (1, 1, 1, BLOCK_C).
    """
    r = row + pixels[0]
    c = column + pixels[1]
    mask = (r >= 0) & (r < end) & (c >= 0) & (c < W)
    if C % BLOCK_C != 0:
        mask = mask & (channel < C)
    return gl.load(x_ptr + (base + pixels[2]) + channel, mask=mask, other=0.0)


@gluon.jit
def load_window(
    x_ptr, base, row, end, column, W, pixels, channel,
    C: gl.constexpr, T: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """A tile for each of the BLOCKS blocks side by side that are under a patch; arguments as :func:`load_tile`'s."""
    tiles = ()
    for b in gl.static_range(BLOCKS):
        of_block = base + b * T * C
        tiles = tiles + (load_tile(x_ptr, of_block, row, end, column + b * T, W, pixels, channel, C, BLOCK_C),)
    return tiles


@gluon.jit
def store_tile(
    y_ptr, y, base, row, begin, end, column, W, pixels, channel,
    C: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Stores a tile where it is in rows ``begin`` ≤ r < ``end`` and columns c < W; arguments as :func:`load_tile`'s."""
    r = row + pixels[0]
    mask = (r >= begin) & (r < end) & (column + pixels[1] < W)
    if C % BLOCK_C != 0:
        mask = mask & (channel < C)
    gl.store(y_ptr + (base + pixels[2]) + channel, y, mask=mask)


# Factors of products


@gluon.jit
def table_lanes(WARPS: gl.constexpr):
    """Where in a table of second factors each lane finds the four numbers that it multiplies with, (WARPS · 32, 4)."""
    FRAGMENT: gl.constexpr = fragment_layout(WARPS)
    return along(WARPS * 32, FRAGMENT, 2, 0) * 4 + along(4, FRAGMENT, 2, 1)


@gluon.jit
def load_second(pointers, WARPS: gl.constexpr):
    """A second factor, (WARPS, 16, 8), from a table. Lane n · 4 + t has rows 2t, 2t + 1, 2t + 8, 2t + 9 of column n."""
    SECOND: gl.constexpr = gl.DotOperandLayout(1, product_layout(WARPS), 2)
    values = gl.load(pointers).reshape([WARPS, 8, 4, 2, 2]).permute([0, 3, 2, 4, 1]).reshape([WARPS, 16, 8])
    return gl.convert_layout(values, SECOND, assert_trivial=True)


@gluon.jit
def load_first(pairs, step, j: gl.constexpr, WARPS: gl.constexpr):
    """A pair of blocks of each strip as a first factor, (WARPS, 16 strips, 16 pixels).

    ``pairs`` is (steps, channels, 2, 16, 8) in shared memory.
    """
    FIRST: gl.constexpr = gl.DotOperandLayout(0, product_layout(WARPS), 2)
    pair = pairs.slice(step, 1, dim=0).slice(j * WARPS, WARPS, dim=1).load(pair_layout(WARPS))
    return gl.convert_layout(pair.permute([0, 1, 3, 2, 4]).reshape([WARPS, 16, 16]), FIRST, assert_trivial=True)


@gluon.jit
def load_first_turned(pairs, step, j: gl.constexpr, WARPS: gl.constexpr):
    """The same turned around, (WARPS, 16 pixels, 16 strips)."""
    FIRST: gl.constexpr = gl.DotOperandLayout(0, product_layout(WARPS), 2)
    pair = pairs.slice(step, 1, dim=0).slice(j * WARPS, WARPS, dim=1).permute([0, 1, 2, 4, 3])
    return gl.convert_layout(pair.load(turned_layout(WARPS)).reshape([WARPS, 16, 16]), FIRST, assert_trivial=True)


@gluon.jit
def store_block(pairs, x, half: gl.constexpr, STEPS: gl.constexpr, BLOCK_C: gl.constexpr):
    """A tile (STEPS, 16, 8, BLOCK_C) as one of two blocks into (STEPS, BLOCK_C, 2, 16, 8) in shared memory."""
    pairs.slice(half, 1, dim=2).store(x.permute([0, 3, 1, 2]).reshape([STEPS, BLOCK_C, 1, 16, 8]))


@gluon.jit
def zeros(WARPS: gl.constexpr):
    """A product that is still to be summed up."""
    return gl.zeros([WARPS, 16, 8], gl.float32, layout=product_layout(WARPS))


@gluon.jit
def bias_of(bias_ptr, WARPS: gl.constexpr):
    """The bias of each warp's channel, for all of a product."""
    return gl.load(bias_ptr + along(WARPS, product_layout(WARPS), 3, 0)) + zeros(WARPS)
