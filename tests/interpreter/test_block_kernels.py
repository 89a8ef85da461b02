"""The block's kernels in Triton's interpreter, under the guard: right, the same every time."""

import math

import pytest
import torch

import dwconv_kernels as dk
from tests import block_cases as cases
from tests import block_proofs as proofs
from tests.block_cases import BlockCase, block_cases
from tests.cases import DTYPES, LAYOUTS
from tests.dwconv_kernels.operands import block_operands, requiring_grad
from tests.interpreter_guard import ORDERS, Guard

# Rows beside the last one are rows of zeros to the kernels, which with ε = 0 have no normalisation; nobody reads them.
pytestmark = [
    pytest.mark.usefixtures("guard"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
HALF = ["bf16", "fp16"]
INPUTS = [i for i in range(13) if i != proofs.ROW_SCALE]

# Each kernel that makes out, and each that makes h and du: weights on chip, or one block of hidden channels after the
# other, or two launches; rows in one piece and in two; u computed again, or kept; the norm over an image.
EACH_WAY = {
    "resident": BlockCase("bf16", 3, 40, 1, 49, 64, 1, 1, row_scale=True, arch=90, few=False, resident=True),
    "fused": BlockCase("fp16", 3, 24, 1, 49, 72, 1, 1, row_scale=True, arch=90, few=False),
    "fused, not ahead": BlockCase("bf16", 3, 40, 1, 49, 40, 1, 1, row_scale=True, arch=80, few=False),
    "hidden": BlockCase("bf16", 3, 24, 2, 25, 72, 1, 3, row_scale=True, arch=90, few=True),
    "fp32": BlockCase("fp32", 3, 17, 2, 25, 35, 3, 1, row_scale=True, arch=89),
    "wide": BlockCase("fp16", 3, 72, 1, 49, 24, 1, 1, row_scale=True, arch=80, few=True),
    "u kept": BlockCase("bf16", 3, 72, 1, 49, 35, 1, 1, row_scale=True, arch=80, memory="fast"),
    "norm over an image": BlockCase("bf16", 3, 24, 1, 49, 35, 1, 1, row_scale=True, grn=True),
}
each_way = pytest.mark.parametrize("case", EACH_WAY.values(), ids=list(EACH_WAY))
SMALL = {name: case._replace(h=2, w=3) for name, case in EACH_WAY.items()}  # three images in one block of rows
each_way_small = pytest.mark.parametrize("case", SMALL.values(), ids=list(SMALL))


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        a, e = bits(a), bits(expected[name])
        assert torch.equal(a, e), f"{name} differs in {int(a.ne(e).sum())} of {a.numel()} elements"


def launched(launches):
    names = [launch.kernel for launch in launches if launch.kernel.startswith("_block_")]
    return [name.removeprefix("_block_").removesuffix("_kernel") for name in names]


def test_each_way_is_another_one():
    ways = {(case.forward()[0], case.backward()[0], case.given_u, case.dtype) for case in EACH_WAY.values()}
    assert len(ways) == 8
    kernels = {kernel for case in EACH_WAY.values() for kernel in case.kernels()}
    from dwconv_kernels.block import kernels as module

    assert kernels == {name.removeprefix("_block_").removesuffix("_kernel") for name in module.__all__}


# T0: every element


def test_the_cover_meets_everything_that_can_be_chosen():
    met = {(case.dtype != "fp32", way) for case in block_cases() for way in (case.forward(), case.backward())}
    assert met == set(cases.choices())


@pytest.mark.parametrize("field, values", [
    ("c", cases.WIDTHS), ("x", LAYOUTS), ("dout", LAYOUTS), ("parameters", cases.PARAMETER_LAYOUTS),
    ("norm", cases.NORMS), ("biases", cases.BIASES), ("arch", cases.ARCHS), ("order", ORDERS),
    ("memory", ("default", "lean", "fast")), ("few", (None, True, False)), ("resident", (True, False)),
], ids=str)  # fmt: skip
def test_the_cover_meets_every_value(field, values):
    assert {getattr(case, field) for case in block_cases()} == set(values)
    assert {(case.n, case.h, case.w) for case in block_cases()} == set(cases.MAPS)
    assert {(case.kh, case.kw) for case in block_cases()} == set(cases.KERNELS)


@pytest.mark.parametrize("case", block_cases(), ids=str)
def test_exact_on_integers(case):
    with Guard(case.order) as guard:
        proofs.prove_exact(case)
    # What ran is what the cover takes to be covered. Of a dout that begins elsewhere, d is always stored.
    names = launched(guard.launches)
    assert names == case.kernels() or [name for name in names if name != "bwd_gradient"] == case.kernels()


# T1, T2, T3: rounding


ROUNDED = [
    BlockCase("fp32", 3, 16, 3, 11, 72, 7, 7, row_scale=True, arch=90, few=False),
    BlockCase("fp32", 2, 40, 2, 18, 128, 3, 3, arch=90, few=False, resident=True),
    BlockCase("fp32", 2, 96, 1, 35, 136, 1, 1, norm=(False, False), biases=(False, False, False), arch=80, few=False),
    BlockCase("fp32", 2, 33, 3, 12, 100, 1, 3, row_scale=True, grn=True, layer_scale=False),
    BlockCase("fp32", 1, 200, 1, 35, 136, 1, 1, memory="fast", arch=89, few=False),
    BlockCase("fp32", 3, 17, 2, 13, 5, 3, 3, norm=(True, False), memory="lean", arch=90),
]


# Each in fp32 and in one of the half types.
@pytest.mark.parametrize("case", [
    case._replace(dtype=dtype) for i, case in enumerate(ROUNDED) for dtype in ("fp32", HALF[i % 2])
], ids=str)  # fmt: skip
def test_rounding(case):
    proofs.prove_rounding(case)


@pytest.mark.full
@pytest.mark.parametrize("case", EACH_WAY.values(), ids=list(EACH_WAY))
@pytest.mark.parametrize("seed", [1, 2])
def test_rounding_each_way(case, seed):
    proofs.prove_rounding(case._replace(d=4 * case.c if case.d % 64 == 0 else case.d, kh=7, kw=7), seed=seed)


@pytest.mark.parametrize("dtype, x_dtype, layer_scale", [
    ("bf16", "fp32", True), ("fp16", "fp32", False), ("bf16", "bf16", True), ("fp16", "fp16", False),
])  # fmt: skip
def test_rounding_in_autocast(dtype, x_dtype, layer_scale):
    case = BlockCase(dtype, 2, 40, 2, 18, 72, 1, 3, row_scale=True, layer_scale=layer_scale, x_dtype=x_dtype, few=False)
    proofs.prove_rounding(case._replace(arch=90 if layer_scale else 0))


def with_changes(change):
    """normal_operands whose tensors ``change`` has changed; float64 values of dtypes and layouts as before."""

    def make(case, device, seed):
        tensors, dout = proofs.normal_operands(case, device, seed)
        return change(list(tensors), dout)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean, std", [(100.0, 1.0), (0.0, 1e3)], ids=["mean", "std"])
def test_maps_far_from_zero(dtype, mean, std):
    def change(tensors, dout):
        tensors[0] = (tensors[0].double() * std + mean).to(tensors[0].dtype)
        tensors[1] = tensors[1].abs()  # all of one sign, so that the mean gets through the convolution
        return tensors, dout

    case = BlockCase(dtype, 2, 40, 2, 18, 72, 3, 3, row_scale=True, arch=90, few=False)
    proofs.prove_rounding(case, make=with_changes(change))


@pytest.mark.parametrize("c, memory", [(40, "default"), (72, "default"), (72, "fast")])
@pytest.mark.parametrize("dtype", HALF)
def test_biases_of_any_size(dtype, c, memory):
    """What is made of a u that was rounded is no further off than what PyTorch makes of what it kept."""

    def change(tensors, dout):
        tensors[6] = tensors[6] * 30
        return tensors, dout

    case = BlockCase(dtype, 2, c, 1, 35, 72, 1, 1, memory=memory, arch=80, few=False)
    proofs.prove_rounding(case, make=with_changes(change))


@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 3e4], ids=["dout near 1", "scaled loss"])
@pytest.mark.parametrize("few", [False, True], ids=["rows", "hidden"])
def test_layer_scale_of_a_network_that_begins(few, upstream, grn):
    """λ = 1e-6 in fp16, where d∘λ is no normal number: what PyTorch has neither vanishes nor overflows."""

    def change(tensors, dout):
        tensors[9] = torch.full_like(tensors[9], 1e-6)
        return tensors, (dout.double() * upstream).clamp(-6e4, 6e4).half()

    case = BlockCase("fp16", 2, 40, 1, 35, 72, 1, 1, grn=grn, arch=90, few=few)
    actual = proofs.prove_rounding(case, make=with_changes(change))
    for name in ("dfc1_weight", "dfc1_bias", "dnorm_weight", "ddw_weight"):
        assert actual[name].count_nonzero() > 0.9 * actual[name].numel(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [1, 33], ids=["one channel", "all channels"])
