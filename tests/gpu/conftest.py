"""The GPU lane, ``pytest -m gpu``: the kernels compiled, on the GPU that is there.

Each file is skipped, with the reason, where no kernel runs on this machine's GPU. ``pytest -m "gpu and not full"``
leaves out what takes longest: most of the cases that the interpreter lane has already proved of the same source.
Compiling takes nearly all of the time, and Python compiles one kernel at a time: the values of many cases are compared
in several processes, see workers.py, and with pytest-xdist all tests are, ``-n 12``; what is marked ``alone`` then has
to come after the others, in a process by itself.

Where there is no GPU, the logic of most tests can be tried in Triton's interpreter; files shrink their maps for it, and
what only a GPU has is skipped::

    TRITON_INTERPRET=1 DWCONV_KERNELS_GPU_LANE=cpu pytest -m gpu tests/gpu -k "not fp16"
"""

import os

import pytest
import torch

import dwconv_kernels as dk
from dwconv_kernels import runtime
from tests.gpu.workers import Proof, proving, without_tf32

DEVICE = os.environ.get("DWCONV_KERNELS_GPU_LANE", "cuda")
ON_GPU = DEVICE != "cpu"
# "auto" is what users have, and takes PyTorch's operators on the CPU.
BACKEND = "auto" if ON_GPU else "triton"
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="tried without a GPU")


def pytest_configure(config) -> None:
    """Under xdist, a worker is given few tests at a time: those that compile for long are next to each other."""
    if getattr(config.option, "maxschedchunk", 0) is None:
        config.option.maxschedchunk = 1
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def skip_without_gpu() -> None:
    """For the top of a file of this lane."""
    works, reason = dk.kernel_status()
    if not ON_GPU:
        works, reason = runtime.INTERPRETER and runtime.has_kernels("depthwise"), "TRITON_INTERPRET=1 is not set"
    elif runtime.INTERPRETER:
        works, reason = False, "TRITON_INTERPRET is set, which keeps kernels from being compiled"
    if not works:
        pytest.skip(f"the GPU lane: {reason}", allow_module_level=True)


@pytest.fixture(autouse=True)
def as_in_fp32():
    """PyTorch's own convolutions in the precision of their dtype, and the same random numbers for every test."""
    torch.manual_seed(0)
    with without_tf32():
        yield


@pytest.fixture
def launches(monkeypatch):
    """Counts the calls of the launchers: {"depthwise_forward": 0, "depthwise_backward": 0}."""
    return _counting(monkeypatch, "depthwise", "depthwise_forward", "depthwise_backward")


@pytest.fixture
def block_launches(monkeypatch):
    """The same of blocks, whose launchers do not call those above."""
    return _counting(monkeypatch, "block", "block_forward", "block_inference", "block_backward")


def _counting(monkeypatch, family: str, *names: str) -> dict[str, int]:
    launch = runtime.launchers(family)
    counts = dict.fromkeys(names, 0)

    def counting(name, launcher):
        def counted(*arguments):
            counts[name] += 1
            return launcher(*arguments)

        return counted

    for name in counts:
        monkeypatch.setattr(launch, name, counting(name, getattr(launch, name)))
    return counts


@pytest.fixture(scope="module")
def proof_of(request):
    """Starts the proofs that are selected, all at once, and waits for one."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    with proving([item.callspec.params["proof"] for item in items if "proof" in item.callspec.params]) as wait:
        yield wait


def parameters(usual: list[Proof], everything: list[Proof]) -> list:
    """For the argument "proof" of a test: each once, those that are not ``usual`` marked ``full``."""
    usual = dict.fromkeys(usual)
    full = [proof for proof in dict.fromkeys(everything) if proof not in usual]
    return [pytest.param(proof, id=str(proof)) for proof in usual] + [
        pytest.param(proof, id=str(proof), marks=pytest.mark.full) for proof in full
    ]


def repeats(usual: int, often: int):
    """A test for each number of its ``count`` of repeats; without a GPU, two show that it works."""
    counts = [usual, pytest.param(often, marks=pytest.mark.full)] if ON_GPU else [2]
    return pytest.mark.parametrize("count", counts, ids="{}_times".format)


def requested_memory(what: str = "current") -> int:
    """Bytes that tensors were asked for, now or at their "peak"; what is allocated is up to a megabyte more of each."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]


def captured(step, inputs, dy):
    """What ``step(inputs, dy)`` returns, captured in a CUDA graph; and ``replay(inputs, dy)`` with other values."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(inputs, dy)

    def replay(fresh, fresh_dy):
        with torch.no_grad():
            for t, values in zip((*inputs, dy), (*fresh, fresh_dy), strict=True):
                t.copy_(values)
        graph.replay()
        torch.cuda.synchronize()

    return results, replay
