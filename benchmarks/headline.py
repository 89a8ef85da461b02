"""What reports and plots agree on: titles, the order of providers, and the cases that stand for a whole suite."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from benchmarks.results import OURS, Row, by_contest

# In the order in which they are shown; a suite that is not named here comes last, under its own name.
SUITES = {
    "depthwise_forward": "Depthwise, forward",
    "depthwise_input_gradient": "Depthwise, input gradient",
    "depthwise_weight_gradient": "Depthwise, weight and bias gradient",
    "layer_norm_linear_forward": "LayerNorm + Linear, forward",
    "layer_norm_linear_training": "LayerNorm + Linear, forward and backward",
    "block_forward": "ConvNeXt block, forward",
    "block_training": "ConvNeXt block, forward and backward",
    "model_training": "Networks, training step",
    "model_inference": "Networks, inference",
    "memory": "Memory of a training step",
    "host": "Host time of a call",
    "cold_start": "Cold start",
    "variants": "Variants that are compiled",
    "ceilings": "Ceilings of this machine",
}
DEPTHWISE = ("depthwise_forward", "depthwise_input_gradient", "depthwise_weight_gradient")
COMPOSITIONS = ("layer_norm_linear_forward", "layer_norm_linear_training", "block_forward", "block_training")
NETWORKS = ("model_training", "model_inference")
PROVIDERS = (
    OURS, "ours_compile", "ours_graph", "ours_max_autotune", "ours_lean", "ours_timm", "eager", "channels_last",
    "compile", "reduce_overhead", "max_autotune", "timm", "timm_compile", "swin_tiny", "vit_small", "resnet50",
)  # fmt: skip
GRAPHS = ("reduce_overhead", "max_autotune")  # networks that torch.compile puts into CUDA graphs
# The first of these that a suite has is the one that stands for it; networks are trained under autocast.
DTYPES = ("bf16", "amp_bf16", "fp16", "fp32")
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels and rows of ConvNeXt-T's maps at 224×224
_BATCH = re.compile(r"\s*\bN=(\d+)")
_STAGE = re.compile(r"(?:block )?C=(\d+) (\d+)×(\d+) 7×7")


def measured(row: Row | None, field: str = "median_us") -> float | None:
    """The number in ``field`` of a row that is there and ok; None where there is none, NaN and Inf included."""
    value = getattr(row, field) if row is not None and row.ok else None
    return value if value is not None and math.isfinite(value) else None


def title(suite: str) -> str:
    return SUITES.get(suite, suite)


def by_suite(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each suite, the suites that are known first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.suite, []).append(row)
    return {suite: found[suite] for suite in sorted(found, key=lambda suite: _rank(suite, tuple(SUITES)))}


def providers(rows: Iterable[Row]) -> list[str]:
    """Every provider once: ours, then those that are known, then the others as they came."""
    return sorted(dict.fromkeys(row.provider for row in rows), key=lambda name: _rank(name, PROVIDERS))


def is_peer(provider: str) -> bool:
    """Is it somebody else's? Ours under ``torch.compile`` or in a CUDA graph is no peer of ours."""
    return provider != OURS and not provider.startswith(OURS + "_")


def of(contest: Iterable[Row], provider: str) -> Row | None:
    return next((row for row in contest if row.provider == provider), None)


def batch(case: str) -> int:
    found = _BATCH.search(case)
    return int(found.group(1)) if found else 0


def without_batch(case: str) -> str:
    return _BATCH.sub("", case).strip()


def stage(case: str) -> int | None:
    """Which of ConvNeXt-T's 7×7 convolutions a case is: 0 to 3, or None."""
    found = _STAGE.fullmatch(without_batch(case))
    if not found or found.group(2) != found.group(3):
        return None
    size = (int(found.group(1)), int(found.group(2)))
    return STAGES.index(size) if size in STAGES else None


def blocks(rows: Iterable[Row], wanted: bool = True) -> list[Row]:
    """Of the suite "memory": the rows of single blocks, or those of whole networks."""
    return [row for row in rows if row.case.startswith("block ") == wanted]


def headline(rows: Sequence[Row], limit: int = 4) -> list[list[Row]]:
    """The cases that stand for the suite of ``rows``, each with the rows of all its providers.

    One dtype, and the largest batch of each case: ConvNeXt-T's 7×7 convolutions where there are some, else the first
    ``limit`` cases. Which numbers came out has no say in it.
    """
    contests = by_contest(rows)
    if not contests:
        return []
    order = ("amp_bf16", *DTYPES) if rows[0].suite == "model_training" else DTYPES
    dtype = min((dtype for _, _, dtype in contests), key=lambda name: _rank(name, order))
    largest: dict[str, list[Row]] = {}
    for (_, case, of_dtype), contest in contests.items():
        name = without_batch(case)
        if of_dtype == dtype and (name not in largest or batch(case) > batch(largest[name][0].case)):
            largest[name] = contest
    chosen = list(largest.values())
    stages = [contest for contest in chosen if stage(contest[0].case) is not None]
    return sorted(stages, key=lambda contest: stage(contest[0].case))[:limit] or chosen[:limit]


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
