"""What each library calls the parameters of a ConvNeXt, as data, and the way from one vocabulary to another.

The canonical names are the original repository's ("facebook"), also those of :class:`convnext_fast.ConvNeXt`. The
tables were read from the model definitions of each project (facebookresearch/ConvNeXt and ConvNeXt-V2, timm 1.0,
torchvision 0.28, transformers 5 ``convnext``, ``convnextv2`` and ``dinov3_convnext``, mmpretrain 1.2); tests compare
them with those libraries. This module looks at names and shapes only; files are :mod:`convnext_fast.checkpoint_files`',
models :mod:`convnext_fast.checkpoint`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIALECTS = ("facebook", "timm", "torchvision", "huggingface", "mmpretrain", "dinov3")


class CheckpointError(ValueError):
    """A checkpoint cannot be read, is no ConvNeXt, or does not fit; the message says which of these, and lists what.

    ``message`` is the text without ``advice``, which names arguments of this package's functions.
    """

    def __init__(self, message: str, advice: str = ""):
        super().__init__(message + advice)
        self.message, self.advice = message, advice


@dataclass(frozen=True)
class Layout:
    """The names of one dialect, relative to where the network lies in the state_dict.

    {i} is the stage, {even} = 2i, {odd} = 2i + 1, {next} = i + 1, {j} the block within its stage. Names from ``dwconv``
    to ``grn_bias`` are relative to ``block``. None: the dialect has no such parameter.
    """

    dialect: str
    prefix: str  # where a published classifier has the network
    stem_conv: str
    stem_norm: str | None
    down_norm: str | None
    down_conv: str | None
    block: str
    dwconv: str
    norm: str
    pwconv1: str
    pwconv2: str
    gamma: str
    grn_weight: str | None
    grn_bias: str | None
    final_norm: str | None
    head: str | None
    pre_logits: str | None = None  # hidden layer of the MLP heads of CLIP's ConvNeXts
    stage_norm: str | None = None  # a norm per stage, in backbones for detection and segmentation
    outside: tuple[str, ...] = ()  # fields whose names lie beside the network's prefix, not under it


# The original's names, and one more that it does not have, so that timm's MLP heads can be told from unknown keys.
CANONICAL = Layout(
    "facebook", prefix="", stem_conv="downsample_layers.0.0", stem_norm="downsample_layers.0.1",
    down_norm="downsample_layers.{i}.0", down_conv="downsample_layers.{i}.1", block="stages.{i}.{j}",
    dwconv="dwconv", norm="norm", pwconv1="pwconv1", pwconv2="pwconv2", gamma="gamma",
    grn_weight="grn.gamma", grn_bias="grn.beta", final_norm="norm", head="head",
    pre_logits="head.pre_logits.fc", stage_norm="norm{i}",
)  # fmt: skip
FACEBOOK = replace(CANONICAL, pre_logits=None)
ISOTROPIC = replace(
    FACEBOOK, stem_conv="stem", stem_norm=None, down_norm=None, down_conv=None, block="blocks.{j}", stage_norm=None
)
TIMM = Layout(
    "timm", prefix="", stem_conv="stem.0", stem_norm="stem.1", down_norm="stages.{i}.downsample.0",
    down_conv="stages.{i}.downsample.1", block="stages.{i}.blocks.{j}", dwconv="conv_dw", norm="norm",
    pwconv1="mlp.fc1", pwconv2="mlp.fc2", gamma="gamma", grn_weight="mlp.grn.weight", grn_bias="mlp.grn.bias",
    final_norm="head.norm", head="head.fc", pre_logits="head.pre_logits.fc",
)  # fmt: skip
# features_only=True flattens the top of the module tree, and leaves norm and head away.
TIMM_FEATURES = replace(
    TIMM, stem_conv="stem_0", stem_norm="stem_1", down_norm="stages_{i}.downsample.0",
    down_conv="stages_{i}.downsample.1", block="stages_{i}.blocks.{j}", final_norm=None, head=None, pre_logits=None,
)  # fmt: skip
TORCHVISION = Layout(
    "torchvision", prefix="features.", stem_conv="0.0", stem_norm="0.1", down_norm="{even}.0", down_conv="{even}.1",
    block="{odd}.{j}", dwconv="block.0", norm="block.2", pwconv1="block.3", pwconv2="block.5", gamma="layer_scale",
    grn_weight=None, grn_bias=None, final_norm="classifier.0", head="classifier.2", outside=("final_norm", "head"),
)  # fmt: skip
HUGGINGFACE = Layout(
    "huggingface", prefix="convnext.", stem_conv="embeddings.patch_embeddings", stem_norm="embeddings.layernorm",
    down_norm="encoder.stages.{i}.downsampling_layer.0", down_conv="encoder.stages.{i}.downsampling_layer.1",
    block="encoder.stages.{i}.layers.{j}", dwconv="dwconv", norm="layernorm", pwconv1="pwconv1", pwconv2="pwconv2",
    gamma="layer_scale_parameter", grn_weight="grn.weight", grn_bias="grn.bias", final_norm="layernorm",
    head="classifier", stage_norm="hidden_states_norms.stage{next}", outside=("head",),
)  # fmt: skip
# A classifier calls its only norm norm3, after its last stage; a backbone with norms after all stages, norm0 … norm3.
MMPRETRAIN = replace(
    FACEBOOK, dialect="mmpretrain", prefix="backbone.", dwconv="depthwise_conv", pwconv1="pointwise_conv1",
    pwconv2="pointwise_conv2", final_norm="norm3", head="head.fc", stage_norm=None, outside=("head",),
)  # fmt: skip
# Files of before transformers 5 have no ``model.``; the prefix is looked for, so both are read.
DINOV3 = Layout(
    "dinov3", prefix="model.", stem_conv="stages.0.downsample_layers.0", stem_norm="stages.0.downsample_layers.1",
    down_norm="stages.{i}.downsample_layers.0", down_conv="stages.{i}.downsample_layers.1",
    block="stages.{i}.layers.{j}", dwconv="depthwise_conv", norm="layer_norm", pwconv1="pointwise_conv1",
    pwconv2="pointwise_conv2", gamma="gamma", grn_weight=None, grn_bias=None, final_norm="layer_norm", head=None,
    outside=("final_norm",),
)  # fmt: skip
LAYOUTS = (FACEBOOK, ISOTROPIC, TIMM, TIMM_FEATURES, TORCHVISION, HUGGINGFACE, MMPRETRAIN, DINOV3)
PUBLISHED = {layout.dialect: layout for layout in (FACEBOOK, TIMM, TORCHVISION, HUGGINGFACE, MMPRETRAIN, DINOV3)}

# (depths, dims) of the networks which timm publishes with 1×1 convolutions instead of Linear: atto, femto, pico, nano.
TIMM_CONV_MLP = {
    ((2, 2, 6, 2), (40, 80, 160, 320)),
    ((2, 2, 6, 2), (48, 96, 192, 384)),
    ((2, 2, 6, 2), (64, 128, 256, 512)),
    ((2, 2, 8, 2), (80, 160, 320, 640)),
}

# What torch.compile, activation checkpointing and FSDP put into names, wherever in the tree they wrap a module.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_WEIGHT_BIAS = (".weight", ".bias")
# What distillation leaves in the files of DINOv3 and EUPE: copies of the final norm, and projectors.
_TEACHER = ("norms.", "projectors.")
_LINEAR_FIELDS = ("pwconv1", "pwconv2", "head", "pre_logits")
_OPTIONAL = {"gamma", "grn_weight", "grn_bias", "stage_norm", "final_norm", "pre_logits", "head"}


@dataclass
class Network:
    """A state_dict that was understood: tensors under canonical names and shapes, and where each came from."""

    layout: Layout
    prefix: str
    tensors: dict[str, Tensor]
    fields: dict[str, str]  # canonical name -> field of Layout
    names: dict[str, str]  # canonical name -> name in the state_dict
    unknown: list[str]  # names under the prefix that no ConvNeXt has
    outside: list[str]  # names beside the prefix: a detector's neck, a text tower, a loss

    @property
    def places(self) -> Places:
        return find_places(canonical_layout(self.layout), "", self.tensors)


@dataclass(frozen=True)
class Places:
    stages: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(sum(i == stage for i, _ in self.blocks) for stage in self.stages)


def canonical_layout(layout: Layout) -> Layout:
    return ISOTROPIC if layout.stem_conv == ISOTROPIC.stem_conv else CANONICAL


def clean_name(key: str) -> str:
    """``key`` without what torch.compile, activation checkpointing and FSDP put into it."""
    return _WRAPPERS.sub("", key)


def locate(keys: Iterable[str]) -> tuple[Layout, str]:
    """The dialect and the prefix ("", "module.", "backbone.", "visual.trunk.", ...) of the ConvNeXt among ``keys``.

    A network is recognised by two names, its stem's and its first depthwise convolution's, under one prefix.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    keys = {clean_name(key) for key in keys}
    found = find_all(keys)
    if not found:
        first = ", ".join(sorted(keys)[:5]) or "none at all"
        raise CheckpointError(
            f"these are not the parameters of a ConvNeXt in any known dialect ({', '.join(DIALECTS)}); "
            f"the first of {len(keys)} names: {first}"
        )
    if len(found) > 1:
        prefixes = ", ".join(repr(prefix) for prefix in sorted(prefix for _, prefix in found))
        raise CheckpointError(f"there are {len(found)} ConvNeXts, under the prefixes {prefixes}; pass only one of them")
    layout, prefix = found[0]
    return _refine(layout, prefix, keys), prefix


