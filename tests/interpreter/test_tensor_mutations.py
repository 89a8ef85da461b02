"""The tests are tested: each of these mistakes in the kernels for tensor cores fails a proof that this lane runs."""

import pytest

from dwconv_kernels.gluon_emulator import EmulationError
from tests import depthwise_proofs as proofs
from tests.cases import KernelCase
from tests.interpreter.mutations import Mistake, running_copies
from tests.interpreter_guard import Guard

TILES, KERNELS, TABLES = "depthwise/tiles_gluon.py", "depthwise/kernels_gluon.py", "depthwise/kernels_tables.py"
CONFIG, LAUNCH, ABOVE = "depthwise/config_tensor.py", "depthwise/launch_tensor.py", "depthwise/launch.py"
FILES = [
    "primitives.py", TILES, KERNELS, TABLES, CONFIG, LAUNCH, ABOVE, "depthwise/config.py",
    *(f"depthwise/{name}.py" for name in ("strips", "kernels", "kernels_weight", "kernels_strided")),
]  # fmt: skip


def exact(*case, cut="whole", **more):
    return lambda: proofs.prove_exact(KernelCase(*case, cut=f"tensor {cut}", **more))


def residual(*case, cut="whole", **more):
    return lambda: proofs.prove_residual(KernelCase(*case, cut=f"tensor {cut}", **more), "fp32", case[0])


# Each is the least that shows the mistakes it is for.
PROOFS = {
    "stream": exact("bf16", 1, 3, 4, 9, 7, 7, 3, 3),
    "stream, cut": exact("bf16", 3, 3, 11, 9, 7, 7, 3, 3, cut="8 rows"),
    "stream, two tiles": exact("fp16", 12, 3, 3, 17, 7, 7, 2, 3, cut="16 rows, 2 tiles"),
    "stream, all columns": exact("fp16", 1, 3, 3, 20, 5, 17, 2, 8),
    "stream, 2 rows": exact("bf16", 1, 3, 9, 5, 13, 13, 6, 4),
    "two blocks of channels": exact("bf16", 1, 17, 2, 3, 7, 7, 3, 3),
    "large": exact("fp16", 1, 3, 20, 9, 21, 21, 10, 10),
    "large, wide": exact("fp16", 1, 3, 12, 35, 21, 21, 10, 9),
    "large, tall": exact("bf16", 1, 3, 40, 3, 31, 21, 15, 9),
    "large, one row of blocks left": exact("bf16", 1, 3, 24, 12, 21, 21, 10, 10),
    "large, out of reach": exact("bf16", 1, 3, 7, 7, 31, 31, 15, 15),
    "off the middle": exact("bf16", 1, 3, 8, 8, 31, 31, 12, 17),
    "transposed weight": exact("bf16", 1, 3, 3, 4, 7, 7, 3, 3, weight="transposed"),
    "slice of a bias": exact("bf16", 1, 3, 3, 4, 7, 7, 3, 3, bias="slice"),
    "residual": residual("bf16", 2, 3, 9, 9, 7, 7, 3, 3, cut="8 rows"),
    "residual, large": residual("bf16", 1, 3, 12, 12, 21, 21, 10, 10),
    "rounding": lambda: proofs.prove_rounding(KernelCase("bf16", 1, 8, 8, 8, 7, 7, 3, 3, cut="tensor whole"), 1.0),
    "rounding with a residual": lambda: proofs.prove_residual_rounding(
        KernelCase("bf16", 1, 8, 8, 8, 7, 7, 3, 3, cut="tensor whole"), "fp32", "bf16"
    ),
}

