"""The three passes of the depthwise kernels in Triton's interpreter, under the guard: right, the same every time."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests import depthwise_proofs as proofs
from tests.cases import DTYPES, LAYOUTS, MEANS, KernelCase, cover, kernel_cases
from tests.interpreter_guard import ORDERS, Guard

pytestmark = pytest.mark.usefixtures("guard")

HALF = ["bf16", "fp16"]

# A map for each way to compute one: strips that overlap, a strip as wide as the map, rows in pairs, masks.
STRIPS = KernelCase("fp32", 2, 33, 5, 10, 3, 3, 1, 1)
WHOLE = KernelCase("bf16", 2, 8, 5, 7, 7, 7, 3, 3)
PAIRS = KernelCase("fp16", 2, 8, 5, 10, 7, 7, 3, 3)
MASKED = KernelCase("fp32", 2, 40, 5, 6, 5, 3, 1, 2)
EACH_WAY = [STRIPS, WHOLE, PAIRS, MASKED]  # strict kernels for half types are those for fp32
each_way = pytest.mark.parametrize("case", EACH_WAY, ids=["strips", "whole", "pairs", "masked"])


def normal(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def bits(tensors):
    return [t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()]) for t in tensors]


def assert_same_bits(actual, expected):
    for name, a, e in zip(proofs.NAMES, bits(actual), bits(expected), strict=False):
        assert torch.equal(a, e), f"{name} differs in {int(a.ne(e).sum())} of {a.numel()} elements"


def test_each_way_is_another_one():
    ways = {tuple((part.choice.kernel, part.choice.edge) for part in case.parts()) for case in EACH_WAY}
    assert len(ways) == 4


# T0: every element


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_exact_on_integers(case):
    with Guard(case.order) as guard:
        proofs.prove_exact(case)
    # What ran is what the cover takes to be covered.
    launched = [(launch.kernel, launch.grid[0]) for launch in guard.launches]
    y, dx, dw = [(part.choice.kernel, part.programs) for part in case.parts()]
    taps = [launch for launch in launched if launch[0] == "_depthwise_taps_kernel"]
    assert launched[1::2][:2] == [y, dx]
    assert launched[0::2][:2] == taps
    assert launched[4:] == [dw, ("_depthwise_sum_kernel", launched[-1][1])]


def cases_of_dx():
    """Of those, the few in which each kernel for dx meets each dtype and each way to be cut."""

    def met(case):
        part = list(case.parts())[1]
        ways = {
            "dtype": case.dtype, "strips": min(2, part.strips), "chunks": min(3, part.chunks), "h is odd": case.h % 2,
            "whole blocks": case.c % 32 == 0, "n > 1": case.n > 1, "channels_last": case.x.startswith("channels_last"),
        }  # fmt: skip
        return {(part.choice, case.strict, *way) for way in ways.items()}

    return cover([(case, case.seconds() / 3, met(case)) for case in kernel_cases()], overhead=0.3)


# The block's own dtypes: those of dy, and fp32, as under autocast. The residual's layouts take turns.
@pytest.mark.parametrize("case, dtype, layout", [
    (case, dtype, LAYOUTS[(2 * i + j) % len(LAYOUTS)])
    for i, case in enumerate(cases_of_dx()) for j, dtype in enumerate(dict.fromkeys((case.dtype, "fp32")))
], ids=str)  # fmt: skip
def test_input_gradient_with_a_residual_is_exact_on_integers(case, dtype, layout):
    with Guard(case.order) as guard:
        proofs.prove_residual(case, dtype, dtype, layout)
    part = list(case.parts())[1]
    launched = [(launch.kernel, launch.grid[0]) for launch in guard.launches]
    assert launched[1:] == [(part.choice.kernel, part.programs)]


@pytest.mark.parametrize("residual, dx", [*itertools.product(DTYPES, DTYPES)])
def test_dtypes_of_residual_and_dx_are_their_own(residual, dx):
    for i, case in enumerate(EACH_WAY):
        layout = ("contiguous", "channels_last")[i % 2]
        proofs.prove_residual(case._replace(x=layout), residual, dx, layout)


def test_a_residual_must_not_be_dx():
    dx = torch.zeros(STRIPS.n, STRIPS.c, STRIPS.h, STRIPS.w)
    with pytest.raises(ValueError, match="residual is dx; a map in memory of its own is allowed"):
        proofs.runtime.launchers("depthwise").depthwise_input_gradient(dx, normal((33, 1, 3, 3)), (1, 1), dx, dx)


# T1, T2, T3: rounding


ROUNDED = [
    KernelCase("fp32", 1, 32, 14, 14, 7, 7, 3, 3),
    KernelCase("fp32", 1, 32, 5, 13, 7, 7, 3, 3, cut="2 rows"),
    KernelCase("fp32", 2, 32, 4, 11, 7, 7, 2, 5),
    KernelCase("fp32", 2, 32, 9, 15, 3, 3, 1, 1, cut="4 rows, 2 images"),
    KernelCase("fp32", 1, 32, 3, 12, 9, 9, 4, 4),
    KernelCase("fp32", 3, 32, 11, 6, 5, 1, 4, 0),
]


# Each map in each dtype, and each mean in each dtype.
@pytest.mark.parametrize("case, mean", [
    (case._replace(dtype=dtype), MEANS[(i + j) % 4]) for i, case in enumerate(ROUNDED) for j, dtype in enumerate(DTYPES)
], ids=str)  # fmt: skip
def test_rounding(case, mean):
    proofs.prove_rounding(case, mean)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_of_strict_kernels(dtype):
    proofs.prove_rounding(ROUNDED[1]._replace(dtype=dtype, strict=True), 1.0)


@pytest.mark.parametrize("residual, dx", [("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp16")])
def test_rounding_with_a_residual(residual, dx):
    for case in EACH_WAY:
        proofs.prove_residual_rounding(case, residual, dx)


@pytest.mark.parametrize("strict", [False, True], ids=["pairs", "strict"])
def test_a_row_of_large_values_beside_small_ones(strict):
    """In pairs, its rounding errors reach one row further than its values; strict kernels keep to the usual bound."""
    case = KernelCase("bf16", 1, 32, 9, 10, 7, 7, 3, 3, strict=strict)
    inputs, dy = proofs.operands(case, normal)
    for t in (inputs[0], dy):
        t[:, :, 0] *= 1e6
    y, dx = proofs.on_kernels(case, inputs, dy, (True, False, False))
    exact, magnitude = proofs.exactly(case, inputs, dy), proofs.exactly(case, inputs, dy, torch.abs)
    if not strict:  # all that is added up, for outputs at the edge of pairs too
        taps = inputs[1].double().abs().amax((2, 3), keepdim=True).expand(-1, -1, 9, 7)
        magnitude = [3 * F.conv2d(t.double().abs(), taps, padding=(4, 3), groups=32) for t in (inputs[0], dy)]
    testing.assert_componentwise(y, exact[0], magnitude[0], 50, "y")
    testing.assert_componentwise(dx, exact[1], magnitude[1], 49, "dx")


# T4: gradients


@pytest.mark.parametrize("case", [
    KernelCase("fp32", 2, 5, 6, 10, 5, 7, 2, 3), KernelCase("fp32", 2, 5, 5, 6, 5, 3, 4, 0),
    KernelCase("bf16", 1, 5, 4, 10, 7, 7, 3, 3), KernelCase("fp16", 1, 5, 7, 7, 7, 7, 3, 3),
], ids=str)  # fmt: skip
def test_adjoint_identity_in_integers(case):
    """⟨y(x, w), g⟩ = ⟨x, dx(g)⟩ = ⟨w, dw(g)⟩, exactly; sums that small are whole numbers in every dtype."""
    inputs, g = proofs.operands(case._replace(bias="none"), lambda shape: testing.integers(shape, largest=1))
    y, dx, dw = (t.double() for t in proofs.on_kernels(case, inputs, g))
    x, w = inputs[:2]
    assert (y * g).sum() == (x * dx).sum() == (w * dw).sum() != 0


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
@pytest.mark.parametrize("size, padding", [((3, 3), (1, 1)), ((3, 5), (2, 0)), ((1, 3), (0, 1))], ids=str)
def test_gradcheck(size, padding):
    """The convolution is linear in each argument: differences over large steps are exact, so fp32 is enough."""
    tensors = [normal((2, 2, 4, 7)), normal((2, 1, *size)), normal((2,))]
    leaves = [t.float().requires_grad_() for t in tensors]
    with dk.backend("triton"):
        convolution = lambda *t: dk.depthwise_conv2d(*t, padding=padding)  # noqa: E731
        assert torch.autograd.gradcheck(convolution, leaves, eps=0.25, atol=1e-4, rtol=1e-4, fast_mode=True)


def test_second_derivatives_raise():
    x, w = normal((1, 2, 3, 3)).float().requires_grad_(), normal((2, 1, 3, 3)).float().requires_grad_()
    with dk.backend("triton"):
        y = dk.depthwise_conv2d(x, w, padding=1)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative .*backend\("torch"\)'):
        (dx.square().sum() + y.sum()).backward()


# T5: the same bits


@each_way
def test_same_bits_in_every_order_of_programs(case):
    case = case._replace(n=1 if case.w > 7 and case.kh == 7 else 2, h=3, cut="2 rows")
    inputs, dy = proofs.operands(case, normal)
    results = []
    for order in ORDERS:
        with Guard(order) as guard:
            results.append(proofs.on_kernels(case, inputs, dy))
        assert all(launch.grid[0] > 3 for launch in guard.launches)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@each_way
def test_same_bits_of_y_and_dx_however_rows_are_cut(case):
    case = case._replace(n=1, h=7)
    inputs, dy = proofs.operands(case, normal)
    results = []
    for cut in ("whole", "2 rows", "4 rows, 2 images"):
        with Guard() as guard:
            results.append(proofs.on_kernels(case._replace(cut=cut), inputs, dy, (True, False, False)))
        programs = [launch.grid[0] for launch in guard.launches[1::2]]
        chunks = [n // part.strips // -(-case.c // 32) for n, part in zip(programs, case.parts(), strict=False)]
        assert chunks[1] == {"whole": 1, "2 rows": 4, "4 rows, 2 images": 2}[cut]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@each_way
def test_same_bits_of_y_and_dx_alone_and_in_a_batch(case):
    (x, *parameters), dy = proofs.operands(case._replace(h=3), normal)
    batch = proofs.on_kernels(case, [x, *parameters], dy, (True, False, False))
    for i in range(case.n):
        alone = proofs.on_kernels(case, [x[i : i + 1], *parameters], dy[i : i + 1], (True, False, False))
        assert_same_bits(alone, [t[i : i + 1] for t in batch])


# Inf and NaN: what a value reaches shows in the second of two images, in a channel of its own


of_what_is_not_finite = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy

PLACES = [(0, 0), (8, 9), (4, 0), (3, 5), (8, 3)]  # of a map of 9×10: corners, sides, between two strips
VALUES = [(place, value) for place in PLACES for value in (math.nan, math.inf, -math.inf)]
IN_X, IN_DY = range(15), range(15, 30)  # the channels with such a value; one more has none


def with_values(case):
    """x, weight, bias and dy, normal but for VALUES in channels IN_X of x and IN_DY of dy."""
    x, dy = normal((2, 31, 9, 10)), normal((2, 31, *case.output))
    for t, channels in ((x, IN_X), (dy, IN_DY)):
        for channel, ((row, column), value) in zip(channels, VALUES, strict=True):
            t[1, channel, min(row, t.shape[2] - 1), min(column, t.shape[3] - 1)] = value
    return [t.to(proofs.DTYPES[case.dtype]) for t in (x, normal((31, 1, 7, 7)), normal((31,)), dy)]


def kind(t):
    """0 where finite, 1, 2, 3 for NaN, +Inf, −Inf."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def assert_parameters_are_reached(case, inputs, dy, dw, db):
    """Gradients of parameters sum over a channel: what has to be reached is, and no other channel.

    In between, both are right: x is 0 outside of the map, and 0·Inf is NaN, where that product is computed at all.
    """
    marks = [(~t.isfinite()).double() for t in (inputs[0], dy)]
    ones = [torch.ones_like(mark) for mark in marks]
    by_x = proofs.by_pytorch(case, [marks[0], *map(torch.Tensor.double, inputs[1:])], ones[1])[2]
    by_dy = proofs.by_pytorch(case, [ones[0], *map(torch.Tensor.double, inputs[1:])], marks[1])[2]
    assert (by_x + by_dy > 0).flatten(1).any(1).tolist() == [True] * 30 + [False]
    assert ((by_x + by_dy > 0) <= ~dw.isfinite()).all()
    assert dw[30].isfinite().all()
    assert db.isfinite().tolist() == [channel not in IN_DY for channel in range(31)]