def find_all(keys: Collection[str]) -> list[tuple[Layout, str]]:
    """Dialect and prefix of every ConvNeXt among cleaned ``keys``."""
    found = []
    for layout in LAYOUTS:
        dwconv = f"{layout.block}.{layout.dwconv}.weight".format(i=0, j=0, odd=1)
        found += [(layout, prefix) for prefix in find_prefixes(keys, f"{layout.stem_conv}.weight", dwconv)]
    return found


def find_prefixes(keys: Collection[str], first: str, second: str) -> list[str]:
    """The prefixes under which ``keys`` have both of these names."""
    prefixes = [key.removesuffix(first) for key in keys if key == first or key.endswith("." + first)]
    return [prefix for prefix in prefixes if prefix + second in keys]


def _refine(layout: Layout, prefix: str, keys: set[str]) -> Layout:
    """The variant of a dialect: two keep the final norm in different places."""
    if layout is TIMM and f"{prefix}norm_pre.weight" in keys:
        return replace(layout, final_norm="norm_pre")
    if layout is MMPRETRAIN:
        last = max(find_places(layout, prefix, keys).stages)
        if any(f"{prefix}norm{i}.weight" in keys for i in range(last)):
            return replace(layout, final_norm=None, stage_norm="norm{i}")
        return replace(layout, final_norm=f"norm{last}")
    return layout


