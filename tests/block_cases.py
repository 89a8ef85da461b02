"""Sizes, options and layouts that the block is run on: a cover, as for the convolution in cases.py."""

from __future__ import annotations

import functools
import random
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from dwconv_kernels.block import config
from dwconv_kernels.block.reference import keeps_u
from dwconv_kernels.norm_linear import config as norm_linear
from tests.cases import CHANNELS, DTYPES, LAYOUTS, ORDERS, KernelCase, cover

# Beside the channels that every operator meets: those of ConvNeXt, and powers of two, with which dy is exact.
WIDTHS = [*CHANNELS, 16, 64, 128, 200, 256]
HIDDEN = [1, 5, 32, 33, 64, 128, 130, 200, 384, 1000]  # and 4·C
# Images, rows and columns: 1 to 147 pixels; smaller than the kernels, prime, not square; blocks of rows in two images.
MAPS = [(1, 1, 1), (2, 1, 1), (3, 1, 5), (1, 5, 2), (3, 2, 3), (2, 5, 7), (2, 8, 8), (3, 7, 7), (5, 3, 9)]
KERNELS = [(1, 1), (3, 3), (7, 7), (5, 3), (1, 11)]
PARAMETER_LAYOUTS = ["contiguous", "offset", "transposed", "slice"]
ARCHS = [0, 80, 89, 90]  # for which of them tiles are chosen
# Of the norm: weight, bias. Of biases: the convolution's, the first and the second linear layer's.
NORMS = [(True, True), (False, False), (True, False), (False, True)]
BIASES = [(True, True, True), (False, True, False), (True, True, False), (False, True, True)]


