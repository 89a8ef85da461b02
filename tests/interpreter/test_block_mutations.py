"""The tests are tested: each of these mistakes in the block's kernels fails a proof that this lane runs."""

from pathlib import Path

import pytest
import torch

import dwconv_kernels
from dwconv_kernels import runtime
from tests import block_proofs as proofs
from tests.block_cases import BlockCase
from tests.interpreter import test_block_addresses as addresses
from tests.interpreter import test_block_kernels as kernels
from tests.interpreter.mutations import Mistake, running_copies
from tests.interpreter_guard import Guard

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

TILES, FORWARD, BACKWARD, GRN, LAUNCH, LAUNCH_COMMON, LAUNCH_BACKWARD, CONFIG = OWN = [
    f"block/{name}.py"
    for name in (
        "tiles", "kernels", "kernels_backward", "kernels_grn", "launch", "launch_common", "launch_backward", "config",
    )
]  # fmt: skip
PACKAGE = Path(dwconv_kernels.__file__).parent
# The block stands on the other families, whose launchers are called from its own.
FILES = [
    "primitives.py",
    *(str(path.relative_to(PACKAGE)) for family in ("depthwise", "norm_linear", "block")
      for path in sorted((PACKAGE / family).glob("*.py")) if path.name not in ("op.py", "__init__.py")),
]  # fmt: skip

FUSED = BlockCase("bf16", 3, 40, 2, 3, 72, 1, 1, row_scale=True, arch=90, few=False)


def exact(case=FUSED, **changes):
    return lambda: proofs.prove_exact(case._replace(**changes))


def rounding(case=FUSED, **changes):
    return lambda: proofs.prove_rounding(case._replace(**changes))


def image_without_finite_weights():
    kernels.test_a_branch_that_would_be_infinite_is_dropped(FUSED._replace(resident=True, d=64))


