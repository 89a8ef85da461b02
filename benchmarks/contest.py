"""A contest: one operator or network on one case, several providers, measured in one process in turns.

What a contest reports goes through ``say``: a :class:`Turn` before a provider is waited for, a row as soon as there is
anything to write, and again when all rounds are done. So whoever listens can write down what there is at any moment,
and knows whom to blame when nothing comes any more.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from benchmarks.machine import Machine
from benchmarks.results import OURS, OURS_GRAPH, Row, quartiles
from benchmarks.timing import Timed, interleave, ratios

FIRST_SAMPLES = 3  # of a provider alone, before the rounds with the others; one where that takes long
LONG = 0.1
LONGEST_REASON = 300
LATE_LIMIT = 5  # times the limit of the others, for who comes late because it takes long
MEMORY_SHARE = 0.25  # of the GPU's memory, at most, for who only compiles while others run tests


class Unavailable(Exception):
    """A provider that cannot run here, for a reason that is no mistake: a package or a GPU that is not there."""


class Wrong(Exception):
    """A provider whose result is not the right one, so that its speed is of no interest."""


class Cost(NamedTuple):
    """What a piece of work takes at least: bytes read or written once, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best, measured in the same run; operations per second are those of one dtype."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, costs: Sequence[Cost]) -> float:
        """Seconds that pieces of work take, one after another, each at the ceiling that limits it."""
        return sum(max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second) for cost in costs)


class Entry(NamedTuple):
    """A provider that is ready to be timed, and what its row says besides the time."""

    timed: Timed
    facts: dict


class Turn(NamedTuple):
    """From now on this provider is waited for, and should need less than so many seconds."""

    provider: str
    seconds: float


Prepare = Callable[[str], Entry | Row]


@dataclass(frozen=True)
class Contest:
    """Who is measured on what.

    Attributes:
        providers: in the order in which they get ready; ours is first.
        open: makes the inputs, and returns what gets a provider ready. It may return a whole row instead, of something
            that is not timed in rounds.
        costs: of the work, piece by piece; empty where nobody knows.
        needs: the operators, ..., whose tests have to pass before ours may be fast (:mod:`benchmarks.gpu_tests`).
        needs_besides: by provider, what else has to pass.
        limit: seconds for a provider to get ready.
        seconds: for all rounds together, of which there are at least and at most ``rounds``.
        late: providers that take long to get ready, and come when all contests have had the others.
    """

    suite: str
    case: str
    dtype: str
    providers: tuple[str, ...]
    open: Callable[[Machine], Prepare]
    costs: tuple[Cost, ...] = ()
    needs: tuple[str, ...] = ("depthwise",)
    limit: float = 60.0
    seconds: float = 1.0
    rounds: tuple[int, int] = (5, 50)
    late: tuple[str, ...] = ()
    needs_besides: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def needs_of(self, provider: str) -> tuple[str, ...]:
        return self.needs + self.needs_besides.get(provider, ())

    def begin(self, machine: Machine) -> Prepare:
        """:attr:`open`, with nothing compiled: after eight variants of one function torch.compile gives up.

        Not later: what other providers have compiled would be forgotten, and compiled again while they are timed.
        """
        torch._dynamo.reset()
        functorch_config.donated_buffer = True  # PyTorch's default, which :mod:`benchmarks.operators` changes for some
        return self.open(machine)

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.suite, self.case, self.dtype)

    def __str__(self) -> str:
        return f"{self.suite}: {self.case} {self.dtype}"

    def row(self, provider: str, **facts) -> Row:
        return Row(self.suite, self.case, provider, self.dtype, **facts)


def run(
    contest: Contest,
    machine: Machine,
    providers: Sequence[str],
    ceilings: Ceilings | None,
    say: Callable[[Turn | tuple[Row, list[float]]], object],
) -> None:
    """Measure ``providers`` of a contest, and ``say`` each :class:`Turn` and each row with its samples in seconds."""
    _in_turns(contest, _alone(contest, machine, providers, ceilings, say), machine, ceilings, say)
    _tidy(machine)  # when nothing holds on to inputs and graphs any more


