"""Small ConvNeXts trained on the kernels, beside the same ones on PyTorch's operators."""

import contextlib
import copy

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from convnext_fast import ConvNeXt
from tests.gpu.conftest import BACKEND, DEVICE, ON_GPU, only_on_gpu, skip_without_gpu

pytestmark = pytest.mark.gpu
skip_without_gpu()

# Maps 28, 14, 7 and 3 pixels wide: each kind of strip.
PIXELS = 112 if ON_GPU else 40
SIZES = {"depths": (1, 1, 2, 1), "dims": (40, 64, 72, 96) if ON_GPU else (5, 6, 7, 8), "num_classes": 10}


def network(**settings):
    torch.manual_seed(0)
    model = ConvNeXt(**{**SIZES, "layer_scale_init_value": 1.0, **settings})
    with torch.no_grad():  # no parameter at an initial value that would hide it
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.05)
    return model.to(DEVICE, memory_format=torch.channels_last)


def training_step(model, images, labels, optimizer, dtype):
    autocast = torch.autocast(DEVICE, dtype) if dtype else contextlib.nullcontext()
    with autocast:
        loss = F.cross_entropy(model(images).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("grn", [False, True])
def test_two_training_steps(dtype, tolerance, grn, block_launches):
    """The losses of two steps, the second of which depends on all gradients of the first."""
    model = network(use_grn=True, layer_scale_init_value=0.0) if grn else network()
    images, labels = torch.randn(4, 3, PIXELS, PIXELS, device=DEVICE), torch.arange(4, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    losses, gradients = {}, {}
    for backend in (BACKEND, "torch"):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), 0.05)
        before = dict(block_launches)
        with dk.backend(backend):
            losses[backend] = [training_step(trained, images, labels, optimizer, dtype) for _ in range(2)]
        ran = [block_launches[name] - before[name] for name in ("block_forward", "block_backward")]
        assert ran == ([10, 10] if backend == BACKEND else [0, 0])  # five blocks, two steps
        gradients[backend] = [p.grad for p in trained.parameters()]
    assert losses[BACKEND] == pytest.approx(losses["torch"], rel=tolerance)
    assert losses[BACKEND][0] != losses[BACKEND][1]
    if dtype is None:
        for a, e in zip(*gradients.values(), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())
            assert a.stride() == e.stride()


@contextlib.contextmanager
def other_kernels():
    """PyTorch's operators without cuDNN (on the CPU, without oneDNN)."""
    library = torch.backends.cudnn if ON_GPU else torch.backends.mkldnn
    with library.flags(enabled=False):
        yield


def losses_of(images, labels, steps, *, memory_format=torch.channels_last, batch=64):
    model = network().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    result = []
    for i in range(steps):
        chosen = order[torch.arange(i * batch, (i + 1) * batch) % len(images)]
        x = images[chosen].to(DEVICE, memory_format=memory_format)
        result.append(training_step(model, x, labels[chosen].to(DEVICE), optimizer, torch.bfloat16))
    return torch.tensor(result, dtype=torch.float64)


@only_on_gpu
@pytest.mark.full
def test_training_on_digits():
    """T6: for 64 steps the loss stays within twice the spread between runs of PyTorch that differ in kernels alone."""
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the images").load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images, labels = F.interpolate(images, PIXELS), torch.tensor(digits.target)
    steps = 64
    runs = []
    with dk.backend("torch"):
        runs.append(losses_of(images, labels, steps))
        runs.append(losses_of(images, labels, steps, memory_format=torch.contiguous_format))
        with other_kernels():
            runs.append(losses_of(images, labels, steps))
    with dk.backend(BACKEND):
        actual = losses_of(images, labels, steps)
    spread = max((a - b).abs().max().item() for a in runs for b in runs)
    apart = (actual - runs[0]).abs().max().item()
    assert spread > 0
    assert apart <= 2 * spread, f"losses are {apart:.2g} apart, those of PyTorch's runs {spread:.2g}"
    assert actual[-1] < actual[0]
