"""The ConvNeXt block and its gradients, written out. The formulas are in this folder's README.

Half-precision inputs are computed in fp32; what is stored between forward and backward (the convolution's output) is
rounded to the compute dtype before it is used, so that both passes see the same values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..depthwise.reference import depthwise_conv2d_backward_reference, depthwise_conv2d_reference
from ..dtypes import sum_dtype
from ..norm_linear.reference import (
    gelu,
    gelu_derivative,
    linear,
    norm_backward,
    normalised,
    rows,
    scaled,
    statistics,
)

GRN_EPS = 1e-6
KEEP_U_FROM = 768  # channels from which computing u again takes longer than keeping its 4·N elements, as predicted


class Parameters(NamedTuple):
    """The block's parameters: C channels, D hidden ones."""

    dw_weight: Tensor  # (C, 1, KH, KW), KH and KW odd
    dw_bias: Tensor | None  # (C,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None  # (C,)
    fc1_weight: Tensor  # (D, C)
    fc1_bias: Tensor | None  # (D,)
    fc2_weight: Tensor  # (C, D)
    fc2_bias: Tensor | None  # (C,)
    layer_scale: Tensor | None  # (C,)
    grn_weight: Tensor | None  # (D,)
    grn_bias: Tensor | None  # (D,)


class Saved(NamedTuple):
    """What the forward pass keeps; all of shape (0,) where ``memory="lean"``, ``u`` except where :func:`keeps_u`."""

    y: Tensor  # (N, H, W, C), the convolution's output, in the compute dtype
    mean: Tensor  # (N, H, W)
    rstd: Tensor  # (N, H, W)
    u: Tensor  # (N, H, W, D), the first linear layer's output without its bias, in the compute dtype


def keeps_u(memory: str, channels: int) -> bool:
    """Is the first linear layer's output kept for the backward pass?"""
    return memory == "fast" or (memory == "default" and channels >= KEEP_U_FROM)


def same_padding(dw_weight: Tensor) -> tuple[int, int]:
    """Zeros on each side with which an odd kernel keeps the size of the map."""
    return dw_weight.shape[2] // 2, dw_weight.shape[3] // 2


