"""``python -m benchmarks.device_check --out DIR --minutes 8``: is it right, and how fast, on this machine's GPU?

::

    python -m benchmarks.device_check --out DIR [--minutes 8] [--commit ID] [--device cuda] [--quick] [--only SUITE ...]

From the source tree, nothing has to be installed but what the package itself needs, and pytest for the tests.

1. The GPU tests, in several processes where pytest-xdist is installed. Ours gets no speed where tests fail, and one
   that is marked where tests are not through. Meanwhile torch.compile fills its caches.
2. The benchmarks, in order of importance, each row written as soon as it is there: a stop at any moment leaves what was
   measured, and the same command goes on from there: with benchmarks, or first with the tests that have not passed
   where ``--retry`` asks for it. A provider that raises, hangs or crashes costs its own row.
3. A short table, and the bars (:mod:`benchmarks.bars`).

DIR then holds the results (``<gpu>-<date>-<commit>.json``, see :mod:`benchmarks.results`), ``tests.log``,
``providers.log`` and ``table.txt``. The exit code is 0 where all that ran is right, 1 where a test failed or was not
reached or ours has no number, 2 where nothing could be run, and 130 where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import bars, suites
from benchmarks.contest import Contest
from benchmarks.gpu_tests import AS_ASKED, NO_GPU, are_due, run_tests, untested, why_refused
from benchmarks.headline import GRAPHS, measured
from benchmarks.machine import Machine
from benchmarks.results import FALLBACK, OURS, OURS_GRAPH, Results, Row, by_contest, file_name
from benchmarks.runner import OutOfTime, Runner, ceilings_of
from benchmarks.suites import Visit
from benchmarks.warm import Warmer, compiled

TESTS_SHARE = 0.4  # of the time, at most, is for tests
TESTS_SECONDS = 240.0  # and no more than that
TESTS_LOG = "tests.log"
TABLE_ROWS = 40
LINE = 160  # characters
STOPPED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the check; 0, 1, 2 or 130, see above."""
    arguments = _arguments(argv)
    start = time.monotonic()
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _stop)
    try:
        machine = Machine(arguments.device)
        results = _results(arguments, machine)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"device_check: {error}", file=sys.stderr)
        return 2
    say = _Progress(start)
    say(", ".join(f"{name} {value}" for name, value in results.meta.items() if value is not None))
    stopped = False
    try:
        _measure(arguments, machine, results, start + 60 * arguments.minutes, say)
    except KeyboardInterrupt:
        stopped = True
        say("stopped; the same command goes on from here")
    text = table(results)
    (arguments.out / "table.txt").write_text(text + "\n")
    print(text, flush=True)
    if not results.is_cpu:
        print("\n".join(bars.table(results)), flush=True)
    return STOPPED if stopped else 0 if is_right(results) else 1


def _stop(*_) -> None:
    raise KeyboardInterrupt


def _measure(
    arguments: argparse.Namespace, machine: Machine, results: Results, deadline: float, say: Callable[[str], object]
) -> None:
    """Tests, then benchmarks, into ``results``."""
    contests = suites.plan(machine.is_cuda, arguments.quick)
    if arguments.only:
        contests = [contest for contest in contests if contest.suite in ("ceilings", *arguments.only)]
    visits, log = suites.visits(contests), arguments.out / "providers.log"
    build = functools.partial(suites.plan, machine.is_cuda, arguments.quick)
    if not machine.is_cuda:
        results.tests = {"all": NO_GPU}
    elif arguments.skip_tests:
        results.tests = results.tests or {"all": AS_ASKED}
    elif are_due(results, arguments.retry):
        warmer = Warmer(build, str(machine.device), log, compiled(visits))
        seconds = min(TESTS_SHARE * 60 * arguments.minutes, TESTS_SECONDS)
        run_tests(results, arguments.out / TESTS_LOG, seconds, say, warmer)
    with Runner(build, str(machine.device), log, deadline) as runner:
        run_benchmarks(results, visits, runner, say, retry=arguments.retry)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; goes on with what is there")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together [%(default)s]")
    parser.add_argument("--commit", help="id of the source tree, where git is not there to say it")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu, on small sizes [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="fewer contests")
    names = sorted({contest.suite for cuda in (True, False) for contest in suites.plan(cuda)})
    parser.add_argument("--only", nargs="+", choices=names, metavar="SUITE", help=f"of {', '.join(names)}")
    parser.add_argument("--skip-tests", action="store_true", help="while working on speed; the results say so")
    parser.add_argument("--retry", action="store_true", help="test and measure again what failed the last time")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"argument --minutes: {arguments.minutes} is not more than 0")
    return arguments


