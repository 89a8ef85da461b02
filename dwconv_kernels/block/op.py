"""The operator ``convnext_block``: registration, autograd, the public function."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from .. import registration, runtime
from ..depthwise import op as depthwise
from ..dtypes import sum_dtype
from ..norm_linear import op as norm_linear
from . import reference
from .reference import Parameters, Saved

MEMORY = ("default", "lean", "fast")

# What calls with these signatures were found to be: right, and why the kernels cannot take them. A block has thirteen
# tensors, and looking at them takes longer than launching its kernels.
_CHECKED = registration.Memo()
_REASONS = registration.Memo()
_UNKNOWN = object()

# Every signature below is spelled in one order: x, nine tensors of Parameters, row_scale, the two of GRN.
_TENSORS = (
    "Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? row_scale, "
    "Tensor? grn_weight, Tensor? grn_bias"
)
_ROW_SCALE = 10  # its place among them
_COUNT = 13


def _unpack(tensors) -> tuple[Tensor, Parameters, Tensor | None]:
    return tensors[0], Parameters(*tensors[1:_ROW_SCALE], *tensors[_ROW_SCALE + 1 :]), tensors[_ROW_SCALE]


def _forward(*arguments):
    *tensors, eps, memory, dtype, backend = arguments
    if backend == "triton":
        return runtime.launchers("block").block_forward(*tensors, eps, memory, dtype)
    x, p, row_scale = _unpack(tensors)
    out, saved = reference.convnext_block_reference(x, p, row_scale, eps, memory, dtype)
    results = _forward_fake(*arguments)
    return tuple(result.copy_(value) for result, value in zip(results, (out, *saved), strict=True))


def _forward_fake(*arguments):
    *tensors, _eps, memory, dtype, _backend = arguments
    x, p, _ = _unpack(tensors)
    n, c, h, w = x.shape
    wide = sum_dtype(dtype)
    kept = memory != "lean"
    return (
        registration.empty_map(x, x.shape, reference.block_dtype(x, p.layer_scale, dtype)),
        x.new_empty((n, h, w, c) if kept else 0, dtype=dtype),
        x.new_empty((n, h, w) if kept else 0, dtype=wide),
        x.new_empty((n, h, w) if kept else 0, dtype=wide),
        x.new_empty((n, h, w, p.fc1_weight.shape[0]) if reference.keeps_u(memory, c) else 0, dtype=dtype),
    )


def _backward(dout, *arguments):
    *tensors, y, mean, rstd, u, eps, memory, dtype, wanted, backend = arguments
    if backend == "triton":
        return runtime.launchers("block").block_backward(dout, *arguments[:-1])
    x, p, row_scale = _unpack(tensors)
    saved = Saved(y, mean, rstd, u)
    values = reference.convnext_block_backward_reference(dout, x, p, row_scale, saved, eps, memory, dtype)
    return tuple(registration.fill(_backward_fake(dout, *arguments), values, wanted))


def _backward_fake(dout, *arguments):
    *tensors, _y, _mean, _rstd, _u, _eps, _memory, _dtype, wanted, _backend = arguments
    x, p, _ = _unpack(tensors)
    dx = registration.empty_map(x, x.shape) if wanted[0] else x.new_empty(0)
    return (dx, *registration.parameter_gradients(p, wanted[1:], x))


def _parts_flops(x_shape, dw_shape, fc1_shape) -> tuple[int, int]:
    """FLOPs of the convolution and of one of the two linear layers."""
    return 2 * math.prod(x_shape) * dw_shape[2] * dw_shape[3], 2 * math.prod(x_shape) * fc1_shape[0]


def _forward_flops(x_shape, dw_shape, dw_bias, norm_weight, norm_bias, fc1_shape, *_, **__) -> int:
    convolution, linear = _parts_flops(x_shape, dw_shape, fc1_shape)
    return convolution + 2 * linear


def _backward_flops(dout, *arguments, **_) -> int:
    # Input and weight gradient of each part; what is computed a second time is not counted.
    convolution, linear = _parts_flops(arguments[0], arguments[1], arguments[5])
    wanted = arguments[-2]
    below_norm = any(wanted[:3])
    below_fc1 = below_norm or any(wanted[3:5])
    below_grn = below_fc1 or any(wanted[5:7]) or any(wanted[10:])
    return (
        (wanted[0] + wanted[1]) * convolution
        + (below_fc1 + wanted[5]) * linear
        + (below_grn + (wanted[7] or wanted[9])) * linear
    )


def _save(ctx, inputs, output) -> None:
    ctx.settings = inputs[_COUNT:]
    ctx.save_for_backward(*inputs[:_COUNT], *output[1:])


def _setup_raw(ctx, inputs, output) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, dout, *_):
    saved = ctx.saved_tensors  # once: a checkpoint hands them out a single time
    eps, memory, dtype, backend = ctx.settings
    needs = (*ctx.needs_input_grad[:_ROW_SCALE], *ctx.needs_input_grad[_ROW_SCALE + 1 : _COUNT])
    x, p, _row_scale = _unpack(saved[:_COUNT])
    inputs = (x, *p)
    wanted = [need and tensor is not None for need, tensor in zip(needs, inputs, strict=True)]
    gradients = _BACKWARD(dout, *saved, eps, memory, dtype, wanted, backend)
    given = registration.given(gradients, inputs, wanted)
    return (*given[:_ROW_SCALE], None, *given[_ROW_SCALE:], None, None, None, None)


_FORWARD = registration.register_operator(
    "convnext_block",
    f"({_TENSORS}, float eps, str memory, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_flops,
    backward=_gradients,
    setup_context=_setup_raw,
)
_BACKWARD = registration.register_operator(
    "convnext_block_backward",
    f"(Tensor dout, {_TENSORS}, Tensor y, Tensor mean, Tensor rstd, Tensor u, float eps, str memory, ScalarType dtype, "
    f"bool[12] wanted, str backend) -> ({', '.join(['Tensor'] * 12)})",
    _backward,
    _backward_fake,
    _backward_flops,
    backward=registration.no_second_derivative("convnext_block"),
)


class ConvNeXtBlockFunction(torch.autograd.Function):
    """``apply(x, *nine parameters, row_scale, grn_weight, grn_bias, eps, memory, dtype, backend)``; all checked."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _FORWARD(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dout):
        return _gradients(ctx, dout)


