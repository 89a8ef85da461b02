"""``python -m dwconv_kernels.self_check``: proves the kernels on this machine's GPU, in under a minute.

::

    python -m dwconv_kernels.self_check [--device cuda:1] [--quick] [--jobs 1]

Every kernel is compiled as it is for users, run forward and backward, and held against float64 on the CPU:

- exact: operands are whole numbers, so each element has to be the right one;
- rounding: random operands, each element within the rounding bound of its sum (see :mod:`dwconv_kernels.testing`, and
  for layer norm + linear :func:`dwconv_kernels.self_check_norm_linear_bounds.bounds`); blocks: no further from the
  exact value than PyTorch's own operators;
- dropped images: of those, a block returns its input, and nothing of them is in a gradient;
- same bits: the same call gives the same result every time (in the interpreter, of the first cases only);
- Inf and NaN: they reach the outputs that the formula says and no others.

Without a GPU that the kernels run on, it checks them in Triton's interpreter on small maps, and says so. The exit code
is 0 where every check passed, 1 where one failed, and 2 where nothing could be checked, with the reason. Where the
kernels of one family cannot be loaded, the other's are checked, and that is one failure, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import runtime, self_check_block, self_check_depthwise, self_check_norm_linear
from ._version import __version__

MAX_JOBS = 4  # processes, each of which takes half a gigabyte of the GPU's memory
FAMILIES = {"depthwise": self_check_depthwise, "norm_linear": self_check_norm_linear, "block": self_check_block}
CASES = tuple(itertools.chain.from_iterable(family.CASES for family in FAMILIES.values()))
QUICK = 2  # so many of the cases of each family are checked where there is no time for all


class Result(NamedTuple):
    """What came of one check; ``error`` is None where it passed, else what is wrong, with the first wrong element."""

    check: str
    case: str
    configuration: str
    error: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        return self.error is None

    def __str__(self) -> str:
        line = f"{'ok' if self.ok else 'FAILED':6} {self.seconds:5.1f} s  {self.check:11}  {self.case}  "
        return f"{line}[{self.configuration}]" + ("" if self.ok else f"  {self.error}")


def run(device: str | torch.device = "cuda", quick: bool = False) -> list[Result]:
    """Check the kernels on one device, in this process.

    Args:
        device: a CUDA device, or "cpu" where ``TRITON_INTERPRET=1`` was set before this package was imported.
        quick: the first cases only.

    Raises:
        RuntimeError: the kernels cannot run there, with the reason.
    """
    reason = _why_nothing(torch.device(device))
    if reason is not None:
        raise RuntimeError(reason)
    return list(itertools.chain.from_iterable(_results(device, quick, jobs=1)))


def _why_not(family: str, device: torch.device) -> str | None:
    """Why the kernels of one family cannot be checked on a device; None where they can."""
    try:
        runtime.launchers(family)
        if device.type == "cuda" and runtime.INTERPRETER:
            return "TRITON_INTERPRET is set, which keeps kernels from being compiled for a GPU"
        return runtime.why_not_device(family, torch.empty(0, device=device))
    except (RuntimeError, ImportError, AssertionError) as error:  # the last is what a CPU build says to "cuda"
        return str(error).splitlines()[0]


def _why_nothing(device: torch.device) -> str | None:
    """Why no family can be checked on a device; None where one can."""
    reasons = [_why_not(family, device) for family in FAMILIES]
    return None if None in reasons else reasons[0]


def _cases(family: str, quick: bool, device: torch.device) -> list[NamedTuple]:
    cases = [case for case in CASES if case.family == family]
    cases, more = cases[:QUICK], [] if quick else cases[QUICK:]
    if device.type == "cpu":  # the interpreter runs one program after the other: one more time says little
        more = [case._replace(checks=tuple(check for check in case.checks if check != "same bits")) for case in more]
    return cases + more


def _results(device: str | torch.device, quick: bool, jobs: int) -> Iterator[list[Result]]:
    """The results of each case, as they come; for a family that cannot be loaded where another can, one that failed."""
    cases = []
    for family in FAMILIES:
        reason = _why_not(family, torch.device(device))
        if reason is None:
            cases += _cases(family, quick, torch.device(device))
        else:
            yield [Result("load", f"the kernels of {family}", "none of them was checked", reason, 0)]
    check, jobs = partial(check_case, device=device), min(jobs, len(cases))
    if jobs <= 1:
        yield from map(check, cases)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Processes of their own, because compiling takes nearly all of the time and Python compiles one kernel at a time.
    # An illegal access, after which a process cannot use the GPU any more, fails the cases of one process only.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(check, case) for case in cases]
        for case, future in zip(cases, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield [Result("process", str(case), "--jobs 1 shows which", "its process died, or another one did", 0)]


def check_case(case: NamedTuple, device: str | torch.device) -> list[Result]:
    """All checks of one case; whatever is raised is a failure of that check."""
    family, shape = FAMILIES[case.family], _shape(case, torch.device(device))
    name = f"{case} on {'×'.join(map(str, shape))}"
    results = []
    for check in case.checks:
        error, start = None, time.perf_counter()
        try:
            with runtime.backend("triton"):
                family.CHECKS[check](case, shape, device)
        except Exception as problem:
            error = f"{'' if isinstance(problem, AssertionError) else f'{type(problem).__name__}: '}{problem}"
            error = " ".join(error.split())[:500]
        seconds = time.perf_counter() - start
        results.append(Result(check, name, family.configuration(case, shape, device), error, seconds))
    return results


def _shape(case: NamedTuple, device: torch.device) -> tuple[int, ...]:
    return case.small if device.type == "cpu" else case.shape


# The command


def main(argv: Sequence[str] | None = None) -> int:
    args, start = _arguments(argv), time.perf_counter()
    works, reason = runtime.kernel_status()
    reason = None if any(map(runtime.has_kernels, FAMILIES)) else reason
    device = args.device or torch.device("cuda" if works and not runtime.INTERPRETER else "cpu")
    if reason is None and device.type == "cpu" and not runtime.INTERPRETER:
        return _again_in_the_interpreter(args)
    reason = reason or _why_nothing(device)
    if reason is not None:
        print(f"Nothing was checked: {reason.rstrip('.')}.")
        return 2
    print("\n".join(_facts(device)), flush=True)
    results = []
    for of_case in _results(device, args.quick, args.jobs):
        results += of_case
        print("\n".join(map(str, of_case)), flush=True)
    print("\n".join(_summary(results, device, args, time.perf_counter() - start)), flush=True)
    return 0 if all(result.ok for result in results) else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def device(name: str) -> torch.device:
        if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
            raise argparse.ArgumentTypeError(f"{name!r}; cpu, cuda or cuda:N is allowed")
        return torch.device(name)

    def positive(number: str) -> int:
        if int(number) < 1:
            raise ValueError
        return int(number)

    summary, _, details = __doc__.partition("::")
    parser = argparse.ArgumentParser(
        "python -m dwconv_kernels.self_check",
        description=summary.partition(": ")[2].strip(),
        epilog=details.partition("\n\n")[2].partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = max(1, min(MAX_JOBS, (os.cpu_count() or 1) // 2))
    parser.add_argument("--device", type=device, help="a CUDA device, or cpu for the interpreter; by default the GPU")
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} cases of each family only")
    parser.add_argument("--jobs", type=positive, default=jobs, help="processes to check in; by default %(default)s")
    return parser.parse_args(argv)


def _again_in_the_interpreter(args: argparse.Namespace) -> int:
    """Triton's switch has to be set before Triton is imported, which by now it is."""
    works, reason = runtime.kernel_status()
    if not works:
        print(f"No GPU that the kernels run on: {reason}.", flush=True)
    root = Path(__file__).parents[1]  # where this package is, also if it was found by way of the current folder
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __spec__.name, "--device", "cpu", "--jobs", str(args.jobs)]
    return subprocess.run(
        command + ["--quick"] * args.quick, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ).returncode


