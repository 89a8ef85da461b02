"""The GPU tests as the device check has them: in several processes, within a limit, and what they say of each operator.

A file ``test_<name>_gpu.py`` is about the operator or the part that :data:`NAMES` has, the other files are about "all".
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.operators import OPERATORS
from benchmarks.results import Results

FOLDER = ROOT / "tests" / "gpu"
NAMES = ("depthwise", "block", "norm_linear", "all", "training", "accelerate", "large", "timing")  # in their order
ALONE = ("large", "timing")  # whose tests all need the GPU for themselves
FIRST_PART = 0.75  # of the time is for tests that do not need the GPU for themselves
MOST_PROCESSES = 12
OTHERS_CORES = 4  # for those that compile meanwhile
NO_TESTS = 5  # pytest's exit code
AS_ASKED, NO_GPU, NONE_RAN = "skipped: as asked", "skipped: no GPU", "skipped: no test ran"
NOT_IMPORTED = "the file cannot be imported"
assert set(OPERATORS) < set(NAMES)

# What has to follow: a reason for which a test was skipped may contain any word.
_PLAIN = re.compile(r"^(?P<test>\S*?test_\w+_gpu\.py::.*) (?P<outcome>PASSED|FAILED|ERROR) *(\[ *\d+%\] *)?$")
_OF_WORKER = re.compile(
    r"^\[gw\d+\] (\[ *\d+%\] )?(?P<outcome>PASSED|FAILED|ERROR) (?P<test>\S*?test_\w+_gpu\.py::.*?) *$"
)
_NOT_IMPORTED = re.compile(r"^ERROR (\S*?test_\w+_gpu\.py)( - .*)?$")
_FILE = re.compile(r"test_(\w+?)_gpu\.py")


def are_due(results: Results, retry: bool) -> bool:
    """Have the tests to run? Not a second time, unless that is asked for: what is unfinished is told as such."""
    return retry or set(results.tests.values()) <= {AS_ASKED, NO_GPU}


def run_tests(
    results: Results,
    log: Path,
    seconds: float,
    say: Callable[[str], object],
    meanwhile: AbstractContextManager,
    folder: Path = FOLDER,
) -> None:
    """The GPU tests, into ``results.tests``: "passed: 120" or why not, for each of the names that the folder has.

    Those that need the GPU for themselves come when ``meanwhile`` is over. Where a log is there, tests with parameters
    that have passed in it do not run again.
    """
    say("tests")
    before = [test for test, outcome in _outcomes(_lines(log)).items() if outcome == "PASSED"]
    log.write_text("".join(f"{test} PASSED\n" for test in before))
    end = time.monotonic() + seconds
    with meanwhile:
        codes = [_pytest(folder, "gpu and not full and not alone", log, FIRST_PART * seconds, before, processes())]
    codes.append(_pytest(folder, "gpu and not full and alone", log, end - time.monotonic(), before))
    names = dict.fromkeys(about(path.name) for path in _files(folder))
    results.tests = judge(_lines(log), codes, names)
    results.write()
    for name, result in results.tests.items():
        say(f"tests of {name}: {result}")


def processes() -> int:
    """How many tests run at once: compiling takes nearly all their time, and Python compiles one kernel at a time."""
    count = min(MOST_PROCESSES, _cores() - OTHERS_CORES)
    return count if count >= 2 and importlib.util.find_spec("xdist") is not None else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(folder: Path) -> list[Path]:
    """Of a folder, the most important first: there may be no time for the last."""
    return sorted(folder.glob("test_*_gpu.py"), key=lambda path: (NAMES.index(about(path.name)), path.name))


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _pytest(folder: Path, marked: str, log: Path, seconds: float, without: Iterable[str], count: int = 1) -> int | None:
    """Runs tests of a folder, adding to a log; the exit code, or None where they were not through in time."""
    if seconds <= 0:
        return None
    root = folder.parents[1]  # names of tests begin there
    command = [sys.executable, "-m", "pytest", *map(str, _files(folder)), "-v", "-m", marked, "-p", "no:cacheprovider"]
    command += ["--color=no", "--continue-on-collection-errors", "-o", "console_output_style=classic"]
    # What is deselected is whatever begins so: a name without parameters may be the beginning of another name.
    command += [f"--rootdir={root}", *(f"--deselect={test}" for test in without if test.endswith("]"))]
    if count > 1:
        command += ["-n", str(count), "--dist", "load"]
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
                process.wait()


def about(test: str) -> str:
    """Which of :data:`NAMES` a test, or a file of tests, is about."""
    name = _FILE.search(test)[1]
    return name if name in NAMES else "all"


def _outcomes(lines: Iterable[str]) -> dict[str, str]:
    """The last outcome of each test, of ``pytest -v`` in one process or in several; one may pass, then fail to tidy."""
    found = {}
    for line in lines:
        if (said := _PLAIN.match(line) or _OF_WORKER.match(line)) is not None:
            found[said["test"]] = said["outcome"]
        elif (said := _NOT_IMPORTED.match(line)) is not None:
            found[f"{said[1]}::{NOT_IMPORTED}"] = "ERROR"
    return found


def judge(lines: Iterable[str], codes: Iterable[int | None], names: Iterable[str] = NAMES) -> dict[str, str]:
    """What the lines of ``pytest -v`` and the exit codes of both parts (None: out of time) say of each name.

    Names none of whose tests came to an end have a verdict, too: they have proved nothing.
    """
    passed: dict[str, int] = {}
    failed: dict[str, list[str]] = {}
    for test, outcome in _outcomes(lines).items():
        name = about(test)
        if outcome == "PASSED":
            passed[name] = passed.get(name, 0) + 1
        else:
            failed.setdefault(name, []).append(test.split("::", 1)[1])
    codes = list(codes)
    # 0 and 1 are told by the lines, and 5 is that a part has no tests, which the other has. Else it has crashed, or
    # could not begin.
    bad = [code for code in codes if code not in (None, 0, NO_TESTS) and not (code == 1 and failed)]
    if not passed and not failed and not bad and None not in codes:
        return {"all": "failed: no test ran"}
    found = {}
    for name in dict.fromkeys([*names, *passed, *failed]):
        through = codes[-1 if name in ALONE else 0] is not None
        found[name] = f"{'passed' if through else 'unfinished'}: {passed.get(name, 0)}"
        if name in failed:
            count = len(failed[name])
            found[name] = f"failed: {count} of {count + passed.get(name, 0)}, {failed[name][0]}"
        elif through and name not in passed:
            found[name] = NONE_RAN
    if codes[-1] is None:
        found["alone"] = "unfinished: those that need the GPU for themselves"
    if bad and "all" not in failed:
        found["all"] = f"failed: pytest ended with exit code {bad[0]}"
    return found


def why_refused(results: Results, needs: Iterable[str]) -> str | None:
    """Why ours may not have a speed where it stands on these operators; None where it may."""
    for name in ("all", *needs):
        if results.tests.get(name, "").startswith("failed"):
            return f"refused: tests of {name} {results.tests[name]}"
    return None


def untested(results: Results, needs: Iterable[str]) -> str | None:
    """What of that on which ours stands has tests that are not through, or did not run; None where all passed."""
    found = [
        name
        for name in ("all", *needs)
        if (said := results.tests.get(name, "")).startswith("unfinished") or said in (AS_ASKED, NONE_RAN)
    ]
    return ", ".join(found) or None
