"""Contests whose providers take known times, or misbehave in known ways, for tests of what measures them."""

import functools
import os
import time

from benchmarks import contest as contest_module
from benchmarks.contest import Contest, Cost, Entry, Unavailable, Wrong
from benchmarks.timing import HostClock, timed

MILLISECONDS = {
    "ours": 2.0, "slower": 6.0, "slowest": 12.0, "ours_graph": 3.0, "reduce_overhead": 6.0, "max_autotune": 12.0,
}  # fmt: skip


def prepare(provider: str) -> Entry:
    if provider == "raises":
        raise ValueError("what a peer says\nand more of it")
    if provider == "missing":
        raise Unavailable("this peer is not installed")
    if provider == "wrong":
        raise Wrong("not the right result")
    if provider == "hangs":
        time.sleep(1000)
    if provider == "dies":
        os._exit(7)
    if provider == "breaks_the_device":
        raise BreaksTheDevice("an illegal memory access was encountered")
    if provider == "hangs_later":
        return Entry(timed(HostClock(), functools.partial(_third_time_hangs, [])), {})
    seconds = MILLISECONDS[provider] / 1e3
    return Entry(timed(HostClock(), functools.partial(time.sleep, seconds)), {"method": "clock"})


def _third_time_hangs(calls: list) -> None:
    calls.append(1)
    time.sleep(0.01 if len(calls) < 4 else 1000)


class BreaksTheDevice(RuntimeError):
    """After it, nothing works in this process: as after a wrong address on a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        contest_module._tidy = _broken


def _broken(machine):
    raise RuntimeError("an illegal memory access was encountered, before")


def contest(*providers: str, case: str = "a case", **options) -> Contest:
    return Contest(
        "depthwise_forward",
        case,
        "fp32",
        providers,
        **{
            "open": lambda machine: prepare,
            "costs": (Cost(10**6, 10**6),),
            "limit": 2.0,
            "seconds": 0.05,
            **options,
        },
    )


def contests() -> list[Contest]:
    return [
        contest("ours", "slower", "raises", "missing", "wrong"),
        contest("ours", "hangs", "slower", case="one hangs"),
        contest("ours", "dies", "slower", case="one dies"),
        contest("ours", "hangs_later", case="one hangs later"),
        contest("ours", "breaks_the_device", "slower", case="one breaks the device"),
        contest("ours", "slower", "slowest", case="one is late", late=("slowest",)),
        contest("ours", "slower", case="no inputs", open=_no_inputs),
        contest("ours", "ours_graph", "reduce_overhead", "max_autotune", case="in graphs", late=("max_autotune",)),
    ]


def _no_inputs(machine):
    raise RuntimeError("no inputs")


def cannot_start() -> list[Contest]:
    raise OSError("the plan cannot be made")
