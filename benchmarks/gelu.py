"""What GELU costs and how wrong it is, without a GPU. ``python -m benchmarks.gelu [--readme]``

Two tables in Markdown, of ``gelu`` and ``gelu_derivative`` in ``dwconv_kernels/primitives.py``; ``--readme`` writes
them into dwconv_kernels/norm_linear/README.md.

Instructions per element: a kernel that loads, applies the primitive and stores is compiled (see ``benchmarks.cubin``),
and so is one that only loads and stores. What the first has more of, but for constants that are moved into registers
once, divided by the elements of a thread. Few elements show what the primitive is made of; with many, ptxas may
compute something twice to save a register. In fp32, where ``tl.erf`` branches, constants are loaded for each element
and count.

Errors are those of the kernels' own source in Triton's interpreter, in a process of its own, on all 65536 patterns, and
before the result is rounded. MUFU.EX2 is taken to flush what is below 2^-126, as it does; its error of 2^-22 is not
modelled: it is 2^-12 (fp16) or 2^-15 (bf16) of an ulp at the most.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks import cubin
from dwconv_kernels import primitives
from dwconv_kernels.norm_linear import reference

ARCHS = (80, 89, 90)
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FUNCTIONS = {"gelu": reference.gelu, "gelu_derivative": reference.gelu_derivative}
FEW, MANY = 4, 16  # elements of a thread

ROOT = Path(__file__).parents[1]
README = ROOT / "dwconv_kernels" / "norm_linear" / "README.md"
BEGIN, END = "<!-- gelu:begin -->\n", "<!-- gelu:end -->"


@triton.jit
def apply_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + offs)
    if FUNCTION == "gelu":
        v = primitives.gelu(v, TYPE)
    elif FUNCTION == "gelu_derivative":
        v = primitives.gelu_derivative(v, TYPE)
    tl.store(y_ptr + offs, v)


@functools.cache
def opcodes(function: str | None, dtype: str, arch: int, elements: int) -> Counter:
    """The instructions of a kernel whose one warp applies a function, None for none, to ``elements`` per lane."""
    constants = {"FUNCTION": function, "TYPE": TYPES[dtype], "BLOCK": 32 * elements}
    source = cubin.source(apply_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, constants)
    return Counter(i.opcode for i in cubin.compile_for(source, arch, {"num_warps": 1}).program.instructions)


def instructions(function: str, dtype: str, arch: int, elements: int) -> dict[str, float]:
    """How many of each a function takes per element."""
    more = opcodes(function, dtype, arch, elements).copy()
    more.subtract(opcodes(None, "fp32", arch, elements))
    constants = () if dtype == "fp32" else ("MOV", "IMAD.MOV", "HFMA2.MMA", "HFMA2")
    other = ("NOP", "LD", "ST", "ULD", "S2", "IMAD.WIDE", "IADD3", "LEA", "BRA", "EXIT")
    return {
        name: count / elements for name, count in more.items() if count > 0 and not name.startswith(constants + other)
    }


def patterns(dtype: str) -> torch.Tensor:
    """All 65536 values of a type, in fp32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(DTYPES[dtype]).float()


