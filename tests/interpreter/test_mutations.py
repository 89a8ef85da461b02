"""The tests are tested: each of these mistakes in the depthwise kernels fails a proof that this lane runs."""

import pytest

from tests import depthwise_proofs as proofs
from tests.cases import KernelCase
from tests.interpreter import test_depthwise_addresses as addresses
from tests.interpreter.mutations import Mistake, running_copies
from tests.interpreter.test_depthwise_uses import test_autocast_rounds_parameters_and_not_their_gradients as autocast
from tests.interpreter_guard import Guard

FILES = [
    "primitives.py", "depthwise/strips.py", "depthwise/kernels.py", "depthwise/kernels_weight.py",
    "depthwise/kernels_strided.py", "depthwise/config.py", "depthwise/launch.py", "depthwise/config_tensor.py",
]  # fmt: skip


def exact(*case, **more):
    return lambda: proofs.prove_exact(KernelCase(*case, **more))


def rounding(*case, **more):
    return lambda: proofs.prove_rounding(KernelCase(*case, **more), 1.0)


def residual(dtype, dx, *case, **more):
    def prove():
        proofs.prove_residual(KernelCase(*case, **more), dtype, dx)
        proofs.prove_residual(KernelCase(*case, **more), dx, dx, "contiguous")

    return prove


def in_autocast(kernel, dtype="bfloat16"):
    def prove():
        with Guard() as guard:
            autocast(getattr(proofs.torch, dtype), kernel, "half", guard)

    return prove


