"""What the compiled kernels cost, read from their machine code: no GPU needed. ``python -m benchmarks.machine_code``

For every configuration that ``config.py`` ships and every architecture: registers, spills, seconds to compile, the load
of each pipe in each loop, and issue slots per output of whole kernels, prologue and flush included. Exits with 1 where
a limit of :data:`LIMITS` or :data:`SLOTS` is broken.

Slots are counted from above: predicated instructions as issued, the longer side of every branch. Strips that overlap or
stick out of the map, and lanes beyond C, are work, but their outputs are not counted. Every program takes whole maps,
as in large batches, and one image; ``--rows`` and ``--images`` say otherwise. Seconds are those of a compilation from
nothing, without any cache; time in which the machine was busy with something else does not count.

The predicted time is that of issue slots alone on an H100 (132 multiprocessors × 4 schedulers × 32 lanes at 1.75 GHz).
The memory floor is each map once, a residual too, at 3.0 TB/s, the copy bandwidth measured on one; its share is floor /
prediction, and above 100 % memory is what limits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton

from benchmarks import cubin
from benchmarks.compiling import run
from dwconv_kernels.depthwise import config, kernels, launch
from dwconv_kernels.devices import REGISTERS, SHARED_KB

ARCHS = (80, 89, 90)  # compiled for on every change; the others with --all
ALL_ARCHS = (80, 86, 89, 90, 100, 120)
MAPS = ((56, 56), (28, 28), (14, 14), (7, 7))  # the four stages of a ConvNeXt at 224²
KERNEL_SIZES = ((7, 7),)
# All squares, both lines, and oblong ones in both directions.
ALL_KERNEL_SIZES = ((1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (1, 11), (11, 1), (3, 7), (5, 3), (9, 5))
CHANNELS = (96,)
ALL_CHANNELS = (96, 40)  # a whole number of blocks of channels, and not

H100_SLOTS_PER_PS = 132 * 4 * 32 * 1.75e9 / 1e12  # of one lane
COPY_BYTES_PER_PS = 3.0
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Options(NamedTuple):
    """What the report is for: maps, images and rows of one program (None: all rows)."""

    maps: tuple[tuple[int, int], ...] = MAPS
    rows: int | None = None
    images: int = 1
    slow: float = 1.0


@dataclass(frozen=True)
class Build:
    """One kernel with its constants: what is compiled, and what the report calls it."""

    family: str
    kernel: str
    dtype: str
    kh: int
    kw: int
    c: int
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]
    loops: tuple[str, ...] | None = None  # nested ones, outermost first; None where the compiler may do as it likes
    choice: config.Choice | None = None

    @property
    def source(self) -> cubin.ASTSource:
        kernel = getattr(FAMILIES[self.family].kernels, self.kernel)
        return cubin.source(kernel, dict(self.types), dict(self.constants))

    @property
    def warps(self) -> int:
        return dict(self.options)["num_warps"]

    @property
    def residual(self) -> str | None:
        """The dtype of the residual that it adds; None where it adds none."""
        return dict(self.types)["residual_ptr"].strip("*") if dict(self.constants).get("HAS_RESIDUAL") else None

    @property
    def bytes_per_output(self) -> int:
        """Of all maps, each once: x and y or dy, and the residual."""
        maps = ["x_ptr", "y_ptr", "dy_ptr"] + ["residual_ptr"] * (self.residual is not None)
        return sum(BYTES[type.strip("*")] for name, type in self.types if name in maps)


class Programs(NamedTuple):
    """``count`` programs that run their loops equally often: ``trips``, outermost first."""

    count: int
    trips: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How the kernels of a family are enumerated, and what they do on a map."""

    kernels: ModuleType
    builds: Callable[[str, int, int, int], Iterator[Build]]
    # (H, W, is it only in strict mode?) of the maps for which a build is picked; all the programs of one map.
    maps: Callable[[Build, Options], list[tuple[int, int, bool]]]
    programs: Callable[[Build, int, int, Options], list[Programs]]


# Depthwise


