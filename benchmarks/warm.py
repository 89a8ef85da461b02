"""Has torch.compile fill its caches while the tests run, on the processor's other cores: it takes minutes otherwise."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.contest import Contest
from benchmarks.runner import Runner
from benchmarks.suites import Visit

PROCESSES = 2  # each holds a network and its activations on the GPU
HEAD_START = 20  # visits


class Warmer:
    """Context manager: gets providers ready in processes of their own, until it is left, and measures nothing.

    What was compiled is found again, on the disk, by the process that measures. What was chosen by timing on a GPU with
    company is not kept (:func:`benchmarks.contest.warm`).
    """

    def __init__(
        self,
        build: Callable[[], list[Contest]],
        device: str,
        log: Path | None,
        work: Iterable[tuple[Contest, str]],
        processes: int = PROCESSES,
    ):
        self._work = deque(work)
        self._runners = [Runner(build, device, log) for _ in range(processes)]
        self._threads = [threading.Thread(target=self._run, args=(runner,), daemon=True) for runner in self._runners]
        self._leaving = False
        self.done: list[tuple[Contest, str]] = []

    def __enter__(self) -> Warmer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._leaving = True
        for runner, thread in zip(self._runners, self._threads, strict=True):
            while thread.is_alive():  # it may be about to start a process that is not there yet
                runner.kill()
                thread.join(0.2)

    def _run(self, runner: Runner) -> None:
        with runner:
            while not self._leaving:
                try:
                    contest, provider = self._work.popleft()
                except IndexError:
                    return
                if runner.warm(contest, provider):
                    self.done.append((contest, provider))


def compiled(visits: Iterable[Visit]) -> list[tuple[Contest, str]]:
    """Whoever of the first visits is compiled, in their order; networks take longest, and come a little earlier."""
    found = [
        (place - HEAD_START * visit.contest.suite.startswith("model"), visit.contest, provider)
        for place, visit in enumerate(visits)
        if not visit.again and visit.contest.costs
        for provider in visit.providers
        if provider.endswith("compile") or provider == "reduce_overhead"
    ]
    return [(contest, provider) for _, contest, provider in sorted(found, key=lambda item: item[0])]
