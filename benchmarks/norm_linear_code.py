"""What the compiled kernels of layer norm + linear cost, read from their machine code: no GPU needed.

``python -m benchmarks.norm_linear_code [--all]``

For every kernel that a forward and a backward pass launch: registers, spills, shared memory, how many programs a
multiprocessor holds, seconds to compile, and of each loop the products of matrices and the waits for them. Exits with 1
where a limit of :data:`LIMITS` is broken.

wgmma, the tensor cores' instruction of sm_90, runs beside the program, which waits before it reads the sums. A step,
BLOCK_K products of each sum, is several instructions and has to wait once. Where ptxas cannot tell their operands apart
it waits after each of them, and the tensor cores idle.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks import cubin, machine_code
from benchmarks.launches import Launch, captured
from benchmarks.machine_code import ALL_ARCHS, ARCHS, COMMON_LIMITS, Options
from dwconv_kernels.devices import REGISTERS, SHARED_KB
from dwconv_kernels.dtypes import NAMES
from dwconv_kernels.norm_linear import config, kernels, launch

DTYPES = {name: dtype for dtype, name in NAMES.items()}
CHANNELS = (96, 192, 384)
# The widths of ConvNeXt, and odd ones: rows that are not aligned, one channel.
ALL_CHANNELS = (1, 40, 96, 97, 128, 160, 192, 255, 256, 320, 384, 512, 768, 1023, 1024, 1536, 2048)
# The design's 20 seconds are for any kernel of this family.
SECONDS = 20


class Call(NamedTuple):
    """A layer norm with a linear layer of ``d`` outputs, of so many rows that the machine is full, or of few."""

    dtype: str
    c: int
    d: int
    gelu: bool = True
    few: bool = False
    tf32: bool = False
    x_dtype: str | None = None  # where it differs, as under autocast
    gap: int = 0  # between two rows of x

    def __str__(self) -> str:
        words = [self.dtype, f"C={self.c} D={self.d}", "GELU" if self.gelu else "", "few rows" if self.few else ""]
        return " ".join(
            filter(None, [*words, "TF32" * self.tf32, self.x_dtype and f"of {self.x_dtype}", "gaps" * bool(self.gap)])
        )


@dataclass(frozen=True)
class Build:
    """One kernel, as a call launches it."""

    call: Call
    launch: Launch

    @property
    def constants(self) -> dict[str, object]:
        """Its constexpr arguments, by name."""
        names = [p.name for p in getattr(kernels, self.launch.kernel).params]
        return {names[where[0]]: value for where, value in self.launch.constants.items()}


def launches(call: Call, arch: int, rows: int = 128 * 170) -> list[Launch]:
    """Every kernel of a forward and a backward pass, once; 170 multiprocessors are the most that any GPU has."""
    rows = 64 if call.few else rows
    dtype, x_dtype = DTYPES[call.dtype], DTYPES[call.x_dtype or call.dtype]
    x, dy = torch.empty(rows, call.c + call.gap, dtype=x_dtype)[:, : call.c], torch.empty(rows, call.d, dtype=dtype)
    norm = [torch.empty(call.c, dtype=x_dtype) for _ in range(2)]
    linear = [torch.empty(call.d, call.c, dtype=dtype), torch.empty(call.d, dtype=dtype)]
    activation = "gelu" if call.gelu else None
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = call.tf32
    try:
        with captured(arch) as seen:
            _, mean, rstd = launch.norm_linear_forward(x, *norm, *linear, 1e-6, activation, dtype)
            launch.norm_linear_backward(dy, x, mean, rstd, *norm, *linear, activation, (True,) * 5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return [one for at, one in enumerate(seen) if one not in seen[:at]]


def calls(dtypes, channels, everything: bool) -> Iterator[Call]:
    """ConvNeXt's, four times as wide inside; with ``everything``, of few rows, without GELU, in TF32 and mixed."""
    for dtype in dtypes:
        for c in channels:
            yield Call(dtype, c, 4 * c)
            if everything:
                yield Call(dtype, c, 4 * c, few=True)
                yield Call(dtype, c, 2 * c + 1, gelu=False)
                yield Call(dtype, c, 4 * c, gap=8)  # rows that Triton does not see to be aligned
                yield Call(dtype, c, 4 * c, gap=-c % 16 + 16)
                yield Call(dtype, c, 4 * c, tf32=True) if dtype == "fp32" else Call(dtype, c, 4 * c, x_dtype="fp32")