def find_places(layout: Layout, prefix: str, keys: Iterable[str]) -> Places:
    """Which blocks are there, each as (stage, block); numbers without a network around them are not invented."""
    pattern = re.escape(prefix) + re.escape(layout.block).replace(r"\{", "{").replace(r"\}", "}")
    number = "([0-9]{1,4})"
    pattern = pattern.replace("{i}", number).replace("{odd}", number).replace("{j}", number) + r"\."
    blocks = set()
    for key in keys:
        match = re.match(pattern, key)
        if match is None:
            continue
        *stage, block = (int(group) for group in match.groups())
        if "{odd}" in layout.block:
            if stage[0] % 2 == 0:
                continue  # a downsampling
            stage = [stage[0] // 2]
        blocks.add((stage[0] if stage else 0, block))
    return Places(tuple(sorted({i for i, _ in blocks})), tuple(sorted(blocks)))


def entries(layout: Layout, places: Places) -> Iterator[tuple[str, str | None]]:
    """(field, name without prefix) of every parameter such a network can have, the same sequence for every layout."""

    def module(field: str, i: int = 0, j: int = 0, within: str = "", leaves: tuple = _WEIGHT_BIAS):
        template = getattr(layout, field)
        numbers = {"i": i, "j": j, "even": 2 * i, "odd": 2 * i + 1, "next": i + 1}
        for leaf in leaves:
            yield field, None if template is None else (within + template).format(**numbers) + leaf

    yield from module("stem_conv")
    yield from module("stem_norm")
    for i in places.stages:
        if i > 0:
            yield from module("down_norm", i)
            yield from module("down_conv", i)
        for _, j in (block for block in places.blocks if block[0] == i):
            within = layout.block + "."
            yield from module("gamma", i, j, within, ("",))
            yield from module("dwconv", i, j, within)
            yield from module("norm", i, j, within)
            yield from module("pwconv1", i, j, within)
            yield from module("grn_weight", i, j, within, ("",))
            yield from module("grn_bias", i, j, within, ("",))
            yield from module("pwconv2", i, j, within)
    for i in places.stages:
        yield from module("stage_norm", i)
    yield from module("final_norm")
    yield from module("pre_logits")
    yield from module("head")


def parent_of(prefix: str) -> str:
    """What remains of a prefix without its last component: "module.backbone." -> "module."."""
    return re.sub(r"[^.]+\.$", "", prefix)


def read_network(state: Mapping[str, Tensor]) -> Network:
    """Understand a flat state_dict of any dialect and prefix.

    Raises:
        CheckpointError: there is no ConvNeXt, or more than one.
    """
    originals = {clean_name(key): key for key in state}
    layout, prefix = locate(originals)
    parent = parent_of(prefix)
    places = find_places(layout, prefix, originals)
    canonical = entries(canonical_layout(layout), places)
    table = {}  # name in the state_dict -> (canonical name, field)
    for (field, name), (_, known_as) in zip(entries(layout, places), canonical, strict=True):
        if name is not None and known_as is not None:
            table[prefix + name] = (known_as, field)
            if field in layout.outside:
                table[parent + name] = (known_as, field)
    if layout.dialect == "timm" and prefix.endswith("trunk."):
        table.update(_openclip_heads(parent))

    network = Network(layout, prefix, {}, {}, {}, [], [])
    for name, key in originals.items():
        if name in table:
            known_as, field = table[name]
            network.tensors[known_as] = canonical_shape(field, known_as, state[key])
            network.fields[known_as], network.names[known_as] = field, key
        elif name.startswith(prefix) and not name.startswith(_TEACHER):
            network.unknown.append(key)
        else:
            network.outside.append(key)
    weight = network.tensors.get("head.weight")
    if prefix.endswith("trunk.") and weight is not None and "head.bias" not in network.tensors:
        # OpenCLIP's projection has no bias, every classifier here has one.
        network.tensors["head.bias"] = weight.new_zeros(weight.shape[0])
        network.fields["head.bias"], network.names["head.bias"] = "head", network.names["head.weight"]
    return network


def _openclip_heads(parent: str) -> dict[str, tuple[str, str]]:
    table = {f"{parent}head.{name}.weight": ("head.weight", "head") for name in ("proj", "mlp.fc2")}
    for leaf in _WEIGHT_BIAS:
        table[f"{parent}head.mlp.fc1{leaf}"] = (f"{CANONICAL.pre_logits}{leaf}", "pre_logits")
    return table


def canonical_shape(field: str, name: str, tensor: Tensor) -> Tensor:
    """The original's shape: Linear weights (D, C), layer scale (C,), GRN (1, 1, 1, 4C). Others are left as they are."""
    if field in _LINEAR_FIELDS and name.endswith(".weight") and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if field in ("gamma", "grn_weight", "grn_bias") and tensor.ndim and tensor.numel() == max(tensor.shape):
        return tensor.reshape(-1) if field == "gamma" else tensor.reshape(1, 1, 1, -1)
    return tensor


def dialect_shape(field: str, name: str, tensor: Tensor, dialect: str, conv_mlp: bool) -> Tensor:
    """The shape in which a dialect's published networks hold a tensor of canonical shape."""
    if field == "gamma" and dialect == "torchvision":
        return tensor.reshape(-1, 1, 1)
    if field in ("grn_weight", "grn_bias") and dialect in ("timm", "mmpretrain"):
        return tensor.reshape(-1)
    if conv_mlp and field in ("pwconv1", "pwconv2") and name.endswith(".weight"):
        return tensor[:, :, None, None]
    return tensor


def shape_like(field: str, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` in ``shape`` where these are two dialects' shapes of one parameter; otherwise as it is."""
    same = canonical_shape(field, name, tensor.new_empty(shape, device="meta")).shape == tensor.shape
    return tensor.reshape(shape) if same and tensor.shape != shape else tensor


def what_is_missing(network: Network) -> list[str]:
    """Canonical names which the blocks and layers that are there should have, and do not."""
    places, present = network.places, set(network.fields.values())
    missing = [f"stages.{i}" for i in range(len(places.stages)) if i not in places.stages]
    for i, depth in zip(places.stages, places.depths, strict=True):
        missing += [f"stages.{i}.{j}" for j in range(depth) if (i, j) not in places.blocks]
    per_block = {"gamma", "grn_weight", "grn_bias"} & present  # if one block has it, all must
    if per_block & {"grn_weight", "grn_bias"}:
        per_block |= {"grn_weight", "grn_bias"}
    for field, name in entries(canonical_layout(network.layout), places):
        if name is None or name in network.tensors:
            continue
        stem, _, leaf = name.rpartition(".")
        half_there = f"{stem}.{'bias' if leaf == 'weight' else 'weight'}" in network.tensors
        if field not in _OPTIONAL or half_there or field in per_block:
            missing.append(name)
    return missing


def what_cannot_be_held(network: Network, layout: Layout) -> list[str]:
    """Why the blocks of ``network`` cannot be written in a dialect, one sentence each; empty where they can."""
    present, dialect = set(network.fields.values()), layout.dialect
    if canonical_layout(network.layout) is ISOTROPIC and dialect != "facebook":
        return ["it has no isotropic networks"]
    reasons = []
    if "grn_weight" in present and layout.grn_weight is None:
        reasons.append("it has no GRN, which these blocks (V2) have")
    if "gamma" in present and "grn_weight" in present and dialect == "huggingface":
        reasons.append("its blocks with GRN have no layer scale, and these blocks have both")
    if "gamma" not in present and dialect in ("torchvision", "dinov3"):
        reasons.append("its blocks need a layer scale, which these blocks have not")
    kernels = {tuple(t.shape[2:]) for name, t in network.tensors.items() if name.endswith(".dwconv.weight")}
    if dialect not in ("facebook", "timm") and kernels != {(7, 7)}:
        reasons.append(f"its depthwise kernels are 7×7, and these are {sorted(kernels)}")
    return reasons
