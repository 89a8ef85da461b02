"""Runs tests/interpreter, see interpreter_lane.py, and shows that what goes wrong there is not passed over."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwconv_kernels import runtime
from tests.interpreter_lane import ROOT, Lane

FOLDER = ROOT / "tests" / "interpreter"
LANE = pytest.StashKey[Lane]()


def why_not() -> str | None:
    """Why the lane cannot run; None where it can."""
    if runtime.INTERPRETER:
        return "TRITON_INTERPRET=1 is set: tests/interpreter is part of this very process"
    if importlib.util.find_spec("numpy") is None:
        return "NumPy is not installed, on which Triton's interpreter stands"
    return runtime._why_not_triton()


def test_interpreter(request):
    """Comes last in a session (conftest.py), which started the lane when it began."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    lane = request.config.stash.get(LANE, None) or Lane(FOLDER)  # in a worker of xdist, it begins now
    try:
        lane.wait(seconds=1200, at_least=1200)
    finally:
        lane.stop()


# The lane itself


@pytest.fixture
def lane_over(tmp_path):
    lanes = []

    def start(text):
        (tmp_path / "test_it.py").write_text(text)
        lanes.append(Lane(tmp_path, "--rootdir", str(tmp_path)))
        return lanes[-1]

    yield start
    for lane in lanes:
        lane.stop()


def test_a_lane_that_passes(lane_over):
    lane = lane_over(
        "import os\ndef test(): assert os.environ['TRITON_INTERPRET'] == os.environ['OMP_NUM_THREADS'] == '1'"
    )
    assert "1 passed" in lane.wait(seconds=60, at_least=1)


@pytest.mark.parametrize("text, what", [
    ("def test(): raise ValueError('so it goes')", "so it goes"),
    ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
    ("", "exit status 5"),
    ("def test(): pass", "at least 2 tests have to pass; it says: 1 passed"),
    ("import pytest\ndef test(): pytest.skip()\ndef test2(): pass", "at least 2 tests have to pass"),
], ids=["failure", "error", "nothing", "too few", "skipped"])  # fmt: skip
def test_a_lane_that_does_not(lane_over, text, what):
    with pytest.raises(AssertionError, match=what):
        lane_over(text).wait(seconds=60, at_least=2)


def test_a_lane_that_hangs_is_ended(lane_over, tmp_path):
    lane = lane_over("import time\ndef test():\n    print('so far', flush=True)\n    time.sleep(600)")
    with pytest.raises(AssertionError, match="not through after 2 s"):
        lane.wait(seconds=2, at_least=1)
    assert lane._process.poll() is not None


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_lane_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, time\n"
        "def test():\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    code = (
        "import pathlib, time\n"
        "from tests.interpreter_lane import Lane\n"
        f"lane = Lane(pathlib.Path({str(tmp_path)!r}), '--rootdir', {str(tmp_path)!r})\n"
        "time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        pid = int(_eventually((tmp_path / "pid").read_text))
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert _eventually(lambda: not _runs(pid))


def _eventually(question, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if answer := question():
                return answer
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not after {seconds} s")


def _runs(pid: int) -> bool:
    try:
        # One that has ended and that nobody waits for is still there, as a zombie.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