def jobs(archs, dtypes, channels, everything: bool) -> list[tuple[Build, int]]:
    """(build, architecture) of everything to compile, each once."""
    found, seen = [], []
    for arch in archs:
        for call in calls(dtypes, channels, everything):
            for one in launches(call, arch):
                if (one, arch) not in seen:
                    seen.append((one, arch))
                    found.append((Build(call, one), arch))
    return found


def _is_wgmma(row: dict) -> bool:
    return row["tile"] != [0, 0] and row["arch"] == 90 and (row["dtype"] != "fp32" or row["tf32"])


def _waits_once(row: dict) -> bool:
    """In every loop, and once more after the last one; two products that are chained are two steps."""
    return row["waits"] <= row["steps"] + 1 and all(loop["waits"] <= loop["steps"] for loop in row["loops"])


LIMITS = (
    *COMMON_LIMITS,
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
        "two programs a multiprocessor for tiles of 128×128",
        lambda row, options: not (_is_wgmma(row) and row["tile"] == [128, 128]) or row["programs"] >= 2,
        "one multiplies while the other loads, or is at its GELU",
    ),
    (
        f"{SECONDS} s to compile",
        lambda row, options: row["compile_seconds"] <= SECONDS * options.slow,
        "half a dozen kernels before the first step",
    ),
)


def report(build: Build, arch: int, options: Options) -> list[dict]:
    """Compiles a build: one row."""
    one = build.launch
    kernel = getattr(kernels, one.kernel)
    source = cubin.ASTSource(fn=kernel, signature=one.signature, constexprs=one.constants, attrs=one.attributes)
    chosen = {name: one.options[name] for name in ("num_warps", "num_stages", "maxnreg")}
    try:
        compiled = cubin.compile_for(source, arch, chosen)
        row = _of_build(build, arch) | _of_kernel(build, compiled, arch)
    except Exception as error:  # whatever compilers and drivers of compilers raise
        return [failed(build, arch, f"{type(error).__name__}: {error}")]
    return [row | {"broken": [name for name, kept, _ in LIMITS if not kept(row, options)]}]


def failed(build: Build, arch: int, error: str) -> dict:
    """The row of a build that could not be compiled or read."""
    return _of_build(build, arch) | {"error": error, "broken": ["compiles"]}


def _of_build(build: Build, arch: int) -> dict:
    call, constants = build.call, build.constants
    blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_") or name in ("C0", "C1")}
    return {
        "family": "norm_linear", "kernel": build.launch.kernel, "arch": arch, "dtype": call.dtype, "C": call.c,
        "D": call.d, "gelu": call.gelu, "few": call.few, "tf32": call.tf32, "x_dtype": call.x_dtype or call.dtype,
        "blocks": blocks, "tile": list(_sizes(build)[:2]), "aligned": len(build.launch.attributes),
        "warps": build.launch.options["num_warps"], "stages": build.launch.options["num_stages"],
        "triton": triton.__version__,
    }  # fmt: skip


def _sizes(build: Build) -> tuple[int, int, int]:
    """(sums down, sums across, products) of one step; of both steps where a row is in two tiles. 0 without products."""
    b = build.constants
    match build.launch.kernel:
        case "_norm_linear_fwd_kernel":
            return b["BLOCK_P"], b["BLOCK_D"], b["C0"] + b["C1"]
        case "_norm_linear_product_kernel":
            return b["BLOCK_P"], b["BLOCK_D"], b["BLOCK_C"]
        case "_norm_linear_bwd_du_kernel" if b["GELU"] or b["SUMS"]:  # else it only adds up columns
            return b["BLOCK_P"], b["BLOCK_D"], b["BLOCK_C"]
        case "_norm_linear_bwd_x_kernel":
            return b["BLOCK_P"], b["BLOCK_C"], b["BLOCK_D"]
        case "_norm_linear_bwd_weight_kernel":
            return b["BLOCK_D"], b["BLOCK_C"], b["BLOCK_P"]
    return 0, 0, 0


