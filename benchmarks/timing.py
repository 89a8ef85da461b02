"""Honest comparisons of two callables on a machine that does other things as well."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Comparison(NamedTuple):
    """Seconds of paired runs, and their ratios ours/theirs, one per pair."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        ratios = sorted(self.ratios)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        return (
            f"ours/theirs {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, all {ratios[0]:.3f} to "
            f"{ratios[-1]:.3f}, {len(ratios)} pairs); medians {statistics.median(self.ours) * 1e3:.1f} ms and "
            f"{statistics.median(self.theirs) * 1e3:.1f} ms"
        )


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 11, warmup: int = 2) -> Comparison:
    """Time both ``pairs`` times, one right after the other, each going first every second time.

    A slow moment of the machine then meets both of a pair, and the ratio within pairs hardly moves. On the CPU only:
    nothing here waits for a GPU.
    """
    runs = (ours, theirs)
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            start = time.perf_counter()
            runs[which]()
            seconds[which].append(time.perf_counter() - start)
    return Comparison(*seconds)
