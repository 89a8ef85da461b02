"""Does a block compute what the operator does that is to run in its place? Its parts and its forward, looked at once.

What a class of blocks computes is compared with the operator on random parameters: results, gradients and dtypes. So a
fork whose forward does something else is found out, and a new version of a library, too.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

import dwconv_kernels as dk

from .block import fits_a_block
from .block_dialects import GRN_EPS, BlockDialect, drop_probability, grn_eps, kept_factor, part, run_block
from .class_swap import original_class


def unlike(block: nn.Module, dialect: BlockDialect) -> str | None:
    """Why ``block`` does not compute what :func:`run_block` does; None where it does.

    Its forward is run in float64 on the CPU, with random parameters, once for each combination of the classes of its
    parts and of whatever they are set to, apart from their widths; every time where that is something that cannot be
    compared. No values of ``block`` change, and no state of PyTorch.
    """
    with _alone():
        return _unlike_parts(block, dialect) or _cached(_compare, block, dialect)


def makes_channels_last(block: nn.Module, dialect: BlockDialect) -> bool:
    """Does ``block`` make channels_last maps of contiguous ones? A sum takes the layout of its first operand.

    Of a block that is not :func:`unlike`.
    """
    with _alone():
        return _cached(_makes_channels_last, block, dialect)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """On the CPU, on values, by PyTorch's operators, whatever is going on; and no random numbers are used up.

    (Not in other threads: what they draw meanwhile from the CPU's generator is drawn again.)
    """
    backend = contextlib.nullcontext() if dk.current_backend() in ("auto", "torch") else dk.backend("torch")
    autocast, inference = torch.autocast("cpu", enabled=False), torch.inference_mode(False)
    with _disable_current_modes(), torch.random.fork_rng(devices=()), inference, autocast, backend:
        yield


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unlike_parts(block: nn.Module, dialect: BlockDialect) -> str | None:
    stranger = _stranger(block, dialect)
    if stranger is not None:
        return f"its child {stranger} ({class_name(block.get_submodule(stranger))}) has no part in a ConvNeXt block"
    conv, norm = part(block, dialect.conv), part(block, dialect.norm)
    reason = _unlike_convolution(conv)
    if reason is not None:
        return f"{'.'.join(dialect.conv)}: {reason}"
    if not _norm_error(norm, conv.in_channels) < _ROUNDED:
        return f"{'.'.join(dialect.norm)} is {class_name(norm)}; a layer norm over the channels is allowed"
    for path in (dialect.fc1, dialect.fc2):
        linear = part(block, path)
        if type(linear) is not nn.Linear and not _is_1x1(linear):
            return f"{'.'.join(path)} is {class_name(linear)}; nn.Linear or a 1×1 nn.Conv2d is allowed"
    act = part(block, dialect.act)
    if act is not None and not _is_gelu(act):
        return f"{'.'.join(dialect.act)} is {repr(act).splitlines()[0]}; GELU (erf) is allowed"
    if grn_eps(block, dialect) != GRN_EPS:
        return f"the ε of {'.'.join(dialect.grn)} is {grn_eps(block, dialect)}; {GRN_EPS} is allowed"
    for path in dialect.containers:
        if isinstance(part(block, path), torch.fx.GraphModule):
            return f"{'.'.join(path)} is a graph that torch.fx traced"
    for path in dialect.idle:
        idle = part(block, path)
        if idle is not None and not _is_idle(idle):
            return f"{'.'.join(path)} is {class_name(idle)}; nn.Identity or nn.Dropout is allowed"
    drop_path = part(block, dialect.drop_path)
    if drop_path is not None and type(drop_path) is not nn.Identity and not _drops_rows(drop_path):
        return f"{'.'.join(dialect.drop_path)} is {class_name(drop_path)}, which does not drop whole images"
    return None


def _unlike_convolution(conv: nn.Module) -> str | None:
    if not isinstance(conv, nn.Conv2d):
        return f"it is {class_name(conv)}; nn.Conv2d is allowed"
    taken, reason = dk.depthwise_kernels_take(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if not taken:
        return reason
    allowed = "a depthwise one that keeps the size, padded with zeros, is allowed"
    return None if fits_a_block(conv) else f"it is {conv!r}; {allowed}"


def _stranger(block: nn.Module, dialect: BlockDialect) -> str | None:
    """A module below ``block`` that is none of its parts, nor inside of one that must be of one class anyway."""
    known = {".".join(path) for path in dialect.known()}
    inside = tuple(".".join(path) + "." for path in (dialect.conv, dialect.fc1, dialect.fc2))
    names = (name for name, _ in block.named_modules() if name)
    return next((name for name in names if name not in known and not name.startswith(inside)), None)


def _is_idle(module: nn.Module) -> bool:
    """Does it hand on what it gets, or dimensions in another order, whatever it is set to and in training, too?

    nn.Dropout does where it does not drop out, which is asked in every call.
    """
    if type(module) in (nn.Identity, nn.Dropout):
        return True
    twin, x = shadow(module), _random((2, 3, 4, 5), torch.Generator().manual_seed(1))
    # What begins with _ is whatever FSDP and others leave behind.
    set_to = [value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE and not key.startswith("_")]
    if list(module.parameters()) or any(isinstance(value, (bool, int, float)) for value in set_to):
        return False
    for training in (False, True):
        twin.train(training)
        try:
            same = twin(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        except Exception:  # whatever a stranger's module says
            return False
        if not same:
            return False
    return True


def _is_1x1(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
    )


# What two right implementations may differ by: in float64, and where a norm computes in fp32 whatever it gets.
_EXACT, _ROUNDED = 1e-9, 1e-5


def _norm_error(norm: nn.Module, channels: int) -> float:
    """How far it is from a layer norm over the channels of maps (N, H, W, C), or else of (N, C, H, W)."""
    if not all(hasattr(norm, name) for name in ("weight", "bias", "eps")):
        return math.inf
    twin, x = shadow(norm), _random((2, 3, 2, channels), torch.Generator().manual_seed(1))
    errors = []
    for scale in (1.0, 1e-3):  # what ε is shows in the second
        with torch.no_grad():
            try:
                expected = F.layer_norm(x * scale, (channels,), twin.weight, twin.bias, twin.eps)
            except (RuntimeError, TypeError):  # these names stand for something else
                return math.inf
            results = _results(twin, x * scale, (x * scale).permute(0, 3, 1, 2))
        errors.append([
            (result - wanted).abs().max().item() if result.shape == wanted.shape else math.inf
            for result, wanted in zip(results, (expected, expected.permute(0, 3, 1, 2)), strict=True)
        ])  # fmt: skip
    return min(max(both) for both in zip(*errors, strict=True))


def _results(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What a stranger's module makes of each input; something empty where it raises or returns no tensor."""
    results = []
    for x in inputs:
        try:
            result = module(x.clone())
        except Exception:  # whatever it says
            result = None
        results.append(result if isinstance(result, Tensor) else torch.empty(0, dtype=x.dtype, device=x.device))
    return results


def _is_gelu(act: nn.Module) -> bool:
    samples = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        (result,) = _results(shadow(act), samples)
    return result.shape == samples.shape and torch.allclose(result, F.gelu(samples), rtol=0, atol=1e-12)


def _drops_rows(drop_path: nn.Module) -> bool:
    """Is the result the input times one factor per image, drawn the same way whatever the size of the maps?"""
    twin = shadow(drop_path).train()
    name = "drop_prob" if hasattr(twin, "drop_prob") else "p"
    if drop_probability(twin) is None:
        return False
    twin.__dict__[name] = 0.25
    x = _random((64, 3, 2, 2), torch.Generator().manual_seed(0))
    results = []
    with torch.no_grad():
        for image in (x, torch.ones(64, 1, 1, 1, dtype=x.dtype, device="cpu")):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            results += _results(twin, image)
    branch, rows = results
    with torch.no_grad():
        (idle,) = _results(twin.eval() or twin, x)
    if not torch.equal(idle, x):
        return False
    if branch.shape != x.shape or rows.shape != (64, 1, 1, 1) or not torch.allclose(branch, x * rows):
        return False
    kept = rows != 0
    return not kept.all() and torch.allclose(rows[kept], torch.full_like(rows[kept], kept_factor(twin, 0.25)))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator) - 0.5


