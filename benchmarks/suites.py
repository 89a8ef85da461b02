"""What is measured, in order of importance, and who with whom: the plan of all benchmarks.

Stages are those of a ConvNeXt at 224²: maps of 56, 28, 14 and 7, so many channels as the network has there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks import networks, probes
from benchmarks.contest import Contest
from benchmarks.networks import OTHERS, NetworkCase
from benchmarks.operators import OPERATORS, Case
from benchmarks.results import OURS, OURS_GRAPH

MAPS = (56, 28, 14, 7)
WIDTHS = {"T": (96, 192, 384, 768), "B": (128, 256, 512, 1024), "L": (192, 384, 768, 1536)}  # S has those of T
OPERATOR_BATCH = 128
PYTORCH = ("eager", "channels_last", "compile")
LARGE = 13  # beyond it PyTorch's convolutions take long, and few rounds say enough
# Who takes part where an image or a few are waited for.
LATENCY = {"first": (OURS, OURS_GRAPH), "pytorch": ("reduce_overhead", "compile", "channels_last", "timm")}
DEPTHWISE = ("depthwise_forward", "depthwise_input_gradient", "depthwise_weight_gradient")
NORM_LINEAR = ("layer_norm_linear_forward", "layer_norm_linear_training")
BLOCK = ("block_forward", "block_training")


class Visit(NamedTuple):
    """A contest, and which of its providers come this time: those that take long to get ready come later."""

    contest: Contest
    providers: tuple[str, ...]
    again: bool  # ours has been measured before, in a CUDA graph as well, and is there for the ratio only

    def __str__(self) -> str:
        return f"{self.contest} ({', '.join(self.providers)})"


def plan(cuda: bool, quick: bool = False) -> list[Contest]:
    """All contests for a GPU, or for a CPU, the most important first; ``quick``: what an impression needs."""
    contests = list(_for_gpu(quick) if cuda else _for_cpu(quick))
    unique = {contest.key: contest for contest in reversed(contests)}
    return [contest for contest in contests if unique[contest.key] is contest]


def visits(contests: Iterable[Contest]) -> list[Visit]:
    """Every contest once, and after all of them those again that have providers that come late."""
    contests = list(contests)
    first = [Visit(c, tuple(p for p in c.providers if p not in c.late), False) for c in contests]
    second = [Visit(c, tuple(p for p in c.providers if p in (OURS, OURS_GRAPH, *c.late)), True) for c in contests]
    return first + [visit for visit in second if any(p in visit.contest.late for p in visit.providers)]


def _for_gpu(quick: bool) -> Iterator[Contest]:
    yield probes.ceilings("copy", "bf16", quick)
    yield from (probes.ceilings("matmul", dtype) for dtype in (("bf16",) if quick else ("bf16", "fp16", "fp32")))
    yield from _depthwise("T", 7, stages=(0, 2) if quick else range(4), providers=(OURS, *PYTORCH, "max_autotune"))
    yield _network("convnext_tiny", 256, "amp_bf16", training=True, more=("max_autotune", *OTHERS))
    yield _network("convnext_tiny", 256, "bf16", more=("max_autotune", *OTHERS))
    blocks = [Case(32, c, size, size, kernel=(7, 7)) for c, size in zip(WIDTHS["T"], MAPS, strict=True)]
    host = [probes.host(name, training) for name in OPERATORS for training in (False, True)]
    if quick:
        yield from host
        yield from map(probes.memory_of_block, blocks[:1])
        yield from _depthwise("T", 13, stages=(0,))
        return
    yield from _maps("block", BLOCK, (OURS, *PYTORCH, "max_autotune"), kernel=(7, 7))
    for kernel in (13, 31, 9):
        yield from _depthwise("T", kernel)
    yield from map(probes.memory_of_block, blocks)
    yield probes.memory_of_network("convnext_tiny", 224, 64, "amp_bf16")
    yield _network("convnext_tiny", 1, "bf16", more=("max_autotune",), **LATENCY)
    yield from (probes.variants(training) for training in (False, True))
    yield probes.cold_start("convnext_tiny", 224, 32)
    yield from host
    yield from _maps("norm_linear", NORM_LINEAR, (OURS, "eager", "compile", "max_autotune"))
    yield _network("convnext_tiny", 32, "bf16", **LATENCY)
    yield from _other_networks()
    for kernel in (3, 5, 11, 21):
        yield from _depthwise("T", kernel)
    for dtype in ("fp16", "fp32"):
        yield from _depthwise("T", 7, dtype=dtype)
    for family in ("B", "L"):
        for kernel in (7, 13, 31, 3, 5, 9, 11, 21):
            yield from _depthwise(family, kernel)
    for family in ("B", "L"):
        yield from _maps("block", BLOCK, kernel=(7, 7), family=family)
        yield from _maps("norm_linear", NORM_LINEAR, (OURS, "eager", "compile"), family=family)


def _other_networks() -> Iterator[Contest]:
    models = ("convnextv2_tiny", "convnext_base", "convnext_large", "convnext_small")
    for model, n in zip(models, (256, 128, 64, 128), strict=True):
        more = ("max_autotune",) if model == "convnext_base" else ()
        yield _network(model, n, "amp_bf16", training=True, more=more)
        yield _network(model, 256, "bf16", more=more)
    for size, n in ((384, 64), (288, 128), (160, 256)):
        yield _network("convnext_tiny", n, "bf16", size=size)
        yield _network("convnext_tiny", n, "amp_bf16", size=size, training=True)
    yield _network("convnext_tiny", 256, "bf16", training=True)
    for model in models:
        for n in (1, 32):
            yield _network(model, n, "bf16", **LATENCY)


def _for_cpu(quick: bool) -> Iterator[Contest]:
    """The same suites on sizes that two cores manage in minutes: they show that everything works, and little else."""
    yield probes.ceilings("copy", "fp32")
    yield from (probes.ceilings("matmul", dtype) for dtype in ("fp32", "bf16"))
    options = {"seconds": 0.2, "late": ("compile", "max_autotune")}
    small = {"n": 1, "dtype": "fp32", **options}
    # A compiler takes seconds for every case, so only some have it.
    yield from _depthwise("T", 7, stages=(1,), providers=(OURS, *PYTORCH, "max_autotune"), **small)
    yield from _depthwise("T", 7, stages=(3,), providers=(OURS, *PYTORCH[:2]), **small)
    if quick:
        yield from _cpu_probes((False,))
        return
    for kernel in (3, 13, 31):
        yield from _depthwise("T", kernel, stages=(2,), providers=(OURS, *PYTORCH[:2]), **small)
    yield from _depthwise("T", 7, stages=(2,), providers=(OURS, *PYTORCH[:2]), **{**small, "dtype": "bf16"})
    norm_linear = (OURS, "eager", "compile", "max_autotune")
    yield from _maps("norm_linear", NORM_LINEAR, norm_linear, stages=(2,), **small)
    yield from _maps("block", BLOCK, (OURS, *PYTORCH, "max_autotune"), stages=(2,), kernel=(7, 7), **small)
    yield from _cpu_probes((False, True))
    few = {"first": (OURS,), "pytorch": ("channels_last", "timm", "eager")}
    for dtype in ("fp32", "bf16"):
        for training in (False, True):
            yield _network("convnext_tiny", 1 if training else 2, dtype, training=training, rounds=(15, 15), **few)
    several = {**few, "seconds": 0.2}
    yield _network("convnext_tiny", 8, "amp_bf16", size=64, training=True, more=("max_autotune",), **several)
    compiled = {"first": (OURS,), "pytorch": ("timm", "compile"), "seconds": 0.2}
    yield _network("convnext_tiny", 8, "fp32", size=64, more=("resnet50",), **compiled)
    for model in ("convnext_small", "convnext_base", "convnext_large", "convnextv2_tiny"):
        yield _network(model, 1, "fp32", size=64, **several)
    yield _network("convnextv2_tiny", 2, "fp32", size=64, training=True, **several)


def _cpu_probes(trainings: tuple[bool, ...]) -> Iterator[Contest]:
    yield from (probes.host(name, training) for name in OPERATORS for training in trainings)
    yield probes.memory_of_block(Case(2, 96, 28, 28, dtype="fp32", kernel=(7, 7)))
    yield probes.memory_of_network("convnext_tiny", 64, 2, "amp_bf16", (OURS, "channels_last"))
    yield probes.cold_start("convnext_tiny", 64, 2, (OURS, "channels_last"))
    yield probes.variants(False, 20)


def _depthwise(
    family: str,
    kernel: int,
    stages: Iterable[int] = range(4),
    dtype: str = "bf16",
    n: int = OPERATOR_BATCH,
    providers: tuple[str, ...] | None = None,
    **options,
) -> Iterator[Contest]:
    if providers is None:  # of one convolution, torch.compile makes what channels_last runs
        providers = (OURS, *PYTORCH) if kernel == 7 else (OURS, "eager", "channels_last")
    if kernel > LARGE:
        options = {"limit": 30.0, "rounds": (3, 50), **options}
    yield from _maps("depthwise", DEPTHWISE, providers, (kernel, kernel), stages, dtype, n, family, **options)


def _maps(
    operator: str,
    passes: Iterable[str],
    providers: tuple[str, ...] = (OURS, *PYTORCH),
    kernel: tuple[int, int] | None = None,
    stages: Iterable[int] = range(4),
    dtype: str = "bf16",
    n: int = OPERATOR_BATCH,
    family: str = "T",
    **options,
) -> Iterator[Contest]:
    for name in passes:
        for stage in stages:
            case = Case(n, WIDTHS[family][stage], MAPS[stage], MAPS[stage], dtype, kernel)
            yield OPERATORS[operator].contest(name, case, providers, **options)


def _network(
    model: str,
    n: int,
    dtype: str,
    size: int = 224,
    training: bool = False,
    first: tuple[str, ...] = (OURS, "ours_compile"),
    pytorch: tuple[str, ...] = ("timm_compile", "compile", "channels_last", "timm", "ours_timm", "eager"),
    more: tuple[str, ...] = (),
    **options,
) -> Contest:
    return networks.contest(NetworkCase(model, size, n, dtype, training), (*first, *pytorch, *more), **options)
