"""What the project set out to reach on an H100, held against a results file. ``python -m benchmarks.bars [FILE]``

Each of :data:`BARS` is a number to be reached and where it is in the results. Where there are several cases, all have
to reach it: the one that is furthest from it is shown. Without FILE: the newest results in ``benchmarks/results``. The
exit code is 0 where every bar is reached, 1 where one is missed, 2 where none was missed but some were not measured, or
tests of the kernels were not through, or there are no results.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import predictions, results, suites, tables
from benchmarks.headline import DEPTHWISE, measured
from benchmarks.results import OURS, Results, Row

STAGES = tuple(zip(suites.WIDTHS["T"], suites.MAPS, strict=True))
BLOCKS = (3, 3, 9, 3)  # of ConvNeXt-T's stages
WITHIN = 0.2  # of what was predicted
REACHED, MISSED, NOT_MEASURED, IN_PART = "reached", "missed", "not measured", "reached, as far as measured"
UNTESTED = "reached, but tests were not through"
GPU = "H100"  # whose times are predicted, and of which so many images per second are wanted


class Found(NamedTuple):
    """A number of one case; None where the results do not have it."""

    case: str
    value: float | None
    untested: bool = False


class Bar(NamedTuple):
    """``find``: the numbers that have to be at least ``wanted``, or at most where ``most``."""

    name: str
    wanted: float
    find: Callable[[Results], Iterable[Found]]
    most: bool = False

    def reached_by(self, value: float) -> bool:
        return value <= self.wanted if self.most else value >= self.wanted


class Verdict(NamedTuple):
    """What became of a bar: ``worst`` is the case that is furthest from it."""

    bar: Bar
    said: str
    worst: Found | None
    count: int
    missing: int


def verdict(bar: Bar, found: Results) -> Verdict:
    every = list(bar.find(found))
    there = [one for one in every if one.value is not None and math.isfinite(one.value)]
    missing = len(every) - len(there)
    if not there:
        return Verdict(bar, NOT_MEASURED, None, 0, missing)
    worst = (max if bar.most else min)(there, key=lambda one: one.value)
    said = MISSED if not bar.reached_by(worst.value) else IN_PART if missing else REACHED
    if said != MISSED and any(one.untested for one in there):
        said = UNTESTED
    return Verdict(bar, said, worst, len(there), missing)


# Where numbers are.


def convolution(c: int, size: int, k: int) -> str:
    return f"C={c} {size}×{size} {k}×{k} N={suites.OPERATOR_BATCH}"


def _untested(*rows: Row | None) -> bool:
    return any(row is not None and row.untested is not None for row in rows)


def _is_h100(found: Results) -> bool:
    return GPU in found.meta["gpu"]


def _row(found: Results, suite: str, case: str, dtype: str, provider: str = OURS) -> Row | None:
    """A row that is ok; of ours, one that ran on kernels."""
    row = found.get(suite, case, dtype, provider)
    return None if row is None or not row.ok or (provider == OURS and row.ran == "torch") else row


def of_copies(suite_names: Iterable[str], k: int) -> Callable[[Results], Iterator[Found]]:
    """Bytes that have to be moved per second, as a share of what a copy moves."""

    def find(found: Results) -> Iterator[Found]:
        rate = measured(found.get("ceilings", "copy", "bf16", "torch"), "rate")
        for suite in suite_names:
            for c, size in STAGES:
                row = _row(found, suite, convolution(c, size, k), "bf16")
                time = measured(row)
                share = row.bytes / time * 1e-3 / rate if time and rate and row.bytes else None
                yield Found(f"{suite} {convolution(c, size, k)}", share, _untested(row))

    return find


def speedups(cases: Iterable[tuple[str, str, str]], peers: Iterable[str]) -> Callable[[Results], Iterator[Found]]:
    """A peer's time as a multiple of ours, of every (suite, case, dtype) and peer."""
    cases, peers = list(cases), list(peers)

    def find(found: Results) -> Iterator[Found]:
        for suite, case, dtype in cases:
            for peer in peers:
                ours, row = (_row(found, suite, case, dtype, who) for who in (OURS, peer))
                speedup = measured(row, "speedup") if ours is not None else None
                yield Found(f"{suite} {case}, {peer}", speedup, _untested(ours))

    return find


def rates(suite: str, case: str, dtype: str) -> Callable[[Results], Iterator[Found]]:
    """Images per second of ours."""

    def find(found: Results) -> Iterator[Found]:
        row = _row(found, suite, case, dtype)
        yield Found(case, row.images_per_second if row is not None and _is_h100(found) else None, _untested(row))

    return find


def in_graphs(case: str) -> Callable[[Results], Iterator[Found]]:
    """What torch.compile takes in its CUDA graph as a multiple of ours in one."""

    def find(found: Results) -> Iterator[Found]:
        ours = _row(found, "model_inference", case, "bf16")
        row = found.get("model_inference", case, "bf16", "reduce_overhead")
        yield Found(case, measured(row, "over_graph") if ours is not None else None, _untested(ours))

    return find


def kept(found: Results) -> Iterator[Found]:
    """What ConvNeXt-T's blocks keep for the backward pass, as a share of what PyTorch's operators keep."""
    sums = {OURS: 0.0, "eager": 0.0}
    for (c, size), blocks in zip(STAGES, BLOCKS, strict=True):
        for provider in sums:
            row = found.get("memory", f"block C={c} {size}×{size} 7×7 N=32", "bf16", provider)
            size_of = measured(row, "saved_bytes")
            sums[provider] = math.nan if size_of is None else sums[provider] + blocks * size_of
    share = sums[OURS] / sums["eager"] if sums["eager"] else None
    yield Found("ConvNeXt-T's blocks", share)


