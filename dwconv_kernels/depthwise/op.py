"""The operator ``depthwise_conv2d``: registration, autograd, the public function."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .. import registration, runtime
from . import config, reference
from .reference import output_size

Pair = tuple[int, int]


def _output_shape(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple:
    sizes = [output_size(x.shape[2 + k], weight.shape[2 + k], stride[k], padding[k], dilation[k]) for k in range(2)]
    return (x.shape[0], x.shape[1], *sizes)


def _forward(x, weight, bias, stride, padding, dilation, backend):
    if backend == "triton":
        return runtime.launchers("depthwise").depthwise_forward(x, weight, bias, stride, padding, dilation)
    y = registration.empty_map(x, _output_shape(x, weight, stride, padding, dilation))
    return y.copy_(reference.depthwise_conv2d_reference(x, weight, bias, stride, padding, dilation))


def _forward_fake(x, weight, bias, stride, padding, dilation, backend):
    return registration.empty_map(x, _output_shape(x, weight, stride, padding, dilation))


def _backward(dy, x, weight, bias, stride, padding, dilation, wanted, backend):
    if backend == "triton":
        launch = runtime.launchers("depthwise")
        return launch.depthwise_backward(dy, x, weight, bias, stride, padding, dilation, wanted)
    gradients = _backward_fake(dy, x, weight, bias, stride, padding, dilation, wanted, backend)
    values = reference.depthwise_conv2d_backward_reference(dy, x, weight, stride, padding, dilation, wanted)
    return tuple(registration.fill(gradients, values, wanted))


def _backward_fake(dy, x, weight, bias, stride, padding, dilation, wanted, backend):
    dx = registration.empty_map(x, x.shape) if wanted[0] else x.new_empty(0)
    return (dx, *registration.parameter_gradients((weight, bias), wanted[1:], x))


def _forward_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    n, c, h, w = out_shape
    return 2 * n * c * h * w * weight_shape[2] * weight_shape[3]


def _backward_flops(dy_shape, x_shape, weight_shape, bias, stride, padding, dilation, wanted, *_, **__) -> int:
    return (wanted[0] + wanted[1]) * _forward_flops(x_shape, weight_shape, out_shape=dy_shape)


def _save(ctx, inputs, output=None) -> None:
    x, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    *geometry, backend = ctx.settings
    wanted = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and bias is not None]
    gradients = _BACKWARD(dy, x, weight, bias, *geometry, wanted, backend)
    return (*registration.given(gradients, (x, weight, bias), wanted), None, None, None, None)


_FORWARD = registration.register_operator(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, str backend) -> Tensor",
    _forward,
    _forward_fake,
    _forward_flops,
    backward=_gradients,
    setup_context=_save,
)
_BACKWARD = registration.register_operator(
    "depthwise_conv2d_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
    "bool[3] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
    backward=registration.no_second_derivative("depthwise_conv2d"),
)


class DepthwiseConv2dFunction(torch.autograd.Function):
    """``apply(x, weight, bias, stride, padding, dilation, backend)``; arguments checked, pairs, in that order."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, backend):
        _save(ctx, (x, weight, bias, stride, padding, dilation, backend))
        return _FORWARD(x, weight, bias, stride, padding, dilation, backend)

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


def _pair(name: str, value: int | Pair, lowest: int) -> Pair:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) == 1:  # F.conv2d takes one number in a list, too
        pair = pair * 2
    if len(pair) == 2 and torch.jit.is_tracing():  # these may be traced values, which cannot be compared
        return pair
    allowed = f"an integer or a pair of integers, at least {lowest}, is allowed"
    if not all(isinstance(number, (int, torch.SymInt)) or hasattr(number, "__index__") for number in pair):
        raise TypeError(f"{name} is {value!r}; {allowed}")
    if len(pair) != 2 or min(pair) < lowest:
        raise ValueError(f"{name} is {value!r}; {allowed}")
    first, second = (n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in pair)  # NumPy's integers
    return first, second


