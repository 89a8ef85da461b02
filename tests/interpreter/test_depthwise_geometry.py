"""Dilation, stride and kernels larger than 9×9 in Triton's interpreter, under the guard: right, the same every time."""

import pytest
import torch

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests import depthwise_proofs as proofs
from tests.cases import DTYPES, MEANS, KernelCase, geometry_cases
from tests.interpreter.test_depthwise_kernels import assert_same_bits, kind, normal
from tests.interpreter_guard import Guard

pytestmark = pytest.mark.usefixtures("guard")

ONE = (1, 1)
# Phases of two sizes, with a padding that is no multiple of the dilation, in strips and in pairs; taps from the cache;
# several groups of rows of taps; strides.
DILATED = KernelCase("fp32", 2, 33, 5, 7, 3, 3, 1, 2, dilation=(2, 3))
IN_STRIPS = KernelCase("fp32", 1, 3, 5, 20, 3, 3, 2, 2, dilation=(2, 2))
IN_PAIRS = KernelCase("bf16", 1, 3, 5, 10, 7, 7, 6, 3, dilation=(2, 1))
CACHED = KernelCase("fp32", 1, 3, 5, 7, 13, 5, 6, 2)
MASKED = KernelCase("fp32", 1, 3, 2, 4, 13, 9, 7, 3)
STRIDED = KernelCase("fp32", 2, 33, 7, 10, 5, 3, 2, 0, stride=(2, 2))
IN_ROWS = KernelCase("fp32", 1, 3, 6, 5, 3, 5, 0, 2, stride=(2, 1))
EACH_WAY = {
    "dilated": DILATED, "in strips": IN_STRIPS, "in pairs": IN_PAIRS, "cached": CACHED, "masked": MASKED,
    "strided": STRIDED, "in rows": IN_ROWS,
}  # fmt: skip
# What is masked only, has an edge that others have, too, and takes long.
QUICK = {way: case for way, case in EACH_WAY.items() if way != "masked"}
each_way = pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)


# Every change has half of them.
CASES = [pytest.param(case, marks=[pytest.mark.full] * (at % 2)) for at, case in enumerate(geometry_cases())]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers(case):
    with Guard(case.order) as guard:
        proofs.prove_exact(case)
    # What ran is what the cover takes to be covered.
    launched = [(launch.kernel, launch.grid[0]) for launch in guard.launches]
    y, dx, dw = [(part.choice.kernel, part.programs) for part in case.parts()]
    if min(grid for kernel, grid in launched[0:3:2]) > case.kh * case.kw:  # else taps that no pixel needs are cut off
        assert launched[1::2][:2] == [y, dx]
        assert launched[4] == dw


# Each way in one dtype after the other, with each mean.
@pytest.mark.parametrize("case, mean", [
    (case._replace(n=2, c=32, w=case.w, dtype=DTYPES[i % 3]), MEANS[i % 4])
    for i, case in enumerate(EACH_WAY.values())
], ids=EACH_WAY)  # fmt: skip
def test_rounding(case, mean):
    proofs.prove_rounding(case, mean)


@pytest.mark.parametrize("way", ["dilated", "in strips", "in pairs", "cached", "masked"])
def test_input_gradient_with_a_residual_is_exact_on_integers(way):
    """The block asks for it at stride 1; a block with dilation is none of ours, but the launcher does not know."""
    for layout, cut in (("contiguous", "whole"), ("channels_last", "2 rows")):
        proofs.prove_residual(EACH_WAY[way]._replace(c=3, cut=cut), "fp32", "fp32", layout)


@pytest.mark.parametrize("way", ["dilated", "in pairs", "cached", "strided"])
def test_adjoint_identity_in_integers(way):
    case = EACH_WAY[way]._replace(n=1, c=3, bias="none")
    random = torch.Generator().manual_seed(1)
    inputs, g = proofs.operands(case, lambda shape: testing.integers(shape, largest=1, generator=random))
    y, dx, dw = (t.double() for t in proofs.on_kernels(case, inputs, g))
    x, w = inputs[:2]
    assert (y * g).sum() == (x * dx).sum() == (w * dw).sum() != 0


@each_way
def test_same_bits_in_every_order_of_programs(case):
    case = case._replace(n=1, c=3, h=3 if case.ph < 6 else 2, cut="2 rows")
    inputs, dy = proofs.operands(case, normal)
    results = []
    for order in ("forward", "shuffled"):
        with Guard(order) as guard:
            results.append(proofs.on_kernels(case, inputs, dy))
        assert any(launch.grid[0] > 1 for launch in guard.launches)
    assert_same_bits(*results)


@each_way
def test_same_bits_of_y_and_dx_however_rows_are_cut(case):
    case = case._replace(n=1, c=3, h=4)
    inputs, dy = proofs.operands(case, normal)
    whole, *cut = (
        proofs.on_kernels(case._replace(cut=cut), inputs, dy, (True, False, False)) for cut in ("whole", "2 rows")
    )
    assert_same_bits(cut[0], whole)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy
@pytest.mark.parametrize("way", ["dilated", "in strips", "cached", "masked", "strided"])
def test_inf_and_nan_reach_their_windows_alone(way):
    case = EACH_WAY[way]._replace(n=2, c=3)
    (x, w, b), dy = proofs.operands(case, normal)
    for t in (x, dy):
        t[1, 0, t.shape[2] // 2, t.shape[3] // 2] = torch.inf
        t[1, 1, -1, 0] = torch.nan
    y, dx, dw, db = proofs.on_kernels(case, [x, w, b], dy)
    exact = proofs.exactly(case, [x, w, b], dy)
    assert torch.equal(kind(y), kind(exact[0]))
    assert torch.equal(kind(dx), kind(exact[1]))
    assert dw[2].isfinite().all()
    assert db.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(0, 4, 9, 9), (2, 0, 9, 9), (2, 4, 0, 9)], ids=str)
@pytest.mark.parametrize("case", [DILATED, CACHED, STRIDED], ids=["dilated", "cached", "strided"])
def test_empty_maps(shape, case, guard):
    x, w = torch.zeros(shape, requires_grad=True), torch.zeros(shape[1], 1, case.kh, case.kw, requires_grad=True)
    with dk.backend("triton"):
        y = dk.depthwise_conv2d(x, w, None, **case.geometry)
    size = case._replace(h=shape[2], w=shape[3]).output
    assert y.shape == (*shape[:2], *(max(s, 0) for s in size))
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert not guard.launches


def test_a_dilation_of_a_single_tap_is_none():
    """A kernel of one row has no taps that its dilation could move apart, whatever it is."""
    x, w = testing.integers((1, 3, 4, 9)), testing.integers((3, 1, 1, 5))
    with dk.backend("triton"):
        y = dk.depthwise_conv2d(x, w, padding=(0, 2), dilation=(7, 1))
    assert torch.equal(y, torch.nn.functional.conv2d(x, w, padding=(0, 2), dilation=(7, 1), groups=3))
