"""``pytest benchmarks/``: what pytest-benchmark shows is what was measured, and the results file has it, too."""

import json
import subprocess
import sys

import pytest

from benchmarks.machine import ROOT
from benchmarks.results import Results
from benchmarks.runner import Runner
from benchmarks.suites import visits
from tests.benchmarks import toys


def pytest_benchmarks(*arguments):
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    selected = ("-k", "ceiling or (depthwise_forward and not compile)")
    return out, pytest_benchmarks(
        "--quick", "--device", "cpu", "--results", str(out), f"--benchmark-json={out / 'times.json'}", *selected
    )


def test_exit_status_and_files(done):
    out, finished = done
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = Results.read(next(out.glob("cpu-*.json")))
    assert {row.suite for row in results.rows} == {"ceilings", "depthwise_forward"}
    assert f"results: {results.path}" in finished.stdout
    assert "depthwise_forward: C=192 28×28 7×7 N=1 fp32 (ours, eager, channels_last)" in finished.stdout


def test_times_are_those_of_the_results(done):
    out, _ = done
    results = Results.read(next(out.glob("cpu-*.json")))
    times = json.loads((out / "times.json").read_text())["benchmarks"]
    rows = {row.key: row for row in results.rows if row.ok}
    assert len(times) == len([key for key in rows if key[-1] != "compile"])  # measured with a late provider
    for found in times:
        info = found["extra_info"]
        row = rows[info["suite"], info["case"], info["dtype"], info["provider"]]
        assert found["stats"]["median"] * 1e6 == pytest.approx(row.median_us, rel=1e-3)
        if row.suite != "ceilings":  # whose samples stay where they were taken
            assert found["stats"]["rounds"] == row.samples


def test_another_part_of_the_suites_is_added_and_brings_its_own_ceilings(done):
    out, _ = done
    more = pytest_benchmarks("--quick", "--device", "cpu", "--results", str(out), "-k", "host and depthwise and ours")
    assert more.returncode == 0, more.stdout + more.stderr
    results = Results.read(next(out.glob("cpu-*.json")))
    assert {row.suite for row in results.rows} == {"ceilings", "depthwise_forward", "host"}
    assert results.tests == {"all": "skipped: not run with the benchmarks"}
    assert results.meta["by"] == "pytest benchmarks/ --benchmark-only"
    assert all(row.fraction_of_floor for row in results.rows if row.ok and row.suite == "depthwise_forward")


def test_several_processes_are_refused():
    pytest.importorskip("xdist")
    refused = pytest_benchmarks("--quick", "--device", "cpu", "-n", "2")
    assert refused.returncode == 4
    assert "benchmarks disturb each other: -n is not allowed" in refused.stderr


def test_who_cannot_run_is_skipped_with_the_reason(done):
    _, finished = done
    assert "max_autotune: skipped: max-autotune chooses between kernels for GPUs" in finished.stdout


def test_late_visits_leave_our_row_alone(tmp_path):
    from benchmarks.conftest import Session

    contest = next(contest for contest in toys.contests() if contest.case == "one is late")
    session = Session("cpu", True, tmp_path, lambda line: None)
    session.runner = Runner(toys.contests, "cpu")
    with session.runner:
        first, late = visits([contest])
        ours, samples = session.measure(first, "ours")
        assert len(samples) == ours.samples
        assert session.measure(late, "slowest")[0].speedup == pytest.approx(6.0, rel=0.25)
    assert session.results.get(*contest.key[:2], "fp32", "ours") == ours
    assert session.results.get(*contest.key[:2], "fp32", "slower").ok
