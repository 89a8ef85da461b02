"""``python -m benchmarks.device_check --out DIR --minutes 8``: is it right, and how fast, on this machine's GPU?

::

    python -m benchmarks.device_check --out DIR [--minutes 8] [--commit ID] [--device cuda] [--quick] [--only SUITE ...]

From the source tree, nothing has to be installed but what the package itself needs, and pytest for the tests.

1. The GPU tests. Ours gets no speed for an operator whose tests fail. Meanwhile torch.compile fills its caches.
2. The benchmarks, in order of importance, each row written as soon as it is there: a stop at any moment leaves what was
   measured, and the same command goes on from there. A provider that raises, hangs or crashes costs its own row.
3. A short table.

DIR then holds the results (``<gpu>-<date>-<commit>.json``, see :mod:`benchmarks.results`), ``tests.log``,
``providers.log`` and ``table.txt``. The exit code is 0 where all that ran is right, 1 where a test failed or ours has
no number, 2 where nothing could be run, and 130 where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import suites
from benchmarks.contest import Contest
from benchmarks.machine import ROOT, Machine
from benchmarks.operators import OPERATORS
from benchmarks.results import OURS, Results, Row, by_contest, file_name
from benchmarks.runner import OutOfTime, Runner, ceilings_of
from benchmarks.suites import Visit
from benchmarks.warm import Warmer, compiled

TESTS_SHARE = 0.4  # of the time, at most, is for tests
GPU_TESTS = ROOT / "tests" / "gpu"
TABLE_ROWS = 40
LINE = 160  # characters
STOPPED = 130
NO_TESTS = 5  # pytest's exit code
TIMING = "timing"  # the tests of the benchmarks' own clock: their failure is told, and refuses nobody
_OUTCOME = re.compile(r"^(?:\S*/)?test_(\w+?)_gpu\.py::(.*) (PASSED|FAILED|ERROR)\b")
_NOT_IMPORTED = re.compile(r"^ERROR (?:\S*/)?test_(\w+?)_gpu\.py( - .*)?$")


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
    verdicts = results.tests.values()
    if not machine.is_cuda:
        results.tests = {"all": "skipped: no GPU"}
    elif arguments.skip_tests:
        results.tests = results.tests or {"all": "skipped: as asked"}
    elif arguments.retry or not verdicts or any(said.startswith(("skipped", "unfinished")) for said in verdicts):
        warmer = Warmer(build, str(machine.device), log, compiled(visits))
        run_tests(results, arguments.out / "tests.log", TESTS_SHARE * 60 * arguments.minutes, say, warmer)
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
    parser.add_argument("--retry", action="store_true", help="measure again what failed the last time")
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
        return Results(meta, arguments.out / file_name(meta))
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


# --- tests


def run_tests(
    results: Results,
    log: Path,
    seconds: float,
    say: Callable[[str], object],
    meanwhile: AbstractContextManager,
    folder: Path = GPU_TESTS,
) -> None:
    """The GPU tests, into ``results.tests``: "passed: 120" or why not, for each operator and for "all".

    A file ``test_<operator>_gpu.py`` is about that operator, ``test_timing_gpu.py`` about the benchmarks themselves,
    the other files are about all operators. Tests that need the GPU for themselves come when ``meanwhile`` is over.
    """
    say("tests")
    log.unlink(missing_ok=True)
    end = time.monotonic() + seconds
    with meanwhile:
        codes = [_pytest(folder, "gpu and not full and not alone", log, seconds)]
    codes.append(_pytest(folder, "gpu and not full and alone", log, end - time.monotonic()))
    results.tests = judge(log.read_text(errors="replace").splitlines(), codes)
    results.write()
    for name, result in results.tests.items():
        say(f"tests of {name}: {result}")


def _pytest(folder: Path, marked: str, log: Path, seconds: float) -> int | None:
    """Runs tests of a folder, adding to a log; the exit code, or None where they were not through in time."""
    if seconds <= 0:
        return None
    command = [sys.executable, "-m", "pytest", str(folder), "-v", "-m", marked, "-p", "no:cacheprovider"]
    command += ["--color=no", "--continue-on-collection-errors", "-o", "console_output_style=classic"]
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
                process.wait()


def judge(lines: Iterable[str], codes: Iterable[int | None]) -> dict[str, str]:
    """What the lines of ``pytest -v`` and its exit codes (None: out of time) say of each operator."""
    passed: dict[str, int] = {}
    failed: dict[str, list[str]] = {}
    for line in lines:
        if (outcome := _OUTCOME.match(line)) is not None:
            file, test, outcome = outcome.groups()
        elif (outcome := _NOT_IMPORTED.match(line)) is not None:
            file, test, outcome = outcome[1], "the file cannot be imported", "ERROR"
        else:
            continue
        name = file if file in (*OPERATORS, TIMING) else "all"
        if outcome == "PASSED":
            passed[name] = passed.get(name, 0) + 1
        else:
            failed.setdefault(name, []).append(test)
    codes = list(codes)
    # Those that need the GPU for themselves come last, and say nothing of the others when their time is over.
    found = {name: f"{'unfinished' if codes[0] is None else 'passed'}: {count}" for name, count in passed.items()}
    if codes[-1] is None:
        found["alone"] = "unfinished: those that need the GPU for themselves"
    for name, tests in failed.items():
        found[name] = f"failed: {len(tests)} of {len(tests) + passed.get(name, 0)}, {tests[0]}"
    # 0 and 1 are told by the lines, and 5 is that a part has no tests, which the other has. Else it has crashed, or
    # could not begin.
    bad = [code for code in codes if code not in (None, 0, NO_TESTS) and not (code == 1 and failed)]
    if bad and "all" not in failed:
        found["all"] = f"failed: pytest ended with exit code {bad[0]}"
    if not passed and not failed and not bad:
        found["all"] = "unfinished: 0" if None in codes else "failed: no test ran"
    return found


def why_refused(results: Results, needs: Iterable[str]) -> str | None:
    """Why ours may not have a speed where it stands on these operators; None where it may."""
    for name in ("all", *needs):
        if results.tests.get(name, "").startswith("failed"):
            return f"refused: tests of {name} {results.tests[name]}"
    return None


# --- benchmarks


def run_benchmarks(
    results: Results,
    visits: list[Visit],
    runner: Runner,
    say: Callable[[str], object],
    retry: bool = False,
) -> None:
    """Every visit that is not done yet, into ``results``, until the runner's deadline."""
    for visit in visits:  # also what was measured before the tests failed
        refused = why_refused(results, visit.contest.needs)
        if refused is not None:
            results.put(*(visit.contest.row(name, status=refused) for name in visit.providers if _is_ours(name)))
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
                if not (visit.again and row.provider == OURS):  # it has its row from the first time
                    results.put(row)
        except OutOfTime:
            say(f"out of time; {len(results.left)} of {len(visits)} left")
            return
        results.left.remove(str(visit))
        if str(visit) not in results.done:
            results.done.append(str(visit))
        results.write()
        _tell(results, contest, providers, say)


def _is_ours(provider: str) -> bool:
    return provider.startswith(OURS)


def _waiting(results: Results, visit: Visit, retry: bool) -> tuple[str, ...]:
    """Who has to run of a visit's providers: nobody where it was done, and not who hung or failed the last time.

    Ours, where it was refused and no longer is, has to run in any case.
    """
    rows = {provider: _row_of(results, visit.contest, provider) for provider in visit.providers}
    bad = {provider: row.status for provider, row in rows.items() if row is not None and not row.ok}
    refused = why_refused(results, visit.contest.needs) is not None
    pardoned = [provider for provider, status in bad.items() if status.startswith("refused") and not refused]
    able = [provider for provider in visit.providers if not (refused and _is_ours(provider))]
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
        lines.append(f"{' '.join(contest):60} {ours.median_us:10.1f} {floor:>8}  {peers}")
    bad = [row for row in results.rows if not row.ok and not row.status.startswith("skipped")]
    lines += [f"{' '.join(row.contest)}: {row.provider} {row.status}"[:LINE] for row in bad[:most]]
    if len(bad) > most:
        lines.append(f"and {len(bad) - most} more without a number")
    if results.left:
        lines.append(f"no time for {len(results.left)} more: {'; '.join(results.left[:3])}, ...")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
