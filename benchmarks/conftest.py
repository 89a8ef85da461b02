"""``pytest benchmarks/ --benchmark-only [--device cuda] [--quick] [--results FOLDER]``

Each test is one provider on one contest. All of a contest are measured together, in a process of their own and in turns
(see :mod:`benchmarks.runner`); pytest-benchmark is handed the samples. At the end they are in a results file, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import suites
from benchmarks.machine import Machine
from benchmarks.results import OURS, Results, Row, file_name
from benchmarks.runner import Runner, ceilings_of
from benchmarks.suites import Visit
from benchmarks.timing import ReplayClock

RESULTS = Path(".benchmarks")  # where pytest-benchmark keeps its own, too; not under version control
CLOCK = ReplayClock()


def pytest_addoption(parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--device", help="cuda, cuda:1, ... or cpu, on small sizes; default: a GPU where there is one")
    group.addoption("--quick", action="store_true", help="fewer contests")
    group.addoption("--results", type=Path, default=RESULTS, help=f"folder for the results file [{RESULTS}]")


def pytest_configure(config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('benchmarks need pytest-benchmark: pip install -e ".[bench]"')
    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks disturb each other: -n is not allowed")


def device_of(config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc) -> None:
    """One test per provider and visit, for the suites that the test's file is about."""
    if "measured" not in metafunc.fixturenames:
        return
    cuda = not device_of(metafunc.config).startswith("cpu")
    contests = suites.plan(cuda, metafunc.config.getoption("--quick"))
    chosen = [contest for contest in contests if contest.suite in metafunc.module.SUITES]
    replayed = pytest.mark.benchmark(timer=CLOCK)
    pairs = [
        pytest.param(visit, provider, id=f"{str(visit.contest).replace(': ', ' ')} {provider}", marks=replayed)
        for visit in suites.visits(chosen)
        for provider in visit.providers
        if not visit.again or provider in visit.contest.late
    ]
    metafunc.parametrize("visit,provider", pairs)


class Session:
    """Measures a visit when one of its providers is first asked for."""

    def __init__(self, device: str, quick: bool, folder: Path, say: Callable[[str], object]):
        machine = Machine(device)
        meta = machine.meta("pytest benchmarks/ --benchmark-only", quick=quick)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(meta)
        if path.exists():  # of the same commit and day: another part of the suites, perhaps
            self.results = Results.read(path)
            self.results.refuse_mixing(meta)
        else:
            self.results = Results(meta, path)
        self.results.tests = {"all": "skipped: not run with the benchmarks"}
        self._ceilings = [visit for visit in suites.visits(suites.plan(machine.is_cuda, quick)) if _is_ceiling(visit)]
        build = functools.partial(suites.plan, machine.is_cuda, quick)
        self.runner = Runner(build, device, folder / "providers.log")
        self._say, self._measured = say, {}

    def measure(self, visit: Visit, provider: str) -> tuple[Row, list[float]]:
        for ceiling in () if _is_ceiling(visit) else self._ceilings:  # whatever part of the tests was asked for
            self.measure(ceiling, ceiling.providers[0])
        found = self._measured.get(str(visit))
        if found is None:
            self._say(str(visit))
            found = self._measured[str(visit)] = {}
            ceilings = ceilings_of(self.results, visit.contest.dtype)
            for row, samples in self.runner.visit(visit.contest, visit.providers, ceilings):
                found[row.provider] = (row, samples)
                if not visit.again or row.provider in visit.contest.late:
                    self.results.put(row)
        return found[provider]


def _is_ceiling(visit: Visit) -> bool:
    return visit.contest.suite == "ceilings"


@pytest.fixture(scope="session")
def session(request):
    option, plugin = request.config.getoption, request.config.pluginmanager.getplugin
    reporter, capture = plugin("terminalreporter"), plugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write(f"\n{line} ")

    session = Session(device_of(request.config), option("--quick"), option("--results"), say)
    with session.runner:
        yield session
    path = session.results.path
    say(f"\nresults: {path}\ntables and plots: python -m benchmarks.report {path} --out DIR\n")


@pytest.fixture
def measured(benchmark, session, visit, provider) -> Row:
    """The row of a provider, whose samples pytest-benchmark has seen; the test is skipped where a peer has none."""
    row, samples = session.measure(visit, provider)
    benchmark.group = str(visit.contest)
    benchmark.extra_info.update(row.as_json())
    if not row.ok and (row.status.startswith("skipped") or not provider.startswith(OURS)):
        pytest.skip(f"{visit.contest}, {provider}: {row.status}")
    if row.ok:
        CLOCK.replay(benchmark, samples or [row.median_us / 1e6])
    return row