def test_hidden_channels_that_are_zero_in_the_norm_over_an_image(zeros, dtype):
    """They have no direction: no 0 / 0."""

    def change(tensors, dout):
        tensors[5][:zeros] = 0
        tensors[6][:zeros] = 0
        return tensors, dout

    case = BlockCase(dtype, 2, 17, 1, 25, 33, 1, 1, row_scale=True, grn=True)
    actual = proofs.prove_rounding(case, make=with_changes(change))
    assert all(t.isfinite().all() for t in actual.values())


# Dropped images, and what is not finite


@each_way_small
def test_what_a_dropped_image_holds_shows_in_nothing(case):
    """Its branch is not computed, or not used: out is x there, dx is dout, and no gradient knows of it."""
    assert case.row_scale
    tensors, dout = proofs.normal_operands(case)
    dropped, kept = [0], [1, 2]
    assert tensors[proofs.ROW_SCALE].ne(0).tolist() == [False, True, True]
    expected = proofs.on_kernels(case, tensors, dout)
    tensors[0][dropped] = 1.5 - 7 * tensors[0][dropped]
    actual = proofs.on_kernels(case, tensors, dout)
    assert torch.equal(actual["out"][dropped], tensors[0][dropped])
    assert torch.equal(actual["dx"][dropped], dout[dropped])
    assert_same_bits(
        {name: t[kept] if name in ("out", "dx") else t for name, t in actual.items()},
        {name: t[kept] if name in ("out", "dx") else t for name, t in expected.items()},
    )


