"""A process for :func:`benchmarks.probes.cold_start`: one network, two training steps, their seconds as JSON.

``python -m benchmarks.first_step MODEL SIZE N PROVIDER DEVICE``
"""

import time

_START = time.perf_counter()

import json  # noqa: E402 - what comes after the clock has started is what it measures
import sys  # noqa: E402

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import dwconv_kernels as dk  # noqa: E402
from benchmarks.machine import Machine  # noqa: E402
from benchmarks.probes import network_and_images  # noqa: E402
from benchmarks.results import OURS  # noqa: E402


def main(model: str, size: str, n: str, provider: str, device: str) -> None:
    machine = Machine(device)
    machine.set_up()
    torch.backends.cudnn.benchmark = False  # looking for the best convolution is no part of compiling
    network, images = network_and_images(model, int(size), int(n), machine)
    labels = torch.arange(int(n), device=machine.device)
    if provider == "compile":
        network = torch.compile(network, dynamic=False)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(machine.device.type, torch.bfloat16):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        machine.synchronize()
        return time.perf_counter() - start

    machine.synchronize()
    before = time.perf_counter() - _START
    with dk.backend(dk.current_backend() if provider == OURS else "torch"):
        first, second = step(), step()
    print(json.dumps({"before": before, "first": first, "second": second}))


if __name__ == "__main__":
    main(*sys.argv[1:])
