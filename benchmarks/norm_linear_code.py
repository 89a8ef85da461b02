"""What the compiled kernels of layer norm + linear cost, read from their machine code: no GPU needed.

``python -m benchmarks.norm_linear_code [--all]``

For every kernel that a forward and a backward pass launch: registers, spills, shared memory, how many programs a
multiprocessor holds, seconds to compile, and of each loop the products of matrices and the waits for them. Exits with 1
where a limit of :data:`products.LIMITS` is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import products
from benchmarks.launches import Launch, captured
from benchmarks.products import DTYPES
from dwconv_kernels.norm_linear import launch

CHANNELS = (96, 192, 384)
# The widths of ConvNeXt, and odd ones: rows that are not aligned, one channel.
ALL_CHANNELS = (1, 40, 96, 97, 128, 160, 192, 255, 256, 320, 384, 512, 768, 1023, 1024, 1536, 2048)


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
        words = [self.dtype, f"C={self.c} D={self.d}", "GELU" * self.gelu, "few rows" * self.few, "TF32" * self.tf32]
        return " ".join(filter(None, [*words, self.x_dtype and f"of {self.x_dtype}", "gaps" * bool(self.gap)]))


def launches(call: Call, arch: int, rows: int = 128 * 170) -> list[Launch]:
    """Every kernel of a forward and a backward pass, once; 170 multiprocessors are the most that any GPU has."""
    rows = 64 if call.few else rows
    dtype, x_dtype = DTYPES[call.dtype], DTYPES[call.x_dtype or call.dtype]
    x, dy = torch.empty(rows, call.c + call.gap, dtype=x_dtype)[:, : call.c], torch.empty(rows, call.d, dtype=dtype)
    norm = [torch.empty(call.c, dtype=x_dtype) for _ in range(2)]
    linear = [torch.empty(call.d, call.c, dtype=dtype), torch.empty(call.d, dtype=dtype)]
    activation = "gelu" if call.gelu else None
    with products.tf32(call.tf32), captured(arch) as seen:
        _, mean, rstd = launch.norm_linear_forward(x, *norm, *linear, 1e-6, activation, dtype)
        launch.norm_linear_backward(dy, x, mean, rstd, *norm, *linear, activation, (True,) * 5)
    return products.once(seen)


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


FAMILY = products.Family(launches, calls, CHANNELS, ALL_CHANNELS)


def main(argv: list[str] | None = None) -> int:
    return products.command(FAMILY, products.parser("norm_linear_code", __doc__).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
