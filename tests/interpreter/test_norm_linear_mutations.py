"""The tests are tested: each of these mistakes in layer norm + linear fails a proof that this lane runs."""

import pytest

from dwconv_kernels import runtime
from tests import norm_linear_proofs as proofs
from tests.interpreter import test_norm_linear_addresses as addresses
from tests.interpreter import test_norm_linear_kernels as kernels
from tests.interpreter.mutations import Mistake, running_copies
from tests.interpreter_guard import Guard
from tests.norm_linear_cases import NormLinearCase

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

TILES, FORWARD, BACKWARD, CONFIG, LAUNCH = FILES = [
    "norm_linear/tiles.py", "norm_linear/kernels.py", "norm_linear/kernels_backward.py", "norm_linear/config.py",
    "norm_linear/launch.py",
]  # fmt: skip


def exact(*case, **more):
    return lambda: proofs.prove_exact(NormLinearCase(*case, **more))


def rounding(*case, far=False, **more):
    return lambda: proofs.prove_rounding(NormLinearCase(*case, **more), far=far)


# Each is the least that shows the mistakes it is for; all are what other files of this folder do at length.
PROOFS = {
    "resident": exact("fp32", (5,), 64, 40, mean=1.0),
    "odd": exact("fp32", (5,), 17, 40, "gelu", mean=1.0),
    "split": exact("bf16", (5,), 96, 70, "gelu", mean=10.0, arch=90),
    "split, odd": exact("fp16", (5,), 67, 5, mean=1.0),
    "of which one over C is not exact": exact("fp32", (5,), 97, 5),
    "wide": exact("bf16", (5,), 264, 72, "gelu", arch=90),
    "wide, odd": exact("fp32", (5,), 255, 33, mean=1.0),
    "many rows": exact("fp32", (131,), 40, 5, arch=90),
    "rows in many parts": exact("fp32", (129,), 16, 5, "gelu"),
    "slice": exact("fp32", (5,), 16, 5, x="slice"),
    "one row in many places": exact("fp32", (70,), 16, 5, x="expanded", dy="expanded"),
    "channels first": exact("fp32", (3, 2), 16, 5, x="channels_first", dy="channels_first"),
    "transposed parameters": exact("fp32", (5,), 16, 5, parameters="transposed"),
    "without parameters": exact("fp32", (5,), 16, 5, given=(False, False, False)),
    # 257 equal rows: sums that bf16 has not.
    "autocast": exact("bf16", (257,), 64, 5, x_dtype="fp32", x="expanded", dy="expanded"),
    "rounding in fp32": rounding("fp32", (40,), 96, 33, "gelu"),
    "rounding of wide rows": rounding("fp32", (40,), 136, 33, "gelu", arch=90),
    "rounding to bf16": rounding("bf16", (40,), 96, 33),
    "rounding, odd": rounding("fp32", (40,), 33, 33, mean=10.0),
    "far": rounding("fp32", (40,), 67, 33, mean=1000.0, far=True),
    "constant rows": lambda: kernels.test_constant_rows(97, "fp32"),
    "what is beside a row": lambda: kernels.test_what_is_beside_a_row_is_none_of_it(3, (False,) * 3, "fp16"),
    "huge rows": lambda: kernels.test_huge_rows(1e30, 40),
    **{f"addresses: {what}": check for what, check in addresses.CHECKS.items()},
}

