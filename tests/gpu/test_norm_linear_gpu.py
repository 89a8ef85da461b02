"""Layer norm + linear (+ GELU), compiled: its values, on the interpreter lane's cases and ConvNeXt's; graphs."""

import gc

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests import norm_linear_proofs as proofs
from tests.cases import DTYPES, MEANS
from tests.dwconv_kernels.operands import norm_linear_operands
from tests.gpu.conftest import (
    BACKEND,
    DEVICE,
    ON_GPU,
    captured,
    only_on_gpu,
    parameters,
    repeats,
    requested_memory,
    skip_without_gpu,
)
from tests.gpu.workers import Proof
from tests.norm_linear_cases import NormLinearCase, norm_linear_cases

pytestmark = pytest.mark.gpu
skip_without_gpu()

HALF = ["bf16", "fp16"]
# Rows and channels of ConvNeXt's stages at 224 and 384 pixels; each has four times as many outputs.
STAGES = [(50_176, 96), (12_544, 192), (3136, 384), (784, 768), (9216, 128), (1000, 512), (577, 1024), (196, 320)]
SMALL = NormLinearCase("bf16", (2, 14, 14) if ON_GPU else (2, 3), 96 if ON_GPU else 40, 384 if ON_GPU else 5, "gelu")
WIDE = SMALL._replace(c=384 if ON_GPU else 200, activation="gelu")


def all_proofs() -> tuple[list[Proof], list[Proof]]:
    """Those of any run, what takes longest to compile first, and all."""
    stages = [
        NormLinearCase(dtype, (p,), c, 4 * c, activation)
        for p, c in STAGES for dtype in DTYPES for activation in ("gelu", None)
    ]  # fmt: skip
    exact, cover = stages, norm_linear_cases()
    rounded = [case for case in stages if case.c <= 512 and (case.dtype != "fp32" or case.rows < 10_000)]
    if not ON_GPU:  # a few that are quick
        exact, cover = [], [case for case in norm_linear_cases() if case.seconds() < 0.1][::4]
        rounded = [NormLinearCase(dtype, (60,), 96, 33, activation) for dtype, activation in zip(
            DTYPES, ("gelu", None, "gelu"), strict=True
        )]  # fmt: skip
    rounded = [case._replace(mean=MEANS[i % 4]) for i, case in enumerate(rounded)]
    rounded += [case._replace(x_dtype="fp32") for case in rounded if case.dtype in HALF][:6]
    own = [Proof("rounding", case, DEVICE) for case in rounded] + [Proof("exact", case, DEVICE) for case in exact]
    cover = [Proof("exact", case, DEVICE) for case in cover]
    return own + cover[:: 4 if ON_GPU else 1], cover


@pytest.mark.parametrize("proof", parameters(*all_proofs()))
def test_values(proof, proof_of):
    """T0: every element exact. T1, T2, T3: within its bound, no further off than PyTorch's operators, not biased."""
    proof_of(proof)


@pytest.mark.parametrize("mean", [100.0, 1000.0])
@pytest.mark.parametrize("c", [96, 384])
def test_means_of_many_standard_deviations(c, mean):
    proofs.prove_rounding(NormLinearCase("fp32", (2000 if ON_GPU else 40,), c, 8, mean=mean), DEVICE, far=True)


def operands(case=SMALL, seed=0):
    """Leaves, None for what is not given, and dy."""
    inputs, dy = proofs.normal_operands(case, DEVICE, seed)
    return [t if t is None else t.requires_grad_() for t in inputs], dy


def layer(*tensors, activation="gelu"):
    return dk.layer_norm_linear(*tensors, activation=activation)