# Each is the least that shows the mistakes it is for; all are what other files of this folder do at length.
PROOFS = {
    "masked": exact("fp32", 1, 3, 5, 6, 3, 5, 2, 1),
    "masked, cut": exact("fp32", 3, 3, 5, 6, 3, 3, 0, 1, cut="4 rows, 2 images"),
    "strips": exact("fp32", 1, 3, 4, 9, 3, 5, 1, 2),
    "strips, cut": exact("bf16", 3, 3, 5, 9, 3, 3, 1, 1, cut="2 rows"),
    "whole": exact("bf16", 1, 3, 3, 7, 7, 7, 3, 3),
    "pairs": exact("bf16", 1, 3, 5, 10, 7, 7, 3, 3, cut="4 rows, 2 images"),
    "pairs, odd": exact("fp16", 1, 3, 3, 10, 7, 7, 3, 3),
    "images": exact("fp32", 3, 3, 2, 3, 3, 3, 1, 1, cut="4 rows, 2 images"),
    "contiguous": exact("fp32", 2, 3, 4, 5, 3, 3, 1, 1, x="contiguous", dy="contiguous"),
    "gradient only": exact("fp32", 2, 3, 4, 5, 3, 3, 1, 1, dy="transposed"),
    "transposed weight": exact("fp32", 1, 3, 3, 4, 3, 3, 1, 1, weight="transposed"),
    "slice of a bias": exact("fp32", 1, 3, 3, 4, 3, 3, 1, 1, bias="slice"),
    "two blocks in strips": exact("fp32", 1, 33, 2, 8, 1, 3, 0, 1),
    "two blocks of channels": exact("fp32", 1, 33, 2, 3, 1, 3, 0, 1),
    "rounding to bf16": rounding("bf16", 1, 32, 4, 8, 3, 3, 1, 1),
    "rounding in fp32": rounding("fp32", 1, 32, 4, 8, 3, 3, 1, 1),
    "residual, masked": residual("fp32", "fp32", "fp32", 2, 3, 5, 6, 3, 3, 0, 1, cut="4 rows, 2 images"),
    "residual, strips": residual("fp32", "fp32", "bf16", 1, 3, 5, 9, 3, 3, 1, 1, cut="2 rows"),
    "residual, pairs": residual("fp32", "fp32", "bf16", 2, 3, 7, 10, 7, 7, 3, 3, cut="4 rows, 2 images"),
    "residual, rounding": lambda: proofs.prove_residual_rounding(
        KernelCase("bf16", 1, 32, 4, 8, 3, 3, 1, 1), "fp32", "bf16"
    ),
    "autocast": in_autocast((3, 3)),
    "dilation": exact("fp32", 1, 3, 5, 13, 3, 3, 1, 2, dilation=(2, 3), cut="2 rows"),
    "dilation, two images": exact("fp32", 2, 3, 3, 4, 3, 3, 2, 2, dilation=(2, 2)),
    "dilation, fewer rows than phases": exact("bf16", 1, 3, 1, 14, 3, 7, 2, 3, dilation=(2, 1)),
    "phases too narrow for strips": exact("fp32", 1, 3, 2, 17, 1, 5, 0, 4, dilation=(1, 2)),
    "dilation in pairs": exact("bf16", 2, 3, 5, 10, 7, 7, 6, 3, dilation=(2, 1), cut="2 rows"),
    "dilation, residual": residual("fp32", "fp32", "bf16", 1, 3, 5, 7, 3, 3, 2, 1, dilation=(2, 1), cut="2 rows"),
    "cached": exact("fp32", 1, 3, 3, 7, 13, 5, 6, 2),
    "cached, masked": exact("fp32", 1, 3, 2, 4, 13, 9, 7, 3),
    "all padding": exact("fp32", 1, 3, 1, 2, 13, 9, 12, 4),
    "strided": exact("fp32", 2, 3, 5, 9, 3, 5, 1, 2, stride=(2, 2)),
    "strided, cut": exact("fp32", 1, 3, 9, 6, 5, 3, 1, 0, stride=(2, 1), cut="2 rows"),
    "two blocks, strided": exact("fp32", 1, 33, 2, 3, 3, 3, 1, 1, stride=(2, 2)),
    "addresses, masked": lambda: addresses.test_forward(addresses.IN_MASKS, "_depthwise_fwd_kernel", True),
    "addresses, strips": lambda: addresses.test_forward(addresses.IN_STRIPS, "_depthwise_fwd_kernel", True),
    "addresses, pairs": lambda: addresses.test_forward(addresses.IN_PAIRS, "_depthwise_fwd_pairs_kernel", True),
    "addresses, weight": lambda: addresses.test_weight_gradient(addresses.IN_MASKS, "_depthwise_bwd_weight_kernel"),
    "addresses, weight in pairs": lambda: addresses.test_weight_gradient(
        addresses.IN_PAIRS, "_depthwise_bwd_weight_pairs_kernel"
    ),
    "addresses, second stage": addresses.test_second_stage,
    "addresses, taps": lambda: addresses.test_table_of_taps(0),
}


