"""The interpreter lane: tests/interpreter in a pytest process of its own, beside the process that runs the other tests.

``TRITON_INTERPRET=1`` has to be set before the kernels are imported, and would change what other tests see. The process
starts when the session does and is waited for by the session's last test, so that on two cores it costs little time.

This module is also the plugin by which that process ends when whoever started it is gone, however that came about.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_INHERITED = ("PYTEST_ADDOPTS", "DWCONV_KERNELS_BACKEND", "DWCONV_KERNELS_STRICT")
_WATCH = "DWCONV_KERNELS_LANE_OF"


class Lane:
    """A pytest process over ``folder``, started at once.

    Args:
        arguments: further ones for pytest.
    """

    def __init__(self, folder: Path, *arguments: str):
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider", "-p", __name__]
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", _WATCH: str(os.getpid())}
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self._output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self, seconds: float, at_least: int) -> str:
        """The lane's last line, once it is through.

        Raises:
            AssertionError: a test of it fails, fewer than ``at_least`` passed, or it is not through in ``seconds``.
        """
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"not through after {seconds} s; the last of its output:\n{self.tail()}") from None
        if status != 0:
            raise AssertionError(f"exit status {status}; the last of its output:\n{self.tail()}")
        last = self.tail(1)
        passed = re.search(r"\b(\d+) passed", last)
        if passed is None or int(passed[1]) < at_least:
            raise AssertionError(f"at least {at_least} tests have to pass; it says: {last}")
        return last

    def tail(self, lines: int = 80) -> str:
        self._output.seek(0)
        return "\n".join(self._output.read().splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the process, if it still runs; to be called in any case."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def pytest_configure(config) -> None:
    """In the lane's own process."""
    if _WATCH in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[_WATCH]),), daemon=True).start()


def _end_with(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1)
    os._exit(1)