def _facts(device: torch.device) -> Iterator[str]:
    versions = {
        "dwconv_kernels": __version__,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "Triton": runtime.triton_version(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": _driver(),
    }
    yield " · ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    if device.type == "cpu":
        yield "Triton's interpreter on the CPU, small maps. This proves the kernels' source, and nothing about a GPU."
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu = torch.cuda.get_device_properties(index)
    yield (
        f"cuda:{index}, {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.0f} GiB"
    )


def _driver() -> str | None:
    """The version of NVIDIA's driver, where Linux says it."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3}(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found and found[0]
    return None


def _summary(
    results: Sequence[Result], device: torch.device, args: argparse.Namespace, seconds: float
) -> Iterator[str]:
    yield "Which kernels ran, and why:"
    reasons = {}
    for name, family in FAMILIES.items():
        for case in _cases(name, args.quick, device) if _why_not(name, device) is None else ():
            reasons |= dict.fromkeys(family.reasons(case, _shape(case, device), device))
    yield from (f"  {name:25} {reason}" for name, reason in reasons)
    failed = sum(not result.ok for result in results)
    # The first check of a case is the one that has its kernels compiled.
    slowest = sorted(results, key=lambda result: -result.seconds)[:3]
    yield (
        f"{len(results) - failed} checks passed, {failed} failed, in {seconds:.0f} s"
        + (f" with {args.jobs} processes" if args.jobs > 1 else "")
        + "; the longest: "
        + ", ".join(f"{result.check} {result.case} {result.seconds:.1f} s" for result in slowest)
    )
    yield "FAILED: the kernels are not to be trusted on this machine" if failed else "The kernels are right."


if __name__ == "__main__":
    sys.exit(main())
