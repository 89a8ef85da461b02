"""How the GPU tests are run and judged, without a GPU: limits, several processes, verdicts of what did not run."""

import contextlib
import os
import subprocess
import sys
import time

import pytest

from benchmarks import device_check, gpu_tests
from benchmarks.gpu_tests import ROOT, judge, run_tests, untested, why_refused
from benchmarks.results import Results
from tests.benchmarks.synthetic import GPU

PYTEST = """
============================= test session starts ==============================
tests/gpu/test_depthwise_gpu.py::test_exact[bf16 7×7] PASSED             [ 10%]
tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7 PASSED by] FAILED   [ 20%]
tests/gpu/test_norm_linear_gpu.py::test_exact[a] PASSED                  [ 30%]
tests/gpu/test_norm_linear_gpu.py::test_exact[b] SKIPPED (PASSED by)     [ 30%]
tests/gpu/test_launches_gpu.py::test_streams PASSED                      [ 40%]
tests/gpu/test_launches_gpu.py::test_devices ERROR                       [ 50%]
tests/gpu/test_timing_gpu.py::test_sleep FAILED                          [ 60%]
FAILED tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7] - AssertionError
""".splitlines()
XDIST = """
tests/gpu/test_depthwise_gpu.py::test_exact[bf16 7×7]
tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7 PASSED by]
[gw3] [ 12%] PASSED tests/gpu/test_depthwise_gpu.py::test_exact[bf16 7×7]
[gw11] FAILED tests/gpu/test_depthwise_gpu.py::test_exact[fp32 7×7 PASSED by]
[gw0] [100%] PASSED tests/gpu/test_norm_linear_gpu.py::test_exact[a]
[gw0] [ 30%] SKIPPED tests/gpu/test_norm_linear_gpu.py::test_exact[b]
[gw1] PASSED tests/gpu/test_launches_gpu.py::test_streams
[gw1] [ 50%] PASSED tests/gpu/test_launches_gpu.py::test_devices
[gw1] [ 50%] ERROR tests/gpu/test_launches_gpu.py::test_devices
[gw1] node down: Not properly terminated
[gw1] FAILED tests/gpu/test_timing_gpu.py::test_sleep
ERROR tests/gpu/test_launches_gpu.py::test_devices - ValueError
"""
XDIST = [f"{line} " for line in XDIST.splitlines()]  # each ends with a blank
SOME = ("depthwise", "norm_linear", "all", "timing")
A_PASSES = PYTEST[4]
ALONE = {"alone": "unfinished: those that need the GPU for themselves"}


@pytest.mark.parametrize("lines", [PYTEST, XDIST], ids=["one process", "several"])
def test_judgement_of_each_operator(lines):
    assert judge(lines, [1, 1], SOME) == {
        "depthwise": "failed: 1 of 2, test_exact[fp32 7×7 PASSED by]",
        "norm_linear": "passed: 1",
        "all": "failed: 1 of 2, test_devices",
        "timing": "failed: 1 of 1, test_sleep",
    }


def test_parts_have_verdicts_of_their_own():
    lines = [f"tests/gpu/test_{name}_gpu.py::test_{name} FAILED" for name in ("accelerate", "training", "large")]
    found = judge([A_PASSES, *lines], [1, 1])
    assert {name for name, said in found.items() if said.startswith("failed")} == {"accelerate", "training", "large"}
    assert found["norm_linear"] == "passed: 1"


def test_judgement_of_tests_that_were_not_through():
    """Those of which none came to its turn are named, too."""
    none = dict.fromkeys(gpu_tests.NAMES, "unfinished: 0")
    assert judge([A_PASSES], [None, None]) == none | {"norm_linear": "unfinished: 1"} | ALONE
    assert judge([], [None, None]) == none | ALONE
    assert judge(PYTEST[2:4], [None, None], ["depthwise", "block"]) == {
        "depthwise": "failed: 1 of 2, test_exact[fp32 7×7 PASSED by]", "block": "unfinished: 0",
    } | ALONE  # fmt: skip
    assert judge([A_PASSES], [0, None], ["norm_linear", "large"]) == {
        "norm_linear": "passed: 1", "large": "unfinished: 0",
    } | ALONE  # fmt: skip
    large = "tests/gpu/test_large_gpu.py::test_it PASSED"
    assert judge([A_PASSES, large], [None, 0], ["norm_linear", "block", "large"]) == {
        "norm_linear": "unfinished: 1", "block": "unfinished: 0", "large": "passed: 1",
    }  # fmt: skip


