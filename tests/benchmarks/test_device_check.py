"""The device check without a GPU: its order, its limits, how it goes on after a stop, and what tests have to say."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import device_check, suites
from benchmarks.device_check import run_benchmarks
from benchmarks.machine import ROOT, Machine
from benchmarks.results import Results
from benchmarks.runner import Runner
from tests.benchmarks import toys

META = {
    "gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "cudnn": 9, "commit": "abc", "date": "2026-01-01",
    "device": "cuda", "quick": False,
}  # fmt: skip

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


def test_what_part_of_ours_is_refused(tmp_path):
    """Where tests of ``accelerate`` fail, networks that were accelerated; all others are as fast as they are."""
    results = Results(META, tmp_path / "r.json")
    results.tests = {"accelerate": "failed: 1 of 2, test_exact"}
    contest = toys.contest("ours", "slower", case="besides", needs_besides={"ours": ("accelerate",)})
    put = dataclasses.replace(CONTESTS["one is late"], needs_besides={"ours_timm": ("accelerate",)})
    (visit,) = suites.visits([contest])
    assert device_check._waiting(results, visit, retry=True) == ("slower",)
    device_check._judge_again(results, visit)
    assert row(results, "besides", "ours").status == "refused: tests of accelerate failed: 1 of 2, test_exact"
    assert device_check._waiting(results, suites.visits([put])[0], retry=False) == ("ours", "slower")


def test_speeds_of_what_is_not_tested_are_marked(tmp_path):
    """In the row, in the table; and no longer when the tests are through."""
    results = Results(META, tmp_path / "r.json")
    results.tests = {"depthwise": "unfinished: 0", "all": "passed: 3"}
    contests = [CONTESTS["one is late"]]
    run(results, contests)
    assert row(results, "one is late", "ours").untested == "depthwise"
    assert row(results, "one is late", "slower").untested is None
    text = device_check.table(results)
    assert "tests of depthwise: unfinished: 0" in text
    (line,) = [line for line in text.splitlines() if "slower" in line]
    assert line.endswith("; TESTS NOT THROUGH: depthwise")
    assert not device_check.is_right(results)
    stored = Results.read(tmp_path / "r.json")
    assert row(stored, "one is late", "ours").untested == "depthwise"
    stored.tests = {"depthwise": "passed: 5"}
    before = row(stored, "one is late", "ours")
    assert run(stored, contests) == []
    assert row(Results.read(tmp_path / "r.json"), "one is late", "ours") == dataclasses.replace(before, untested=None)
    assert "NOT THROUGH" not in device_check.table(stored)


def test_late_providers_are_measured_beside_our_graph(tmp_path):
    """The ratio that counts where a network waits for Python is that of two graphs."""
    results = Results(META, tmp_path / "r.json")
    contest = CONTESTS["in graphs"]
    assert [visit.providers for visit in suites.visits([contest])] == [
        ("ours", "ours_graph", "reduce_overhead"),
        ("ours", "ours_graph", "max_autotune"),
    ]
    run(results, [contest])
    assert row(results, "in graphs", "reduce_overhead").over_graph == pytest.approx(2.0, rel=0.25)
    assert row(results, "in graphs", "max_autotune").over_graph == pytest.approx(4.0, rel=0.25)
    assert row(results, "in graphs", "max_autotune").speedup == pytest.approx(6.0, rel=0.25)
    assert row(results, "in graphs", "ours_graph").over_graph is None
    for most in (40, 0):  # it is told however many contests come before it
        lines = device_check.table(results, most).splitlines()
        (words,) = [line.split() for line in lines if "in CUDA graphs" in line]
        assert words[:7] == ["depthwise_forward", "in", "graphs", "fp32", "in", "CUDA", "graphs"]
        assert float(words[7]) == pytest.approx(3000, rel=0.25)
        assert [words[8], words[10]] == ["reduce_overhead", "max_autotune"]


def test_tests_run_once_unless_asked_for(monkeypatch, tmp_path):
    """And for no longer than some minutes, however many there are."""
    asked = []

    class Cuda:
        is_cuda, device = True, "cuda"

    def tests(results, log, seconds, say, warmer):
        asked.append(seconds)
        results.tests = {"depthwise": "unfinished: 2"}

    monkeypatch.setattr(device_check, "run_tests", tests)
    monkeypatch.setattr(device_check, "run_benchmarks", lambda *arguments, **options: None)
    results = Results(META)

    def check(*more):
        arguments = device_check._arguments(["--out", str(tmp_path), *more])
        device_check._measure(arguments, Cuda(), results, time.monotonic(), lambda line: None)
        return asked[-1]

    assert check("--minutes", "8") == pytest.approx(0.4 * 8 * 60)
    check()
    assert len(asked) == 1
    assert check("--retry", "--minutes", "20") == 240
    results.tests = {"all": "skipped: as asked"}
    check()
    assert len(asked) == 3


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


def test_table_says_where_ours_was_not_what_it_is_taken_for(tmp_path):
    results, note = Results(META), "not on tensor cores: Triton 3 does not compile a kernel"
    for case in ("a case", "one is late"):
        results.put(CONTESTS[case].row("ours", median_us=12.5, note=note))
    results.put(CONTESTS["one dies"].row("ours", median_us=12.5, note="another"))
    assert f"ours, 2 rows: {note}" in device_check.table(results).splitlines()


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


def test_a_new_check_takes_no_tests_from_an_old_log(tmp_path):
    (tmp_path / "tests.log").write_text("tests/gpu/test_depthwise_gpu.py::test_exact[a] PASSED\n")
    arguments = device_check._arguments(["--out", str(tmp_path), "--device", "cpu"])
    device_check._results(arguments, Machine("cpu"))
    assert not (tmp_path / "tests.log").exists()
    (tmp_path / "tests.log").touch()
    device_check._results(arguments, Machine("cpu"))  # the same check goes on
    assert (tmp_path / "tests.log").exists()


def test_bad_arguments(tmp_path):
    for arguments, said in (
        (("--minutes", "0"), "argument --minutes: 0.0 is not more than 0"),
        (("--only", "depthwise"), "invalid choice: 'depthwise'"),
        (("--device", "cuda:9"), "device is 'cuda:9'"),
    ):
        done = check(tmp_path, *arguments)
        assert done.returncode == 2
        assert said in done.stderr, done.stderr