def of(suite: str, provider: str, field: str, scale: float = 1.0) -> Callable[[Results], Iterator[Found]]:
    """A field of every row that a provider has in a suite."""

    def find(found: Results) -> Iterator[Found]:
        rows = [row for row in found.rows if (row.suite, row.provider) == (suite, provider)]
        for row in rows:
            value = measured(row, field) if row.ran != "torch" else None
            yield Found(row.case, None if value is None else value * scale, _untested(row))
        if not rows:
            yield Found(suite, None)

    return find


def against_predictions(found: Results) -> Iterator[Found]:
    """|predicted / measured − 1| of convolutions, on the GPU that the predictions are of."""
    for (suite, case, dtype), expected in predictions.read().items():
        if suite in DEPTHWISE:
            row = _row(found, suite, case, dtype) if _is_h100(found) else None
            time = measured(row)
            yield Found(f"{suite} {case}", None if time is None else off(time, expected), _untested(row))


def off(time: float, expected: predictions.Prediction) -> float:
    """How far from a time what was predicted is, as a share of the time; of a range, its nearer end."""
    low, high = expected.low / time - 1, expected.high / time - 1
    return 0.0 if low <= 0 <= high else min(abs(low), abs(high))


_SEVEN = [(suite, convolution(c, size, 7), "bf16") for suite in DEPTHWISE for c, size in STAGES]
_LARGE = [(suite, convolution(c, size, k), "bf16") for suite in DEPTHWISE for k in (9, 13, 31) for c, size in STAGES]
_BLOCKS = [("block_training", convolution(c, size, 7), "bf16") for c, size in STAGES]
_TRAINING = ("model_training", "convnext_tiny 224 N=256", "amp_bf16")
_INFERENCE = ("model_inference", "convnext_tiny 224 N=256", "bf16")

BARS = (
    Bar("7×7 forward and input gradient, share of a copy's bandwidth", 0.75, of_copies(DEPTHWISE[:2], 7)),
    Bar("7×7 weight gradient, share of a copy's bandwidth", 0.65, of_copies(DEPTHWISE[2:], 7)),
    Bar("7×7, cuDNN's time / ours, both layouts", 1.0, speedups(_SEVEN, ("eager", "channels_last"))),
    Bar("9×9 to 31×31, cuDNN's time in channels_last / ours", 8.0, speedups(_LARGE, ("channels_last",))),
    Bar("convolutions, distance from the predicted time", WITHIN, against_predictions, most=True),
    Bar("block, forward and backward, torch.compile's time / ours", 2.0, speedups(_BLOCKS, ("compile",))),
    Bar("ConvNeXt-T training, compiled timm's time / ours", 2.0, speedups([_TRAINING], ("timm_compile",))),
    Bar("ConvNeXt-T training, images/s", 10_500, rates(*_TRAINING)),
    Bar("ConvNeXt-T inference, compiled timm's time / ours", 2.5, speedups([_INFERENCE], ("timm_compile",))),
    Bar("ConvNeXt-T inference, images/s", 33_000, rates(*_INFERENCE)),
    Bar("compiled ViT-S's time / ours", 1.0, speedups([_TRAINING, _INFERENCE], ("vit_small",))),
    Bar("compiled Swin-T's time / ours", 2.5, speedups([_TRAINING, _INFERENCE], ("swin_tiny",))),
    Bar("kept for the backward pass, share of PyTorch's", 0.25, kept, most=True),
    Bar("batch 1, compiled reduce-overhead's time / our CUDA graph's", 1.0, in_graphs("convnext_tiny 224 N=1")),
    Bar("first training step from empty caches, s", 30.0, of("cold_start", OURS, "median_us", 1e-6), most=True),
    # With the first: the design allows 8 per number of channels and dtype, however many sizes come after.
    Bar("variants compiled over 200 sizes", 8, of("variants", OURS, "variants"), most=True),
)


def verdicts(found: Results) -> list[Verdict]:
    """Of every bar; a CPU's results say nothing of them."""
    if found.is_cpu:
        found = Results(found.meta)
    return [verdict(bar, found) for bar in BARS]


def table(found: Results) -> list[str]:
    """Markdown: a line for each bar."""
    lines = []
    for one in verdicts(found):
        sign = "≤" if one.bar.most else "≥"
        value = tables.NONE if one.worst is None else tables.number(one.worst.value)
        cases = f"{one.count} of {one.count + one.missing}"
        case = one.worst.case if one.worst else ""
        lines.append([one.bar.name, f"{sign} {one.bar.wanted:g}", value, one.said, cases, case])
    return tables.table(["bar", "wanted", "worst", "", "cases measured", "the worst"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: the newest in benchmarks/results")
    arguments = parser.parse_args(argv)
    try:
        path = arguments.file or results.newest(results.FOLDER)
        if path is None:
            raise ValueError(f"there are no results in {results.FOLDER}, and no FILE is named")
        found = Results.read(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path.name}: {found.meta['gpu']}, commit {found.meta['commit']}, {found.meta['date']}")
    print("\n".join(table(found)))
    said = {one.said for one in verdicts(found)}
    return 1 if MISSED in said else 0 if said == {REACHED} else 2


if __name__ == "__main__":
    sys.exit(main())