def _same_padding(kernel: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, tuple[int, int, int, int]]:
    """Padding on both sides, and what is left to add right and below where that is one more (even kernels)."""
    if stride != (1, 1):
        raise ValueError(f'stride is {stride}; with padding="same" only stride 1 is allowed')
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return (total[0] // 2, total[1] // 2), (0, total[1] % 2, 0, total[0] % 2)


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Shapes, dtypes and devices of a depthwise convolution; ``prefix`` comes before the names in errors."""
    if torch.jit.is_tracing():  # sizes are traced values, and comparing them would be recorded
        return
    registration.check_same(x, {f"{prefix}weight": weight, f"{prefix}bias": bias})
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; (N, C, H, W) is allowed")
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1 or 0 in weight.shape[2:]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}; (C, 1, KH, KW) with C={x.shape[1]}, the channels of x, "
            f"is allowed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias has shape {tuple(bias.shape)}; (C,) with C={x.shape[1]} is allowed")


def _check(x, weight, bias, stride, padding, dilation) -> tuple[Pair, Pair, Pair, tuple | None]:
    check_tensors(x, weight, bias)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    more = None
    if padding == "same":
        padding, more = _same_padding(tuple(weight.shape[2:]), stride, dilation)
    elif padding == "valid":
        padding = (0, 0)
    elif isinstance(padding, str):
        raise ValueError(f'padding is {padding!r}; "same", "valid", an integer or a pair of integers is allowed')
    else:
        padding = _pair("padding", padding, 0)
    _check_output(x, weight, stride, padding, dilation, more)
    return stride, padding, dilation, more if more is not None and any(more) else None


def _check_output(x, weight, stride, padding, dilation, more) -> None:
    if more is not None or torch.jit.is_tracing() or is_empty(x):  # "same" always fits
        return
    for k in range(2):
        if x.shape[2 + k] + 2 * padding[k] < dilation[k] * (weight.shape[2 + k] - 1) + 1:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, which does not fit in x of shape {tuple(x.shape)} with "
                f"padding {padding} and dilation {dilation}; a kernel not larger than the padded map is allowed"
            )


def why_not(x, weight, bias=None, stride=1, padding=0, dilation=1) -> str | None:
    """Why the kernels cannot take this call of :func:`depthwise_conv2d`; None where they can."""
    if isinstance(x, Tensor) and x.ndim == 3:
        x = x.unsqueeze(0)
    stride, padding, dilation, more = _check(x, weight, bias, stride, padding, dilation)
    return _why_not(x, weight, bias, stride, padding, dilation, more)


def _why_not(x, weight, bias, stride, padding, dilation, more) -> str | None:
    reason = runtime.why_not_device("depthwise", x) or registration.why_not_tensors((x, weight, bias))
    if reason is not None:
        return reason
    if more is not None:
        return _uneven(tuple(weight.shape[2:]))
    return runtime.launchers("depthwise").why_not(x, weight, stride, padding, dilation)


def depthwise_kernels_take(
    kernel_size: int | Pair, stride: int | Pair = 1, padding: int | Pair | str = 0, dilation: int | Pair = 1
) -> tuple[bool, str]:
    """Are there kernels for such depthwise convolutions, on some GPU? ``(True, "")``, or ``(False, reason)``.

    Before there is an input: :func:`supports` says more, of one call on one device.

    Raises:
        ValueError, TypeError: an argument is not one that :func:`depthwise_conv2d` allows.
    """
    kernel = _pair("kernel_size", kernel_size, 1)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if padding == "same":
        padding, more = _same_padding(kernel, stride, dilation)
        if any(more):
            return False, _uneven(kernel)
    padding = (0, 0) if padding == "valid" else _pair("padding", padding, 0)
    reason = config.why_not(config.DTYPES[0], *kernel, stride, padding, dilation)
    return reason is None, reason or ""


def _uneven(kernel: Pair) -> str:
    return f"a kernel of even size ({kernel}) with padding='same' is padded unevenly"


def is_empty(x: Tensor) -> bool:
    """Has the map x (N, C, H, W) no pixels or no channels? PyTorch's convolution refuses those."""
    return not torch.jit.is_tracing() and 0 in x.shape[1:]


def composition(x, weight, bias, stride, padding, dilation) -> Tensor:
    """PyTorch's own convolution, for the backend ``torch``."""
    channels_last = weight.stride(1) == 1  # of the weight; that of x alone decides the memory format of the result
    if (channels_last or (weight.requires_grad and torch.is_grad_enabled())) and not runtime.exporting():
        weight = with_plain_strides(weight)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])


