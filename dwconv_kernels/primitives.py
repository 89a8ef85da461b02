"""What kernels of several families are made of; any kernels.py may import it, and it imports Triton alone."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# What `widen` multiplies with: a bf16 is the upper half of an fp32, so its bits times 2^16 are that fp32.
KEEP = tl.constexpr(65536)


@triton.jit
def fma(a, b, c):
    # Written out because LLVM packs a·b + c into fma.rn.f32x2 for sm_100, pays a MOV per operand for it, and spills.
    # It also saves registers on sm_90. The interpreter cannot run PTX.
    if INTERPRETED:
        return a * b + c
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def widen(v, keep):
    """v as fp32 where keep is KEEP, 0 where it is 0, whatever v is there (an undefined lane, NaN)."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) * keep).to(tl.float32, bitcast=True)
    else:
        return tl.where(keep != 0, v.to(tl.float32), 0.0)


@triton.jit
def prefetch(pointers, row, H):
    """Brings the sector at each lane's pointer into L2, except in lanes whose row is below the map."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [pointers, row, H],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def repeated(value, count: tl.constexpr):
    values = ()
    for _ in tl.static_range(count):
        values = values + (value,)
    return values


@triton.jit
def take(values, first: tl.constexpr, count: tl.constexpr):
    """The ``count`` values from number ``first`` on; the language has no slices with bounds that are expressions."""
    kept = ()
    for q in tl.static_range(count):
        kept = kept + (values[first + q],)
    return kept


@triton.jit
def plus(a, first_a: tl.constexpr, b, first_b: tl.constexpr, count: tl.constexpr):
    """``a[first_a + q] + b[first_b + q]`` for q < count."""
    sums = ()
    for q in tl.static_range(count):
        sums = sums + (a[first_a + q] + b[first_b + q],)
    return sums
