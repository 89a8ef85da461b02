"""Accelerated networks of other libraries on the kernels: right, in CUDA graphs, compiled, beside what they were."""

import contextlib
import copy

import pytest
import torch
from torch.nn import functional as F

import convnext_fast
import dwconv_kernels as dk
from dwconv_kernels import testing
from tests.convnext_fast.networks import CLASSES, CLASSIFIERS, DEPTHS, randomise
from tests.gpu.conftest import BACKEND, DEVICE, ON_GPU, captured, only_on_gpu, skip_without_gpu
from tests.torchvision_shim import install

pytestmark = pytest.mark.gpu
skip_without_gpu()
install()

BLOCKS = sum(DEPTHS)
NAMES = ("original", "timm-linear", "timm-conv", "timm-v2-conv", "torchvision", "huggingface", "huggingface-v2")
PIXELS = 96 if ON_GPU else 32


def network(name):
    return randomise(CLASSIFIERS[name][2]()).to(DEVICE, memory_format=torch.channels_last)


def images(n=2):
    return torch.randn(n, 3, PIXELS, PIXELS, device=DEVICE).contiguous(memory_format=torch.channels_last)


def logits_and_gradients(model, x, dtype=None):
    autocast = torch.autocast(DEVICE, dtype) if dtype else contextlib.nullcontext()
    with autocast:
        y = model(x)
    y = y if isinstance(y, torch.Tensor) else y.logits
    loss = F.cross_entropy(y.float() if dtype else y, torch.arange(len(x), device=DEVICE) % CLASSES)
    return [y.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("name", NAMES)
def test_same_as_before(name, block_launches):
    model, x = network(name), images()
    expected = logits_and_gradients(model, x)
    assert len(convnext_fast.accelerate(model).swapped) == BLOCKS
    with dk.backend(BACKEND):
        actual = logits_and_gradients(model, x)
    assert block_launches == {"block_forward": BLOCKS, "block_inference": 0, "block_backward": BLOCKS}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@only_on_gpu
@pytest.mark.parametrize("name, dtype", [
    pytest.param(name, dtype, marks=pytest.mark.full if dtype == torch.float16 and "v2" in name else ())
    for dtype in (torch.bfloat16, torch.float16) for name in NAMES
], ids=str)  # fmt: skip
def test_autocast_is_no_worse_than_before(name, dtype):
    """Logits, of the dtype that they had, beside the network in float64; they are few, and ratios of them noise."""
    model, x = network(name), images(8)
    exact = logits_and_gradients(copy.deepcopy(model).double(), x.double())[0]
    before = logits_and_gradients(model, x, dtype)[0]
    convnext_fast.accelerate(model)
    after = logits_and_gradients(model, x, dtype)[0]
    testing.assert_no_worse(after, before, exact, 2, 3, "logits")


@only_on_gpu
@pytest.mark.parametrize("name", ["timm-conv", "timm-v2-conv", "torchvision"])
def test_cuda_graph(name):
    model = network(name)
    expected, x = copy.deepcopy(model), images()
    convnext_fast.accelerate(model)

    def step(inputs, dy):
        y = model(*inputs)
        return [y, *torch.autograd.grad(y, list(model.parameters()), dy)]

    dy = torch.randn_like(expected(x))
    results, replay = captured(step, [x], dy)
    for _ in range(2):
        fresh, fresh_dy = images(), torch.randn_like(dy)
        replay([fresh], fresh_dy)
        y = expected(fresh)
        wanted = [y, *torch.autograd.grad(y, list(expected.parameters()), fresh_dy)]
        for a, e in zip(results, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@only_on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode, block_launches):
    torch._dynamo.reset()
    model, x = network("timm-v2-conv"), images()
    expected = logits_and_gradients(model, x)
    convnext_fast.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        actual = [t.clone() for t in logits_and_gradients(compiled, x)]
    assert block_launches["block_forward"] >= BLOCKS
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@only_on_gpu
def test_grad_scaler_and_inference():
    model, x = network("torchvision"), images()
    convnext_fast.accelerate(model)
    scaler, optimizer = torch.amp.GradScaler("cuda", init_scale=2.0**24), torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x).float(), torch.arange(len(x), device=DEVICE) % CLASSES)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model(x.clone()), rtol=0, atol=0)
        assert convnext_fast.restore(model)
        model(x)
