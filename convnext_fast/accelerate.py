"""The kernels inside of models that exist: :func:`accelerate`, :func:`restore`, and the report of what was swapped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import dwconv_kernels as dk

from .backend_in_use import describe_backend
from .block import Block, fits_a_block, under_autocast
from .block_dialects import (
    GRN_EPS,
    BlockDialect,
    dialect_of,
    drop_probability,
    dtypes_agree,
    grn_eps,
    grn_of,
    part,
    run_block,
)
from .block_proof import class_name, makes_channels_last, unlike
from .class_swap import (
    Swapped,
    both,
    forward_of,
    is_swapped,
    only_argument,
    original_class,
    swap,
    swap_of,
    unswap,
)

LARGE = 5  # taps in one direction from which on a kernel is large


class _Conv2d(Swapped):
    """A depthwise ``nn.Conv2d`` on :func:`dk.depthwise_conv2d`."""

    def _convnext_fast_run(self, x: Tensor) -> Tensor:
        if dk.engages(x) and _why_not_conv(self) is None:
            return dk.depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return forward_of(self)(self, x)


@dataclass(frozen=True)
class _BlockSettings:
    dialect: BlockDialect
    kinds: tuple[tuple[tuple[str, ...], tuple[type, ...]], ...]  # the class of each part but the convolution, if any
    children: tuple[tuple[tuple[str, ...], int], ...]  # how many the block and its containers have
    memory: str
    makes_channels_last: bool


class _Block(Swapped):
    """A ConvNeXt block on :func:`dk.convnext_block`; its settings are :class:`_BlockSettings`."""

    def _convnext_fast_run(self, x: Tensor) -> Tensor:
        if dk.engages(x):
            settings = swap_of(self).settings
            fits = _why_not_block(self, settings) is None and dtypes_agree(self, settings.dialect, x)
            if fits and not _would_lose_tf32(self, settings.dialect, x):
                if settings.makes_channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                return run_block(self, settings.dialect, x, settings.memory)
        return forward_of(self)(self, x)


_CONV_KINDS = (*both(nn.Conv2d, _Conv2d), dk.DepthwiseConv2d)


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    """Why a swapped convolution is PyTorch's own for now; None where it is not."""
    if conv.padding_mode != "zeros":
        return f'padding_mode is {conv.padding_mode!r}; "zeros" is allowed'
    if not conv.groups == conv.in_channels == conv.weight.shape[0] or conv.weight.shape[1] != 1:
        return f"it is {conv!r} now"
    return "its _conv_forward was replaced" if "_conv_forward" in conv.__dict__ else None


def _why_not_block(block: nn.Module, settings: _BlockSettings) -> str | None:
    """Why a swapped block calls its children one after another for now; None where it does not."""
    dialect = settings.dialect
    for path, count in settings.children:
        module = part(block, path) if path else block
        if module is not None and len(module._modules) != count:
            return f"{'.'.join(path) or 'it'} has other children than when it was swapped"
    for path, kinds in ((dialect.conv, _CONV_KINDS), *settings.kinds):
        module = part(block, path)
        if module is None:
            if kinds:
                return f"{'.'.join(path)} was removed"
        elif not dk.is_plain(module, *kinds):
            return f"{'.'.join(path)} {_what_happened(module, kinds)}"
        elif kinds[0] is nn.Dropout and module.training and module.p > 0:
            return f"{'.'.join(path)} drops with p = {module.p}"
    if getattr(part(block, dialect.act), "approximate", "none") != "none":
        return f"{'.'.join(dialect.act)} is not GELU (erf)"
    if grn_eps(block, dialect) != GRN_EPS:
        return f"the ε of {'.'.join(dialect.grn)} is {grn_eps(block, dialect)}"
    drop_path = part(block, dialect.drop_path)
    if drop_path is not None and type(drop_path) is not nn.Identity and drop_probability(drop_path) is None:
        return f"the probability of {'.'.join(dialect.drop_path)} is no number"
    conv, norm = part(block, dialect.conv), part(block, dialect.norm)
    if norm.weight is not None and norm.weight.shape != (conv.in_channels,):
        return f"{'.'.join(dialect.norm)} is {norm!r}"
    return None if fits_a_block(conv) else f"{'.'.join(dialect.conv)} is {conv!r}"


def _would_lose_tf32(block: nn.Module, dialect: BlockDialect, x: Tensor) -> bool:
    """Has ``block`` 1×1 convolutions that PyTorch runs in TF32, where our operator would not? Then it is the faster."""
    return (
        isinstance(part(block, dialect.fc1), nn.Conv2d)
        and x.dtype == torch.float32
        and not under_autocast(x)
        and dk.current_backend() == "auto"
        and dk.tf32_in_convolutions_alone()
    )


