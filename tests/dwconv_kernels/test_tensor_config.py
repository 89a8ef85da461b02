"""What config_tensor.py decides: windows that hold all taps, work that is cut up without a rest, kernels that fit."""

import itertools

import pytest

from dwconv_kernels.depthwise import config
from dwconv_kernels.depthwise import config_tensor as tensor
from dwconv_kernels.devices import MULTIPROCESSORS, REGISTERS, shared_kb

SIZES = (1, 3, 5, 7, 9, 11, 13, 15, 17, 21, 27, 31, 41, 51)
KERNELS = list(itertools.product(SIZES, SIZES))
ARCHS = (0, *MULTIPROCESSORS, 121)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_windows_hold_every_tap_of_every_output(r):
    for kh, kw in KERNELS:
        p = tensor.patches(kh, kw, r)
        assert p.R * p.T == 8
        assert p.groups * p.R >= kh + p.R - 1 > (p.groups - 1) * p.R
        assert 2 * p.pairs * p.T >= kw + p.T - 1 > 2 * (p.pairs - 1) * p.T


def shared_memory(choice, fp32: bool) -> int:
    """Bytes, as the kernels allocate it; what is staged at the end of the large kernel takes the place of its ring."""
    if isinstance(choice, tensor.Large):
        return (choice.strips + 1) * choice.chunk * tensor.WARPS * 2 * 16 * 8 * 2
    constants = choice.constants(96)
    steps = 2 * choice.pixels // choice.channels
    tile = steps * choice.block_c * 16 * 8
    return tile * (2 * constants["PAIRS"] * 2 + (4 if fp32 else 2))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_choice_fits(arch):
    for (kh, kw), vectors in itertools.product(KERNELS, (True, False)):
        for choice in tensor.shipped(kh, kw, arch, vectors):
            assert shared_memory(choice, fp32=True) <= 1024 * shared_kb(arch)
            if isinstance(choice, tensor.Stream):
                p, pairs = choice.patches, choice.constants(96)["PAIRS"]
                assert pairs * choice.column_groups >= p.pairs > pairs * (choice.column_groups - 1)
                # Two registers a lane for each table of taps, four for each sum, of each channel of a warp.
                assert choice.channels * 4 * pairs * p.groups * 256 <= REGISTERS
            else:
                assert 4 * choice.patch_rows * choice.strips * 256 < REGISTERS / 2


def sizes_of_maps():
    """Square ones, those of a network, and oblong ones."""
    return [*((size, size) for size in range(1, 81)), *itertools.product((1, 5, 7, 9, 14, 20, 33, 56, 79), repeat=2)]