def _check(x: Tensor, p: Parameters, row_scale: Tensor | None, eps: float, memory: str) -> None:
    if torch.jit.is_tracing():  # sizes are traced values, and comparing them would be recorded
        return
    if memory not in MEMORY:
        raise ValueError(f"memory is {memory!r}; allowed: {', '.join(MEMORY)}")
    registration.check_same(x, dict(zip(Parameters._fields, p, strict=True)))  # Dynamo knows no _asdict
    if row_scale is not None and not isinstance(row_scale, Tensor):
        raise TypeError(f"row_scale is a {type(row_scale).__name__}; a tensor is allowed")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError("row_scale requires a gradient, and has none; a tensor that does not is allowed")
    if row_scale is not None and row_scale.device != x.device:
        raise RuntimeError(f"row_scale is on {row_scale.device}; the device of x, {x.device}, is allowed")
    depthwise.check_tensors(x, p.dw_weight, p.dw_bias, prefix="dw_")
    if p.dw_weight.shape[2] % 2 == 0 or p.dw_weight.shape[3] % 2 == 0:
        raise ValueError(f"dw_weight has shape {tuple(p.dw_weight.shape)}; (C, 1, KH, KW) with odd sizes is allowed")
    channels, hidden = x.shape[1], p.fc1_weight.shape[0]
    norm_linear.check_norm(channels, p.norm_weight, p.norm_bias, eps)
    norm_linear.check_linear("fc1_", p.fc1_weight, p.fc1_bias, channels)
    norm_linear.check_linear("fc2_", p.fc2_weight, p.fc2_bias, hidden)
    for name, vector, size in (
        ("layer_scale", p.layer_scale, channels),
        ("row_scale", row_scale, x.shape[0]),
        ("grn_weight", p.grn_weight, hidden),
        ("grn_bias", p.grn_bias, hidden),
    ):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; ({size},) is allowed")
    if p.fc2_weight.shape[0] != channels:
        raise ValueError(f"fc2_weight has shape {tuple(p.fc2_weight.shape)}; (C, D) with C={channels} is allowed")
    if (p.grn_weight is None) != (p.grn_bias is None):
        raise ValueError("one of grn_weight and grn_bias is None; both or neither is allowed")


