"""Reports on compiled kernels that are made of products of matrices: what `norm_linear_code` and `block_code` share.

wgmma, the tensor cores' instruction of sm_90, runs beside the program, which waits before it reads the sums. A step,
one ``tl.dot``, is several instructions and has to wait once. Where ptxas cannot tell their operands apart it waits
after each of them, and the tensor cores idle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import cubin
from benchmarks.compiling import run
from benchmarks.launches import Launch
from benchmarks.machine_code import ALL_ARCHS, ARCHS, COMMON_LIMITS, Options
from dwconv_kernels.block import kernels as block
from dwconv_kernels.depthwise import kernels as depthwise
from dwconv_kernels.depthwise import kernels_gluon, kernels_tables
from dwconv_kernels.devices import REGISTERS, SHARED_KB
from dwconv_kernels.dtypes import NAMES
from dwconv_kernels.norm_linear import config
from dwconv_kernels.norm_linear import kernels as norm_linear

DTYPES = {name: dtype for dtype, name in NAMES.items()}
KERNELS = {
    "_block_": (block,),
    "_norm_linear_": (norm_linear,),
    "_depthwise_": (depthwise, kernels_gluon, kernels_tables),
}
# The design's 20 seconds are for any kernel of these families.
SECONDS = 20

_WGMMA = re.compile(r"[HQI]GMMA\.64x(\d+)x(\d+)")
_MMA = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16}  # of a warp; HMMA.16816.F32.BF16
Size = tuple[int, int, int]  # of a product: sums down, sums across, products of each


def kernel_named(name: str):
    """The ``@triton.jit`` or ``@gluon.jit`` function; each family has names of its own."""
    modules = next(modules for prefix, modules in KERNELS.items() if name.startswith(prefix))
    return next(getattr(module, name) for module in modules if hasattr(module, name))


# Of a launch, what a compilation needs.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Build:
    """One kernel, as a call launches it. A call has a dtype, C and D, and a text."""

    call: NamedTuple
    launch: Launch

    @property
    def constants(self) -> dict[str, object]:
        """Its constexpr arguments, by name."""
        names = [p.name for p in kernel_named(self.launch.kernel).params]
        return {names[where[0]]: value for where, value in self.launch.constants.items()}

    @property
    def warps(self) -> int:
        return self.launch.options["num_warps"]

    def compile(self, arch: int) -> cubin.Compiled:
        one = self.launch
        source = cubin.of_language(kernel_named(one.kernel), one.signature, one.constants, one.attributes)
        return cubin.compile_for(source, arch, {name: one.options[name] for name in _OPTIONS})


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """In here, PyTorch's switch for products of fp32 is this."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def once(launches: list[Launch]) -> list[Launch]:
    """Without those that are launched again."""
    return [one for at, one in enumerate(launches) if one not in launches[:at]]


def products(kernel: str, b: dict) -> list[Size]:
    """Each ``tl.dot`` of one trip of the loop of a kernel with constants ``b``.

    The resident kernel has no loop over hidden channels: of a block of them.
    """
    match kernel:
        case "_norm_linear_fwd_kernel":
            return _chained((b["BLOCK_P"], b["BLOCK_D"]), b["C0"], b["C1"])
        case "_norm_linear_product_kernel":
            return [(b["BLOCK_P"], b["BLOCK_D"], b["BLOCK_C"])]
        case "_norm_linear_bwd_du_kernel" if b["GELU"] or b["SUMS"]:  # else it only adds up columns
            return [(b["BLOCK_P"], b["BLOCK_D"], b["BLOCK_C"])]
        case "_norm_linear_bwd_x_kernel":
            return [(b["BLOCK_P"], b["BLOCK_C"], b["BLOCK_D"])]
        case "_norm_linear_bwd_weight_kernel":
            return [(b["BLOCK_D"], b["BLOCK_C"], b["BLOCK_P"])]
        case "_block_fwd_kernel":
            return _chained((b["BLOCK_P"], b["BLOCK_D"]), b["K0"], b["K1"]) + _beside(b, b["N0"], b["N1"])
        case "_block_fwd_resident_kernel":
            return _chained((b["BLOCK_P"], b["BLOCK_D"]), b["C0"], b["C1"]) + _beside(b, b["C0"], b["C1"])
        case "_block_out_kernel":
            return [(b["BLOCK_P"], b["BLOCK_C"], b["BLOCK_D"])]
        case "_block_bwd_rows_kernel":
            return 2 * _chained((b["BLOCK_P"], b["BLOCK_D"]), b["C0"], b["C1"]) + _beside(b, b["C0"], b["C1"])
        case "_block_bwd_hidden_kernel":
            return [(b["BLOCK_P"], b["BLOCK_D"], b["BLOCK_C"])] * (1 if b["GIVEN_PRODUCT"] else 2)
    return []


def _chained(sums: tuple[int, int], *lengths: int) -> list[Size]:
    """Products into the same sums, of rows in one tile or two."""
    return [(*sums, length) for length in lengths if length]