def _why_not_parameters(block: nn.Module, dialect: BlockDialect) -> str | None:
    """The same for dtypes, of maps that have that of the parameters."""
    weight = part(block, dialect.conv).weight
    if not dtypes_agree(block, dialect, weight):
        return "its parameters have several dtypes, of which autocast alone makes one"
    if weight.is_cuda and _would_lose_tf32(block, dialect, weight):
        return "in fp32 its 1×1 convolutions may be TF32, and linear layers may not"
    return "its parameters are float64" if weight.dtype == torch.float64 else None


def _what_happened(module: nn.Module, kinds: tuple[type, ...]) -> str:
    if type(module) not in kinds:
        return f"is {class_name(module)} now"
    return "has hooks, or a forward or parameters of its own (or all modules have hooks)"


@dataclass
class AccelerateReport:
    """What :func:`accelerate` did, as a table where it is printed.

    Attributes:
        model: class name of the model.
        swapped, skipped: (module name, what it is or why not), in the model's order.
        runs: which backend serves the device that the parameters are on now.
    """

    model: str
    runs: str
    swapped: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} swapped, {len(self.skipped)} skipped; {self.runs}"]
        rows = [
            (label, str(len(names)), _first_to_last(names), text)
            for label, entries in (("swapped", self.swapped), ("skipped", self.skipped))
            for text, names in _by_text(entries).items()
        ]
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(3)]
        for label, count, names, text in rows:
            lines.append(f"{label}  {count:>{widths[1]}}  {names:<{widths[2]}}  {text}")
        return "\n".join(lines)


