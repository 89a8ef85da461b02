"""What the compiled kernels of the ConvNeXt block cost, read from their machine code: no GPU needed.

``python -m benchmarks.block_code [--all]``, or ``--time`` for `block_time`

For every kernel that a block's forward and backward pass launch behind the convolution (whose kernels are
`machine_code`'s): registers, spills, shared memory, how many programs a multiprocessor holds, seconds to compile, and
of each loop the products of matrices and the waits for them. Exits with 1 where a limit of :data:`products.LIMITS` is
broken.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import products
from benchmarks.launches import Launch, captured
from benchmarks.products import DTYPES
from dwconv_kernels.block import config, launch
from dwconv_kernels.block.reference import Parameters

CHANNELS = (96, 128, 192, 384, 768)
# The widths of ConvNeXt, and odd ones: of less than a tile, not a multiple of anything.
ALL_CHANNELS = (40, 48, 64, 80, 96, 97, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536)
# Images of 8×8. Many rows fill 170 multiprocessors, the most that any GPU has; of most rows, each of an H100's gets
# several blocks, and config keeps the weights in shared memory.
IMAGES = {"few": 1, "many": 2 * 170, "most": 2 * 4 * 132}
SIDE = 8


class Call(NamedTuple):
    """A block of C channels and ``d`` hidden ones, forward and backward."""

    dtype: str
    c: int
    d: int
    rows: str = "many"
    row_scale: bool = False
    grn: bool = False
    x_dtype: str | None = None  # where it differs, as under autocast
    memory: str = "default"
    grad: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        words = [self.dtype, f"C={self.c} D={self.d}", f"{self.rows} rows" * (self.rows != "many")]
        words += ["row scale" * self.row_scale, "GRN" * self.grn, self.x_dtype and f"of {self.x_dtype}"]
        words += [self.memory * (self.memory != "default"), "no grad" * (not self.grad), "TF32" * self.tf32]
        return " ".join(filter(None, words))


def parameters(call: Call) -> Parameters:
    """Of a ConvNeXt: V1's have layer scale, V2's GRN. All are empty tensors, of the dtype of x."""
    c, d = call.c, call.d
    shapes = Parameters((c, 1, 7, 7), (c,), (c,), (c,), (d, c), (d,), (c, d), (c,), (c,), (d,), (d,))
    missing = {"layer_scale"} if call.grn else {"grn_weight", "grn_bias"}
    dtype = DTYPES[call.x_dtype or call.dtype]
    return Parameters(*(
        None if name in missing else torch.empty(shape, dtype=dtype) for name, shape in shapes._asdict().items()
    ))  # fmt: skip


def run(call: Call, images: int, side: int) -> None:
    """Both passes; only for a ``captured`` launcher, as the tensors have no values."""
    dtype, x_dtype = DTYPES[call.dtype], DTYPES[call.x_dtype or call.dtype]
    x = torch.empty((images, call.c, side, side), dtype=x_dtype, memory_format=torch.channels_last)
    *before, grn_weight, grn_bias = p = parameters(call)
    row_scale = torch.ones(images, dtype=x_dtype) if call.row_scale else None
    tensors = (x, *before, row_scale, grn_weight, grn_bias)
    memory = call.memory if call.grad else "lean"  # as the public function has it
    out, *saved = launch.block_forward(*tensors, 1e-6, memory, dtype)
    if call.grad:
        launch.block_backward(out, *tensors, *saved, 1e-6, memory, dtype, (True,) * (1 + len(p)))


def launches(call: Call, arch: int) -> list[Launch]:
    """Every kernel but the convolution's, once."""
    with products.tf32(call.tf32), captured(arch) as seen:
        run(call, IMAGES[call.rows], SIDE)
    return products.once([one for one in seen if not one.kernel.startswith("_depthwise_")])


def calls(dtypes, channels, everything: bool) -> Iterator[Call]:
    """ConvNeXt's, four times as wide inside; with ``everything``, all that changes which kernels run, or how."""
    for dtype, c in itertools.product(dtypes, channels):
        one = Call(dtype, c, 4 * c)
        other = {"tf32": True} if dtype == "fp32" else {"x_dtype": "fp32"}
        sizes = ("many", "most", "few") if c <= config.MAX_RESIDENT_C else ("many", "few")
        yield one
        yield one._replace(rows=sizes[-2], grad=False)
        if everything:
            for rows in sizes:
                yield from (one._replace(rows=rows, **more) for more in ({}, {"row_scale": True}, other))
            yield from (one._replace(memory=memory) for memory in ("lean", "fast"))
            yield from (one._replace(grn=True, **more) for more in ({}, {"rows": "few"}, {"memory": "fast"}))


FAMILY = products.Family(launches, calls, CHANNELS, ALL_CHANNELS)


def main(argv: list[str] | None = None) -> int:
    parser = products.parser("block_code", __doc__)
    parser.add_argument("--time", action="store_true", help="instead, the predicted time of ConvNeXt-T on an H100")
    parser.add_argument("--readme", action="store_true", help="with --time: write it into the README")
    arguments = parser.parse_args(argv)
    if not arguments.time:
        return products.command(FAMILY, arguments)
    if products.interpreted():
        return 2
    from benchmarks import block_time  # which stands on this module

    text = block_time.block(arguments.jobs)
    print(text, end="")
    if arguments.readme:
        block_time.README.write_text(block_time.with_block(block_time.README.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