@each_way_small
def test_a_branch_that_would_be_infinite_is_dropped(case):
    """Where ρ is 0, 0·∞ would be NaN. All images are dropped; then only the convolution sees them."""
    case = case._replace(n=2)
    tensors, dout = proofs.normal_operands(case)
    tensors[7] = tensors[7] * (1e4 if case.dtype == "fp16" else 1e38)
    if not case.grn:  # the norm over an image takes sums of what dropped images hold, for the others
        tensors[5] = tensors[5] * (1e4 if case.dtype == "fp16" else 1e36)
    tensors[proofs.ROW_SCALE] = torch.ones_like(tensors[proofs.ROW_SCALE])
    assert not proofs.on_kernels(case, tensors, dout)["out"].isfinite().all()
    tensors[proofs.ROW_SCALE] = torch.zeros_like(tensors[proofs.ROW_SCALE])
    actual = proofs.on_kernels(case, tensors, dout)
    assert torch.equal(actual.pop("out"), tensors[0])
    assert torch.equal(actual.pop("dx"), dout)
    for name, t in actual.items():
        assert torch.equal(t, torch.zeros_like(t)), name


@pytest.mark.parametrize("case", [
    SMALL[name] for name in ("resident", "fused", "hidden")
], ids=str)  # fmt: skip
def test_an_image_whose_convolution_overflows_and_is_dropped(case):
    """PyTorch makes NaN of it, 0·∞; here x goes on to the next block."""
    tensors, dout = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, tensors, dout)["out"]
    tensors[0][0] = torch.finfo(tensors[0].dtype).max
    tensors[1] = tensors[1] * 16
    scaled = proofs.on_kernels(case, tensors, dout)["out"]
    assert torch.equal(scaled[0], tensors[0][0])
    assert scaled[1:].isfinite().all()
    assert expected.isfinite().all()


