"""The depthwise kernels for tensor cores, on the emulator: right, the same every time, and taken where they pay."""

import random
import types
from unittest import mock

import pytest
import torch

import dwconv_kernels as dk
from dwconv_kernels import runtime, testing
from dwconv_kernels.gluon_emulator import emulate
from tests import depthwise_proofs as proofs
from tests.cases import BIAS_LAYOUTS, LAYOUTS, MEANS, WEIGHT_LAYOUTS, KernelCase
from tests.interpreter_guard import ORDERS, Guard
from tests.tensor_cases import CUTS, HALF, kernel_of, tensor_cases

LAUNCH = runtime.launchers("depthwise")
CONFIG = LAUNCH.tensor.config


def numbers(order, count):
    """0 … count − 1 in one of ORDERS."""
    found = list(range(count))[:: -1 if order == "reverse" else 1]
    return random.Random(count).sample(found, count) if order == "shuffled" else found


def programs_in(order):
    """The emulator runs programs in one of ORDERS, and says which kernels it ran."""
    ran = []

    def run(kernel, programs, *args, **constants):
        ran.append((kernel.fn.__name__, constants))
        emulate(kernel, programs, *args, order=numbers(order, programs), **constants)

    return mock.patch.object(LAUNCH.tensor, "emulate", run), ran


