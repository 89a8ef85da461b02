"""Accelerated networks in two gloo processes, by DistributedDataParallel and FSDP2: the gradients of one process."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import convnext_fast
import dwconv_kernels as dk
from tests import torchvision_shim
from tests.test_distributed import join, leave, run_two

from .networks import DEPTHS, huggingface, randomise, timm, torchvision
from .test_accelerate import Operators

NETWORKS = {
    "timm": lambda: timm(conv_mlp=True), "timm-v2": lambda: timm(v2=True), "torchvision": torchvision,
    "huggingface": huggingface,
}  # fmt: skip
BLOCKS = ("ConvNeXtBlock", "CNBlock", "ConvNextLayer")  # as policies name them
RUNS = [("ddp", "before"), ("ddp", "channels_last"), ("fsdp", "before"), ("fsdp", "after")]


def build(name: str, channels_last: bool) -> nn.Module:
    model = randomise(NETWORKS[name]())
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of the second pass: the first is where DistributedDataParallel settles its buckets."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        y = model(x)
        (y if isinstance(y, torch.Tensor) else y.logits).square().mean().backward()
    return [p.grad for p in model.parameters()]


def wrapped(model: nn.Module, kind: str, when: str) -> nn.Module:
    if when != "after":
        convnext_fast.accelerate(model)
    if kind == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if when == "after":
        convnext_fast.accelerate(model)
    return model


def worker(rank: int, folder: str) -> None:
    torchvision_shim.install()  # a process of its own
    join(rank, folder)
    mine = batch()[2 * rank : 2 * rank + 2]
    for name in NETWORKS:
        for kind, when in RUNS:
            model = wrapped(build(name, when == "channels_last"), kind, when)
            with warnings.catch_warnings(), dk.backend("reference"), Operators() as operators:
                warnings.simplefilter("error")
                gradients = gradients_of(model, mine)
            assert operators.ran == {"convnext_block": 2 * sum(DEPTHS), "convnext_block_backward": 2 * sum(DEPTHS)}
            if kind == "fsdp":
                gradients = [gradient.full_tensor() for gradient in gradients]
            if (kind, when) == ("fsdp", "before"):
                with pytest.raises(RuntimeError, match="was swapped and then became a FSDP"):
                    convnext_fast.restore(model)
            else:
                assert len(convnext_fast.restore(model)) == 2 * sum(DEPTHS)
            torch.save(gradients, f"{folder}/{name}-{kind}-{when}-{rank}.pt")
            del model, gradients
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("two")
    run_two(worker, str(folder))
    return folder


@pytest.mark.parametrize("kind, when", RUNS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_two_processes_are_those_of_one(folder, name, kind, when):
    ranks = [torch.load(folder / f"{name}-{kind}-{when}-{rank}.pt", weights_only=True) for rank in range(2)]
    model = build(name, when == "channels_last")  # as its library made it
    alone = gradients_of(copy.deepcopy(model), batch())
    for first, second, expected, p in zip(*ranks, alone, model.parameters(), strict=True):
        assert torch.equal(first, second)
        if kind == "ddp":
            assert first.stride() == p.stride()
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
