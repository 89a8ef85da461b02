"""How long the kernels are going to take on an H100, said before one has run them: ``benchmarks/predictions.json``.

``python -m benchmarks.predict [--jobs N]`` writes the file, for the benchmarks' own cases of depthwise convolution
and of the block, in microseconds, from machine code (the models of `tensor_time` and `block_time`, whose rates are an
H100's). `bars` holds them against what was measured. No GPU is needed, and gaps between launches are not counted: the
benchmarks capture these operators in CUDA graphs.

A convolution has one number. A block has two: where everything that a kernel does at once overlaps, and where products
of matrices and other instructions do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton

from benchmarks import block_code, block_time, products, suites, tensor_code, tensor_time
from benchmarks.operators import DTYPES, Case
from benchmarks.predictions import FILE, Key, Prediction
from dwconv_kernels.depthwise import launch

KERNELS = (7, 9, 13, 31)  # those that the bars are about


def cases() -> list[tuple[str, Case]]:
    """(suite, case): ConvNeXt-T's convolutions and blocks in bf16, as the benchmarks have them."""
    maps = list(zip(suites.WIDTHS["T"], suites.MAPS, strict=True))
    convolutions = [
        (suite, Case(suites.OPERATOR_BATCH, c, size, size, "bf16", (k, k)))
        for suite in suites.DEPTHWISE
        for k in KERNELS
        for c, size in maps
    ]
    blocks = [
        (suite, Case(suites.OPERATOR_BATCH, c, size, size, "bf16", (7, 7)))
        for suite in suites.BLOCK
        for c, size in maps
    ]
    return convolutions + blocks


def launched(suite: str, case: Case) -> list[block_time.Launched]:
    """What one call of ours launches."""
    if suite in suites.BLOCK:
        call = block_code.Call(case.dtype, case.c, case.hidden, grad=suite == "block_training")
        with block_time.recorded() as seen:
            block_code.run(call, case.n, case.h)
        return seen
    dtype, (kh, kw) = DTYPES[case.dtype], case.kernel
    shape = case.n, case.c, case.h, case.w
    x, dy = (torch.empty(shape, dtype=dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.empty((case.c, 1, kh, kw), dtype=dtype)
    bias = weight.new_empty(case.c)
    geometry = (1, 1), (kh // 2, kw // 2), (1, 1)
    with block_time.recorded() as seen:
        if suite == "depthwise_forward":
            launch.depthwise_forward(x, weight, bias, *geometry)
        else:
            of_map = suite == "depthwise_input_gradient"
            launch.depthwise_backward(dy, x, weight, bias, *geometry, (of_map, not of_map, not of_map))
    return seen


def of_convolution(case: Case, seen: Iterable[block_time.Launched], programs: dict) -> Prediction:
    """The sum over its launches of what bounds each."""
    outputs = case.pixels * case.c
    what = tensor_code.Case(tensor_code.FORWARD, case.dtype, *case.kernel, c=case.c)  # for its launches' names alone
    ps = sum(
        tensor_time.of_launch(what, one, programs[repr(one.launch)], outputs).predicted
        + tensor_time.of_sum(one, outputs).predicted
        for one in seen
    )
    return Prediction(ps * outputs * 1e-6, ps * outputs * 1e-6)


def of_block(case: Case, seen: Iterable[block_time.Launched], programs: dict) -> Prediction:
    """With and without products beside other instructions; of the convolution's launches as above."""
    low = high = 0.0
    for one in seen:
        if one.launch.kernel.startswith("_depthwise_"):
            alone = of_convolution(case, [one], programs)
            low, high = low + alone.low, high + alone.high
            continue
        line = block_time.of_launch(one, programs[repr(one.launch)], "", "", 1)  # µs per image of BATCH
        low, high = low + line.overlapping * block_time.BATCH, high + line.apart * block_time.BATCH
    return Prediction(low, high)


def predict(some: Iterable[tuple[str, Case]], processes: int = 2) -> dict[Key, Prediction]:
    """(suite, case, dtype) → what is to be expected."""
    seen = {one: launched(*one) for one in some}
    programs = tensor_time.compiled([launch for found in seen.values() for launch in found], processes)
    found = {}
    for (suite, case), launches in seen.items():
        model: Callable = of_block if suite in suites.BLOCK else of_convolution
        found[suite, str(case), case.dtype] = model(case, launches, programs)
    return found


def write(found: dict[Key, Prediction], path: Path = FILE) -> None:
    rows = [
        json.dumps({"suite": s, "case": c, "dtype": d, "low_us": round(p.low, 2), "high_us": round(p.high, 2)},
                   ensure_ascii=False)
        for (s, c, d), p in found.items()
    ]  # fmt: skip
    head = {"gpu": "NVIDIA H100", "by": "python -m benchmarks.predict", "triton": triton.__version__}
    path.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile [%(default)s]")
    arguments = parser.parse_args(argv)
    if products.interpreted():
        return 2
    found = predict(cases(), arguments.jobs)
    write(found)
    for (suite, case, _), one in found.items():
        print(f"{suite:26} {case:28} {one.low:9.1f}" + (f" to {one.high:.1f} µs" if one.high > one.low else " µs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