def test_judgement_of_tests_that_crashed_or_did_not_begin():
    """What no line tells: a segmentation fault after tests that passed, a file that cannot be imported, none at all."""
    one = ["norm_linear"]
    crashed = {"norm_linear": "passed: 1", "all": "failed: pytest ended with exit code -11"}
    assert judge([A_PASSES], [-11, 0], one) == crashed
    assert judge(["ERROR collecting tests/gpu/test_depthwise_gpu.py"], [2, 5], ["all"]) == {
        "all": "failed: pytest ended with exit code 2"
    }
    assert judge(["no tests ran in 0.1 s"], [5, 5]) == {"all": "failed: no test ran"}
    assert judge([A_PASSES], [0, 5], ["block", *one]) == {"block": "skipped: no test ran", "norm_linear": "passed: 1"}
    assert judge([A_PASSES], [1, 0], one) == {
        "norm_linear": "passed: 1",
        "all": "failed: pytest ended with exit code 1",
    }


def test_failed_tests_refuse_what_stands_on_them():
    results = Results(GPU)
    results.tests = {"depthwise": "failed: 1 of 2, test_exact", "norm_linear": "passed: 7"}
    assert why_refused(results, ("norm_linear",)) is None
    assert why_refused(results, ("depthwise",)) == "refused: tests of depthwise failed: 1 of 2, test_exact"
    assert why_refused(results, ("norm_linear", "depthwise")).startswith("refused")
    results.tests = {"all": "failed: 1 of 2, test_devices"}
    assert why_refused(results, ("norm_linear",)).startswith("refused: tests of all")
    for name in ("timing", "large", "training"):
        results.tests = {name: "failed: 1 of 1, test_it"}
        assert why_refused(results, ("depthwise",)) is None
        assert not device_check.is_right(results)
    assert why_refused(results, ("depthwise", "training")).startswith("refused: tests of training")
    results.tests = {"all": "unfinished: 12"}
    assert why_refused(results, ("depthwise",)) is None


@pytest.mark.parametrize("said", ["unfinished: 3", "skipped: as asked", "skipped: no test ran"])
def test_what_is_not_tested_is_named(said):
    results = Results(GPU)
    results.tests = {"depthwise": "passed: 2", "block": said, "alone": "unfinished: those"}
    assert untested(results, ("depthwise",)) is None
    assert untested(results, ("depthwise", "block")) == "block"
    results.tests["all"] = said
    assert untested(results, ("depthwise", "block")) == "all, block"


def write_tests(folder, body, name="depthwise"):
    folder.mkdir(exist_ok=True)
    file = folder / f"test_{name}_gpu.py"
    file.write_text(f"import os, pytest, time\npytestmark = pytest.mark.gpu\n{body}")
    return folder


MARK = "@pytest.mark.alone\n"


def run(results, tmp_path, seconds=60, folder="gpu", meanwhile=None):
    said = []
    run_tests(results, tmp_path / "log", seconds, said.append, meanwhile or contextlib.nullcontext(), tmp_path / folder)
    return said


@pytest.fixture(params=[1, 2], ids=["one process", "several"])
def processes(request, monkeypatch):
    if request.param > 1:
        pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_tests, "processes", lambda: request.param)
    return request.param


def test_tests_are_run_and_judged(tmp_path, processes):
    """Those that need the GPU for themselves when nobody is there any more, and in one process."""
    seen = tmp_path / "seen"
    note = f"open({str(seen)!r}, 'a').write('%s ' + os.environ.get('PYTEST_XDIST_WORKER', 'one')[:2] + '\\n')"
    body = f"def test_good(): {note % 'good'}\n{MARK}def test_bad(): {note % 'alone'}; assert False\n"
    write_tests(tmp_path / "gpu", body)
    results = Results(GPU, tmp_path / "r.json")

    @contextlib.contextmanager
    def meanwhile():
        seen.write_text("begin\n")
        yield
        with seen.open("a") as file:
            file.write("end\n")

    said = run(results, tmp_path, meanwhile=meanwhile())
    assert results.tests == {"depthwise": "failed: 1 of 2, test_bad"}
    assert said == ["tests", "tests of depthwise: failed: 1 of 2, test_bad"]
    assert Results.read(tmp_path / "r.json").tests == results.tests
    where = "gw" if processes > 1 else "on"
    assert seen.read_text().splitlines() == ["begin", f"good {where}", "end", "alone on"]


def test_what_happens_to_tests_is_told(tmp_path, processes):
    """Names with blanks, teardowns that fail, and, where there are several processes, one that dies."""
    body = """
@pytest.mark.parametrize("x", ["a b", "7×7 PASSED by"])
def test_good(x): pass
def test_skipped(): pytest.skip("by a test that PASSED")
@pytest.fixture
def untidy():
    yield
    raise ValueError
def test_teardown(untidy): pass
"""
    dies = "def test_dies(): os._exit(3)\n" if processes > 1 else ""
    write_tests(tmp_path / "gpu", body + dies)
    results = Results(GPU)
    run(results, tmp_path)
    bad = 2 if processes > 1 else 1
    assert results.tests["depthwise"].startswith(f"failed: {bad} of {2 + bad}, test_")
    assert why_refused(results, ("norm_linear",)) is None