@pytest.mark.parametrize("case, value", [
    (case, (math.nan, -math.inf)[i % 2]) for i, case in enumerate(SMALL.values())
], ids=list(SMALL))  # fmt: skip
def test_what_is_not_finite_stays_in_its_image(case, value):
    case = case._replace(row_scale=False)
    tensors, dout = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, tensors, dout)
    tensors[0][1, case.c // 2, 1, 1] = value
    dout[1, 0, 0, 0] = math.nan
    actual = proofs.on_kernels(case, tensors, dout)
    for name in ("out", "dx"):
        assert torch.equal(actual[name][[0, 2]], expected[name][[0, 2]]), name
        assert not actual[name][1].isfinite().all()
    peer = proofs.by_pytorch(case, tensors, dout)
    for name in proofs.NAMES[2:]:  # nor is it lost
        assert name not in actual or not actual[name].isfinite().all() or peer[name].isfinite().all(), name


# T4: gradients


@pytest.mark.parametrize("case", [
    BlockCase("fp32", 2, 7, 3, 4, 9, row_scale=True), BlockCase("fp32", 2, 7, 3, 4, 9, grn=True),
    BlockCase("fp32", 1, 136, 2, 3, 9, memory="fast"),
], ids=str)  # fmt: skip
def test_gradients_are_differences_in_float64(case):
    """Along random directions, of each tensor: central differences of PyTorch's operators in float64."""
    tensors, dout = proofs.normal_operands(case)
    actual = proofs.on_kernels(case, tensors, dout)
    wide = [None if t is None else t.double() for t in tensors]
    random = torch.Generator().manual_seed(1)
    for name, i in zip(proofs.NAMES[1:], INPUTS, strict=True):
        if wide[i] is None:
            continue
        direction, step = torch.randn(wide[i].shape, generator=random, dtype=torch.float64), 1e-5
        ends = []
        for sign in (1, -1):
            moved = [t if i != j else t + sign * step * direction for j, t in enumerate(wide)]
            out = proofs._composed(moved[0], *moved, proofs.EPS, lambda t: t)
            ends.append((out * dout.double()).sum())
        gradient = actual[name].double()
        difference = (gradient * direction).sum() - (ends[0] - ends[1]) / (2 * step)
        assert abs(difference) < 2e-6 * (gradient * direction).abs().sum(), name


def test_second_derivatives_raise():
    leaves = requiring_grad(block_operands((1, 4, 3, 3), (3, 3), 5, dtype=torch.float32))
    with dk.backend("triton"):
        out = dk.convnext_block(*leaves)
    (dx,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative .*backend\("torch"\)'):
        (dx.square().sum() + out.sum()).backward()


# T5: the same bits


@each_way
def test_same_bits_in_every_order_of_programs(case):
    tensors, dout = proofs.normal_operands(case)
    results = []
    for order in ORDERS[:2]:  # the cover has the third one, too
        with Guard(order) as guard:
            results.append(proofs.on_kernels(case, tensors, dout))
        assert sum(launch.grid[0] > 1 for launch in guard.launches) >= 4
    assert_same_bits(*results)


@pytest.mark.full
def test_exact_sums_of_many_rows():
    """More blocks of them than are summed at once, and several for each program of the resident kernel."""
    case = BlockCase("bf16", 1, 16, 3, 1400, 64, 1, 1, arch=90, few=False, resident=True, row_scale=True)
    assert case.rows > 64 * 64
    proofs.prove_exact(case)