def shadow(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """``module`` with random float64 parameters on the CPU, and without hooks; what has values is not copied.

    Attributes are those of ``module``; its lists and dictionaries are copied, so that a forward may write to them.
    """
    generator = generator or torch.Generator().manual_seed(0)
    cls = original_class(module)
    twin = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = collections.OrderedDict()
        elif isinstance(value, (list, dict, set)):
            twin.__dict__[name] = value.copy()
    random = lambda t: None if t is None else _random(tuple(t.shape), generator)  # noqa: E731
    twin.__dict__["_parameters"] = {name: _parameter(random(p)) for name, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {name: random(buffer) for name, buffer in module._buffers.items()}
    twin.__dict__["_modules"] = {
        name: None if child is None else shadow(child, generator) for name, child in module._modules.items()
    }
    for replaced in ("forward", "_compiled_call_impl"):  # these call the module itself
        twin.__dict__.pop(replaced, None)
    return twin


def _cast(twin: nn.Module, dtype: torch.dtype) -> None:
    """``twin.to(dtype)`` of a shadow, whatever its class does in that (FSDP)."""
    for module in twin.modules():
        for members in (module._parameters, module._buffers):
            for name, t in members.items():
                if t is not None:
                    members[name] = type(t)(t.detach().to(dtype))


def _parameter(values: Tensor | None) -> nn.Parameter | None:
    return None if values is None else nn.Parameter(values)


# By what was compared: classes, their forwards, and what the modules are set to.
_FOUND: dict[tuple, object] = {}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _cached(question: Callable, block: nn.Module, dialect: BlockDialect):
    """``question(block, dialect)``, asked once of blocks that do not differ."""
    try:
        key = question, *_settings(block, dialect)
    except TypeError:  # set to something that cannot be compared
        return question(block, dialect)
    if key not in _FOUND:
        _FOUND[key] = question(block, dialect)
    return _FOUND[key]


def _settings(block: nn.Module, dialect: BlockDialect) -> tuple:
    """All that may decide what ``block`` computes, apart from values and widths.

    Raises:
        TypeError: a module is set to something of which equality says nothing.
    """
    widths = {part(block, dialect.fc2).weight.shape[k]: name for k, name in enumerate(("C", "4C"))}
    found: list = [dialect]
    for name, module in block.named_modules():
        cls = original_class(module)
        found.append((name, cls, *_members(cls)))
        if tuple(name.split(".")) == dialect.drop_path or cls is nn.Dropout:
            continue  # looked at when the block is called
        for key, value in sorted(vars(module).items()):
            if key not in _OF_EVERY_MODULE:
                found.append((key, _frozen(value, widths)))
        for members in (module._parameters, module._buffers):
            found += [(key, None if t is None else _frozen(tuple(t.shape), widths)) for key, t in members.items()]
        found += [(key, child is None) for key, child in module._modules.items()]
    return tuple(found)


def _members(cls: type) -> list[tuple]:
    """All that somebody may exchange in a class and those above it, or set there."""
    found = []
    for c in cls.__mro__:
        for name, value in () if c in (nn.Module, object) else vars(c).items():
            if isinstance(value, property):
                found.append((name, value.fget, value.fset))
            elif isinstance(value, (staticmethod, classmethod)):
                found.append((name, value.__func__))
            elif isinstance(value, types.FunctionType):
                found.append((name, value))
            elif not name.startswith("__") and name != "_abc_impl":
                found.append((name, _frozen(value, {})))
    return found


_COMPARABLE = (
    bool, float, complex, str, bytes, type, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType,
    types.NoneType,
)  # fmt: skip


def _frozen(value: object, widths: dict[int, str]) -> object:
    if isinstance(value, _COMPARABLE):
        return value
    if isinstance(value, int):
        return widths.get(value, value)
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(member, widths) for member in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(member, widths)) for key, member in value.items())
    if type(value) is functools.partial:
        return _frozen((value.func, value.args, value.keywords), widths)
    raise TypeError(f"{type(value).__name__} cannot be compared")


