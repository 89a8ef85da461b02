"""Reports on compiled kernels, made by several processes, as compiling takes long and a compiler may crash."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def run(jobs: list[tuple], options: object, processes: int, report: Callable, failed: Callable) -> Iterator[list[dict]]:
    """Reports of all jobs, in their order, by processes that compile at the same time. None of them is this one.

    A job is what ``report`` takes before the options; ``failed(*job, error)`` is the row of one that has no report.
    """
    left = list(jobs)
    while left:
        done = 0
        # Spawned, not forked, as LLVM has threads.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(report, *job, options) for job in left]
            with contextlib.suppress(BrokenProcessPool):  # a compiler can take its process with it
                for future in futures:
                    yield future.result()
                    done += 1
        if left := left[done:]:
            yield _alone(left.pop(0), options, report, failed)


def _alone(job: tuple, options: object, report: Callable, failed: Callable) -> list[dict]:
    """A report by a process of its own: when one of several processes dies, nobody knows what it was compiling."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(report, *job, options).result()
        except BrokenProcessPool:
            return [failed(*job, "the process that compiled it died")]
