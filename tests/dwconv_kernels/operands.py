"""Random operands of the three operators, none at a value that hides a term (γ = 1, β = 0, λ = 1e-6)."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_linear_operands(
    shape, d: int, *, norm_weight=True, norm_bias=True, bias=True, mean=0.0, dtype=torch.float64, seed=0
) -> list[Tensor | None]:
    """x, norm_weight, norm_bias, weight, bias of ``layer_norm_linear``."""
    g = torch.Generator().manual_seed(seed)
    c = shape[-1]

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    tensors = [
        normal(*shape) + mean,
        normal(c) + 0.5 if norm_weight else None,
        normal(c) if norm_bias else None,
        normal(d, c) / c**0.5,
        normal(d) if bias else None,
    ]
    return [None if t is None else t.to(dtype) for t in tensors]


def block_operands(
    shape, kernel=(7, 7), hidden=None, *, layer_scale=True, row_scale=False, grn=False, biases=True, norm=True,
    dtype=torch.float64, seed=0,
) -> list[Tensor | None]:  # fmt: skip
    """The thirteen tensors of ``convnext_block``, in its order."""
    g = torch.Generator().manual_seed(seed)
    n, c = shape[:2]
    d = hidden or 4 * c

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    keep = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25], dtype=dtype)[torch.arange(n) % 5]
    return [
        normal(*shape),
        normal(c, 1, *kernel, scale=(kernel[0] * kernel[1]) ** -0.5),
        normal(c) if biases else None,
        normal(c) + 0.5 if norm else None,
        normal(c) if norm else None,
        normal(d, c, scale=c**-0.5),
        normal(d) if biases else None,
        normal(c, d, scale=d**-0.5),
        normal(c) if biases else None,
        normal(c) if layer_scale else None,
        keep if row_scale else None,
        normal(d) if grn else None,
        normal(d) if grn else None,
    ]


def requiring_grad(tensors, but: int | None = None) -> list[Tensor | None]:
    """Leaves with the values and strides of ``tensors`` that require a gradient, except number ``but``."""
    return [
        t if t is None or i == but else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for i, t in enumerate(tensors)
    ]


def with_gradients(function, tensors, dy=None, seed=0, but: int | None = None) -> list[Tensor]:
    """``function(*tensors)`` and its gradients for a random upstream gradient, which ``dy(y)`` may replace."""
    leaves = requiring_grad(tensors, but)
    y = function(*leaves)
    if dy is None:
        random = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        upstream = random.to(y.dtype)
    else:
        upstream = dy(y)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]
