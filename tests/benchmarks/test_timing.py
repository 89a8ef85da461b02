"""Timing against costs that are known: functions that advance a clock of their own."""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.results import quartiles
from benchmarks.timing import (
    ENOUGH_CLOCK_TICKS,
    EventClock,
    HostClock,
    ReplayClock,
    Timed,
    interleave,
    ratios,
    timed,
)


class FakeTime:
    """Seconds that pass only where something is said to take some; the machine may get slower all the time."""

    def __init__(self, drift: float = 0.0, resolution: float = 0.0):
        self.seconds, self.drift, self.resolution = 0.0, drift, resolution

    def __call__(self) -> float:
        return self.seconds if not self.resolution else self.seconds // self.resolution * self.resolution

    def work(self, cost: float):
        def run() -> None:
            self.seconds += cost * (1 + self.drift * self.seconds)

        return run


def test_host_clock_counts_all_repeats():
    now = FakeTime()
    assert HostClock(now).seconds(now.work(0.25), 8) == pytest.approx(2.0)


def test_sample_is_per_call():
    now = FakeTime()
    assert Timed(now.work(0.6), calls=3, repeats=5).sample(HostClock(now)) == pytest.approx(0.2)


@pytest.mark.parametrize("cost", [1e-7, 3e-5, 1e-3, 0.5])
def test_samples_last_long_enough_for_a_coarse_clock(cost):
    """A clock of 0.1 ms sees 100 ns of work within 5 %, since a sample is many of them."""
    now = FakeTime(resolution=1e-4)
    clock = HostClock(now)
    work = timed(clock, now.work(cost), at_least=5e-3)
    assert work.repeats * cost >= 4.8e-3
    assert work.repeats <= max(1, 3 * 5e-3 / cost)
    assert work.sample(clock) == pytest.approx(cost, rel=0.05)


def test_slow_first_run_does_not_decide_about_repeats():
    now = FakeTime()
    costs = iter([1.0])

    def run() -> None:
        now.seconds += next(costs, 1e-4)

    work = timed(HostClock(now), run, at_least=1e-2)
    assert work.repeats == 1  # what it saw; whoever warms up first gets the right one
    assert timed(HostClock(now), run, at_least=1e-2).repeats == pytest.approx(100, abs=2)


def test_real_clock_sees_a_sleep():
    work = timed(HostClock(), lambda: time.sleep(0.02))
    assert 0.02 <= work.sample(HostClock()) < 0.03


def test_every_round_has_every_provider_and_the_order_changes():
    now, seen = FakeTime(), []
    clock = HostClock(now)
    providers = {name: Timed(now.work(1.0)) for name in "abc"}
    samples = interleave(clock, providers, seconds=0.0, rounds=(6, 50), before=seen.append, now=now)
    assert {name: len(found) for name, found in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {order[-1] for order in rounds} == {"a", "b", "c"}
    assert len(set(rounds)) == 6


def test_rounds_end_with_the_time_between_least_and_most():
    now = FakeTime()
    providers = {"a": Timed(now.work(1.0)), "b": Timed(now.work(3.0))}
    run = lambda seconds: len(interleave(HostClock(now), providers, seconds, (2, 9), now=now)["a"])  # noqa: E731
    assert [run(0.0), run(19.9), run(1000.0)] == [2, 5, 9]


def test_ratios_do_not_move_when_the_machine_slows_down():
    """Each round is 40 % slower than the last; means of all runs of one, then all of the other, would be far off."""
    now = FakeTime(drift=0.01)
    providers = {"ours": Timed(now.work(1.0)), "peer": Timed(now.work(2.0))}
    samples = interleave(HostClock(now), providers, seconds=0.0, rounds=(12, 12), now=now)
    assert samples["ours"][-1] > 1.3 * samples["ours"][0]
    assert statistics.median(ratios(samples, "peer", "ours")) == pytest.approx(2.0, rel=0.03)


def test_quartiles():
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="samples is empty"):
        quartiles([])


def test_event_clock_is_in_seconds_and_waits_for_the_end(monkeypatch):
    """Of events that say 8 ms; the GPU is busy before the first is recorded, and nothing is run before."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    assert EventClock().seconds(lambda: order.append("run"), 2) == pytest.approx(0.008)
    assert order == ["synchronize", "sleep", "record", "run", "run", "record", "wait"]


def test_samples_are_much_longer_than_what_it_takes_to_begin_one():
    assert timed(HostClock(), lambda: None).repeats > 1000
    assert ENOUGH_CLOCK_TICKS >= 1e-3


def test_replay_shows_pytest_benchmark_what_was_measured():
    clock, durations = ReplayClock(), []

    def pedantic(target, rounds):
        for _ in range(rounds):
            start = clock()
            target()
            durations.append(clock() - start)
        target()  # it may call once more, untimed

    clock.replay(SimpleNamespace(pedantic=pedantic), [0.5, 0.25, 2.0])
    assert durations == [0.5, 0.25, 2.0]