def normal(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# T0: every element


def every_change() -> list:
    """All cases; of those with other paddings than "same", every change has a third."""
    others = [case for case in tensor_cases() if not case.same]
    left = set(others) - set(others[::3])
    return [pytest.param(case, marks=pytest.mark.full) if case in left else case for case in tensor_cases()]


@pytest.mark.parametrize("case", every_change(), ids=str)
def test_exact_on_integers(case):
    patch, ran = programs_in(case.order)
    with patch, Guard(case.order) as guard:
        proofs.prove_exact(case)
    names = [name for name, _ in ran]
    assert [("bwd_weight" in name) for name in names] == [False, False, True]  # y, dx, dw
    assert not any(launch.kernel in ("_depthwise_taps_kernel", "_depthwise_sum_kernel") for launch in guard.launches)


def test_the_cases_meet_every_kernel_and_every_value():
    met = set()
    for case in tensor_cases():
        choice = CONFIG.pick_forward(case.kh, case.kw, 0)
        kernel = kernel_of(choice)
        met |= {(kernel, case.dtype), (kernel, case.order), (kernel, case.same), (kernel, case.c % 8 == 0)}
        met |= {(case.x,), (case.dy,), (case.weight,), (case.bias,), (case.cut,), (kernel, case.n > 1)}
        met |= {(kernel, "small map", case.h < case.kh, case.w < case.kw)}
    for kernel in ("stream", "large"):
        assert {(kernel, dtype) for dtype in HALF} <= met
        assert {(kernel, "small map", True, True), (kernel, "small map", False, False)} <= met
        assert {(kernel, True), (kernel, False)} <= met
    for values in (LAYOUTS, WEIGHT_LAYOUTS, BIAS_LAYOUTS, CUTS):
        assert {(value,) for value in values} <= met


RESIDUALS = [
    KernelCase("bf16", 2, 17, 9, 13, 7, 7, 3, 3, cut="tensor 8 rows"),
    KernelCase("fp16", 1, 8, 14, 14, 13, 13, 6, 6, cut="tensor whole"),
    KernelCase("bf16", 1, 8, 23, 9, 21, 21, 10, 10, cut="tensor whole"),
    KernelCase("fp16", 2, 5, 7, 9, 31, 31, 15, 15, cut="tensor whole"),
]


@pytest.mark.parametrize("case", RESIDUALS, ids=str)
@pytest.mark.parametrize("residual, dx", [("same", "same"), ("fp32", "fp32"), ("fp32", "same"), ("same", "fp32")])
def test_input_gradient_with_a_residual(case, residual, dx):
    residual, dx = (case.dtype if name == "same" else name for name in (residual, dx))
    for layout in ("channels_last", "contiguous"):
        proofs.prove_residual(case, residual, dx, layout)
    proofs.prove_residual_rounding(case._replace(n=1, c=8), residual, dx)


# T1, T2, T3: rounding

ROUNDED = [
    KernelCase("bf16", 2, 16, 9, 14, 7, 7, 3, 3, cut="tensor whole"),
    KernelCase("bf16", 1, 16, 14, 14, 13, 13, 6, 6, cut="tensor 8 rows"),
    KernelCase("bf16", 1, 8, 12, 12, 21, 21, 10, 10, cut="tensor whole"),
    KernelCase("bf16", 1, 8, 20, 9, 31, 31, 15, 15, cut="tensor whole"),
    KernelCase("bf16", 1, 8, 26, 9, 51, 5, 25, 2, cut="tensor whole"),
]


@pytest.mark.parametrize("case, mean", [
    (case._replace(dtype=dtype), MEANS[(i + j) % 4]) for i, case in enumerate(ROUNDED) for j, dtype in enumerate(HALF)
], ids=str)  # fmt: skip
def test_rounding(case, mean):
    proofs.prove_rounding(case, mean)


# T4, T5


@pytest.mark.parametrize("case", RESIDUALS, ids=str)
def test_adjoint_identity_in_integers(case):
    inputs, g = proofs.operands(case._replace(bias="none"), testing.integers)
    y, dx, dw = (t.double() for t in proofs.on_kernels(case, inputs, g))
    x, w, _ = inputs
    # The values are below 2^8 · …, where half types are exact for kernels like these but for the largest.
    exact = [t.double() for t in proofs.exactly(case._replace(bias="none"), inputs, g)]
    assert (exact[0] * g.double()).sum() == (x.double() * exact[1]).sum() == (w.double() * exact[2]).sum() != 0
    for actual, expected, t in zip((y, dx, dw), exact, (y, dx, dw), strict=True):
        assert torch.equal(actual, expected.to(proofs.DTYPES[case.dtype]).double()), t.shape


@pytest.mark.parametrize(
    "case", [*RESIDUALS, KernelCase("bf16", 5, 8, 20, 30, 7, 7, 3, 3, cut="tensor 8 rows")], ids=str
)
def test_the_same_bits_in_every_order_and_however_the_map_is_cut(case):
    inputs, dy = proofs.operands(case, normal)
    results = []
    for order in ORDERS:
        patch, _ = programs_in(order)
        with patch, Guard(order):
            results.append(proofs.on_kernels(case, inputs, dy))
    for other in results[1:]:
        assert all(
            torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(other, results[0], strict=True)
        )
    y, dx = proofs.on_kernels(case._replace(cut="tensor 16 rows, 2 tiles"), inputs, dy)[:2]
    assert torch.equal(y, results[0][0])
    assert torch.equal(dx, results[0][1])


# Which kernels run


def ran(case, strict=False):
    inputs, dy = proofs.operands(case, testing.integers)
    patch, kernels = programs_in("forward")
    with patch, Guard() as guard, dk.backend("triton"), dk.strict() if strict else mock.MagicMock():
        leaves = [t.detach().requires_grad_() for t in inputs]
        dk.depthwise_conv2d(*leaves, padding=(case.ph, case.pw)).backward(dy)
    return [name for name, _ in kernels], [launch.kernel for launch in guard.launches]


def test_half_types_run_on_tensor_cores_from_7_by_7_on():
    emulated, interpreted = ran(KernelCase("bf16", 1, 8, 2, 3, 7, 7, 3, 3))
    assert emulated == ["_depthwise_fwd_stream_kernel"] * 2 + ["_depthwise_bwd_weight_stream_kernel"]
    assert interpreted == ["_depthwise_fragments_kernel"] * 2 + ["_depthwise_diagonals_kernel"]
    for case in (
        KernelCase("fp32", 1, 8, 2, 3, 7, 7, 3, 3),
        KernelCase("bf16", 1, 9, 2, 3, 7, 7, 3, 3),
        KernelCase("bf16", 1, 8, 2, 3, 5, 5, 2, 2),
    ):
        assert ran(case)[0] == []


def test_strict_kernels_use_no_tensor_cores():
    emulated, interpreted = ran(KernelCase("bf16", 16, 8, 2, 3, 7, 7, 3, 3), strict=True)
    assert emulated == []
    assert "_depthwise_fwd_kernel" in interpreted
    x, w = torch.zeros(1, 8, 20, 20, dtype=torch.bfloat16), torch.zeros(8, 1, 21, 21, dtype=torch.bfloat16)
    assert dk.supports(dk.depthwise_conv2d, x, w, padding=10) == (True, "")
    with dk.strict():
        taken, reason = dk.supports(dk.depthwise_conv2d, x, w, padding=10)
    assert not taken
    assert "beyond 17×17" in reason
    assert "strict kernels" in reason


def test_a_backward_pass_in_strict_mode_of_what_only_tensor_cores_take():
    case = KernelCase("bf16", 1, 8, 6, 5, 19, 19, 9, 9)
    inputs, dy = proofs.operands(case, testing.integers)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with dk.backend("triton"):
        y = dk.depthwise_conv2d(*leaves, padding=9)
    with dk.strict():
        y.backward(dy)
    for leaf, expected in zip(leaves, proofs.exactly(case, inputs, dy)[1:], strict=True):
        testing.assert_exact(leaf.grad, expected)


@pytest.mark.parametrize("size, kernel", [(14, 31), (7, 31), (7, 51), (10, 51), (9, 31)])
def test_taps_that_no_output_needs_are_left_out(size, kernel):
    """A 31×31 kernel over 14×14 is a 27×27 one; and the gradients of the other taps are zero."""
    case = KernelCase("bf16", 1, 8, size, size, kernel, kernel, kernel // 2, kernel // 2, cut="tensor whole")
    patch, kernels = programs_in("forward")
    with patch:
        proofs.prove_exact(case)
    cut = min(k for k in (*CONFIG.CUTS, kernel) if k >= 2 * size - 1)
    assert cut < kernel
    groups = [constants["GROUPS"] for _, constants in kernels]
    assert groups[0] == CONFIG.pick_forward(cut, cut, 0).patches.groups


# Inf and NaN


@pytest.mark.parametrize("case", [
    KernelCase("bf16", 3, 9, 20, 22, 7, 7, 3, 3, cut="tensor whole"),
    KernelCase("fp16", 3, 9, 40, 40, 13, 13, 6, 6, cut="tensor whole"),
    KernelCase("fp16", 2, 9, 50, 50, 21, 21, 10, 10, cut="tensor whole"),
], ids=str)  # fmt: skip
def test_inf_and_nan_stay_near_and_in_their_image_and_channel(case):
    """They reach what they should, and beyond that no further than the blocks of a window stick out of it."""
    inputs, dy = proofs.operands(case, lambda shape: normal(shape).abs() + 0.1)
    h, w = case.h // 2, case.w // 2
    inputs[0][1, 2, h, w] = float("inf")
    inputs[0][1, 4, h, w] = float("nan")
    y = proofs.on_kernels(case, inputs, dy, (False, True, False))[0]
    should = proofs.exactly(case, inputs, dy)[0]
    wrong = y.isfinite().logical_not()
    assert wrong[should.isfinite().logical_not()].all()
    assert not wrong[[0, *range(2, case.n)]].any()
    assert not wrong[:, [0, 1, 3, *range(5, case.c)]].any()
    p = CONFIG.pick_forward(case.kh, case.kw, 0).patches
    rows, columns = wrong[1, 2].any(1).nonzero(), wrong[1, 2].any(0).nonzero()
    reach_h, reach_w = p.R * p.groups - case.kh + p.R, 2 * p.pairs * p.T - case.kw
    assert rows.min() >= h - case.ph - reach_h
    assert rows.max() <= h + case.ph + reach_h
    assert columns.min() >= w - case.pw - reach_w
    assert columns.max() <= w + case.pw + reach_w


# What a version of Triton does not compile


@pytest.fixture
def refusing(monkeypatch):
    """As on a GPU, but nothing is launched: Triton compiles no kernel."""

    class Kernel:
        def __init__(self, name):
            self.fn = types.SimpleNamespace(__name__=name)

        def __getitem__(self, grid):
            def refuse(*args, **settings):
                raise RuntimeError("a pass\nPassManager::run failed")

            return refuse

    monkeypatch.setattr(LAUNCH.tensor.runtime, "INTERPRETER", False)
    monkeypatch.setattr(LAUNCH.tensor, "_refusals", {})
    for name in (LAUNCH.tensor._LARGE, LAUNCH.tensor._STREAM, LAUNCH.tensor._GRADIENT):
        monkeypatch.setattr(LAUNCH.tensor.kernels_gluon, name, Kernel(name))


@pytest.mark.parametrize("case", [
    KernelCase("bf16", 2, 8, 3, 4, 7, 7, 3, 3), KernelCase("fp16", 2, 8, 9, 8, 19, 21, 9, 10),
], ids=["others", "none but PyTorch's"])  # fmt: skip
def test_what_triton_does_not_compile_is_computed_otherwise(case, refusing):
    inputs, dy = proofs.operands(case, testing.integers)
    x, w, b = inputs
    geometry = ((1, 1), (case.ph, case.pw), (1, 1))
    with pytest.warns(UserWarning, match="does not compile _depthwise_fwd_.*: PassManager::run failed; other kernels"):
        y = LAUNCH.depthwise_forward(x, w, b, *geometry)
    with pytest.warns(UserWarning, match="does not compile _depthwise_bwd_weight"):
        gradients = LAUNCH.depthwise_backward(dy, x, w, b, *geometry, (True, True, True))
    for actual, expected in zip((y, *gradients), proofs.exactly(case, inputs, dy), strict=True):
        testing.assert_exact(actual, expected)
    residual = testing.integers(x.shape)
    dx = torch.empty_like(residual)
    LAUNCH.depthwise_input_gradient(dy, w, (case.ph, case.pw), dx, residual)  # without a warning
    testing.assert_exact(dx, proofs.exactly(case, inputs, dy)[1] + residual)


def test_what_triton_does_not_compile_is_said_of_the_kernels_that_it_is_of(monkeypatch):
    monkeypatch.setitem(LAUNCH.tensor._refusals, LAUNCH.tensor._LARGE, "Triton 0 does not compile it")
    x = torch.zeros(1, 8, 20, 20, dtype=torch.bfloat16)
    w = torch.zeros(8, 1, 51, 51, dtype=torch.bfloat16)
    assert dk.supports(dk.depthwise_conv2d, x, w[:, :, :21, :21], padding=10) == (False, "Triton 0 does not compile it")
    for kernel in ((51, 5), (7, 7)):
        weight = w[:, :, : kernel[0], : kernel[1]]
        assert dk.supports(dk.depthwise_conv2d, x, weight, padding=tuple(k // 2 for k in kernel)) == (True, "")


def test_a_gpus_errors_are_not_taken_for_a_compilers():
    from triton.runtime.errors import OutOfResources

    taken = LAUNCH.tensor._is_of_the_compiler
    assert taken(OutOfResources(2, 1, "shared memory"))
    assert taken(RuntimeError("PassManager::run failed"))
    assert not taken(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert not taken(torch.OutOfMemoryError("CUDA out of memory"))
