"""Which tensor-core kernel runs a depthwise convolution, and how the work is cut up: pure functions of the problem.

Figures are read from machine code (``python -m benchmarks.tensor_code``); what a step costs is a model of it
that measurement is to replace. Names and formulas: kernels_gluon.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from ..devices import multiprocessors, shared_kb

DTYPES = ("bf16", "fp16")
MAX_KERNEL = 51
WARPS = 8
# Offsets inside of a tile, at most 32 rows, are 32 bits.
MAX_ROW = 2**26
MAX_PIXELS = 2**33  # numbers of strips, and of blocks of 8 pixels, are 32 bits
_MOST_TAPS = 140  # registers for a table of taps that stays, with those for sums beside it


@dataclass(frozen=True)
class Patches:
    """How a KH × KW kernel is made of products: patches of R × T outputs, R·T = 8."""

    R: int
    groups: int  # patch rows of outputs that a patch row of inputs touches
    pairs: int  # pairs of blocks under a patch

    @property
    def T(self) -> int:
        return 8 // self.R

    @property
    def log_r(self) -> int:
        return self.R.bit_length() - 1

    @property
    def products(self) -> int:
        """Of 16 × 16 by 16 × 8, for 16 patches."""
        return self.groups * self.pairs


def patches(kh: int, kw: int, r: int) -> Patches:
    t = 8 // r
    return Patches(r, -(-(kh + r - 1) // r), -(-(t + kw - 1) // (2 * t)))


@dataclass(frozen=True)
class Stream:
    """The kernels that keep the taps (or their gradients) in registers while the map passes by."""

    patches: Patches
    channels: int  # of a warp
    pixels: int  # of a thread
    column_groups: int = 1  # of the weight gradient: programs that share its taps
    reason: str = ""
    name = "tensor cores, stream"

    @property
    def block_c(self) -> int:
        return self.channels * WARPS

    def constants(self, c: int) -> dict[str, object]:
        p = self.patches
        pairs = -(-p.pairs // self.column_groups)
        return {
            "C": c, "R": p.R, "T": p.T, "GROUPS": p.groups, "PAIRS": pairs,
            "J": self.channels, "PIXELS": self.pixels, "WARPS": WARPS,
        }  # fmt: skip


@dataclass(frozen=True)
class Large:
    """The kernel that keeps sums in registers while the taps pass by."""

    patches: Patches
    patch_rows: int
    strips: int
    chunk: int
    reason: str = ""
    name = "tensor cores, large"
    block_c = WARPS

    def constants(self, c: int) -> dict[str, object]:
        p = self.patches
        return {
            "C": c, "R": p.R, "T": p.T, "GROUPS": p.groups, "PATCH_ROWS": self.patch_rows, "STRIPS": self.strips,
            "CHUNK": self.chunk, "WARPS": WARPS,
        }  # fmt: skip


def why_not(dtype: str, kh: int, kw: int, strict: bool = False) -> str | None:
    """Why tensor cores take no such kernel, with stride 1 and dilation 1; None where they do."""
    if strict:
        return "strict kernels, where Inf and NaN reach no output beyond their own, use no tensor cores"
    if dtype not in DTYPES:
        return f"x is {dtype}; tensor cores multiply bfloat16 and float16"
    if max(kh, kw) > MAX_KERNEL:
        return f"the kernel is {kh}×{kw}; kernels for tensor cores go up to {MAX_KERNEL}×{MAX_KERNEL}"
    return None


def pays(kh: int, kw: int, c: int) -> bool:
    """Are tensor cores faster than FMAs, where both can do it?

    Predicted from machine code. Up to 36 taps FMAs take no longer than the memory does (39 issue slots per output);
    from there on tensor cores do. C that are no multiple of 16 bytes are loaded element by element, which at 7×7 costs
    about as much as it gains; from 99 taps on it does not matter. The number of images has no say: with one of the 16
    strips of a tile to do, 8.5 slots at 7×7 become 136, against 50, but such maps take no longer than a launch, and a
    batch of another size would compile other kernels and have other bits.
    """
    return kh * kw >= 99 or (kh * kw > 36 and c % 8 == 0)


# What kernels are cut to where a map leaves the rest of their taps without anything to multiply: few sizes, as each is
# another compiled kernel. 27 is what reaches across a map of 14, 13 what reaches across one of 7.
CUTS = (13, 27)


def used_taps(kernel: tuple, padding: tuple, size: tuple, out: tuple, cuts: tuple = CUTS) -> list[tuple[int, int]]:
    """(first, end) of the taps, in each direction, that ``out`` outputs of ``size`` inputs need, or of more.

    All of them, or as many as one of ``cuts`` in both directions, or all in one that has less.
    """
    needed = [(max(0, p - (o - 1)), min(k, p + s)) for k, p, s, o in zip(kernel, padding, size, out, strict=True)]
    longest = max(end - first for first, end in needed)
    cut = next((cut for cut in cuts if longest <= cut), max(kernel))
    lengths = [min(cut, k) for k in kernel]
    firsts = [min(first, k - length) for (first, _), k, length in zip(needed, kernel, lengths, strict=True)]
    return [(first, first + length) for first, length in zip(firsts, lengths, strict=True)]


@cache
def pick_forward(kh: int, kw: int, arch: int, vectors: bool = True, residual: bool = False) -> Stream | Large:
    """The kernel for a forward pass or an input gradient, plus a ``residual``.

    ``vectors``: can 8 channels be loaded at once? If not, pointers and masks take many registers.
    """
    choices = []
    for r in (1, 2, 4, 8):
        p = patches(kh, kw, r)
        if 2 * p.products + 4 * p.groups + 16 * p.pairs <= _MOST_TAPS:
            # A step: products, and for each pair of blocks what it takes to load and turn around its tiles.
            choices.append((p.pairs * (p.groups + 13), r, p))
    if choices:
        p = min(choices)[2]
        both = vectors and 4 * p.products + 8 * p.groups + 16 * p.pairs <= _MOST_TAPS + 20
        pixels = 2 if vectors and not (residual and p.pairs > 3) else 1
        return Stream(p, 2 if both else 1, pixels, reason="taps fit into registers")
    # What larger kernels are cut to for maps of 14 and less: four patch rows are all there are.
    rows, fits = 4 if max(kh, kw) == max(CUTS) else 7, shared_kb(arch) >= 163
    return Large(patches(kh, kw, 4), rows, 4, 8 if fits else 4, "taps do not fit into registers")


@cache
def pick_backward_weight(kh: int, kw: int, vectors: bool = True) -> Stream:
    """The kernel for the weight's and bias's gradient; ``vectors`` as in :func:`pick_forward`."""
    choices = []
    for r in (1, 2, 4, 8):
        p = patches(kh, kw, r)
        for groups in range(1, p.pairs + 1):
            pairs = -(-p.pairs // groups)
            if 4 * pairs * p.groups + 2 * p.groups + 16 * pairs <= _MOST_TAPS:
                choices.append((groups * (pairs * (p.groups + 13) + 8), groups, p))
                break
    _, groups, p = min(choices, key=lambda choice: choice[:2])
    both = vectors and groups == 1 and 8 * p.products + 4 * p.groups + 16 * p.pairs <= 124
    return Stream(p, 2 if both else 1, 2 if vectors else 1, groups, "sums fit into registers")


def options(constants: dict[str, object]) -> dict[str, int]:
    """How a kernel with these constants is compiled and launched."""
    found = {"num_warps": WARPS}
    if "PATCH_ROWS" in constants or constants.get("HAS_RESIDUAL"):
        # Left to itself, ptxas spills a few registers in some of these. Of the others, it makes longer loops with this.
        found["maxnreg"] = 255
    return found


def shipped(kh: int, kw: int, arch: int, vectors: bool = True) -> Iterator[Stream | Large]:
    """Both choices for a kernel."""
    yield pick_backward_weight(kh, kw, vectors)
    yield pick_forward(kh, kw, arch, vectors)


@lru_cache(maxsize=4096)
def cut_stream(arch: int, tiles: int, blocks: int, oh: int, r: int, groups: int) -> tuple[int, int]:
    """(rows, tiles) per program of the forward kernel; ``blocks`` of channels.

    A program loads its taps once, which takes as long as some steps, and reads GROUPS − 1 patch rows more than it
    writes; but all multiprocessors should have the same to do.
    """
    sms = multiprocessors(arch) if arch else 1
    best = None
    for rows in _patch_rows(oh, r):
        chunks = -(-oh // (rows * r))
        steps = rows + groups - 1
        for several in _few(tiles):
            programs = chunks * blocks * -(-tiles // several)
            time = -(-programs // sms) * (several * (steps + 3) + groups)
            if best is None or time < best[0]:
                best = (time, rows * r, several)
    return best[1], best[2]


@lru_cache(maxsize=4096)
def cut_weight(arch: int, tiles: int, blocks: int, oh: int, r: int, groups: int) -> tuple[int, int]:
    """(rows, jobs) per program of the weight gradient's kernel; a job is a tile of ``rows`` rows.

    ``blocks`` of channels and columns. Every program writes its sums, which a second pass adds up: few programs.
    """
    sms = multiprocessors(arch) if arch else 1
    best = None
    for rows in _patch_rows(oh, r):
        chunks = -(-oh // (rows * r))
        for several in _few(tiles * chunks):
            programs = blocks * -(-(tiles * chunks) // several)
            time = -(-programs // sms) * (several * (rows + groups + 2) + 8 * groups)
            if best is None or time < best[0]:
                best = (time, rows * r, several)
    return best[1], best[2]


def _patch_rows(oh: int, r: int) -> list[int]:
    """Numbers of patch rows per program worth a look, the most first."""
    all_rows = -(-oh // r)
    return sorted(
        {-(-all_rows // chunks) for chunks in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024)}, reverse=True
    )


def _few(count: int) -> list[int]:
    """How many of ``count`` jobs a program may do: each leads to another number of programs."""
    return sorted({-(-count // programs) for programs in (*range(1, 65), *(64 * 2**k for k in range(1, 25)))})
