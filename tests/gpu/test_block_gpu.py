"""The block, compiled: its values, on the interpreter lane's cases and on ConvNeXt's; graphs, streams, memory."""

import functools
import gc

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from tests import block_proofs as proofs
from tests.block_cases import BlockCase, block_cases
from tests.cases import DTYPES
from tests.dwconv_kernels.operands import block_operands
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

pytestmark = pytest.mark.gpu
skip_without_gpu()

HALF = ["bf16", "fp16"]
# Images, rows and channels of ConvNeXt's stages, all of them narrower than a resident kernel takes, and that one.
STAGES = [(8, 56, 96), (8, 28, 192), (8, 14, 384), (8, 7, 768), (8, 24, 128), (8, 12, 256), (4, 9, 1024), (4, 13, 40)]
SMALL = BlockCase("bf16", 3, 96, 14, 14, 384, 7, 7, row_scale=True, few=False) if ON_GPU else BlockCase(
    "bf16", 3, 16, 2, 3, 24, 1, 1, row_scale=True, arch=90, few=False
)  # fmt: skip
WIDE = {"c": 384, "d": 1536, "dtype": "fp16"} if ON_GPU else {"c": 72, "h": 5, "arch": 80, "few": True}
WAYS = {
    "rows": SMALL,
    "resident": SMALL._replace(resident=True),
    "hidden": SMALL._replace(few=True),
    "fp32": SMALL._replace(dtype="fp32"),
    "wide": SMALL._replace(**WIDE),
    "u kept": SMALL._replace(memory="fast"),
    "norm over an image": SMALL._replace(grn=True, layer_scale=False),
}
each_way = pytest.mark.parametrize("case", WAYS.values(), ids=list(WAYS))


def stages() -> list[BlockCase]:
    cases = [
        BlockCase(dtype, n, c, size, size, 4 * c, 7, 7, row_scale=c % 64 == 0, grn=c == 40, resident=c == 96)
        for n, size, c in STAGES for dtype in DTYPES
    ]  # fmt: skip
    return cases if ON_GPU else [case._replace(n=1, h=2, w=2, c=24, d=32, kh=1, kw=1) for case in cases[:3]]


def all_proofs() -> tuple[list[Proof], list[Proof]]:
    """Those of any run, what takes longest to compile first, and all."""
    # The whole numbers of large maps have larger sums than fp16 has; those of the cover are exact in it, too.
    exact = [case for case in stages() if case.dtype != "fp16" or not ON_GPU]
    own = [Proof("rounding", case, DEVICE) for case in [*stages(), *WAYS.values()]]
    own += [Proof("exact", case, DEVICE) for case in exact]
    cover = [Proof("exact", case, DEVICE) for case in (block_cases() if ON_GPU else block_cases()[:12])]
    return own + cover[::4], cover if ON_GPU else []


@pytest.mark.parametrize("proof", parameters(*all_proofs()))
def test_values(proof, proof_of):
    """T0: every element exact. T1, T2, T3: within its bound, no further off than PyTorch's operators, not biased."""
    proof_of(proof)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("x_dtype", ["fp32", "same"])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_autocast_with_parameters_in_fp32(layer_scale, x_dtype, dtype):
    case = SMALL._replace(dtype=dtype, x_dtype="fp32" if x_dtype == "fp32" else dtype, layer_scale=layer_scale)
    proofs.prove_exact(case, DEVICE)
    proofs.prove_rounding(case, DEVICE)


@pytest.mark.parametrize("grn", [False, True])
def test_layer_scale_of_a_network_that_begins(grn):
    """λ = 1e-6 in fp16: what PyTorch makes of it is not lost."""

    def make(case, device, seed):
        tensors, dout = proofs.normal_operands(case, device, seed)
        tensors[9] = torch.full_like(tensors[9], 1e-6)
        return tensors, dout

    actual = proofs.prove_rounding(SMALL._replace(dtype="fp16", grn=grn, layer_scale=True), DEVICE, make=make)
    assert actual["dfc1_weight"].count_nonzero() > 0.9 * actual["dfc1_weight"].numel()


