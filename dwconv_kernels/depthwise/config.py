"""Which kernel runs a depthwise convolution, and how the work is cut up: pure functions of the problem.

No autotuning: the same call launches the same code on every machine of an architecture, compiles nothing that another
size did not already compile, and two ranks never disagree. Figures are issue slots per output, read from compiled code
by ``python -m benchmarks.machine_code``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from ..devices import multiprocessors

BLOCK_C = 32  # one warp, a channel per lane; two per lane cost registers and more conversions than they save loads
DTYPES = ("bf16", "fp16", "fp32")
MAX_KERNEL = 9  # taps live in registers: 81 are what leaves room for the sums
MAX_LINE = 11  # of kernels that are one tap high or wide
# Kernels compute strip · W in 32 bits. Each strip of the weight gradient has partial sums of its own, which in a wider
# map would outgrow the map.
MAX_W = 32_768


@dataclass(frozen=True)
class Choice:
    """One kernel of kernels.py with its constants, except C and the kernel's size."""

    kernel: str
    block_w: int
    edge: str
    reason: str
    prefetch: bool | None = None

    @property
    def pairs(self) -> bool:
        """Does it take two rows at a time (and a table of taps to match)?"""
        return self.kernel.endswith("_pairs_kernel")

    def constants(self, c: int, kh: int, kw: int, residual: bool = False) -> dict[str, object]:
        """The constexpr arguments of the kernel; ``residual``: does it add one to what it stores?"""
        constants = {"C": c, "KH": kh, "KW": kw, "BLOCK_W": self.block_w, "BLOCK_C": BLOCK_C}
        if not self.pairs:
            constants["EDGE"] = self.edge
        if self.kernel.startswith(_FORWARD):
            constants["HAS_RESIDUAL"] = residual
        if self.prefetch is not None:
            constants["PREFETCH"] = self.prefetch
        return constants

    def options(self) -> dict[str, int]:
        """How it is compiled and launched."""
        options = {"num_warps": 1, "num_stages": 1}
        if self.kernel == f"{_WEIGHT}_kernel":
            # Left to itself, ptxas spills one register inside the loop in a few cases, to make room for more warps.
            options["maxnreg"] = 255
        return options

    def strips(self, w: int) -> int:
        """How many strips a row of ``w`` outputs is cut into."""
        return -(-w // self.block_w)


@lru_cache(maxsize=4096)
def settings(choice: Choice, c: int, kh: int, kw: int, residual: bool = False) -> dict[str, object]:
    """:meth:`Choice.constants` and :meth:`Choice.options` together, not to be changed."""
    return {**choice.constants(c, kh, kw, residual), **choice.options()}


_FORWARD, _WEIGHT = "_depthwise_fwd", "_depthwise_bwd_weight"


def why_not(dtype: str, kh: int, kw: int, stride: tuple, padding: tuple, dilation: tuple) -> str | None:
    """Why no kernel takes such a convolution; None where one does. ``dtype`` as in DTYPES, or a name to report."""
    if dtype not in DTYPES:
        return f"x is {dtype}; the kernels take bfloat16, float16 and float32"
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1):
        return f"stride {tuple(stride)}, dilation {tuple(dilation)}; the kernels have stride 1 and dilation 1"
    if kh % 2 == 0 or kw % 2 == 0:
        return f"the kernel is {kh}×{kw}; the kernels take odd sizes"
    if max(kh, kw) > (MAX_LINE if min(kh, kw) == 1 else MAX_KERNEL):
        return f"the kernel is {kh}×{kw}; the kernels go up to {MAX_KERNEL}×{MAX_KERNEL}, 1×{MAX_LINE} and {MAX_LINE}×1"
    if padding[0] >= kh or padding[1] >= kw:
        return f"padding is {tuple(padding)}; the kernels take at most the kernel's size − 1, here {(kh - 1, kw - 1)}"
    return None


