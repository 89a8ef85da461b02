"""What the depthwise convolution's tensor-core kernels cost, read from their machine code: no GPU needed.

``python -m benchmarks.tensor_code [--all] [--readme]``

For every choice that ``config_tensor.py`` ships: registers, spills, shared memory, bank conflicts, seconds to compile,
and per output issue slots, tensor-core instructions and wavefronts of loads and stores, once of the steady loop alone
and once of whole kernels, prologue, fill and all, on maps in large batches. Exits with 1 where one of :data:`LIMITS`
or :data:`BARS` is broken. ``--readme`` writes the predicted times (`tensor_time`) into the family's README.

Launches are those of the package's own launchers, caught before they reach the compiler. Counts are of a lane: slots of
a warp × 32 / outputs. A wavefront is what loads and stores move of 32 lanes in one cycle, four where they are of 16
bytes; lanes that read from many lines of memory may take longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import block_time, conflicts, cubin
from benchmarks.compiling import run
from benchmarks.machine_code import ALL_ARCHS, COMMON_LIMITS, MAPS, Options
from benchmarks.products import DTYPES, Build, interpreted, kernel_named
from dwconv_kernels.depthwise import config_tensor, launch_tensor
from dwconv_kernels.devices import SHARED_KB

ARCHS = (80, 90)
LINES = ((51, 5), (5, 51), (51, 1), (1, 51))
KERNEL_SIZES = (*((k, k) for k in (7, 11, 13, 17, 21, 31, 51)), *LINES)
ALL_KERNEL_SIZES = (*((k, k) for k in (3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 27, 31, 51)), *LINES)
PIXELS = 256 * 56 * 56  # of a map, in all its images
FORWARD, WEIGHT = "forward", "weight gradient"
SECONDS = 30
UNSPILLED = (80, 90)  # where registers were counted; elsewhere spills are kept out of loops


class Case(NamedTuple):
    """A forward pass, or the gradient of weight and bias; ``residual`` and ``y``: dtypes, None for none and dtype."""

    what: str
    dtype: str
    kh: int
    kw: int
    c: int = 96
    residual: str | None = None
    y: str | None = None

    @property
    def size(self) -> str:
        return str(self.kh) if self.kh == self.kw else f"{self.kh}×{self.kw}"

    def __str__(self) -> str:
        more = [self.residual and f"residual {self.residual}", self.y and f"y {self.y}"]
        return ", ".join(filter(None, [f"{self.dtype} {self.size} C={self.c} {self.what}", *more]))


class OnMap(NamedTuple):
    """A launch on maps of h × w pixels: how many programs, and its numbers by name."""

    h: int
    w: int
    outputs: int
    programs: int
    numbers: dict[str, int]


class Job(NamedTuple):
    """A kernel to compile, and the maps that it is launched for."""

    build: Build
    maps: list[OnMap]


def cases(
    dtypes: Sequence[str], sizes: Iterable[tuple[int, int]], channels: Sequence[int], everything: bool
) -> Iterator[Case]:
    """Each alone: another dtype, numbers of channels that fill no block, what is added and in which dtype it ends."""
    for dtype, (kh, kw), c in itertools.product(dtypes, sizes, channels):
        if dtype != dtypes[0] and c != channels[0]:
            continue
        yield from (Case(what, dtype, kh, kw, c) for what in (FORWARD, WEIGHT))
        if everything and (dtype, c) == (dtypes[0], channels[0]):
            for residual, y in ((dtype, None), ("fp32", None), ("fp32", "fp32"), (None, "fp32")):
                yield Case(FORWARD, dtype, kh, kw, c, residual, y)


def maps_of(case: Case, arch: int) -> list[tuple[int, int]]:
    """The report's maps: the largest has the whole kernel, the smallest what large ones are cut to."""
    return list(MAPS)