def depthwise_builds(
    dtype: str, kh: int, kw: int, c: int, stride: tuple = (1, 1), dilation: tuple = (1, 1)
) -> Iterator[Build]:
    """Every choice that config ships, strict ones too, then the two small kernels.

    Forward kernels also with a residual, which the block's input gradient adds: of the map's dtype, as what it writes,
    and both in fp32, as under autocast. With a stride, maps of the report are those of dy.
    """
    map_type, table = f"*{dtype}", "*fp32"
    common = ("depthwise", dtype, kh, kw, c)
    choices = config.pick_strided(stride)
    if stride == (1, 1):
        choices = [c for strict in (False, True) for c in config.shipped(dtype, kh, kw, strict, dilation)]
    for choice in dict.fromkeys(choices):
        backward = "bwd_weight" in choice.kernel
        loops = ("images", "rows") if backward else ("rows",)
        for residual in (None,) if backward or stride != (1, 1) else dict.fromkeys((None, map_type, table)):
            y = residual or map_type
            types = {"x_ptr": map_type, "dy_ptr": map_type, "dx_ptr": map_type, "residual_ptr": y, "y_ptr": y}
            types |= {"taps_ptr": table, "partials_ptr": table}
            constants = choice.constants(c, kh, kw, residual is not None)
            yield _build(common, choice.kernel, types, constants, choice.options(), loops=loops, choice=choice)
    size, options = {"KH": kh, "KW": kw}, {"num_warps": 4, "num_stages": 1}
    for parameter in dict.fromkeys((map_type, "*fp32")):  # under autocast they are fp32
        types = {"x_ptr": map_type, "weight_ptr": parameter, "bias_ptr": parameter, "taps_ptr": table}
        constants = {**size, "BLOCK_C": launch._TAPS_BLOCK_C}
        yield _build(common, "_depthwise_taps_kernel", types, constants, options)
        types = {"partials_ptr": table, "dw_ptr": parameter, "db_ptr": parameter}
        for groups in dict.fromkeys(choice.groups(kh) for choice in choices if "bwd_weight" in choice.kernel):
            constants = {**size, "GROUPS": groups, **launch._SUM_BLOCK}
            yield _build(common, "_depthwise_sum_kernel", types, constants, options)


def _build(common: tuple, kernel: str, types: dict, constants: dict, options: dict, **others) -> Build:
    """A build whose arguments are what the kernel has: ``types``, else 32-bit sizes."""
    family, dtype, kh, kw, c = common
    names = [p.name for p in getattr(kernels, kernel).params if not p.is_constexpr]
    types = tuple((name, types[name] if name.endswith("_ptr") else "i32") for name in names)
    constants, options = tuple(constants.items()), tuple(options.items())
    return Build(family, kernel, dtype, kh, kw, c, types, constants, options, **others)


def depthwise_maps(build: Build, options: Options) -> list[tuple[int, int, bool]]:
    """Those of the report's maps, with "same" padding, for which config picks a build; else the widest there is."""
    if build.choice is None:
        return []
    if build.choice.stride != (1, 1):
        return [(h, w, False) for h, w in options.maps]
    pick, d = config.pick_backward_weight if "images" in build.loops else config.pick_forward, build.choice.dilation

    def picked(w: int) -> list[bool]:
        return [s for s in (False, True) if pick(build.dtype, build.kh, build.kw, True, w, s, d) == build.choice]

    found = [(h, w, False not in picked(w)) for h, w in options.maps if picked(w)]
    return found or [(w, w, False not in picked(w)) for w in range(64, 0, -1) if picked(w)][:1]


