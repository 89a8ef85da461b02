"""Modules on the operators: the same parameters and state_dict keys as what they replace."""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .depthwise.op import depthwise_conv2d
from .norm_linear.op import layer_norm_linear
from .registration import overridden

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
        if self.padding_mode != "zeros" or "_conv_forward" in self.__dict__:  # changed after construction
            return super().forward(x)
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
        children = tuple(self)
        kinds = (nn.LayerNorm, nn.Linear, nn.GELU)[: len(children)]
        plain = len(children) in (2, 3) and all(map(is_plain, children, kinds))
        if not plain or (len(children) == 3 and children[2].approximate != "none"):
            return super().forward(x)
        norm, linear = children[0], children[1]
        if len(norm.normalized_shape) != 1 or not dtypes_agree(x, norm.weight, linear.weight):
            return super().forward(x)
        activation = "gelu" if len(children) == 3 else None
        return layer_norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, activation)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A child; a slice is an ordinary ``nn.Sequential``."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def dtypes_agree(x: Tensor, *parameters: Tensor | None) -> bool:
    """Have all ``parameters`` one dtype, or does autocast make one of them?

    Where not (norms kept in fp32 inside a bf16 network), what comes out is for the ordinary modules to say.
    """
    if isinstance(x, torch.fx.Proxy):  # symbolic tracing has no dtypes to look at
        return True
    if len({parameter.dtype for parameter in parameters if parameter is not None}) <= 1:
        return True
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Is calling ``module`` the same as computing the formula of one of ``kinds`` on its parameters?

    No where it is of another class (LoRA, parametrisation and graph rewriting change the class), where its parameters
    are of a tensor class with functions of its own (torchao's quantised weights), or where anybody waits for its call:
    hooks on it, or on all modules. FlopCounterMode puts such hooks on all modules while it counts.
    """
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # an instance whose forward somebody replaced
        and "_conv_forward" not in module.__dict__
        and not overridden(module._parameters.values())
        and not any(_GLOBAL_HOOKS)
    )
