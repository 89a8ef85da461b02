"""The operator ``layer_norm_linear``: registration, autograd, the public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .. import registration, runtime
from ..dtypes import sum_dtype
from . import reference

ACTIVATIONS = (None, "gelu")


def _forward(x, norm_weight, norm_bias, weight, bias, eps, activation, dtype, backend):
    arguments = (x, norm_weight, norm_bias, weight, bias, eps, activation, dtype)
    if backend == "triton":
        return runtime.launchers("norm_linear").norm_linear_forward(*arguments)
    results = _forward_fake(*arguments, backend)
    values = reference.layer_norm_linear_reference(*arguments)
    return tuple(result.copy_(value) for result, value in zip(results, values, strict=True))


def _forward_fake(x, norm_weight, norm_bias, weight, bias, eps, activation, dtype, backend):
    statistics = [x.new_empty(x.shape[:-1], dtype=sum_dtype(x.dtype)) for _ in range(2)]
    return (x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype), *statistics)


def _backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation, wanted, backend):
    arguments = (dy, x, mean, rstd, norm_weight, norm_bias, weight, bias)
    if backend == "triton":
        return runtime.launchers("norm_linear").norm_linear_backward(*arguments, activation, wanted)
    gradients = _backward_fake(*arguments, activation, wanted, backend)
    values = reference.layer_norm_linear_backward_reference(*arguments, activation)
    return tuple(registration.fill(gradients, values, wanted))


def _backward_fake(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, activation, wanted, backend):
    dx = x.new_empty(x.shape if wanted[0] else 0)
    parameters = (norm_weight, norm_bias, weight, bias)
    return (dx, *registration.parameter_gradients(parameters, wanted[1:], x))


def _forward_flops(x_shape, norm_weight, norm_bias, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def _backward_flops(dy, x_shape, mean, rstd, norm_weight, norm_bias, weight_shape, bias, activation, wanted, *_, **__):
    # dx, dγ and dβ come from du·W, dW from duᵀ·x; computing u again for gelu' is not counted
    return (any(wanted[:3]) + wanted[3]) * _forward_flops(x_shape, None, None, weight_shape)


def _save(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, *output[1:], norm_weight, norm_bias, weight, bias)


def _setup_raw(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, dy, *_):
    x, mean, rstd, *parameters = ctx.saved_tensors
    _eps, activation, _dtype, backend = ctx.settings
    inputs = (x, *parameters)
    wanted = [need and tensor is not None for need, tensor in zip(ctx.needs_input_grad[:5], inputs, strict=True)]
    gradients = _BACKWARD(dy, x, mean, rstd, *parameters, activation, wanted, backend)
    return (*registration.given(gradients, inputs, wanted), None, None, None, None)


_FORWARD = registration.register_operator(
    "layer_norm_linear",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps, str? activation, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_flops,
    backward=_gradients,
    setup_context=_setup_raw,
)
_BACKWARD = registration.register_operator(
    "layer_norm_linear_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, "
    "Tensor? bias, str? activation, bool[5] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
    backward=registration.no_second_derivative("layer_norm_linear"),
)


class LayerNormLinearFunction(torch.autograd.Function):
    """``apply(x, norm_weight, norm_bias, weight, bias, eps, activation, dtype, backend)``; arguments checked."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, activation, dtype, backend):
        inputs = (x, norm_weight, norm_bias, weight, bias, eps, activation, dtype, backend)
        output = _FORWARD(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


def check_norm(x_channels: int, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> None:
    """Shapes of a layer norm's parameters over ``x_channels`` channels, and its ε."""
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is not None and parameter.shape != (x_channels,):
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; (C,) with C={x_channels} is allowed")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps is {eps!r}; a number is allowed")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; 0 or more is allowed")


def check_linear(name: str, weight: Tensor, bias: Tensor | None, channels: int) -> None:
    """Shapes of a linear layer's weight (D, C) and bias (D,), named ``{name}weight`` and ``{name}bias``."""
    if weight.ndim != 2 or weight.shape[1] != channels:
        raise ValueError(f"{name}weight has shape {tuple(weight.shape)}; (D, C) with C={channels} is allowed")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias has shape {tuple(bias.shape)}; (D,) with D={weight.shape[0]} is allowed")


def _check(x, norm_weight, norm_bias, weight, bias, eps, activation) -> None:
    if torch.jit.is_tracing():  # sizes are traced values, and comparing them would be recorded
        return
    tensors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}
    registration.check_same(x, tensors)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; (..., C) with C of at least 1 is allowed")
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is {activation!r}; None or "gelu" is allowed')
    check_norm(x.shape[-1], norm_weight, norm_bias, eps)
    check_linear("", weight, bias, x.shape[-1])


def why_not(x, norm_weight, norm_bias, weight, bias=None, eps=1e-6, activation=None) -> str | None:
    """Why the kernels cannot take this call of :func:`layer_norm_linear`; None where they can."""
    _check(x, norm_weight, norm_bias, weight, bias, eps, activation)
    return _why_not(x, norm_weight, norm_bias, weight, bias)


def _why_not(x, norm_weight, norm_bias, weight, bias) -> str | None:
    reason = runtime.why_not_device("norm_linear", x) or registration.why_not_tensors(
        (x, norm_weight, norm_bias, weight, bias)
    )
    if reason is not None:
        return reason
    return runtime.launchers("norm_linear").why_not(x, norm_weight, norm_bias, weight, bias)


def composition(x, norm_weight, norm_bias, weight, bias, eps, activation) -> Tensor:
    """PyTorch's own operators, for the backend ``torch``."""
    channels = weight.shape[1]
    if torch.jit.is_tracing():  # ONNX's layer norm wants a number, not a traced size
        channels = int(channels)
    y = F.linear(F.layer_norm(x, (channels,), norm_weight, norm_bias, eps), weight, bias)
    return F.gelu(y) if activation == "gelu" else y


@runtime.explained_by(why_not)
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
) -> Tensor:
    """Layer norm over the last dimension, a linear layer, optionally GELU (the exact one, with erf).

    Equivalent to: ``act(F.linear(F.layer_norm(x, (C,), norm_weight, norm_bias, eps), weight, bias))``

    Args:
        x: (..., C), any strides.
        norm_weight, norm_bias: γ and β of the norm, (C,) or None.
        weight, bias: of the linear layer, (D, C) and (D,) or None.
        eps: added to the variance.
        activation: None or "gelu".

    Returns:
        (..., D) in the dtype of x, or in autocast's where that is on (the norm is then computed in fp32, from x as it
        came).

    Raises:
        ValueError: a shape, ``eps`` or ``activation`` is not one of the allowed.
        TypeError: dtypes differ and autocast is off, or an argument is not a tensor.
        RuntimeError: the backend is ``triton`` and its kernels cannot take the call; devices differ.
    """
    tensors = (x, norm_weight, norm_bias, weight, bias)
    if has_torch_function(tensors):
        if registration.overridden(tensors):
            return composition(*tensors, eps, activation)
        return handle_torch_function(layer_norm_linear, tensors, *tensors, eps=eps, activation=activation)
    _check(x, norm_weight, norm_bias, weight, bias, eps, activation)
    chosen = runtime.select("layer_norm_linear", x, lambda: _why_not(x, norm_weight, norm_bias, weight, bias))
    if chosen == "torch":
        return composition(*tensors, eps, activation)
    dtype = runtime.autocast_dtype(x) or x.dtype
    return LayerNormLinearFunction.apply(*tensors, eps, activation, dtype, chosen)
