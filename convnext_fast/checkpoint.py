"""Checkpoints of every dialect of ConvNeXt: telling, converting and loading them.

Names and shapes are in :mod:`convnext_fast.dialects`, files in :mod:`convnext_fast.checkpoint_files`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_files import read_checkpoint, save_checkpoint, some, unwrap
from .dialects import (
    DIALECTS,
    PUBLISHED,
    TIMM_CONV_MLP,
    CheckpointError,
    Layout,
    Network,
    canonical_layout,
    clean_name,
    dialect_shape,
    entries,
    find_all,
    locate,
    parent_of,
    read_network,
    shape_like,
    what_cannot_be_held,
    what_is_missing,
)
from .load_report import LoadReport, hint, is_head
from .other_names import NamedNetwork, outside_pairs, read_names

__all__ = [
    "CheckpointError", "LoadReport", "check_values", "convert_state_dict", "detect_dialect", "load_checkpoint",
    "own_names", "read_checkpoint", "save_checkpoint",
]  # fmt: skip


def detect_dialect(state_dict: Mapping[str, Any]) -> str:
    """The dialect of a state_dict or training checkpoint, one of :data:`convnext_fast.dialects.DIALECTS`.

    Raises:
        CheckpointError: a ValueError; it is of none of these (the message has its first names), or has two networks.
    """
    return locate(unwrap(state_dict))[0].dialect


def convert_state_dict(
    state_dict: Mapping[str, Any],
    to: str,
    like: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    use_ema: bool = False,
) -> dict[str, Tensor]:
    """Translate a ConvNeXt's parameters into the names and shapes of another library.

    The dialect of ``state_dict`` is detected; entries around it (``model``, ``state_dict``, ``module``), prefixes
    (``module.``, ``backbone.``, ``visual.trunk.``, ...) and what torch.compile adds to names are taken off. Values and
    dtypes stay, and tensors share their memory with ``state_dict``.

    Without ``like`` the result is for the network that this library publishes in these depths and widths: timm's atto
    to nano have 1×1 convolutions, Hugging Face's and mmpretrain's have the prefix of a classifier where there is a
    head. Into the dialect that it already has, only prefixes change. With ``like`` the result is for just that model:
    its prefix, names, shapes and order.

    Args:
        state_dict: of any dialect, or a training checkpoint that holds one.
        to: "facebook", "timm", "torchvision", "huggingface", "mmpretrain" or "dinov3".
        like: a model or state_dict of the dialect ``to``. A head, norms and last stages which it does not have are left
            out, see :func:`load_checkpoint`; everything else must fit.
        use_ema: take a training checkpoint's averaged weights, see :func:`read_checkpoint`.

    Warns:
        UserWarning: a head was dropped, since DINOv3 has none; names beside the network were ignored; or the final norm
            moved from before the pooling to after it, or back, which changes logits.

    Raises:
        CheckpointError: a ValueError; it is no ConvNeXt, is incomplete, the dialect cannot hold it (torchvision has no
            GRN, ...), or it does not fit ``like``.
        ValueError: ``to`` is no dialect, or ``like`` is of another one.
    """
    if to not in DIALECTS:
        raise ValueError(f"to is {to!r}; allowed: {', '.join(map(repr, DIALECTS))}")
    flat = unwrap(state_dict, use_ema)
    if like is None:
        return _convert_to_published(flat, to)
    target = like.state_dict() if isinstance(like, nn.Module) else unwrap(like)
    dialect = locate(target)[0].dialect
    if dialect != to:
        raise ValueError(f"to is {to!r}, and like is a network of the dialect {dialect!r}; they must be the same")
    converted, report = _fit(flat, target)
    if not report.fits:
        raise CheckpointError(f"the state_dict does not fit like. {report}", hint(report, flat))
    return converted


def own_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of any network of this package, in any dialect, under the names that they have here.

    Raises:
        CheckpointError: a ValueError; they are of no such network, or of two.
    """
    flat = unwrap(state_dict)
    named = read_names(flat)
    if named is None:
        return _convert_to_published(flat, "facebook")
    others = [prefix for _, prefix in find_all({clean_name(key) for key in flat})]
    if others:
        raise CheckpointError(
            f"there are a {named.vocabulary.network} and a ConvNeXt, under the prefixes "
            f"{', '.join(map(repr, (named.prefix, *others)))}; pass only one of them"
        )
    return {name: flat[key] for name, key in named.keys.items()}


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike | Mapping[str, Any],
    strict: bool = True,
    *,
    use_ema: bool = False,
) -> LoadReport:
    """Load a checkpoint of any dialect into a ConvNeXt of any dialect: ours, timm's, torchvision's, Hugging Face's, ...

    And of ConvMixer, DWNet and RepLKNet, under the names of their public implementations, see
    :mod:`convnext_fast.other_names`.

    Names and shapes are translated to the model's, and everything is checked before anything is changed. It is no error
    if the model ends before the checkpoint does. Left out, and listed under ``dropped`` in the report, are: the head,
    where the model has none (``num_classes=0``); norms and last stages that the model does not have, where it has no
    head either (``features_only``); and what lies beside the network in the file and is nowhere in the model.

    Args:
        model: where to load; it stays as it was if this fails.
        checkpoint: a file, see :func:`read_checkpoint`, or what such a file holds.
        strict: False loads what fits by name and shape, and reports the rest.
        use_ema: take a training checkpoint's averaged weights, see :func:`read_checkpoint`.

    Raises:
        TypeError, FileNotFoundError, IsADirectoryError, ImportError: see :func:`read_checkpoint`.
        CheckpointError: a ValueError; the file cannot be read, or does not fit (with a table of names and shapes), or
            holds NaN, infinity, integers, or values beyond the largest of the model's dtype; or the file or the model
            has two networks.
        ValueError: the model's parameters have no memory (``device="meta"``).
    """
    if isinstance(checkpoint, Mapping):
        source, flat = "the checkpoint", unwrap(checkpoint, use_ema)
    elif isinstance(checkpoint, (str, os.PathLike)):
        source, flat = f"checkpoint {os.fspath(checkpoint)}", read_checkpoint(checkpoint, use_ema=use_ema)
    else:
        raise TypeError(
            f"checkpoint is a {type(checkpoint).__name__}; the path of a file or a dictionary of tensors is allowed"
        )
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("model has parameters on the meta device; call model.to_empty(device=...) first")
    try:
        converted, report = _fit(flat, target)
        check_values(converted)
        _check_range(converted, target)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error.message}", error.advice) from None
    if strict and not report.fits:
        advice = f"{hint(report, flat)}\nstrict=False loads what fits."
        raise CheckpointError(f"{source} does not fit {type(model).__name__}. {report}", advice)
    model.load_state_dict(converted, strict=False)
    return report