STRIPS, KERNELS, WEIGHT, STRIDED, CONFIG, LAUNCH = FILES[1:7]
MISTAKES = [
    # The edges of a map
    Mistake("no mask for columns", STRIPS, "inside = tl.where(keep != 0, keeps[u], 0)", "inside = keep", "masked"),
    Mistake("left edge not multiplied by 0", STRIPS, "left + u * PIXEL), keep_left)",
            "left + u * PIXEL), keep)", "strips"),
    Mistake("right edge not multiplied by 0", STRIPS, "BLOCK_W) * PIXEL), keep_right)",
            "BLOCK_W) * PIXEL), keep)", "strips"),
    Mistake("edges in pairs not multiplied by 0", KERNELS, "keep_left = tl.where(start >= PW, KEEP, 0)",
            "keep_left = tl.where(start >= 0, KEEP, 0)", "pairs, odd"),
    Mistake("edges in pairs for the weight not multiplied by 0", WEIGHT,
            "keep_right = tl.where(start + BLOCK_W + PW <= W, KEEP, 0)",
            "keep_right = tl.where(start >= 0, KEEP, 0)", "pairs, odd"),
    Mistake("stores right of the map", STRIPS, "value, mask=mask & (start + t < OW))", "value, mask=mask)",
            "masked"),
    Mistake("lanes beyond C store", KERNELS, "owned = None if C % BLOCK_C == 0 and EDGE", "owned = None if EDGE",
            "two blocks in strips"),
    Mistake("lanes beyond C load", WEIGHT, "offs_c = channels if C % BLOCK_C == 0 else tl.minimum(channels, C - 1)",
            "offs_c = channels", "two blocks of channels", everywhere=True),
    Mistake("second row below the map counts", KERNELS, "keep = tl.where(there, KEEP, 0).to(tl.uint32)",
            "keep = tl.where(there, KEEP, KEEP).to(tl.uint32)", "pairs, odd"),
    Mistake("second row below the map counts for the weight", WEIGHT,
            "keep = tl.where(there, KEEP, 0).to(tl.uint32)", "keep = tl.where(there, KEEP, KEEP).to(tl.uint32)",
            "pairs, odd"),
    Mistake("incomplete rows above a chunk of pairs stored", KERNELS,
            "second_there = (row - P + 1 >= first_row) &", "second_there = (row - P + 3 >= first_row) &", "pairs"),
    Mistake("dy below the map counts", WEIGHT, "keep = out < OH if GROUPS == 1",
            "keep = out >= 0 if GROUPS == 1", "masked, cut"),
    # Strides and offsets
    Mistake("H and W swapped", LAUNCH, "added, y, h, w, oh, ow, padding[0]", "added, y, w, h, ow, oh, padding[0]",
            "masked"),
    Mistake("paddings swapped", LAUNCH, "padding[0], padding[1], rows, strips, **",
            "padding[1], padding[0], rows, strips, **", "masked"),
    Mistake("strides of the weight swapped", LAUNCH, "weight.stride(2), weight.stride(3)",
            "weight.stride(3), weight.stride(2)", "transposed weight"),
    Mistake("strides of dw swapped", LAUNCH, "dw.stride(2), dw.stride(3)", "dw.stride(3), dw.stride(2)", "masked"),
    Mistake("stride of the bias taken to be 1", LAUNCH, "0 if bias is None else bias.stride(0)", "1",
            "slice of a bias"),
    Mistake("layout of x taken to be right", LAUNCH, "    x = x.contiguous(memory_format=torch.channels_last)\n", "",
            "contiguous", everywhere=True),
    Mistake("layout of dy taken to be right", LAUNCH, "dy = dy.contiguous(memory_format=torch.channels_last)", "pass",
            "gradient only", everywhere=True),
    Mistake("layout of the residual taken to be right", LAUNCH,
            "residual = residual.contiguous(memory_format=torch.channels_last)", "pass", "residual, strips"),
    Mistake("result not copied to its layout", LAUNCH, "out.copy_(y)", "pass", "contiguous"),
    *(Mistake(f"int32 offsets: {proof}", file, ".to(tl.int64)", "", proof, everywhere=True) for file, proof in (
        (KERNELS, "addresses, masked"), (KERNELS, "addresses, strips"), (KERNELS, "addresses, pairs"),
        (KERNELS, "addresses, taps"), (WEIGHT, "addresses, weight"), (WEIGHT, "addresses, weight in pairs"),
        (WEIGHT, "addresses, second stage"),
    )),
    # Taps
    Mistake("a tap forgotten in one column", KERNELS, "if t + j >= FIRST", "if t + j > FIRST", "strips"),
    Mistake("a tap forgotten at the edge of a whole map", KERNELS, "t + j < FIRST + READ:", "t + j < FIRST + READ - 1:",
            "whole"),
    Mistake("a tap forgotten in pairs", KERNELS, "s = fma(xs[t + j], taps[(KH - 1 - a) * KW + j], s)",
            "s = fma(xs[t + j], taps[(KH - 1 - a) * KW + j], s) if j + t > 0 else s", "pairs, odd"),
    Mistake("a column forgotten in the weight's gradient", WEIGHT,
            "                s = fma(window", "                s = s if t == 6 else fma(window", "strips"),
    Mistake("taps not turned around for dx", LAUNCH, "dx, flip=True,", "dx, flip=False,", "masked"),
    Mistake("padding not turned around for dx", LAUNCH, "tuple(d * (k - 1) - p for", "tuple(p for", "masked"),
    Mistake("taps not rounded to x's dtype", KERNELS, "other=0.0).to(DTYPE).to(tl.float32)",
            "other=0.0).to(tl.float32)", "autocast"),
    Mistake("bias not rounded to x's dtype", KERNELS, "bias.to(DTYPE).to(tl.float32)", "bias.to(tl.float32)",
            "autocast"),
    Mistake("bias left out of the second row of pairs", KERNELS, "p2 = repeated(bias + bias, P * BLOCK_W)",
            "p2 = repeated(zero, P * BLOCK_W)", "pairs, odd"),
    Mistake("bias once instead of twice in the second row of later pairs", KERNELS, "0, COLUMNS), both, bias + bias",
            "0, COLUMNS), both, bias", "pairs"),
    # Parts of the work
    Mistake("last rows skipped", LAUNCH, "grid = (columns * -(-high // rows),)", "grid = (columns * (high // rows),)",
            "strips, cut"),
    Mistake("rows above a chunk skipped", KERNELS, "begin = tl.maximum(first_row - PH, 0)", "begin = first_row",
            "strips, cut"),
    Mistake("rows below a chunk skipped", KERNELS, "end = tl.minimum(end_row - PH + KH - 1, H)", "end = end_row",
            "strips, cut"),
    Mistake("rows above a chunk of pairs skipped", KERNELS, "begin = tl.maximum(first_row - (P + 1) // 2 * 2, 0)",
            "begin = tl.maximum(first_row - P // 2 * 2, 0)", "pairs"),
    Mistake("rows of the next chunk stored", KERNELS, "(out >= first_row) & (out < end_row) & (channels < C)",
            "(out >= first_row) & (out < end_row + 1) & (channels < C)", "strips, cut"),
    Mistake("last rows skipped in the weight's gradient", LAUNCH, "parts = strips * choice.phases * -(-high // rows)",
            "parts = strips * choice.phases * (high // rows)", "strips, cut"),
    Mistake("last images skipped", LAUNCH, "* -(-n // images)", "* (n // images)", "images"),
    Mistake("images beyond the last one", WEIGHT, "last_image = tl.minimum(first_image + images, N)",
            "last_image = first_image + images", "images", everywhere=True),
    Mistake("last strip skipped", CONFIG, "return -(-w // (self.block_w * self.dilation[1]))",
            "return max(1, w // (self.block_w * self.dilation[1]))", "strips"),
    Mistake("columns of two strips counted twice", STRIPS, "(column >= first) & (column < OW)", "(column < OW)",
            "strips"),
    Mistake("db counted in every chunk of rows", WEIGHT, "tl.where(begin == 0, values[t], 0.0)", "values[t]",
            "strips, cut"),
    Mistake("db of a row above the chunk in pairs", WEIGHT, "db += both[(P - 1) // 2 * BLOCK_W + t]",
            "db += both[((P - 1) // 2 - 1) * BLOCK_W + t]", "pairs"),
    Mistake("last part not added up", WEIGHT, "(number < count * each)[:, None]",
            "(number < count * each - 1)[:, None]", "strips"),
    Mistake("parts on top of each other", WEIGHT, "part.to(tl.int64) * ((KH * KW + GROUPS) * C)",
            "part.to(tl.int64) // 2 * ((KH * KW + GROUPS) * C)", "strips"),
    # The residual
    Mistake("residual dropped in the last rows", KERNELS, "acc, a * BLOCK_W, residual, inside",
            "acc, a * BLOCK_W, (), inside", "residual, masked"),
    Mistake("residual dropped in the last row of pairs", KERNELS, "y1, 0, r1, inside", "y1, 0, (), inside",
            "residual, pairs"),
    Mistake("residual of a row above", KERNELS, "residual_row += tl.where(complete, y_step, 0)",
            "residual_row += y_step", "residual, strips"),
    Mistake("residual of the last rows of a chunk that is not high", KERNELS,
            "tl.maximum(first_row - (end + PH - (KH - 1)), 0) * row_of_y", "0", "residual, masked"),
    Mistake("residual of the first row twice in pairs", KERNELS, "tl.where(first_there, -x_step, 0)", "0",
            "residual, pairs"),
    Mistake("residual of rows above a program's in pairs", KERNELS,
            "tl.where(row - P + 1 >= first_row, 2 * x_step, 0)", "2 * x_step", "residual, pairs"),
    Mistake("residual in the place of dx", LAUNCH, "added = y if residual is None else residual", "added = y",
            "residual, strips"),
    Mistake("dx rounded before the residual is added", STRIPS, "value += residual[t].to(tl.float32)",
            "value = value.to(row.dtype.element_ty).to(tl.float32) + residual[t].to(tl.float32)", "residual, rounding"),
    # Dilation
    Mistake("phases all of the smaller size", STRIPS, "high = (H - u + DH - 1) // DH", "high = H // DH", "dilation"),
    Mistake("columns of phases all of the larger size", STRIPS, "wide = (W - v + DW - 1) // DW",
            "wide = (W + DW - 1) // DW", "dilation"),
    Mistake("phases of y taken for those of x", STRIPS, "u = (a + (DH - 1) * padding_h) % DH", "u = a", "dilation"),
    Mistake("columns of y taken for those of x", STRIPS, "v = (b + (DW - 1) * padding_w) % DW", "v = b", "dilation"),
    Mistake("padding of a phase rounded down", STRIPS, "top = (padding_h + u - a) // DH", "top = padding_h // DH",
            "dilation"),
    Mistake("rows of a phase step too short", KERNELS, "x_step = all_w * (DH * C)", "x_step = all_w * C", "dilation"),
    Mistake("columns of a phase step too short", WEIGHT, "PIXEL: tl.constexpr = DW * C", "PIXEL: tl.constexpr = C",
            "dilation", everywhere=True),
    Mistake("image of the size of a phase", KERNELS, "n * all_h", "n * H", "dilation, two images"),
    Mistake("rows of a phase that ends above a program", KERNELS, "end = tl.where(first_row < end_row, end, begin)",
            "pass", "dilation, residual", everywhere=True),
    Mistake("phases without rows", WEIGHT, "last_image = tl.where(H > 0, last_image, first_image)", "pass",
            "dilation, fewer rows than phases", everywhere=True),
    Mistake("strips for the narrower phases", CONFIG, "-(-w // (self.block_w * self.dilation[1]))",
            "-(-(w // self.dilation[1]) // self.block_w)", "dilation"),
    Mistake("strips that do not fit the narrower phases", CONFIG, "least, strips = w // dilation,",
            "least, strips = -(-w // dilation),", "phases too narrow for strips"),
    Mistake("phases forgotten in pairs", LAUNCH, "columns = n * strips * choice.phases", "columns = n * strips",
            "dilation in pairs"),
    Mistake("chunks of the whole map in pairs", KERNELS, "chunks = ((H + DH - 1) // DH + rows - 1) // rows",
            "chunks = (H + rows - 1) // rows", "dilation in pairs"),
    Mistake("dilation turned around", LAUNCH, "tuple(d * (k - 1) - p for", "tuple((k - 1) - p for", "dilation"),
    # Taps from the cache, groups of their rows
    Mistake("rows of taps from the cache in the wrong order", KERNELS, "load_rows(taps_ptr, (KH - 1 - a) * KW, KW, C)",
            "load_rows(taps_ptr, a * KW, KW, C)", "cached"),
    Mistake("groups all at the first tap", WEIGHT, "PH = padding_h - group * GROUP", "PH = padding_h",
            "cached, masked"),
    Mistake("groups in strips all at the first tap", WEIGHT, "PH = KH // 2 - group * GROUP", "PH = KH // 2", "cached"),
    Mistake("rows of dy above the map count", WEIGHT, "(out >= 0) & (out < OH)\n            out =",
            "out < OH\n            out =", "cached"),
    Mistake("db of each group counted in full", WEIGHT, "tl.where((group == 0) | (row == 0), values[t], 0.0)",
            "values[t]", "cached"),
    Mistake("db of the first group alone", WEIGHT, "(group == 0) | (row == 0)", "group == 0", "all padding"),
    Mistake("taps beyond the last", WEIGHT, "(group * GROUP + q // KW < KH)", "(group * GROUP + q // KW <= KH)",
            "cached"),
    Mistake("groups not launched", LAUNCH, "(parts * groups * _blocks(c),)", "(parts * _blocks(c),)", "cached"),
    # Strides
    Mistake("rows of x outside of the map", STRIDED, "(number >= 0) & (number < H)", "number < H", "strided"),
    Mistake("columns without their stride", STRIDED, "xs[t * SW + j], taps", "xs[t + j], taps", "strided"),
    Mistake("rows of taps of the other parity", STRIDED, "taps[(m * SH + e) * KW + j]",
            "taps[((m * SH + 1 - e) % KH) * KW + j]", "strided"),
    Mistake("columns of dy on the wrong side", STRIDED, "dys[t + WIDE - 1 - j // SW]", "dys[t + j // SW]", "strided"),
    Mistake("dx right of the map", STRIDED, "inside & (columns[u] != 0)", "inside", "strided"),
    Mistake("dx above the chunk", STRIDED, "(h >= first) & (row >= 0)", "(row >= 0)", "strided, cut"),
    Mistake("lanes beyond C load, strided", STRIDED, "offs_c = tl.minimum(channels, C - 1)", "offs_c = channels",
            "two blocks, strided", everywhere=True),
    Mistake("last groups of dx skipped", LAUNCH, "(s - 1 + p) // d + 1 - p // d", "s // d", "strided"),
    Mistake("last groups of x skipped", LAUNCH, "high = oh + tall - 1", "high = oh", "strided, cut"),
    Mistake("window of dy below the map", STRIDED, "values = load_gradients(dy_image + step * row_of_dy, step < OH,",
            "values = load_gradients(dy_image + step * row_of_dy, step <= OH,", "strided"),
    Mistake("incomplete rows above a chunk stored", STRIDED, "if step - (TALL - 1) >= first_row:",
            "if step >= first_row:", "strided, cut"),
    # Rounding
    Mistake("sums in bf16", "primitives.py", "return a * b + c", "return (a * b + c).to(tl.bfloat16).to(tl.float32)",
            "rounding to bf16"),
    Mistake("products in fp16", "primitives.py", "return a * b + c", "return (a * b).to(tl.float16).to(tl.float32) + c",
            "rounding in fp32"),
    Mistake("stores that truncate", STRIPS, "value.to(row.dtype.element_ty)",
            'value.to(row.dtype.element_ty, fp_downcast_rounding="rtz")', "rounding to bf16"),
    Mistake("second stage that truncates", WEIGHT, "total.to(dw_ptr.dtype.element_ty)",
            'total.to(dw_ptr.dtype.element_ty, fp_downcast_rounding="rtz")', "rounding to bf16"),
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
    with Guard() as guard:
        PROOFS[proof]()
    assert proof.startswith(("addresses", "autocast")) or guard.launches


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistakes_are_caught(mistake, run_copy):
    run_copy(mistake)
    with Guard(), pytest.raises(AssertionError):  # the guard's errors are such; what does not run at all is none
        PROOFS[mistake.proof]()
