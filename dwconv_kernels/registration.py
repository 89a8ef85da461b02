"""How an operator becomes ``torch.ops.dwconv_kernels.*``, and the layouts of what operators return.

``define`` + ``impl`` + fake, called from a ctx-style ``torch.autograd.Function``, is the cheapest boundary that
torch.compile, export, checkpointing and opcheck all understand. Two nets hang below it:

- tracers that look inside ``Function.forward`` (torch.fx, non-strict export) record the raw operator, so the raw
  forward operator has its own autograd formula, the same one;
- the raw backward operator has an autograd formula that raises. Under ``create_graph=True`` PyTorch records it, and
  whoever differentiates a second time gets the error. ``once_differentiable`` would not do: it drops a gradient penalty
  without a word where the incoming gradient itself needs no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import runtime

NAMESPACE = "dwconv_kernels"


def register_operator(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    flops: Callable,
    backward: Callable,
    setup_context: Callable | None = None,
) -> Callable:
    """Register ``torch.ops.dwconv_kernels.<name>`` and return what calls it, or ``implementation`` where that will do.

    Calls through PyTorch's dispatcher take tens of microseconds more than calls of ``implementation``. Whoever follows
    calls there (compilers, exporters, dispatch modes, autograd) gets to see the operator; where nobody does, nothing is
    lost.

    Args:
        schema: arguments and results, ``"(Tensor x) -> Tensor"``.
        implementation: runs it, on any device.
        fake: allocates exactly what ``implementation`` would, strides included, without computing.
        flops: ``flops(*shapes of the tensor arguments, other arguments, out_shape=...)``, for FlopCounterMode.
        backward, setup_context: the autograd formula, as in ``torch.library.register_autograd``.
    """
    qualified = f"{NAMESPACE}::{name}"

    def run(*args):  # the last one is the backend
        if args[-1] == "triton" or not torch.amp.is_autocast_available(args[0].device.type):
            return implementation(*args)
        # Definitions compute with PyTorch's operators, in the dtypes that they say.
        with torch.autocast(args[0].device.type, enabled=False):
            return implementation(*args)

    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, name):  # a second copy of this module, or a reload, must not define it again
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", run)
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        register_flop_formula(getattr(namespace, name))(flops)
    operator = getattr(namespace, name).default

    def call(*args):
        return run(*args) if unobserved(args) else operator(*args)

    return call


def unobserved(args: Sequence) -> bool:
    """Does nobody follow what is called with these arguments now, the first of which is a tensor?"""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(args[0]) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and _pre_dispatch_modes() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and not torch.autograd._profiler_enabled()
        and torch._C._dispatch_keys(args[0]).raw_repr() in _plain_keys(args[0].device.type)
        # Only the dispatcher carries out what PyTorch has put off: a minus sign.
        and not any(isinstance(t, Tensor) and t.is_neg() for t in args)
    )


@functools.cache
def _plain_keys(device_type: str) -> tuple[int, ...]:
    """What the dispatcher sees of tensors that are nothing but their values: not batched, negated or functional."""
    x = torch.empty(0, device=device_type)
    with torch.inference_mode():
        y = torch.empty(0, device=device_type)
    return torch._C._dispatch_keys(x).raw_repr(), torch._C._dispatch_keys(y).raw_repr()


_pre_dispatch_modes = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: 0)


def needs_no_function() -> bool:
    """Is there nothing to differentiate, so that an autograd.Function would only take time?"""
    return not torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0


def no_second_derivative(operator: str) -> Callable:
    """The autograd formula of a backward operator: raises, naming what can be differentiated twice."""

    def backward(ctx, *_):
        raise NotImplementedError(
            f"{operator} has no second derivative on this backend; "
            f'dwconv_kernels.backend("torch") has one, at the speed of plain PyTorch'
        )

    return backward


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where a map x (N, C, H, W) has its channels side by side in memory, else contiguous."""
    if not x.is_contiguous() and x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return torch.channels_last
    return torch.contiguous_format


