"""How the compiled depthwise kernels are launched: streams, graphs, devices, torch.compile, memory, again and again."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from benchmarks.probes import compiled_kernels
from dwconv_kernels import testing
from tests import depthwise_proofs as proofs
from tests.cases import DTYPES, KernelCase
from tests.gpu.conftest import (
    BACKEND,
    DEVICE,
    ON_GPU,
    captured,
    only_on_gpu,
    repeats,
    requested_memory,
    skip_without_gpu,
)

pytestmark = pytest.mark.gpu
skip_without_gpu()

ROOT = Path(__file__).parents[2]
# 40 channels and 7×7 wherever that will do: what another test has compiled is not compiled again.
SHAPE = (2, 40, 17, 28) if ON_GPU else (2, 5, 3, 10)
MEDIUM = (16, 40, 56, 56) if ON_GPU else (1, 5, 4, 10)
NAMES = proofs.NAMES


def operands(shape=SHAPE, dtype="bf16", device=DEVICE, make=testing.integers):
    """x, weight, bias, the first channels_last, and dy."""
    case = KernelCase(dtype, *shape, 7, 7, 3, 3)
    inputs, dy = proofs.operands(case, make, device)
    return [t.requires_grad_() for t in inputs], dy


def exactly(inputs, dy):
    return proofs.exactly(KernelCase("bf16", *inputs[0].shape, 7, 7, 3, 3), inputs, dy)


def convolution(x, weight, bias):
    return dk.depthwise_conv2d(x, weight, bias, padding=3)


def step(inputs, dy):
    """y, dx, dw, db."""
    with dk.backend(BACKEND):
        y = convolution(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_exact(results, expected):
    for name, a, e in zip(NAMES, results, expected, strict=True):
        testing.assert_exact(a, e, name)


# Streams, graphs, devices


@only_on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype):
    """Forward and backward pass, captured once, and replayed with other values in the same places."""
    inputs, dy = operands(dtype=dtype)
    results, replay = captured(step, inputs, dy)
    for _ in range(3):
        fresh, fresh_dy = operands(dtype=dtype)
        replay(fresh, fresh_dy)
        assert_exact(results, exactly(fresh, fresh_dy))


@only_on_gpu
@pytest.mark.alone
def test_kernels_run_on_the_current_stream():
    """On a stream that is still busy with what the kernels read: on any other one they would read NaN."""
    inputs, dy = operands()
    expected = exactly(inputs, dy)
    late = [torch.full_like(t, float("nan")).requires_grad_() for t in inputs]
    late_dy = torch.full_like(dy, float("nan"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(inputs, dy)  # so that nothing is compiled and no memory taken below, which would wait
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        with torch.no_grad():
            for t, values in zip(late, inputs, strict=True):
                t.copy_(values)
        y = convolution(*late)
        torch.cuda._sleep(200_000_000)
        late_dy.copy_(dy)
        gradients = torch.autograd.grad(y, late, late_dy)
    assert not side.query()  # it all was asked for before it was computed
    torch.cuda.current_stream().wait_stream(side)
    assert_exact([y.detach(), *gradients], expected)


@only_on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one():
    inputs, dy = operands(device="cuda:1")
    with torch.cuda.device(0):
        results = step(inputs, dy)
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert_exact(results, exactly(inputs, dy))


@only_on_gpu
def test_a_device_index_or_none():
    for device in ("cuda", f"cuda:{torch.cuda.current_device()}"):
        inputs, dy = operands(device=device)
        assert_exact(step(inputs, dy), exactly(inputs, dy))


# Again and again


@repeats(1000, 10_000)
@pytest.mark.parametrize("shape", [SHAPE, MEDIUM], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(shape, dtype, count):
    inputs, dy = operands(shape, dtype, make=torch.randn)
    first = step(inputs, dy)
    different = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for _ in range(count):
        again = step(inputs, dy)
        different += torch.stack([a.ne(e).any() for a, e in zip(again, first, strict=True)])
    assert different.tolist() == [0] * 4, f"runs of {count} in which {NAMES} differed"


@only_on_gpu
def test_memory():
    """A forward pass of a channels_last map takes what y takes, and the table of taps; nothing stays behind."""
    inputs, dy = operands(MEDIUM)
    step(inputs, dy)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested_memory()
    y = convolution(*inputs)
    size = y.numel() * y.element_size()
    assert requested_memory("peak") - before < size + 2**20
    del y
    for _ in range(200):
        step(inputs, dy)
    assert requested_memory() == before
    torch.cuda.reset_peak_memory_stats()
    step(inputs, dy)
    assert requested_memory("peak") - before < 2 * size + 2**26  # partial sums of the weight's gradient


@only_on_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_few_variants_are_compiled_whatever_the_size(dtype):
    """At most 8 per number of channels and dtype, over any set of N, H and W, with and without bias."""
    before, c = compiled_kernels(), 24  # which no other test has
    for n, h, w in itertools.product((1, 2, 3, 16), (1, 2, 7, 16, 17, 56), (1, 2, 5, 7, 10, 14, 16, 28, 31, 56, 64)):
        inputs, dy = operands((n, c, h, w), dtype)
        step(inputs, dy)
        with torch.no_grad():
            dk.depthwise_conv2d(inputs[0][:1], inputs[1], padding=3)
    new = {name: count - before.get(name, 0) for name, count in compiled_kernels().items()}
    assert 4 <= sum(new.values()) <= 8, new


# Under PyTorch's transforms


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_torch_compile(dtype, launches):
    """Forward and backward through inductor, without graph breaks, for any number of images."""
    torch._dynamo.reset()

    def function(x, weight, bias):
        return F.relu(dk.depthwise_conv2d(x + x, weight, bias, padding=3)) * 0.5

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for n in (2, 3, 5) if ON_GPU else (2, 3):
        inputs, dy = operands((n, *SHAPE[1:]), dtype)
        results = []
        for run in (compiled, function):
            with dk.backend(BACKEND):
                y = run(*inputs)
                results.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
        for name, a, e in zip(NAMES, *results, strict=True):
            assert torch.equal(a, e), f"{name}, {n} images"
            assert a.stride() == e.stride()
        expected = F.conv2d(*((t * (1 + (i == 0))).double() for i, t in enumerate(inputs)), padding=3, groups=SHAPE[1])
        testing.assert_exact(results[0][0], expected.to(y.dtype).relu() * 0.5)
    assert counter["stats"]["unique_graphs"] <= 2
    assert launches == dict.fromkeys(launches, 6 if ON_GPU else 4)


def test_torch_func():
    """auto takes PyTorch's operators, and is right; the kernels raise and say why."""
    x, weight = torch.randn(3, *SHAPE, device=DEVICE), torch.randn(SHAPE[1], 1, 7, 7, device=DEVICE)
    each = torch.func.vmap(lambda x: dk.depthwise_conv2d(x, weight, padding=3))
    whole = F.conv2d(x.flatten(0, 1), weight, padding=3, groups=SHAPE[1]).view(x.shape)
    torch.testing.assert_close(each(x), whole, rtol=1e-4, atol=1e-4)

    def loss(weight):
        return dk.depthwise_conv2d(x[0], weight, padding=3).square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected, rtol=1e-4, atol=1e-4 * scale)
    with dk.backend("triton"):
        for transformed, argument in ((each, x), (torch.func.grad(loss), weight)):
            with pytest.raises(RuntimeError, match=r"cannot run under backend.*torch\.func"):
                transformed(argument)