def launched(case: Case, h: int, w: int, arch: int) -> list[block_time.Launched]:
    """What a pass launches for many maps of h × w pixels, with as many outputs."""
    n = max(1, PIXELS // (h * w))

    def empty(dtype: str | None) -> torch.Tensor:
        shape = (n, case.c, h, w)
        return torch.empty(shape, dtype=DTYPES[dtype or case.dtype], memory_format=torch.channels_last)

    weight = torch.empty((case.c, 1, case.kh, case.kw), dtype=DTYPES[case.dtype])
    bias, padding = weight.new_empty(case.c), (case.kh // 2, case.kw // 2)
    with block_time.recorded(arch) as seen:
        if case.what == FORWARD:
            residual = empty(case.residual) if case.residual else None
            launch_tensor.convolve(empty(None), weight, bias, padding, empty(case.y), False, residual)
        else:
            launch_tensor.weight_gradient(empty(None), empty(None), weight.shape[2:], padding, weight, bias)
    return seen


def jobs(archs, found: Iterable[Case]) -> list[tuple[Job, int]]:
    """(job, architecture) of everything to compile, each kernel once, with the maps of the first case that has it."""
    todo: dict[tuple[int, str], Job] = {}
    for arch, case in itertools.product(archs, found):
        for h, w in maps_of(case, arch):
            for one in launched(case, h, w, arch):
                job = todo.setdefault((arch, repr(one.launch)), Job(Build(case, one.launch), []))
                if job.build.call == case:
                    outputs = max(1, PIXELS // (h * w)) * h * w * case.c
                    job.maps.append(OnMap(h, w, outputs, one.programs, one.numbers))
    return [(job, arch) for (arch, _), job in todo.items()]


# What is counted.


def tensor(instructions: Iterable[cubin.Instruction]) -> int:
    return sum(i.opcode.startswith("HMMA") for i in instructions)


def wavefronts(instructions: Iterable[cubin.Instruction]) -> int:
    """Of loads, stores and shuffles: those of constants and barriers of copies take other ways."""
    return sum(_wavefronts(i.opcode) for i in instructions)


def _wavefronts(opcode: str) -> int:
    name, *parts = opcode.split(".")
    if not name.startswith(("LD", "ST", "SHFL", "ATOM", "RED")) or name in ("LDC", "LDGDEPBAR", "LDCU"):
        return 0
    if name in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1].isdigit() else 1
    return 4 if "128" in parts else 2 if "64" in parts else 1


COUNTS = {"slots": len, "hmma": tensor, "wavefronts": wavefronts}


def steady(build: Build, program: cubin.Program) -> dict[str, float] | None:
    """Counts per output of the innermost loop, which goes on as long as maps do; of other kernels None.

    Of the weight gradient for all its groups of columns; of large kernels for all rounds over pairs of blocks.
    """
    v, kernel = build.constants, build.launch.kernel
    if not program.loops or not kernel_named(kernel).is_gluon():
        return None
    depth = max(loop.depth for loop in program.loops)
    bodies = [program.body(loop) for loop in program.loops if loop.depth == depth]
    if kernel == "_depthwise_fwd_large_kernel":
        times = config_tensor.patches(build.call.kh, build.call.kw, v["R"]).pairs
        outputs = v["PATCH_ROWS"] * v["STRIPS"] * 16 * 8 * v["WARPS"]
    else:
        times, outputs = v.get("COLUMN_GROUPS", 1), 8 * v["PIXELS"] * 32 * v["WARPS"]
    times *= 32 * v["WARPS"] / outputs
    return {name: round(times * sum(map(count, bodies)), 2) for name, count in COUNTS.items()}


def per_output(build: Build, program: cubin.Program, one: OnMap) -> dict[str, float]:
    """Counts per output of the whole kernel on a map."""
    v = one.numbers | build.constants
    times = block_time.of_loops(program, block_time.trips(build.launch.kernel, v))
    lanes = 32 * build.warps * one.programs / one.outputs
    found = {name: lanes * block_time.total(program, times, count) for name, count in COUNTS.items()}
    return found | {"slots": lanes * program.slots(times)}


# Limits: (what, is it kept?, why), of the rows that `report` makes; and bars.

LIMITS = (
    *COMMON_LIMITS,
    (
        "no spill at all",
        lambda row, options: row["arch"] not in UNSPILLED or row["spill"] == row["stack"] == 0,
        "taps and sums are cut up so that they fit into registers",
    ),
    (
        "no bank conflicts",
        lambda row, options: row["conflicts"] == 0,
        "layouts are made so that rows of 16 bytes lie side by side; what waits, waits in the innermost loop",
    ),
    (
        "products on tensor cores",
        lambda row, options: row["steady"] is None or row["steady"]["hmma"] > 0,
        "a loop without products is not the one that is meant",
    ),
    (
        "the loops of the source",
        lambda row, options: all(one["slots"] for one in row["maps"]),
        "a loop that is missing or doubled means that slots are counted wrong",
    ),
    (
        f"{SECONDS} s to compile",
        lambda row, options: row["compile_seconds"] <= SECONDS * options.slow,
        "the first step of a training is to take less than that",
    ),
)

# Issue slots per output of the steady loop in bf16 on sm_90, at most: (what, K) → limit. What is above is a step back.
BARS = {(FORWARD, "7"): 9, (FORWARD, "13"): 16, (FORWARD, "31"): 40, (WEIGHT, "7"): 16}
# Of large kernels, the choice that the bar is for: small maps have fewer outputs to share what is read.
_LARGE = {"PATCH_ROWS": 7, "STRIPS": 4}


def broken(row: dict, options: Options) -> list[str]:
    """The limits that a row of a kernel that compiled breaks."""
    names = [name for name, kept, _ in LIMITS if not kept(row, options)]
    bar = BARS.get((row["what"], row["K"]))
    counted = (row["arch"], row["dtype"], row["C"], row["residual"], row["y"]) == (90, "bf16", 96, None, None)
    small = any(row["constants"].get(name, value) < value for name, value in _LARGE.items())
    if counted and bar is not None and row["steady"] is not None and not small and row["steady"]["slots"] > bar:
        names.append(f"{bar} slots per output")
    return names


# Rows


def report(job: Job, arch: int, options: Options) -> list[dict]:
    """Compiles a kernel: one row."""
    try:
        with conflicts.noted() as accesses:
            compiled = job.build.compile(arch)
        row = _of_build(job, arch) | _of_kernel(job, compiled, accesses)
    except Exception as error:  # whatever compilers and drivers of compilers raise
        return [failed(job, arch, f"{type(error).__name__}: {error}")]
    return [row | {"broken": broken(row, options)}]


def failed(job: Job, arch: int, error: str) -> dict:
    """The row of a kernel that could not be compiled or read."""
    return _of_build(job, arch) | {"error": error, "broken": ["compiles"]}


def _of_build(job: Job, arch: int) -> dict:
    case, build = job.build.call, job.build
    return {
        "kernel": build.launch.kernel, "arch": arch, "case": str(case), "what": case.what, "dtype": case.dtype,
        "K": case.size, "C": case.c, "residual": case.residual, "y": case.y, "constants": build.constants,
        "warps": build.warps, "triton": triton.__version__,
    }  # fmt: skip


def _of_kernel(job: Job, compiled: cubin.Compiled, accesses: list[conflicts.Access]) -> dict:
    program = compiled.program
    in_loops = frozenset().union(*(loop.blocks for loop in program.loops))
    return {
        "registers": compiled.registers,
        "spill": sum(i.spills for i in program.instructions),
        "spill_in_loops": sum(i.spills for block in in_loops for i in program.blocks[block]),
        "stack": compiled.stack,
        "shared": compiled.shared,
        "compile_seconds": round(compiled.seconds, 2),
        "atomics": compiled.atomics,
        "accesses": len(accesses),
        "conflicts": sum(one.conflicts for one in accesses),
        "where": sorted({str(one) for one in accesses if one.conflicts}),
        "instructions": len(program.instructions),
        "steady": steady(job.build, program),
        "maps": [_of_map(job.build, program, one) for one in job.maps],
    }


def _of_map(build: Build, program: cubin.Program, one: OnMap) -> dict:
    """Counts per output; None where the loops are not those expected."""
    try:
        found = {name: round(count, 3) for name, count in per_output(build, program, one).items()}
    except cubin.Unreadable:
        found = dict.fromkeys(COUNTS)
    return {"H": one.h, "W": one.w, "programs": one.programs, **found}


def text(row: dict) -> str:
    """A row, for people to read."""
    names = ("R", "GROUPS", "PAIRS", "J", "COLUMN_GROUPS", "PATCH_ROWS", "STRIPS", "CHUNK")
    constants = " ".join(f"{name}={row['constants'][name]}" for name in names if name in row["constants"])
    lines = [f"sm_{row['arch']} {row['case']} {row['kernel']} {constants}:"]
    if "error" in row:
        lines.append(f"    {row['error'].splitlines()[0]} … {row['error'].splitlines()[-1]}")
    else:
        lines[0] += (
            f" {row['registers']} registers, {row['spill']} spills ({row['spill_in_loops']} in loops), shared "
            f"{row['shared'] / 1024:.0f} KB, {row['conflicts']} conflicts in {row['accesses']} accesses, "
            f"{row['compile_seconds']:.1f} s"
        )
        of_maps = [(f"{one['H']}×{one['W']}", one) for one in row["maps"]]
        for where, one in ([("steady loop", row["steady"])] if row["steady"] else []) + of_maps:
            if one["slots"] is not None:
                lines.append(
                    f"    {where}: per output {one['slots']:.2f} slots, {one['hmma']:.2f} HMMA, "
                    f"{one['wavefronts']:.2f} wavefronts"
                )
    lines += [f"    BROKEN: {name}" for name in row["broken"]]
    lines += [f"        {where}" for where in row.get("where", ())]
    return "\n".join(lines)


# The command


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if interpreted():
        return 2
    every = arguments.all
    archs = arguments.arch or (ALL_ARCHS if every else ARCHS)
    sizes = arguments.kernel_size or (ALL_KERNEL_SIZES if every else KERNEL_SIZES)
    if arguments.readme:
        from benchmarks import tensor_time  # which stands on this module

        block = tensor_time.block(arguments.jobs)
        print(block, end="")
        tensor_time.README.write_text(tensor_time.with_block(tensor_time.README.read_text(), block))
        return 0
    found = list(cases(config_tensor.DTYPES if every else ("bf16",), sizes, (96, 40, 33) if every else (96,), every))
    rows = []
    for (row,) in run(jobs(archs, found), Options(slow=arguments.slow), arguments.jobs, report, failed):
        rows.append(row)
        print(text(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = [row for row in rows if row["broken"]]
    print(f"\n{len(rows)} kernels compiled with Triton {triton.__version__}, {len(failures)} with broken limits")
    for row in failures:
        print(f"BROKEN {text(row).splitlines()[0].split(':')[0]}: {', '.join(row['broken'])}")
    return 1 if failures or not rows else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    def size(value: str) -> tuple[int, int]:
        numbers = [int(number) for number in value.replace("×", "x").split("x")]
        if len(numbers) > 2 or not 1 <= min(numbers) <= max(numbers) <= config_tensor.MAX_KERNEL:
            raise argparse.ArgumentTypeError(f"{value!r} is no size up to {config_tensor.MAX_KERNEL}: 7 or 5x51")
        return (numbers * 2)[0], (numbers * 2)[1]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_code", description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="all architectures, sizes, dtypes and numbers of channels")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_KB), help="90 for sm_90")
    parser.add_argument("--kernel-size", type=size, nargs="+", metavar="K", help="7, 5x51")
    parser.add_argument("--readme", action="store_true", help="instead: write the predicted times into the README")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="kernels that are compiled at the same time")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="on a busy machine: seconds × FACTOR")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