def check_values(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse what no trained network holds.

    Raises:
        CheckpointError: a ValueError; tensors hold NaN or infinity, or integers; the message has their names.
    """
    integers, infinite = [], []
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            if not name.endswith("num_batches_tracked"):  # of batch norms
                integers.append(name)
        elif not tensor.is_meta:
            wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite does not take float8
            if not torch.isfinite(wide).all():
                infinite.append(name)
    for kind, names in (("NaN or infinity", infinite), ("other things than floating-point numbers", integers)):
        if names:
            raise CheckpointError(f"tensors hold {kind}: {some(names)}")


def _check_range(converted: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Refuse finite values that would be infinite, or NaN, in the model's dtype."""
    overflown: dict[torch.dtype, list[str]] = {}
    for name, tensor in converted.items():
        dtype = target[name].dtype
        if not dtype.is_floating_point or dtype == tensor.dtype or tensor.is_meta:
            continue
        # float8 saturates: the second condition. It alone would let through what float16 rounds to infinity.
        limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 2)
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        if not torch.isfinite(tensor.to(dtype).float()).all() or bool((wide.abs() > limit).any()):
            overflown.setdefault(dtype, []).append(name)
    for dtype, names in overflown.items():
        largest = torch.finfo(dtype).max
        raise CheckpointError(
            f"tensors hold values beyond {largest:g}, the largest of the model's {dtype}: {some(names)}"
        )