def _silent(block: nn.Module, dialect: BlockDialect) -> nn.Module:
    """The shadow of ``block`` without what draws numbers, which is looked at when the block is called."""
    twin = shadow(block)
    for path in (dialect.drop_path, *dialect.idle):
        if path == dialect.drop_path or type(part(twin, path)) is nn.Dropout:
            owner = part(twin, path[:-1]) or twin
            if path[-1] in owner._modules:
                owner._modules[path[-1]] = nn.Identity()
    return twin


def _makes_channels_last(block: nn.Module, dialect: BlockDialect) -> bool:
    twin = _silent(block, dialect)
    with torch.no_grad():
        x = _random((2, part(twin, dialect.conv).in_channels, 3, 5), torch.Generator().manual_seed(1))
        y = twin(x)
    return not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)


def _compare(block: nn.Module, dialect: BlockDialect) -> str | None:
    twin = _silent(block, dialect)
    operator = functools.partial(run_block, twin, dialect)
    channels = part(twin, dialect.conv).in_channels
    exact = _norm_error(part(block, dialect.norm), channels) < _EXACT
    with torch.enable_grad():
        for training, size in itertools.product((False, True), ((5, 4), (16, 11))):
            twin.train(training)
            shape = (2, channels, *size)
            outcomes = _outcome(operator, twin, shape), _outcome(twin, twin, shape)
            if not _same(*outcomes, _EXACT if exact else 10 * _ROUNDED):
                return _SOMETHING_ELSE
        shape = (1, channels, 3, 3)
        return None if _dtypes(operator, twin, shape) == _dtypes(twin, twin, shape) else _SOMETHING_ELSE


