"""``python -m dwconv_kernels.self_check``: proves the kernels on this machine's GPU, in under a minute.

::

    python -m dwconv_kernels.self_check [--device cuda:1] [--quick] [--jobs 1]

Every kernel is compiled as it is for users, run forward and backward, and held against float64 on the CPU:

- exact: operands are whole numbers, so each element has to be the right one;
- rounding: random operands, each element within the rounding bound of its sum (see :mod:`dwconv_kernels.testing`);
- same bits: the same call gives the same result every time;
- Inf and NaN: they reach the outputs that the formula says and no others.

Without a GPU that the kernels run on, it checks them in Triton's interpreter on small maps, and says so. The exit code
is 0 where every check passed, 1 where one failed, and 2 where nothing could be checked, with the reason.
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
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import runtime, testing
from ._version import __version__
from .depthwise.op import depthwise_conv2d

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REPEATS = 100  # of a call whose bits have to stay the same; in the interpreter, 2
MAX_JOBS = 4  # processes, each of which takes half a gigabyte of the GPU's memory
Shape = tuple[int, int, int, int]


class Case(NamedTuple):
    """A depthwise convolution, and what is checked of it."""

    dtype: str
    kernel: tuple[int, int]
    shape: Shape  # N, C, H, W on a GPU
    small: Shape  # in the interpreter: another map that leads to the same kernels
    checks: tuple[str, ...] = ("exact",)
    padding: tuple[int, int] | None = None  # None is "same"
    contiguous: bool = False  # the input; else it is channels_last
    strict: bool = False

    @property
    def pads(self) -> tuple[int, int]:
        return self.padding or (self.kernel[0] // 2, self.kernel[1] // 2)

    def __str__(self) -> str:
        words = [self.dtype, "{}×{}".format(*self.kernel)]
        words += ["padding {},{}".format(*self.padding)] if self.padding else []
        words += ["contiguous"] if self.contiguous else []
        words += ["strict"] if self.strict else []
        return " ".join(words)


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


# Together, every choice of config.py at 7×7, in two of the dtypes or more, and each other kernel at least once. What
# takes long to compile comes first, and the maps are odd: overlapping strips, rows that are no pairs, channels that do
# not fill the last block, several images to a program.
CASES = (
    Case("bf16", (7, 7), (2, 64, 33, 57), (1, 33, 3, 15), ("exact", "rounding", "same bits")),
    Case("fp32", (7, 7), (2, 40, 29, 30), (1, 5, 3, 10), ("exact", "rounding", "same bits", "Inf and NaN")),
    Case("fp16", (7, 7), (3, 40, 20, 28), (1, 5, 4, 10), ("exact", "rounding", "same bits")),
    Case("bf16", (7, 7), (2, 64, 15, 57), (1, 5, 3, 10), ("exact", "Inf and NaN"), strict=True),
    Case("fp32", (9, 9), (1, 40, 25, 23), (1, 5, 3, 7)),
    Case("bf16", (9, 9), (2, 33, 19, 21), (1, 5, 10, 9), padding=(0, 0)),
    Case("bf16", (7, 7), (3, 64, 14, 14), (2, 5, 3, 14), ("exact", "same bits")),
    Case("bf16", (11, 1), (2, 40, 44, 13), (1, 5, 7, 8)),
    Case("bf16", (7, 7), (2, 64, 9, 5), (1, 5, 2, 5)),
    Case("fp32", (7, 7), (2, 40, 9, 23), (1, 5, 2, 6), padding=(6, 2)),
    Case("fp16", (7, 7), (300, 40, 7, 7), (2, 5, 4, 7), ("exact", "same bits")),
    Case("fp16", (5, 5), (2, 31, 17, 22), (1, 5, 6, 5), padding=(0, 4)),
    Case("fp16", (5, 5), (2, 31, 17, 22), (1, 5, 3, 9), contiguous=True),
    Case("bf16", (3, 3), (2, 33, 19, 31), (2, 5, 3, 8), ("exact", "same bits")),
    Case("fp16", (1, 11), (2, 40, 13, 44), (1, 5, 3, 12)),
)
QUICK = 2  # so many of the cases are checked where there is no time for all


def run(device: str | torch.device = "cuda", quick: bool = False) -> list[Result]:
    """Check the kernels on one device, in this process.

    Args:
        device: a CUDA device, or "cpu" where ``TRITON_INTERPRET=1`` was set before this package was imported.
        quick: the first cases only.

    Raises:
        RuntimeError: the kernels cannot run there, with the reason.
    """
    reason = _why_not(torch.device(device))
    if reason is not None:
        raise RuntimeError(reason)
    return list(itertools.chain.from_iterable(_results(device, quick, jobs=1)))


def _why_not(device: torch.device) -> str | None:
    """Why nothing can be checked on a device; None where it can."""
    try:
        runtime.launchers("depthwise")
        if device.type == "cuda" and runtime.INTERPRETER:
            return "TRITON_INTERPRET is set, which keeps kernels from being compiled for a GPU"
        return runtime.why_not_device("depthwise", torch.empty(0, device=device))
    except (RuntimeError, ImportError, AssertionError) as error:  # the last is what a CPU build says to "cuda"
        return str(error).splitlines()[0]


def _results(device: str | torch.device, quick: bool, jobs: int) -> Iterator[list[Result]]:
    """The results of each case, as they come."""
    cases = CASES[:QUICK] if quick else CASES
    check, jobs = partial(check_case, device=device), min(jobs, len(cases))
    if jobs == 1:
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


def check_case(case: Case, device: str | torch.device) -> list[Result]:
    """All checks of one case; whatever is raised is a failure of that check."""
    shape = case.small if torch.device(device).type == "cpu" else case.shape
    name = f"{case} on {'×'.join(map(str, shape))}"
    results = []
    for check in case.checks:
        error, start = None, time.perf_counter()
        try:
            with runtime.backend("triton"), runtime.strict() if case.strict else contextlib.nullcontext():
                CHECKS[check](case, shape, device)
        except Exception as problem:
            error = f"{'' if isinstance(problem, AssertionError) else f'{type(problem).__name__}: '}{problem}"
            error = " ".join(error.split())[:500]
        seconds = time.perf_counter() - start
        results.append(Result(check, name, _configuration(case, shape), error, seconds))
    return results


def _choices(case: Case, shape: Shape) -> dict[str, NamedTuple]:
    """What config.py picks for each of the three passes."""
    config = runtime.launchers("depthwise").config
    (kh, kw), w = case.kernel, shape[3]
    strict = case.strict or runtime.strict_kernels()
    same = case.pads == (kh // 2, kw // 2)
    ow = w + 2 * case.pads[1] - kw + 1
    return {
        "y": config.pick_forward(case.dtype, kh, kw, same, ow, strict),
        "dx": config.pick_forward(case.dtype, kh, kw, same, w, strict),
        "dw": config.pick_backward_weight(case.dtype, kh, kw, same, ow, strict),
    }


def _named(choice) -> str:
    kernel = choice.kernel.removeprefix("_depthwise_").removesuffix("_kernel")
    return f"{kernel} {choice.block_w} {choice.edge}"


def _configuration(case: Case, shape: Shape) -> str:
    passes: dict[str, list[str]] = {}
    for result, choice in _choices(case, shape).items():
        passes.setdefault(_named(choice), []).append(result)
    return ", ".join(f"{'+'.join(results)}: {name}" for name, results in passes.items())


# The checks. Operands are made on the CPU, where float64 says what is right.


def _operands(case: Case, shape: Shape, make: Callable[[Sequence[int]], Tensor]) -> list[Tensor]:
    """x, weight, bias and the gradient of y, in the dtype of the case."""
    n, c, h, w = shape
    size = [s + 2 * p - k + 1 for s, p, k in zip((h, w), case.pads, case.kernel, strict=True)]
    return [make(s).to(DTYPES[case.dtype]) for s in (shape, (c, 1, *case.kernel), (c,), (n, c, *size))]


def _normal(seed: int) -> Callable[[Sequence[int]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator)


def _kernels(case: Case, operands: Sequence[Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """What the kernels make of the operands, on their device."""
    x, weight, bias, dy = (t.to(device) for t in operands)
    if not case.contiguous:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return _gradients(lambda x, w, b: depthwise_conv2d(x, w, b, padding=case.pads), x, weight, bias, dy)


def _pytorch(case: Case, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same by PyTorch in float64."""
    groups = operands[0].shape[1]
    operands = [t.double() for t in operands]
    return _gradients(lambda x, w, b: F.conv2d(x, w, b, padding=case.pads, groups=groups), *operands)