@of_what_is_not_finite
@pytest.mark.parametrize("dtype, padding", [("fp32", 3), ("bf16", 3), ("fp16", 3), ("bf16", 2)])
def test_strict_kernels_let_inf_and_nan_reach_their_windows_alone(dtype, padding):
    case = KernelCase(dtype, 2, 31, 9, 10, 7, 7, padding, padding, strict=True)
    assert not any(part.choice.pairs for part in case.parts())
    *inputs, dy = with_values(case)
    y, dx, *gradients = proofs.on_kernels(case, inputs, dy)
    exact = proofs.exactly(case, inputs, dy)
    assert torch.equal(kind(y), kind(exact[0]))
    assert torch.equal(kind(dx), kind(exact[1]))
    assert_parameters_are_reached(case, inputs, dy, *gradients)
    assert not y[1, IN_X].isfinite().all((1, 2)).any()
    assert not dx[1, IN_DY].isfinite().all((1, 2)).any()


@of_what_is_not_finite
@pytest.mark.parametrize("dtype", HALF)
def test_rows_in_pairs_let_inf_and_nan_reach_one_row_more(dtype):
    case = KernelCase(dtype, 2, 31, 9, 10, 7, 7, 3, 3)
    assert all(part.choice.pairs for part in case.parts())
    *inputs, dy = with_values(case)
    y, dx, *gradients = proofs.on_kernels(case, inputs, dy)
    for result, source in ((y, inputs[0]), (dx, dy)):
        window = (~source.isfinite()).double()
        reached = F.max_pool2d(window, (7, 7), stride=1, padding=3) > 0
        allowed = F.max_pool2d(window, (9, 7), stride=1, padding=(4, 3)) > 0
        assert (reached <= ~result.isfinite()).all()
        assert (~result.isfinite() <= allowed).all()
        assert not allowed.all((2, 3)).any()  # else there would be nothing to see
    assert_parameters_are_reached(case, inputs, dy, *gradients)


def test_values_that_are_not_finite_stay_in_their_lanes():
    """Of 33 channels, the last shares its block with none: lanes beyond it do its work again."""
    for case in (STRIPS, MASKED):
        x, w = normal((1, 33, 4, 8)).float(), normal((33, 1, case.kh, case.kw)).float()
        x[:, 32] = math.nan
        one = case._replace(n=1, c=33, h=4, w=8, bias="none")
        y, dx, dw = proofs.on_kernels(one, [x, w, None], normal((1, 33, *one.output)).float())
        for result in (y, dw):
            finite = result.isfinite().transpose(0, 1).flatten(1) if result is y else result.isfinite().flatten(1)
            assert finite[:32].all()
            assert not finite[32].any()
        assert dx.isfinite().all()
