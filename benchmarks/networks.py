"""Contests of whole networks: a training step, inference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convnext_fast
import dwconv_kernels as dk
from benchmarks.contest import Contest, Cost, Entry, Prepare, Unavailable, Wrong, relative_error
from benchmarks.machine import Machine
from benchmarks.operators import Case, block_cost, fallback
from benchmarks.results import OURS, OURS_GRAPH
from benchmarks.timing import timed
from convnext_fast.backend_in_use import describe_backend
from tests import torchvision_shim

CLASSES = 1000
# Networks of other families, for orientation: what a user would take instead, compiled as well.
OTHERS = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "vit_small": "vit_small_patch16_224",
    "resnet50": "resnet50",
}
LATE = ("max_autotune", *OTHERS)
MODES = {"max_autotune": "max-autotune", "reduce_overhead": "reduce-overhead"}  # both make CUDA graphs
PROVIDERS = (
    OURS, "ours_compile", "timm_compile", "compile", "channels_last", "timm", "ours_timm", "eager", "max_autotune",
)  # fmt: skip
# By the norm of the logits. Half-precision activations of some fifty layers differ by this much between two right
# implementations; a block that is missing or wrong makes several times as much.
TOLERANCE = {"bf16": 0.08, "amp_bf16": 0.08, "fp16": 0.02, "fp32": 1e-3}


class NetworkCase(NamedTuple):
    """A network on N images of size × size; amp_bf16 is autocast over fp32 parameters."""

    model: str
    size: int
    n: int
    dtype: str
    training: bool

    @property
    def parameters_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype, torch.float32)

    def __str__(self) -> str:
        return f"{self.model} {self.size} N={self.n}"


def contest(case: NetworkCase, providers: tuple[str, ...] = PROVIDERS, **options) -> Contest:
    """A contest of networks; ``options`` are further fields of :class:`Contest`."""
    return Contest(
        "model_training" if case.training else "model_inference",
        str(case),
        case.dtype,
        providers,
        open=functools.partial(_open, case),
        costs=tuple(network_costs(case)),
        needs=("depthwise", "norm_linear", "block", "training"),
        needs_besides={"ours_timm": ("accelerate",)},
        **{"late": LATE, "seconds": 4.0, "limit": 240.0, **options},
    )


def network_costs(case: NetworkCase) -> Iterator[Cost]:
    """Layer by layer, whatever has to run one after the other; in training, forward and backward.

    A block is one operator, as in :mod:`benchmarks.operators`. Training ends with AdamW, which reads parameters,
    gradients and two moments, and writes all but the gradients.
    """
    with torch.device("meta"):
        network = convnext_fast.create_model(case.model)
    item, size, before = 2 if "16" in case.dtype else 4, case.size, network.in_chans
    for stage in network.stages:
        c = stage[0].dwconv.in_channels
        is_stem = before == network.in_chans
        patch = 4 if is_stem else 2
        read, size, weights = case.n * before * size**2, size // patch, before * c * patch**2
        # Backward reads x, dy and the weights, and writes dx and dw; images have no dx, for which weights are read.
        moved = read + case.n * size**2 * c + weights
        if case.training:
            moved += (1 if is_stem else 2) * (read + weights) + case.n * size**2 * c
        products = (1 if not case.training else 2 if is_stem else 3) * case.n * size**2 * weights
        yield Cost(moved * item, 2 * products)
        for block in stage:
            here = Case(case.n, c, size, size, "bf16" if item == 2 else "fp32", block.dwconv.kernel_size)
            yield block_cost(here, case.training)
        before = c
    # From the last map to the logits: backward of the mean only writes that map.
    times, head = (2 if case.training else 1), before * CLASSES
    moved = times * case.n * (size**2 * before + CLASSES) + (3 if case.training else 1) * head
    yield Cost(moved * item, (3 if case.training else 1) * 2 * case.n * head)
    if case.training:
        count = sum(parameter.numel() for parameter in network.parameters())
        yield Cost(7 * count * case.parameters_dtype.itemsize, 0)


def state_of(model: str) -> dict[str, Tensor]:
    """Parameters that every provider gets, far from their initial values: a small layer scale hides the blocks."""
    torch.manual_seed(0)
    network = convnext_fast.create_model(model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma") or "grn" in name:
                parameter.uniform_(0.1, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
    return network.state_dict()


def _open(case: NetworkCase, machine: Machine) -> Prepare:
    state = state_of(case.model)
    images = torch.randn(case.n, 3, case.size, case.size, device=machine.device)
    labels = torch.randint(CLASSES, (case.n,), device=machine.device)
    expected = _expected(case, state, images, machine)

    def prepare(provider: str) -> Entry:
        network, backend = _network(case, provider, state)
        layout = torch.contiguous_format if provider == "eager" else torch.channels_last
        network = network.to(machine.device, case.parameters_dtype, memory_format=layout).train(case.training)
        mine = images.to(case.parameters_dtype, memory_format=layout)
        network = _compiled(network, provider, machine)
        call = (_training if case.training else _inference)(case, network, mine, labels, machine)
        call = _on_backend(call, backend)
        error = None
        if provider not in OTHERS:
            error = relative_error([call()], [expected])
            if not error <= TOLERANCE[case.dtype]:
                raise Wrong(f"its logits are {error:.2g} of their norm away; {TOLERANCE[case.dtype]} is allowed")
        run, method = machine.lap([call], graph=provider == OURS_GRAPH)
        facts = {"method": method, "error": error, "images": case.n}
        if provider.startswith(OURS):
            ran = describe_backend(machine.device)
            note = fallback() if ran.startswith("triton") else None
            facts |= {"ran": ran.split()[0], "note": ran if note is None else f"{ran}; {note}"}
        if provider in OTHERS:
            facts |= {"fraction_of_floor": None, "floor_us": None, "bytes": None, "flops": None}
        return Entry(timed(machine.clock, run), facts)

    return prepare


def _expected(case: NetworkCase, state: dict[str, Tensor], images: Tensor, machine: Machine) -> Tensor:
    """Logits by PyTorch in fp32; in training, those of the first step, which are no others without drop path."""
    network = convnext_fast.create_model(case.model)
    network.load_state_dict(state)
    network = network.to(machine.device, memory_format=torch.channels_last).eval()
    with torch.no_grad(), dk.backend("torch"):
        return torch.cat([network(some) for some in images.split(32)])


def _network(case: NetworkCase, provider: str, state: dict[str, Tensor]) -> tuple[nn.Module, str]:
    """The module, with the common parameters, and the backend of this package under which it runs."""
    backend = dk.current_backend() if provider.startswith(OURS) else "torch"
    if provider in OTHERS or "timm" in provider:
        torchvision_shim.install()  # timm imports torchvision
        try:
            import timm
        except ImportError:
            raise Unavailable("timm is not installed") from None
        if provider in OTHERS:
            kwargs = {} if case.size == 224 or provider == "resnet50" else {"img_size": case.size}
            return timm.create_model(OTHERS[provider], **kwargs), backend
        network = timm.create_model(case.model)
        network.load_state_dict(convnext_fast.convert_state_dict(state, to="timm", like=network))
        if provider.startswith(OURS):
            convnext_fast.accelerate(network)
        return network, backend
    network = convnext_fast.create_model(case.model)
    network.load_state_dict(state)
    return network, backend


def _compiled(network: nn.Module, provider: str, machine: Machine) -> nn.Module:
    if provider in MODES:
        if not machine.is_cuda:
            raise Unavailable(f"{MODES[provider]} is for GPUs")
        return torch.compile(network, mode=MODES[provider], dynamic=False)
    if provider.endswith("compile") or provider in OTHERS:
        return torch.compile(network, dynamic=False)
    return network


def _inference(case: NetworkCase, network: nn.Module, images: Tensor, labels: Tensor, machine: Machine) -> Callable:
    def infer() -> Tensor:
        with torch.inference_mode(), _autocast(case, machine):
            return network(images)

    return infer


def _training(case: NetworkCase, network: nn.Module, images: Tensor, labels: Tensor, machine: Machine) -> Callable:
    # The learning rate keeps the network where it is, over all rounds; the work does not depend on it.
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def step() -> Tensor:
        with _autocast(case, machine):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logits.detach()

    return step


def _autocast(case: NetworkCase, machine: Machine) -> torch.autocast:
    return torch.autocast(machine.device.type, torch.bfloat16, enabled=case.dtype == "amp_bf16")


def _on_backend(call: Callable[[], Tensor], backend: str) -> Callable[[], Tensor]:
    def on_backend() -> Tensor:
        with dk.backend(backend):
            return call()

    return on_backend