def operands(case=SMALL, seed=0):
    """Leaves without those that are not given, and dout; the row scale requires no gradient."""
    tensors, dout = proofs.normal_operands(case, DEVICE, seed)
    return [t if t is None or i == proofs.ROW_SCALE else t.requires_grad_() for i, t in enumerate(tensors)], dout


def run(case, tensors):
    with dk.backend(BACKEND), proofs.chosen(case):
        return dk.convnext_block(*tensors, memory=case.memory)


def step(case, tensors, dout):
    """out and the gradients."""
    out = run(case, tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with dk.backend(BACKEND), proofs.chosen(case):
        return [out.detach(), *torch.autograd.grad(out, wanted, dout)]


def assert_same(results, expected):
    for number, (a, e) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(a, e), f"number {number} differs in {int(a.ne(e).sum())} of {a.numel()} elements"


def present(case):
    """A step of those tensors that are there, as :func:`captured` wants it, and which they are."""
    tensors, dout = operands(case)
    places = [i for i, t in enumerate(tensors) if t is not None]

    def of(given, upstream):
        full = [None] * 13
        for i, t in zip(places, given, strict=True):
            full[i] = t
        return step(case, full, upstream)

    return of, [tensors[i] for i in places], dout


# Streams, graphs, again and again


@only_on_gpu
@each_way
def test_cuda_graph(case):
    """Forward and backward pass, captured once, and replayed with other values in the same places."""
    of, inputs, dout = present(case)
    results, replay = captured(of, inputs, dout)
    for seed in (1, 2):
        tensors, fresh_dout = operands(case, seed)
        expected = step(case, tensors, fresh_dout)
        replay([t for t in tensors if t is not None], fresh_dout)
        assert_same(results, expected)


@only_on_gpu
@pytest.mark.alone
def test_kernels_run_on_the_current_stream():
    """On a stream that is still busy with what the kernels read: on any other one they would read NaN."""
    of, inputs, dout = present(SMALL)
    expected = of(inputs, dout)
    late = [torch.full_like(t, float("nan")).requires_grad_(t.requires_grad) for t in inputs]
    late_dout = torch.full_like(dout, float("nan"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        of(inputs, dout)  # so that nothing is compiled and no memory taken below, which would wait
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # cycles: about a fifth of a second
        with torch.no_grad():
            for t, values in zip((*late, late_dout), (*inputs, dout), strict=True):
                t.copy_(values)
        results = of(late, late_dout)
    assert not side.query()  # it all was asked for before it was computed
    torch.cuda.current_stream().wait_stream(side)
    assert_same(results, expected)


@repeats(200, 1000)
@each_way
def test_same_bits_every_time(case, count):
    tensors, dout = operands(case)
    first = step(case, tensors, dout)
    different = torch.zeros(len(first), dtype=torch.int64, device=DEVICE)
    for _ in range(count):
        again = step(case, tensors, dout)
        different += torch.stack([a.ne(e).any() for a, e in zip(again, first, strict=True)])
    assert different.tolist() == [0] * len(first), f"runs of {count} in which results differed"


# Memory


@only_on_gpu
@pytest.mark.parametrize("memory, elements", [("default", 1), ("lean", 0), ("fast", 5)])
def test_memory_that_is_kept_for_the_backward_pass(memory, elements):
    """Beside out, and x and the parameters, which are there anyway; two numbers a pixel."""
    case = SMALL._replace(n=64, memory=memory)
    tensors, dout = operands(case)
    step(case, tensors, dout)
    gc.collect()
    torch.cuda.synchronize()
    before = requested_memory()
    out = run(case, tensors)
    kept = requested_memory() - before
    size = out.numel() * out.element_size()
    assert kept <= (1 + elements) * size + 8 * case.rows + 4096
    del out
    for _ in range(100):
        step(case, tensors, dout)
    assert requested_memory() == before


@only_on_gpu
@pytest.mark.alone
@pytest.mark.full
@pytest.mark.parametrize("grn", [False, True])
def test_maps_of_more_than_2_to_the_31_elements(grn):
    """Images repeat, so that every image has to be what the first ones are. Hidden channels alone exceed 2^31."""
    n, c, size, d, few = 1400, 96, 128, 96, 4
    needed = n * c * size * size * 2 * 9
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed")
    case = BlockCase("bf16", few, c, size, size, d, 3, 3, layer_scale=True, grn=grn)
    tensors, dout = operands(case)
    expected = step(case, tensors, dout)
    repeat = lambda t: t.detach().repeat(n // few, 1, 1, 1).contiguous(memory_format=torch.channels_last)  # noqa: E731
    tensors[0], upstream = repeat(tensors[0]).requires_grad_(), repeat(dout)
    assert tensors[0].numel() > 2**31
    with dk.backend(BACKEND):
        out = dk.convnext_block(*tensors)
        dx, dfc1 = torch.autograd.grad(out, (tensors[0], tensors[5]), upstream)
    for actual, first in ((out, expected[0]), (dx, expected[1])):
        for image in range(0, n, few):
            part = actual[image : image + few]
            torch.testing.assert_close(part, first, rtol=2**-7, atol=2**-7, msg=f"images from {image} on")
    torch.testing.assert_close(dfc1 / (n // few), expected[5], rtol=2**-6, atol=2**-6 * expected[5].abs().max().item())


# Under PyTorch's switches and transforms


@only_on_gpu
def test_tf32_only_where_it_is_allowed():
    case = SMALL._replace(dtype="fp32")
    tensors, dout = operands(case)
    ieee = step(case, tensors, dout)
    torch.backends.cuda.matmul.allow_tf32 = True  # a fixture puts it back
    allowed = step(case, tensors, dout)
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_same(step(case, tensors, dout), ieee)
    assert not torch.equal(allowed[0], ieee[0])
    for a, e in zip(allowed, ieee, strict=True):
        assert (a - e).abs().max() < 2**-7 * e.abs().max()


@only_on_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_compile(dtype):
    """Forward and backward through inductor, without graph breaks, for any number of images."""
    torch._dynamo.reset()

    def function(x, *parameters):
        return F.relu(dk.convnext_block(x + x, *parameters)) * 0.5

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (2, 3, 5):
        tensors, dout = operands(SMALL._replace(dtype=dtype, n=n, h=7, w=9, few=None))
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        results = []
        for call in (compiled, function):
            with dk.backend(BACKEND):
                out = call(*tensors)
                results.append([out.detach(), *torch.autograd.grad(out, wanted, dout)])
        assert_same(*results)


def test_second_derivatives_raise():
    tensors, _ = operands(SMALL._replace(dtype="fp32"))
    (dx,) = torch.autograd.grad(run(SMALL, tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'backend\("torch"\)'):
        dx.square().sum().backward()


@pytest.mark.parametrize("memory", ["default", "lean", "fast"])
def test_checkpointing(memory):
    case = SMALL._replace(memory=memory)
    tensors, dout = operands(case)
    expected = step(case, tensors, dout)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with dk.backend(BACKEND), proofs.chosen(case):
        block = functools.partial(dk.convnext_block, memory=memory)
        out = torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=False)
        assert_same([out.detach(), *torch.autograd.grad(out, wanted, dout)], expected)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)], ids=str)
def test_no_pixels(shape):
    tensors = [None if t is None else t.to(DEVICE) for t in block_operands(shape, grn=True, dtype=torch.float32)]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    out, dx, *gradients = step(SMALL, tensors, torch.empty(shape, device=DEVICE))
    assert out.shape == dx.shape == shape
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@each_way
def test_a_dropped_image_passes_through(case):
    """Also where its branch would be infinite; what it holds shows in no gradient."""
    tensors, dout = proofs.normal_operands(case, DEVICE)
    expected = proofs.on_kernels(case, tensors, dout)
    assert tensors[proofs.ROW_SCALE][0] == 0
    tensors[0][0] = 3 - tensors[0][0]
    actual = proofs.on_kernels(case, tensors, dout)
    assert torch.equal(actual.pop("out")[0], tensors[0][0])
    assert torch.equal(actual.pop("dx")[0], dout[0])
    assert_same(list(actual.values()), [expected[name] for name in actual])
