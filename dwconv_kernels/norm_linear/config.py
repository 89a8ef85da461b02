"""Which kernels run layer norm + linear (+ GELU), and with which tiles: pure functions of the problem.

No autotuning, as for the convolution: rows are never part of a choice, except that few of them are cut into smaller
tiles. Registers, shared memory and waits are read from compiled code by ``python -m benchmarks.norm_linear_code``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

from ..devices import multiprocessors, shared_kb

DTYPES = ("bf16", "fp16", "fp32")
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
MAX_C = 16_384  # channels of a row that one program normalises: 32 values in each of 512 lanes
PARTS_PER_SUM = 64  # 3000 blocks of rows, one after the other, would take as long as a tenth of a backward pass
MAX_D = 2**23  # outputs: offsets inside of 128 rows are 32 bits
MAX_MATRIX = 2**30  # elements of the weight, for the same reason

# Up to here, a row is normalised where it is multiplied. Above, 128 rows and the weights of two blocks of outputs do
# not fit into half of a multiprocessor's shared memory, and 64 rows would read the weights too often: 8 KB per row.
MAX_RESIDENT_C = {"half": 192, "fp32": 128}


@dataclass(frozen=True)
class Tile:
    """A block of a product: ``m`` × ``n`` sums, ``k`` products a step; how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """How it is compiled and launched."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def why_not(x: str, parameters: str, c: int, d: int) -> str | None:
    """Why no kernel takes such a call; None where one does. Dtypes as in DTYPES, or names to report."""
    for name, dtype in (("x", x), ("the linear layer", parameters)):
        if dtype not in DTYPES:
            return f"{name} is {dtype}; the kernels take bfloat16, float16 and float32"
    if c > MAX_C or not 0 < d <= MAX_D or c * d > MAX_MATRIX:
        return f"C={c}, D={d}; the kernels take C up to {MAX_C}, D from 1 to 2^23 and C·D up to 2^30"
    return None


def _kind(dtype: str) -> str:
    return "fp32" if dtype == "fp32" else "half"


def _step(length: int, dtype: str) -> int:
    """Products a step, along a row of ``length``: 128 bytes, or half of that where it wastes less or lies unaligned."""
    most = 128 // ITEMSIZE[dtype]
    return most if length % most == 0 else most // 2


def aligned(size: int, dtype: str) -> bool:
    """Do all rows of ``size`` elements begin at multiples of 16 bytes, if the first one does?"""
    return size * ITEMSIZE[dtype] % 16 == 0


@cache
def split(c: int) -> tuple[int, int]:
    """(C0, C1): ``c`` channels as one tile, or as two where the next power of two is much wider; each at least 16."""
    whole = max(16, 1 << (c - 1).bit_length())
    first = whole // 2
    if first < 16 or c <= first:
        return whole, 0
    second = max(16, 1 << (c - first - 1).bit_length())
    return (whole, 0) if first + second >= whole else (first, second)


@cache
def resident(dtype: str, c: int, d: int, arch: int, vectors: bool = True) -> Tile | None:
    """The forward kernel that keeps its rows: m rows, n outputs at a time. None where it is not to be used.

    ``vectors``: are rows of x read 16 bytes at a time?
    """
    straight = aligned(c, dtype) and aligned(d, dtype) and vectors
    if c > MAX_RESIDENT_C[_kind(dtype)]:
        return None
    if dtype == "fp32":
        return Tile(64, 32, 0, warps=4 if straight and c <= 96 else 8, stages=2)
    if not straight:  # what is loaded and stored an element at a time takes more registers
        return Tile(64, 32, 0, warps=8, stages=2)
    # 64 outputs: with 128, 128 channels take 150 registers, and one program a multiprocessor; with 128 registers there
    # are two, where shared memory has room for the rows of both.
    two = c <= 128 or shared_kb(arch) > 200
    return Tile(128, 64, 0, warps=8, stages=2, registers=128 if two else None)


@cache
def product(dtype: str, length: int, n: int, arch: int, few: bool, tf32: bool = False) -> Tile:
    """The tile of x̂·Wᵀ and du·W: rows times ``n`` columns, ``length`` products each. ``few``: rows and columns."""
    step = _step(length, dtype)
    straight = aligned(length, dtype) and aligned(n, dtype)
    if dtype == "fp32" and not tf32:
        # Eight warps: with four, ptxas spills in the loop on sm_80, to hold more of them.
        return Tile(64, 64, 32, warps=8, stages=3)
    if not straight:
        return Tile(64, 64, 32 if dtype != "fp32" else 16, warps=4, stages=2)
    if few or n <= 64:
        return Tile(64, 64, step, warps=4, stages=3)
    if dtype == "fp32":
        return Tile(128, 64, step, warps=8, stages=3)
    if shared_kb(arch) > 200:
        # Two programs a multiprocessor, so that one multiplies while the other is at its GELU: with 128 registers.
        return Tile(128, 128, step, warps=8, stages=3, registers=128)
    return Tile(128, 128, 32, warps=8, stages=4, registers=128)  # 32: mma.m16n8k16 gains nothing from more


@cache
def weight_gradient(dtype: str, c: int, d: int, arch: int) -> Tile:
    """The tile of duᵀ·x̂: m outputs × n channels, k rows a step."""
    wide = 128 if -(-c // 128) * 128 < c * 4 / 3 or -(-c // 64) * 64 == -(-c // 128) * 128 else 64
    straight = aligned(c, dtype) and aligned(d, dtype)
    if dtype == "fp32":
        return Tile(64, 64, 32, warps=4 if straight else 8, stages=3)
    if not straight:
        return Tile(64, 64, 32, warps=4, stages=2)
    if shared_kb(arch) > 200:
        # Four warps: of two groups of four, ptxas lets the tensor cores wait after each instruction.
        return Tile(128, wide, 64, warps=4, stages=3)
    return Tile(128, wide, 32, warps=8, stages=4)


def whole_rows(c: int, arch: int, tf32: bool = False) -> bool:
    """Does one block of the input gradient have all channels of its rows?

    Then it takes their two means itself, with all sums in registers before any is finished: of 128 channels, without
    wgmma, that spills 200 registers. Else the kernel before it adds up what the means are made of.
    """
    return c <= (128 if shared_kb(arch) > 200 and not tf32 else 64)


def widened(tile: Tile, c: int) -> Tile:
    """The same, wide enough for all channels."""
    return replace(tile, n=max(tile.n, 1 << (c - 1).bit_length()))


def few_rows(p: int, n: int, arch: int) -> bool:
    """Are there fewer tiles of 128×128 than multiprocessors?"""
    return -(-p // 128) * -(-n // 128) < multiprocessors(arch)


def normalising(c: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program that only normalises."""
    wide = max(16, 1 << (c - 1).bit_length())
    return max(1, 4096 // wide), wide, max(4, wide // 1024)


@lru_cache(maxsize=4096)
def blocks_per_program(arch: int, row_blocks: int, blocks: int, c: int, n: int) -> int:
    """How many blocks of ``n`` outputs a program of the resident forward kernel computes: all, or fewer of few rows.

    Each program normalises its rows anew, which takes as many instructions as 0.4·C outputs of each row.
    """
    processors = multiprocessors(arch)
    best = None
    counts = {-(-blocks // groups) for groups in range(1, min(blocks, 256) + 1)}
    for count in sorted(counts, reverse=True):
        groups = -(-blocks // count)
        # A multiprocessor with a single program waits for memory about half of the time.
        time = max(2, -(-row_blocks * groups // processors)) * (0.4 * c + n * count)
        if best is None or time < best[0]:
            best = (time, count)
    return best[1]


@lru_cache(maxsize=4096)
def rows_per_part(arch: int, tiles: int, p: int, step: int) -> int:
    """How many rows a program of the weight's gradient sums up, a multiple of ``step``: not all where tiles are few.

    Each part is stored and read again by the kernel that adds them up, which takes as long as about 600 rows.
    """
    processors = multiprocessors(arch)
    best = None
    for parts in [*range(1, 65), *(64 * 2**k for k in range(1, 12))]:
        rows = -(-p // (parts * step)) * step
        programs = tiles * -(-p // rows)
        time = (rows + 600) * (programs if processors == 1 else max(2, -(-programs // processors)))
        if best is None or time < best[0]:
            best = (time, rows)
    return best[1]