def why_not(
    x, dw_weight, dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale=None,
    row_scale=None, grn_weight=None, grn_bias=None, eps=1e-6, memory="default",
) -> str | None:  # fmt: skip
    """Why the kernels cannot take this call of :func:`convnext_block`; None where they can."""
    p = Parameters(
        dw_weight, dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale,
        grn_weight, grn_bias,
    )  # fmt: skip
    _check(x, p, row_scale, eps, memory)
    return _why_not(x, p, row_scale)


def _why_not(x: Tensor, p: Parameters, row_scale: Tensor | None, signature: Hashable = None) -> str | None:
    if signature is None:
        reason = runtime.why_not_device("block", x) or registration.why_not_tensors((x, *p))
        return runtime.launchers("block").why_not(x, p, row_scale) if reason is None else reason
    if registration.transformed():
        return "a torch.func transform is active"
    reason = _REASONS.get(signature, _UNKNOWN)  # one access: another thread may clear what it was in
    return _REASONS.remember(signature, _why_not(x, p, row_scale)) if reason is _UNKNOWN else reason


def _requires_grad(row_scale) -> bool:
    return isinstance(row_scale, Tensor) and row_scale.requires_grad


def composition(x: Tensor, p: Parameters, row_scale: Tensor | None, eps: float) -> Tensor:
    """PyTorch's own operators, for the backend ``torch``, around the convolution on the backend in force."""
    padding = reference.same_padding(p.dw_weight)
    t = depthwise.convolve(x, p.dw_weight, p.dw_bias, (1, 1), padding, (1, 1))
    t = t.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    h = norm_linear.composition(t, p.norm_weight, p.norm_bias, p.fc1_weight, p.fc1_bias, eps, "gelu")
    if p.grn_weight is not None:
        norm = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)
        relative = norm / (norm.mean(-1, keepdim=True) + reference.GRN_EPS)
        # In the original's order. Fewer passes over h are possible, h·(1 + w·R) + v, but in half precision they round
        # 1 + w·R once for all pixels of a channel.
        h = p.grn_weight * (h * relative) + p.grn_bias + h
    t = F.linear(h, p.fc2_weight, p.fc2_bias)
    scale = p.layer_scale
    if row_scale is not None:
        rows = row_scale.to(t.dtype if scale is None else scale.dtype).view(-1, 1, 1, 1)
        scale = rows if scale is None else rows * scale
    x = x.permute(0, 2, 3, 1)
    if scale is None:
        out = x + t
    elif x.dtype == t.dtype == scale.dtype and not torch.is_grad_enabled() and not runtime.exporting():
        out = torch.addcmul(x, t, scale)  # one pass over the map instead of two, but one more in the backward pass
    else:
        out = x + t * scale
    return out.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