_SOMETHING_ELSE = "its forward computes something else than x + drop_path(γ · fc2(grn(gelu(fc1(norm(conv(x)))))))"


def _outcome(function: Callable[[Tensor], Tensor], twin: nn.Module, shape: tuple[int, ...]) -> list | None:
    """Result and gradients of a map of this shape; None where it raises, or writes to the map that it gets."""
    generator = torch.Generator().manual_seed(1)
    leaf = _random(shape, generator).requires_grad_()
    x = leaf * 1
    twin.zero_grad(set_to_none=True)
    try:
        y = function(x)
        (y * _random(tuple(y.shape), generator)).sum().backward()  # reentrant checkpoints do not know autograd.grad
    except Exception:  # whatever a stranger's forward says
        return None
    return [y.detach(), leaf.grad, *(p.grad for p in twin.parameters())] if x._version == 0 else None


def _same(expected: list | None, result: list | None, tolerance: float) -> bool:
    if expected is None or result is None:
        return False
    for e, r in zip(expected, result, strict=True):
        if e is None or r is None:
            if e is not r:
                return False
        elif e.shape != r.shape or not torch.allclose(r, e, tolerance, tolerance * e.abs().max().item()):
            return False
    return True


def _dtypes(function: Callable[[Tensor], Tensor], twin: nn.Module, shape: tuple[int, ...]) -> list[torch.dtype | None]:
    """Of results, with parameters and maps in fp32 and bf16, with and without autocast; None where it raises."""
    found: list[torch.dtype | None] = []
    single, half = torch.float32, torch.bfloat16
    for parameters, x, autocast in ((single, single, True), (single, half, True), (half, half, False)):
        _cast(twin, parameters)
        with torch.no_grad(), torch.autocast("cpu", half, enabled=autocast):
            try:
                found.append(function(torch.ones(shape, dtype=x, device="cpu")).dtype)
            except Exception:  # whatever a stranger's forward says
                found.append(None)
    return found
