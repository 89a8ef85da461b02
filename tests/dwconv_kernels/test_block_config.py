"""Which kernels and tiles the block runs on: properties of config.py over all sizes and devices."""

import itertools

import pytest

from dwconv_kernels import devices
from dwconv_kernels.block import config
from dwconv_kernels.norm_linear import config as norm_linear
from tests.cases import DTYPES

ARCHITECTURES = (0, 75, *devices.MULTIPROCESSORS, 999)  # the interpreter, known ones, and two that are not
CHANNELS = sorted(
    {*range(1, 140), 160, 191, 192, 193, 200, 255, 256, 320, 384, 512, 768, 1023, 1024, 1536, 2816, 16384}
)
HALF = ("bf16", "fp16")
MANY = 2**29


def hidden_channels(c: int) -> tuple[int, ...]:
    return 1, 5, 8, 33, 64, 72, 130, 384, 1000, 4 * c, 4 * c + 8


def problems(dtypes=DTYPES, architectures=ARCHITECTURES):
    for dtype, arch, c in itertools.product(dtypes, architectures, CHANNELS):
        for d in hidden_channels(c):
            yield dtype, c, d, arch


def power_of_two(*numbers: int) -> bool:
    return all(n >= 16 and n & (n - 1) == 0 for n in numbers)


# Tiles


def test_tiles_are_powers_of_two():
    """Of at least 16, which is what a product of matrices takes; k only where there is a loop over it."""
    for dtype, c, d, arch in problems():
        at = dtype, c, d, arch
        for few in (False, True):
            for tile in (config.fused_forward(*at, few), config.fused_backward(*at, few)):
                if tile is not None:
                    assert power_of_two(tile.m, tile.n), (at, tile)
                    assert tile.k == 0
                    assert tile.warps in (4, 8)
                    assert tile.stages >= 1
            for given_u, tf32 in itertools.product((False, True), {False, dtype == "fp32"}):
                tile = config.hidden(*at, few, given_u, tf32)
                assert power_of_two(tile.m, tile.n, tile.k), (at, tile)
                assert tile.n >= 32  # each half of it is finished alone
                assert tile.warps in (4, 8)


def test_the_resident_kernel_has_whole_blocks_of_hidden_channels_and_room_for_both_weights():
    met = set()
    for dtype, c, d, arch in problems():
        tile = config.resident(dtype, c, d, arch, MANY)
        if tile is None:
            continue
        assert power_of_two(tile.m, tile.n)
        assert d % tile.n == 0
        assert tile.stages == 1  # what is loaded once needs none
        weights = 2 * sum(norm_linear.split(c)) * d * 2
        assert weights + tile.m * sum(norm_linear.split(c)) * 2 <= devices.shared_kb(arch) * 1024, (c, d)
        met.add((dtype, arch))
    assert met == {(dtype, 90) for dtype in HALF}


def test_operands_of_a_step_fit_into_shared_memory():
    """Of products alone; what else the compiler keeps there is read from compiled code."""
    for dtype, c, d, arch in problems(architectures=devices.SHARED_KB):
        limit, size = devices.shared_kb(arch) * 1024, norm_linear.ITEMSIZE[dtype]
        for few, given_u in itertools.product((False, True), repeat=2):
            tile = config.hidden(dtype, c, d, arch, few, given_u)
            products = 1 if given_u else 2
            assert products * tile.stages * tile.k * (tile.m + tile.n) * size <= limit, (dtype, c, d, arch, tile)
        backward = config.fused_backward(dtype, c, d, arch, False)
        if backward is not None:  # rows of x̂∘γ+β and of d, and two weights a stage
            wide = sum(norm_linear.split(c))
            assert 2 * wide * (backward.m + backward.stages * backward.n) * size <= limit, (dtype, c, d, arch)
        forward = config.fused_forward(dtype, c, d, arch, False)
        if forward is not None:
            wide = config.whole(c) if config.ahead(arch) else sum(norm_linear.split(c))
            assert wide * (forward.m + 2 * forward.stages * forward.n) * size <= limit, (dtype, c, d, arch)