def test_tests_that_cannot_be_imported_are_a_failure(tmp_path, processes):
    write_tests(tmp_path / "gpu", "import a_module_that_is_not_there\n")
    write_tests(tmp_path / "gpu", "def test_good(): pass\n", "block")
    results = Results(GPU)
    run(results, tmp_path)
    assert results.tests == {"block": "passed: 1", "depthwise": "failed: 1 of 1, the file cannot be imported"}
    assert why_refused(results, ("depthwise",))
    assert why_refused(results, ("block",)) is None


def test_tests_have_a_limit_and_some_of_it_is_for_those_that_are_alone(tmp_path, processes):
    hangs = f"def test_good(): pass\ndef test_hangs(): open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    write_tests(tmp_path / "gpu", f"{hangs}; time.sleep(1000)\n{MARK}def test_alone(): pass\n")
    write_tests(tmp_path / "gpu", f"def test_late(): time.sleep({1000 * (processes == 1)})\n", "training")
    write_tests(tmp_path / "gpu", f"pytestmark = [pytestmark, pytest.mark.alone]\n{'def test_it(): pass'}\n", "large")
    results = Results(GPU)
    start = time.monotonic()
    run(results, tmp_path, seconds=16)
    assert time.monotonic() - start < 40
    late = "unfinished: 0" if processes == 1 else "unfinished: 1"
    assert results.tests == {"depthwise": "unfinished: 2", "training": late, "large": "passed: 1"}
    assert not device_check.is_right(results)
    state = subprocess.run(["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")  # it is gone, with the process that has started it


def test_what_has_passed_does_not_run_again(tmp_path, processes):
    """But what has failed, or did not come to its turn; and whatever has a name that another begins with."""
    seen, broken = tmp_path / "seen", tmp_path / "broken"
    body = f"""
def note(text): open({str(seen)!r}, "a").write(text + "\\n")
@pytest.mark.parametrize("x", ["a", "a b"])
def test_it(x): note(x)
@pytest.mark.parametrize("x", ["c"])
def test_broken(x):
    note(x)
    assert not os.path.exists({str(broken)!r})
def test_plain(): note("plain")
def test_plain_too(): note("plain too")
"""
    write_tests(tmp_path / "gpu", body)
    broken.touch()
    results = Results(GPU)
    run(results, tmp_path)
    assert results.tests == {"depthwise": "failed: 1 of 5, test_broken[c]"}
    assert sorted(seen.read_text().splitlines()) == ["a", "a b", "c", "plain", "plain too"]
    seen.unlink()
    broken.unlink()
    run(results, tmp_path)
    assert results.tests == {"depthwise": "passed: 5"}
    assert sorted(seen.read_text().splitlines()) == ["c", "plain", "plain too"]
    run(results, tmp_path)
    assert results.tests == {"depthwise": "passed: 5"}


def test_the_most_important_come_first():
    names = [path.name for path in gpu_tests._files(gpu_tests.FOLDER)]
    assert names[:3] == [f"test_{name}_gpu.py" for name in ("depthwise", "block", "norm_linear")]
    assert {gpu_tests.about(name) for name in names} == set(gpu_tests.NAMES)
    assert gpu_tests.about("tests/gpu/test_launches_gpu.py::test_norm_linear_gpu") == "all"


def test_how_many_processes(monkeypatch):
    pytest.importorskip("xdist")
    for cores, count in ((64, 12), (16, 12), (8, 4), (6, 2), (5, 1), (1, 1)):
        monkeypatch.setattr(gpu_tests, "_cores", lambda cores=cores: cores)
        assert gpu_tests.processes() == count
    monkeypatch.setattr(gpu_tests, "_cores", lambda: 16)
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert gpu_tests.processes() == 1


@pytest.mark.full
def test_the_lane_is_collected_the_same_way_by_all_processes():
    """xdist refuses to run where two processes find different tests."""
    environment = {**os.environ, "PYTHONHASHSEED": "random", "TRITON_INTERPRET": "1", "DWCONV_KERNELS_GPU_LANE": "cpu"}
    command = [sys.executable, "-m", "pytest", *map(str, gpu_tests._files(gpu_tests.FOLDER)), "-q", "--collect-only"]
    command += ["-m", "gpu and not full and not alone", "-p", "no:cacheprovider"]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in "12"]
    first, second = ([line for line in p.communicate()[0].splitlines() if "::" in line] for p in processes)
    assert len(first) > 20
    assert first == second
