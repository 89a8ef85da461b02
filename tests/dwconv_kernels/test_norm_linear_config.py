"""Which tiles layer norm + linear runs on: properties of config.py over all sizes and devices."""

import itertools

import pytest

from dwconv_kernels import devices
from dwconv_kernels.norm_linear import config
from tests.cases import DTYPES
from tests.norm_linear_cases import ARCHS, OUTPUTS, WIDTHS, NormLinearCase

ARCHITECTURES = (0, 75, *devices.MULTIPROCESSORS, 999)  # the interpreter, known ones, and two that are not
SIZES = sorted({*range(1, 200), *WIDTHS, *OUTPUTS, 1152, 1536, 2047, 2048, 3072, 4096, 12288, 16384})


def powers_of_two(*numbers: int) -> bool:
    return all(n >= 16 and n & (n - 1) == 0 for n in numbers)


def products():
    """Every tile of a product, and what it was chosen for."""
    for dtype, arch, few in itertools.product(DTYPES, ARCHITECTURES, (False, True)):
        for tf32 in {False, dtype == "fp32"}:
            for length, n in itertools.product(SIZES, (1, 8, 33, 64, 65, 96, 130, 384, 1000, 3072)):
                yield dtype, arch, length, n, few, config.product(dtype, length, n, arch, few, tf32)


# Tiles


def test_blocks_of_products_are_powers_of_two():
    for dtype, arch, _, _, _, tile in products():
        assert powers_of_two(tile.m, tile.n, tile.k), (dtype, arch, tile)
        assert tile.warps in (4, 8)


def test_a_step_is_whole_sectors_and_of_tensor_cores_no_longer_than_what_divides_a_row():
    for dtype, _, length, _, _, tile in products():
        assert tile.k * config.ITEMSIZE[dtype] in (32, 64, 128)
        # 128 bytes only of rows that they divide; IEEE fp32, which no tensor core multiplies, takes them always.
        assert length % tile.k == 0 or tile.k * config.ITEMSIZE[dtype] <= 64 or dtype == "fp32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_the_weights_gradient_are_powers_of_two(dtype):
    for c, d, arch in itertools.product(SIZES, OUTPUTS, ARCHITECTURES):
        tile = config.weight_gradient(dtype, c, d, arch)
        assert powers_of_two(tile.m, tile.n, tile.k), (c, d, arch, tile)
        # Blocks of 128 channels only where they compute less than a third more than there is, or no more than 64 would.
        if tile.n == 128:
            assert -(-c // 128) * 128 < c * 4 / 3 or -(-c // 128) * 128 == -(-c // 64) * 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_memory_is_enough_and_registers_are_not_exceeded(dtype):
    """Two programs on a multiprocessor where they are bounded to 128 registers, for they were made for that."""
    size = config.ITEMSIZE[dtype]
    for arch in devices.SHARED_KB:
        limit = devices.shared_kb(arch) * 1024
        tiles = {tile for d, a, *_, tile in products() if (d, a) == (dtype, arch)}
        tiles |= {config.weight_gradient(dtype, c, d, arch) for c in SIZES for d in OUTPUTS}
        for tile in tiles:
            operands = tile.stages * tile.k * (tile.m + tile.n) * size
            assert operands <= limit, (arch, tile)
            sums = tile.m * tile.n // (32 * tile.warps)
            assert sums <= 160, tile  # of 255 registers
            if tile.registers:
                assert sums < tile.registers
                assert 2 * 32 * tile.warps * tile.registers <= devices.REGISTERS
    for c, d, arch in itertools.product(range(1, 300), OUTPUTS, ARCHITECTURES):
        tile = config.resident(dtype, c, d, arch)
        assert (tile is None) == (c > config.MAX_RESIDENT_C["fp32" if dtype == "fp32" else "half"])
        if tile is not None:  # rows, and the weights of two blocks of outputs, on the GPU that has least
            assert powers_of_two(tile.m, tile.n)
            assert sum(config.split(c)) * (tile.m + tile.stages * tile.n) * size <= 99 * 1024, (c, d, tile)


# Rows


def test_a_row_is_split_where_that_wastes_less():
    for c in range(1, config.MAX_C + 1):
        first, second = config.split(c)
        whole = max(16, 1 << (c - 1).bit_length())
        assert powers_of_two(first, second or 16)
        assert c <= first + second <= whole
        if second:
            assert first < c
            assert first + second < whole
            assert first >= second
        elif whole > 32 and c <= whole // 2 + whole // 4:
            pytest.fail(f"{c} channels fit into {whole // 2} and {whole // 4}")


def test_programs_that_normalise_hold_a_whole_row():
    for c in SIZES:
        rows, channels, warps = config.normalising(c)
        assert powers_of_two(channels, rows * 16, warps * 16)
        assert c <= channels < max(17, 2 * c)
        assert rows * channels <= max(4096, channels)
        assert rows * channels // (32 * warps) <= 32  # values in a lane


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parts_of_the_weights_gradient_cover_all_rows(arch):
    for tiles, p, step in itertools.product(
        (1, 3, 12, 288), (1, 5, 31, 32, 33, 127, 4096, 50_176, 1_000_003, 2**30 - 1), (32, 64)
    ):
        rows = config.rows_per_part(arch, tiles, p, step)
        assert rows % step == 0
        parts = -(-p // rows)
        assert (parts - 1) * rows < p <= parts * rows
        assert parts * tiles < 2**31
        assert rows < p + step
        assert arch != 0 or parts == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_programs_of_the_resident_kernel_share_the_outputs(arch):
    for row_blocks, blocks, c in itertools.product((1, 2, 40, 392, 10_000), (1, 2, 6, 12, 100), (1, 96, 192)):
        count = config.blocks_per_program(arch, row_blocks, blocks, c, 64)
        assert 1 <= count <= blocks
        # The last program has something to do, too.
        assert (-(-blocks // count) - 1) * count < blocks


def test_rows_change_nothing_but_whether_they_are_few():
    for dtype, c, d, arch in itertools.product(DTYPES, (40, 96, 255, 768), (33, 384), ARCHS):
        seen = {}
        for p in (1, 2, 64, 127, 128, 129, 5000, 50_176, 10**6, 2**30 - 1):
            case = NormLinearCase(dtype, (p,), c, d, arch=arch)
            few = tuple(config.few_rows(p, n, arch) for n in (c, d))
            seen.setdefault(few, set()).add(tuple(case.tiles().items()))
            assert few == tuple(-(-p // 128) * -(-n // 128) < devices.multiprocessors(arch) for n in (c, d))
        assert all(len(tiles) == 1 for tiles in seen.values())
        assert len(seen) > (arch != 0)


# What is taken


@pytest.mark.parametrize("x, parameters, c, d, reason", [
    ("bf16", "bf16", 1, 1, None), ("fp32", "bf16", 16_384, 65_536, None), ("fp16", "fp16", 96, 384, None),
    ("float64", "float64", 8, 8, "x is float64"), ("bf16", "int8", 8, 8, "the linear layer is int8"),
    ("bf16", "bf16", 16_385, 8, "C=16385, D=8"), ("bf16", "bf16", 8, 0, "C=8, D=0"),
    ("bf16", "bf16", 16_384, 65_537, "C=16384, D=65537"),
])  # fmt: skip
def test_what_is_taken(x, parameters, c, d, reason):
    said = config.why_not(x, parameters, c, d)
    assert said is None if reason is None else said.startswith(reason)
