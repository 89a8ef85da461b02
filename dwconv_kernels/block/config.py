"""Which kernels run a block's tail, and with which tiles: pure functions of the problem.

No autotuning, and no choice depends on the number of rows, except that few of them take smaller tiles. Registers,
shared memory, waits and predicted times are read from compiled code by ``python -m benchmarks.block_code``.
"""

from __future__ import annotations

from functools import cache

from ..devices import multiprocessors, shared_kb
from ..norm_linear import config as norm_linear
from ..norm_linear.config import Tile, aligned

MAX_FUSED_C = 192  # above, the sums of 128 rows and all their channels leave no registers for the hidden ones
MAX_RESIDENT_C = 96  # both weights, 16·C² bytes, beside the rows in 227 KB
ROWS_PER_BLOCK = 128

why_not = norm_linear.why_not


def whole(c: int) -> int:
    """``c`` channels in one tile."""
    return max(16, 1 << (c - 1).bit_length())


def _fusible(dtype: str, c: int, d: int) -> bool:
    # In fp32, FMA units multiply, and a launch more is nothing beside that.
    return dtype != "fp32" and c <= MAX_FUSED_C and aligned(c, dtype) and aligned(d, dtype)


def _wgmma_sized(arch: int) -> bool:
    """Has a multiprocessor of ``arch`` room for tiles that are made for wgmma?"""
    return shared_kb(arch) > 200


@cache
def fused_forward(dtype: str, c: int, d: int, arch: int, few: bool) -> Tile | None:
    """The kernel of the whole tail: m rows, n hidden channels at a time. None where two kernels are to do it.

    ``few``: of so few rows that most multiprocessors would have none, the two kernels make more programs.
    """
    if not _fusible(dtype, c, d) or few:
        return None
    if c > 128 and arch >= 120:  # with 8 warps and x in fp32, two registers spill in the loop
        return Tile(64, 32, 0, warps=4, stages=2)
    # Blocks of 128 rows: with 64, an H100 would read weights from L2 faster than that delivers, 9.4 TB/s.
    return Tile(ROWS_PER_BLOCK, 64 if c <= 128 else 32, 0, warps=8, stages=2)


def ahead(arch: int) -> bool:
    """Is u of the next hidden channels computed before GELU of these?

    With wgmma, the tensor cores then run under GELU, and a block of hidden channels has one wait. It takes channels in
    one tile: of two products into the same sums, ptxas waits for each instruction. Without wgmma there is nothing to
    wait for, and the second u only costs registers.
    """
    return _wgmma_sized(arch)


@cache
def resident(dtype: str, c: int, d: int, arch: int, rows: int) -> Tile | None:
    """The kernel that keeps both weights in shared memory; None where it does not pay, or there is no room.

    One block of rows takes about as long as loading the weights, so each program should have several.
    """
    if not _fusible(dtype, c, d) or c > MAX_RESIDENT_C or d > 4 * MAX_RESIDENT_C or arch != 90 or d % 64 != 0:
        return None
    if rows < 4 * ROWS_PER_BLOCK * multiprocessors(arch):
        return None
    # Of wider rows than 64, registers spill, but for 96 in blocks of 128 hidden channels: with 64, sums of two blocks
    # are alive at the same time, and where the second tile of channels is not full, its masks are.
    if c > 64 and (c != 96 or d % 128 != 0):
        return None
    return Tile(ROWS_PER_BLOCK, 128 if d % 128 == 0 else 64, 0, warps=8, stages=1)


@cache
def fused_backward(dtype: str, c: int, d: int, arch: int, few: bool) -> Tile | None:
    """The kernel that makes dy, h and du of a block of rows; None where a kernel of hidden channels makes h and du."""
    if not _fusible(dtype, c, d) or few:
        return None
    if _wgmma_sized(arch):
        # Two programs a multiprocessor as long as they fit: one multiplies while the other is at its GELU.
        return Tile(64, 64, 0, warps=4, stages=2) if c <= 128 else Tile(128, 32, 0, warps=8, stages=2)
    # Wider, and with 64 hidden channels, registers spill in the loop.
    return Tile(64, 32, 0, warps=4, stages=2) if c <= 128 else None


@cache
def hidden(dtype: str, c: int, d: int, arch: int, few: bool, given_u: bool, tf32: bool = False) -> Tile:
    """The tile of h and du: m rows × n hidden channels, k channels a step. ``given_u``: one product, not two."""
    one = norm_linear.product(dtype, c, d, arch, few, tf32)
    if given_u:
        return one
    straight = aligned(c, dtype) and aligned(d, dtype)
    if dtype == "fp32" and not tf32:
        return Tile(64, 64, 32, warps=8, stages=2)
    if not straight or few or d <= 64 or dtype == "fp32":
        return Tile(64, 64, min(one.k, 32), warps=4, stages=2)
    if _wgmma_sized(arch):
        return Tile(128, 64, one.k, warps=4, stages=2)
    return Tile(128, 64, 32, warps=8, stages=3)


def few_rows(rows: int, arch: int) -> bool:
    """Are there fewer blocks of rows than half of the multiprocessors?"""
    return 2 * -(-rows // ROWS_PER_BLOCK) < multiprocessors(arch)


def rows_per_part(rows: int, blocks: int, arch: int) -> int:
    """How many rows a program of the gradient's kernel takes, so that four of them are on each multiprocessor."""
    parts = max(1, 4 * multiprocessors(arch) // blocks)
    return -(-rows // (parts * 32)) * 32
