"""The machine that benchmarks run on: its facts, its clock, how its caches are kept cold."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Clock, EventClock, HostClock

ROOT = Path(__file__).parents[1]
CPU_CACHE = 32 * 2**20  # where nobody says how large the last level is
ROTATE_PAST = 3  # sets of inputs hold so many times what fits into the cache
MAX_SETS = {"cuda": 64, "cpu": 8}


class Machine:
    """A device to measure on, and what has to be set up for it.

    Args:
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        RuntimeError: there is no such device.
    """

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        if self.is_cuda:
            if not torch.cuda.is_available():
                raise RuntimeError(f"device is {device!r}; there is no NVIDIA GPU that PyTorch can use, cpu is allowed")
            index = self.device.index or 0
            if index >= torch.cuda.device_count():
                raise RuntimeError(f"device is {device!r}; there are {torch.cuda.device_count()} GPUs")
            self.device = torch.device("cuda", index)

    def set_up(self) -> None:
        """What holds for a whole process of measurements; to be called once."""
        torch.manual_seed(0)
        # fp32 means fp32, and PyTorch's convolutions are the fastest that cuDNN finds, not what it guesses.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            # Nothing is captured on the default stream, and backward runs on the stream of its forward: one for all.
            torch.cuda.set_stream(torch.cuda.Stream())

    @property
    def clock(self) -> Clock:
        return EventClock() if self.is_cuda else HostClock()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.is_cuda else CPU_CACHE

    @property
    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.is_cuda else 2**30

    def sets_of_inputs(self, bytes_of_one: int) -> int:
        """How many sets of inputs to take turns, so that none is in the cache when its turn comes."""
        enough = -(-ROTATE_PAST * self.cache_bytes // max(bytes_of_one, 1))
        fitting = self.free_bytes // 4 // max(bytes_of_one, 1)
        return max(1, min(enough, fitting, MAX_SETS[self.device.type]))

    def lap(self, calls: list[Callable[[], object]], graph: bool) -> tuple[Callable[[], object], str]:
        """One function that makes all ``calls``, and how it is timed: "graph", "events" or "clock".

        In a CUDA graph there are no gaps between kernels in which the GPU waits for Python. What cannot be captured is
        called from Python, as it would be by a user.
        """

        def run() -> list:
            return [call() for call in calls]  # all kept, so that what they write is rotated, too

        for _ in range(2):  # compiles, allocates, lets cuDNN choose
            run()
        self.synchronize()
        if not (self.is_cuda and graph):
            return run, self.clock.method
        recorded, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(recorded, pool=pool, stream=torch.cuda.current_stream()):
                results = run()
        except RuntimeError:
            torch.cuda.synchronize()
            self._forget_capture(pool)
            return run, self.clock.method

        def replay(_keep=(calls, results)) -> None:  # the graph knows only the addresses of what they work on
            recorded.replay()

        return replay, "graph"

    def _forget_capture(self, pool: tuple[int, int]) -> None:
        """After one that failed: for PyTorch before 2.12 it would still be under way.

        Its allocator would give no memory back any more, its random numbers raise (pytorch/pytorch#180395).
        """
        index = self.device.index
        with contextlib.suppress(RuntimeError):  # it has ended, as it should
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(self.device))

    def meta(self, by: str, commit: str | None = None, quick: bool = False) -> dict:
        """What a results file says about where it comes from, and ``by`` which command."""
        now = datetime.datetime.now(datetime.timezone.utc)
        return {
            "gpu": torch.cuda.get_device_name(self.device) if self.is_cuda else f"CPU {_cpu_name()}",
            "driver": _driver() if self.is_cuda else None,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cudnn": torch.backends.cudnn.version() if self.is_cuda else None,
            "commit": commit or _commit(),
            "date": now.date().isoformat(),
            "time": now.strftime("%H:%M:%S"),
            "by": by,
            "device": self.device.type,
            "quick": quick,
            "cuda": torch.version.cuda,
            "timm": _version("timm"),
            "python": platform.python_version(),
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "cache_bytes": self.cache_bytes,
        }


def bytes_of(tensors: list[Tensor] | tuple[Tensor, ...]) -> int:
    """Of the values of tensors, whatever storage they lie in."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(query)


def _commit() -> str:
    """Of the source tree, with "-dirty" where something in it differs from that commit; "unknown" outside of git."""
    commit = _first_line(["git", "rev-parse", "--short=8", "HEAD"])
    top = _first_line(["git", "rev-parse", "--show-toplevel"])
    if commit is None or top is None or Path(top).resolve() != ROOT.resolve():  # none, or another project's
        return "unknown"
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"])
    return f"{commit}-dirty" if changed else commit


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
