"""DistributedDataParallel over two gloo processes: the gradients of one process, and no warning."""

import os
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import dwconv_kernels as dk
from convnext_fast import ConvNeXt

IMAGES = 4


def build(version: int, channels_last: bool) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(
        num_classes=7, depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), use_grn=version == 2,
        layer_scale_init_value=0.0 if version == 2 else 1.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 64, 64, generator=g), torch.randint(7, (IMAGES,), generator=g)


def train_two_steps(model, images, labels, backend: str) -> list[torch.Tensor]:
    """Gradients of the second step: the first is where DistributedDataParallel settles its buckets."""
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with dk.backend(backend):
            torch.nn.functional.cross_entropy(model(images), labels).backward()
    return [p.grad for p in model.parameters()]


def join(rank: int, folder: str) -> None:
    """Makes this process the ``rank``-th of two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def leave() -> None:
    """Together: Gloo can wait for ever where one process takes its reducer down after the other has left."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def worker(rank: int, folder: str, version: int, channels_last: bool, backend: str) -> None:
    join(rank, folder)
    model = DistributedDataParallel(build(version, channels_last))
    images, labels = batch()
    mine = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients = train_two_steps(model, images[mine], labels[mine], backend)
    torch.save(gradients, f"{folder}/gradients{rank}.pt")
    del model, gradients
    leave()


def run_two(worker: Callable, *args) -> None:
    """``worker(rank, *args)`` in two processes."""
    processes = multiprocessing.spawn(worker, args=args, nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError("two processes did not finish within 120 s")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("version, channels_last", [(1, True), (1, False), (2, True)])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, version, channels_last, backend):
    run_two(worker, str(tmp_path), version, channels_last, backend)
    ranks = [torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in range(2)]
    alone = train_two_steps(build(version, channels_last), *batch(), backend)
    for first, second, expected in zip(*ranks, alone, strict=True):
        assert torch.equal(first, second)
        assert first.stride() == expected.stride()
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
