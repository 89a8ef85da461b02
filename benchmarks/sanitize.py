"""``python -m benchmarks.sanitize --out DIR``: compute-sanitizer's tools over the self-check of the kernels.

::

    python -m benchmarks.sanitize --out DIR [--tools memcheck racecheck initcheck synccheck] [--minutes 2]

memcheck: accesses beside allocations, or not aligned; racecheck: shared memory that threads write and read without a
barrier between; initcheck: device memory read that nobody wrote; synccheck: barriers that not all threads reach. Each
runs ``python -m dwconv_kernels.self_check --quick --jobs 1`` for at most so many minutes, into ``<tool>.log`` in DIR,
and gets a line. Kernels run 10 to 100 times as slowly as otherwise, and what initcheck says of PyTorch's own kernels
counts as well: the log has their names.

The exit code is 0 where every tool found nothing, 1 where one found something, the self-check failed or its time was
over, and 2 where compute-sanitizer is not there or does not run here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
USUAL = "/usr/local/cuda/bin/compute-sanitizer"
SELF_CHECK = ("-m", "dwconv_kernels.self_check", "--quick", "--jobs", "1")
TRIAL = ("-c", "import torch; print(torch.ones(3, device='cuda').sum().item())")
TRIAL_SECONDS = 120.0
# racecheck has "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" instead.
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")
_CLEAN = re.compile(r"SUMMARY: 0 (?:errors|hazards)")
_FINDING = re.compile(
    r"^=+ +((?:Invalid|Error:|Warning: Race|Race reported|Uninitialized|Barrier error).*)", re.MULTILINE
)


class Outcome(NamedTuple):
    """What came of a tool: "clean", "found", "failed" or "unfinished", and its summary, or why there is none."""

    tool: str
    kind: str
    said: str

    def __str__(self) -> str:
        return f"{self.tool}: {self.kind}, {self.said}"


def find() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(USUAL)


def sanitize(sanitizer: str, tool: str, log: Path, seconds: float, what: tuple[str, ...] = SELF_CHECK) -> Outcome:
    """Runs Python under one tool."""
    # Without PyTorch's cache each tensor is an allocation of its own, and what is beyond it nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "99", sys.executable, *what]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return judge(tool, log.read_text(errors="replace"), code, seconds)


def judge(tool: str, text: str, code: int | None, seconds: float) -> Outcome:
    """What a log and the exit code (None: out of time) say. There is a summary for each process that was looked at."""
    summaries = _SUMMARY.findall(text)
    dirty = [summary for summary in summaries if not _CLEAN.search(summary)]
    if dirty:
        return Outcome(tool, "found", "; ".join(dict.fromkeys(dirty)))
    if code is None and (finding := _FINDING.search(text)) is not None:  # the summary would have come at the end
        return Outcome(tool, "found", f"{finding[1]}; not through in {seconds:g} s")
    if code is None:
        return Outcome(tool, "unfinished", f"not through in {seconds:g} s")
    if code != 0 or not summaries:
        last = (text.strip().splitlines() or ["nothing was printed"])[-1]
        return Outcome(tool, "failed", f"exit code {code}{'' if summaries else ', without a summary'}: {last}"[:300])
    return Outcome(tool, "clean", summaries[0])


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    sanitizer = find()
    if sanitizer is None:
        print(
            f"compute-sanitizer is not there, neither on the PATH nor as {USUAL}: nothing was checked", file=sys.stderr
        )
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    trial = sanitize(sanitizer, TOOLS[0], arguments.out / "trial.log", TRIAL_SECONDS, TRIAL)
    if trial.kind != "clean":
        print(f"compute-sanitizer does not run here: {trial}", file=sys.stderr)
        return 2
    bad = False
    for tool in arguments.tools:
        outcome = sanitize(sanitizer, tool, arguments.out / f"{tool}.log", 60 * arguments.minutes)
        print(outcome, flush=True)
        bad |= outcome.kind != "clean"
    return int(bad)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the logs")
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=TOOLS, metavar="TOOL", help=f"of {', '.join(TOOLS)}"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="for each tool [%(default)s]")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"argument --minutes: {arguments.minutes} is not more than 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