def step(inputs, dy):
    """y and the five gradients."""
    with dk.backend(BACKEND):
        y = layer(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_same(results, expected):
    for name, a, e in zip(proofs.NAMES, results, expected, strict=True):
        assert torch.equal(a, e), f"{name} differs in {int(a.ne(e).sum())} of {a.numel()} elements"


# Streams, graphs, again and again


@only_on_gpu
@pytest.mark.parametrize("case", [SMALL, WIDE, SMALL._replace(dtype="fp32")], ids=str)
def test_cuda_graph(case):
    """Forward and backward pass, captured once, and replayed with other values in the same places."""
    inputs, dy = operands(case)
    results, replay = captured(step, inputs, dy)
    for seed in (1, 2, 3):
        fresh, fresh_dy = operands(case, seed)
        expected = step(fresh, fresh_dy)
        replay(fresh, fresh_dy)
        assert_same(results, expected)


@only_on_gpu
@pytest.mark.alone
def test_kernels_run_on_the_current_stream():
    """On a stream that is still busy with what the kernels read: on any other one they would read NaN."""
    inputs, dy = operands()
    expected = step(inputs, dy)
    late = [torch.full_like(t, float("nan")).requires_grad_() for t in inputs]
    late_dy = torch.full_like(dy, float("nan"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(inputs, dy)  # so that nothing is compiled and no memory taken below, which would wait
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        with torch.no_grad():
            for t, values in zip((*late, late_dy), (*inputs, dy), strict=True):
                t.copy_(values)
        results = step(late, late_dy)
    assert not side.query()  # it all was asked for before it was computed
    torch.cuda.current_stream().wait_stream(side)
    assert_same(results, expected)


@repeats(1000, 10_000)
@pytest.mark.parametrize("case", [
    SMALL, WIDE, SMALL._replace(dtype="fp32"), WIDE._replace(dtype="fp16", activation=None),
], ids=str)  # fmt: skip
def test_same_bits_every_time(case, count):
    inputs, dy = operands(case)
    first = step(inputs, dy)
    different = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    for _ in range(count):
        again = step(inputs, dy)
        different += torch.stack([a.ne(e).any() for a, e in zip(again, first, strict=True)])
    assert different.tolist() == [0] * 6, f"runs of {count} in which {proofs.NAMES} differed"


@only_on_gpu
@pytest.mark.parametrize("case", [SMALL, WIDE], ids=str)
def test_same_bits_of_y_and_dx_alone_and_in_a_batch(case):
    case = case._replace(shape=(300,), few=True)
    (x, *parameters), dy = proofs.normal_operands(case, DEVICE)
    batch = proofs.on_kernels(case, [x, *parameters], dy)
    for rows in (slice(0, 1), slice(60, 75), slice(139, 300)):
        alone = proofs.on_kernels(case, [x[rows], *parameters], dy[rows])
        assert_same([alone["y"], alone["dx"]], [batch["y"][rows], batch["dx"][rows]])


# Memory


@only_on_gpu
def test_memory_that_is_kept_for_the_backward_pass():
    """Two numbers a row beside y: x and the parameters are there anyway."""
    inputs, dy = operands(SMALL._replace(shape=(20_000,)))
    step(inputs, dy)
    gc.collect()
    torch.cuda.synchronize()
    before = requested_memory()
    with dk.backend(BACKEND):
        y = layer(*inputs)
    kept = requested_memory() - before
    assert kept <= y.numel() * y.element_size() + 2 * 4 * 20_000 + 2048
    del y
    for _ in range(200):
        step(inputs, dy)
    assert requested_memory() == before


# Under PyTorch's switches and transforms


@only_on_gpu
def test_tf32_only_where_it_is_allowed():
    case = SMALL._replace(dtype="fp32", activation=None)
    for c in (96, 384):
        inputs, dy = operands(case._replace(c=c))
        ieee = step(inputs, dy)
        torch.backends.cuda.matmul.allow_tf32 = True  # a fixture puts it back
        allowed = step(inputs, dy)
        torch.backends.cuda.matmul.allow_tf32 = False
        assert_same(step(inputs, dy), ieee)
        assert not torch.equal(allowed[0], ieee[0])
        for name, a, e in zip(proofs.NAMES, allowed, ieee, strict=True):
            assert (a - e).abs().max() < 2**-8 * e.abs().max(), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("x_dtype", ["fp32", "same"])
def test_autocast_with_parameters_in_fp32(dtype, x_dtype):
    """Results in autocast's dtype; gradients of parameters in fp32, without having been rounded to the half one."""
    for case in (SMALL, WIDE):
        case = case._replace(dtype=dtype, x_dtype="fp32" if x_dtype == "fp32" else dtype)
        proofs.prove_exact(case._replace(x="expanded", dy="expanded", shape=(257,)), DEVICE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_compile(dtype):
    """Forward and backward through inductor, without graph breaks, for any number of rows."""
    torch._dynamo.reset()

    def function(x, *parameters):
        return F.relu(layer(x + x, *parameters)) * 0.5

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for n in (2, 3, 5):
        inputs, dy = operands(SMALL._replace(dtype=dtype, shape=(n, 7)))
        results = []
        for run in (compiled, function):
            with dk.backend(BACKEND):
                y = run(*inputs)
                results.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
        assert_same(*results)
    assert counter["stats"]["unique_graphs"] <= 2


def test_second_derivatives_raise():
    inputs, _ = operands(SMALL._replace(dtype="fp32"))
    with dk.backend(BACKEND):
        (dx,) = torch.autograd.grad(layer(*inputs).sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r'backend\("torch"\)'):
            dx.square().sum().backward()


def test_checkpointing():
    inputs, dy = operands()
    expected = step(inputs, dy)
    with dk.backend(BACKEND):
        y = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
        assert_same([y.detach(), *torch.autograd.grad(y, inputs, dy)], expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8)], ids=str)
def test_no_rows(shape):
    inputs = [t.to(DEVICE).requires_grad_() for t in norm_linear_operands(shape, 5, dtype=torch.float32)]
    y, dx, *gradients = step(inputs, torch.empty(*shape[:-1], 5, device=DEVICE))
    assert y.shape == (*shape[:-1], 5)
    assert dx.shape == shape
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_and_rows_that_are_not_finite(dtype):
    case = NormLinearCase(dtype, (9,), 40, 8)
    inputs, dy = proofs.normal_operands(case, DEVICE)
    inputs[0][:4] = torch.tensor([0.0, 100.0, 6e4, 1 / 3]).to(inputs[0])[:, None]
    inputs[0][5, 3], inputs[0][6, 39] = float("nan"), float("inf")
    y = proofs.on_kernels(case, inputs, dy)["y"]
    _, beta, weight, bias = (t.double() for t in inputs[1:])
    exact, magnitude = beta @ weight.t() + bias, beta.abs() @ weight.t().abs() + bias.abs()
    testing.assert_componentwise(y[:4], exact.expand(4, 8), magnitude.expand(4, 8), case.c + 1, "y")
    assert y[5:7].isnan().all()
    assert y[[4, 7, 8]].isfinite().all()