class BlockCase(NamedTuple):
    """One call of ``convnext_block`` on the kernels: its sizes, and how its tensors lie in memory."""

    dtype: str  # that is computed in
    n: int
    c: int
    h: int
    w: int
    d: int
    kh: int = 3
    kw: int = 3
    layer_scale: bool = True
    row_scale: bool = False
    grn: bool = False
    norm: tuple[bool, bool] = (True, True)
    biases: tuple[bool, bool, bool] = (True, True, True)
    memory: str = "default"
    x: str = "channels_last"
    dout: str = "channels_last"
    parameters: str = "contiguous"
    offset: int = 7
    x_dtype: str | None = None  # under autocast, with parameters in fp32
    arch: int = 0
    few: bool | None = None  # are tiles those for few rows? None: as the arch has it
    resident: bool = False  # are weights kept in shared memory, however few rows there are?
    tf32: bool = False  # tiles only: the interpreter multiplies fp32 as it is
    order: str = "forward"

    def __str__(self) -> str:
        flags = self.layer_scale, self.row_scale, self.grn, *self.norm, *self.biases
        given = "".join(str(int(flag)) for flag in flags)
        x_dtype = f"-{self.x_dtype}_in_autocast" * (self.x_dtype is not None)
        few = "" if self.few is None else "-few" if self.few else "-many"
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}-d{self.d}-k{self.kh}x{self.kw}-{self.dtype}{x_dtype}-{given}"
            f"-{self.memory}-sm{self.arch}{few}{'-resident' * self.resident}{'-tf32' * self.tf32}"
        )

    @property
    def rows(self) -> int:
        return self.n * self.h * self.w

    @property
    def given_u(self) -> bool:
        return keeps_u(self.memory, self.c)

    def few_blocks(self) -> bool:
        """Of rows, for the kernels of whole rows."""
        return config.few_rows(self.rows, self.arch) if self.few is None else self.few

    def _few(self, outputs: int) -> bool:
        return norm_linear.few_rows(self.rows, outputs, self.arch) if self.few is None else self.few

    def forward(self) -> tuple[Hashable, ...]:
        """The kernel that makes out, its tile, and what else is compiled into it."""
        at = (self.dtype, self.c, self.d, self.arch)
        split = norm_linear.split(self.c)[1] > 0
        if not self.grn and not self.given_u:
            rows = 2**29 if self.resident else self.rows
            if (tile := config.resident(*at, rows)) is not None:
                return "fwd_resident", tile, split
            if (tile := config.fused_forward(*at, self.few_blocks())) is not None:
                return "fwd", tile, split, config.ahead(self.arch)
        return "out", norm_linear.product(self.dtype, self.d, self.c, self.arch, self._few(self.c), self.tf32)

    def backward(self) -> tuple[Hashable, ...]:
        """The kernel that makes h and du, and its tile."""
        if self.grn:
            return "grn_bwd", self.given_u
        at = (self.dtype, self.c, self.d, self.arch)
        tile = None if self.given_u else config.fused_backward(*at, self.few_blocks())
        if tile is not None:
            return "bwd_rows", tile, norm_linear.split(self.c)[1] > 0
        tile = config.hidden(*at, self._few(self.d), self.given_u, self.tf32)
        return "bwd_hidden", tile, self.given_u, self._whole()

    def _whole(self) -> bool:
        return norm_linear.whole_rows(self.c, self.arch, self.tf32)

    def kernels(self) -> list[str]:
        """Those of this family that both passes launch, in their order, if dout begins at a multiple of 16 bytes."""
        forward, backward = self.forward()[0], self.backward()[0]
        return [
            *["grn_sums", "grn_apply"] * self.grn,
            forward,
            *["bwd_gradient"] * (self.row_scale or self.dout_dtype != self.dtype or self.biases[2]),
            "scaled",
            *["grn_sums"] * self.grn,
            backward,
            "bwd_finish",
            *["bwd_scale_sum"] * (self.layer_scale or self.biases[2]),
        ]

    @property
    def dout_dtype(self) -> str:
        """That of out: fp32 where x or λ is."""
        wide = self.x_dtype is not None and (self.x_dtype == "fp32" or self.layer_scale)
        return "fp32" if wide else self.dtype

    def seconds(self) -> float:
        """About what both passes take in the interpreter."""
        convolution = KernelCase(
            self.dtype, self.n, self.c, self.h, self.w, self.kh, self.kw, self.kh // 2, self.kw // 2
        ).seconds()
        tiles = -(-self.c // 64) * -(-self.d // 64)
        blocks = -(-self.rows // 64)
        return 0.15 + 1.3 * convolution + 0.006 * tiles * (3 + blocks) + 8e-9 * self.rows * self.c * self.d


# What has to meet: fields of a case, in every combination of their values that there is.
MEETINGS = [
    *((field, "dtype") for field in ("memory", "arch", "x_dtype", "few", "order")),
    ("forward", "half"),  # tiles know of no more than that
    ("backward", "half"),
    *(
        (kernel, field)
        for kernel in ("forward kernel", "backward kernel")
        for field in (
            "layer_scale", "row_scale", "norm", "biases", "memory", "x_dtype", "whole channels", "whole outputs",
            "two blocks", "whole", "dtype",
        )
    ),
    *((field,) for field in ("c", "map", "d", "kernel", "x", "dout", "parameters", "offset", "tf32")),
    ("grn", "row_scale"),
    ("grn", "dtype"),
]  # fmt: skip


def meetings(case: BlockCase) -> set[tuple]:
    """Which values of which fields meet in it."""
    fields = case._asdict()
    fields["map"], fields["kernel"] = (case.n, case.h, case.w), (case.kh, case.kw)
    fields["forward"], fields["backward"] = case.forward(), case.backward()
    fields["forward kernel"], fields["backward kernel"] = fields["forward"][0], fields["backward"][0]
    fields["whole channels"], fields["whole outputs"] = case.c & (case.c - 1) == 0, case.d % 64 == 0
    fields["half"] = case.dtype != "fp32"
    fields["two blocks"], fields["whole"] = case.rows > 128, case._whole()
    fields["d"] = "4·C" if case.d == 4 * case.c else case.d
    return {(names, *(fields[name] for name in names)) for names in MEETINGS}


def _random_case(dice: random.Random, dtype: str) -> BlockCase:
    # A case costs what its tiles cost: wide ones are few.
    c = dice.choice(WIDTHS if dice.random() < 0.4 else [16, 64, 96, 40, 17, 33, 128])
    n, h, w = dice.choice(MAPS if c < 700 else MAPS[:4])
    kept = dice.random() < 0.2  # u is kept more often than not where it could be computed again
    kh, kw = dice.choice(KERNELS) if c < 700 and dice.random() < 0.3 else dice.choice([(1, 1), (3, 3)])
    d = 4 * c if dice.random() < 0.2 else dice.choice(HIDDEN if c < 700 else HIDDEN[:5])
    return BlockCase(
        dtype, n, c, h, w, d, kh, kw, dice.random() < 0.7,
        dice.random() < 0.5, not kept and dice.random() < 0.25, dice.choice(NORMS), dice.choice(BIASES),
        "fast" if kept else dice.choice(("default", "default", "lean", "fast")), dice.choice(LAYOUTS),
        dice.choice(LAYOUTS), dice.choice(PARAMETER_LAYOUTS), dice.randrange(1, 16),
        None if dtype == "fp32" else dice.choice((None, None, "fp32", dtype)), dice.choice(ARCHS),
        dice.choice((None, True, False, False)), dice.random() < 0.4, dtype == "fp32" and (kept or dice.random() < 0.3),
        dice.choice(ORDERS),
    )  # fmt: skip


MOST_SECONDS = 2.2  # of a case


@functools.cache
def block_cases() -> list[BlockCase]:
    """The cover, from many random cases."""
    dice = random.Random(7)
    pool = [_random_case(dice, DTYPES[i % 3]) for i in range(14000)]
    pool = [(case, case.seconds(), meetings(case)) for case in pool if case.seconds() < MOST_SECONDS]
    return cover(pool, overhead=0.15)


def choices() -> Iterator[tuple[str, Hashable]]:
    """(is it of a half type?, choice) of all kernels and tiles that config.py has, for sizes up to the cover's."""
    channels = [*range(1, 300), 768, 1000, 1023]
    for dtype in DTYPES[:2]:
        for c in channels:
            for d in (*HIDDEN, 4 * c):
                for arch in ARCHS:
                    for few in (False, True):
                        for memory, grn, tf32, resident in _OPTIONS:
                            if tf32 and dtype != "fp32":
                                continue
                            case = BlockCase(
                                dtype, 2, c, 8, 8, d, grn=grn, memory=memory, arch=arch, few=few, tf32=tf32,
                                resident=resident,
                            )  # fmt: skip
                            yield dtype != "fp32", case.forward()
                            yield dtype != "fp32", case.backward()


_OPTIONS = [
    ("default", False, False, False), ("fast", False, False, False), ("default", False, False, True),
    ("default", True, False, False), ("fast", True, False, False), ("default", False, True, False),
    ("fast", False, True, False),
]  # fmt: skip