def _results(arguments: argparse.Namespace, machine: Machine) -> Results:
    """A new results file, or the one that is there, if it is of this machine and commit."""
    meta = machine.meta("python -m benchmarks.device_check", arguments.commit, arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    there = sorted(arguments.out.glob("*.json"))
    if len(there) > 1:
        raise ValueError(f"--out {arguments.out} holds several results files; one at most is allowed")
    if not there:
        (arguments.out / TESTS_LOG).unlink(missing_ok=True)  # of whatever it was
        results = Results(meta, arguments.out / file_name(meta))
        results.write()
        return results
    results = Results.read(there[0])
    results.refuse_mixing(meta)
    return results


class _Progress:
    """Lines with the time since the start."""

    def __init__(self, start: float):
        self._start = start

    def __call__(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"[{minutes:2}:{seconds:02}] {line}", flush=True)


# --- benchmarks


def run_benchmarks(
    results: Results,
    visits: list[Visit],
    runner: Runner,
    say: Callable[[str], object],
    retry: bool = False,
) -> None:
    """Every visit that is not done yet, into ``results``, until the runner's deadline."""
    for visit in visits:
        _judge_again(results, visit)
    waiting = {str(visit): _waiting(results, visit, retry) for visit in visits}
    results.left = [name for name, providers in waiting.items() if providers]
    results.write()
    for place, visit in enumerate(visits):
        contest, providers = visit.contest, waiting[str(visit)]
        if not providers:
            continue
        say(f"{place + 1} of {len(visits)}: {contest}, {', '.join(providers)}")
        try:
            for row, _ in runner.visit(contest, providers, ceilings_of(results, contest.dtype)):
                if not visit.again or row.provider in contest.late:  # the others have their rows from the first time
                    results.put(_marked(results, contest, row))
        except OutOfTime:
            say(f"out of time; {len(results.left)} of {len(visits)} left")
            return
        results.left.remove(str(visit))
        if str(visit) not in results.done:
            results.done.append(str(visit))
        results.write()
        _tell(results, contest, providers, say)


def _judge_again(results: Results, visit: Visit) -> None:
    """What was measured before the tests had their present verdict is refused, or marked, as it would be now."""
    for name in filter(_is_ours, visit.providers):
        refused = why_refused(results, visit.contest.needs_of(name))
        row = _row_of(results, visit.contest, name)
        if refused is not None:
            results.put(visit.contest.row(name, status=refused))
        elif row is not None and row != (marked := _marked(results, visit.contest, row)):
            results.put(marked)


def _marked(results: Results, contest: Contest, row: Row) -> Row:
    """A row of ours says where the tests of what it stands on are not through."""
    if not _is_ours(row.provider):
        return row
    return dataclasses.replace(row, untested=untested(results, contest.needs_of(row.provider)) if row.ok else None)


def _is_ours(provider: str) -> bool:
    return provider.startswith(OURS)


def _waiting(results: Results, visit: Visit, retry: bool) -> tuple[str, ...]:
    """Who has to run of a visit's providers: nobody where it was done, and not who hung or failed the last time.

    Ours, where it was refused and no longer is, has to run in any case.
    """
    rows = {provider: _row_of(results, visit.contest, provider) for provider in visit.providers}
    bad = {provider: row.status for provider, row in rows.items() if row is not None and not row.ok}
    refused = [
        provider
        for provider in filter(_is_ours, visit.providers)
        if why_refused(results, visit.contest.needs_of(provider)) is not None
    ]
    pardoned = [name for name, status in bad.items() if status.startswith("refused") and name not in refused]
    able = [provider for provider in visit.providers if provider not in refused]
    again = [provider for provider in able if provider in bad and (retry or provider in pardoned)]
    if str(visit) in results.done and not again:
        return ()
    return tuple(provider for provider in able if provider not in bad or provider in again)


def _row_of(results: Results, contest: Contest, provider: str) -> Row | None:
    return results.get(contest.suite, contest.case, contest.dtype, provider)


def _tell(results: Results, contest: Contest, providers: Iterable[str], say: Callable[[str], object]) -> None:
    rows = [row for name in providers if (row := _row_of(results, contest, name)) is not None]
    say("; ".join(map(_brief, rows)))


def _brief(row: Row) -> str:
    if not row.ok:
        return f"{row.provider} {row.status}"
    said = []
    if row.rate is not None:
        said.append(f"{row.rate:.4g} {row.unit}")
    elif row.median_us is not None and row.median_us >= 1e6:
        said.append(f"{row.median_us / 1e6:.3g} s")
    elif row.median_us is not None:
        said.append(f"{row.median_us:.4g} µs ±{50 * (row.spread or 0):.1f} %")
    if row.fraction_of_floor is not None:
        said.append(f"{100 * row.fraction_of_floor:.0f} % of floor")
    if row.speedup is not None:
        said.append(f"ours {row.speedup:.2f}× as fast")
    if row.saved_bytes is not None:
        said.append(f"saves {row.saved_bytes / 2**20:.1f} MiB")
    if row.variants is not None:
        said.append(f"{row.variants} variants")
    return f"{row.provider} {', '.join(said)}"


def is_right(results: Results) -> bool:
    """Did all tests pass that were to run, and does ours have every number that was asked of it?"""
    ours = [row for row in results.rows if _is_ours(row.provider)]
    return not any(said.startswith(("failed", "unfinished")) for said in results.tests.values()) and all(
        row.ok or row.status.startswith("skipped") for row in ours
    )


def table(results: Results, most: int = TABLE_ROWS) -> str:
    """The first ``most`` contests in which ours ran, a line each, and what went wrong."""
    lines = [f"{results.meta['gpu']}, torch {results.meta['torch']}, commit {results.meta['commit']}"]
    lines += [f"tests of {name}: {result}" for name, result in results.tests.items()]
    lines.append(f"{'':60} {'ours µs':>10} {'of floor':>8}  ours is so many times as fast as")
    shown = 0
    for contest, rows in by_contest(results.rows).items():
        ours = next((row for row in rows if row.provider == OURS and row.ok and row.median_us is not None), None)
        if ours is None or shown == most:
            continue
        shown += 1
        floor = "" if ours.fraction_of_floor is None else f"{100 * ours.fraction_of_floor:.0f} %"
        peers = ", ".join(f"{row.provider} {row.speedup:.2f}" for row in rows if row.speedup is not None)
        mark = "" if ours.untested is None else f"; TESTS NOT THROUGH: {ours.untested}"
        lines.append(f"{' '.join(contest):60} {ours.median_us:10.1f} {floor:>8}  {peers}{mark}")
    lines += _in_graphs(results)
    bad = [row for row in results.rows if not row.ok and not row.status.startswith("skipped")]
    lines += [f"{' '.join(row.contest)}: {row.provider} {row.status}"[:LINE] for row in bad[:most]]
    if len(bad) > most:
        lines.append(f"and {len(bad) - most} more without a number")
    notes = [row.note for row in results.rows if row.ok and FALLBACK in (row.note or "")]
    lines += [f"ours, {notes.count(note)} rows: {note}"[:LINE] for note in dict.fromkeys(notes)]
    if results.left:
        lines.append(f"no time for {len(results.left)} more: {'; '.join(results.left[:3])}, ...")
    return "\n".join(lines)


def _in_graphs(results: Results) -> list[str]:
    """Who makes CUDA graphs against ours in one: where a network waits for Python, that is the comparison."""
    lines = []
    for contest, rows in by_contest(results.rows).items():
        graph = next((row for row in rows if row.provider == OURS_GRAPH), None)
        peers = [row for row in rows if row.provider in GRAPHS and measured(row, "over_graph") is not None]
        if measured(graph) is not None and peers:
            said = ", ".join(f"{row.provider} {row.over_graph:.2f}" for row in peers)
            name = f"{' '.join(contest)} in CUDA graphs"
            lines.append(f"{name:60} {graph.median_us:10.1f} {'':8}  {said}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