MISTAKES = [
    # The edges of a map
    Mistake("left of the map counts", TILES, "(r < end) & (c >= 0) & (c < W)", "(r < end) & (c < W)", "stream"),
    Mistake("right of the map counts", TILES, "(c >= 0) & (c < W)", "(c >= 0)", "stream"),
    Mistake("above the map counts", TILES, "mask = (r >= 0) & (r < end)", "mask = (r < end)", "stream, 2 rows"),
    Mistake("below the map counts", TILES, "mask = (r >= 0) & (r < end)", "mask = (r >= 0) & (r <= end)", "stream"),
    Mistake("columns right of the map stored", TILES, "(column + pixels[1] < W)", "(column + pixels[1] <= W)",
            "stream"),
    Mistake("rows of the next program stored", TILES, "(r >= begin) & (r < end) & (column", "(r >= begin) & (column",
            "stream, cut"),
    Mistake("rows of the program above stored", TILES, "(r >= begin) & (r < end) & (column", "(r < end) & (column",
            "stream, cut"),
    Mistake("channels beyond C used", TILES, "mask = mask & (channel < C)", "mask = mask", "two blocks of channels",
            everywhere=True),
    Mistake("strips beyond the last image", KERNELS, "x_end = gl.where(image < N, H, 0)", "x_end = H + image * 0",
            "stream", everywhere=True),
    Mistake("results beyond the last image", KERNELS, "y_end = gl.where(image < N, end_row, 0)",
            "y_end = end_row + image * 0", "stream", everywhere=True),
    Mistake("blocks right of the map", KERNELS, "block_end = gl.where(image < N, WB, 0)",
            "block_end = gl.where(image < N, WB + 1, 0)", "large"),
    Mistake("blocks left of the map", KERNELS, "there & (block >= -behind)", "there & (block >= -1 - behind)", "large"),
    Mistake("blocks below the map", KERNELS, "there = (row >= 0) & (row < HB)", "there = (row >= 0)", "large, tall"),
    Mistake("pixels of a block outside of the map", TABLES, "(row >= 0) & (row < H) & (column >= 0) & (column < W)",
            "(column >= 0) & (column < W)", "large"),
    # Patches, blocks, taps
    Mistake("a patch row of inputs forgotten", KERNELS, "end = (end_row - first_row + R - 1) // R + GROUPS - 1",
            "end = (end_row - first_row + R - 1) // R + GROUPS - 2", "stream, two tiles"),
    Mistake("rows above a program's skipped", KERNELS, "begin = gl.maximum(padding_h - first_row, 0) // R",
            "begin = gl.maximum(padding_h - 0, 0) // R", "stream, cut"),
    Mistake("sums handed out a step too early", KERNELS, "out_row = first_row + (begin - (GROUPS - 1)) * R",
            "out_row = first_row + (begin - (GROUPS - 2)) * R", "stream"),
    Mistake("a pair of blocks forgotten", KERNELS, "for pair in gl.static_range(PAIRS):\n                    sums",
            "for pair in gl.static_range(1):\n                    sums", "stream, all columns"),
    Mistake("bias only once", KERNELS, "opened = fresh", "opened = (zeros(WARPS),) * J", "stream, cut"),
    Mistake("tap in another row", TABLES, "+ (inner >> log_t) - (n >> log_t)",
            "+ (inner >> log_t)", "stream, 2 rows"),
    Mistake("tap in another column", TABLES, "+ (inner & in_row) - (n & in_row)", "+ (inner & in_row)",
            "stream"),
    Mistake("taps not turned around", TABLES, "j = tl.where(flip != 0, kw - 1 - j, j)", "j = j", "stream"),
    Mistake("taps of other lanes", TABLES, "block = at // groups * 2 + entry // 2 % 2",
            "block = at // groups * 2 + entry % 2", "stream"),
    Mistake("strides of the weight swapped", LAUNCH, "weight.stride(2), weight.stride(3)",
            "weight.stride(3), weight.stride(2)", "transposed weight"),
    Mistake("stride of the bias taken to be 1", LAUNCH, "0 if bias is None else bias.stride(0)", "1",
            "slice of a bias"),
    Mistake("a tap that needs one more output", CONFIG, "max(0, p - (o - 1))", "max(0, p - (o - 1)) + 1",
            "large, out of reach"),
    Mistake("gradients of other taps not zero", LAUNCH, "dw.zero_()", "dw.fill_(1)", "large, out of reach"),
    Mistake("padding not cut with the taps", LAUNCH,
            "tuple(p - first for p, (first, _) in zip(padding, used, strict=True))", "padding", "large, out of reach",
            everywhere=True),
    Mistake("taps for dx cut at the other end", LAUNCH, "kernel[k] - end if flip else first", "first",
            "off the middle"),
    # The large kernel
    Mistake("a pair used before it has arrived", KERNELS, "async_copy.wait_group(0)\n                behind",
            "async_copy.wait_group(1)\n                behind", "large"),
    Mistake("pairs in a ring that is too small", KERNELS, "slot = ring.index(behind % (STRIPS + 1))",
            "slot = ring.index(behind % STRIPS)", "large"),
    Mistake("strips of a group side by side", KERNELS, "return group // 2 * (2 * STRIPS) + group % 2",
            "return group * STRIPS", "large, wide"),
    Mistake("the last strips forgotten", LAUNCH, "columns = -(-ow // (2 * choice.strips * p.T)) * 2",
            "columns = ow // (2 * choice.strips * p.T) * 2", "large, wide"),
    Mistake("chunks below the map skipped too early", KERNELS, "if (top < HB) & (top + CHUNK > 0):",
            "if (top + 1 < HB) & (top + CHUNK > 0):", "large, one row of blocks left"),
    Mistake("a map in blocks that begins elsewhere", LAUNCH, "divmod(padding[1], p.T)", "(padding[1] // p.T, 0)",
            "large, wide"),
    # The weight's gradient
    Mistake("dy of the next program counts", KERNELS, "dy_end = gl.where(image < N, end_row, 0)",
            "dy_end = gl.where(image < N, OH, 0)", "stream, cut"),
    Mistake("a diagonal in another row", TABLES, "row = i + (n >> log_t)", "row = i", "stream, 2 rows"),
    Mistake("columns of another program", TABLES, "factor = tl.where(is_bias, 0, pair // pairs)",
            "factor = tl.where(is_bias, 0, 0 * pair)", "large, tall"),
    Mistake("only the first part added up", LAUNCH, "sums[0] if parts == 1 else sums.sum(0)", "sums[0]",
            "stream, cut"),
    # Parts of the work
    Mistake("the last tile skipped", LAUNCH, "-(-oh // rows) * -(-tiles // several)",
            "-(-oh // rows) * (tiles // several)", "stream, two tiles"),
    Mistake("the last rows skipped", LAUNCH, "blocks * -(-oh // rows) *", "blocks * max(1, oh // rows) *",
            "stream, cut"),
    Mistake("paddings swapped", LAUNCH, "n, h, w, oh, ow, *padding, rows, strips, tiles, several,",
            "n, h, w, oh, ow, *padding[::-1], rows, strips, tiles, several,", "stream, 2 rows"),
    Mistake("H and W swapped", LAUNCH, "n, h, w, oh, ow, *padding, rows, strips, tiles, several,",
            "n, w, h, ow, oh, *padding, rows, strips, tiles, several,", "stream"),
    # Residual, rounding
    Mistake("residual of the next steps", KERNELS, "load_tile(residual_ptr, y_base, out_row, y_end",
            "load_tile(residual_ptr, y_base + R * OW * C, out_row + R, y_end", "residual"),
    Mistake("residual of another strip", KERNELS, "load_tile(residual_ptr, base, row, y_end, column, OW",
            "load_tile(residual_ptr, base + C, row, y_end, column + 1, OW", "residual, large"),
    Mistake("rounded before the residual is added", KERNELS,
            "STAGED: gl.constexpr = gl.float32 if HAS_RESIDUAL else y_ptr.dtype.element_ty\n    program",
            "STAGED: gl.constexpr = y_ptr.dtype.element_ty\n    program", "rounding with a residual"),
    Mistake("taps rounded twice", TABLES, "mask=inside, other=0.0).to(DTYPE)",
            "mask=inside, other=0.0).to(tl.float8e5).to(DTYPE)", "rounding"),
]  # fmt: skip


@pytest.fixture
def run_copy(tmp_path, monkeypatch):
    yield from running_copies("depthwise", FILES, tmp_path, monkeypatch)


def test_every_proof_is_used_and_every_mistake_has_its_own_name():
    assert {mistake.proof for mistake in MISTAKES} == set(PROOFS)
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("proof", PROOFS)
def test_right_kernels_pass(proof, run_copy):
    run_copy(None)
    with Guard():
        PROOFS[proof]()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistakes_are_caught(mistake, run_copy):
    run_copy(mistake)
    with Guard(), pytest.raises((AssertionError, EmulationError)):
        PROOFS[mistake.proof]()
