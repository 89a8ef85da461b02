"""Providers that hang, crash or raise in the process that measures them: a row each, and nothing else is lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.machine import ROOT
from benchmarks.results import Results, Row
from benchmarks.runner import OutOfTime, Runner, ceilings_of
from tests.benchmarks import toys

CONTESTS = {contest.case: contest for contest in toys.contests()}


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with Runner(toys.contests, "cpu", tmp_path_factory.mktemp("runner") / "log") as runner:
        yield runner


def visit(runner, case, providers=None):
    contest = CONTESTS[case]
    rows = list(runner.visit(contest, providers or contest.providers))
    return {row.provider: row for row, _ in rows}, rows


def test_all_is_well(runner):
    last, rows = visit(runner, "a case")
    assert last["slower"].speedup == pytest.approx(3.0, rel=0.25)
    assert {name: row.status.split(":")[0] for name, row in last.items()} == {
        "ours": "ok", "slower": "ok", "raises": "failed", "missing": "skipped", "wrong": "wrong",
    }  # fmt: skip
    assert all(len(samples) == row.samples for row, samples in rows if row.ok)


def test_one_hangs(runner):
    start = time.monotonic()
    last, _ = visit(runner, "one hangs")
    assert last["hangs"].status == "timeout: nothing came for 2 s"
    assert last["ours"].ok
    assert last["slower"].speedup == pytest.approx(3.0, rel=0.25)
    assert time.monotonic() - start < 15  # the limit is 2 s, and the process starts twice


def test_one_dies(runner):
    last, _ = visit(runner, "one dies")
    assert last["dies"].status == "crashed: the process ended with exit code 7"
    assert last["ours"].ok
    assert last["slower"].ok


def test_one_leaves_a_broken_device(runner):
    """It has its row, and the others go on in a new process; nobody else is blamed."""
    last, _ = visit(runner, "one breaks the device")
    assert last["breaks_the_device"].status == "failed: BreaksTheDevice: an illegal memory access was encountered"
    assert last["ours"].ok
    assert last["slower"].speedup == pytest.approx(3.0, rel=0.25)


def test_one_hangs_in_the_rounds(runner):
    last, _ = visit(runner, "one hangs later")
    assert last["hangs_later"].status.startswith("timeout")
    assert last["ours"].ok


def test_no_provider_can_run_without_inputs(runner):
    last, _ = visit(runner, "no inputs")
    assert {row.status for row in last.values()} == {"failed: RuntimeError: no inputs"}
    assert set(last) == {"ours", "slower"}
    assert visit(runner, "a case", ("ours",))[0]["ours"].ok  # the next one gets a new process


def test_output_of_providers_is_in_the_log(tmp_path):
    log = tmp_path / "log"
    with Runner(toys.contests, "cpu", log) as runner:
        visit(runner, "a case", ("ours",))
    assert "depthwise_forward: a case fp32: ours" in log.read_text()


def test_a_worker_that_died_between_visits_costs_nobody():
    with Runner(toys.contests, "cpu") as runner:
        visit(runner, "a case", ("ours",))
        os.kill(runner._process.pid, signal.SIGKILL)
        runner._process.join()
        assert visit(runner, "a case", ("ours",))[0]["ours"].ok


def test_worker_ends_with_whoever_started_it():
    """Also while a provider hangs, and also where that one was killed and could not say anything."""
    code = (
        "import os; from benchmarks.runner import Runner; from tests.benchmarks import toys\n"
        "contest = next(c for c in toys.contests() if c.case == 'one hangs')\n"
        "if __name__ == '__main__':\n"
        "    runner = Runner(toys.contests, 'cpu', os.devnull)\n"
        "    for row, _ in runner.visit(contest, ('ours', 'hangs')):\n"
        "        print(runner._process.pid, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_deadline_ends_in_the_middle_and_leaves_what_came(tmp_path):
    rows = []
    with Runner(toys.contests, "cpu", deadline=time.monotonic() + 600) as runner:
        list(runner.visit(CONTESTS["a case"], ("ours",)))  # the process is there
        process = runner._process
        runner._deadline = time.monotonic() + 1.0
        coming = runner.visit(CONTESTS["one hangs"], ("ours", "hangs"))
        with pytest.raises(OutOfTime):
            rows.extend(row for row, _ in coming)
        assert [row.provider for row in rows] == ["ours"]
        assert not process.is_alive()


def test_what_a_provider_started_ends_with_it(tmp_path):
    """Compilers, for instance."""
    with Runner(toys.contests, "cpu") as runner:
        visit(runner, "a case", ("ours",))
        group = runner._process.pid
        assert os.getpgid(group) == group  # a group of its own, which is what gets killed
        runner.stop()
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_a_plan_that_cannot_be_made_is_an_error_and_no_row():
    with (
        Runner(toys.cannot_start, "cpu") as runner,
        pytest.raises(RuntimeError, match="no benchmark can run: OSError: the plan cannot be made"),
    ):
        list(runner.visit(CONTESTS["a case"], ("ours",)))


def test_ceilings_of_the_same_run():
    results = Results(dict.fromkeys(("gpu", "driver", "torch", "triton", "cudnn", "commit", "date")))
    assert ceilings_of(results, "bf16") is None
    for case, dtype, rate in (("copy", "fp32", 3000.0), ("matmul", "bf16", 700.0), ("matmul", "fp32", 50.0)):
        results.put(Row("ceilings", case, "torch", dtype, rate=rate))
    assert ceilings_of(results, "fp32").flops_per_second == 50e12
    assert ceilings_of(results, "amp_bf16").flops_per_second == 700e12
    assert ceilings_of(results, "fp16").flops_per_second == 700e12  # where only bf16 was measured
    assert ceilings_of(results, "bf16").bytes_per_second == 3000e9
