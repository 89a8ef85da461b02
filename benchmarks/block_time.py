"""How long ConvNeXt-T takes on an H100 according to its compiled kernels: a model, not a measurement.

``python -m benchmarks.block_code --time [--readme]``: inference and a training step of bf16 parameters at 224², in
batches of 256, per image, without drop path. Each kernel is launched by the package's own launchers, caught before it
runs, and compiled for sm_90. Of each launch:

- tensor: the products in the machine code, those with zeros too, at 600 TFLOP/s (``wgmma``, 2 FLOPs a product).
- issue: instructions on the longest way through the machine code, loops as often as they are run, times the lanes of
  all programs, at 29 568 a nanosecond (132 multiprocessors × 4 schedulers × 32 lanes at 1.75 GHz).
- HBM: its tensors, each read or written once, at 3.0 TB/s. Nothing stays in L2 from one launch to the next.
- L2: the weights, which every program reads anew, at 5.5 TB/s. What programs read of maps is not counted twice, though
  two blocks of columns read the same rows; above the tables is also the sum with that.

Where the four overlap, a launch takes as long as the longest; where nothing runs under a product, tensor + issue may be
the longest. In between lies what an H100 does, if the rates are right; of the four only HBM's was measured on one. Left
out: gaps between launches, the last wave of programs that does not fill the machine, latency.

PyTorch runs the rest: the stem, downsampling, the last norm and the optimizer (fused AdamW) are counted as operators
that each read and write their maps once at 3.0 TB/s, or multiply at 600 TFLOP/s. Vectors and the head are left out.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

import convnext_fast
from benchmarks import block_code, cubin, gelu, products
from benchmarks.compiling import run
from benchmarks.launches import Launch, captured
from benchmarks.products import Build

# Per nanosecond: the constants of the design's model of the tail.
FLOPS = 600e3
SLOTS = 29_568
HBM_BYTES = 3000
L2_BYTES = 5500
ARCH = 90
BATCH = 256
STAGES = ((96, 56, 3), (192, 28, 3), (384, 14, 9), (768, 7, 3))  # channels, side of the map, blocks
BARS = {"forward": 30, "training": 95}  # µs per image, the design's
SMALL, OTHERS = 0.1, "others"  # µs per image: what is below shares a line

README = Path(__file__).parents[1] / "dwconv_kernels" / "block" / "README.md"
BEGIN, END = "<!-- time:begin -->\n", "<!-- time:end -->"


class Launched(NamedTuple):
    """A launch: its kernel, how many programs, its numbers by name, and the bytes of its tensors."""

    launch: Launch
    programs: int
    numbers: dict[str, int]
    bytes: int


# Pointers that only tell a dtype.
_UNREAD = {"_depthwise_taps_kernel": {"x_ptr"}}


@contextlib.contextmanager
def recorded(arch: int = ARCH) -> Iterator[list[Launched]]:
    """As ``captured``, with what a launch is given."""
    found: list[Launched] = []
    launch = JITFunction.run

    def recording(self, *args, grid, warmup, **kwargs):
        result = launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        names = inspect.signature(self.fn).parameters
        given = dict(zip(names, args, strict=False)) | {name: v for name, v in kwargs.items() if name in names}
        tensors = {
            value.data_ptr(): value.numel() * value.itemsize
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and name not in _UNREAD.get(self.__name__, ())
        }
        numbers = {name: value for name, value in given.items() if isinstance(value, int)}
        found.append(Launched(seen[-1], math.prod(grid), numbers, sum(tensors.values())))
        return result

    with captured(arch) as seen, mock.patch.object(JITFunction, "run", recording):
        yield found


# What a launch does.


def trips(kernel: str, v: dict[str, int]) -> tuple[float, ...]:
    """How often each loop of a kernel's source is run, outermost first; of numbers ``v``, constants and arguments.

    Of the tensor-core kernels on average, as programs differ: in rows beside the map there is nothing to do.
    """

    def blocks(size: str, block: str) -> int:
        return -(-v[size] // v[block])

    match kernel:
        case "_block_fwd_kernel" | "_block_out_kernel" | "_block_bwd_rows_kernel":
            return (blocks("D", "BLOCK_D"),)
        case "_block_fwd_resident_kernel":
            return (-(-blocks("P", "BLOCK_P") // v["programs"]),)
        case "_block_bwd_hidden_kernel" | "_norm_linear_product_kernel" | "_norm_linear_bwd_du_kernel":
            return (blocks("C", "BLOCK_C"),)
        case "_norm_linear_bwd_x_kernel":
            return (blocks("D", "BLOCK_D"),) if v["WHOLE_ROWS"] else (blocks("D", "BLOCK_D"), v["sum_blocks"])
        case "_norm_linear_bwd_weight_kernel" | "_block_bwd_gradient_kernel":
            return (blocks("rows", "BLOCK_P"),)
        case "_norm_linear_vectors_kernel":
            return (blocks("C", "BLOCK_C"),)
        case "_norm_linear_column_sum_kernel":
            return (blocks("group", "BLOCK_P"),)
        case "_norm_linear_finish_kernel":
            return blocks("row_blocks", "BLOCK_P"), -(-v["parts"] // 8)
        case "_norm_linear_norm_sum_kernel":
            return (blocks("parts", "BLOCK_P"),) * 2
        case "_block_bwd_finish_kernel":
            return (-(-v["parts"] // 8),)
        case "_block_bwd_scale_sum_kernel":
            return blocks("sum_parts", "BLOCK_P"), blocks("scale_parts", "BLOCK_P")
        case "_depthwise_fwd_pairs_kernel" | "_depthwise_fwd_kernel":
            rows = min(v["rows"] + v["KH"] - 1, v["H"])
            return (-(-rows // 2) if "pairs" in kernel else rows,)
        case "_depthwise_bwd_weight_pairs_kernel" | "_depthwise_bwd_weight_kernel":
            rows = min(v["rows"], v["H"])
            return v["images"], -(-rows // 2) if "pairs" in kernel else rows
        case "_depthwise_sum_kernel":
            return (blocks("count", "BLOCK_P"),)
        case "_depthwise_fwd_stream_kernel":
            return _on_average(v["tiles"], v["tiles_per_program"]), _steps(v, _forward_end)
        case "_depthwise_bwd_weight_stream_kernel":
            return _on_average(v["tiles"] * blocks("OH", "rows"), v["jobs_per_program"]), _steps(v, _weight_end)
        case "_depthwise_fwd_large_kernel":
            return _large_trips(v)
    return ()


def _on_average(jobs: int, several: int) -> float:
    return jobs / -(-jobs // several)


def _steps(v: dict[str, int], range_of: Callable[[dict[str, int], int, int], tuple[int, int]]) -> float:
    """Trips of the stream kernels' loop over patch rows of the inputs, of programs from row ``first`` on."""
    at_once = 2 * v["PIXELS"] // v["J"]
    ranges = [range_of(v, first, min(first + v["rows"], v["OH"])) for first in range(0, v["OH"], v["rows"])]
    return sum(-(-(end - begin) // at_once) for begin, end in ranges) / len(ranges)


def _forward_end(v: dict[str, int], first: int, last: int) -> tuple[int, int]:
    return max(v["padding_h"] - first, 0) // v["R"], -(-(last - first) // v["R"]) + v["GROUPS"] - 1


def _weight_end(v: dict[str, int], first: int, last: int) -> tuple[int, int]:
    outputs = -(-(last - first) // v["R"])
    inputs = -(-(v["H"] - first + v["padding_h"]) // v["R"])
    return 0, min(outputs + v["GROUPS"] - 1, max(inputs, outputs))


def _large_trips(v: dict[str, int]) -> tuple[float, ...]:
    """``pairs`` for each chunk of rows, times the share of programs in which it is in the map."""
    firsts = range(0, -(-v["OH"] // v["R"]), v["PATCH_ROWS"])
    found = []
    for chunk in range(-(-(v["PATCH_ROWS"] + v["GROUPS"] - 1) // v["CHUNK"])):
        tops = [first - v["shift_h"] + chunk * v["CHUNK"] for first in firsts]
        found.append(v["pairs"] * sum(-v["CHUNK"] < top < v["HB"] for top in tops) / len(tops))
    return tuple(found)


def weights(kernel: str, v: dict[str, int], itemsize: int = 2) -> int:
    """Bytes of weights that each program reads."""
    match kernel:
        case "_block_fwd_kernel":
            return (2 * v["D"] + v["BLOCK_D"]) * v["C"] * itemsize  # u runs ahead of the last block, too
        case "_block_fwd_resident_kernel" | "_block_bwd_rows_kernel":
            return 2 * v["D"] * v["C"] * itemsize
        case "_block_bwd_hidden_kernel":
            return (1 if v["GIVEN_PRODUCT"] else 2) * v["C"] * v["BLOCK_D"] * itemsize
        case "_norm_linear_product_kernel" | "_norm_linear_bwd_du_kernel":
            return v["C"] * v["BLOCK_D"] * itemsize
        case "_block_out_kernel" | "_norm_linear_bwd_x_kernel":
            return v["D"] * v["BLOCK_C"] * itemsize
    return 0


def operands(kernel: str, v: dict[str, int], itemsize: int = 2) -> int:
    """Bytes of rows that each program multiplies."""
    match kernel:
        case "_block_bwd_hidden_kernel":
            return (1 if v["GIVEN_PRODUCT"] else 2) * v["C"] * v["BLOCK_P"] * itemsize
        case "_norm_linear_product_kernel" | "_norm_linear_bwd_du_kernel":
            return v["C"] * v["BLOCK_P"] * itemsize
        case "_block_out_kernel" | "_norm_linear_bwd_x_kernel":
            return v["D"] * v["BLOCK_P"] * itemsize
        case "_norm_linear_bwd_weight_kernel":
            return v["rows"] * (v["BLOCK_D"] + v["BLOCK_C"]) * itemsize
    return 0


def of_loops(program: cubin.Program, of_source: tuple[float, ...]) -> Callable[[cubin.Loop], float]:
    """Trips of each loop of the machine code.

    Of the source's last loop, ptxas may make two: four trips at a time, and the rest. A loop that is missing was
    unrolled, and there is nothing to count.
    """
    found = list(of_source)
    if len(program.loops) == len(found) + 1:
        found[-1:] = [-(-found[-1] // 4), 3]
    if program.loops and len(program.loops) != len(found):
        raise cubin.Unreadable(f"{len(program.loops)} loops, not {len(of_source)}")
    of_header = {loop.header: times for loop, times in zip(program.loops, found, strict=False)}
    return lambda loop: of_header[loop.header]


def total(program: cubin.Program, times: Callable[[cubin.Loop], float], count: Callable) -> float:
    """``count`` of the instructions that a program runs, by the loops they are in."""
    found = count([i for b, some in program.blocks.items() if not _around(program, b) for i in some])
    for loop in program.loops:
        outer = [other for other in program.loops if loop.header in other.blocks]
        found += math.prod(times(other) for other in outer) * count(program.body(loop))
    return found


def _around(program: cubin.Program, block: int) -> bool:
    return any(block in loop.blocks for loop in program.loops)


class Line(NamedTuple):
    """Launches, in µs per image; one that sums up others takes as long as they do one after the other."""

    where: str
    stage: str
    name: str
    launches: int
    tensor: float
    issue: float
    hbm: float
    l2: float
    overlapping: float
    apart: float
    all_operands: float  # overlapping, where L2 also delivers the rows that are multiplied


_FIGURES = Line._fields[3:]


def line(where, stage, name, launches=1, tensor=0.0, issue=0.0, hbm=0.0, l2=0.0, rows=0.0) -> Line:
    """Of so many launches, each with these figures; ``rows``: L2's time for those that are multiplied."""
    figures = tensor, issue, hbm, l2
    whole = max(tensor, issue, hbm, l2), max(tensor + issue, hbm, l2), max(tensor, issue, hbm, l2 + rows)
    return Line(where, stage, name, launches, *(launches * figure for figure in (*figures, *whole)))


def summed(lines: list[Line], where: str, stage: str, name: str) -> Line:
    return Line(where, stage, name, *(sum(getattr(one, figure) for one in lines) for figure in _FIGURES))


def of_launch(one: Launched, program: cubin.Program, where: str, stage: str, count: int) -> Line:
    """What ``count`` launches like this take."""
    build = Build(block_code.Call("bf16", 0, 0), one.launch)
    kernel, values = one.launch.kernel, one.numbers | build.constants
    times = of_loops(program, trips(kernel, values))
    made = total(program, times, lambda instructions: products.multiplied(instructions, build.warps))
    lanes, unit = 32 * build.warps * one.programs, 1000 * BATCH  # from ns of a batch
    return line(
        where, stage, kernel.strip("_").removesuffix("_kernel"), count, 2 * made * one.programs / FLOPS / unit,
        program.slots(times) * lanes / SLOTS / unit, one.bytes / HBM_BYTES / unit,
        weights(kernel, values) * one.programs / L2_BYTES / unit,
        operands(kernel, values) * one.programs / L2_BYTES / unit,
    )  # fmt: skip


def of_pytorch(where: str, stage: str, name: str, elements: float, flops: float = 0, item: int = 2) -> Line:
    """An operator of PyTorch that reads and writes so many elements per image."""
    return line(where, stage, name, 1, flops / FLOPS / 1000, hbm=elements * item / HBM_BYTES / 1000)


def pytorch(training: bool) -> list[Line]:
    """The stem, downsampling, the last norm, the optimizer."""
    found = []
    before, side = 3, 224
    for c, here, _ in STAGES:
        read, written = before * side**2, c * here**2
        part = f"{c}", "stem, by PyTorch" if before == 3 else "downsampling, by PyTorch"
        flops = 2 * written * before * (side // here) ** 2
        # The stem is a convolution and a norm, downsampling a norm and a convolution.
        normed = written if before == 3 else read
        found += [of_pytorch("forward", *part, read + written, flops), of_pytorch("forward", *part, 2 * normed)]
        if training:
            found.append(of_pytorch("backward", *part, 3 * normed))
            for _ in range(1 if before == 3 else 2):  # images have no gradient
                found.append(of_pytorch("backward", *part, read + written, flops))
        before, side = c, here
    found.append(of_pytorch("forward", "", "mean, by PyTorch", before * side**2))
    if training:
        found.append(of_pytorch("backward", "", "mean, by PyTorch", before * side**2))
        with torch.device("meta"):
            count = sum(p.numel() for p in convnext_fast.create_model("convnext_tiny").parameters())
        found.append(of_pytorch("backward", "", "AdamW, by PyTorch", 7 * count / BATCH))
    return found


# All of it.


def launched(training: bool) -> list[tuple[str, str, int, Launched]]:
    """(pass, stage, blocks, launch) of everything that blocks launch."""
    found = []
    for c, side, blocks in STAGES:
        call = block_code.Call("bf16", c, 4 * c, grad=training)
        with recorded() as seen:
            block_code.run(call, BATCH, side)
        # The backward pass begins with the first launch that is of no forward pass.
        first = next((at for at, one in enumerate(seen) if "_bwd_" in one.launch.kernel), len(seen))
        for at, one in enumerate(seen):
            found.append(("forward" if at < first else "backward", f"{c}", blocks, one))
    return found


def compiled(launches: list[Launch], processes: int) -> dict[str, cubin.Program]:
    """The machine code of each, by its repr."""
    todo = {repr(one): one for one in launches}
    jobs = [(Build(block_code.Call("bf16", 0, 0), one), ARCH) for one in todo.values()]
    return dict(zip(todo, (program for (program,) in run(jobs, None, processes, _program, failed)), strict=True))


def _program(build: Build, arch: int, options: None) -> list[cubin.Program]:
    return [build.compile(arch).program]


def failed(build: Build, arch: int, error: str):
    raise RuntimeError(f"{build.launch.kernel}: {error}")


def lines(training: bool, processes: int = 2) -> list[Line]:
    """Of inference, or of a training step."""
    seen = launched(training)
    programs = compiled([one.launch for *_, one in seen], processes)
    found = [of_launch(one, programs[repr(one.launch)], where, stage, count) for where, stage, count, one in seen]
    return found + pytorch(training)


def table(found: list[Line], title: str) -> list[str]:
    """Markdown: a line for each kernel and stage, those that take little together."""
    rows = [
        f"| {title}, µs per image | C | launches | tensor | issue | HBM | L2 | overlapping | not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for one in found:
        groups.setdefault((one.where, one.stage, one.name), []).append(one)
    shown: dict[tuple[str, str, str], list[Line]] = {}
    for (where, stage, name), some in groups.items():
        small = sum(one.apart for one in some) < SMALL
        shown.setdefault((where, stage, OTHERS if small else name), []).extend(some)
    merged = sorted((summed(some, *names) for names, some in shown.items()), key=_place)
    rows += [_row(f"{one.where}: {one.name}", one) for one in merged]
    return [*rows, _row("**all**", summed(found, "", "", ""))]


def _row(name: str, one: Line) -> str:
    figures = " | ".join(f"{getattr(one, figure):.2f}" for figure in _FIGURES[1:-1])
    return f"| {name} | {one.stage} | {one.launches} | {figures} |"


def _place(one: Line) -> tuple[bool, int, bool]:
    """Where a line belongs: in the forward pass or after it, in which stage, and what is small last."""
    return one.where == "backward", int(one.stage or 10**6), one.name == OTHERS


def block(processes: int = 2) -> str:
    """What goes between the markers of the README."""
    text = [
        f"`python -m benchmarks.block_code --time`, Triton {triton.__version__}: ConvNeXt-T, bf16, 224², batches of "
        f"{BATCH}, on an H100. Predicted from machine code, not measured: see `benchmarks/block_time.py`."
    ]
    for training, title in ((False, "Inference"), (True, "Training step")):
        found = lines(training, processes)
        whole = summed(found, "", "", "")
        bar = BARS["training" if training else "forward"]
        text.append(
            f"{title}: {whole.overlapping:.1f} µs per image where all overlaps, {whole.apart:.1f} where products and "
            f"other instructions do not; the bar for the first is {bar}. Where L2 also delivers the rows that are "
            f"multiplied, and all overlaps: {whole.all_operands:.1f}."
        )
        text.append("\n".join(table(found, title)))
    filled = (one if one.startswith("|") else textwrap.fill(one, 118, break_on_hyphens=False) for one in text)
    return "\n\n".join(filled) + "\n"


def with_block(text: str, block: str) -> str:
    """The README with this block between its markers."""
    return gelu.with_block(text, block, BEGIN, END, README)
