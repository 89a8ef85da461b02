"""The ConvNeXt block as each library builds it: which child plays which part, and the operator on these parts.

A block is known by the names of its children. Names prove nothing: what it computes is for :mod:`block_proof`.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dwconv_kernels as dk

from .block import as_vector, under_autocast

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
        children = block._modules
        block = children.get(name) if isinstance(children, dict) else None  # scripted modules have another container
        if block is None:
            return None
    return block if path else None


def grn_of(block: nn.Module, dialect: BlockDialect) -> nn.Module | None:
    """Its GRN; None where it has none, also where an identity stands in the place of one."""
    grn = part(block, dialect.grn)
    return None if type(grn) is nn.Identity else grn


def dialect_of(block: nn.Module) -> BlockDialect | None:
    """Whose block has children of these names?"""
    for dialect in DIALECTS:
        if all(part(block, path) is not None for path in dialect.needed()):
            return dialect
    return None


def grn_eps(block: nn.Module, dialect: BlockDialect) -> float:
    return getattr(grn_of(block, dialect), "eps", GRN_EPS)


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
    grn_weight, grn_bias = _grn_vectors(grn_of(block, dialect))
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
    """See :func:`dk.dtypes_agree`; of all the parameters of ``block``.

    Half precision parameters and another x is what autocast makes one, too, but each library in its own way.
    """
    modules = (part(block, path) for path in (dialect.conv, dialect.norm, dialect.fc1, dialect.fc2))
    weights = [module.weight for module in modules]
    grn = grn_of(block, dialect)
    if grn is not None:
        weights.append(grn.weight if hasattr(grn, "weight") else grn.gamma)
    dtype = weights[0].dtype
    return dtype in (x.dtype, torch.float32) and dk.dtypes_agree(x, *weights, getattr(block, dialect.scale, None))


def drop_probability(drop_path: nn.Module) -> float | None:
    """Of dropping a branch; None where the module does not say."""
    probability = getattr(drop_path, "drop_prob", getattr(drop_path, "p", None))
    return float(probability) if isinstance(probability, numbers.Real) else None


def _row_scale(drop_path: nn.Module | None, x: Tensor, scale: Tensor | None) -> Tensor | None:
    """ρ of shape (N,), from the draws that ``drop_path`` would make for the branch; None where it drops nothing.

    The module itself draws, for a map of one pixel in the dtype that the branch would have. What it returns is 0, or
    1/keep in that dtype; the operator takes 1/keep in fp32.
    """
    probability = None if drop_path is None or type(drop_path) is nn.Identity else drop_probability(drop_path)
    if not probability or not drop_path.training:
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype
    if scale is not None:
        dtype = torch.promote_types(dtype, scale.dtype)
    drawn = drop_path(x.new_ones((x.shape[0], 1, 1, 1), dtype=dtype)).flatten()
    wide = torch.promote_types(dtype, torch.float32)
    return (drawn != 0).to(wide) * kept_factor(drop_path, probability)


def kept_factor(drop_path: nn.Module, probability: float) -> float:
    """What a branch is multiplied by that is not dropped."""
    return 1.0 / (1.0 - probability) if probability < 1 and getattr(drop_path, "scale_by_keep", True) else 1.0