def test_second_derivatives_raise():
    inputs, _ = operands(dtype="fp32")
    with dk.backend(BACKEND):
        (dx,) = torch.autograd.grad(convolution(*inputs).sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r'backend\("torch"\)'):
            dx.square().sum().backward()


def test_checkpointing():
    inputs, dy = operands()
    with dk.backend(BACKEND):
        y = torch.utils.checkpoint.checkpoint(convolution, *inputs, use_reentrant=False)
        assert_exact([y.detach(), *torch.autograd.grad(y, inputs, dy)], exactly(inputs, dy))


# Tools


@only_on_gpu
@pytest.mark.full
def test_self_check_takes_less_than_a_minute(tmp_path):
    """With nothing compiled yet."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dwconv_kernels.self_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = int(done.stdout.split(" failed, in ")[1].split(" s")[0])
    assert seconds < 60, done.stdout


@only_on_gpu
@pytest.mark.full
def test_compute_sanitizer():
    """``compute-sanitizer --tool memcheck python -m dwconv_kernels.self_check --quick --jobs 1``, where there is one.

    Without PyTorch's cache each tensor is an allocation of its own, and what is beyond it nobody's.
    """
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}

    def run(*command):
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, *command]
        return subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=540
        )

    trial = run("-c", "import torch; print(torch.ones(3, device='cuda').sum().item())")
    if trial.returncode != 0:
        pytest.skip(f"compute-sanitizer does not run here: {trial.stdout[-300:]}")
    done = run("-m", "dwconv_kernels.self_check", "--quick", "--jobs", "1")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
