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
    "depthwise/config.py", "depthwise/launch.py",
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


STRIPS, KERNELS, WEIGHT = FILES[1:4]
CONFIG, LAUNCH = FILES[4:]
MISTAKES = [
    # The edges of a map
    Mistake("no mask for columns", STRIPS, "inside = tl.where(keep != 0, keeps[u], 0)", "inside = keep", "masked"),
    Mistake("left edge not multiplied by 0", STRIPS, "left + u * C), keep_left)", "left + u * C), keep)", "strips"),
    Mistake("right edge not multiplied by 0", STRIPS, "BLOCK_W) * C), keep_right)", "BLOCK_W) * C), keep)", "strips"),
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
    Mistake("dy below the map counts", WEIGHT, "load_gradients(dy_row, out < OH, owns",
            "load_gradients(dy_row, out >= 0, owns", "masked, cut"),
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
    Mistake("padding not turned around for dx", LAUNCH, "tuple(k - 1 - p for", "tuple(p for", "masked"),
    Mistake("taps not rounded to x's dtype", KERNELS, "other=0.0).to(DTYPE).to(tl.float32)",
            "other=0.0).to(tl.float32)", "autocast"),
    Mistake("bias not rounded to x's dtype", KERNELS, "bias.to(DTYPE).to(tl.float32)", "bias.to(tl.float32)",
            "autocast"),
    Mistake("bias left out of the second row of pairs", KERNELS, "p2 = repeated(bias + bias, P * BLOCK_W)",
            "p2 = repeated(zero, P * BLOCK_W)", "pairs, odd"),
    Mistake("bias once instead of twice in the second row of later pairs", KERNELS, "0, COLUMNS), both, bias + bias",
            "0, COLUMNS), both, bias", "pairs"),
    # Parts of the work
    Mistake("last rows skipped", LAUNCH, "grid = (columns * -(-oh // rows),)", "grid = (columns * (oh // rows),)",
            "strips, cut"),
    Mistake("rows above a chunk skipped", KERNELS, "begin = tl.maximum(first_row - PH, 0)", "begin = first_row",
            "strips, cut"),
    Mistake("rows below a chunk skipped", KERNELS, "end = tl.minimum(end_row - PH + KH - 1, H)", "end = end_row",
            "strips, cut"),
    Mistake("rows above a chunk of pairs skipped", KERNELS, "begin = tl.maximum(first_row - (P + 1) // 2 * 2, 0)",
            "begin = tl.maximum(first_row - P // 2 * 2, 0)", "pairs"),
    Mistake("rows of the next chunk stored", KERNELS, "(out >= first_row) & (out < end_row) & (channels < C)",
            "(out >= first_row) & (out < end_row + 1) & (channels < C)", "strips, cut"),
    Mistake("last rows skipped in the weight's gradient", LAUNCH, "parts = strips * -(-h // rows)",
            "parts = strips * (h // rows)", "strips, cut"),
    Mistake("last images skipped", LAUNCH, "* -(-n // images)", "* (n // images)", "images"),
    Mistake("images beyond the last one", WEIGHT, "last_image = tl.minimum(first_image + images, N)",
            "last_image = first_image + images", "images", everywhere=True),
    Mistake("last strip skipped", CONFIG, "return -(-w // self.block_w)", "return max(1, w // self.block_w)", "strips"),
    Mistake("columns of two strips counted twice", STRIPS, "(column >= first) & (column < OW)", "(column < OW)",
            "strips"),
    Mistake("db counted in every chunk of rows", WEIGHT, "tl.where(begin == 0, values[t], 0.0)", "values[t]",
            "strips, cut"),
    Mistake("db of a row above the chunk in pairs", WEIGHT, "db += both[(P - 1) // 2 * BLOCK_W + t]",
            "db += both[((P - 1) // 2 - 1) * BLOCK_W + t]", "pairs"),
    Mistake("last part not added up", WEIGHT, "(first + parts < count)[:, None]",
            "(first + parts < count - 1)[:, None]", "strips"),
    Mistake("parts on top of each other", WEIGHT, "part.to(tl.int64) * ((KH * KW + 1) * C)",
            "part.to(tl.int64) // 2 * ((KH * KW + 1) * C)", "strips"),
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
