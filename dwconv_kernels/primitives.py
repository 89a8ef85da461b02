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
def times(a, b):
    """a·b, in fp32, for a sum over threads: rounded, and never fused with what it is added to.

    Shuffles give all threads of a warp the same sum only if each adds the same numbers. Where a thread has one product,
    the compiler would fuse it with the addition of another thread's, and the last bits of the sum would depend on who
    is asked.
    """
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
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


@triton.jit
def fnma(a, b, c):
    """c − a·b; written out as `fma` is, and because a minus in front of an operand is an instruction of its own."""
    if INTERPRETED:
        return c - a * b
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 n; neg.f32 n, $1; fma.rn.f32 $0, n, $2, $3; }",
            "=f,f,f,f",
            [a, b, c],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _distance(u):
    """min(|u|/32, 1), one FMUL.SAT; the absolute value is free only within the same piece of PTX. NaN may become 0."""
    if INTERPRETED:
        return tl.minimum(tl.abs(u) * 0.03125, 1.0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 m; abs.f32 m, $1; mul.rn.sat.f32 $0, m, 0f3D000000; }",
            "=f,f",
            [u],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


# GELU in half precision, with one exponential and no division. t = |u|, divided by 32 in the code of gelu:
#     gelu(u) = max(u, 0) − t·Φ(−t),    Φ(−t) ≈ exp2(P(t));
#     gelu'(u) = D(t) for u ≤ 0, 1 − D(t) for u > 0,    D(t) = Φ(−t) − t·φ(t) ≈ exp2((q₂·t + q₁)·t)·R(t).
# All coefficients minimise the largest error in ulps over the finite patterns of the type for which the result is more
# than an underflow: a least-squares fit, then linear programs for the largest error, linearised around the last
# coefficients, then, where it paid (gelu in bf16, gelu' in fp16), random steps of a few ulps with the roundings of fp32
# in the error. t is clamped where Φ(−t) is 0 in the type, as infinity times exp2(−infinity) would be NaN.
# exp2 is MUFU.EX2 on a GPU, whose relative error of 2^-22 does not matter here, and which gives 0 for what is below
# 2^-126. Only bf16 goes there; the factors 2^5 and 2^24 in its exponentials keep most of what it would lose.


@triton.jit
def gelu(u, TYPE: tl.constexpr):
    """u·Φ(u), in fp32, of u in fp32; to be rounded once, to TYPE.

    Half types: less than 1/4 ulp of TYPE from the exact GELU, for any u that is a value of TYPE; for bf16 and u ≤ −13,
    where |gelu| < 8e-38, the error is below 4e-39 instead. fp32: as exact as `tl.erf` lets Φ be, which in the left tail
    loses all digits. gelu(∞) = ∞, gelu(−∞) = 0, NaN stays NaN.
    """
    if TYPE.is_fp32():
        return tl.where(u == float("-inf"), 0.0, 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476)))
    positive = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    t = _distance(u)
    if TYPE.is_fp16():
        p = fma(t, -11097.1631, 6213.93213)
        p = fma(p, t, -1591.61951)
        p = fma(p, t, -474.771576)
        p = fma(p, t, -36.7820015)
        p = fma(p, t, 3.99990344)
    else:
        # Squares make P of degree 13 with the instructions of a general polynomial of degree 6, whose best error is
        # more than 1/4 ulp; one more instruction, for degree 7, would be the eleventh.
        q = fma(t, -1.35102212, 1.42809832)
        q = fnma(q, q, 0.997831225)
        p = fnma(q, q, -8.58644867)
        p = fma(p, q, -15.4523745)
        p = fnma(p, p, -7.46762037)
        p = fma(p, t, 3.99864721)
    return fnma(t, tl.exp2(p), positive)


@triton.jit
def gelu_derivative(u, TYPE: tl.constexpr):
    """Φ(u) + u·φ(u), the derivative of `gelu`, in fp32, of u in fp32; to be rounded once, to TYPE.

    Half types: less than 1/4 ulp of TYPE from the exact derivative, for any u that is a value of TYPE. fp32: as exact
    as `tl.erf` lets Φ be. 1 at ∞, 0 at −∞, NaN stays NaN.
    """
    t = tl.minimum(tl.abs(u), 16.0, propagate_nan=tl.PropagateNan.ALL)
    if TYPE.is_fp32():
        density = 0.3989422804014327 * tl.exp(-0.5 * t * t)
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + tl.where(u < 0, -t, t) * density
    if TYPE.is_fp16():
        e = tl.exp2(fma(t, -0.693436801, -0.976711214) * t)
        r = fma(t, -0.00329088839, -0.00728083355)
        r = fma(r, t, -0.10892681)
        r = fma(r, t, -0.186448351)
        r = fma(r, t, -0.459190637)
        r = fma(r, t, 0.499994159)
    else:
        e = tl.exp2(fma(fma(t, -0.702871323, -0.697085559), t, 24.0))
        r = fma(t, 4.13288414e-12, -8.94062879e-11)
        r = fma(r, t, 1.98960667e-10)
        r = fma(r, t, -4.54304017e-09)
        r = fma(r, t, -5.42316014e-09)
        r = fma(r, t, -3.304676e-08)
        r = fma(r, t, 2.97969116e-08)
    return tl.where(u > 0, fnma(e, r, 1.0), e * r)
