"""Convolutions for the kernels on tensor cores: together, every value in each list meets every kernel."""

from __future__ import annotations

import functools
import itertools
import random

from dwconv_kernels.depthwise import config_tensor
from tests.cases import BIAS_LAYOUTS, LAYOUTS, ORDERS, WEIGHT_LAYOUTS, KernelCase

HALF = ("bf16", "fp16")
CUTS = tuple(f"tensor {name}" for name in ("whole", "8 rows", "16 rows, 2 tiles", "3 tiles", "sm_90"))
CHANNELS = (1, 3, 7, 8, 16, 17, 24, 33)

# What the kernels are for, with maps smaller and larger than them: KH, KW, H, W.
SIZES = [
    (7, 7, 9, 13), (7, 7, 7, 7), (7, 7, 1, 1), (7, 7, 5, 33), (7, 7, 20, 14), (9, 9, 11, 10), (5, 5, 6, 19),
    (11, 11, 13, 9), (13, 13, 14, 14), (13, 13, 5, 17), (15, 15, 9, 12), (17, 17, 18, 7), (17, 17, 4, 21),
    (21, 21, 23, 10), (21, 21, 14, 28), (31, 31, 14, 14), (31, 31, 7, 7), (31, 31, 33, 18), (51, 51, 27, 9),
    (51, 51, 9, 9), (51, 5, 30, 9), (5, 51, 7, 60), (1, 51, 5, 70), (51, 1, 60, 5), (31, 7, 17, 11), (7, 31, 11, 17),
    (3, 3, 5, 9), (1, 1, 3, 4), (1, 11, 4, 13), (11, 1, 13, 4), (23, 19, 25, 23), (13, 27, 30, 29),
]  # fmt: skip


def kernel_of(choice) -> str:
    return "large" if isinstance(choice, config_tensor.Large) else "stream"


@functools.cache
def tensor_cases() -> list[KernelCase]:
    """One or more for each of SIZES; dtypes, layouts, numbers of channels, cuts and paddings take turns."""
    dice = random.Random(3)
    turns = [itertools.cycle(dice.sample(list(values), len(values))) for values in (
        HALF, CHANNELS, LAYOUTS, LAYOUTS, WEIGHT_LAYOUTS, BIAS_LAYOUTS, range(1, 16), CUTS, ORDERS,
    )]  # fmt: skip
    cases = []
    for same in (True, False):
        for kh, kw, h, w in SIZES:
            large = kh * kw > 400
            if large and not same:
                continue
            paddings = [k // 2 if same else dice.randrange(k) for k in (kh, kw)]
            if min(h + 2 * paddings[0] - kh, w + 2 * paddings[1] - kw) < 0:
                paddings = [k - 1 for k in (kh, kw)]
            dtype, c, x, dy, weight, bias, offset, cut, order = (next(turn) for turn in turns)
            n = 1 if large else dice.choice((1, 2, 5))
            c = min(c, 9) if large else c
            cases.append(KernelCase(dtype, n, c, h, w, kh, kw, *paddings, x, dy, weight, bias, offset, cut, order))
    return cases
