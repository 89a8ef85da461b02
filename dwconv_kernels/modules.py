"""Modules on the operators: the same parameters and state_dict keys as what they replace."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .depthwise.op import depthwise_conv2d
from .norm_linear.op import layer_norm_linear

# Hooks on the calls of all modules; these dictionaries are filled and emptied, never replaced.
_GLOBAL_HOOKS = (
    nn_module._global_forward_pre_hooks,
    nn_module._global_forward_hooks,
    nn_module._global_backward_pre_hooks,
    nn_module._global_backward_hooks,
)


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with one kernel per channel, on :func:`depthwise_conv2d`; arguments and parameters of nn.Conv2d.

    Raises:
        ValueError: the convolution is not depthwise (``out_channels`` and ``groups``, which defaults to it, must equal
            ``in_channels``), or ``padding_mode`` is not "zeros".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        groups = in_channels if groups is None else groups
        for name, value in (("out_channels", out_channels), ("groups", groups)):
            if value != in_channels:
                raise ValueError(f"{name} is {value}; in a depthwise convolution in_channels={in_channels} is allowed")
        if padding_mode != "zeros":
            raise ValueError(f'padding_mode is {padding_mode!r}; "zeros" is allowed')
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) → (N, C, OH, OW) or (C, OH, OW)."""
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class LayerNormLinear(nn.Sequential):
    """``nn.Sequential(nn.LayerNorm(C), nn.Linear(C, D)[, nn.GELU()])`` as one operator, with the same state_dict keys.

    Where a child was replaced or has a hook, the children are called one after another.

    Args:
        in_features, out_features: C and D.
        bias: does the linear layer have one?
        eps: ε of the norm.
        activation: None or "gelu".

    Raises:
        ValueError: ``activation`` is neither.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-6,
        activation: str | None = None,
        device=None,
        dtype=None,
    ):
        if activation not in (None, "gelu"):
            raise ValueError(f'activation is {activation!r}; None or "gelu" is allowed')
        made = {"device": device, "dtype": dtype}
        children = [nn.LayerNorm(in_features, eps=eps, **made), nn.Linear(in_features, out_features, bias, **made)]
        super().__init__(*children, *([nn.GELU()] if activation else []))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., D)."""
        kinds = (nn.LayerNorm, nn.Linear, nn.GELU)[: len(self)]
        plain = len(self) in (2, 3) and all(is_plain(child, kind) for child, kind in zip(self, kinds, strict=True))
        if not plain or (len(self) == 3 and self[2].approximate != "none") or len(self[0].normalized_shape) != 1:
            return super().forward(x)
        norm, linear = self[0], self[1]
        activation = "gelu" if len(self) == 3 else None
        return layer_norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, activation)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Is calling ``module`` the same as computing the formula of one of ``kinds`` on its parameters?

    No where it is of another class (LoRA, quantisation, parametrisation and graph rewriting all change the class) or
    where anybody waits for its call: hooks on it, or on all modules.
    """
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # an instance whose forward somebody replaced
        and not any(_GLOBAL_HOOKS)
    )