def _beside(b: dict, *widths: int) -> list[Size]:
    """Products of hidden channels, into the sums of one tile of channels or two."""
    return [(b["BLOCK_P"], width, b["BLOCK_D"]) for width in widths if width]


def multiplied(instructions: Iterable[cubin.Instruction], warps: int) -> int:
    """Products of numbers that a program's tensor cores make, where each of its warps gets these instructions."""
    total = 0
    for i in instructions:
        wgmma, mma = _WGMMA.match(f"{i.opcode}{i.operands}".replace(" ", "")), i.opcode.split(".")
        if wgmma:  # of four warps
            total += 64 * int(wgmma[1]) * int(wgmma[2]) * warps // 4
        elif mma[0] == "HMMA":
            total += _MMA.get(mma[1], 0) * warps
    return total


# Limits, as in machine_code.


def _on_tensor_cores(row: dict) -> bool:
    return row["dots"] > 0 and (row["dtype"] != "fp32" or row["tf32"])


def _is_wgmma(row: dict) -> bool:
    return _on_tensor_cores(row) and row["arch"] == 90


def _waits_once(row: dict) -> bool:
    """In every loop, and once more after the last one; two products that are chained are two steps."""
    return row["waits"] <= row["steps"] + 1 and all(loop["waits"] <= loop["steps"] for loop in row["loops"])


def _main_loop(row: dict) -> dict:
    """The loop with the most products; all there is where loops are unrolled."""
    return max(row["loops"], key=lambda loop: loop["steps"], default=row)


def _multiplies(row: dict) -> bool:
    """Are as many products of numbers made there as a trip of the source's loop makes? Of tensor memory, unknown."""
    return row["arch"] in (100, 103) or max(_main_loop(row)["steps"], 0) >= row["dots"]


def _is_128_by_128(row: dict) -> bool:
    return _is_wgmma(row) and row["dots"] == 1 and row["tile"] == [128, 128]


def _runs_ahead(row: dict) -> bool:
    return _is_wgmma(row) and row["kernel"] == "_block_fwd_kernel"


LIMITS = (
    *COMMON_LIMITS,
    (
        "every product on tensor cores",
        lambda row, options: not _on_tensor_cores(row) or _multiplies(row),
        "FMA units have a sixteenth of their rate",
    ),
    (
        "wgmma in every product",
        lambda row, options: not _is_wgmma(row) or (row["wgmma"] > 0 and row["mma"] == 0),
        "mma.sync has half of the tensor cores' rate on sm_90",
    ),
    (
        "one wait a step",
        lambda row, options: not _is_wgmma(row) or _waits_once(row),
        "the tensor cores idle while a program waits",
    ),
    (
        "one wait a block of hidden channels",
        lambda row, options: not _runs_ahead(row) or _main_loop(row)["waits"] == 1,
        "u of the next block is multiplied while GELU of this one is computed, or nothing is",
    ),
    (
        "two programs a multiprocessor for tiles of 128×128",
        lambda row, options: not _is_128_by_128(row) or row["programs"] >= 2,
        "one multiplies while the other loads, or is at its GELU",
    ),
    (
        f"{SECONDS} s to compile",
        lambda row, options: row["compile_seconds"] <= SECONDS * options.slow,
        "half a dozen kernels before the first step",
    ),
)


# Rows


def report(build: Build, arch: int, options: Options) -> list[dict]:
    """Compiles a build: one row."""
    try:
        row = _of_build(build, arch) | _of_kernel(build, build.compile(arch), arch)
    except Exception as error:  # whatever compilers and drivers of compilers raise
        return [failed(build, arch, f"{type(error).__name__}: {error}")]
    return [row | {"broken": [name for name, kept, _ in LIMITS if not kept(row, options)]}]


def failed(build: Build, arch: int, error: str) -> dict:
    """The row of a build that could not be compiled or read."""
    return _of_build(build, arch) | {"error": error, "broken": ["compiles"]}


def _of_build(build: Build, arch: int) -> dict:
    call, constants = build.call, build.constants
    blocks = {n: v for n, v in constants.items() if n.startswith("BLOCK_") or n in ("C0", "C1", "K0", "K1", "N0", "N1")}
    of_call = {name: value for name, value in call._asdict().items() if name not in ("c", "d")}
    dots = products(build.launch.kernel, constants)
    return {
        **of_call, "case": str(call), "kernel": build.launch.kernel, "arch": arch, "C": call.c, "D": call.d,
        "x_dtype": call.x_dtype or call.dtype, "blocks": blocks, "dots": len(dots),
        "tile": list(dots[0][:2]) if dots else [0, 0], "aligned": len(build.launch.attributes), "warps": build.warps,
        "stages": build.launch.options["num_stages"], "triton": triton.__version__,
    }  # fmt: skip