def with_plain_strides(weight: Tensor) -> Tensor:
    """The same weight (C, 1, KH, KW), through views that hand back a gradient with the strides of the parameter.

    PyTorch's convolution returns the gradient in the layout it computed in. Autograd takes that for the parameter's own
    layout, since they differ only in the stride of the dimension of size 1, but DistributedDataParallel does not: it
    warns on every step and copies. The backward of a squeeze writes that stride anew.
    """
    if weight.stride(1) == 1:  # channels_last, (KH·KW, 1, KW, 1)
        return weight.permute(0, 2, 3, 1).squeeze(-1).unsqueeze(1)
    return weight.squeeze(1).unsqueeze(1)


@runtime.explained_by(why_not)
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """Depthwise 2-D convolution: every channel with a kernel of its own.

    Equivalent to: ``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``

    Args:
        x: (N, C, H, W) or (C, H, W), any strides; channels_last is the fast layout.
        weight: (C, 1, KH, KW).
        bias: (C,) or None.
        stride, dilation: at least 1, one number or (rows, columns).
        padding: zeros on each side, one number or (rows, columns); "same" (stride 1) or "valid".

    Returns:
        (N, C, OH, OW) in the dtype of x, or in autocast's where that is on, and in the memory format of x, with
        ``OH = (H + 2·padding − dilation·(KH−1) − 1) // stride + 1`` and OW alike. An empty map has an empty result.

    Raises:
        ValueError: a shape, stride, padding or dilation is not one of the allowed.
        TypeError: dtypes differ and autocast is off, or an argument is not a tensor.
        RuntimeError: the backend is ``triton`` and its kernels cannot take the call; devices differ.
    """
    if has_torch_function((x, weight, bias)):
        if registration.overridden((x, weight, bias)):
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups=weight.shape[0])
        return handle_torch_function(
            depthwise_conv2d, (x, weight, bias), x, weight, bias, stride=stride, padding=padding, dilation=dilation
        )
    if isinstance(x, Tensor) and x.ndim == 3:
        return depthwise_conv2d(x.unsqueeze(0), weight, bias, stride, padding, dilation).squeeze(0)
    stride, padding, dilation, more = _check(x, weight, bias, stride, padding, dilation)
    return convolve(x, weight, bias, stride, padding, dilation, more)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    more: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """:func:`depthwise_conv2d` of checked arguments, on the backend in force; ``more`` as F.pad takes it."""
    if has_torch_function((x, weight, bias)) and registration.overridden((x, weight, bias)):
        return composition(x, weight, bias, stride, padding, dilation)
    chosen = runtime.select("depthwise_conv2d", x, lambda: _why_not(x, weight, bias, stride, padding, dilation, more))
    if more is not None:
        x = F.pad(x, more)
    if is_empty(x):
        chosen = "reference"  # which alone knows what comes of nothing
    elif chosen == "torch":
        return composition(x, weight, bias, stride, padding, dilation)
    dtype = runtime.autocast_dtype(x)
    return DepthwiseConv2dFunction.apply(
        x if dtype is None else x.to(dtype), weight, bias, stride, padding, dilation, chosen
    )