def block_dtype(x: Tensor, layer_scale: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result: that of ``x + layer_scale * branch`` with a branch of the compute ``dtype``."""
    return torch.promote_types(x.dtype, dtype if layer_scale is None else layer_scale.dtype)


def _convolution(x: Tensor, p: Parameters, dtype: torch.dtype) -> Tensor:
    y = depthwise_conv2d_reference(x.to(dtype), p.dw_weight, p.dw_bias, (1, 1), same_padding(p.dw_weight), (1, 1))
    return y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)


def _grn_scale(h: Tensor, p: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """Gx and Nx of :func:`_grn`, both (N, D), and ``1 + grn_weight ∘ Nx`` (N, 1, 1, D)."""
    norm = h.square().sum((1, 2)).sqrt()
    relative = norm / (norm.mean(-1, keepdim=True) + GRN_EPS)
    scale = 1 + relative * p.grn_weight.to(h.dtype)
    return norm, relative, scale[:, None, None, :]


def _grn(h: Tensor, p: Parameters) -> Tensor:
    """Global response normalisation of h (N, H, W, D): ``h·(1 + grn_weight·Nx) + grn_bias``."""
    if p.grn_weight is None:
        return h
    return h * _grn_scale(h, p)[2] + p.grn_bias.to(h.dtype)


def _grn_backward(dg: Tensor, h: Tensor, p: Parameters) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh (N, H, W, D), d grn_weight and d grn_bias (D,).

    With ``m = mean_c Gx + ε`` and ``s[n,c] = Σ_hw dg·h``, ``t = s ∘ grn_weight``:
    ``dGx = t/m − mean_c(t ∘ Gx)/m²``; ``dh = dg·(1 + grn_weight·Nx) + dGx·h/Gx``.
    """
    if p.grn_weight is None:
        return dg, None, None
    norm, relative, scale = _grn_scale(h, p)
    sums = (dg * h).sum((1, 2))  # (N, D)
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    t = sums * p.grn_weight.to(h.dtype)
    dnorm = t / mean - (t * norm).mean(-1, keepdim=True) / mean.square()
    # An all-zero channel has no direction; its norm's gradient is taken as 0, as PyTorch does.
    direction = torch.where(norm > 0, dnorm / norm, 0.0)[:, None, None, :]
    return dg * scale + direction * h, (sums * relative).sum(0), dg.sum((0, 1, 2))


def _with_bias(product: Tensor, p: Parameters, dtype: torch.dtype) -> Tensor:
    """u. Its bias is not in what is kept: rounded with a large one, that would say little of its rows."""
    return product if p.fc1_bias is None else product + p.fc1_bias.to(dtype).to(product.dtype)


def convnext_block_reference(
    x: Tensor, p: Parameters, row_scale: Tensor | None, eps: float, memory: str, dtype: torch.dtype
) -> tuple[Tensor, Saved]:
    """out (N, C, H, W) of x (N, C, H, W), row_scale (N,) or None, and what the backward pass needs.

    ``out = x + row_scale ∘ layer_scale ∘ fc2(grn(gelu(fc1(layer_norm(dwconv(x))))))``
    """
    y = _convolution(x, p, dtype)
    wide = y.to(sum_dtype(dtype))
    mean, rstd = statistics(wide, eps)
    product = linear(scaled(normalised(wide, mean, rstd), p.norm_weight, p.norm_bias), p.fc1_weight, None, dtype)
    t = linear(_grn(gelu(_with_bias(product, p, dtype)), p), p.fc2_weight, p.fc2_bias, dtype)
    t = scaled(t, p.layer_scale, None).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    if row_scale is not None:
        t = t * row_scale.to(t.dtype)[:, None, None, None]
    out = (x.to(t.dtype) + t).to(block_dtype(x, p.layer_scale, dtype))
    nothing = y.new_empty(0)
    if memory == "lean":
        return out, Saved(nothing, mean.new_empty(0), mean.new_empty(0), nothing)
    return out, Saved(y, mean, rstd, product.to(dtype) if keeps_u(memory, x.shape[1]) else nothing)


def convnext_block_backward_reference(
    dout: Tensor,
    x: Tensor,
    p: Parameters,
    row_scale: Tensor | None,
    saved: Saved,
    eps: float,
    memory: str,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """dx (N, C, H, W) and the gradients of all :class:`Parameters`, in the dtype they were summed in.

    With ``d = row_scale ∘ dout`` and ``Q = dᵀ·h``: ``dW2 = layer_scale ∘ Q``; ``db2 = layer_scale ∘ Σ d``;
    ``d layer_scale[c] = Σ_k W2[c,k]·Q[c,k] + b2[c]·Σ d[c]``; ``dh = (d ∘ layer_scale)·W2``.
    """
    y = _convolution(x, p, dtype) if memory == "lean" else saved.y
    wide = y.to(sum_dtype(dtype))
    mean, rstd = statistics(wide, eps) if memory == "lean" else (saved.mean, saved.rstd)
    xhat = normalised(wide, mean, rstd)
    normed = scaled(xhat, p.norm_weight, p.norm_bias)
    kept = keeps_u(memory, x.shape[1])
    u = _with_bias(saved.u.to(wide.dtype) if kept else linear(normed, p.fc1_weight, None, dtype), p, dtype)
    gelu_u = gelu(u)

    d = dout.to(wide.dtype).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    branch = d if row_scale is None else d * row_scale.to(d.dtype)[:, None, None, None]
    sums, q = rows(branch).sum(0), rows(branch).t() @ rows(_grn(gelu_u, p))  # (C,), (C, D)
    fc2_weight = p.fc2_weight.to(dtype).to(wide.dtype)
    dlayer_scale = (fc2_weight * q).sum(1)
    if p.fc2_bias is not None:
        dlayer_scale = dlayer_scale + p.fc2_bias.to(dtype).to(wide.dtype) * sums
    dfc2_bias = scaled(sums, p.layer_scale, None)
    dfc2_weight = q if p.layer_scale is None else q * p.layer_scale.to(q.dtype)[:, None]

    dh = scaled(branch, p.layer_scale, None) @ fc2_weight
    dh, dgrn_weight, dgrn_bias = _grn_backward(dh, gelu_u, p)
    du = rows(dh * gelu_derivative(u))
    dnormed = du @ p.fc1_weight.to(dtype).to(wide.dtype)
    dy, dnorm_weight, dnorm_bias = norm_backward(dnormed, rows(xhat), rstd.flatten(), p.norm_weight)
    dx, ddw_weight, ddw_bias = depthwise_conv2d_backward_reference(
        dy.reshape(y.shape).permute(0, 3, 1, 2), x.to(dtype), p.dw_weight, (1, 1), same_padding(p.dw_weight), (1, 1),
        (True, True, True),
    )  # fmt: skip
    gradients = Parameters(
        ddw_weight, ddw_bias, dnorm_weight, dnorm_bias, du.t() @ rows(normed), du.sum(0),
        dfc2_weight, dfc2_bias, dlayer_scale, dgrn_weight, dgrn_bias,
    )  # fmt: skip
    return [dx + dout.to(dx.dtype), *gradients]
