"""The kernels of layer norm + linear (+ GELU) in Triton's interpreter, under the guard: right, the same every time."""

import math

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from dwconv_kernels.norm_linear import reference
from tests import norm_linear_cases as cases
from tests import norm_linear_proofs as proofs
from tests.cases import DTYPES, MEANS
from tests.dwconv_kernels.operands import norm_linear_operands, requiring_grad
from tests.interpreter_guard import ORDERS, Guard
from tests.norm_linear_cases import NormLinearCase, norm_linear_cases

# Rows beside the last one are rows of zeros to the kernels, which with ε = 0 have no normalisation; nobody reads them.
pytestmark = [
    pytest.mark.usefixtures("guard"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
OPS = torch.ops.dwconv_kernels
HALF = ["bf16", "fp16"]

# Rows that are normalised where they are multiplied, in one piece and in two, and rows that are not; dx by whole rows
# and not.
EACH_WAY = {
    "whole": NormLinearCase("fp32", (2, 70), 64, 70, "gelu", arch=90),
    "split": NormLinearCase("bf16", (140,), 96, 70, None, arch=90),
    "split, not whole": NormLinearCase("fp16", (140,), 192, 70, "gelu", arch=89, few=False),
    "wide": NormLinearCase("bf16", (140,), 255, 70, "gelu", arch=90, few=False),
}
each_way = pytest.mark.parametrize("case", EACH_WAY.values(), ids=list(EACH_WAY))


def assert_same_bits(actual, expected):
    for name, a in actual.items():
        a, e = (t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (a, expected[name]))
        assert torch.equal(a, e), f"{name} differs in {int(a.ne(e).sum())} of {a.numel()} elements"


def test_each_way_is_another_one():
    ways = {(case.resident(), cases.config.split(case.c)[1] > 0, case.tiles()["dx"][1]) for case in EACH_WAY.values()}
    assert len(ways) == 4


# T0: every element


def test_the_cover_meets_everything_that_can_be_chosen():
    met = {(case.dtype, kernel, choice) for case in norm_linear_cases() for kernel, choice in case.tiles().items()}
    assert met == set(cases.choices())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("field, values", [
    ("shape", cases.SHAPES), ("c", cases.WIDTHS), ("d", cases.OUTPUTS), ("given", cases.GIVEN), ("x", cases.LAYOUTS),
    ("dy", cases.LAYOUTS), ("parameters", cases.PARAMETER_LAYOUTS), ("mean", MEANS), ("arch", cases.ARCHS),
    ("order", ORDERS), ("few", (None, True, False)), ("activation", (None, "gelu")),
], ids=str)  # fmt: skip
def test_the_cover_meets_every_value_in_every_dtype(field, values, dtype):
    assert {getattr(case, field) for case in norm_linear_cases() if case.dtype == dtype} == set(values)


@pytest.mark.parametrize("case", norm_linear_cases(), ids=str)
def test_exact_on_integers(case):
    with Guard(case.order) as guard:
        proofs.prove_exact(case)
    # What ran is what the cover takes to be covered.
    names = [launch.kernel.removeprefix("_norm_linear_").removesuffix("_kernel") for launch in guard.launches]
    assert names == [
        *(["fwd"] if case.resident() else ["norm", "product"]),
        "norm",
        *["vectors"] * (not case.tiles()["dx"][1]),
        *("bwd_du", "bwd_x", "bwd_weight"),
        *["column_sum"] * case.sums_twice(),
        "finish",
        *["norm_sum"] * any(case.given[:2]),
    ]


def test_exact_sums_of_many_rows():
    """More blocks of them than are summed at once, and an incomplete last group of blocks."""
    case = NormLinearCase("bf16", (4, 1100), 16, 5, "gelu", arch=90, x_dtype="fp32")
    assert case.sums_twice()
    proofs.prove_exact(case)


# T1, T2, T3: rounding


ROUNDED = [
    NormLinearCase("fp32", (3, 60), 96, 130),
    NormLinearCase("fp32", (129,), 200, 64, "gelu", arch=90),
    NormLinearCase("fp32", (127,), 97, 40, "gelu", arch=80),
    NormLinearCase("fp32", (2, 8, 8), 255, 100, arch=89, few=False),
    NormLinearCase("fp32", (300,), 3, 33, "gelu", (False, False, False)),
    NormLinearCase("fp32", (300,), 17, 5, None, (True, False, False), arch=90),
    NormLinearCase("fp32", (40,), 1023, 17, None, (False, True, True), arch=90),
    NormLinearCase("fp32", (50,), 768, 33, "gelu", (True, True, False), few=False),
]


# Each in fp32 and in one of the half types, and each mean in each dtype.
@pytest.mark.parametrize("case", [
    case._replace(dtype=dtype, mean=MEANS[(i // 2 + 2 * j) % 4])
    for i, case in enumerate(ROUNDED) for j, dtype in enumerate(("fp32", HALF[i % 2]))
], ids=lambda case: f"{case}-mean{case.mean:g}")  # fmt: skip
def test_rounding(case):
    proofs.prove_rounding(case)


@pytest.mark.parametrize("dtype, x_dtype", [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16")])
def test_rounding_in_autocast(dtype, x_dtype):
    for case in (ROUNDED[0], ROUNDED[1]):
        proofs.prove_rounding(case._replace(dtype=dtype, x_dtype=x_dtype, mean=1.0))


@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("c", [97, 192])
def test_means_of_many_standard_deviations(c, mean):
    case = NormLinearCase("fp32", (60,), c, 8, mean=mean)
    proofs.prove_rounding(case, far=True)
    inputs, dy = proofs.normal_operands(case)
    x, *parameters = inputs
    # What one pass over x would lead to does not get through.
    normed = reference.scaled(reference.normalised(x, *proofs.one_pass(x, proofs.EPS)), *parameters[:2])
    lost = reference.linear(normed, *parameters[2:], torch.float32)
    exact, peer = proofs.exactly(case, inputs, dy)["y"], proofs.by_pytorch(case, inputs, dy)["y"]
    if mean >= 100:
        with pytest.raises(AssertionError, match="times PyTorch's"):
            testing.assert_no_worse(lost, peer, exact, 2, 3)


# Rows that are special


def raw_forward(inputs, eps=proofs.EPS, activation=None):
    """y, mean, 1/√(variance + ε)."""
    return OPS.layer_norm_linear(*inputs, eps, activation, inputs[0].dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3, 7, 33, 96, 97, 129, 255, 1023])
def test_constant_rows(c, dtype):
    """Their mean is their constant, to the bit, so nothing is left of them but β."""
    values = torch.tensor([0.0, 1, 100, 6e4, -0.1, 1 / 3, 1e-4]).to(proofs.DTYPES[dtype])
    case = NormLinearCase(dtype, (len(values),), c, 5)
    inputs, _ = proofs.normal_operands(case)
    inputs[0] = values[:, None].expand(-1, c)
    y, mean, rstd = raw_forward(inputs)
    assert torch.equal(mean, values.float())
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1000.0), rtol=2**-22, atol=0)
    _, beta, weight, bias = (t.double() for t in inputs[1:])
    exact = (beta @ weight.t() + bias).expand_as(y)
    magnitude = (beta.abs() @ weight.abs().t() + bias.abs()).expand_as(y)
    testing.assert_componentwise(y, exact, magnitude, c + 1, "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [(False, False, False), (True, True, True)], ids=["without", "with"])
@pytest.mark.parametrize("c", [3, 17, 67, 255])
def test_what_is_beside_a_row_is_none_of_it(c, given, dtype):
    """Of lanes beside C channels, −μ·r may overflow what is computed in; times 0 that would be NaN."""
    values = torch.tensor([100.75, 6e4] if dtype == "fp16" else [100.75, 6e4, 3e36]).to(proofs.DTYPES[dtype])
    inputs, dy = proofs.normal_operands(NormLinearCase(dtype, (len(values),), c, 5, given=given))
    inputs[0] = values[:, None].expand(-1, c).contiguous()
    actual = proofs.on_kernels(NormLinearCase(dtype, (len(values),), c, 5, given=given), inputs, dy)
    assert actual["y"].isfinite().all()
    assert actual["dx"].isfinite().all()


@pytest.mark.parametrize("c", [40, 96, 255])
def test_fp16_rows_as_large_as_they_get(c):
    def make(case, device, seed):
        (x, *parameters), dy = proofs.normal_operands(case, device, seed)
        x = (x.double() * 3e4).clamp(-65504, 65504).half()
        assert x.abs().max() == 65504
        return [x, *parameters], dy

    proofs.prove_rounding(NormLinearCase("fp16", (60,), c, 40), make=make)


@pytest.mark.parametrize("dtype, of_gamma, of_weight", [
    ("bf16", 6.0, 0.1), ("fp16", 6.0, 0.1), ("fp16", 1e-4, 0.02),
], ids=["u over all of GELU, bf16", "u over all of GELU, fp16", "W∘γ would underflow"])  # fmt: skip
@pytest.mark.parametrize("c", [96, 264])
def test_gamma_of_any_size(c, dtype, of_gamma, of_weight):
    """What is made again in the backward pass is no further off than what PyTorch kept."""

    def make(case, device, seed):
        (x, gamma, beta, weight, bias), dy = proofs.normal_operands(case, device, seed)
        random = torch.Generator().manual_seed(7)
        gamma, weight = (
            (torch.randn(t.shape, generator=random) * size).to(t.dtype)
            for t, size in ((gamma, of_gamma), (weight, of_weight))
        )
        return [x, gamma, beta * 0, weight, bias * 0], dy

    proofs.prove_rounding(NormLinearCase(dtype, (150,), c, 64, "gelu", arch=90), make=make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [40, 255])
def test_rows_of_zeros_without_epsilon(c, dtype):
    """0 / 0, as in PyTorch; the rows beside are as they would be."""
    case = NormLinearCase(dtype, (5,), c, 8)
    inputs, dy = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, inputs, dy, eps=0.0)
    inputs[0][2] = 0
    actual = proofs.on_kernels(case, inputs, dy, eps=0.0)
    assert all(t.isnan()[2].all() for t in (actual["y"], actual["dx"], proofs.by_pytorch(case, inputs, dy, 0.0)["y"]))
    for name in ("y", "dx"):
        assert torch.equal(actual[name][[0, 1, 3, 4]], expected[name][[0, 1, 3, 4]])


@pytest.mark.parametrize("c", [1, 40, 96, 255])
@pytest.mark.parametrize("size", [1e18, 1e30, 3e38])
def test_huge_rows(size, c):
    """Where squares overflow, or the sum does, nothing is worse than with PyTorch."""
    case = NormLinearCase("bf16", (6,), c, 8)
    inputs, dy = proofs.normal_operands(case)
    x = inputs[0] = (inputs[0].sign() * size).bfloat16()
    x[3:] = x[3:].abs()
    actual, peer = proofs.on_kernels(case, inputs, dy), proofs.by_pytorch(case, inputs, dy)
    exact = proofs.exactly(case, inputs, dy)
    for name in ("y", "dx"):
        assert (actual[name].isfinite() >= peer[name].isfinite()).all(), name
        ours, theirs = ((t[name].double() - exact[name]).abs().nan_to_num(math.inf) for t in (actual, peer))
        assert (ours.amax(1) <= 2 * theirs.amax(1) + 2**-7 * exact[name].abs().amax(1)).all(), name


# Inf and NaN


@pytest.mark.parametrize(
    "case", [case._replace(shape=(7,), x="slice") for case in EACH_WAY.values()], ids=list(EACH_WAY)
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_stays_in_its_row(case, value):
    inputs, dy = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, inputs, dy)
    others = [0, 1, 3, 4, 5]
    inputs[0][2, case.c // 2] = value
    dy[6, case.d - 1] = value
    actual = proofs.on_kernels(case, inputs, dy)
    assert torch.equal(actual["y"][[*others, 6]], expected["y"][[*others, 6]])
    assert actual["y"][2].isnan().all()
    assert torch.equal(actual["dx"][others], expected["dx"][others])
    assert not actual["dx"][[2, 6]].isfinite().any()
    finite = proofs.by_pytorch(case, inputs, dy)
    for name in proofs.NAMES[2:]:
        assert (actual[name].isfinite() <= finite[name].isfinite()).all(), name
    # Outputs whose du is finite: the bias' gradient knows of no other.
    if case.activation is None:
        assert actual["dbias"].isfinite().tolist() == [k != case.d - 1 for k in range(case.d)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [40, 200])
def test_gelu_of_infinite_outputs(c, dtype):
    case = NormLinearCase(dtype, (5,), c, 8, "gelu")
    inputs, dy = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, inputs, dy)
    inputs[4][2], inputs[4][5], inputs[4][7] = math.inf, -math.inf, math.nan
    y, dx, dbias = (proofs.on_kernels(case, inputs, dy)[name] for name in ("y", "dx", "dbias"))
    assert (y[:, 2] == math.inf).all()
    assert (y[:, 5] == 0).all()
    assert y[:, 7].isnan().all()
    assert torch.equal(y[:, [0, 1, 3, 4, 6]], expected["y"][:, [0, 1, 3, 4, 6]])
    testing.assert_componentwise(dbias[2:3], dy[:, 2:3].double().sum(0), dy[:, 2:3].double().abs().sum(0), 5, "dbias")
    assert dbias[5] == 0
    assert dbias[7].isnan()
    assert dx.isnan().all()  # by the output that is NaN
    inputs[4][7] = 0
    assert proofs.on_kernels(case, inputs, dy)["dx"].isfinite().all()


# T4: gradients


@pytest.mark.parametrize("case", [
    NormLinearCase("fp32", (9,), 64, 33, arch=90), NormLinearCase("fp32", (70,), 256, 5, arch=80),
    NormLinearCase("bf16", (9,), 16, 5), NormLinearCase("fp16", (9,), 16, 5),
], ids=str)  # fmt: skip
def test_adjoint_identities_in_integers(case):
    """y is linear in W with the bias, and in γ with β; dx has no part along 1 and x̂. All of that exactly."""
    inputs, dy, eps, *_ = proofs.integer_operands(case, "cpu")
    case = case._replace(x_dtype=None)
    if case.dtype != "fp32":  # what is summed up here has not been rounded
        inputs = [t.clamp(-1, 1) if i else t for i, t in enumerate(inputs)]
        dy = dy.clamp(-1, 1)
    actual = {name: t.double() for name, t in proofs.on_kernels(case, inputs, dy, eps=eps).items()}
    x, gamma, beta, weight, bias = (t.double() for t in inputs)
    y, g = actual["y"], dy.double()
    assert (y * g).sum() == (weight * actual["dweight"]).sum() + (bias * actual["dbias"]).sum() != 0
    without = ((y - bias) * g).sum()
    assert without == (gamma * actual["dnorm_weight"]).sum() + (beta * actual["dnorm_bias"]).sum() != 0
    if case.dtype == "fp32":
        assert actual["dx"].sum(-1).abs().max() == 0
        assert (actual["dx"] * x).sum(-1).abs().max() == 0
        assert actual["dx"].abs().max() > 1


@pytest.mark.parametrize("case", [
    NormLinearCase("fp32", (5,), 7, 6, "gelu"), NormLinearCase("fp32", (5,), 150, 6, "gelu", mean=1.0),
    NormLinearCase("fp32", (5,), 40, 6, None, arch=90),
], ids=str)  # fmt: skip
def test_gradients_are_differences_in_float64(case):
    """Along random directions, of each of the five tensors: central differences of PyTorch's operators in float64."""
    inputs, dy = proofs.normal_operands(case)
    actual = proofs.on_kernels(case, inputs, dy)
    wide = [t.double() for t in inputs]
    random = torch.Generator().manual_seed(1)
    for i, t in enumerate(wide):
        direction, step = torch.randn(t.shape, generator=random, dtype=torch.float64), 1e-5
        ends = []
        for sign in (1, -1):
            x, gamma, beta, weight, bias = (w + sign * step * direction if i == j else w for j, w in enumerate(wide))
            y = F.linear(F.layer_norm(x, (case.c,), gamma, beta, proofs.EPS), weight, bias)
            ends.append(((F.gelu(y) if case.activation else y) * dy).sum())
        difference = (ends[0] - ends[1]) / (2 * step)
        gradient = actual[proofs.NAMES[1 + i]].double()
        scale = (gradient * direction).abs().sum()
        assert abs((gradient * direction).sum() - difference) < 1e-6 * scale, proofs.NAMES[1 + i]


def test_second_derivatives_raise():
    leaves = requiring_grad(norm_linear_operands((3, 8), 5, dtype=torch.float32))
    with dk.backend("triton"):
        y = dk.layer_norm_linear(*leaves, activation="gelu")
    (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative .*backend\("torch"\)'):
        (dx.square().sum() + y.sum()).backward()


# T5: the same bits


@each_way
def test_same_bits_in_every_order_of_programs(case):
    inputs, dy = proofs.normal_operands(case)
    results = []
    for order in ORDERS:
        with Guard(order) as guard:
            results.append(proofs.on_kernels(case, inputs, dy))
        assert sum(launch.grid[0] > 1 for launch in guard.launches) >= 5
    for result in results[1:]:
        assert_same_bits(result, results[0])


@each_way
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
def test_same_bits_of_y_and_dx_alone_and_in_a_batch(case, layout):
    case = case._replace(x=layout, shape=(140,), few=bool(case.few))
    (x, *parameters), dy = proofs.normal_operands(case)
    wanted = (True, False, False, False, False)
    batch = proofs.on_kernels(case, [x, *parameters], dy, wanted)
    # NumPy's product of a tile has bits that depend on where in it a row is, which stays the same here.
    for rows in (slice(0, 1), slice(0, 75), slice(128, 140)):
        alone = proofs.on_kernels(case._replace(shape=x[rows].shape[:1]), [x[rows], *parameters], dy[rows], wanted)
        assert_same_bits(alone, {name: t[rows] for name, t in batch.items()})