def depthwise_programs(build: Build, h: int, w: int, options: Options) -> list[Programs]:
    """All programs of ``options.images`` images, following kernels.py; padding is "same"."""
    choice, half = build.choice, build.kh // 2
    columns = choice.strips(w) * choice.phases * choice.groups(build.kh) * -(-build.c // config.BLOCK_C)
    step, h = 2 if choice.pairs else 1, -(-h // choice.dilation[0])
    if choice.stride != (1, 1):  # one step more for each row of sums that is not complete
        h, half = h + -(-build.kh // choice.stride[0]) - 1, 0
    programs = []
    for first in range(0, h, options.rows or h):
        last = min(first + (options.rows or h), h)
        if "images" in build.loops:
            programs.append(Programs(columns, (options.images, -(-(last - first) // step))))
        else:
            above = -(-half // step) * step
            rows_of_x = min(last + half, h) - max(first - above, 0)
            programs.append(Programs(columns * options.images, (-(-rows_of_x // step),)))
    return programs


FAMILIES = {"depthwise": Family(kernels, depthwise_builds, depthwise_maps, depthwise_programs)}


# Limits: (what, is it kept?, why). A row is what `report` makes of a kernel on a map.

COMMON_LIMITS = (
    (
        "no spill in a loop",
        lambda row, options: row["spill_in_loops"] == 0,
        "a spilled register costs a store and a load in every trip, through the cache that the maps need",
    ),
    (
        f"registers × threads ≤ {REGISTERS}",
        lambda row, options: row["registers"] * 32 * row["warps"] <= REGISTERS,
        "no multiprocessor has more: the launch fails",
    ),
    (
        "shared memory within the architecture's",
        lambda row, options: row["shared"] <= 1024 * SHARED_KB[row["arch"]],
        "the launch fails",
    ),
    ("no atomics", lambda row, options: not row["atomics"], "sums in another order on every run are other bits"),
)
LIMITS = (
    *COMMON_LIMITS,
    (
        "the loops of the source",
        lambda row, options: row["loops_as_expected"],
        "a loop that is missing or doubled means that slots are counted wrong, or that the kernel does nothing",
    ),
    (
        "30 s to compile",
        lambda row, options: row["compile_seconds"] <= 30 * options.slow,
        "the first step of a training is to take less than that",
    ),
    (
        "10 s to compile 7×7",
        lambda row, options: row["K"] != "7" or row["compile_seconds"] <= 10 * options.slow,
        "the size that everybody uses: half a dozen kernels before the first step",
    ),
)

# Issue slots per output of 7×7 in bf16 on sm_90, at most: (kernels, widths, limit, limit with a residual). Memory alone
# takes as long as 39 slots, and 38.5 products are the fewest; kernels at 50 and 56 slots are known, and what is above
# is a step back. Of a residual, each value is loaded, made fp32 and added.
SLOTS = (("_depthwise_fwd_", (56, 28, 14, 7), 54, 59), ("_depthwise_bwd_weight_", (56, 28), 60, None))


def broken(row: dict, options: Options) -> list[str]:
    """The limits that a row of a kernel that compiled breaks."""
    names = [name for name, kept, _ in LIMITS if not kept(row, options)]
    counted = (row["arch"], row["dtype"], row["K"], row["strict"], row["plain"]) == (90, "bf16", "7", False, True)
    if counted and row["C"] % config.BLOCK_C == 0 and (options.rows, options.images) == (None, 1):
        for prefix, widths, alone, with_residual in SLOTS:
            slots, limit = row["slots_per_output"], with_residual if row["residual"] else alone
            if row["kernel"].startswith(prefix) and row["W"] in widths and not (slots and slots <= limit):
                names.append(f"{limit} slots per output at {row['H']}×{row['W']}")
    return names


# The report


def report(build: Build, arch: int, options: Options) -> list[dict]:
    """Compiles a build: a row for each map that it is picked for, or a single one without a map."""
    common = _of_build(build, arch)
    try:
        common |= _of_kernel(build, compiled := cubin.compile_for(build.source, arch, dict(build.options)))
    except Exception as error:  # whatever compilers and drivers of compilers raise
        return [failed(build, arch, f"{type(error).__name__}: {error}")]
    rows = []
    for h, w, strict in FAMILIES[build.family].maps(build, options) or [(None, None, False)]:
        row = common | {"H": h, "W": w, "strict": strict} | _of_map(build, compiled.program, arch, h, w, options)
        rows.append(row | {"broken": broken(row, options)})
    return rows


def failed(build: Build, arch: int, error: str) -> dict:
    """The row of a build that could not be compiled or read."""
    return _of_build(build, arch) | {"error": error, "broken": ["compiles"]}


def _of_build(build: Build, arch: int) -> dict:
    types = dict(build.types)
    return {
        "family": build.family, "kernel": build.kernel, "arch": arch, "dtype": build.dtype,
        "parameters": types.get("weight_ptr", types.get("dw_ptr", "")).strip("*") or None,
        "residual": build.residual,
        "K": str(build.kh) if build.kh == build.kw else f"{build.kh}x{build.kw}", "KH": build.kh, "KW": build.kw,
        "C": build.c, "edge": build.choice and build.choice.edge, "block_w": build.choice and build.choice.block_w,
        "plain": build.choice is None or build.choice.stride == build.choice.dilation == (1, 1),
        "warps": build.warps, "H": None, "W": None, "strict": False, "triton": triton.__version__,
    }  # fmt: skip


def _of_kernel(build: Build, compiled: cubin.Compiled) -> dict:
    program = compiled.program
    in_loops = frozenset().union(*(loop.blocks for loop in program.loops))
    depths = [loop.depth for loop in program.loops]
    return {
        "registers": compiled.registers,
        "spill": sum(i.spills for i in program.instructions),
        "spill_in_loops": sum(i.spills for block in in_loops for i in program.blocks[block]),
        "stack": compiled.stack,
        "shared": compiled.shared,
        "compile_seconds": round(compiled.seconds, 2),
        "instructions": len(program.instructions),
        "atomics": compiled.atomics,
        "loop_depths": depths,
        "loops_as_expected": build.loops is None or depths == list(range(len(build.loops))),
    }


def _of_map(build: Build, program: cubin.Program, arch: int, h: int | None, w: int | None, options: Options) -> dict:
    """What a kernel costs on one map; None where there is no map, or where the loops are not those expected."""
    nothing = dict.fromkeys(
        ("slots_per_output", "ps_per_output", "floor_fraction", "rows_per_program", "images_per_program", "loops")
    )
    if h is None or [loop.depth for loop in program.loops] != list(range(len(build.loops))):
        return nothing
    groups = FAMILIES[build.family].programs(build, h, w, options)
    outputs = h * w * build.c * options.images
    lanes = 32 * build.warps
    slots = sum(group.count * program.slots(lambda loop, t=group.trips: t[loop.depth]) for group in groups) * lanes
    loops = []
    for loop, name in zip(program.loops, build.loops, strict=True):
        body = program.body(loop)
        times = sum(group.count * math.prod(group.trips[: loop.depth + 1]) for group in groups) * lanes / outputs
        loops.append({
            "name": name,
            "instructions": len(body),
            "spills": sum(i.spills for i in body),
            "products": round(sum(i.is_product for i in body) / len(body), 3),
            "slots_per_output": round(len(body) * times, 2),
            "pipes": {p: round(n * times, 2) for p, n in sorted(cubin.pipe_cycles(body, arch).items())},
        })  # fmt: skip
    ps = slots / outputs / H100_SLOTS_PER_PS
    on_h100 = arch == 90
    return {
        "slots_per_output": round(slots / outputs, 2),
        "ps_per_output": round(ps, 3) if on_h100 else None,
        "floor_fraction": round(build.bytes_per_output / COPY_BYTES_PER_PS / ps, 3) if on_h100 else None,
        "rows_per_program": options.rows or h,
        "images_per_program": options.images,
        "loops": loops,
    }


def text(rows: list[dict]) -> str:
    """The rows of one kernel, for people to read."""
    row = rows[0]
    strip = f", {row['edge']} {row['block_w']}" if row["edge"] else ""
    more = "".join(f", {name} {row[name]}" for name in ("parameters", "residual") if row[name])
    lines = [f"sm_{row['arch']} {row['dtype']} {row['K']} C={row['C']} {row['kernel']}{strip}{more}:"]
    if "error" in row:
        lines.append(f"    {row['error'].splitlines()[0]} … {row['error'].splitlines()[-1]}")
    else:
        lines[0] += (
            f" {row['registers']} registers, {row['spill']} spills ({row['spill_in_loops']} in loops), stack "
            f"{row['stack']}, shared {row['shared']}, {row['compile_seconds']:.1f} s"
        )
    for loop in row.get("loops") or ():
        pipes = ", ".join(f"{pipe} {cycles:.1f}" for pipe, cycles in loop["pipes"].items())
        lines.append(
            f"    loop over {loop['name']}: {loop['instructions']} instructions, {loop['spills']} of them "
            f"spills, {loop['products']:.0%} FMA or MMA; "
            f"at {row['H']}×{row['W']}, per output: {loop['slots_per_output']:.1f} slots; cycles: {pipes}"
        )
    for row in rows:
        if row.get("slots_per_output"):
            line = f"    {row['H']}×{row['W']}{' strict' if row['strict'] else ''}: {row['slots_per_output']:.1f} slots"
            if row["ps_per_output"]:
                line += f", {row['ps_per_output']:.2f} ps, {row['floor_fraction']:.0%} of the memory floor"
            lines.append(line)
    lines += [f"    BROKEN: {name}" for name in dict.fromkeys(name for row in rows for name in row["broken"])]
    return "\n".join(lines)


def jobs(archs, dtypes, kernel_sizes, channels) -> list[tuple[Build, int]]:
    """(build, architecture) of everything to compile."""
    builds: dict[Build, Build] = {}
    for dtype, (kh, kw), c in itertools.product(dtypes, kernel_sizes, channels):
        for family in FAMILIES.values():
            for build in family.builds(dtype, kh, kw, c):
                builds.setdefault(replace(build, c=0), build)  # once where the number of channels is no constant
    return [(build, arch) for arch in archs for build in builds.values()]


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET=1 is set: kernels are interpreted, and there is no machine code to read. Unset it.")
        return 2
    options = Options(arguments.map, arguments.rows, arguments.images, arguments.slow)
    todo = jobs(arguments.arch, arguments.dtype, arguments.kernel_size, arguments.channels)
    reasons = {name: reason for name, _, reason in LIMITS}
    rows, failures = [], []
    for found in run(todo, options, arguments.jobs, report, failed):
        rows += found
        lines = text(found)
        print(lines, flush=True)
        for name in dict.fromkeys(name for row in found for name in row["broken"]):
            why = f" ({reasons[name]})" if name in reasons else ""
            failures.append(f"BROKEN {lines.split(':')[0]}: {name}{why}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(todo)} kernels compiled with Triton {triton.__version__}, {len(failures)} limits broken")
    print("\n".join(failures))
    if not rows:
        print("No kernel was found.")
    return 1 if failures or not rows else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    def size(value: str) -> tuple[int, int]:
        numbers = [int(number) for number in value.replace("×", "x").split("x")]
        if len(numbers) > 2 or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{value!r} is no size: 7 or 3x7")
        return (numbers * 2)[0], (numbers * 2)[1]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--all", action="store_true", help="all architectures, sizes of kernels and numbers of channels"
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_KB), help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", choices=config.DTYPES, default=config.DTYPES)
    parser.add_argument("--kernel-size", type=size, nargs="+", metavar="K", help="7, 3x7")
    parser.add_argument("--channels", type=int, nargs="+", metavar="C")
    parser.add_argument("--map", type=size, nargs="+", default=MAPS, metavar="HxW", help="56, 14x7")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of a map that one program takes (default: all)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images that one program takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="kernels that are compiled at the same time")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="on a busy machine: seconds × FACTOR")
    arguments = parser.parse_args(argv)
    every = arguments.all
    arguments.arch = arguments.arch or (ALL_ARCHS if every else ARCHS)
    arguments.kernel_size = arguments.kernel_size or (ALL_KERNEL_SIZES if every else KERNEL_SIZES)
    arguments.channels = arguments.channels or (ALL_CHANNELS if every else CHANNELS)
    arguments.map = tuple(arguments.map)
    for kh, kw in arguments.kernel_size:
        reason = config.why_not("bf16", kh, kw, (1, 1), (kh // 2, kw // 2), (1, 1))
        if reason is not None:
            parser.error(f"--kernel-size: {reason}")
    for name in ("images", "jobs", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; at least 1")
    if arguments.rows is not None and arguments.rows % 2:
        parser.error(f"--rows is {arguments.rows}; kernels take an even number of rows")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