def empty_map(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map of ``shape`` (N, C, H, W) in the memory format of x (N, C, H, W); dtype of x by default."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))


def empty_parameter(parameter: Tensor) -> Tensor:
    """An uninitialised gradient with the dtype and, where the parameter is dense, exactly the strides of it.

    DistributedDataParallel compares the strides of gradient and parameter literally, even of dimensions of size 1.
    """
    if parameter.is_contiguous() or (
        parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device)
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def parameter_gradients(parameters: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor) -> list[Tensor]:
    """One gradient to fill per parameter; one of shape (0,) where it is not wanted or there is no parameter.

    Operators return tensors, not None: :func:`given` turns the placeholders back.
    """
    return [
        empty_parameter(parameter) if parameter is not None and need else like.new_empty(0)
        for parameter, need in zip(parameters, wanted, strict=True)
    ]


def fill(gradients: Sequence[Tensor], values: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """Copy ``values`` into the gradients that are wanted; shapes agree up to dimensions of size 1."""
    for gradient, value, need in zip(gradients, values, wanted, strict=True):
        if need and value is not None:
            gradient.copy_(value.reshape(gradient.shape))
    return list(gradients)


def given(gradients: Sequence[Tensor], parameters: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple:
    """What a backward pass hands to autograd: None for what was not wanted or does not exist."""
    return tuple(
        gradient if need and parameter is not None else None
        for gradient, parameter, need in zip(gradients, parameters, wanted, strict=True)
    )


def check_same(x: Tensor, others: dict[str, Tensor | None]) -> None:
    """All tensors on x's device, and of its dtype unless autocast casts them anyway.

    Raises:
        TypeError: something is not a tensor, or dtypes differ.
        RuntimeError: devices differ.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; a tensor is allowed")
    dtype, device = x.dtype, x.device
    for name, other in others.items():
        if other is None or (isinstance(other, Tensor) and other.dtype == dtype and other.device == device):
            continue
        if not isinstance(other, Tensor):
            raise TypeError(f"{name} is a {type(other).__name__}; a tensor is allowed")
        if other.device != x.device:
            raise RuntimeError(f"{name} is on {other.device}; the device of x, {x.device}, is allowed")
        floating = other.is_floating_point() and other.dtype != torch.float64
        castable = floating and runtime.autocast_dtype(x) is not None
        if other.dtype != x.dtype and not castable:
            raise TypeError(f"{name} is {other.dtype}; the dtype of x, {x.dtype}, is allowed (or autocast)")


def overridden(tensors: Sequence) -> bool:
    """Is one of them a tensor subclass with a ``__torch_function__`` of its own (torchao's quantised weights)?

    What such a class can do, it does for PyTorch's functions; so it is given the composition of those. Proxies of
    torch.fx are no tensors: for them, the public function is what is recorded.
    """
    disabled = torch._C._disabled_torch_function_impl
    return any(
        isinstance(t, Tensor) and type(t) is not Tensor and type(t).__torch_function__ is not disabled for t in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def signature(tensors: Sequence[Tensor | None], *settings) -> tuple | None:
    """All that decides whether a call with these tensors is right, and whether kernels take it; to look it up.

    None where there is more to it: subclasses of tensors, sparse ones, compilers. What torch.func does is not in it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    parts = [runtime.autocast_dtype(tensors[0]) if type(tensors[0]) in _PLAIN else None, *settings]
    for t in tensors:
        if t is None:
            parts.append(None)
        elif type(t) in _PLAIN and t.layout is torch.strided:
            parts += (t.shape, t.dtype, t.device)
        else:
            return None
    return tuple(parts)


class Memo(dict):
    """What was found out about signatures: forgotten when there are 4096 of them, or when one is None."""

    def remember(self, key: tuple | None, value):
        if key is not None:
            if len(self) >= 4096:
                self.clear()
            self[key] = value
        return value


def transformed() -> bool:
    """Is a torch.func transform (vmap, grad, jvp) active? Tensors that it hands out have no memory of their own."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def why_not_tensors(tensors: Sequence[Tensor | None]) -> str | None:
    """Why a kernel cannot read these tensors: wrappers (DTensor, quantised ones) have no memory of their own."""
    if transformed():
        return "a torch.func transform is active"
    for t in tensors:
        if t is not None and t.layout is not torch.strided:
            return f"an argument has the layout {t.layout}"
        if t is not None and hasattr(t, "__tensor_flatten__"):
            return f"an argument is a {type(t).__name__}, which wraps other tensors"
    return None
