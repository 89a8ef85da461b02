"""What is measured without rounds: ceilings of the machine, memory, host time, cold start, compiled variants."""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import convnext_fast
import dwconv_kernels as dk
from benchmarks.contest import Contest, Prepare, Unavailable
from benchmarks.machine import ROOT, Machine
from benchmarks.operators import DTYPES, OPERATORS, Case
from benchmarks.results import OURS, Row, quartiles
from benchmarks.timing import timed
from dwconv_kernels import runtime

# --- ceilings


def ceilings(case: str, dtype: str, quick: bool = False) -> Contest:
    """``case`` "copy": bytes read and written by a copy too large for any cache; "matmul": a large square product."""
    return Contest(
        "ceilings", case, dtype, ("torch",), open=functools.partial(_open_ceiling, case, dtype, quick), needs=()
    )


def _open_ceiling(case: str, dtype: str, quick: bool, machine: Machine) -> Prepare:
    contest = ceilings(case, dtype)

    def prepare(provider: str) -> Row:
        if case == "copy":
            size = (256 if quick else 1024) * 2**20 if machine.is_cuda else 2**27
            source = torch.randint(127, (size,), dtype=torch.uint8, device=machine.device)
            target = torch.empty_like(source)
            amount, unit, run = 2 * size / 1e9, "GB/s", lambda: target.copy_(source)
        else:
            n = 8192 if machine.is_cuda else 1024
            a, b = (torch.randn(n, n, device=machine.device).to(DTYPES[dtype]) for _ in range(2))
            amount, unit, run = 2 * n**3 / 1e12, "TFLOP/s", lambda: a @ b
        run()
        work = timed(machine.clock, run)
        samples = [work.sample(machine.clock) for _ in range(10)]
        rate = amount / statistics.median(samples)
        return contest.row(provider, **_times(samples), rate=rate, unit=unit, method=machine.clock.method)

    return prepare


# --- memory

BLOCK_PROVIDERS = (OURS, "ours_lean", "eager", "channels_last", "compile")


def memory_of_block(case: Case) -> Contest:
    """What a block keeps for its backward pass, and the peak of a training step of it."""
    return Contest("memory", f"block {case}", case.dtype, BLOCK_PROVIDERS, functools.partial(_open_block_memory, case))


def _open_block_memory(case: Case, machine: Machine) -> Prepare:
    block, contest = OPERATORS["block"], memory_of_block(case)

    def prepare(provider: str) -> Row:
        make = block.providers[OURS if provider == "ours_lean" else provider]
        function = functools.partial(make(case), memory="lean") if provider == "ours_lean" else make(case)
        inputs = block.inputs(case, machine.device)
        if provider in block.contiguous:
            inputs = {name: value.contiguous() for name, value in inputs.items()}
        dy = inputs.pop("dy")
        for value in inputs.values():
            value.requires_grad_()
        parameters = [value for name, value in inputs.items() if name != "x"]

        def step() -> None:
            torch.autograd.grad(function(**inputs), list(inputs.values()), dy)

        return contest.row(provider, **_memory(machine, lambda: function(**inputs), step, parameters))

    return prepare


def memory_of_network(
    model: str, size: int, n: int, dtype: str, providers: tuple[str, ...] = (OURS, "channels_last", "compile")
) -> Contest:
    """Peak of a training step of a network, optimizer left out, over what its parameters take."""
    return Contest(
        "memory", f"{model} {size} N={n}", dtype, providers,
        functools.partial(_open_network_memory, model, size, n, dtype), limit=120.0,
    )  # fmt: skip


def _open_network_memory(model: str, size: int, n: int, dtype: str, machine: Machine) -> Prepare:
    contest = memory_of_network(model, size, n, dtype)

    def prepare(provider: str) -> Row:
        network, images = network_and_images(model, size, n, machine)
        if provider == "compile":
            network = torch.compile(network, dynamic=False)

        def forward() -> Tensor:
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=dtype == "amp_bf16"):
                return network(images).float().mean()

        def step() -> None:
            forward().backward()
            network.zero_grad(set_to_none=True)

        with dk.backend(dk.current_backend() if provider == OURS else "torch"):
            return contest.row(provider, images=n, **_memory(machine, forward, step, list(network.parameters())))

    return prepare


