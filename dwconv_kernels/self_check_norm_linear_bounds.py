"""What layer norm + linear is in float64, and how far from it roundings may take the kernels.

The formulas and their symbols are those of ``norm_linear/README.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import testing
from .self_check_common import Results

EXACT = testing.UNIT_ROUNDOFF[torch.float32]  # what kernels compute in


class Operands(NamedTuple):
    """x (P, C), the parameters or None, and the gradient of y (P, D)."""

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    dy: Tensor


class Terms(NamedTuple):
    """float64 values within the operator: γ is 1 and β and b are 0 where there are none."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    mean: Tensor
    rstd: Tensor
    normed: Tensor  # x̂
    u: Tensor
    slope: Tensor  # gelu'(u), or 1
    du: Tensor
    g: Tensor


def terms(operands: Operands, gelu: bool, eps: float) -> Terms:
    """Of operands in float64."""
    x, norm_weight, norm_bias, weight, bias, dy = operands
    norm_weight = torch.ones_like(x[0]) if norm_weight is None else norm_weight
    norm_bias = torch.zeros_like(x[0]) if norm_bias is None else norm_bias
    bias = torch.zeros_like(dy[0]) if bias is None else bias
    mean = x.mean(1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(1, keepdim=True) + eps)
    normed = (x - mean) * rstd
    u = F.linear(normed * norm_weight + norm_bias, weight, bias)
    slope = torch.ones_like(u)
    if gelu:
        slope = 0.5 * torch.special.erfc(-u * math.sqrt(0.5)) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    du = dy * slope
    g = du @ weight * norm_weight
    return Terms(x, norm_weight, norm_bias, weight, bias, dy, mean, rstd, normed, u, slope, du, g)


def by_formula(t: Terms, gelu: bool) -> Results:
    """The results, which of integers are exact in float64; those of PyTorch's layer norm are not."""
    means = t.g.mean(1, keepdim=True) + t.normed * (t.g * t.normed).mean(1, keepdim=True)
    sums, db = t.du.t() @ t.normed, t.du.sum(0)
    return {
        "y": F.gelu(t.u) if gelu else t.u,
        "dx": t.rstd * (t.g - means),
        "dγ": (t.weight * sums).sum(0),
        "dβ": db @ t.weight,
        "dW": sums * t.norm_weight + db[:, None] * t.norm_bias,
        "db": db,
    }


def bounds(t: Terms, gelu: bool, dtype: torch.dtype) -> Results:
    """How far results may be from float64 before they are rounded to their dtype.

    With e = 2⁻²⁴, and h the unit roundoff of the half type that is multiplied in (0 in fp32):

    - x̂ is off by (C + 8)·e·X, X = |x̂| + 1 + |μ|·r: its mean by a rounding of μ and by the sum that corrects it, at most
      (C + 3)·e·mean|x − μ| ≤ (C + 3)·e/r; r by half of what a sum of C squares is, and a few operations.
    - Rounded to be multiplied are x̂∘γ + β, of which u is made, and x̂. So u is off by
      U = (h·(|x̂∘γ| + |β|) + (2C + 16)·e·(X∘γ + |β|))·|W|ᵀ + 4e·|b|.
    - |gelu'| ≤ 1.13 and |gelu''| ≤ 0.8: y is off by 1.13·U + h·|y| + 8e·|u|, and du, which is rounded, by
      E = |dy|·(0.8·U + 2h·|gelu'| + 16e). Without GELU, y by U and du by nothing.
    - db is the sum of du's errors, and of P roundings of |du|. G = duᵀ·x̂ is off by
      Σ E·|x̂| + |du|·(h·|x̂| + (P + C + 16)·e·X); dW, dγ and dβ are made of G and db with D + 16 more roundings.
    - g = (du·W)∘γ is off by E' = (E + (D + 4)·e·|du|)·|W∘γ|, where g itself is at most A = |du|·|W∘γ|. Its second mean
      may be made of rounded x̂∘γ + β, less β: with B = |du|·|W∘β|, dx is off by
      r·(E' + mean E' + |x̂|·mean((E' + h·A)·|x̂| + h·B) + (2C + D + 20)·e·(A + mean A + X·mean(A·X + B))).

    Products of two errors are what a thirty-second more leaves room for; |du| is taken with E.
    """
    (p, c), d = t.x.shape, t.weight.shape[0]
    half = 0.0 if dtype == torch.float32 else testing.UNIT_ROUNDOFF[dtype]
    xhat, gamma, beta, weight = t.normed.abs(), t.norm_weight.abs(), t.norm_bias.abs(), t.weight.abs()
    wide = xhat + 1 + t.mean.abs() * t.rstd

    rounded = half * (xhat * gamma + beta) + (2 * c + 16) * EXACT * (wide * gamma + beta)
    off_u = rounded @ weight.t() + 4 * EXACT * t.bias.abs()
    y, off_du = off_u, torch.zeros_like(off_u)
    if gelu:
        y = 1.13 * off_u + half * F.gelu(t.u).abs() + 8 * EXACT * t.u.abs()
        off_du = t.dy.abs() * (0.8 * off_u + 2 * half * t.slope.abs() + 16 * EXACT) + underflow(dtype)
    du = t.du.abs() + off_du

    off_db = off_du.sum(0) + (p + 4) * EXACT * du.sum(0)
    off_sums = off_du.t() @ xhat + du.t() @ (half * xhat + (p + c + 16) * EXACT * wide)
    sums, db, more = du.t() @ wide, du.sum(0), (d + 16) * EXACT
    g, of_beta = du @ weight * gamma, du @ weight * beta
    off_g = (off_du + (d + 4) * EXACT * du) @ weight * gamma
    means = g + g.mean(1, keepdim=True) + wide * (g * wide + of_beta).mean(1, keepdim=True)
    off_means = xhat * ((off_g + half * g) * xhat + half * of_beta).mean(1, keepdim=True)
    off_means += off_g.mean(1, keepdim=True)
    off = {
        "y": y,
        "dx": (off_g + off_means + (2 * c + d + 20) * EXACT * means) * t.rstd,
        "dγ": (weight * (off_sums + more * sums)).sum(0),
        "dβ": (weight * (off_db + more * db)[:, None]).sum(0),
        "dW": (off_sums + more * sums) * gamma + (off_db + more * db)[:, None] * beta,
        "db": off_db,
    }
    return {name: bound * (1 + 1 / 32) for name, bound in off.items()}


def underflow(dtype: torch.dtype) -> float:
    """What rounding costs below the normal numbers of a type."""
    return torch.finfo(dtype).smallest_normal * testing.UNIT_ROUNDOFF[dtype]