def ulp(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance of the neighbours of a type at float64 values, subnormal ones included."""
    info = torch.finfo(DTYPES[dtype])
    _, exponent = torch.frexp(value.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


@contextlib.contextmanager
def flushing():
    """In here, the interpreter's exp2 gives 0 for what is below 2^-126, as MUFU.EX2 does."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    kept = builder.create_exp2

    def flushed(v):
        power = 2**v  # NumPy's, in the precision of v
        return power * (power >= 2.0**-126)

    builder.create_exp2 = lambda self, arg: self.unary_op(arg, flushed)
    try:
        yield
    finally:
        builder.create_exp2 = kept


def applied(function: str, dtype: str, x: torch.Tensor) -> torch.Tensor:
    """A function of x (a multiple of 8192 fp32 values), before it is rounded; needs ``TRITON_INTERPRET=1``."""
    y = torch.empty_like(x)
    with flushing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, of infinities and NaN
        apply_kernel[(x.numel() // 8192,)](x, y, FUNCTION=function, TYPE=TYPES[dtype], BLOCK=8192)
    return y


def errors(function: str, dtype: str) -> dict:
    """What is wrong with the values of a function of all patterns; needs ``TRITON_INTERPRET=1``."""
    x = patterns(dtype)
    y = applied(function, dtype, x)
    special = [str(y[x == v].item()) for v in (torch.inf, -torch.inf)] + [str(y[x.isnan()].sum().item())]
    finite = x.isfinite()
    x, y = x[finite], y[finite].double()
    exact = FUNCTIONS[function](x.double())
    error = (y - exact).abs()
    ulps = torch.where(y.isnan(), torch.inf, error / ulp(exact, dtype))
    over = ulps >= 0.25
    at = torch.where(over, -1.0, ulps).argmax()
    found = {"ulps": ulps[at].item(), "at": x[at].item(), "over": int(over.sum()), "special": special}
    if over.any():
        found |= {"from": x[over].min().item(), "to": x[over].max().item(), "error": error[over].max().item()}
    return found


def interpreted() -> dict[str, dict]:
    """The errors of all functions and half types, by a process that has the interpreter."""
    command = [sys.executable, "-m", "benchmarks.gelu", "--errors"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def counts_table() -> list[str]:
    rows = ["| instructions per element | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " | of these |"]
    rows.append("|---|" + "---|" * (len(ARCHS) + 1))
    for function in FUNCTIONS:
        for dtype in TYPES:
            half = dtype in DTYPES
            few = [instructions(function, dtype, arch, FEW) for arch in ARCHS]
            cells = [f"{sum(parts.values()):.3g}" for parts in few]
            if half:
                many = [instructions(function, dtype, arch, MANY) for arch in ARCHS]
                cells = [f"{cell} ({sum(parts.values()):.3g})" for cell, parts in zip(cells, many, strict=True)]
            made_of = sorted(few[-1].items(), key=lambda item: -item[1])
            parts = ", ".join(f"{n:.3g} {name}" for name, n in made_of) if half else "with `tl.erf`"
            rows.append(f"| `{function}`, {dtype} | " + " | ".join(cells) + f" | {parts} |")
    return rows


def errors_table(found: dict[str, dict]) -> list[str]:
    rows = [
        "| error before rounding, all patterns | largest, ulp | 1/4 ulp and more | at ∞, −∞, NaN |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        over = "none"
        if row["over"]:
            over = f"{row['over']}: {row['from']:g} ≤ u ≤ {row['to']:g}, error ≤ {row['error']:.0e}"
        special = ", ".join(row["special"]).replace("inf", "∞").replace("-", "−")
        rows.append(f"| {name} | {row['ulps']:.3f} at {row['at']:.5g} | {over} | {special} |")
    return rows


def block() -> str:
    """What goes between the markers of the README."""
    caption = f"`python -m benchmarks.gelu`, Triton {triton.__version__}; {FEW} elements per thread ({MANY}):"
    return "\n".join([caption, "", *counts_table(), "", *errors_table(interpreted()), ""])


def with_block(text: str, block: str, begin: str = BEGIN, end: str = END, readme: Path = README) -> str:
    """The README with this block between its markers."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} needs one line {begin.strip()}, and one line {end.strip()} after it")
    return text[: text.index(begin) + len(begin)] + block + text[text.index(end) :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gelu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--readme", action="store_true", help="write the tables into the README")
    parser.add_argument("--errors", action="store_true", help="only the errors, as JSON; needs TRITON_INTERPRET=1")
    arguments = parser.parse_args(argv)
    if arguments.errors != bool(triton.knobs.runtime.interpret):
        print("TRITON_INTERPRET=1 must be set for --errors, and for nothing else", file=sys.stderr)
        return 2
    if arguments.errors:
        print(json.dumps({f"`{f}`, {dtype}": errors(f, dtype) for f in FUNCTIONS for dtype in DTYPES}))
        return 0
    text = block()
    print(text, end="")
    if arguments.readme:
        README.write_text(with_block(README.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