def _by_text(entries: list[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, text in entries:
        groups.setdefault(text, []).append(name or "(the model itself)")
    return groups


def _first_to_last(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def accelerate(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, *, memory: str = "default"
) -> AccelerateReport:
    """Run the ConvNeXt blocks and large-kernel depthwise convolutions of ``model`` on the kernels. In place.

    Blocks, V1 and V2, of the original repositories, timm, torchvision, Hugging Face (ConvNext, ConvNextV2,
    DINOv3ConvNext) and mmpretrain, and of forks whose blocks have the same children and compute the same; and every
    depthwise ``nn.Conv2d`` of any other network that there are kernels for, from 5 taps in one direction up. Modules
    get another forward and nothing else: parameters, their names and order, hooks, copies and checkpoints stay what
    they were. Where the model is does not matter: device, dtype and what became of a block's children are looked at in
    every call, and the module's own forward runs wherever the kernels cannot (on a CPU, while exporting or tracing, or
    where a child has hooks or was replaced, by LoRA, say). Call it again to hear what has changed since.

    Args:
        model: any network; also one that is compiled, or wrapped by DistributedDataParallel.
        filter_fn: ``filter_fn(module, name)`` says whether a block or convolution may be swapped; all by default.
        memory: what blocks keep for the backward pass, see :func:`dk.convnext_block`.

    Returns:
        What was swapped, what was not, and why.

    Warns:
        UserWarning: nothing was swapped.

    Raises:
        TypeError: model is not a module, or filter_fn cannot be called.
        ValueError: memory is not one of the allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is allowed")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is a {type(filter_fn).__name__}; a function of (module, name), or None, is allowed")
    if memory not in dk.MEMORY:
        raise ValueError(f"memory is {memory!r}; allowed: {', '.join(dk.MEMORY)}")
    report = AccelerateReport(type(model).__name__, _runs(model))
    served: set[int] = set()  # what blocks take care of
    for name, module in list(model.named_modules()):
        kind = None if id(module) in served else _kind(module)
        if kind is None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            before = " (an earlier call swapped it)" if isinstance(module, Swapped) else ""
            report.skipped.append((name, f"{kind}: filter_fn said no{before}"))
            continue
        reason = _swap_block(module, memory) if kind == "block" else _swap_conv(module)
        if kind == "block" and isinstance(module, _Block):
            _swap_conv_of(module, name, filter_fn)
        if reason is not None:
            report.skipped.append((name, f"{kind}: {reason}"))
        else:
            report.swapped.append((name, _describe(module)))
        if reason is None or isinstance(module, Block):
            served.update(map(id, module.modules()))
    if not report.swapped and not any(isinstance(module, (Block, dk.DepthwiseConv2d)) for module in model.modules()):
        warnings.warn(
            f"accelerate swapped nothing in this {report.model}: {len(report.skipped)} blocks or depthwise "
            f"convolutions were found, and skipped for the reasons in the report",
            stacklevel=2,
        )
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`accelerate`: every module of ``model`` gets its own forward back. Returns their names.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a module was swapped and its class then wrapped (by FSDP or a parametrisation); nothing is undone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is allowed")
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Swapped)]
    for name, module in swapped:
        if not is_swapped(module):
            raise RuntimeError(
                f"{name} was swapped and then became a {type(module).__name__} (FSDP, parametrisation); that has to be "
                f"removed before restore"
            )
    for _, module in swapped:
        unswap(module)
    return [name for name, _ in swapped]


def _runs(model: nn.Module) -> str:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return f"on {device}, they run on {describe_backend(device)}"


def _kind(module: nn.Module) -> str | None:
    """What accelerate has to do with ``module``: "block", "convolution" or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, Block) or dialect_of(module) is not None:
        return "block"
    if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels or module.groups == 1:
        return None
    return "convolution" if max(module.kernel_size) > 1 else None


def _describe(module: nn.Module) -> str:
    if isinstance(module, _Block):
        settings = swap_of(module).settings
        version = "V1" if grn_of(module, settings.dialect) is None else "V2"
        text = f"ConvNeXt {version} block of {settings.dialect.name}"
        reason = _why_not_block(module, settings) or _why_not_parameters(module, settings.dialect)
    else:
        text, reason = f"depthwise convolution {'×'.join(map(str, module.kernel_size))}", _why_not_conv(module)
    return text if reason is None else f"{text}; for now by its own forward: {reason}"


def _why_never(module: nn.Module) -> str | None:
    """Why no module of this class, or not this one of them, can be given another forward."""
    if isinstance(module, (Block, dk.DepthwiseConv2d)):
        return "it is convnext_fast's own, and takes the kernels where there are any"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a graph that torch.fx traced"
    if only_argument(original_class(module)) is None:
        return "its forward does not take a map alone"
    return None


def _swap_block(block: nn.Module, memory: str) -> str | None:
    """Swap ``block``, or say why not."""
    reason = _why_never(block)
    if reason is not None or (isinstance(block, Swapped) and not is_swapped(block)):
        return reason  # None of the latter: it was swapped before its class was derived from
    dialect = dialect_of(block)
    reason = unlike(block, dialect)
    if reason is not None and is_swapped(block):
        settings = swap_of(block).settings
        if _why_not_block(block, settings) is not None:  # it stays so, and calls its children for as long as it has to
            swap(block, _Block, replace(settings, memory=memory))
            return None
        unswap(block)  # what came since is nothing that a call would find out
    if reason is not None:
        return reason
    conv = part(block, dialect.conv)
    if type(conv) not in _CONV_KINDS:
        return f"{'.'.join(dialect.conv)} is {class_name(conv)}; nn.Conv2d is allowed"
    parts = ((path, part(block, path)) for path in dialect.known() if path != dialect.conv)
    kinds = tuple((path, () if module is None else (type(module),)) for path, module in parts)
    owners = ((path, part(block, path) if path else block) for path in ((), *dialect.containers))
    children = tuple((path, len(owner._modules)) for path, owner in owners)
    swap(block, _Block, _BlockSettings(dialect, kinds, children, memory, makes_channels_last(block, dialect)))
    return None


def _swap_conv_of(block: nn.Module, name: str, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
    """Swap the convolution of a swapped block, which serves where the block as a whole cannot."""
    path = swap_of(block).settings.dialect.conv
    conv = part(block, path)
    if isinstance(conv, nn.Conv2d) and (filter_fn is None or filter_fn(conv, ".".join([name, *path]).lstrip("."))):
        _swap_conv(conv)


def _swap_conv(conv: nn.Conv2d) -> str | None:
    reason = _why_never(conv)
    if reason is not None or (isinstance(conv, Swapped) and not is_swapped(conv)):
        return reason
    cls = original_class(conv)
    if cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward:
        return f"{cls.__module__}.{cls.__qualname__} has a forward of its own"
    if conv.out_channels != conv.in_channels:
        return f"it makes {conv.out_channels} channels of {conv.in_channels}; as many are allowed"
    if max(conv.kernel_size) < LARGE:
        return f"its kernel is {'×'.join(map(str, conv.kernel_size))}; from {LARGE} taps in one direction up is allowed"
    if conv.padding_mode != "zeros":
        return _why_not_conv(conv)
    taken, reason = dk.depthwise_kernels_take(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if taken:
        swap(conv, _Conv2d)
    return None if taken else reason