@pytest.mark.parametrize("kernel", [(7, 7), (9, 9), (13, 13), (17, 17), (31, 31), (51, 51), (51, 5), (5, 51), (1, 51)])
def test_at_most_eight_kernels_are_compiled_whatever_the_maps(kernel):
    """For any set of sizes, with the three small ones: the table of taps, the map in blocks, taps out of sums."""
    found = set()
    for size in sizes_of_maps():
        padding = tuple(k // 2 for k in kernel)
        forward, gradient = (
            [end - first for first, end in tensor.used_taps(kernel, padding, size, size, cuts)]
            for cuts in (tensor.CUTS, tensor.CUTS[:1])
        )
        choices = tensor.pick_forward(*forward, 90), tensor.pick_backward_weight(*gradient)
        found |= {(type(choice), tuple(choice.constants(96).items())) for choice in choices}
    assert len(found) + 3 <= 8


def test_used_taps_are_all_that_meet_an_output():
    for k, size in itertools.product((7, 13, 15, 31, 51), (1, 2, 5, 7, 14, 20, 40)):
        for padding in range(k):
            out = size + 2 * padding - k + 1
            if out < 1:
                continue
            (first, end), (one, _) = tensor.used_taps((k, 5), (padding, 2), (size, 9), (out, 9))
            used = {i for i in range(k) for h in range(out) if 0 <= h + i - padding < size}
            assert used <= set(range(first, end)), (k, size, padding)
            assert 0 <= first < end <= k
            assert end - first in (k, *tensor.CUTS)
            assert padding >= first
            assert one == 0
    assert tensor.used_taps((31, 31), (15, 15), (14, 14), (14, 14)) == [(2, 29), (2, 29)]
    assert tensor.used_taps((31, 31), (15, 15), (7, 7), (7, 7)) == [(9, 22), (9, 22)]
    assert tensor.used_taps((31, 31), (15, 15), (7, 14), (7, 14)) == [(4, 31), (2, 29)]  # one size for both
    assert tensor.used_taps((31, 31), (15, 15), (7, 28), (7, 28)) == [(0, 31), (0, 31)]
    assert tensor.used_taps((51, 5), (25, 2), (7, 7), (7, 7)) == [(19, 32), (0, 5)]


@pytest.mark.parametrize("arch", [0, 80, 90, 120])
def test_rows_are_whole_patches_and_no_program_is_empty(arch):
    for tiles, blocks, oh in itertools.product((1, 3, 56, 896), (1, 6, 96), (1, 5, 7, 14, 56, 333)):
        for r, groups in ((1, 7), (2, 9), (4, 9), (8, 8)):
            rows, several = tensor.cut_stream(arch, tiles, blocks, oh, r, groups)
            assert rows % r == 0
            assert 1 <= several <= tiles
            assert rows < oh + r
            rows, jobs = tensor.cut_weight(arch, tiles, blocks, oh, r, groups)
            assert rows % r == 0
            assert 1 <= jobs <= tiles * -(-oh // rows)


def test_large_batches_fill_the_machine_and_load_taps_seldom():
    rows, several = tensor.cut_stream(90, 56, 6, 56, 1, 7)  # 128 images of ConvNeXt's first stage
    programs = 6 * -(-56 // rows) * -(-56 // several)
    assert 100 <= programs <= 4 * 132
    assert rows >= 14
    work = -(-programs // 132) * several * (rows + 6)  # of the multiprocessor that has most to do, in steps
    assert work <= 1.4 * 6 * 56 * 56 / 132
    rows, jobs = tensor.cut_weight(90, 56, 6, 56, 1, 7)
    assert 66 <= 6 * -(-56 * -(-56 // rows) // jobs) <= 2 * 132
    rows, several = tensor.cut_stream(90, 1, 6, 56, 1, 7)  # one image
    assert several == 1
    assert 6 * -(-56 // rows) > 20


def test_what_tensor_cores_take_is_said():
    assert tensor.why_not("bf16", 31, 31) is None
    assert tensor.why_not("fp16", 51, 1) is None
    assert "x is fp32" in tensor.why_not("fp32", 7, 7)
    assert "53×7" in tensor.why_not("bf16", 53, 7)
    assert "strict" in tensor.why_not("bf16", 7, 7, strict=True)
    at = ((1, 1), (15, 15), (1, 1))
    assert config.why_not("bf16", 31, 31, *at) is None
    reason = config.why_not("fp32", 31, 31, *at)
    assert "the kernel is 31×31, and beyond 17×17" in reason
    assert "tensor cores multiply bfloat16 and float16" in reason
    assert "strict" in config.why_not("bf16", 31, 31, *at, strict=True)
    assert "padding is (31, 15)" in config.why_not("bf16", 31, 31, (1, 1), (31, 15), (1, 1))
    for stride, dilation in (((2, 2), (1, 1)), ((1, 1), (2, 2))):
        reason = config.why_not("bf16", 31, 31, stride, (15, 15), dilation)
        assert reason.startswith(f"stride {stride}, dilation {dilation}; the kernel is 31×31")
    assert "odd" in config.why_not("bf16", 30, 31, *at)
    assert config.why_not("bf16", 53, 53, (1, 1), (26, 26), (1, 1)) == (
        "the kernel is 53×53; the kernels go up to 51×51"
    )


def test_where_tensor_cores_pay():
    pays = tensor.pays
    assert pays(7, 7, 96)
    assert not pays(7, 7, 33)
    assert not pays(5, 5, 96)  # the memory's time is theirs
    assert not pays(1, 31, 96)
    assert pays(13, 13, 33)
    taken = ((1, 1), (1, 1), 96, False)
    assert config.on_tensor_cores("bf16", 7, 7, *taken)
    assert not config.on_tensor_cores("fp32", 7, 7, *taken)
    assert not config.on_tensor_cores("bf16", 7, 7, (2, 2), *taken[1:])
    assert not config.on_tensor_cores("bf16", 7, 7, (1, 1), (2, 1), *taken[2:])
    assert not config.on_tensor_cores("bf16", 7, 7, *taken[:-1], True)
    # What has no other kernels stays, also where the backward pass is called in strict mode.
    assert config.on_tensor_cores("bf16", 31, 31, *taken[:-1], True)