def _alone(contest: Contest, machine: Machine, providers, ceilings, say) -> dict[str, Entry]:
    """Gets one after the other ready, and takes first samples of it."""
    ready: dict[str, Entry] = {}
    prepare = contest.begin(machine)
    for provider in providers:
        say(Turn(provider, contest.limit * (LATE_LIMIT if provider in contest.late else 1)))
        try:
            entry = prepare(provider)
        except Exception as error:  # whatever a peer raises is what its row says
            say((contest.row(provider, status=_status(error)), []))
            del error  # its traceback holds the provider's tensors
            _tidy(machine)
            continue
        if isinstance(entry, Row):
            say((entry, []))
            continue
        ready[provider] = entry
        samples = [entry.timed.sample(machine.clock)]
        while len(samples) < FIRST_SAMPLES and samples[0] * entry.timed.calls * entry.timed.repeats < LONG:
            samples.append(entry.timed.sample(machine.clock))
        say((_row(contest, provider, entry, samples, ceilings), samples))
    return ready


def _in_turns(contest: Contest, ready: dict[str, Entry], machine: Machine, ceilings, say) -> None:
    """Rounds of all who are ready."""
    if not ready:
        return
    timed = {provider: entry.timed for provider, entry in ready.items()}
    samples = interleave(
        machine.clock,
        timed,
        contest.seconds,
        contest.rounds,
        before=lambda provider: say(Turn(provider, contest.limit)),
    )
    for provider, entry in ready.items():
        row = _row(contest, provider, entry, samples[provider], ceilings)
        if OURS in samples and provider != OURS:
            found = ratios(samples, provider, OURS)
            low, middle, high = quartiles(found)
            row = dataclasses.replace(row, speedup=middle, speedup_quartiles=(low, high))
        if OURS_GRAPH in samples and not provider.startswith(OURS):
            row = dataclasses.replace(row, over_graph=statistics.median(ratios(samples, provider, OURS_GRAPH)))
        say((row, samples[provider]))


def warm(contest: Contest, machine: Machine, provider: str) -> None:
    """Gets a provider ready and throws it away: what it compiled is then on the disk."""
    # A kernel that was the fastest beside other work need not be the fastest; that choice is not to be remembered.
    inductor_config.autotune_local_cache = False
    if machine.is_cuda:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE, machine.device)
    contest.begin(machine)(provider)
    _tidy(machine)


def _row(contest: Contest, provider: str, entry: Entry, samples: list[float], ceilings: Ceilings | None) -> Row:
    low, median, high = quartiles(samples)
    facts = {"median_us": median * 1e6, "spread": (high - low) / median if median else 0.0, "samples": len(samples)}
    if contest.costs:
        facts |= {"bytes": sum(c.bytes for c in contest.costs), "flops": sum(c.flops for c in contest.costs)}
        if ceilings is not None:
            floor = ceilings.floor(contest.costs)
            facts |= {"floor_us": floor * 1e6, "fraction_of_floor": floor / median if median else None}
    return contest.row(provider, **{**facts, **entry.facts})


def _status(error: Exception) -> str:
    if isinstance(error, Unavailable):
        return f"skipped: {error}"
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:LONGEST_REASON]


def _tidy(machine: Machine) -> None:
    """Gives memory back. Raises where the GPU is in a state that only a new process gets out of."""
    gc.collect()
    if machine.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def relative_error(results, expected) -> float:
    """``‖result − expected‖ / ‖expected‖`` of the worst of several tensors, in float64; NaN where one is not finite."""
    worst = 0.0
    for result, right in zip(results, expected, strict=True):
        difference = torch.linalg.vector_norm(result.to(right.dtype) - right, dtype=torch.float64)
        error = (difference / torch.linalg.vector_norm(right, dtype=torch.float64).clamp_min(1e-300)).item()
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst
