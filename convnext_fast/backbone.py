"""ConvNeXt as the backbone of detectors and segmenters: pyramids of maps, in the form that each library expects."""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .accelerate import accelerate
from .block import GRN, DropPath
from .block_dialects import dialect_of, part
from .model import LayerNorm2d, check_integer, drop_path_rates, four_positive, stage_indices

ARCHITECTURES = {  # as mmpretrain calls them: (depths, channels)
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class _FlatGRN(GRN):
    """GRN with parameters of shape (C,), as mmpretrain keeps them."""

    def __init__(self, dim: int):
        nn.Module.__init__(self)
        self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))


class _Block(nn.Module):
    """The block under mmpretrain's names, by PyTorch's modules; :func:`accelerate` puts it on the kernels."""

    def __init__(
        self, dim: int, drop_path: float, scale: float, linear: bool, use_grn: bool, eps: float, with_cp: bool
    ):
        super().__init__()
        pointwise = nn.Linear if linear else lambda before, after: nn.Conv2d(before, after, 1)
        self.with_cp = with_cp
        self.depthwise_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.pointwise_conv1 = pointwise(dim, 4 * dim)
        self.act = nn.GELU()
        self.pointwise_conv2 = pointwise(4 * dim, dim)
        self.grn = _FlatGRN(4 * dim) if use_grn else None
        self.gamma = nn.Parameter(torch.full((dim,), float(scale))) if scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        t = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        t = self.act(_pointwise(self.pointwise_conv1, t))
        t = _pointwise(self.pointwise_conv2, t if self.grn is None else self.grn(t))
        t = t if self.gamma is None else self.gamma * t
        return x + self.drop_path(t.permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)


def _pointwise(layer: nn.Module, t: Tensor) -> Tensor:
    """A linear layer or a 1×1 convolution of t (N, H, W, C)."""
    if isinstance(layer, nn.Conv2d):
        return layer(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer(t)


class ConvNeXtBackbone(nn.Module):
    """ConvNeXt V1 and V2 with the arguments, parameter names and results of mmpretrain's backbone, on the kernels.

    So configs of four stages and checkpoints of mmpretrain, mmdetection and mmsegmentation fit as they are; nothing of
    OpenMMLab is needed (``convnext_fast.mmengine_registry`` registers it there, as ``ConvNeXtFast``). What is drawn by
    drop path are other numbers than mmcv's, with the same probabilities; maps have channels_last strides.

    Args:
        arch: a name out of :data:`ARCHITECTURES`, or ``{"depths": four numbers, "channels": four numbers}``.
        in_channels: of the images.
        stem_patch_size: width and stride of the first convolution.
        norm_cfg: ``{"type": "LN2d", "eps": ..., "requires_grad": ...}``; ε is 1e-5 where it is not given, and norms are
            trained, as in mmpretrain.
        act_cfg: ``{"type": "GELU"}``.
        linear_pw_conv: linear layers (True) or 1×1 convolutions in the blocks; the names are the same, shapes differ.
        use_grn: the blocks of V2.
        drop_path_rate: probability of dropping a block's branch, growing linearly from 0 to this over all blocks.
        layer_scale_init_value: initial layer scale; 0 builds blocks without it, as V2 does.
        out_indices: the stages whose maps are returned, one or several; negative ones are counted from the end.
        frozen_stages: how many stages from the first on stay in eval mode and have no gradients; none if negative.
        gap_before_final_norm: average each map over its pixels before its norm, and return (N, C): for classifiers.
        with_cp: blocks keep their input alone and compute the rest a second time in the backward pass.

    Returns (of a call with images (N, in_channels, H, W)):
        One normalised map (N, C_i, H_i, W_i) per ``out_indices`` (or (N, C_i), see above), in a tuple.

    Raises:
        ValueError: an argument is not one of the allowed.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        with_cp: bool = False,
    ):
        super().__init__()
        self.depths, self.channels = _sizes(arch)
        self.out_indices = _indices(out_indices)
        check_integer("in_channels", in_channels, 1)
        check_integer("stem_patch_size", stem_patch_size, 1)
        if not isinstance(frozen_stages, int) or frozen_stages > 4:
            raise ValueError(f"frozen_stages is {frozen_stages!r}; an integer up to 4 is allowed")
        self.frozen_stages, self.gap_before_final_norm = frozen_stages, gap_before_final_norm
        eps = _eps(norm_cfg)
        if not isinstance(layer_scale_init_value, (int, float)):
            raise ValueError(f"layer_scale_init_value is {layer_scale_init_value!r}; a number, 0 for none, is allowed")
        if act_cfg is not None and act_cfg != {"type": "GELU"}:
            raise ValueError(f'act_cfg is {act_cfg!r}; {{"type": "GELU"}} is allowed')
        stem = nn.Conv2d(in_channels, self.channels[0], stem_patch_size, stride=stem_patch_size)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, LayerNorm2d(self.channels[0], eps=eps))])
        for dim, next_dim in pairwise(self.channels):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(dim, eps=eps), nn.Conv2d(dim, next_dim, 2, stride=2))
            )
        rates = iter(drop_path_rates(drop_path_rate, sum(self.depths)))
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(self.depths, self.channels, strict=True)):
            blocks = [
                _Block(dim, next(rates), layer_scale_init_value, linear_pw_conv, use_grn, eps, with_cp)
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            if i in self.out_indices:
                self.add_module(f"norm{i}", LayerNorm2d(dim, eps=eps))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.requires_grad_(norm_cfg is None or bool(norm_cfg.get("requires_grad", True)))
        accelerate(self)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for i in range(max(self.out_indices) + 1):
            x = self.stages[i](self.downsample_layers[i](x))
            if i in self.out_indices:
                norm = getattr(self, f"norm{i}")
                maps.append(norm(x.mean([-2, -1], keepdim=True)).flatten(1) if self.gap_before_final_norm else norm(x))
        return tuple(maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch ``with_cp`` of all blocks."""
        for stage in self.stages:
            for block in stage:
                block.with_cp = bool(enable)

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        for i in range(self.frozen_stages):
            for module in (self.downsample_layers[i], self.stages[i]):
                module.eval()
                module.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """(depth of a parameter, number of depths), by which layer-wise learning rates decay, as in mmpretrain.

        With L = 12 where the third stage has more than 9 blocks, else 6: stem 0, the first two stages 1 and 2 (with the
        convolution before them), the third 3 + block // 3, the fourth L, and all that follows L + 1.
        """
        last = 12 if self.depths[2] > 9 else 6
        parts = param_name.removeprefix(prefix).split(".") if param_name.startswith(prefix) else ["head"]
        depth = last + 1
        if parts[0] == "downsample_layers":
            depth = (0, 2, 3, last)[int(parts[1])]
        elif parts[0] == "stages":
            depth = (1, 2, 3 + int(parts[2]) // 3, last)[int(parts[1])]
        return depth, last + 2


def _sizes(arch: str | dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch is {arch!r}; {', '.join(ARCHITECTURES)}, or a dict, is allowed")
        return ARCHITECTURES[arch]
    try:
        depths, channels = tuple(arch["depths"]), tuple(arch["channels"])
    except (KeyError, TypeError):
        raise ValueError(f'arch is {arch!r}; a dict with "depths" and "channels" is allowed') from None
    if not (four_positive(depths) and four_positive(channels)):
        raise ValueError(f"arch is {arch!r}; four positive depths and four positive channels are allowed")
    return depths, channels


def _indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    if out_indices is None:
        raise ValueError("out_indices is None; one or several of the stages 0 to 3 are allowed")
    # Maps come in the order of the stages.
    return tuple(sorted(stage_indices((out_indices,) if isinstance(out_indices, int) else out_indices)))


def _eps(norm_cfg: dict | None) -> float:
    norm_cfg = {"type": "LN2d", "eps": 1e-6} if norm_cfg is None else norm_cfg
    if (
        not isinstance(norm_cfg, dict)
        or norm_cfg.get("type") != "LN2d"
        or set(norm_cfg) - {"type", "eps", "requires_grad"}
    ):
        raise ValueError(
            f'norm_cfg is {norm_cfg!r}; {{"type": "LN2d", "eps": a number, "requires_grad": a bool}} is allowed'
        )
    eps = norm_cfg.get("eps", 1e-5)
    if not isinstance(eps, (int, float)) or eps < 0:
        raise ValueError(f"the eps of norm_cfg is {eps!r}; a number from 0 up is allowed")
    return float(eps)


def pyramid_stages(model: nn.Module) -> nn.Sequential:
    """The stages of a ConvNeXt, each with the downsampling before it, as children "0", "1", ... of a sequence.

    This is what ``torchvision.models._utils.IntermediateLayerGetter`` and ``BackboneWithFPN`` take. Modules are shared
    with ``model``; its head and what follows the last stage are left out, so that no parameter is idle.

    Args:
        model: a ConvNeXt of this package, the original repositories, timm (also ``features_only``), torchvision,
            Hugging Face or mmpretrain.

    Raises:
        ValueError: ``model`` has no stages of ConvNeXt blocks, or has frozen or checkpointed stages, of which the model
            takes care by itself.
    """
    if getattr(model, "frozen_stages", 0) > 0:
        raise ValueError(f"model has frozen_stages={model.frozen_stages}, which are lost here; 0 is allowed")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            "model has set_grad_checkpointing() on, which is lost here; build it with memory='lean', which saves as "
            "much"
        )
    stages = _stages(model)
    if not stages or any(_channels(stage) is None for stage in stages):
        raise ValueError(
            f"model is a {type(model).__name__}; a ConvNeXt of convnext_fast, the original repositories, timm, "
            f"torchvision, Hugging Face or mmpretrain is allowed"
        )
    return nn.Sequential(*stages)


def _stages(model: nn.Module) -> list[nn.Module]:
    """Whatever may be the stages of ``model``."""
    children = dict(model.named_children())
    if {"downsample_layers", "stages"} <= children.keys():  # ours, the original's, mmpretrain's
        pairs = zip(model.downsample_layers, model.stages, strict=True)
        return [nn.Sequential(downsample, stage) for downsample, stage in pairs]
    if {"stem", "stages"} <= children.keys():  # timm
        return [nn.Sequential(model.stem, model.stages[0]), *model.stages[1:]]
    if "stages_0" in children:  # the same with features_only
        first = [child for name, child in children.items() if name.startswith("stem_")]
        others = [child for name, child in children.items() if name.startswith("stages_") and name != "stages_0"]
        return [nn.Sequential(*first, children["stages_0"]), *others]
    if isinstance(children.get("features"), nn.Sequential):  # torchvision
        layers = list(model.features)
        return [nn.Sequential(*pair) for pair in zip(layers[::2], layers[1::2], strict=False)]
    for module in model.modules():  # Hugging Face
        if hasattr(module, "embeddings") and hasattr(getattr(module, "encoder", None), "stages"):
            first, *others = module.encoder.stages
            return [nn.Sequential(module.embeddings, first), *others]
        stages = getattr(module, "stages", None)
        if isinstance(stages, nn.ModuleList) and all(hasattr(stage, "downsample_layers") for stage in stages):  # DINOv3
            return list(stages)
    return []


def fpn_backbone(
    model: nn.Module, out_channels: int = 256, out_indices: Sequence[int] = (0, 1, 2, 3), extra_blocks=None
) -> nn.Module:
    """``model`` with a feature pyramid on it, as the detectors of torchvision take it. Needs torchvision.

    Args:
        model: see :func:`pyramid_stages`.
        out_channels: of every map of the pyramid.
        out_indices: the stages from which the pyramid is built.
        extra_blocks: what adds coarser maps, as in ``torchvision.models.detection.backbone_utils.BackboneWithFPN``.

    Returns:
        A module that makes of images an ordered dict of maps (N, out_channels, H_i, W_i), with ``out_channels``.

    Raises:
        ValueError: ``model`` is no ConvNeXt, or ``out_indices`` are not stages of it.
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
    except ImportError as error:
        raise ImportError(f"fpn_backbone needs torchvision (pip install torchvision): {error}") from error
    stages = pyramid_stages(model)
    wanted = _indices([i + len(stages) if i < 0 else i for i in out_indices])
    if wanted[-1] >= len(stages):
        raise ValueError(f"out_indices is {tuple(out_indices)!r}; this network was built with {len(stages)} stages")
    channels = [_channels(stages[i]) for i in wanted]
    stages = stages[: wanted[-1] + 1]
    return BackboneWithFPN(stages, {str(i): str(k) for k, i in enumerate(wanted)}, channels, out_channels, extra_blocks)


def _channels(stage: nn.Module) -> int | None:
    """How many channels a stage's maps have: as many as its blocks; None where it has no ConvNeXt block."""
    for module in stage.modules():
        dialect = dialect_of(module)
        if dialect is not None:
            return part(module, dialect.conv).in_channels
    return None
