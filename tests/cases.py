"""Shapes that operators are tested on, each with its reason."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator
from typing import NamedTuple

from dwconv_kernels.depthwise import config


class Depthwise(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    reason: str = ""

    def __str__(self) -> str:
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.kh}x{self.kw}-s{self.stride[0]}{self.stride[1]}"
            f"-p{self.padding[0]}{self.padding[1]}-d{self.dilation[0]}{self.dilation[1]}-{self.reason}"
        ).replace(" ", "_")


DEPTHWISE = [
    Depthwise(2, 96, 14, 14, 7, 7, padding=(3, 3), reason="ConvNeXt-T, stage 1, smaller map"),
    Depthwise(1, 33, 7, 7, 7, 7, padding=(3, 3), bias=False, reason="map as wide as the kernel"),
    Depthwise(3, 17, 5, 11, 7, 7, padding=(3, 3), reason="H smaller than K, primes"),
    Depthwise(2, 7, 1, 1, 7, 7, padding=(3, 3), reason="one pixel"),
    Depthwise(2, 1, 13, 6, 3, 3, padding=(1, 1), reason="one channel: ambiguous strides"),
    Depthwise(1, 3, 9, 8, 5, 5, padding=(4, 4), reason="padding of K-1: map grows"),
    Depthwise(2, 31, 12, 10, 9, 9, reason="no padding: map shrinks"),
    Depthwise(1, 40, 8, 23, 1, 11, padding=(0, 5), reason="row kernel"),
    Depthwise(1, 40, 23, 8, 11, 1, padding=(5, 0), reason="column kernel"),
    Depthwise(2, 5, 16, 9, 3, 7, padding=(0, 3), reason="rectangular kernel, padding in one direction"),
    Depthwise(1, 6, 33, 35, 31, 31, padding=(15, 15), bias=False, reason="RepLKNet"),
    Depthwise(2, 12, 15, 14, 7, 7, (2, 2), (3, 3), reason="stride of a downsampling layer"),
    Depthwise(2, 12, 15, 14, 5, 3, (3, 1), (2, 0), reason="stride larger in rows, columns cut off"),
    Depthwise(1, 9, 20, 21, 7, 7, (1, 1), (9, 9), (3, 3), reason="dilation of VAN"),
    Depthwise(1, 8, 17, 18, 3, 5, (2, 3), (2, 4), (2, 3), reason="stride, padding and dilation all differ"),
    Depthwise(2, 10, 8, 9, 4, 2, padding=(2, 1), reason="even kernel"),
    Depthwise(1, 255, 6, 5, 3, 3, padding=(1, 1), reason="many channels, not a power of two"),
    Depthwise(1, 1023, 3, 4, 3, 3, padding=(1, 1), reason="most channels"),
    Depthwise(2, 129, 4, 4, 1, 1, reason="one tap"),
    Depthwise(2, 97, 5, 3, 5, 5, padding=(2, 2), reason="one channel more than a multiple of 32"),
    Depthwise(1, 192, 7, 6, 7, 7, padding=(3, 3), reason="ConvNeXt-T, stage 2, smaller map"),
    Depthwise(1, 768, 3, 4, 7, 7, padding=(3, 3), bias=False, reason="ConvNeXt-T, stage 4, smaller map"),
]

EMPTY_MAPS = [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (2, 0, 5, 6), (0, 0, 0, 0)]

CHANNELS = [1, 3, 7, 17, 31, 33, 40, 96, 97, 129, 192, 255, 768, 1023]
MEANS = [0.0, 1.0, 10.0, 100.0]


# What the depthwise kernels are run on: a cover, not the cross product. What has to meet what is said in MEETINGS; a
# greedy search with a fixed seed finds few and cheap cases in which it does.

DTYPES = ["fp32", "bf16", "fp16"]
KERNELS = [*itertools.product((1, 3, 5, 7, 9), repeat=2), (1, 11), (11, 1)]
HEIGHTS = [1, 2, 3, 5, 7, 8, 11, 13, 14]
WIDTHS = [1, 2, 3, 5, 7, 8, 11, 12, 13, 14, 16]
LAYOUTS = [
    "contiguous", "channels_last", "channels_last_slice", "contiguous_slice", "every_other", "storage_offset",
    "transposed", "channels_last_offset", "expanded",
]  # fmt: skip
WEIGHT_LAYOUTS = ["contiguous", "channels_last", "transposed", "slice", "expanded"]
BIAS_LAYOUTS = ["none", "contiguous", "slice", "expanded"]
# How maps are cut up: not at all, which is what the interpreter is given otherwise; as for sm_90; or into so many rows,
# and, for the weight's gradient, images, per program.
CUTS = {"whole": None, "sm_90": None, "2 rows": (2, 1), "4 rows, 2 images": (4, 2)}
ORDERS = ["forward", "reverse", "shuffled"]


class Part(NamedTuple):
    """One launch of a case: the kernel, and into how much the work is cut."""

    choice: config.Choice
    strips: int
    chunks: int
    groups: int
    programs: int


class KernelCase(NamedTuple):
    """One convolution on the kernels: its sizes, and how its tensors lie in memory."""

    dtype: str
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    ph: int
    pw: int
    x: str = "channels_last"
    dy: str = "channels_last"
    weight: str = "contiguous"
    bias: str = "contiguous"
    offset: int = 7
    cut: str = "whole"
    order: str = "forward"
    strict: bool = False
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        sizes = f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.kh}x{self.kw}-p{self.ph}{self.pw}-{self.dtype}"
        for letter, pair in (("s", self.stride), ("d", self.dilation)):
            sizes += f"-{letter}{pair[0]}{pair[1]}" * (pair != (1, 1))
        return f"{sizes}-{self.cut}{'-strict' * self.strict}".replace(", ", "_").replace(" ", "_")

    @property
    def same(self) -> bool:
        return (self.ph, self.pw) == tuple(d * (k // 2) for d, k in zip(self.dilation, (self.kh, self.kw), strict=True))

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        """What the public function is told."""
        return {"stride": self.stride, "padding": (self.ph, self.pw), "dilation": self.dilation}

    @property
    def output(self) -> tuple[int, int]:
        sizes = zip((self.h, self.w), (self.ph, self.pw), (self.kh, self.kw), self.stride, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, k, s, d in sizes)

    def parts(self) -> Iterator[Part]:
        """The kernels that compute y, dx, and dw with db, in this order."""
        at = (self.dtype, self.kh, self.kw, self.same)
        blocks, arch = -(-self.c // config.BLOCK_C), 90 if self.cut == "sm_90" else 0
        spread = config.dilation_of(self.kh, self.kw, self.dilation)
        (oh, ow), tall = self.output, math.ceil(self.kh / self.stride[0])
        if self.stride == (1, 1):
            maps = [
                (*size, config.pick_forward(*at, size[1], self.strict, spread)) for size in ((oh, ow), (self.h, self.w))
            ]
            weight, high = config.pick_backward_weight(*at, ow, self.strict, spread), math.ceil(self.h / spread[0])
        else:
            *choices, weight = config.pick_strided(self.stride)
            of_dx = ((self.h, self.w)[k] - 1 + (self.ph, self.pw)[k] for k in range(2))
            of_dx = [last // s + 1 - p // s for last, s, p in zip(of_dx, self.stride, (self.ph, self.pw), strict=True)]
            maps = [(*size, choice) for size, choice in zip(((oh, ow), of_dx), choices, strict=True)]
            high = oh + tall - 1
        for h, w, choice in maps:
            columns, h = self.n * choice.strips(w) * choice.phases * blocks, math.ceil(h / choice.dilation[0])
            rows = (CUTS[self.cut] or [config.rows_per_program(arch, columns, h, tall)])[0]
            yield Part(choice, choice.strips(w), math.ceil(h / rows), self.n, columns * math.ceil(h / rows))
        columns = weight.strips(ow) * weight.phases * weight.groups(self.kh) * blocks
        cut = CUTS[self.cut] or config.cut_backward_weight(arch, columns, self.n, high, tall)[::-1]
        chunks, groups = math.ceil(high / cut[0]), math.ceil(self.n / cut[1])
        yield Part(weight, weight.strips(ow), chunks, groups, columns * chunks * groups)

    def seconds(self) -> float:
        """About what the three passes take in the interpreter."""
        milliseconds = (self.kh * self.kw + 1) * (3.8 * math.ceil(self.c / 128) + 1.7 * math.ceil(self.c / 32))
        for part, h in zip(self.parts(), (self.output[0], self.h, self.h), strict=True):
            rows = part.programs * (min(self.h, math.ceil(h / (part.chunks * self.dilation[0])) + self.kh - 1))
            products = part.choice.block_w * self.kh * self.kw / part.choice.groups(self.kh)
            milliseconds += 9 * part.programs + rows * (1.4 + 0.045 * products)
        return milliseconds / 1000


# What has to meet: fields of a case, or of one of its kernels, in every combination of their values that there is.
MEETINGS = [
    *(
        (field, "dtype")
        for field in (
            "n", "c", "h", "w", "kh", "kw", "x", "dy", "weight", "bias", "cut", "order", "choice",
            "h < kh", "w < kw", "whole blocks",
        )
    ),
    ("offset",),
    ("kernel", "same"),
    ("kernel", "choice"),
    ("kh", "ph"),
    ("kw", "pw"),
    ("w", "same"),
    *(("choice", field) for field in ("h is odd", "strips", "chunks", "groups", "whole blocks", "n > 1")),
    ("kh", "same", "chunks"),
    ("kw", "same", "strips"),
]  # fmt: skip


def _values(case: KernelCase) -> Iterator[dict[str, object]]:
    """What MEETINGS names, once for each of the kernels that a case runs."""
    fields = case._asdict()
    fields["kernel"] = (case.kh, case.kw)
    fields["same"] = case.same
    fields["whole blocks"] = case.c % config.BLOCK_C == 0
    fields["h < kh"], fields["w < kw"] = case.h < case.kh, case.w < case.kw
    fields["h is odd"], fields["n > 1"] = case.h % 2, case.n > 1
    for part in case.parts():
        choice = part.choice
        fields["choice"] = (choice.kernel, choice.edge, choice.block_w, case.strict, choice.cached)
        fields |= {"strips": min(3, part.strips), "chunks": min(3, part.chunks), "groups": min(2, part.groups)}
        yield fields


def meetings(case: KernelCase) -> set[tuple]:
    """Which values of which fields meet in it."""
    return {(names, *(fields[name] for name in names)) for fields in _values(case) for names in MEETINGS}


def _random_case(dice: random.Random, dtype: str, kh: int, kw: int, same: bool) -> KernelCase:
    channels = CHANNELS if dice.random() < 0.5 else CHANNELS[:6]  # up to 33; a case costs what its blocks of 32 cost
    return KernelCase(
        dtype, dice.choice((1, 2, 3)), dice.choice(channels), dice.choice(HEIGHTS), dice.choice(WIDTHS), kh, kw,
        kh // 2 if same else dice.randrange(kh), kw // 2 if same else dice.randrange(kw), dice.choice(LAYOUTS),
        dice.choice(LAYOUTS), dice.choice(WEIGHT_LAYOUTS), dice.choice(BIAS_LAYOUTS), dice.randrange(1, 16),
        dice.choice(list(CUTS)), dice.choice(ORDERS),
        strict=(kh, kw) == (7, 7) and dtype != "fp32" and dice.random() < 0.5,  # elsewhere, kernels are strict anyway
    )  # fmt: skip


def cover(pool: list[tuple[object, float, set]], overhead: float) -> list:
    """Few cases in which all meets that meets in any: again and again the one with most per second that has not yet.

    Args:
        pool: (case, seconds, what meets in it).
        overhead: seconds that each case costs more.
    """
    found, seen = [], set()
    while pool:
        gains = [len(met - seen) / (overhead + seconds) for _, seconds, met in pool]
        case, _, met = pool[max(range(len(pool)), key=gains.__getitem__)]
        found.append(case)
        seen |= met
        pool = [entry for entry in pool if not entry[2] <= seen]
    return found


@functools.cache
def kernel_cases() -> list[KernelCase]:
    """The cover, from many random cases."""
    dice = random.Random(5)
    kinds = [*itertools.product(DTYPES, KERNELS, (True, False))] * 32
    kinds += [*itertools.product(DTYPES[1:], [(7, 7)], [True])] * 600  # which have kernels of their own
    pool = [_random_case(dice, dtype, *kernel, same) for dtype, kernel, same in kinds]
    pool = [(case, case.seconds(), meetings(case)) for case in pool if min(case.output) > 0 and case.seconds() < 3]
    return cover(pool, overhead=0.3)


# Beyond odd kernels up to 9×9 without stride and dilation: (KH, KW, stride, dilation).
ONE = (1, 1)
DILATED = [
    (7, 7, ONE, (3, 3)), (7, 7, ONE, (2, 2)), (7, 7, ONE, (2, 1)), (3, 5, ONE, (2, 3)), (5, 3, ONE, (1, 2)),
    (9, 1, ONE, (3, 1)), (1, 5, ONE, (3, 2)), (3, 11, ONE, (2, 2)),
]  # fmt: skip
LARGE = [
    *((k, k, ONE, ONE) for k in (11, 13, 15, 17)), (13, 5, ONE, ONE), (11, 3, ONE, ONE), (5, 13, ONE, ONE),
    (17, 5, ONE, ONE), (3, 17, ONE, ONE), (1, 51, ONE, ONE), (51, 1, ONE, ONE), (31, 1, ONE, ONE),
]  # fmt: skip
STRIDED = [
    (3, 3, (2, 2), ONE), (5, 5, (2, 2), ONE), (7, 7, (2, 2), ONE), (9, 9, (2, 2), ONE), (1, 1, (2, 2), ONE),
    (7, 3, (2, 1), ONE), (3, 9, (1, 2), ONE), (1, 7, (2, 2), ONE),
]  # fmt: skip
GEOMETRIES = [*DILATED, *LARGE, *STRIDED]
GEOMETRY_MEETINGS = [
    ("geometry",), ("choice",),
    *(("kernel", "kind", field) for field in ("dtype", "edge")),
    *(("kernel", field) for field in ("strips", "chunks", "groups", "whole blocks", "n > 1", "cached")),
    *(("kind", field) for field in ("same", "h is odd", "h < kh", "w < kw", "in phase", "uneven")),
    ("x",), ("dy",), ("weight",), ("bias",), ("c",), ("order",),
]  # fmt: skip


def geometry_meetings(case: KernelCase) -> set[tuple]:
    met = set()
    (sh, sw), (dh, dw) = case.stride, case.dilation
    for fields in _values(case):
        # Strided, dilated, large.
        fields["kind"] = (max(case.stride) > 1, max(case.dilation) > 1, max(case.kh, case.kw) > 9)
        fields["kernel"], fields["edge"], _, _, fields["cached"] = fields["choice"]
        fields["geometry"] = (case.kh, case.kw, case.stride, case.dilation)
        # Phases of a dilation may have other sizes, and begin elsewhere in x than in y; and so do those of a stride.
        fields["uneven"] = (case.h % max(dh, sh) != 0, case.w % max(dw, sw) != 0)
        fields["in phase"] = (case.ph % max(dh, sh) == 0, case.pw % max(dw, sw) == 0)
        met |= {(names, *(fields[name] for name in names)) for names in GEOMETRY_MEETINGS}
    return met


def _random_geometry(dice: random.Random, dtype: str, kh: int, kw: int, stride: tuple, dilation: tuple) -> KernelCase:
    same, narrow = dice.random() < 0.6, (1, 2, 3, 5, 7, 8, 11, 13)
    widths = (*narrow, *(size * dilation[1] for size in (7, 8, 14)), 7 * dilation[1] + 1, 15 * dilation[1] - 1)
    paddings = [
        d * (k // 2) if same else dice.randrange(d * (k - 1) + 1)
        for k, d in zip((kh, kw), dilation, strict=True)
    ]  # fmt: skip
    return KernelCase(
        dtype, dice.choice((1, 2, 3)), dice.choice((1, 3, 7, 31, 32, 33)), dice.choice(HEIGHTS), dice.choice(widths),
        kh, kw, *paddings, dice.choice(LAYOUTS), dice.choice(LAYOUTS), dice.choice(WEIGHT_LAYOUTS),
        dice.choice(BIAS_LAYOUTS), dice.randrange(1, 16), dice.choice(list(CUTS)), dice.choice(ORDERS),
        (kh, kw) == (7, 7) and stride == ONE and dtype != "fp32" and dice.random() < 0.4, stride, dilation,
    )  # fmt: skip


@functools.cache
def geometry_cases() -> list[KernelCase]:
    """The cover of GEOMETRIES."""
    dice = random.Random(7)
    pool = [_random_geometry(dice, dtype, *g) for g in GEOMETRIES for dtype in DTYPES * 60]
    pool = [(case, case.seconds(), geometry_meetings(case)) for case in pool if min(case.output) > 0]
    return cover([entry for entry in pool if entry[1] < 2], overhead=0.1)
