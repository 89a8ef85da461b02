"""Sizes and layouts that layer norm + linear (+ GELU) is run on: a cover, as for the convolution in cases.py."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from dwconv_kernels.norm_linear import config
from tests.cases import CHANNELS, DTYPES, MEANS, ORDERS, cover

# Beside the channels that every operator meets: powers of two, with which dx is exact on integers too, and wide rows
# that are whole vectors, but not whole steps.
WIDTHS = [*CHANNELS, 16, 64, 200, 256]
OUTPUTS = [1, 5, 33, 64, 130, 200, 384, 1000]
# Leading shapes; the rows are 1, 2, 5, 127, 128, 129 and 300 of them.
SHAPES = [(), (2,), (1, 5), (127,), (2, 8, 8), (129,), (3, 100)]
LAYOUTS = ["contiguous", "offset", "slice", "expanded", "channels_first", "every_other"]
PARAMETER_LAYOUTS = ["contiguous", "offset", "transposed", "slice"]
GIVEN = [(True, True, True), (False, False, False), (True, False, True), (False, True, True), (True, True, False)]
ARCHS = [0, 80, 89, 90]  # for which of them tiles are chosen


class NormLinearCase(NamedTuple):
    """One call of ``layer_norm_linear`` on the kernels: its sizes, and how its tensors lie in memory."""

    dtype: str  # that is computed in
    shape: tuple[int, ...]  # of x and y, without the last dimension
    c: int
    d: int
    activation: str | None = None
    given: tuple[bool, bool, bool] = (True, True, True)  # γ, β, bias
    x: str = "contiguous"
    dy: str = "contiguous"
    parameters: str = "contiguous"
    offset: int = 7
    mean: float = 0.0
    x_dtype: str | None = None  # under autocast, with parameters in fp32
    arch: int = 0
    few: bool | None = None  # are tiles those for few rows? None: as the arch has it
    group: int = config.PARTS_PER_SUM  # parts of the bias' gradient that are summed before all are
    tf32: bool = False  # tiles only: the interpreter multiplies fp32 as it is
    order: str = "forward"

    def __str__(self) -> str:
        x_dtype = f"-{self.x_dtype} in autocast" * (self.x_dtype is not None)
        few = "" if self.few is None else "-few" if self.few else "-many"
        return (
            f"{'x'.join(map(str, self.shape)) or 'row'}-c{self.c}-d{self.d}-{self.dtype}{x_dtype}-{self.activation}"
            f"-sm{self.arch}{few}{'-tf32' * self.tf32}"
        ).replace(" ", "_")

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def _few(self, n: int) -> bool:
        return config.few_rows(self.rows, n, self.arch) if self.few is None else self.few

    def resident(self) -> bool:
        return config.resident(self.dtype, self.c, self.d, self.arch) is not None

    def tiles(self) -> dict[str, Hashable]:
        """What config.py chooses: of the forward kernel, of du, of dx and of the weight's gradient."""
        at = (self.dtype, self.arch)
        y = config.resident(self.dtype, self.c, self.d, self.arch)
        by_outputs = config.product(at[0], self.c, self.d, at[1], self._few(self.d), self.tf32)
        by_channels = config.product(at[0], self.d, self.c, at[1], self._few(self.c), self.tf32)
        whole = config.whole_rows(self.c, self.arch, self.tf32)
        return {
            "y": by_outputs if y is None else (y, config.split(self.c)[1] > 0),
            "du": by_outputs,
            "dx": (config.widened(by_channels, self.c) if whole else by_channels, whole),
            "dw": config.weight_gradient(at[0], self.c, self.d, at[1]),
        }

    def sums_twice(self) -> bool:
        """Is the bias' gradient summed in two stages?"""
        return -(-self.rows // self.tiles()["du"].m) > self.group

    def steps(self) -> int:
        """Blocks of products that the three large kernels make of it, together."""
        p, tiles = self.rows, self.tiles()
        du, (dx, whole), dw = tiles["du"], tiles["dx"], tiles["dw"]
        steps = -(-p // dx.m) * -(-self.c // dx.n) * -(-self.d // dx.k)
        steps += -(-p // dw.k) * -(-self.d // dw.m) * -(-self.c // dw.n)
        if self.resident():
            steps += -(-p // tiles["y"][0].m) * -(-self.d // tiles["y"][0].n)
        recomputed = self.activation is not None or not whole
        return steps + (recomputed + (not self.resident())) * (-(-p // du.m) * -(-self.d // du.n) * -(-self.c // du.k))

    def seconds(self) -> float:
        """About what both passes take in the interpreter."""
        small = -(-self.d // 32) * -(-self.c // 32) + -(-self.d // 16)  # programs of the kernels that take no blocks
        return 0.05 + 0.001 * self.steps() + 0.002 * small + 4e-9 * self.rows * self.c * self.d


# What has to meet: fields of a case, in every combination of their values that there is.
MEETINGS = [
    *(
        (field, "dtype")
        for field in (
            "shape", "c", "d", "activation", "given", "x", "dy", "parameters", "mean", "arch", "few", "order",
            "x_dtype", "y", "du", "dx", "dw", "whole outputs", "sums twice",
        )
    ),
    ("offset",),
    ("tf32",),
    ("given", "activation"),
    *((kernel, field) for kernel in ("y", "du", "dx") for field in ("activation", "whole rows")),
    ("y", "whole outputs"),
    ("dx", "whole channels"),
    ("dw", "whole channels"),
]  # fmt: skip


def meetings(case: NormLinearCase) -> set[tuple]:
    """Which values of which fields meet in it."""
    fields = case._asdict() | case.tiles()
    fields["whole rows"], fields["whole outputs"] = case.rows % 128 == 0, case.d % 64 == 0
    fields["whole channels"], fields["sums twice"] = case.c % 64 == 0, case.sums_twice()
    return {(names, *(fields[name] for name in names)) for names in MEETINGS}


def _random_case(dice: random.Random, dtype: str) -> NormLinearCase:
    return NormLinearCase(
        dtype, dice.choice(SHAPES), dice.choice(WIDTHS), dice.choice(OUTPUTS), dice.choice((None, "gelu")),
        dice.choice(GIVEN), dice.choice(LAYOUTS), dice.choice(LAYOUTS), dice.choice(PARAMETER_LAYOUTS),
        dice.randrange(1, 16), dice.choice(MEANS),
        None if dtype == "fp32" else dice.choice((None, None, "fp32", dtype)), dice.choice(ARCHS),
        dice.choice((None, True, False)), dice.choice((config.PARTS_PER_SUM, 1, 2)),
        dtype == "fp32" and dice.random() < 0.4,
        dice.choice(ORDERS),
    )  # fmt: skip


@functools.cache
def norm_linear_cases() -> list[NormLinearCase]:
    """The cover, from many random cases."""
    dice = random.Random(5)
    pool = [_random_case(dice, DTYPES[i % 3]) for i in range(4500)]
    pool = [(case, case.seconds(), meetings(case)) for case in pool if case.seconds() < 0.8]
    return cover(pool, overhead=0.1)


def choices() -> Iterator[tuple[str, str, Hashable]]:
    """(dtype, kernel, choice) of everything that config.py chooses for any sizes up to those of the cover."""
    channels = [*range(1, 300), 384, 768, 1000, 1023, 1024]
    for dtype in DTYPES:
        for c in channels:
            for d in OUTPUTS:
                for arch in ARCHS:
                    for few in (False, True):
                        for tf32 in {False, dtype == "fp32"}:
                            case = NormLinearCase(dtype, (129,), c, d, arch=arch, few=few, tf32=tf32)
                            for kernel, choice in case.tiles().items():
                                yield dtype, kernel, choice
