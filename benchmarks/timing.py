"""Time, honestly: clocks of host and GPU, samples long enough for their clock, providers in turns.

A machine gets faster and slower while it is measured, by heat and by what else runs on it. So providers are compared
within rounds: in each round every provider runs once, the order changing from round to round, and a ratio is the median
of the ratios within rounds. A slow moment then meets all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

ENOUGH_CLOCK_TICKS = 2e-3  # seconds that one sample lasts at least


class Clock(Protocol):
    method: str

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """What ``repeats`` runs take together."""


class HostClock:
    """For work that is done when a function returns."""

    method = "clock"

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        start = self._now()
        for _ in range(repeats):
            run()
        return self._now() - start


class EventClock:
    """The GPU's own: from before the first run to after the last one, on the current stream.

    The GPU is kept busy until the first run is on its way, so that Python's time for it does not count.
    """

    method = "events"
    HEAD_START = 100_000  # cycles, about 50 µs

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # milliseconds


class Timed(NamedTuple):
    """Something to be timed: a function, how many calls it makes, and how often it is run for one sample."""

    run: Callable[[], object]
    calls: int = 1
    repeats: int = 1

    def sample(self, clock: Clock) -> float:
        """Seconds per call."""
        return clock.seconds(self.run, self.repeats) / (self.repeats * self.calls)


def timed(clock: Clock, run: Callable[[], object], calls: int = 1, at_least: float = ENOUGH_CLOCK_TICKS) -> Timed:
    """``run``, warmed up, with so many repeats that a sample lasts ``at_least`` so many seconds."""
    repeats, seconds = 1, clock.seconds(run, 1)
    while seconds < at_least:  # twice is not enough where the first run was slow
        estimate = math.ceil(repeats * at_least / max(seconds, at_least / 1000))
        repeats = max(repeats + 1, min(estimate, 100 * repeats))
        seconds = clock.seconds(run, repeats)
    return Timed(run, calls, repeats)


def interleave(
    clock: Clock,
    providers: Mapping[str, Timed],
    seconds: float,
    rounds: tuple[int, int] = (5, 50),
    before: Callable[[str], object] = lambda _: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Samples (seconds per call) of every provider, as many of each, sample i of all of them from round i.

    Args:
        seconds: after which no further round begins.
        rounds: at least and at most so many.
        before: is told the provider's name before each of its samples.
    """
    names = list(providers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = now() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and now() >= end:
            break
        first = done % len(names)
        order = names[first:] + names[:first]
        for name in order if done % 2 == 0 else reversed(order):
            before(name)
            samples[name].append(providers[name].sample(clock))
    return samples


def ratios(samples: Mapping[str, list[float]], name: str, to: str) -> list[float]:
    """Of two providers' samples, round by round."""
    return [a / b for a, b in zip(samples[name], samples[to], strict=True)]


class ReplayClock:
    """Shows time that was measured elsewhere: a timer for pytest-benchmark, which wants to measure by itself."""

    def __init__(self):
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, benchmark, samples: list[float]) -> None:
        """Has the fixture ``benchmark``, whose timer this is, see ``samples``, seconds, as its rounds."""
        remaining = iter(samples)

        def tick() -> None:
            self._now += next(remaining, 0.0)

        benchmark.pedantic(tick, rounds=len(samples))
