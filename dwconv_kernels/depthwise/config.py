"""Which kernel runs a depthwise convolution, and how the work is cut up: pure functions of the problem.

No autotuning: the same call launches the same code on every machine of an architecture, compiles nothing that another
size did not already compile, and two ranks never disagree. Figures are issue slots per output, read from compiled code
by ``python -m benchmarks.machine_code``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from ..devices import multiprocessors
from . import config_tensor

BLOCK_C = 32  # one warp, a channel per lane; two per lane cost registers and more conversions than they save loads
DTYPES = ("bf16", "fp16", "fp32")
MAX_KERNEL = 17  # what larger ones would compile to takes more than half a minute
MAX_LINE = 51  # of kernels that are one tap high or wide
# Of the 255 registers of a lane, what is left for taps and sums beside columns of x, pointers and masks: 9×9 taps and
# the sums of 8 rows of 7 columns are 137. Taps that do not fit are read through the cache.
TAPS_AND_SUMS = 144
MAX_DILATION = 3
MAX_STRIDE = 2
MAX_STRIDED_KERNEL = 9
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
    group: int | None = None  # rows of taps that a program of the weight gradient computes; None: all
    cached: bool = False  # taps read through the cache
    crowded: bool = False  # all registers are needed
    dilation: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)

    @property
    def pairs(self) -> bool:
        """Does it take two rows at a time (and a table of taps to match)?"""
        return self.kernel.endswith("_pairs_kernel")

    def constants(self, c: int, kh: int, kw: int, residual: bool = False) -> dict[str, object]:
        """The constexpr arguments of the kernel; ``residual``: does it add one to what it stores?"""
        constants = {"C": c, "KH": kh, "KW": kw, "BLOCK_W": self.block_w, "BLOCK_C": BLOCK_C}
        if self.stride != (1, 1):
            return constants | {"SH": self.stride[0], "SW": self.stride[1]}
        constants |= {"DH": self.dilation[0], "DW": self.dilation[1]}
        if not self.pairs:
            constants["EDGE"] = self.edge
            constants |= {"CACHED": self.cached} if self.kernel.startswith(_FORWARD) else {"GROUP": self.group or kh}
        if self.kernel.startswith(_FORWARD):
            constants["HAS_RESIDUAL"] = residual
        if self.prefetch is not None:
            constants["PREFETCH"] = self.prefetch
        return constants

    def options(self) -> dict[str, int]:
        """How it is compiled and launched."""
        options = {"num_warps": 1, "num_stages": 1}
        if self.kernel == f"{_WEIGHT}_kernel" or self.crowded:
            # Left to itself, ptxas spills one register inside the loop in a few cases, to make room for more warps.
            options["maxnreg"] = 255
        return options

    def strips(self, w: int) -> int:
        """How many strips a row of ``w`` outputs is cut into, in each phase of the dilation."""
        return -(-w // (self.block_w * self.dilation[1]))

    def groups(self, kh: int) -> int:
        """Into how many groups of rows of taps the weight gradient of a kernel ``kh`` taps high is cut."""
        return -(-kh // self.group) if self.group else 1

    @property
    def phases(self) -> int:
        """Of how many convolutions without dilation is the convolution made?"""
        return self.dilation[0] * self.dilation[1]


@lru_cache(maxsize=4096)
def settings(choice: Choice, c: int, kh: int, kw: int, residual: bool = False) -> dict[str, object]:
    """:meth:`Choice.constants` and :meth:`Choice.options` together, not to be changed."""
    return {**choice.constants(c, kh, kw, residual), **choice.options()}


_FORWARD, _WEIGHT = "_depthwise_fwd", "_depthwise_bwd_weight"


def dilation_of(kh: int, kw: int, dilation: tuple) -> tuple[int, int]:
    """The dilation, 1 where there is only one tap that it could move away from others."""
    return (dilation[0] if kh > 1 else 1, dilation[1] if kw > 1 else 1)


def why_not(
    dtype: str, kh: int, kw: int, stride: tuple, padding: tuple, dilation: tuple, strict: bool = False
) -> str | None:
    """Why no kernel takes such a convolution; None where one does. ``dtype`` as in DTYPES, or a name to report."""
    if dtype not in DTYPES or not is_too_large(kh, kw):
        return why_not_fma(dtype, kh, kw, stride, padding, dilation)
    # What only tensor cores take.
    largest, most = f"{MAX_KERNEL}×{MAX_KERNEL}, 1×{MAX_LINE} and {MAX_LINE}×1", config_tensor.MAX_KERNEL
    if max(kh, kw) > most:
        return f"the kernel is {kh}×{kw}; the kernels go up to {most}×{most}"
    if not _is_plain(kh, kw, stride, dilation):
        at = f"stride {tuple(stride)}, dilation {tuple(dilation)}"
        return f"{at}; the kernel is {kh}×{kw}, and those beyond {largest} are taken with stride 1 and dilation 1"
    if (other := config_tensor.why_not(dtype, kh, kw, strict)) is not None:
        return f"the kernel is {kh}×{kw}, and beyond {largest} only tensor cores do; {other}"
    return _why_not_padding(kh, kw, padding, (1, 1))


def on_tensor_cores(dtype: str, kh: int, kw: int, stride: tuple, dilation: tuple, c: int, strict: bool) -> bool:
    """Do tensor cores compute it, with ``c`` channels, of kernels that are taken at all?"""
    if not _is_plain(kh, kw, stride, dilation):
        return False
    if is_too_large(kh, kw):
        return True
    return config_tensor.why_not(dtype, kh, kw, strict) is None and config_tensor.pays(kh, kw, c)


def is_too_large(kh: int, kw: int) -> bool:
    """Is it a kernel that FMAs do not take for its size, though it is odd?"""
    return kh % 2 == 1 and kw % 2 == 1 and max(kh, kw) > (MAX_LINE if min(kh, kw) == 1 else MAX_KERNEL)


def _is_plain(kh: int, kw: int, stride: tuple, dilation: tuple) -> bool:
    return tuple(stride) == (1, 1) and dilation_of(kh, kw, dilation) == (1, 1)


def why_not_fma(dtype: str, kh: int, kw: int, stride: tuple, padding: tuple, dilation: tuple) -> str | None:
    """The same of the kernels in kernels.py, on FMAs."""
    if dtype not in DTYPES:
        return f"x is {dtype}; the kernels take bfloat16, float16 and float32"
    if kh % 2 == 0 or kw % 2 == 0:
        return f"the kernel is {kh}×{kw}; the kernels take odd sizes"
    if is_too_large(kh, kw):
        largest = f"{MAX_KERNEL}×{MAX_KERNEL}, 1×{MAX_LINE} and {MAX_LINE}×1"
        return f"the kernel is {kh}×{kw}; the kernels go up to {largest}"
    if max(stride) > MAX_STRIDE:
        return f"stride {tuple(stride)}; the kernels go up to stride {MAX_STRIDE}"
    if tuple(stride) != (1, 1) and max(kh, kw) > MAX_STRIDED_KERNEL:
        limit = f"{MAX_STRIDED_KERNEL}×{MAX_STRIDED_KERNEL}"
        return f"stride {tuple(stride)}; with stride, the kernels go up to {limit}, and the kernel is {kh}×{kw}"
    if tuple(stride) != (1, 1) and dilation_of(kh, kw, dilation) != (1, 1):
        return f"stride {tuple(stride)}, dilation {tuple(dilation)}; the kernels have one or the other"
    if max(spread := dilation_of(kh, kw, dilation)) > MAX_DILATION:
        return f"dilation {tuple(dilation)}; the kernels go up to dilation {MAX_DILATION}"
    return _why_not_padding(kh, kw, padding, spread)


def _why_not_padding(kh: int, kw: int, padding: tuple, dilation: tuple) -> str | None:
    most = (dilation[0] * (kh - 1), dilation[1] * (kw - 1))
    if padding[0] > most[0] or padding[1] > most[1]:
        return f"padding is {tuple(padding)}; the kernels take at most dilation · (the kernel's size − 1), here {most}"
    return None


def strips_fit(w: int, block_w: int, kw: int, dilation: int = 1) -> bool:
    """Can strips be spread over ``w`` columns so that the kw // 2 columns beside each are all in or all out?

    With dilation, over the columns of each phase, which there are w / dilation of, rounded down or up.
    """
    least, strips = w // dilation, -(-w // (block_w * dilation))
    # In the place of columns that are outside, as many from a strip's first one on are read.
    if least < block_w or w > MAX_W or kw // 2 > block_w:
        return False
    # Inner strips are no nearer to the ends of the map than the distance of two strips, rounded down.
    return strips == 1 or (least - block_w) // (strips - 1) >= kw // 2


@cache
def pick_forward(
    dtype: str, kh: int, kw: int, same: bool, w: int, strict: bool = False, dilation: tuple = (1, 1)
) -> Choice:
    """The kernel for a forward pass or an input gradient.

    Args:
        dtype: of the map, one of DTYPES.
        kh, kw: size of the depthwise kernel.
        same: is the padding (kh // 2, kw // 2), times the dilation?
        w: columns of the result.
        strict: only kernels that let Inf and NaN reach no output beyond their own.
        dilation: as :func:`dilation_of` has it.
    """
    choice, direct, d = partial(Choice, dilation=dilation), f"{_FORWARD}_kernel", dilation[1]

    def cached(block_w: int) -> bool:
        return kh * kw + (kh - 1) * block_w > TAPS_AND_SUMS

    if same and (kh, kw) == (7, 7) and dtype != "fp32" and w in (7 * d, 14 * d):
        why = "no columns beside the strip: 48 slots at 14, 43 at 7, against 50 in pairs"
        return choice(direct, w // d, "whole", why)
    if same and strips_fit(w, 7, kw, d) and kh <= 15:
        if (kh, kw) == (7, 7) and dtype != "fp32" and not strict:
            return choice(f"{_FORWARD}_pairs_kernel", 7, "strips", "38.5 instead of 49 products per output: 50 slots")
        why = "ConvNeXt's maps are multiples of 7 wide; fp32 is memory-bound at 57 slots"
        return choice(direct, 7, "strips", why, cached=cached(7), crowded=kh == 15 and cached(7))
    if kh > 31:
        return choice(direct, 2, "masked", "sums of so many rows fit in registers for two columns", cached=cached(2))
    why = "any width and padding: small maps waste least in narrow strips"
    return choice(direct, 4, "masked", why, cached=cached(4))


@cache
def pick_backward_weight(
    dtype: str, kh: int, kw: int, same: bool, w: int, strict: bool = False, dilation: tuple = (1, 1)
) -> Choice:
    """The kernel for the weight's and bias's gradient; arguments as in :func:`pick_forward`."""
    choice, direct = partial(Choice, dilation=dilation), f"{_WEIGHT}_kernel"

    def group(block_w: int) -> int | None:
        # Of sums, and of the window of dy, which is all loaded at once where an image begins.
        rows = min(TAPS_AND_SUMS // (kw + block_w), 80 // block_w)
        return None if rows >= kh else -(-kh // -(-kh // rows))

    if same and strips_fit(w, 7, kw, dilation[1]):
        if (kh, kw) == (7, 7) and dtype != "fp32" and not strict:
            return choice(f"{_WEIGHT}_pairs_kernel", 7, "strips", "54 slots against 69 row by row", prefetch=True)
        why = "9×9 sums and 9 rows of 7 columns of dy still fit in registers"
        return choice(direct, 7, "strips", why, group=group(7))
    return choice(direct, 4, "masked", "any width and padding", group=group(4))


def pick_strided(stride: tuple[int, int]) -> tuple[Choice, Choice, Choice]:
    """The kernels for forward pass, input gradient and weight gradient with a stride, whatever the map."""
    why = "any width and padding; sums of 8 columns of dx, 4 of y"
    names = (f"{_FORWARD}_strided_kernel", "_depthwise_bwd_input_strided_kernel", f"{_WEIGHT}_strided_kernel")
    return tuple(Choice(name, 4, "masked", why, stride=tuple(stride)) for name in names)


def shipped(dtype: str, kh: int, kw: int, strict: bool = False, dilation: tuple = (1, 1)) -> Iterator[Choice]:
    """Every choice that some map and padding leads to, each once."""
    seen = set()
    for pick in (pick_forward, pick_backward_weight):
        for same in (True, False):
            for w in range(1, 64 * dilation[1] + 1):
                choice = pick(dtype, kh, kw, same, w, strict, dilation)
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