MISTAKES = [
    # Statistics
    Mistake("padding counts in the variance", TILES, "d0 = tl.where(mask0[None, :], x0 - mean[:, None], 0.0)",
            "d0 = x0 - mean[:, None]", "odd"),
    Mistake("padding of the second tile counts in the variance", TILES,
            "d1 = tl.where(mask1[None, :], x1 - mean[:, None], 0.0)", "d1 = x1 - mean[:, None]", "split, odd"),
    Mistake("mean not corrected", TILES, "return mean + correction,", "return mean,", "constant rows"),
    Mistake("root not corrected, as far off as a GPU's", TILES, "return mean + correction, rstd + 0.5 * rstd * error",
            "return mean + correction, rstd * (1 + 2**-22)", "of which one over C is not exact"),
    Mistake("variance in one pass", TILES, "squares = tl.sum(times(d0, d0), 1)",
            "squares = tl.sum(x0 * x0, 1) - tl.sum(x0, 1) * mean", "far"),
    Mistake("second tile forgotten in the sum", TILES, "        total += tl.sum(x1 * 2**-14, 1)\n", "        pass\n",
            "far"),
    Mistake("second tile forgotten in the squares", TILES,
            "        squares += tl.sum(times(d1, d1), 1)\n", "", "split"),
    Mistake("infinite variance made NaN", TILES, 'variance = tl.where(squares == float("inf"), squares, variance)',
            "variance = variance", "huge rows"),
    Mistake("variance of C − 1", TILES, "propagate_nan=tl.PropagateNan.ALL) * (1 / C)",
            "propagate_nan=tl.PropagateNan.ALL) * (1 / (C - 1))", "resident"),
    Mistake("no ε", TILES, "    variance += eps\n", "", "constant rows"),
    Mistake("beside a row is what it becomes", TILES, "        xhat = tl.where(mask[None, :], xhat, 0.0)\n",
            "        pass\n", "what is beside a row"),
    # Products
    Mistake("second tile forgotten in the product", FORWARD,
            "if C1:\n            weight = _weights(", "if C1 < 0:\n            weight = _weights(", "split"),
    Mistake("second tile of γ from the first one", FORWARD, "norm_weight = _vector(norm_weight_ptr, c1, C,",
            "norm_weight = _vector(norm_weight_ptr, c1 - C0, C,", "split"),
    Mistake("last block of outputs skipped", FORWARD, "tl.minimum(first + tiles, blocks)",
            "tl.minimum(first + tiles, blocks - 1)", "resident"),
    Mistake("blocks of outputs beyond a group", FORWARD, "groups = (blocks + tiles - 1) // tiles", "groups = 1",
            "many rows, many outputs"),
    Mistake("products beside the last step", TILES, "sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n    a_ptrs",
            "sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n    length = length // BLOCK_K * BLOCK_K\n    a_ptrs",
            "wide, odd"),
    Mistake("no mask for the last step", TILES, "inside = start + q < end", "inside = start + q < end + BLOCK_K",
            "wide, odd"),
    Mistake("columns beside the last one", FORWARD, "c1 = C0 + tl.arange(0, C1)\n        mask1 = c1 < C",
            "c1 = C0 + tl.arange(0, C1)\n        mask1 = c1 < C + C1", "split, odd"),
    Mistake("bias twice", FORWARD, "+ bias.to(dtype).to(tl.float32)[None, :]",
            "+ 2 * bias.to(dtype).to(tl.float32)[None, :]", "resident"),
    Mistake("bias twice in wide rows", FORWARD, "u += _vector(bias_ptr,", "u += 2.0 * _vector(bias_ptr,", "wide, odd"),
    Mistake("bias forgotten when u is computed again", BACKWARD, "gelu_derivative(product + bias[None, :], dtype)",
            "gelu_derivative(product + 0.0 * bias[None, :], dtype)", "split"),
    Mistake("β forgotten when u is computed again", LAUNCH, "parameters = self.norm_weight, self.norm_bias\n",
            "parameters = self.norm_weight, None\n", "rounding in fp32"),
    Mistake("β forgotten in wide rows", LAUNCH, "norm_bias, mean, rstd, eps, normed, None)",
            "None, mean, rstd, eps, normed, None)", "wide, odd"),
    # The input's gradient
    Mistake("γ forgotten in g", BACKWARD, "g = times(dnormed, _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0,",
            "g = times(dnormed, _vector(norm_weight_ptr, c, C, False, 1.0,", "resident"),
    Mistake("γ forgotten in half of g", BACKWARD, "g *= _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0,",
            "g *= _vector(norm_weight_ptr, c, C, False, 1.0,", "wide"),
    Mistake("γ forgotten in the sums", BACKWARD, "s += weight * _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT, 1.0,",
            "s += weight * _vector(norm_weight_ptr, c, C, False, 1.0,", "wide"),
    Mistake("β forgotten in the sums", BACKWARD, "t += weight * _vector(", "t += 0.0 * weight * _vector(", "wide"),
    Mistake("last block of the sums' vectors skipped", LAUNCH,
            'kernels._norm_linear_vectors_kernel[(-(-self.d // _VECTORS["BLOCK_D"]),)]',
            'kernels._norm_linear_vectors_kernel[(max(1, self.d // _VECTORS["BLOCK_D"]),)]', "wide"),
    Mistake("sums swapped", BACKWARD,
            "tl.sum(times(du, s[None, :]), 1), tl.sum(times(du, product - t[None, :]), 1)",
            "tl.sum(times(du, product - t[None, :]), 1), tl.sum(times(du, s[None, :]), 1)", "wide, odd"),
    Mistake("sums of half of a block", BACKWARD, "tl.store(sums_ptr + p, sum_g + more_g, mask=mask_p)",
            "tl.store(sums_ptr + p, sum_g, mask=mask_p)", "wide"),
    Mistake("sums of the first block only", BACKWARD, "for _ in range(sum_blocks):", "for _ in range(1):", "wide"),
    Mistake("bias among the sums", BACKWARD, "product - t[None, :]", "product - t[None, :] + 1", "wide, odd"),
    Mistake("mean of g forgotten", BACKWARD, "(g - (sum_g * (1 / C))[:, None] - ", "(g - ", "resident"),
    Mistake("x̂ forgotten in dx", BACKWARD, " - xhat * (sum_gx * (1 / C))[:, None])", ")", "resident"),
    Mistake("1/√(variance) forgotten in dx", BACKWARD, "dx = rstd[:, None] * (", "dx = (", "resident"),
    Mistake("right half of dx is the left one", BACKWARD, "g = left if half == 0 else right", "g = left", "wide"),
    Mistake("last channels of dx skipped", LAUNCH, "-(-rows.p // tile.m) * -(-rows.c // tile.n),)",
            "-(-rows.p // tile.m) * max(1, rows.c // tile.n),)", "wide, odd"),
    # Gradients of parameters
    Mistake("β forgotten in dW", BACKWARD, "dw += db[:, None] * _vector(", "dw += 0.0 * db[:, None] * _vector(",
            "resident"),
    Mistake("γ forgotten in dW", BACKWARD, "dw = g * _vector(norm_weight_ptr, c, C, HAS_NORM_WEIGHT,",
            "dw = g * _vector(norm_weight_ptr, c, C, False,", "resident"),
    Mistake("rows beside the last one count in db", BACKWARD, "du = _tile(dy_ptr, p * D, k, mask_p, mask_k)",
            "du = _tile(dy_ptr, p * D, k, mask_p | True, mask_k)", "resident"),
    Mistake("last rows skipped in G", BACKWARD, "length = tl.minimum(rows, P - part * rows)",
            "length = tl.minimum(rows, P - part * rows) // BLOCK_P * BLOCK_P", "many rows"),
    Mistake("rows of the next part in G", BACKWARD, "length = tl.minimum(rows, P - part * rows)",
            "length = P - part * rows", "many rows"),
    Mistake("last part not added up", BACKWARD, "(start + ahead < parts)", "(start + ahead < parts - 1)",
            "resident"),
    Mistake("last block of rows not added up", BACKWARD, "(start + part < parts)[:, None]",
            "(start + part < parts - 1)[:, None]", "many rows"),
    Mistake("dγ and dβ swapped", BACKWARD, "_sum_of_parts(norm_parts_ptr + C, 2 * C,",
            "_sum_of_parts(norm_parts_ptr, 2 * C,", "resident"),
    Mistake("du not multiplied with gelu'", BACKWARD,
            "du = times(du, gelu_derivative(product + bias[None, :], dtype))",
            "du *= 1.0 + 0.0 * bias[None, :]", "split"),
    # Layouts
    Mistake("rows taken to have no gaps", LAUNCH, '"DENSE": self.stride == self.c', '"DENSE": True', "slice"),
    Mistake("one row taken for many", LAUNCH, "c if p == 1 or", "c if p > 1 or", "slice"),
    Mistake("channels taken to be side by side", LAUNCH, "if (c > 1 and x.stride(1) != 1) or", "if", "channels first"),
    Mistake("W taken to have no gaps", LAUNCH, "matrix = matrix.to(dtype).contiguous()", "matrix = matrix.to(dtype)",
            "transposed parameters"),
    Mistake("γ and β taken to have no gaps", LAUNCH, "like if parameter is None else parameter.contiguous()",
            "like if parameter is None else parameter", "transposed parameters"),
    Mistake("no γ taken for zeros", BACKWARD, "HAS_NORM_WEIGHT, 1.0,", "HAS_NORM_WEIGHT, 0.0,", "without parameters",
            everywhere=True),
    # Rounding
    Mistake("products added up in bf16", TILES, "sums = tl.dot(a, b, sums, input_precision=PRECISION)",
            "sums = tl.dot(a, b, sums, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)", "rounding to bf16"),
    Mistake("y rounded before the second tile", FORWARD,
            "u = tl.dot(normed0, weight, u, input_precision=PRECISION)",
            "u = tl.dot(normed0, weight, u, input_precision=PRECISION).to(dtype).to(tl.float32)", "rounding to bf16"),
    Mistake("x̂ rounded before γ and β", TILES, "xhat = (x - mean[:, None]) * rstd[:, None]",
            "xhat = ((x - mean[:, None]) * rstd[:, None]).to(tl.bfloat16).to(tl.float32)", "rounding, odd"),
    Mistake("y truncated", FORWARD, "u.to(dtype), mask",
            'u.to(dtype, fp_downcast_rounding="rtz"), mask', "rounding to bf16",
            everywhere=True),
    Mistake("dx truncated", BACKWARD, "dx.to(dx_ptr.dtype.element_ty)",
            'dx.to(dx_ptr.dtype.element_ty, fp_downcast_rounding="rtz")', "rounding to bf16"),
    Mistake("gradients of parameters rounded to what is computed in", BACKWARD, "tl.store(dw_ptr + offs, dw.to(",
            "tl.store(dw_ptr + offs, dw.to(weight_ptr.dtype.element_ty).to(", "autocast"),
    Mistake("db rounded to what is computed in", BACKWARD, "tl.store(db_ptr + k, db.to(",
            "tl.store(db_ptr + k, db.to(weight_ptr.dtype.element_ty).to(", "autocast"),
    Mistake("x rounded to what is computed in", LAUNCH, "rows, weight = as_rows(x), dense(weight, dtype)",
            "rows, weight = as_rows(x.to(dtype).to(x.dtype)), dense(weight, dtype)", "rounding in autocast"),
    # Offsets
    *(Mistake(f"int32 offsets: {what}", file, ".to(tl.int64)", "", f"addresses: {what}", everywhere=True)
      for what, file in addresses.FILES.items()),
]  # fmt: skip
PROOFS |= {
    "many rows, many outputs": exact("fp32", (70,), 16, 100, arch=90),
    "rounding in autocast": rounding("bf16", (40,), 96, 33, x_dtype="fp32", mean=100.0),
}


@pytest.fixture
def run_copy(tmp_path, monkeypatch):
    primitives = ["primitives.py"]
    yield from running_copies("norm_linear", primitives + FILES, tmp_path, monkeypatch)


def test_every_proof_is_used_and_every_mistake_has_its_own_name():
    assert {mistake.proof for mistake in MISTAKES} <= set(PROOFS)
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    assert runtime.has_kernels("norm_linear")


@pytest.mark.parametrize("proof", PROOFS)
def test_right_kernels_pass(proof, run_copy):
    run_copy(None)
    with Guard() as guard:
        PROOFS[proof]()
    assert proof.startswith("addresses") or guard.launches


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistakes_are_caught(mistake, run_copy):
    run_copy(mistake)
    with Guard(), pytest.raises(AssertionError):  # the guard's errors are such; what does not run at all is none
        PROOFS[mistake.proof]()