def _counts(build: Build, instructions: list[cubin.Instruction]) -> dict[str, object]:
    """Products of matrices, waits for them, and how many steps these products are."""
    dots = products(build.launch.kernel, build.constants)
    work = sum(math.prod(size) for size in dots)
    return {
        "instructions": len(instructions),
        "wgmma": sum(_WGMMA.match(f"{i.opcode}{i.operands}".replace(" ", "")) is not None for i in instructions),
        "mma": sum(i.opcode.startswith("HMMA") for i in instructions),
        "waits": sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in instructions),
        "steps": round(len(dots) * multiplied(instructions, build.warps) / work, 2) if work else 0,
        "spills": sum(i.spills for i in instructions),
    }


def _of_kernel(build: Build, compiled: cubin.Compiled, arch: int) -> dict:
    program = compiled.program
    in_loops = frozenset().union(*(loop.blocks for loop in program.loops))
    registers = -(-compiled.registers // 8) * 8
    # A program has 1 KB of shared memory more than it asked for; sm_90 has 228 KB in all.
    room = (SHARED_KB[arch] + 1) * 1024 // (compiled.shared + 1024)
    counts = _counts(build, program.instructions)
    return {
        "registers": compiled.registers,
        "spill": counts.pop("spills"),
        "spill_in_loops": sum(i.spills for block in in_loops for i in program.blocks[block]),
        "shared": compiled.shared,
        "programs": min(REGISTERS // (registers * 32 * build.warps), room),
        "compile_seconds": round(compiled.seconds, 2),
        "atomics": compiled.atomics,
        **counts,
        "loops": [_counts(build, program.body(loop)) for loop in program.loops],
    }


def text(row: dict) -> str:
    """A row, for people to read."""
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in row["blocks"].items())
    lines = [f"sm_{row['arch']} {row['case']} {row['kernel']} {blocks}:"]
    if "error" in row:
        lines.append(f"    {row['error'].splitlines()[0]} … {row['error'].splitlines()[-1]}")
    else:
        lines[0] += (
            f" {row['warps']} warps, {row['registers']} registers, {row['spill']} spills ({row['spill_in_loops']} in "
            f"loops), shared {row['shared'] / 1024:.0f} KB, {row['programs']} programs, {row['compile_seconds']:.1f} s"
        )
        if row["wgmma"] or row["mma"]:
            lines.append(
                f"    {row['wgmma'] or row['mma']} products, {row['waits']} waits in {row['steps']:g} steps, "
                f"{row['instructions']} instructions; in loops: "
                + (", ".join(
                    f"{loop['wgmma'] or loop['mma']} products, {loop['waits']} waits in {loop['steps']:g} steps, "
                    f"{loop['instructions']} instructions" for loop in row["loops"] if loop["wgmma"] or loop["mma"]
                ) or "none, they are unrolled")
            )  # fmt: skip
    lines += [f"    BROKEN: {name}" for name in row["broken"]]
    return "\n".join(lines)


# The command


class Family(NamedTuple):
    """What a report is about: the calls of an operator, and what each of them launches."""

    launches: Callable[[NamedTuple, int], list[Launch]]
    calls: Callable[[Iterable[str], Iterable[int], bool], Iterator[NamedTuple]]
    channels: tuple[int, ...]
    all_channels: tuple[int, ...]


def jobs(family: Family, archs, dtypes, channels, everything: bool) -> list[tuple[Build, int]]:
    """(build, architecture) of everything to compile, each once."""
    found, seen = [], set()
    for arch in archs:
        for call in family.calls(dtypes, channels, everything):
            for one in family.launches(call, arch):
                if (key := (arch, repr(one))) not in seen:
                    seen.add(key)
                    found.append((Build(call, one), arch))
    return found


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """Of the command ``python -m benchmarks.<name>``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all architectures, numbers of channels and kinds of calls")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_KB), help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", choices=config.DTYPES, default=config.DTYPES)
    parser.add_argument("--channels", type=int, nargs="+", metavar="C")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="kernels that are compiled at the same time")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="on a busy machine: seconds × FACTOR")
    return parser


def interpreted() -> bool:
    """Says so where kernels are interpreted, and nothing can be compiled."""
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET=1 is set: kernels are interpreted, and there is no machine code to read. Unset it.")
    return bool(triton.knobs.runtime.interpret)


def command(family: Family, arguments: argparse.Namespace) -> int:
    """Compiles what the arguments ask for and prints it; 1 where a limit is broken."""
    if interpreted():
        return 2
    archs = arguments.arch or (ALL_ARCHS if arguments.all else ARCHS)
    channels = arguments.channels or (family.all_channels if arguments.all else family.channels)
    todo = jobs(family, archs, arguments.dtype, channels, arguments.all)
    rows = []
    for (row,) in run(todo, Options(slow=arguments.slow), arguments.jobs, report, failed):
        rows.append(row)
        print(text(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = [row for row in rows if row["broken"]]
    print(f"\n{len(rows)} kernels compiled with Triton {triton.__version__}, {len(failures)} with broken limits")
    for row in failures:
        print(f"BROKEN {text(row).splitlines()[0].split(':')[0]}: {', '.join(row['broken'])}")
    return 1 if failures or not rows else 0