@runtime.explained_by(why_not)
def convnext_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    grn_weight: Tensor | None = None,
    grn_bias: Tensor | None = None,
    eps: float = 1e-6,
    memory: str = "default",
) -> Tensor:
    """The ConvNeXt block: depthwise convolution, layer norm, two linear layers around GELU (and GRN), residual.

    Equivalent to::

        t = F.conv2d(x, dw_weight, dw_bias, padding="same", groups=C).permute(0, 2, 3, 1)
        h = F.gelu(F.linear(F.layer_norm(t, (C,), norm_weight, norm_bias, eps), fc1_weight, fc1_bias))
        g = h.norm(dim=(1, 2), keepdim=True)                                      # where grn_weight is given
        h = h + grn_weight * (h * (g / (g.mean(-1, keepdim=True) + 1e-6))) + grn_bias
        t = layer_scale * F.linear(h, fc2_weight, fc2_bias)
        x + row_scale[:, None, None, None] * t.permute(0, 3, 1, 2)

    Args:
        x: (N, C, H, W), any strides; channels_last is the fast layout.
        dw_weight, dw_bias: (C, 1, KH, KW) with odd KH and KW, and (C,) or None.
        norm_weight, norm_bias: (C,) or None.
        fc1_weight, fc1_bias: (D, C), and (D,) or None; ConvNeXt has D = 4·C.
        fc2_weight, fc2_bias: (C, D), and (C,) or None.
        layer_scale: (C,) or None.
        row_scale: (N,) or None, the drop-path factor per image, 0 or 1/keep, drawn by the caller; has no gradient.
        grn_weight, grn_bias: (D,), both or neither.
        eps: of the layer norm.
        memory: what is kept for the backward pass. "default": x, the convolution's output, two numbers per pixel and,
            from 768 channels on, the first linear layer's output; "lean": x alone; "fast": the first linear layer's
            output for any number of channels. (The backend ``torch`` keeps what PyTorch's operators keep, and for
            "lean" computes the block a second time.)

    Returns:
        (N, C, H, W) in the memory format of x and in its dtype; under autocast in the dtype of the composition above,
        which is fp32 where x or layer_scale is.

    Raises:
        ValueError: a shape, ``eps`` or ``memory`` is not one of the allowed, or row_scale requires a gradient.
        TypeError: dtypes differ and autocast is off, or an argument is not a tensor.
        RuntimeError: the backend is ``triton`` and its kernels cannot take the call; devices differ.
    """
    tensors = (
        x, dw_weight, dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale,
        row_scale, grn_weight, grn_bias,
    )  # fmt: skip
    if has_torch_function(tensors):
        if registration.overridden(tensors):
            return composition(*_unpack(tensors), eps)
        return handle_torch_function(convnext_block, tensors, *tensors, eps=eps, memory=memory)
    return _run(tensors, eps, memory)


def _run(tensors: tuple[Tensor | None, ...], eps: float, memory: str) -> Tensor:
    """:func:`convnext_block`, checked, on the backend in force."""
    x, p, row_scale = _unpack(tensors)
    known = type(eps) is float and type(memory) is str  # else they may not even be hashable
    signature = registration.signature(tensors, eps, memory, _requires_grad(row_scale)) if known else None
    if signature not in _CHECKED:
        _check(x, p, row_scale, eps, memory)
        _CHECKED.remember(signature, True)
    chosen = runtime.select("convnext_block", x, lambda: _why_not(x, p, row_scale, signature))
    if chosen == "torch" and not depthwise.is_empty(x):
        if memory == "lean" and torch.is_grad_enabled() and not runtime.exporting():
            return checkpoint(composition, x, p, row_scale, eps, use_reentrant=False, preserve_rng_state=False)
        return composition(x, p, row_scale, eps)
    dtype = runtime.autocast_dtype(x) or x.dtype
    backend = "reference" if chosen == "torch" else chosen
    if registration.needs_no_function():  # nor is there a backward pass to keep anything for
        if backend == "triton" and registration.unobserved(tensors):
            return runtime.launchers("block").block_inference(*tensors, eps, "lean", dtype)
        return _FORWARD(*tensors, eps, "lean", dtype, backend)[0]
    return ConvNeXtBlockFunction.apply(*tensors, eps, memory, dtype, backend)