def _counts(build: Build, instructions: list[cubin.Instruction]) -> dict[str, object]:
    """Products of matrices, waits for them, and how many steps these products are."""
    shapes = [
        re.match(r"[HQI]GMMA\.64x(\d+)x(\d+)|$", f"{i.opcode}{i.operands}".replace(" ", "")) for i in instructions
    ]
    wgmma = [int(shape[1]) * int(shape[2]) for shape in shapes if shape and shape[1]]
    m, n, k = _sizes(build)
    groups = build.launch.options["num_warps"] // 4
    # Each group of four warps has its share of a step; two chained products, of a row in two tiles, are two steps.
    share = m * n * k // (64 * groups)
    two = 2 if build.constants.get("C1") else 1
    return {
        "instructions": len(instructions),
        "wgmma": len(wgmma),
        "mma": sum(i.opcode.startswith("HMMA") for i in instructions),
        "waits": sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in instructions),
        "steps": round(two * sum(wgmma) / share, 2) if share else 0,
        "spills": sum(i.spills for i in instructions),
    }


def _of_kernel(build: Build, compiled: cubin.Compiled, arch: int) -> dict:
    program = compiled.program
    in_loops = frozenset().union(*(loop.blocks for loop in program.loops))
    threads = 32 * build.launch.options["num_warps"]
    registers = -(-compiled.registers // 8) * 8
    # A program has 1 KB of shared memory more than it asked for; sm_90 has 228 KB in all.
    programs = min(REGISTERS // (registers * threads), (SHARED_KB[arch] + 1) * 1024 // (compiled.shared + 1024))
    counts = _counts(build, program.instructions)
    loops = [_counts(build, program.body(loop)) for loop in program.loops]
    return {
        "registers": compiled.registers,
        "spill": counts.pop("spills"),
        "spill_in_loops": sum(i.spills for block in in_loops for i in program.blocks[block]),
        "shared": compiled.shared,
        "programs": programs,
        "compile_seconds": round(compiled.seconds, 2),
        "atomics": compiled.atomics,
        **counts,
        "loops": loops,
    }


def text(row: dict) -> str:
    """A row, for people to read."""
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in row["blocks"].items())
    few = " few rows" * row["few"]
    lines = [f"sm_{row['arch']} {row['dtype']} C={row['C']} D={row['D']}{few} {row['kernel']} {blocks}:"]
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norm_linear_code", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all architectures, numbers of channels and kinds of calls")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_KB), help="90 for sm_90")
    parser.add_argument("--dtype", nargs="+", choices=config.DTYPES, default=config.DTYPES)
    parser.add_argument("--channels", type=int, nargs="+", metavar="C")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="kernels that are compiled at the same time")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="on a busy machine: seconds × FACTOR")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET=1 is set: kernels are interpreted, and there is no machine code to read. Unset it.")
        return 2
    archs = arguments.arch or (ALL_ARCHS if arguments.all else ARCHS)
    channels = arguments.channels or (ALL_CHANNELS if arguments.all else CHANNELS)
    todo = jobs(archs, arguments.dtype, channels, arguments.all)
    rows = []
    for (row,) in machine_code.run(todo, Options(slow=arguments.slow), arguments.jobs, report, failed):
        rows.append(row)
        print(text(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = [row for row in rows if row["broken"]]
    print(f"\n{len(rows)} kernels compiled with Triton {triton.__version__}, {len(failures)} with broken limits")
    for row in failures:
        print(f"BROKEN {text(row).splitlines()[0].split(':')[0]}: {', '.join(row['broken'])}")
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