def _fit(flat: dict[str, Tensor], target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """What of ``flat`` fits ``target``, under its names, in its order and shapes, and a report of what does not."""
    same_shapes = {key: t.shape for key, t in flat.items()} == {key: t.shape for key, t in target.items()}
    named = read_names(target)
    if named is not None:
        if same_shapes:
            return {key: flat[key] for key in target}, LoadReport(named.vocabulary.dialect)
        return _fit_by_name(flat, target, named)
    source, goal = read_network(flat), read_network(target)
    if same_shapes:
        return {key: flat[key] for key in target}, LoadReport(source.layout.dialect)
    _warn_if_norm_moves(source, goal.layout)
    found, mismatched, dropped, unexpected = {}, [], list(source.outside), []
    ends_before = _ends_before(goal)
    same = source.layout.dialect == goal.layout.dialect
    # mmpretrain's classifiers call their final norm as its backbones call that of the last map, and load it there.
    namesakes = {_within(goal, key): key for key in goal.names.values()} if same else {}

    def place(key: str, tensor: Tensor) -> None:
        if tensor.shape == target[key].shape:
            found[key] = tensor
        else:
            mismatched.append((key, tuple(target[key].shape), tuple(tensor.shape)))

    for name, tensor in source.tensors.items():
        field = source.fields[name]
        if name in goal.names:
            key = goal.names[name]
            place(key, shape_like(field, name, tensor, target[key].shape))
        elif _within(source, source.names[name]) in namesakes:
            place(namesakes[_within(source, source.names[name])], tensor)
        else:
            (dropped if ends_before(field, name) else unexpected).append(source.names[name])
    # Variants that only one library has (timm's overlapping stems) are unknown here, but the same on both sides.
    theirs = {_within(goal, key): key for key in goal.unknown} if same else {}
    for key in source.unknown:
        if _within(source, key) in theirs:
            place(theirs[_within(source, key)], flat[key])
        else:
            unexpected.append(key)

    placed = {*found, *(key for key, _, _ in mismatched)}
    report = LoadReport(
        source.layout.dialect,
        missing=tuple((key, tuple(t.shape)) for key, t in target.items() if key not in placed),
        unexpected=tuple((key, tuple(flat[key].shape)) for key in unexpected),
        mismatched=tuple(mismatched),
        dropped=tuple(dict.fromkeys(dropped)),  # the bias that OpenCLIP's projection lacks is under its weight's name
    )
    return {key: found[key] for key in target if key in found}, report


def _fit_by_name(
    flat: dict[str, Tensor], target: Mapping[str, Tensor], goal: NamedNetwork
) -> tuple[dict[str, Tensor], LoadReport]:
    """:func:`_fit` for the networks that are no ConvNeXts."""
    source, network = read_names(flat), goal.vocabulary.network
    if source is None or source.vocabulary.network != network:
        what = f"a {source.vocabulary.network}" if source else f"no {network}; its first names: {some(flat, 5)}"
        raise CheckpointError(f"the model is a {network}, and this is of {what}")
    inside = {key: source.keys[name] for name, key in goal.keys.items() if name in source.keys}
    beside = outside_pairs(goal, source)
    pairs = {**inside, **beside}  # the model's names -> the checkpoint's
    others = {name: key for name, key in source.keys.items() if name not in goal.keys}
    heads = [key for name, key in others.items() if "head.weight" not in goal.keys and is_head(name)]
    fits = {key for key, theirs in pairs.items() if target[key].shape == flat[theirs].shape}
    report = LoadReport(
        source.vocabulary.dialect,
        missing=tuple((key, tuple(t.shape)) for key, t in target.items() if key not in pairs),
        unexpected=tuple((key, tuple(flat[key].shape)) for key in others.values() if key not in heads),
        mismatched=tuple(
            (key, tuple(target[key].shape), tuple(flat[theirs].shape))
            for key, theirs in pairs.items() if key not in fits
        ),
        dropped=(*(key for key in source.outside.values() if key not in beside.values()), *heads),
    )  # fmt: skip
    return {key: flat[pairs[key]] for key in target if key in fits}, report


def _within(network: Network, key: str) -> str:
    return clean_name(key).removeprefix(network.prefix)


def _ends_before(goal: Network) -> Callable[[str, str], bool]:
    """Tells whether a parameter (field, canonical name) lies behind the end of the network ``goal``."""
    fields, last = set(goal.fields.values()), max(goal.places.stages)

    def ends_before(field: str, name: str) -> bool:
        if "head" in fields:
            return False
        if field in ("head", "pre_logits"):
            return True
        if field in ("final_norm", "stage_norm"):  # of the latter, a model may have some
            return field == "stage_norm" or field not in fields
        stage = re.match(r"(?:stages|downsample_layers)\.(\d+)\.", name)
        return "final_norm" not in fields and stage is not None and int(stage[1]) > last

    return ends_before


def _warn_if_norm_moves(source: Network, layout: Layout) -> None:
    places = source.layout.final_norm, layout.final_norm
    if (
        "final_norm" in source.fields.values()
        and None not in places
        and (places[0] == "norm_pre") != (places[1] == "norm_pre")
    ):
        order = "before" if places[0] == "norm_pre" else "after"
        warnings.warn(
            f"the checkpoint's network normalises {order} it pools, this one the other way round (timm's "
            "head_norm_first): features are the same, pooled features and logits are not",
            stacklevel=4,
        )


def _convert_to_published(flat: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """``flat`` in the names and shapes of the network that the dialect ``to`` publishes in its depths and widths."""
    source = read_network(flat)
    if source.outside:
        warnings.warn(f"ignored what lies beside the network: {some(source.outside)}", stacklevel=3)
    if source.layout.dialect == to and not source.prefix.endswith("trunk."):
        return _with_own_prefix(source, flat)
    missing = what_is_missing(source)
    for kind, names in (("holds what no ConvNeXt has", source.unknown), ("lacks", missing)):
        if names:
            raise CheckpointError(f"the {source.layout.dialect} state_dict {kind}: {some(names)}")
    layout, prefix = _published_layout(source, to)
    reasons = what_cannot_be_held(source, layout)
    if reasons:
        raise CheckpointError(f"{to} cannot hold this {source.layout.dialect} state_dict: {'; '.join(reasons)}")
    _warn_if_norm_moves(source, layout)
    conv_mlp = to == "timm" and (source.places.depths, _dims(source)) in TIMM_CONV_MLP

    converted, lost = {}, []
    ours = entries(canonical_layout(source.layout), source.places)
    for (field, name), (_, theirs) in zip(ours, entries(layout, source.places), strict=True):
        if name not in source.tensors:
            continue
        if theirs is None:
            lost.append(name)
            continue
        key = (parent_of(prefix) if field in layout.outside else prefix) + theirs
        converted[key] = dialect_shape(field, name, source.tensors[name], to, conv_mlp)
    if lost and to == "dinov3" and all(source.fields[name] == "head" for name in lost):
        warnings.warn(f"dinov3 has no classifier; dropped: {some(source.names[name] for name in lost)}", stacklevel=3)
    elif lost:
        raise CheckpointError(f"{to} has no place for {some(source.names[name] for name in lost)}")
    if to == "facebook":  # there all downsampling comes first, elsewhere it precedes its stage
        converted = dict(sorted(converted.items(), key=lambda item: not item[0].startswith("downsample_layers.")))
    return converted


def _with_own_prefix(source: Network, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same dialect: every name and shape as it is, without the prefixes that wrappers put before it."""
    layout = source.layout
    prefix = PUBLISHED[layout.dialect].prefix
    optional = {"huggingface": "convnext|convnextv2", "mmpretrain": "backbone"}  # in classifiers, not in bare networks
    if layout.dialect in optional:
        component = re.search(rf"(^|\.)(({optional[layout.dialect]})\.)$", source.prefix)
        prefix = component[2] if component else ""
    field_of = {key: source.fields[name] for name, key in source.names.items()}
    result = {}
    for key, tensor in flat.items():
        name = clean_name(key)
        if field_of.get(key) in layout.outside:
            name = name.removeprefix(source.prefix).removeprefix(parent_of(source.prefix))
            result[parent_of(prefix) + name] = tensor
        elif key not in source.outside:
            result[prefix + name.removeprefix(source.prefix)] = tensor
    return result


def _published_layout(source: Network, to: str) -> tuple[Layout, str]:
    layout, fields = PUBLISHED[to], set(source.fields.values())
    prefix = layout.prefix
    if to in ("huggingface", "mmpretrain") and "head" not in fields:
        prefix = ""
    elif to == "huggingface" and "grn_weight" in fields:
        prefix = "convnextv2."
    if to == "mmpretrain" and "stage_norm" in fields:
        layout = replace(layout, final_norm=None, stage_norm="norm{i}")
    elif to == "mmpretrain":
        layout = replace(layout, final_norm=f"norm{max(source.places.stages)}")
    return layout, prefix


def _dims(source: Network) -> tuple[int, ...]:
    return tuple(source.tensors[f"stages.{i}.0.dwconv.weight"].shape[0] for i in source.places.stages)
