"""Networks on the kernels, in Triton's interpreter: a training step has the loss and gradients of the PyTorch path."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from convnext_fast import ConvNeXt, demo
from convnext_fast.distributed import World
from convnext_fast.run_folder import RunFolder
from convnext_fast.train import Options, Trainer
from dwconv_kernels import testing
from tests.convnext_fast.small_models import randomised

pytestmark = pytest.mark.usefixtures("guard")

SIZES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 33, 40), "num_classes": 5, "patch_size": 2}


def network(**settings):
    torch.manual_seed(0)
    return randomised(ConvNeXt(**{**SIZES, "layer_scale_init_value": 0.5, **settings}))


def assert_kernels_ran(guard, blocks, forwards=1):
    """For each block, ``forwards`` forward passes and the two of its backward pass."""
    ran = Counter(launch.kernel.replace("_pairs", "") for launch in guard.launches)
    assert ran["_depthwise_fwd_kernel"] == ran["_depthwise_taps_kernel"] == blocks * (forwards + 1)
    assert ran["_depthwise_bwd_weight_kernel"] == ran["_depthwise_sum_kernel"] == blocks


def loss_and_gradients(model, images, labels, backend):
    with dk.backend(backend):
        loss = F.cross_entropy(model(images), labels)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("settings, size, forwards, memory_format", [
    ({}, 28, 1, torch.channels_last),
    ({"use_grn": True, "layer_scale_init_value": 0.0, "kernel_size": 5}, 22, 1, torch.contiguous_format),
    ({"memory": "lean", "kernel_size": 3}, 16, 2, torch.contiguous_format),
], ids=["v1", "v2", "lean"])  # fmt: skip
def test_step_of_a_network(settings, size, forwards, memory_format, guard):
    model = network(**settings).to(memory_format=memory_format)
    images = torch.randn(1, 3, size, size).to(memory_format=memory_format)
    ours = loss_and_gradients(model, images, torch.tensor([3]), "triton")
    assert_kernels_ran(guard, 5, forwards)
    peers = loss_and_gradients(model, images, torch.tensor([3]), "torch")
    assert len(ours) > 40
    assert_kernels_ran(guard, 5, forwards)  # and none in the other path
    torch.testing.assert_close(ours[0], peers[0], rtol=1e-5, atol=0)
    for ours_, theirs in zip(ours[1:], peers[1:], strict=True):
        assert ours_.stride() == theirs.stride()
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_network_in_autocast(guard):
    """In bf16, on tensor cores, of 33 channels on FMAs: no further from the network in fp64 than PyTorch is."""
    model, images = network(), torch.randn(2, 3, 20, 20)
    results = []
    for backend in ("triton", "torch"):
        with dk.backend(backend), torch.autocast("cpu", torch.bfloat16):
            results.append(model(images).float().detach())
    assert {launch.kernel for launch in guard.launches} >= {"_depthwise_fragments_kernel", "_depthwise_fwd_kernel"}
    with dk.backend("torch"):
        exact = model.double()(images.double()).detach()
    testing.assert_no_worse(*results, exact, 2, 2, "logits")


@pytest.fixture
def demo_task():
    pytest.importorskip("sklearn")
    return lambda: demo._task(*demo._digits(), "digits", "convnext", 0)


def test_step_of_the_demo(demo_task, tmp_path, guard):
    """Its network, images, optimiser and loss; of a batch, the first three images."""
    losses, parameters = [], []
    for backend in ("triton", "torch"):
        task, options = demo_task(), Options(epochs=1, batch_size=3, lr=4e-3, label_smoothing=0.0)
        with dk.backend(backend):
            trainer = Trainer(task, options, RunFolder(tmp_path), World(torch.device("cpu")))
            trainer._train_step(task.train_data.images[:3], task.train_data.labels[:3])
        assert_kernels_ran(guard, 5)
        losses.append(trainer.loss_sum)
        parameters.append([p.detach() for p in trainer.model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert losses[0] > 0
    # The optimiser's first step has its full length wherever there is a gradient, however small, in its direction.
    same = [((a - b).abs() < 1e-4).double().mean() for a, b in zip(*parameters, strict=True)]
    assert min(same) > 0.99


def test_the_demos_own_comparison(demo_task):
    task = demo_task()
    images, labels = task.val_data.images[:1], task.val_data.labels[:1]
    with dk.backend("triton"):
        logits_error, gradient_error = demo.compare_with_reference(randomised(task.model), images, labels)
    assert 0 <= logits_error < 1e-5
    assert 0 < gradient_error < 1e-5
