"""How long depthwise convolutions take on an H100 according to their compiled kernels: a model, not a measurement.

``python -m benchmarks.tensor_code --readme``: forward pass and weight gradient in bf16 with 96 channels, by the kernels
on tensor cores and by those that multiply by FMA, per output and against the size of the kernel, in large batches. Each
launch is made by the package's own launchers, caught, and compiled for sm_90. It takes as long as the longest of

- issue: instructions on the longest way through the machine code, 29 568 lanes a nanosecond (132 multiprocessors × 4
  schedulers × 32 lanes at 1.75 GHz);
- tensor: one HMMA.16816 takes two cycles of a multiprocessor, whatever the warp;
- LSU: wavefronts of loads and stores, one a cycle and multiprocessor. Lanes that read from many lines of memory, as all
  these kernels' do, may take longer;
- HBM: each tensor once, at 3.0 TB/s;

and a pass as long as its launches one after the other. Left out: gaps between launches, the last wave of programs that
does not fill the machine, latency, what L2 delivers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

from benchmarks import block_time, cubin, gelu, products, tensor_code
from benchmarks.compiling import run
from benchmarks.machine_code import COPY_BYTES_PER_PS, H100_SLOTS_PER_PS, MAPS
from benchmarks.tensor_code import FORWARD, LINES, WEIGHT, Case
from dwconv_kernels.depthwise import config, launch

ARCH = 90
KERNEL_SIZES = (*((k, k) for k in (3, 5, 7, 9, 11, 13, 15, 17, 21, 31, 51)), *LINES)
CYCLE = 1e12 / (132 * 1.75e9)  # ps, of one multiprocessor when all of them work

README = Path(__file__).parents[1] / "dwconv_kernels" / "depthwise" / "README.md"
BEGIN, END = "<!-- tensor:begin -->\n", "<!-- tensor:end -->"


class Time(NamedTuple):
    """Of launches, per output: slots, and ps by what bounds them; ``unread`` are kernels whose slots are not known."""

    slots: float = 0.0
    issue: float = 0.0
    tensor: float = 0.0
    lsu: float = 0.0
    hbm: float = 0.0
    predicted: float = 0.0
    unread: frozenset[str] = frozenset()

    def __add__(self, other: Time) -> Time:
        sums = (a + b for a, b in zip(self[:-1], other[:-1], strict=True))
        return Time(*sums, self.unread | other.unread)


def time(slots: float, hmma: float, wavefronts: float, nbytes: float, unread: Iterable[str] = ()) -> Time:
    """Of one launch, with these counts and bytes per output."""
    bounds = slots / H100_SLOTS_PER_PS, hmma * 2 * CYCLE / 32, wavefronts * CYCLE / 32, nbytes / COPY_BYTES_PER_PS
    return Time(slots, *bounds, max(bounds), frozenset(unread))


def launched(case: Case, h: int, w: int, tensor: bool) -> list[block_time.Launched] | None:
    """What a pass launches where config takes tensor cores, or does not; None where the FMA kernels do not take it."""
    padding = (case.kh // 2, case.kw // 2)
    if not tensor and config.why_not_fma(case.dtype, case.kh, case.kw, (1, 1), padding, (1, 1)) is not None:
        return None
    dtype = products.DTYPES[case.dtype]
    shape = (max(1, tensor_code.PIXELS // (h * w)), case.c, h, w)
    x, y = (torch.empty(shape, dtype=dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.empty((case.c, 1, case.kh, case.kw), dtype=dtype)
    bias = weight.new_empty(case.c)
    with mock.patch.object(config, "on_tensor_cores", return_value=tensor), block_time.recorded(ARCH) as seen:
        if case.what == FORWARD:
            launch.depthwise_forward(x, weight, bias, (1, 1), padding, (1, 1))
        else:
            launch.depthwise_weight_gradient(y, x, weight.shape[2:], padding, weight, bias)
    if any(products.kernel_named(one.launch.kernel).is_gluon() for one in seen) != tensor:
        raise RuntimeError(f"{case}: {'not ' * tensor}on tensor cores, against what config is made to say")
    return seen


def of_launch(case: Case, one: block_time.Launched, program: cubin.Program | None, outputs: int) -> Time:
    """One launch; without its program only what memory takes."""
    build = products.Build(case, one.launch)
    nbytes = one.bytes / outputs
    if program is None:
        return time(0, 0, 0, nbytes, [one.launch.kernel])
    found = tensor_code.per_output(build, program, tensor_code.OnMap(0, 0, outputs, one.programs, one.numbers))
    return time(found["slots"], found["hmma"], found["wavefronts"], nbytes)


def of_sum(one: block_time.Launched, outputs: int) -> Time:
    """What PyTorch takes to add up the sums that programs of a weight gradient leave; nothing of other launches."""
    build = products.Build(None, one.launch)
    if one.launch.kernel != "_depthwise_bwd_weight_stream_kernel":
        return Time()
    v = build.constants
    block_c = v["J"] * v["WARPS"]
    blocks = -(-v["C"] // block_c)
    parts = one.programs // (v["COLUMN_GROUPS"] * blocks)
    of_part = v["COLUMN_GROUPS"] * (v["PAIRS"] * v["GROUPS"] + 1) * blocks * block_c * 128 * 4
    return time(0, 0, 0, (parts + 1) * of_part / outputs) if parts > 1 else Time()


def times(sizes: Iterable[tuple[int, int]], processes: int = 2) -> dict[tuple[Case, int, bool], Time | None]:
    """(case, side of the map, on tensor cores?) → time, None where there is no kernel."""
    seen = {}
    for kh, kw in sizes:
        for case in (Case(FORWARD, "bf16", kh, kw), Case(WEIGHT, "bf16", kh, kw)):
            for side, _ in MAPS:
                for tensor in (True, False):
                    seen[case, side, tensor] = launched(case, side, side, tensor)
    programs = compiled([one for some in seen.values() for one in some or ()], processes)
    found = {}
    for (case, side, tensor), some in seen.items():
        outputs = max(1, tensor_code.PIXELS // side**2) * side**2 * case.c
        of_all = (
            of_launch(case, one, programs[repr(one.launch)], outputs) + of_sum(one, outputs) for one in some or ()
        )
        found[case, side, tensor] = None if some is None else sum(of_all, Time())
    return found


def compiled(launches: list[block_time.Launched], processes: int) -> dict[str, cubin.Program | None]:
    """The machine code of each by its repr, None where it cannot be followed."""
    todo = {repr(one.launch): one.launch for one in launches}
    jobs = [(products.Build(None, one), ARCH) for one in todo.values()]
    found = run(jobs, None, processes, _program, block_time.failed)
    return dict(zip(todo, (program for (program,) in found), strict=True))


def _program(build: products.Build, arch: int, options: None) -> list[cubin.Program | None]:
    try:
        return [build.compile(arch).program]
    except cubin.Unreadable:
        return [None]


def faster(found: dict[tuple[Case, int, bool], Time | None]) -> list[tuple[Case, int]]:
    """Where FMA is predicted to be faster, by more than a hundredth: (case, side of the map)."""
    return [
        (case, side)
        for (case, side, tensor), fma in found.items()
        if not tensor and fma is not None and fma.predicted < 0.99 * found[case, side, True].predicted
    ]


def table(found: dict[tuple[Case, int, bool], Time | None], what: str) -> list[str]:
    """Markdown: a line for each size of kernel."""
    (first, _), *others = MAPS
    rows = [
        f"| {what}, ps per output | slots | issue | tensor | LSU | HBM | predicted | FMA: slots | predicted | "
        + " | ".join(f"at {side}, both" for side, _ in others) + " |",
        "|---|" + "---|" * (8 + len(others)),
    ]  # fmt: skip
    for case in dict.fromkeys(case for case, *_ in found if case.what == what):
        tensor, fma = found[case, first, True], found[case, first, False]
        cells = [f"{tensor.slots:.1f}", *(f"{bound:.2f}" for bound in tensor[1:5]), f"**{tensor.predicted:.2f}**"]
        cells += ["–", "–"] if fma is None else [f"{fma.slots:.1f}", f"{fma.predicted:.2f}"]
        for side, _ in others:
            pair = found[case, side, True], found[case, side, False]
            cells.append(" / ".join("–" if one is None else f"{one.predicted:.2f}" for one in pair))
        rows.append(f"| {case.size} | " + " | ".join(cells) + " |")
    return rows


def block(processes: int = 2) -> str:
    """What goes between the markers of the README."""
    found = times(KERNEL_SIZES, processes)
    text = [
        f"`python -m benchmarks.tensor_code --readme`, Triton {triton.__version__}: bf16, 96 channels, 56×56 maps in "
        "large batches on an H100, tensor cores beside FMA, and the same on smaller maps. Predicted from machine code, "
        "not measured: see `benchmarks/tensor_time.py`. A pass may be several launches; what bounds each is added up."
    ]
    unread = frozenset().union(*(one.unread for one in found.values() if one is not None))
    if unread:
        names = ", ".join(f"`{name}`" for name in sorted(unread))
        text.append(f"Machine code that could not be read, and is counted by its bytes alone: {names}.")
    for what in (FORWARD, WEIGHT):
        text.append("\n".join(table(found, what)))
        sizes: dict[str, list[str]] = {}
        for case, side in faster(found):
            if case.what == what:
                sizes.setdefault(case.size, []).append(str(side))
        better = "; ".join(f"{size} at {', '.join(sides)}" for size, sides in sizes.items())
        text.append(f"{what.capitalize()}: FMA is predicted to be the faster of both for {better or 'none of them'}.")
    filled = (one if one.startswith("|") else textwrap.fill(one, 118, break_on_hyphens=False) for one in text)
    return "\n\n".join(filled) + "\n"


def with_block(text: str, block: str) -> str:
    """The README with this block between its markers."""
    return gelu.with_block(text, block, BEGIN, END, README)