def test_sums_leave_registers_for_what_is_made_of_them():
    """Of 255 in a lane: sums of the channels and of a block of hidden ones, in fp32."""
    for dtype, c, d, arch in problems(HALF):
        channels = sum(norm_linear.split(c))
        for tile, blocks in (
            (config.fused_forward(dtype, c, d, arch, False), 1 + config.ahead(arch)),
            (config.resident(dtype, c, d, arch, MANY), 1),
            (config.fused_backward(dtype, c, d, arch, False), 2),
        ):
            if tile is not None:
                assert tile.m * (channels + blocks * tile.n) // (32 * tile.warps) <= 192, (c, d, arch, tile)


def test_channels_in_one_tile():
    for c in range(1, 2000):
        whole = config.whole(c)
        assert power_of_two(whole)
        assert c <= whole < max(17, 2 * c)


# Which kernels


def test_the_whole_tail_in_one_kernel_is_for_narrow_rows_of_half_types():
    for dtype, c, d, arch in problems():
        taken = dtype in HALF and c <= 192 and c % 8 == d % 8 == 0
        assert (config.fused_forward(dtype, c, d, arch, False) is not None) == taken, (dtype, c, d, arch)
        backward = config.fused_backward(dtype, c, d, arch, False)
        assert backward is None or taken
        if taken and devices.shared_kb(arch) > 200:
            assert backward is not None
        for few in (config.fused_forward(dtype, c, d, arch, True), config.fused_backward(dtype, c, d, arch, True)):
            assert few is None


def test_weights_are_resident_only_where_each_program_has_several_blocks_of_rows():
    for c, d in ((96, 384), (64, 256), (8, 64)):
        for rows in (1, 128, 50_000, 67_583):
            assert config.resident("bf16", c, d, 90, rows) is None
        for rows in (67_584, 10**6, 2**30 - 1):
            assert config.resident("bf16", c, d, 90, rows) is not None
    for dtype, c, d, arch in (
        ("fp32", 96, 384, 90), ("bf16", 96, 384, 80), ("bf16", 96, 384, 0), ("bf16", 104, 384, 90),
        ("bf16", 96, 392, 90), ("bf16", 96, 96, 90), ("bf16", 95, 384, 90), ("bf16", 96, 384, 100),
    ):  # fmt: skip
        assert config.resident(dtype, c, d, arch, MANY) is None, (dtype, c, d, arch)


def test_rows_change_nothing_else():
    for arch in ARCHITECTURES:
        multiprocessors = devices.multiprocessors(arch)
        for rows in (1, 127, 128, 129, 5000, 50_176, 10**6, 2**30 - 1):
            assert config.few_rows(rows, arch) == (2 * -(-rows // 128) < multiprocessors)
        assert not config.few_rows(2**30 - 1, arch)
        assert config.few_rows(1, arch) == (arch != 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parts_of_the_gradients_rows_cover_all(arch):
    for rows, blocks in itertools.product((1, 31, 32, 33, 147, 50_176, 10**6 + 3, 2**30 - 1), (1, 6, 128)):
        part = config.rows_per_part(rows, blocks, arch)
        assert part % 32 == 0
        parts = -(-rows // part)
        assert (parts - 1) * part < rows <= parts * part
        assert parts * blocks <= max(blocks, 4 * devices.multiprocessors(arch))
        assert rows + part < 2**31  # the last part's end, in 32 bits


def test_unknown_architectures_take_the_tiles_that_fit_everywhere():
    for dtype, c in itertools.product(DTYPES, (40, 96, 192, 384)):
        for few in (False, True):
            at = dtype, c, 4 * c
            for choose in (config.fused_forward, config.fused_backward):
                assert choose(*at, 999, few) == choose(*at, 120, few)
                assert choose(*at, 75, few) == choose(*at, 89, few)
        assert config.resident(*at, 999, MANY) is None
    assert not config.ahead(999)


# What is taken


@pytest.mark.parametrize("x, computed, c, d, reason", [
    ("bf16", "bf16", 1, 1, None), ("fp32", "bf16", 16_384, 65_536, None), ("fp16", "fp16", 96, 384, None),
    ("float64", "float64", 8, 8, "x is float64"), ("bf16", "int8", 8, 8, "the linear layer is int8"),
    ("bf16", "bf16", 16_385, 8, "C=16385, D=8"), ("bf16", "bf16", 8, 0, "C=8, D=0"),
    ("bf16", "bf16", 16_384, 65_537, "C=16384, D=65537"),
])  # fmt: skip
def test_what_is_taken(x, computed, c, d, reason):
    said = config.why_not(x, computed, c, d)
    assert said is None if reason is None else said.startswith(reason)
