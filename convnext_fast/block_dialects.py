"""The ConvNeXt block as each library builds it: which child plays which part, and what the block computes.

A block is known by the names of its children. Names prove nothing, so what it computes is compared once, on random
parameters, with the operator that is to run in its place: a fork whose forward does something else is found out.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dwconv_kernels as dk

from .block import as_vector, fits_a_block, under_autocast
from .class_swap import original_class

Path = tuple[str, ...]
GRN_EPS = 1e-6  # of every library; the operator has no other


@dataclass(frozen=True)
class BlockDialect:
    """Where a library's block keeps its parts: paths of modules below it, and the name of the layer scale's parameter.

    ``idle`` are modules that hand on what they get, or its dimensions in another order; ``containers`` those that call
    others.
    """

    name: str
    conv: Path
    norm: Path
    fc1: Path
    act: Path
    fc2: Path
    drop_path: Path
    scale: str
    grn: Path | None = None
    idle: tuple[Path, ...] = ()
    containers: tuple[Path, ...] = ()

    def needed(self) -> tuple[Path, ...]:
        return (self.conv, self.norm, self.fc1, self.fc2)

    def known(self) -> tuple[Path, ...]:
        """All modules that a block may have."""
        grn = (self.grn,) if self.grn else ()
        return (*self.needed(), self.act, *grn, self.drop_path, *self.idle, *self.containers)


def _dialect(name: str, idle: str = "", containers: str = "", grn: str = "", scale: str = "gamma", **parts: str):
    path = lambda dotted: tuple(dotted.split("."))  # noqa: E731
    return BlockDialect(
        name, scale=scale, grn=path(grn) if grn else None, idle=tuple(map(path, idle.split())),
        containers=tuple(map(path, containers.split())), **{part: path(dotted) for part, dotted in parts.items()},
    )  # fmt: skip


_ORIGINAL = {"conv": "dwconv", "fc1": "pwconv1", "act": "act", "grn": "grn", "fc2": "pwconv2", "drop_path": "drop_path"}
_LONG_NAMES = {"conv": "depthwise_conv", "fc1": "pointwise_conv1", "fc2": "pointwise_conv2", "drop_path": "drop_path"}
DIALECTS = (
    _dialect("the original repository", norm="norm", **_ORIGINAL),
    _dialect(
        "timm", conv="conv_dw", norm="norm", fc1="mlp.fc1", act="mlp.act", grn="mlp.grn", fc2="mlp.fc2",
        drop_path="drop_path", idle="mlp.drop1 mlp.norm mlp.drop2 shortcut", containers="mlp",
    ),
    _dialect(
        "torchvision", conv="block.0", norm="block.2", fc1="block.3", act="block.4", fc2="block.5",
        drop_path="stochastic_depth", scale="layer_scale", idle="block.1 block.6", containers="block",
    ),
    _dialect("Hugging Face", norm="layernorm", scale="layer_scale_parameter", **_ORIGINAL),
    _dialect("mmpretrain", norm="norm", act="act", grn="grn", **_LONG_NAMES),
    _dialect("DINOv3", norm="layer_norm", act="activation_fn", **_LONG_NAMES),
)  # fmt: skip


def part(block: nn.Module, path: Path | None) -> nn.Module | None:
    """The module at ``path`` below ``block``; None where there is none."""
    for name in path or ():
        block = block._modules.get(name)
        if block is None:
            return None
    return block if path else None


def dialect_of(block: nn.Module) -> BlockDialect | None:
    """Whose block has children of these names?"""
    for dialect in DIALECTS:
        if all(part(block, path) is not None for path in dialect.needed()):
            return dialect
    return None


def as_matrix(parameter: Tensor) -> Tensor:
    """The weight of a linear layer (D, C) or of a 1×1 convolution (D, C, 1, 1) as (D, C).

    Through views that hand back a gradient with the strides of the parameter, see :func:`block.as_vector`.
    """
    if parameter.ndim == 2:
        return parameter
    if parameter.stride(3) != 1:  # channels_last, (C, 1, C, C)
        return parameter.permute(0, 2, 3, 1).squeeze(2).squeeze(1)
    return parameter.squeeze(3).squeeze(2)


def _grn_vectors(grn: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    if grn is None:
        return None, None
    weight, bias = (grn.weight, grn.bias) if hasattr(grn, "weight") else (grn.gamma, grn.beta)
    return as_vector(weight), as_vector(bias)


def run_block(block: nn.Module, dialect: BlockDialect, x: Tensor, memory: str = "default") -> Tensor:
    """What ``block`` computes of x (N, C, H, W), as one operator: :func:`dk.convnext_block`."""
    conv, norm = part(block, dialect.conv), part(block, dialect.norm)
    fc1, fc2 = part(block, dialect.fc1), part(block, dialect.fc2)
    grn_weight, grn_bias = _grn_vectors(part(block, dialect.grn))
    scale = getattr(block, dialect.scale, None)
    return dk.convnext_block(
        x,
        conv.weight, conv.bias,
        norm.weight, norm.bias,
        as_matrix(fc1.weight), fc1.bias,
        as_matrix(fc2.weight), fc2.bias,
        layer_scale=None if scale is None else as_vector(scale),
        row_scale=_row_scale(part(block, dialect.drop_path), x, scale),
        grn_weight=grn_weight,
        grn_bias=grn_bias,
        eps=norm.eps,
        memory="lean" if getattr(block, "with_cp", False) else memory,  # mmpretrain's checkpointing
    )  # fmt: skip


def dtypes_agree(block: nn.Module, dialect: BlockDialect, x: Tensor) -> bool:
    """See :func:`dk.dtypes_agree`; of all the parameters of ``block``."""
    modules = (part(block, path) for path in (dialect.conv, dialect.norm, dialect.fc1, dialect.fc2))
    weights = [module.weight for module in modules]
    grn = part(block, dialect.grn)
    if grn is not None:
        weights.append(grn.weight if hasattr(grn, "weight") else grn.gamma)
    return dk.dtypes_agree(x, *weights, getattr(block, dialect.scale, None))


def _probability(drop_path: nn.Module) -> float | None:
    """Of dropping a branch; None where the module does not say."""
    probability = getattr(drop_path, "drop_prob", getattr(drop_path, "p", None))
    return float(probability) if isinstance(probability, (int, float)) else None


def _row_scale(drop_path: nn.Module | None, x: Tensor, scale: Tensor | None) -> Tensor | None:
    """ρ of shape (N,), from the draws that ``drop_path`` would make for the branch; None where it drops nothing.

    The module itself draws, for a map of one pixel in the dtype that the branch would have. What it returns is 0, or
    1/keep in that dtype; the operator takes 1/keep in fp32.
    """
    probability = None if drop_path is None or isinstance(drop_path, nn.Identity) else _probability(drop_path)
    if not probability or not drop_path.training:
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype
    if scale is not None:
        dtype = torch.promote_types(dtype, scale.dtype)
    drawn = drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)).flatten()
    wide = torch.promote_types(dtype, torch.float32)
    return (drawn != 0).to(wide) * _factor(drop_path, probability)


def _factor(drop_path: nn.Module, probability: float) -> float:
    """What a branch is multiplied by that is not dropped."""
    return 1.0 / (1.0 - probability) if probability < 1 and getattr(drop_path, "scale_by_keep", True) else 1.0


# What a block must be for `run_block` to be right, found out once.


def unlike(block: nn.Module, dialect: BlockDialect) -> str | None:
    """Why ``block`` does not compute what :func:`run_block` does; None where it does.

    The forward of a class is run, in float64 on the CPU, on random parameters, once for each combination of the classes
    of its parts and of its own settings.
    """
    return _unlike_parts(block, dialect) or _unlike_forward(block, dialect)


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
    if not _is_layer_norm(norm, conv.in_channels):
        return f"{'.'.join(dialect.norm)} is {class_name(norm)}; a layer norm over the channels is allowed"
    for path in (dialect.fc1, dialect.fc2):
        linear = part(block, path)
        if type(linear) is not nn.Linear and not _is_1x1(linear):
            return f"{'.'.join(path)} is {class_name(linear)}; nn.Linear or a 1×1 nn.Conv2d is allowed"
    act = part(block, dialect.act)
    if act is not None and not _is_gelu(act):
        return f"{'.'.join(dialect.act)} is {act!r}; GELU (erf) is allowed"
    epsilon = getattr(part(block, dialect.grn), "eps", GRN_EPS)
    if epsilon != GRN_EPS:
        return f"the ε of {'.'.join(dialect.grn)} is {epsilon}; {GRN_EPS} is allowed"
    drop_path = part(block, dialect.drop_path)
    if drop_path is not None and not isinstance(drop_path, nn.Identity) and not _drops_rows(drop_path):
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
    """A module below ``block`` that is none of its parts, nor inside of one."""
    known = dialect.known()
    whole = [path for path in known if path not in dialect.containers]
    for name, _ in block.named_modules():
        path = tuple(name.split("."))
        if name and path not in known and not any(path[: len(other)] == other for other in whole):
            return name
    return None


def _is_1x1(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
    )


def _is_layer_norm(norm: nn.Module, channels: int) -> bool:
    """Over the channels of maps (N, H, W, C) or (N, C, H, W)."""
    if not all(hasattr(norm, name) for name in ("weight", "bias", "eps")):
        return False
    twin, x = shadow(norm), _random((2, 3, 2, channels), torch.Generator().manual_seed(1))
    with torch.no_grad():
        try:
            expected = F.layer_norm(x, (channels,), twin.weight, twin.bias, twin.eps)
            results = _results(twin, x, x.permute(0, 3, 1, 2))
        except RuntimeError:  # the parameters are of another size
            return False
    return any(
        result.shape == wanted.shape and torch.allclose(result, wanted, rtol=0, atol=1e-9)
        for result, wanted in zip(results, (expected, expected.permute(0, 3, 1, 2)), strict=True)
    )


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
    if _probability(twin) is None:
        return False
    twin.__dict__[name] = 0.25
    x = _random((64, 3, 2, 2), torch.Generator().manual_seed(0))
    results = []
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        for image in (x, torch.ones(64, 1, 1, 1, dtype=x.dtype, device="cpu")):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            results += _results(twin, image)
    branch, rows = results
    if branch.shape != x.shape or rows.shape != (64, 1, 1, 1) or not torch.allclose(branch, x * rows):
        return False
    kept = rows != 0
    return not kept.all() and torch.allclose(rows[kept], torch.full_like(rows[kept], _factor(twin, 0.25)))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator) - 0.5


def shadow(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """``module`` with random float64 parameters on the CPU, and without hooks; nothing that has values is copied."""
    generator = generator or torch.Generator().manual_seed(0)
    cls = original_class(module)
    twin = object.__new__(cls)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            twin.__dict__[name] = collections.OrderedDict()
    random = lambda t: None if t is None else _random(tuple(t.shape), generator)  # noqa: E731
    twin.__dict__["_parameters"] = {name: _parameter(random(p)) for name, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {name: random(buffer) for name, buffer in module._buffers.items()}
    twin.__dict__["_modules"] = {
        name: None if child is None else shadow(child, generator) for name, child in module._modules.items()
    }
    twin.__dict__.pop("forward", None)
    return twin


def _parameter(values: Tensor | None) -> nn.Parameter | None:
    return None if values is None else nn.Parameter(values, requires_grad=False)


_COMPARED: dict[tuple, str | None] = {}


def _unlike_forward(block: nn.Module, dialect: BlockDialect) -> str | None:
    classes = tuple((name, original_class(module)) for name, module in block.named_modules())
    owners = (block, *(part(block, path) for path in dialect.containers))
    settings = tuple(
        (name, value)
        for owner in owners
        for name, value in sorted(vars(owner).items())
        if isinstance(value, (bool, int, float, str)) and name != "training"
    )
    key = dialect, classes, settings, getattr(block, dialect.scale, None) is None
    if key not in _COMPARED:
        _COMPARED[key] = _compare(block, dialect)
    return _COMPARED[key]


def _compare(block: nn.Module, dialect: BlockDialect) -> str | None:
    twin = shadow(block)
    for name, module in list(twin.named_modules()):  # what draws numbers is looked at when the block is called
        path = tuple(name.split("."))
        if path == dialect.drop_path or (path in dialect.idle and isinstance(module, nn.Dropout)):
            twin.get_submodule(".".join(path[:-1]))._modules[path[-1]] = nn.Identity()
    x = _random((2, part(twin, dialect.conv).in_channels, 9, 6), torch.Generator().manual_seed(1))
    for training in (False, True):
        twin.train(training)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), dk.backend("torch"):
            expected = run_block(twin, dialect, x)
            (result,) = _results(twin, x)
        atol = 1e-9 * expected.abs().max().item()
        if result.shape != expected.shape or not torch.allclose(result, expected, rtol=1e-9, atol=atol):
            return "its forward computes something else than x + drop_path(γ · fc2(grn(gelu(fc1(norm(conv(x)))))))"
    return None