def _gradients(function: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = function(*leaves)
    return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def _check_exact(case: Case, shape: Shape, device: str | torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    operands = _operands(case, shape, partial(testing.integers, generator=generator))
    expected = _pytorch(case, operands)
    for name, actual in _kernels(case, operands, device).items():
        testing.assert_exact(actual.cpu(), expected[name], name)


def _check_rounding(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = _operands(case, shape, _normal(1))
    expected, magnitude = _pytorch(case, operands), _pytorch(case, [t.abs() for t in operands])
    taps, pixels = case.kernel[0] * case.kernel[1], operands[3].numel() // shape[1]
    terms = {"y": taps + 1, "dx": taps, "dw": pixels, "db": pixels}
    for name, actual in _kernels(case, operands, device).items():
        testing.assert_componentwise(actual.cpu(), expected[name], magnitude[name], terms[name], name)


def _check_same_bits(case: Case, shape: Shape, device: str | torch.device) -> None:
    operands = [t.to(device) for t in _operands(case, shape, _normal(2))]
    first = _kernels(case, operands, device)
    for repeat in range(2, (REPEATS if torch.device(device).type == "cuda" else 2) + 1):
        for name, again in _kernels(case, operands, device).items():
            if not torch.equal(again, first[name]):
                place = tuple(again.ne(first[name]).nonzero()[0].tolist())
                values = f"{again[place].item()} instead of {first[name][place].item()}"
                raise AssertionError(f"{name}: run {repeat} differs from the first, at {place}: {values}")


def _check_inf_and_nan(case: Case, shape: Shape, device: str | torch.device) -> None:
    """y and dx are Inf or NaN exactly where they are in float64; the other channels' dw and db are finite."""
    operands = [t.abs() + 0.1 for t in _operands(case, shape, _normal(3))]
    x, dy = operands[0], operands[3]
    for t in (x, dy):
        t[0, 0, t.shape[2] // 2, t.shape[3] // 2] = float("inf")  # inside,
        t[-1, 1, -1, 0] = float("nan")  # at an edge,
        t[-1, 2, 0, -1] = -float("inf")  # and in a corner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, in the interpreter, of Inf · 0
        expected, actual = _pytorch(case, operands), _kernels(case, operands, device)
    for name in ("y", "dx"):
        testing.assert_exact(_kind(actual[name].cpu()), _kind(expected[name]), f"{name}, as 0 or ±1 (Inf) or 2 (NaN)")
    for name in ("dw", "db"):
        if not actual[name][3:].isfinite().all():
            raise AssertionError(f"{name}: Inf or NaN reached a channel that has none")


def _kind(t: Tensor) -> Tensor:
    """0 for finite values, ±1 for ±Inf, 2 for NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0).float())


CHECKS = {
    "exact": _check_exact,
    "rounding": _check_rounding,
    "same bits": _check_same_bits,
    "Inf and NaN": _check_inf_and_nan,
}


# The command


def main(argv: Sequence[str] | None = None) -> int:
    args, start = _arguments(argv), time.perf_counter()
    works, reason = runtime.kernel_status()
    reason = None if runtime.has_kernels("depthwise") else reason
    device = args.device or torch.device("cuda" if works and not runtime.INTERPRETER else "cpu")
    if reason is None and device.type == "cpu" and not runtime.INTERPRETER:
        return _again_in_the_interpreter(args)
    reason = reason or _why_not(device)
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
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} of {len(CASES)} cases only")
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
    for case in CASES[:QUICK] if args.quick else CASES:
        choices = _choices(case, case.small if device.type == "cpu" else case.shape).values()
        reasons |= {(_named(choice), choice.reason): None for choice in choices}
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
