"""The device check without a GPU: its judgement on tests, its order, its limits, and how it goes on after a stop."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import device_check, suites
from benchmarks.device_check import judge, run_benchmarks, run_tests, why_refused
from benchmarks.machine import ROOT
from benchmarks.results import Results
from benchmarks.runner import Runner
from tests.benchmarks import toys

META = {
    "gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "cudnn": 9, "commit": "abc", "date": "2026-01-01",
    "device": "cuda", "quick": False,
}  # fmt: skip
PYTEST = """
============================= test session starts ==============================
tests/gpu/test_depthwise_gpu.py::test_exact[bf16 7×7] PASSED             [ 10%]
tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7 PASSED by] FAILED   [ 20%]
tests/gpu/test_norm_linear_gpu.py::test_exact[a] PASSED                  [ 30%]
tests/gpu/test_norm_linear_gpu.py::test_exact[b] SKIPPED (no reason)     [ 30%]
tests/gpu/test_launches_gpu.py::test_streams PASSED                      [ 40%]
tests/gpu/test_launches_gpu.py::test_devices ERROR                       [ 50%]
tests/gpu/test_timing_gpu.py::test_sleep FAILED                          [ 60%]
FAILED tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7] - AssertionError
""".splitlines()


def test_judgement_of_each_operator():
    assert judge(PYTEST, [1, 1]) == {
        "depthwise": "failed: 1 of 2, test_exact[fp32 7×7 PASSED by]",
        "norm_linear": "passed: 1",
        "all": "failed: 1 of 2, test_devices",
        "timing": "failed: 1 of 1, test_sleep",
    }


def test_judgement_of_tests_that_were_not_through():
    alone = {"alone": "unfinished: those that need the GPU for themselves"}
    assert judge([PYTEST[4]], [None, None]) == {"norm_linear": "unfinished: 1", **alone}
    assert judge([PYTEST[4]], [0, None]) == {"norm_linear": "passed: 1", **alone}
    assert judge(PYTEST[2:4], [None, None]) == {"depthwise": "failed: 1 of 2, test_exact[fp32 7×7 PASSED by]", **alone}
    assert judge([], [None, None]) == {"all": "unfinished: 0", **alone}


def test_judgement_of_tests_that_crashed_or_did_not_begin():
    """What no line tells: a segmentation fault after tests that passed, a file that cannot be imported, none at all."""
    assert judge([PYTEST[4]], [-11, 0]) == {
        "norm_linear": "passed: 1",
        "all": "failed: pytest ended with exit code -11",
    }
    assert judge(["ERROR collecting tests/gpu/test_depthwise_gpu.py"], [2, 5]) == {
        "all": "failed: pytest ended with exit code 2"
    }
    assert judge(["no tests ran in 0.1 s"], [5, 5]) == {"all": "failed: no test ran"}
    assert judge([PYTEST[4]], [0, 5]) == {"norm_linear": "passed: 1"}
    assert judge([PYTEST[4]], [1, 0]) == {"norm_linear": "passed: 1", "all": "failed: pytest ended with exit code 1"}


def test_failed_tests_refuse_what_stands_on_them():
    results = Results(META)
    results.tests = {"depthwise": "failed: 1 of 2, test_exact", "norm_linear": "passed: 7"}
    assert why_refused(results, ("norm_linear",)) is None
    assert why_refused(results, ("depthwise",)) == "refused: tests of depthwise failed: 1 of 2, test_exact"
    assert why_refused(results, ("norm_linear", "depthwise")).startswith("refused")
    results.tests = {"all": "failed: 1 of 2, test_devices"}
    assert why_refused(results, ("norm_linear",)).startswith("refused: tests of all")
    results.tests = {"timing": "failed: 1 of 1, test_sleep"}
    assert why_refused(results, ("depthwise",)) is None
    assert not device_check.is_right(results)
    results.tests = {"all": "unfinished: 12"}
    assert why_refused(results, ("depthwise",)) is None


def write_tests(folder, body):
    folder.mkdir()
    (folder / "test_depthwise_gpu.py").write_text(f"import pytest, time\npytestmark = pytest.mark.gpu\n{body}")
    return folder


ALONE = "@pytest.mark.alone\n"


def test_tests_are_run_and_judged(tmp_path):
    """Those that need the GPU for themselves when nobody is there any more."""
    seen = tmp_path / "seen"
    note = f"open({str(seen)!r}, 'a').write('%s\\n')"
    body = f"def test_good(): {note % 'good'}\n{ALONE}def test_bad(): {note % 'alone'}; assert False\n"
    folder = write_tests(tmp_path / "gpu", body)
    results, said = Results(META, tmp_path / "r.json"), []

    @contextlib.contextmanager
    def meanwhile():
        seen.write_text("begin\n")
        yield
        with seen.open("a") as file:
            file.write("end\n")

    run_tests(results, tmp_path / "log", 60, said.append, meanwhile(), folder)
    assert results.tests == {"depthwise": "failed: 1 of 2, test_bad"}
    assert said == ["tests", "tests of depthwise: failed: 1 of 2, test_bad"]
    assert Results.read(tmp_path / "r.json").tests == results.tests
    assert seen.read_text().split() == ["begin", "good", "end", "alone"]


def test_tests_that_cannot_be_imported_are_a_failure(tmp_path):
    folder = write_tests(tmp_path / "gpu", "import a_module_that_is_not_there\n")
    results = Results(META)
    run_tests(results, tmp_path / "log", 60, lambda line: None, contextlib.nullcontext(), folder)
    assert results.tests == {"depthwise": "failed: 2 of 2, the file cannot be imported"}
    assert why_refused(results, ("depthwise",))


def test_tests_have_a_limit(tmp_path):
    folder = write_tests(tmp_path / "gpu", "def test_good(): pass\ndef test_hangs(): time.sleep(1000)\n")
    results = Results(META)
    start = time.monotonic()
    run_tests(results, tmp_path / "log", 6, lambda line: None, contextlib.nullcontext(), folder)
    assert time.monotonic() - start < 30
    assert results.tests["depthwise"] == "unfinished: 1"
    assert not device_check.is_right(results)


# Benchmarks


def run(results, contests, seconds=120.0, said=None, **options):
    visits = suites.visits(contests)
    said = [] if said is None else said
    with Runner(toys.contests, "cpu", deadline=time.monotonic() + seconds) as runner:
        run_benchmarks(results, visits, runner, said.append, **options)
    return said


def contests_of(said):
    """The cases of lines like "1 of 3: suite: case fp32, providers"."""
    return [line.split(": ")[2].split(" fp32")[0] for line in said if " of " in line.split(":")[0]]


CONTESTS = {contest.case: contest for contest in toys.contests()}


def row(results, case, provider):
    return results.get("depthwise_forward", case, "fp32", provider)


def test_ours_has_no_speed_where_its_tests_fail(tmp_path):
    results = Results(META, tmp_path / "r.json")
    results.tests = {"depthwise": "failed: 1 of 2, test_exact"}
    contest = CONTESTS["a case"]
    with Runner(toys.contests, "cpu") as runner:
        asked, visit = [], runner.visit
        runner.visit = lambda contest, providers, ceilings: (
            asked.append(providers) or visit(contest, providers, ceilings)
        )
        run_benchmarks(results, suites.visits([contest]), runner, lambda line: None)
    assert asked == [("slower", "raises", "missing", "wrong")]
    assert row(results, "a case", "ours").status.startswith("refused")
    run(results, [CONTESTS["one is late"]])
    assert row(results, "one is late", "ours").status == "refused: tests of depthwise failed: 1 of 2, test_exact"
    assert row(results, "one is late", "ours").median_us is None
    assert row(results, "one is late", "slower").ok
    assert row(results, "one is late", "slowest").ok
    assert not device_check.is_right(results)
    assert "refused: tests of depthwise" in device_check.table(results)


def test_speeds_are_taken_back_when_tests_fail_and_come_again_when_they_pass(tmp_path):
    results = Results(META, tmp_path / "r.json")
    contests = [CONTESTS["one is late"]]
    run(results, contests)
    assert row(results, "one is late", "ours").ok
    results.tests = {"depthwise": "failed: 1 of 2, test_exact"}
    assert run(results, contests) == []
    stored = Results.read(tmp_path / "r.json")
    assert row(stored, "one is late", "ours").status == "refused: tests of depthwise failed: 1 of 2, test_exact"
    assert row(stored, "one is late", "slower").ok
    assert run(stored, contests, retry=True) == []  # still refused
    stored.tests = {"depthwise": "passed: 2"}
    assert contests_of(run(stored, contests)) == ["one is late", "one is late"]  # the late one for its ratio
    assert row(stored, "one is late", "ours").ok
    assert row(stored, "one is late", "slower").speedup == pytest.approx(3.0, rel=0.25)


def test_what_is_left_is_in_the_file_all_the_time(tmp_path):
    results, left = Results(META, tmp_path / "r.json"), []
    write = results.write
    results.write = lambda: (write(), left.append(len(Results.read(tmp_path / "r.json").left)))
    run(results, [CONTESTS["one is late"], CONTESTS["a case"]])
    assert left[0] == 3
    assert sorted(left, reverse=True) == left
    assert left[-1] == 0


def test_late_providers_come_last_and_leave_our_row_alone(tmp_path):
    results = Results(META, tmp_path / "r.json")
    put, ours_rows = results.put, []
    results.put = lambda *rows: ours_rows.extend(r for r in rows if r.provider == "ours") or put(*rows)
    said = run(results, [CONTESTS["one is late"], CONTESTS["a case"]])
    assert [found.case for found in ours_rows] == ["one is late"] * 2 + ["a case"] * 2  # first samples, rounds
    assert contests_of(said) == ["one is late", "a case", "one is late"]
    assert said[0] == "1 of 3: depthwise_forward: one is late fp32, ours, slower"
    assert said[1].startswith("ours 2")
    assert "slower" in said[1]
    assert row(results, "one is late", "slowest").speedup == pytest.approx(6.0, rel=0.25)
    assert row(results, "one is late", "slower").speedup == pytest.approx(3.0, rel=0.25)
    ours = row(results, "one is late", "ours")
    run(results, [CONTESTS["one is late"]], retry=True)
    assert row(results, "one is late", "ours") == ours  # nothing failed, so nothing ran


def test_goes_on_where_the_time_was_over(tmp_path):
    path = tmp_path / "r.json"
    results = Results(META, path)
    contests = [CONTESTS["a case"], CONTESTS["one hangs"], CONTESTS["one is late"]]
    with Runner(toys.contests, "cpu", deadline=time.monotonic() + 600) as runner:
        visits, said = suites.visits(contests), []
        run_benchmarks(results, visits[:1], runner, said.append)
        runner._deadline = time.monotonic() + 1.0
        run_benchmarks(results, visits, runner, said.append)
    assert said[-1] == "out of time; 3 of 4 left"
    assert [left.split(": ")[1].split(" fp32")[0] for left in results.left] == [
        "one hangs",
        "one is late",
        "one is late",
    ]
    stopped = Results.read(path)
    assert row(stopped, "a case", "slower").speedup is not None
    assert row(stopped, "one hangs", "ours").ok  # measured before the time was over
    said = run(stopped, contests)
    assert contests_of(said) == ["one hangs", "one is late", "one is late"]
    assert stopped.left == Results.read(path).left == []
    assert row(stopped, "one hangs", "slower").speedup == pytest.approx(3.0, rel=0.25)


def test_who_was_interrupted_is_measured_again(tmp_path):
    """All have rows, of their first samples: the rounds were not through."""
    results = Results(META, tmp_path / "r.json")
    contest = CONTESTS["one is late"]
    results.put(*(contest.row(name, median_us=1.0, spread=0.1, samples=3) for name in ("ours", "slower")))
    visits = suites.visits([contest])[:1]
    with Runner(toys.contests, "cpu") as runner:
        run_benchmarks(results, visits, runner, lambda line: None)
    assert row(results, contest.case, "slower").speedup == pytest.approx(3.0, rel=0.25)
    assert results.done == [str(visits[0])]


@pytest.mark.full
def test_who_hung_is_not_waited_for_again_unless_asked_to(tmp_path):
    results = Results(META, tmp_path / "r.json")
    contest = CONTESTS["one hangs"]
    results.put(contest.row("hangs", status="timeout: nothing came for 2 s"))  # of a run that was stopped after it
    start = time.monotonic()
    run(results, [contest])
    without = time.monotonic() - start
    assert row(results, contest.case, "slower").speedup is not None
    assert run(results, [contest]) == []  # all done
    assert contests_of(run(results, [contest], retry=True)) == ["one hangs"]
    assert row(results, contest.case, "hangs").status.startswith("timeout")
    assert without < 60


def test_table(tmp_path):
    results = Results(META)
    results.tests = {"depthwise": "passed: 3"}
    results.put(
        CONTESTS["a case"].row("ours", median_us=12.5, spread=0.02, fraction_of_floor=0.756),
        CONTESTS["a case"].row("slower", median_us=25.0, spread=0.02, speedup=2.04),
        CONTESTS["a case"].row("raises", status="failed: ValueError: what a peer says"),
        CONTESTS["a case"].row("missing", status="skipped: not installed"),
    )
    results.left = ["one more"]
    lines = device_check.table(results).splitlines()
    assert lines[0] == "a GPU, torch 2, commit abc"
    assert lines[1] == "tests of depthwise: passed: 3"
    assert lines[3].split() == ["depthwise_forward", "a", "case", "fp32", "12.5", "76", "%", "slower", "2.04"]
    assert lines[4] == "depthwise_forward a case fp32: raises failed: ValueError: what a peer says"
    assert lines[5].startswith("no time for 1 more: one more")
    assert len(lines) == 6
    assert device_check.is_right(results)


# The command


def command(out, *arguments):
    return [sys.executable, "-m", "benchmarks.device_check", "--out", str(out), "--device", "cpu", *arguments]


def check(out, *arguments):
    return subprocess.run(command(out, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("check")
    return out, check(out, "--quick", "--minutes", "3", "--commit", "abc123", "--only", "depthwise_forward", "memory")


def test_end_to_end(finished):
    out, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in out.iterdir())
    assert len(files) <= 8
    assert next(name for name in files if name.endswith(".json")).startswith("cpu-")
    results = Results.read(next(out.glob("*.json")))
    assert results.meta["commit"] == "abc123"
    assert results.is_cpu
    assert results.tests == {"all": "skipped: no GPU"}
    assert results.left == []
    assert {found.suite for found in results.rows} == {"ceilings", "depthwise_forward", "memory"}
    ours = [found for found in results.rows if found.suite == "depthwise_forward" and found.provider == "ours"]
    assert len(ours) == 2
    for found in ours:
        assert found.ok
        assert found.ran == "torch"
        assert 0 < found.fraction_of_floor < 1.5
        assert found.error < 1e-5
    assert "ceilings: copy" in done.stdout
    assert (out / "table.txt").read_text().strip() in done.stdout


def test_end_to_end_again_measures_nothing(finished):
    out, _ = finished
    before = next(out.glob("*.json")).read_bytes()
    done = check(out, "--quick", "--minutes", "3", "--commit", "abc123", "--only", "depthwise_forward", "memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "µs ±" not in done.stdout
    assert next(out.glob("*.json")).read_bytes() == before


def test_other_conditions_are_refused(finished):
    out, _ = finished
    done = check(out, "--quick", "--commit", "other")
    assert done.returncode == 2
    assert "commit is 'abc123' there and 'other' here" in done.stderr
    (out / "second.json").write_text("{}")
    done = check(out, "--quick", "--commit", "abc123")
    (out / "second.json").unlink()
    assert done.returncode == 2
    assert "holds several results files" in done.stderr


@pytest.mark.full
def test_killed_at_any_moment_it_leaves_what_was_measured(tmp_path):
    """Not asked, not told: the file is whole, and the same command goes on from it."""
    arguments = ("--quick", "--minutes", "3", "--commit", "abc123", "--only", "depthwise_forward")
    process = subprocess.Popen(command(tmp_path, *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    forward = False
    for line in process.stdout:
        forward = "depthwise_forward" in line or forward
        if forward and "µs" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    path = next(tmp_path.glob("*.json"))
    rows = json.loads(path.read_text())["rows"]
    assert sum(found["suite"] == "depthwise_forward" and found["status"] == "ok" for found in rows) >= 3
    assert Results.read(path).left
    process = subprocess.Popen(command(tmp_path, *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert " of " in process.stdout.readline() + process.stdout.readline()  # it is at work
    process.send_signal(signal.SIGTERM)  # and is told this time
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 130
    assert "stopped; the same command goes on from here" in rest
    assert (tmp_path / "table.txt").read_text().strip() in rest
    done = check(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ceilings: copy" not in done.stdout  # that was done
    assert Results.read(path).left == []


def test_bad_arguments(tmp_path):
    for arguments, said in (
        (("--minutes", "0"), "argument --minutes: 0.0 is not more than 0"),
        (("--only", "depthwise"), "invalid choice: 'depthwise'"),
        (("--device", "cuda:9"), "device is 'cuda:9'"),
    ):
        done = check(tmp_path, *arguments)
        assert done.returncode == 2
        assert said in done.stderr, done.stderr