def network_and_images(model: str, size: int, n: int, machine: Machine) -> tuple[nn.Module, Tensor]:
    network = convnext_fast.create_model(model).to(machine.device, memory_format=torch.channels_last)
    images = torch.randn(n, 3, size, size, device=machine.device).to(memory_format=torch.channels_last)
    return network, images


def _memory(machine: Machine, forward: Callable, step: Callable, parameters: list[Tensor]) -> dict:
    """What a row says of a training step's memory; and its time, which is what memory is often bought with."""
    step()  # compiles
    facts = {"saved_bytes": saved_bytes(forward, parameters), "peak_bytes": _peak_bytes(machine, step)}
    work = timed(machine.clock, step)
    samples = [work.sample(machine.clock) for _ in range(5)]
    facts |= _times(samples) | {"method": machine.clock.method}
    if not machine.is_cuda:
        facts["note"] = "the peak of memory is not measured on a CPU"
    return facts


def _times(samples: list[float]) -> dict:
    low, middle, high = quartiles(samples)
    return {"median_us": middle * 1e6, "spread": (high - low) / middle, "samples": len(samples)}


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Of all storage that autograd keeps between ``forward()`` and its backward, parameters left out.

    Storage counts once, however many tensors share it, and as a whole, as it stays in memory as a whole.
    """
    kept: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def _peak_bytes(machine: Machine, step: Callable[[], object]) -> int | None:
    if not machine.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- host time


def host(operator: str, training: bool) -> Contest:
    """Microseconds that a call keeps Python busy, on a map so small that the work itself hardly counts."""
    name = f"{operator} {'forward and backward' if training else 'forward'}"
    return Contest("host", name, "bf16", (OURS, "eager", "compile"), functools.partial(_open_host, operator, training))


def _open_host(name: str, training: bool, machine: Machine) -> Prepare:
    operator, contest = OPERATORS[name], host(name, training)
    case = Case(1, 32, 7, 7, kernel=(7, 7))

    def prepare(provider: str) -> Row:
        function = operator.providers[provider](case)
        inputs = operator.inputs(case, machine.device)
        dy = inputs.pop("dy")
        leaves = [value.requires_grad_(training) for value in inputs.values()]

        def call() -> None:
            y = function(**inputs)
            if training:
                torch.autograd.grad(y, leaves, dy)

        samples = host_samples(call, machine.synchronize)
        note = None if machine.is_cuda else "with the work itself, as nothing runs beside Python on a CPU"
        return contest.row(provider, **_times(samples), method="clock", note=note)

    return prepare


def host_samples(
    call: Callable[[], object],
    synchronize: Callable[[], object],
    now: Callable[[], float] = time.perf_counter,
    calls: int = 50,
    samples: int = 15,
) -> list[float]:
    """Seconds per call until it returns, not until its work is done; few enough calls that no queue fills up."""
    for _ in range(calls):
        call()
    seconds = []
    for _ in range(samples):
        synchronize()
        start = now()
        for _ in range(calls):
            call()
        seconds.append((now() - start) / calls)
    synchronize()
    return seconds


# --- cold start

STOPPING = 10.0  # seconds before the limit, so that the process is ended by whoever has started it
COLD_PROVIDERS = (OURS, "channels_last", "compile")


def cold_start(model: str, size: int, n: int, providers: tuple[str, ...] = COLD_PROVIDERS) -> Contest:
    """Seconds of the first training step of a fresh process whose caches of compiled code are empty."""
    return Contest(
        "cold_start", f"{model} {size} N={n}", "amp_bf16", providers,
        functools.partial(_open_cold_start, model, size, n), limit=180.0,
    )  # fmt: skip


def _open_cold_start(model: str, size: int, n: int, machine: Machine) -> Prepare:
    contest = cold_start(model, size, n)

    def prepare(provider: str) -> Row:
        with tempfile.TemporaryDirectory() as empty:
            caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
            environment = {**os.environ, **{name: os.path.join(empty, name) for name in caches}}
            arguments = [model, str(size), str(n), provider, str(machine.device)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.first_step", *arguments], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, text=True, timeout=contest.limit - STOPPING,
            )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"exit status {done.returncode}; the log has what it said")
        said = json.loads(done.stdout.splitlines()[-1])
        return contest.row(
            provider, median_us=said["first"] * 1e6, samples=1, method="clock", images=n,
            note=f"second step {said['second']:.2f} s; imports and building the network {said['before']:.1f} s",
        )  # fmt: skip

    return prepare


# --- compiled variants


VARIANTS_CHANNELS = 80  # which no other contest has: what those compiled would not be compiled again


def variants(training: bool, sizes: int = 200) -> Contest:
    """How often anything is compiled over many random N, H and W, and how long all of them take, once each."""
    case = f"depthwise {'training' if training else 'forward'} C={VARIANTS_CHANNELS} 7×7, {sizes} random sizes"
    return Contest(
        "variants", case, "bf16", (OURS, "compile"), functools.partial(_open_variants, training, sizes), limit=240.0
    )


def compiled_kernels() -> dict[str, int]:
    """How many variants of each depthwise kernel Triton has compiled or loaded in this process."""
    launch = runtime.launchers("depthwise")
    modules = [launch.kernels]
    if launch.tensor is not None:
        modules += [launch.tensor.kernels_gluon, launch.tensor.kernels_tables]
    every = [item for module in modules for item in vars(module).items()]
    functions = {name: value for name, value in every if hasattr(value, "device_caches")}
    if not functions:
        raise RuntimeError("this Triton keeps what it has compiled in another place")
    # The first of the things that Triton keeps per device are the kernels, by what they were specialised for.
    return {name: sum(len(kept[0]) for kept in f.device_caches.values()) for name, f in functions.items()}


def random_sizes(count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """(N, H, W), all different, as varying batches and multi-scale training bring them."""
    draw = random.Random(seed)
    found: dict[tuple[int, int, int], None] = {}
    while len(found) < count:
        found[(draw.randint(1, 32), draw.randint(7, 64), draw.randint(7, 64))] = None
    return list(found)


def _open_variants(training: bool, sizes: int, machine: Machine) -> Prepare:
    contest, depthwise = variants(training, sizes), OPERATORS["depthwise"]
    case = Case(1, VARIANTS_CHANNELS, 7, 7, kernel=(7, 7))

    def call(function: Callable[..., Tensor], n: int, h: int, w: int) -> None:
        inputs = depthwise.inputs(case._replace(n=n, h=h, w=w), machine.device)
        dy = inputs.pop("dy")
        leaves = [value.requires_grad_(training) for value in inputs.values()]
        y = function(**inputs)
        if training:
            torch.autograd.grad(y, leaves, dy)

    def prepare(provider: str) -> Row:
        function, count = (_ours_and_count if provider == OURS else _compile_and_count)(case, machine)
        before, start = count(), time.perf_counter()
        # PyTorch's default: to look for the fastest convolution of each size would take longer than all else.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            for n, h, w in random_sizes(sizes):
                call(function, n, h, w)
        machine.synchronize()
        seconds = time.perf_counter() - start
        return contest.row(provider, variants=count() - before, median_us=seconds / sizes * 1e6, method="clock")

    return prepare


def _ours_and_count(case: Case, machine: Machine) -> tuple[Callable[..., Tensor], Callable[[], int]]:
    depthwise = OPERATORS["depthwise"]
    inputs = depthwise.inputs(case, machine.device)
    inputs.pop("dy")
    supported, reason = depthwise.supports(case, **inputs)
    if not supported:
        raise Unavailable(reason)
    return depthwise.providers[OURS](case), lambda: sum(compiled_kernels().values())


def _compile_and_count(case: Case, machine: Machine) -> tuple[Callable[..., Tensor], Callable[[], int]]:
    """torch.compile as users have it, who let sizes become dynamic after the first change."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    function = torch.compile(OPERATORS["depthwise"].providers["channels_last"](case))
    return function, lambda: counters["stats"]["unique_graphs"]