def strips_fit(w: int, block_w: int, kw: int) -> bool:
    """Can strips be spread over ``w`` columns so that the kw // 2 columns beside each are all in or all out?"""
    if w < block_w or w > MAX_W:
        return False
    strips = -(-w // block_w)
    # Inner strips are no nearer to the ends of the map than the distance of two strips, rounded down.
    return strips == 1 or (w - block_w) // (strips - 1) >= kw // 2


@cache
def pick_forward(dtype: str, kh: int, kw: int, same: bool, w: int, strict: bool = False) -> Choice:
    """The kernel for a forward pass or an input gradient.

    Args:
        dtype: of the map, one of DTYPES.
        kh, kw: size of the depthwise kernel.
        same: is the padding (kh // 2, kw // 2)?
        w: columns of the result.
        strict: only kernels that let Inf and NaN reach no output beyond their own.
    """
    direct = f"{_FORWARD}_kernel"
    if same and (kh, kw) == (7, 7) and dtype != "fp32" and w in (7, 14):
        return Choice(direct, w, "whole", "no columns beside the strip: 48 slots at 14, 43 at 7, against 50 in pairs")
    if same and strips_fit(w, 7, kw):
        if (kh, kw) == (7, 7) and dtype != "fp32" and not strict:
            return Choice(f"{_FORWARD}_pairs_kernel", 7, "strips", "38.5 instead of 49 products per output: 50 slots")
        return Choice(direct, 7, "strips", "ConvNeXt's maps are multiples of 7 wide; fp32 is memory-bound at 57 slots")
    return Choice(direct, 4, "masked", "any width and padding: small maps waste least in narrow strips")


@cache
def pick_backward_weight(dtype: str, kh: int, kw: int, same: bool, w: int, strict: bool = False) -> Choice:
    """The kernel for the weight's and bias's gradient; arguments as in :func:`pick_forward`."""
    if same and dtype != "fp32" and (kh, kw) == (7, 7) and not strict and strips_fit(w, 7, kw):
        return Choice(f"{_WEIGHT}_pairs_kernel", 7, "strips", "54 slots against 69 row by row", prefetch=True)
    if same and strips_fit(w, 7, kw):
        return Choice(f"{_WEIGHT}_kernel", 7, "strips", "9×9 sums and 9 rows of 7 columns of dy still fit in registers")
    return Choice(f"{_WEIGHT}_kernel", 4, "masked", "any width and padding")


def shipped(dtype: str, kh: int, kw: int, strict: bool = False) -> Iterator[Choice]:
    """Every choice that some map and padding leads to, each once."""
    seen = set()
    for pick in (pick_forward, pick_backward_weight):
        for same in (True, False):
            for w in range(1, 65):
                choice = pick(dtype, kh, kw, same, w, strict)
                if choice not in seen:
                    seen.add(choice)
                    yield choice


def _schedulers(arch: int) -> int:
    # Each multiprocessor has four. The interpreter has nothing to gain from cutting a map up.
    return 4 * multiprocessors(arch) if arch else 1


def _time(cost: float, programs: int, schedulers: int) -> float:
    # A scheduler with a single warp waits for memory about half of the time; with two or more it shares its slots.
    return cost * (programs if schedulers == 1 else max(2, -(-programs // schedulers)))


@lru_cache(maxsize=4096)
def rows_per_program(arch: int, columns: int, oh: int, kh: int) -> int:
    """How many rows of the result a program of the forward kernels computes: all of them, or fewer in small batches.

    A program of fewer rows reads KH − 1 rows more than it computes and loads the taps anew, so a map is only cut where
    its ``columns`` (images × strips × blocks of channels) leave schedulers without work. Always even: pairs of rows.
    """
    schedulers = _schedulers(arch)
    best = None
    for rows in _even_rows(oh):
        # In rows: loading taps and storing the last rows takes as long as one or two of them.
        time = _time(rows + kh - 1 + 1.5, columns * -(-oh // rows), schedulers)
        if best is None or time < best[0]:
            best = (time, rows)
    return best[1]


@lru_cache(maxsize=4096)
def cut_backward_weight(arch: int, columns: int, n: int, h: int, kh: int) -> tuple[int, int]:
    """(images, rows) per program of the weight gradient's kernels: programs that fill the machine evenly, and not many.

    Each program writes KH·KW + 1 sums, which a second kernel adds up, so programs take several images where there are
    many. ``columns`` is strips × blocks of channels. The rows are even.
    """
    schedulers = _schedulers(arch)
    best = None
    groups = _few(n)
    for rows in _even_rows(h):
        for images in groups:
            programs = columns * -(-h // rows) * -(-n // images)
            # In rows: a window of KH − 1 rows per image; the sums, stored here and added up there, count as four.
            time = _time(images * (rows + 0.4 * (kh - 1)) + 4, programs, schedulers)
            if best is None or time < best[0]:
                best = (time, images, rows)
    return best[1], best[2]


def _even_rows(h: int) -> list[int]:
    """Even numbers of rows per program worth a look, the most first: h in up to 64 equal chunks, then ever more."""
    chunks = [*range(1, 65), *(64 * 2**k for k in range(1, 26))]
    rows = {-(-h // c) for c in chunks if c <= max(1, h // 2)}
    return sorted({r + r % 2 for r in rows}, reverse=True)


def _few(n: int) -> list[int]:
    """Numbers of images per program worth a look: each leads to another number of groups."""
    groups = {-(-n // images) for images in range(1, min(n, 64) + 1)} | {
        max(1, math.ceil(n / (64 * 2**k))) for k in range(24)
    }
    return sorted({-(-n // g) for g in groups})