def second_backward_pass():
    """What was kept is what it was."""
    case = FUSED._replace(memory="fast", grn=True, layer_scale=False, dtype="fp32", c=5, d=7)
    tensors, _ = proofs.normal_operands(case)
    leaves = [t if t is None or i == proofs.ROW_SCALE else t.detach().requires_grad_() for i, t in enumerate(tensors)]
    with dwconv_kernels.backend("triton"), proofs.chosen(case):
        out = dwconv_kernels.convnext_block(*leaves, memory="fast")
        first, again = (torch.autograd.grad(out.sum(), leaves[5], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


# Each is the least that shows the mistakes it is for; all are what other files of this folder do at length.
PROOFS = {
    "fused": exact(),
    "fused, not ahead": exact(arch=80),
    "fused, 2 blocks of rows": exact(n=2, h=1, w=72, c=16, d=24, offset=8),
    "without parameters": exact(norm=(False, False), biases=(False, True, False), layer_scale=False, row_scale=False),
    "a dropped block": exact(n=1, offset=7),
    "many rows": exact(h=1, w=49, c=16, d=8, arch=0, few=True),
    "resident": exact(d=192, h=1, w=49, resident=True),
    "two kernels": exact(few=True),
    "fp16": exact(dtype="fp16"),
    "fp16, hidden": exact(dtype="fp16", few=True),
    "wide": exact(c=136, d=70, arch=80, few=True),
    "u kept": exact(c=72, d=70, arch=80, memory="fast"),
    "norm over an image": exact(grn=True),
    "norm over large images": exact(grn=True, h=1, w=36, n=2, c=16, d=40),
    "norm over an image, wide": exact(grn=True, c=136, d=35, arch=80),
    "norm over an image, fp16": exact(grn=True, dtype="fp16"),
    "norm over an image, rounding": rounding(dtype="fp32", grn=True, c=17, d=35),
    "rounding": rounding(dtype="fp32", c=17, d=35, few=True),
    "rounding to bf16": rounding(h=4, w=5, d=40),
    "lean": exact(memory="lean"),
    "rounding in autocast": rounding(x_dtype="fp32"),
    "contiguous": exact(x="contiguous", dout="contiguous"),
    "slices": exact(x="channels_last_slice", dout="contiguous_slice", parameters="transposed"),
    "infinite": image_without_finite_weights,
    "second backward pass": second_backward_pass,
    **{f"addresses: {what}": check for what, check in addresses.CHECKS.items()},
}

MISTAKES = [
    # Rows, and the end of the branch
    Mistake("β forgotten", TILES, "return xhat * norm_weight[None, :] + norm_bias[None, :]",
            "return xhat * norm_weight[None, :]", "fused"),
    Mistake("no γ taken for zeros", TILES, "C, HAS_NORM_WEIGHT, 1.0, WHOLE)", "C, HAS_NORM_WEIGHT, 0.0, WHOLE)",
            "without parameters"),
    Mistake("second tile of γ from the first one", TILES, "normed1 = _affine(xhat, c1,",
            "normed1 = _affine(xhat, c1 - K0,", "fused, not ahead"),
    Mistake("statistics not stored beyond a tile", TILES, "tl.store(rstd_ptr + p, rstd, mask=mask_p)",
            "tl.store(rstd_ptr + p, rstd, mask=mask_p & (p < 8))", "fused"),
    Mistake("bias of the first layer forgotten", TILES, "tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + bias[None, :]",
            "tl.zeros((BLOCK_P, BLOCK_D), tl.float32) + 0.0 * bias[None, :]", "fused"),
    Mistake("second tile forgotten in u", TILES,
            "    if K1:\n        c1 = K0 + tl.arange(0, K1)\n        u = tl.dot(",
            "    if K1:\n        c1 = K0 + tl.arange(0, K1)\n        tl.dot(", "fused, not ahead"),
    Mistake("ρ of the row, not of its image", TILES, "row_scale_ptr + (row + p) // pixels",
            "row_scale_ptr + (row + p) % 3", "fused"),
    Mistake("ρ of the block's rows", TILES, "row_scale_ptr + (row + p) // pixels", "row_scale_ptr + p // pixels",
            "fused, 2 blocks of rows"),
    Mistake("bias of the second layer forgotten", TILES, "    branch += _vector(fc2_bias_ptr,",
            "    branch += 0.0 * _vector(fc2_bias_ptr,", "two kernels"),
    Mistake("λ forgotten", TILES, "branch *= _vector(layer_scale_ptr, c, C, True, 1.0, WHOLE)[None, :]", "pass",
            "two kernels"),
    Mistake("ρ forgotten", TILES, "0.0, branch * factors[:, None])", "0.0, branch)", "two kernels"),
    Mistake("0·∞", TILES, "tl.where(factors[:, None] == 0.0, 0.0, branch * factors[:, None])",
            "branch * factors[:, None]", "infinite"),
    Mistake("residual forgotten", TILES, "out = _tile(x_ptr, p * C, c, mask_p, c < C) + branch", "out = branch",
            "two kernels"),
    Mistake("rows stored beside the last one", TILES,
            "mask = mask_p[:, None] & (c < C)[None, :]\n    tl.store(out_ptr",
            "mask = (c < C)[None, :] & (p >= 0)[:, None]\n    tl.store(out_ptr", "two kernels"),
    # Forward
    Mistake("u of the block before", FORWARD, "h = gelu(u, dtype).to(dtype)\n            u = ahead",
            "u = ahead\n            h = gelu(u, dtype).to(dtype)", "fused"),
    Mistake("second tile's channels are the first one's", FORWARD, "n1 = N0 + tl.arange(0, N1)",
            "n1 = tl.arange(0, N1)", "fused"),
    Mistake("last hidden channels skipped", FORWARD, "0, length)\n    if AHEAD:",
            "0, length - BLOCK_D)\n    if AHEAD:", "fused"),
    Mistake("h rounded twice", FORWARD, "h = gelu(u, dtype).to(dtype)\n            u = ahead",
            "h = (gelu(u, dtype) * 1.01).to(dtype)\n            u = ahead", "fused"),
    Mistake("rows kept for the next block of the resident kernel", FORWARD, "base = tl.cast(row, tl.int64) * C",
            "base = tl.cast(row * 0, tl.int64) * C", "resident"),
    Mistake("resident weights of the first block", FORWARD, "sums0 = tl.dot(h, down0[block], sums0)",
            "sums0 = tl.dot(h, down0[0], sums0)", "resident"),
    Mistake("every block of rows but the last", FORWARD, "tl.cdiv(P, BLOCK_P), programs)", "P // BLOCK_P, programs)",
            "resident"),
    Mistake("columns of out from the wrong block", FORWARD,
            "row = tl.program_id(0) // blocks * BLOCK_P\n    p, c = tl.arange(0, BLOCK_P), tl.program_id(0) % blocks",
            "row = tl.program_id(0) // blocks * BLOCK_P\n    p, c = tl.arange(0, BLOCK_P), 0 * tl.program_id(0)",
            "wide"),
    # d, and what is made of the second layer's weight
    Mistake("λ forgotten in dh", BACKWARD, "value *= _vector(layer_scale_ptr, c, C, True, 0.0, False)[None, :]",
            "pass", "fused"),
    Mistake("a power of two too many", BACKWARD, "tl.store(unscale_ptr, (exponent << 23)",
            "tl.store(unscale_ptr, ((exponent + 1) << 23)", "fp16"),
    Mistake("power of two not taken back", BACKWARD, "            if BALANCED:\n                dh *= unscale\n", "",
            "fp16"),
    Mistake("power of two not taken back, hidden", BACKWARD,
            "    if BALANCED:\n        dh *= tl.load(unscale_ptr)\n", "", "fp16, hidden"),
    Mistake("power of two not taken back, norm over an image", LAUNCH_BACKWARD,
            "factor=unscale if self._balanced() else None", "factor=None", "norm over an image, fp16"),
    Mistake("ρ forgotten in d", BACKWARD, "d = tl.where(factors == 0.0, 0.0, d * factors)", "d = d", "fused"),
    Mistake("last rows skipped in Σ d", BACKWARD, "        sums += d\n", "        sums = d\n", "many rows"),
    Mistake("d stored of the first rows only", LAUNCH_BACKWARD, "rows.new_empty((-(-call.rows // part), call.c)",
            "rows.new_empty((max(1, call.rows // part), call.c)", "fused, 2 blocks of rows"),
    # Whole rows, backward
    Mistake("GELU instead of its derivative", BACKWARD, "            du = times(dh, gelu_derivative(u, dtype))\n",
            "            du = dh * gelu(u, dtype)\n", "fused"),
    Mistake("x̂ instead of what is multiplied", BACKWARD, "normed0 = _without_dropped(normed0,",
            "normed0 = _without_dropped(x0,", "fused"),
    Mistake("x̂∘γ + β stored for x̂", BACKWARD, "tl.store(xhat_ptr + (p[:, None] * C + c0[None, :]), x0.to(dtype),",
            "tl.store(xhat_ptr + (p[:, None] * C + c0[None, :]), (x0 * 2).to(dtype),", "fused"),
    Mistake("second tile forgotten in dh", BACKWARD, "dh = tl.dot(d1, _matrix(", "tl.dot(d1, _matrix(", "fused"),
    Mistake("second tile forgotten in the mean of g", BACKWARD, "            sum_g += tl.sum(g1, 1)\n", "", "fused"),
    Mistake("second tile forgotten in the mean of g∘x̂", BACKWARD, "            sum_gx += tl.sum(times(g1, x1), 1)\n",
            "", "fused"),
    Mistake("γ forgotten in g", BACKWARD, "        g0 = times(g0, _vector(norm_weight_ptr, c0,",
            "        g0 = times(g0, 1 + 0.0 * _vector(norm_weight_ptr, c0,", "fused"),
    Mistake("zeros of a dropped block not stored in du", BACKWARD,
            "            if STORE_DU:\n                _store_zeros(",
            "            if False:\n                _store_zeros(", "a dropped block"),
    Mistake("zeros of a dropped block not stored in dy", BACKWARD,
            "    else:\n        _store_zeros(dy_ptr, p * C, c0,",
            "    else:\n        _store_zeros(dy_ptr, p * C, c0 + C,", "a dropped block"),
    Mistake("sums of du before it is one", BACKWARD, "tl.store(partials_ptr + k, tl.sum(du, 0), mask=k < D)",
            "tl.store(partials_ptr + k, tl.sum(dh, 0), mask=k < D)", "fused"),
    # Hidden channels, backward
    Mistake("u of dropped rows not zero", BACKWARD,
            "end = tl.where(_all_dropped(factors), 0, length)\n    rows, columns",
            "end = tl.where(_all_dropped(factors), length, 0)\n    rows, columns", "two kernels"),
    Mistake("last channels beside a step", BACKWARD, "inside_a = mask_p if WHOLE_C else",
            "inside_a = mask_p if True else", "wide"),
    Mistake("left half's columns in the right one", BACKWARD, "u_right, dh_right, k + HALF,",
            "u_right, dh_right, k,", "two kernels"),
    Mistake("bias forgotten of what was kept", BACKWARD, "    u = product + bias\n",
            "    u = product if GIVEN_PRODUCT else product + bias\n", "u kept"),
    Mistake("β among the sums", BACKWARD, "times(du, product - t)", "times(du, product)", "wide"),
    Mistake("bias among the sums", BACKWARD, "times(du, product - t)", "times(du, u - t)", "wide"),
    # The second layer's gradients
    Mistake("λ forgotten in dW2", BACKWARD, "dfc2 = q * _vector(layer_scale_ptr, c, C, HAS_LAYER_SCALE,",
            "dfc2 = q * _vector(layer_scale_ptr, c, C, False,", "fused"),
    Mistake("last part not added up", BACKWARD, "mask=mask & (start + ahead < parts)",
            "mask=mask & (start + ahead < parts - 1)", "fused"),
    Mistake("b2 forgotten in dλ", BACKWARD, "BLOCK_P, BLOCK_C) + bias * sums", "BLOCK_P, BLOCK_C)", "fused"),
    Mistake("λ forgotten in db2", BACKWARD, "dbias = sums * _vector(layer_scale_ptr, c, C, HAS_LAYER_SCALE,",
            "dbias = sums * _vector(layer_scale_ptr, c, C, False,", "fused"),
    # The norm over an image
    Mistake("pixels of the next image", GRN, "mask_p = start + p < pixels", "mask_p = start + p < pixels + 1",
            "norm over an image, rounding"),
    Mistake("v forgotten", GRN, "* scale[None, :] + bias[None, :]", "* scale[None, :] + 0.0 * bias[None, :]",
            "norm over an image"),
    Mistake("v forgotten in h, made again", GRN, "(a * scale + grn_bias).to(dtype)", "(a * scale).to(dtype)",
            "norm over an image"),
    Mistake("the norm's own gradient forgotten", GRN, "mask_p, mask_k) * scale + a * direction",
            "mask_p, mask_k) * scale", "norm over an image, rounding"),
    Mistake("scale forgotten in du", GRN, "mask_p, mask_k) * scale + a", "mask_p, mask_k) + a",
            "norm over an image, rounding"),
    Mistake("scale of the first image", GRN,
            "scale = _vector(scale_ptr + n.to(tl.int64) * D, k, D, True, 0.0, False)\n",
            "scale = _vector(scale_ptr, k, D, True, 0.0, False)\n", "norm over an image, rounding"),
    Mistake("chunks of an image mixed up", GRN, "return rest // chunks, rest % chunks * BLOCK_P,",
            "return rest // chunks, rest // chunks * BLOCK_P,", "norm over large images"),
    Mistake("bias among the sums of the norm over an image", GRN, "times(du, product - t)",
            "times(du, u - t)", "norm over an image, wide"),
    Mistake("mean forgotten in the norm's gradient", LAUNCH_BACKWARD,
            "dnorm = t / mean - (t * norm).mean(-1, keepdim=True) / mean.square()", "dnorm = t / mean",
            "norm over an image, rounding"),
    Mistake("kept u overwritten", LAUNCH_BACKWARD, "            u.copy_(self.u.view_as(u))  #",
            "            u = self.u.view_as(u)  #", "second backward pass"),
    # Launches
    Mistake("dout not added to dx", LAUNCH_BACKWARD, "padding, dx, residual=dout)", "padding, dx)", "fused"),
    Mistake("statistics not made again", LAUNCH_BACKWARD, "None, None, mean, rstd, eps, None, None)",
            "None, None, mean, rstd, eps + 1, None, None)", "lean"),
    Mistake("x rounded to what is computed in", LAUNCH, "_tail(call, as_rows(x), y,",
            "_tail(call, as_rows(x.to(dtype).to(x.dtype)), y,", "rounding in autocast"),
    Mistake("out left as it was where it is not channels_last", LAUNCH, "            out.copy_(result)\n",
            "            pass\n", "contiguous"),
    Mistake("maps taken to be channels_last", LAUNCH_COMMON,
            "return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])",
            "return x.contiguous().view(-1, x.shape[1])", "contiguous"),
    Mistake("parameters taken to have no gaps", LAUNCH_COMMON,
            "None if t is None else t.contiguous() for t in p", "t for t in p", "slices"),
    # Offsets
    *(Mistake(f"int32 offsets: {what}", *widened, f"addresses: {what}", everywhere=True)
      for what, widened in addresses.WIDENED.items()),
]  # fmt: skip


@pytest.fixture
def run_copy(tmp_path, monkeypatch):
    yield from running_copies("block", FILES, tmp_path, monkeypatch)


def test_every_proof_is_used_and_every_mistake_has_its_own_name():
    assert {mistake.proof for mistake in MISTAKES} <= set(PROOFS)
    assert len({mistake.what for mistake in MISTAKES}) == len(MISTAKES)
    assert {mistake.file for mistake in MISTAKES} == set(OWN) - {CONFIG}
    assert runtime.has_kernels("block")


@pytest.mark.parametrize("proof", PROOFS)
def test_right_kernels_pass(proof, run_copy):
    run_copy(None)
    with Guard() as guard:
        PROOFS[proof]()
    ran = any(launch.kernel.startswith("_block_") for launch in guard.launches)
    assert proof.startswith("addresses") or ran


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_mistakes_are_caught(mistake, run_copy):
    run_copy(mistake)
    with Guard(), pytest.raises(AssertionError):  # the guard's errors are such; what does not run at all is none
        PROOFS[mistake.proof]()
