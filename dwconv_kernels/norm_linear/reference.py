"""Layer norm + linear (+ GELU) and its gradients, written out. The formulas are in this folder's README.

Half-precision inputs are computed in fp32 and rounded once at the end; fp32 and float64 in their own precision. The
linear layer's weight and bias are rounded to the compute dtype where they are wider (the fp32 parameters of
mixed-precision training); the norm's parameters never are. Gradients come in the dtype they were summed in; whoever
stores them rounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import sum_dtype


def gelu(u: Tensor) -> Tensor:
    """``u·Φ(u)``, Φ the normal distribution; through erfc, so that the left tail keeps its digits. gelu(−∞) = 0."""
    value = 0.5 * u * torch.special.erfc(u * -math.sqrt(0.5))
    return torch.where(u == -math.inf, 0.0, value)


def gelu_derivative(u: Tensor) -> Tensor:
    """``Φ(u) + u·φ(u)``; 0 at −∞ and 1 at +∞."""
    density = torch.exp(-0.5 * u * u) * math.sqrt(0.5 / math.pi)
    return 0.5 * torch.special.erfc(u * -math.sqrt(0.5)) + torch.where(u.isinf(), 0.0, u * density)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + ε) over the last dimension of x (..., C), each (...), in two passes."""
    mean = x.mean(-1)
    return mean, torch.rsqrt((x - mean.unsqueeze(-1)).square().mean(-1) + eps)


def normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """``x̂ = (x − mean) · rstd`` (..., C)."""
    return (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x·scale + shift`` over the last dimension, either of them None."""
    if scale is not None:
        x = x * scale.to(x.dtype)
    return x if shift is None else x + shift.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x·weightᵀ + bias`` in the dtype of x, with weight and bias rounded to ``dtype``."""
    y = x @ weight.to(dtype).to(x.dtype).t()
    return y if bias is None else y + bias.to(dtype).to(x.dtype)


def rows(x: Tensor) -> Tensor:
    """(..., C) as (rows, C)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def layer_norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., D) in ``dtype``, mean and rstd (...).

    Of x (..., C), norm_weight and norm_bias (C,), weight (D, C), bias (D,).

    ``u = (x̂ ∘ γ + β)·Wᵀ + b``; ``y = u`` or ``gelu(u)``.
    """
    wide = x.to(sum_dtype(x.dtype))
    mean, rstd = statistics(wide, eps)
    u = linear(scaled(normalised(wide, mean, rstd), norm_weight, norm_bias), weight, bias, dtype)
    y = gelu(u) if activation == "gelu" else u
    return y.to(dtype), mean, rstd


def norm_backward(
    dnormed: Tensor, xhat: Tensor, rstd: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dγ, dβ of ``x̂ ∘ γ + β`` from its gradient; all (rows, C) but dγ, dβ (C,) and rstd (rows,).

    ``g = dnormed ∘ γ``; ``dx = rstd · (g − mean_c g − x̂ · mean_c(g ∘ x̂))``
    """
    g = scaled(dnormed, norm_weight, None)
    dx = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
    return dx * rstd.unsqueeze(-1), (dnormed * xhat).sum(0), dnormed.sum(0)


def layer_norm_linear_backward_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (..., C), dγ (C,), dβ (C,), dW (D, C), db (D,) from dy (..., D) and what the forward pass saved.

    ``du = dy ∘ gelu'(u)``; ``dW = duᵀ·(x̂∘γ + β)``; ``db = Σ du``; the norm's part is :func:`norm_backward`.
    """
    dtype = dy.dtype
    wide = rows(x.to(sum_dtype(x.dtype)))
    xhat, rstd = normalised(wide, mean.flatten(), rstd.flatten()), rstd.flatten()
    normed = scaled(xhat, norm_weight, norm_bias)
    du = rows(dy.to(wide.dtype))
    if activation == "gelu":
        du = du * gelu_derivative(linear(normed, weight, bias, dtype))
    dnormed = du @ weight.to(dtype).to(wide.dtype)
    dx, dnorm_weight, dnorm_bias = norm_backward(dnormed, xhat, rstd, norm_weight)
    return dx.reshape(x.shape), dnorm_weight, dnorm_bias, du.t() @ normed, du.sum(0)
