"""DWNet: Swin Transformer with depthwise convolution in the place of window attention.

The experiment is that of "Demystifying Local Vision Transformer" (https://arxiv.org/abs/2106.04263). ELSA's authors
repeat it (https://arxiv.org/abs/2112.12786), and published no code of that. So arguments and state_dict keys are those
of the former's repository, Atten4Vis/DemystifyLocalViT, ``models/dwnet.py``. What is left of Swin are its patches,
stages, patch merging and MLPs; there are no windows, no shifts and no positions, so images may be of any size.
"""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dwconv_kernels as dk

from .block import DropPath, check_odd
from .model import (
    ImageClassifier,
    check_depths,
    check_integer,
    check_probability,
    check_ratio,
    check_sizes,
    drop_path_rates,
    scaled,
)


class DWBlock(nn.Module):
    """What stands for attention: 1×1, depthwise and 1×1 convolution, each with a batch norm, ReLU between them."""

    def __init__(self, dim: int, window_size: int, **made):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 1, bias=False, **made)
        self.bn0 = nn.BatchNorm2d(dim, **made)
        self.conv = dk.DepthwiseConv2d(dim, dim, window_size, padding=window_size // 2, **made)
        self.bn = nn.BatchNorm2d(dim, **made)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(dim, dim, 1, bias=False, **made)
        self.bn2 = nn.BatchNorm2d(dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.conv0(x)))
        x = self.relu(self.bn(self.conv(x)))
        return self.bn2(self.conv2(x))


class Mlp(nn.Module):
    """Over the last dimension of x."""

    def __init__(self, dim: int, hidden: int, drop: float, **made):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **made)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **made)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SpatialBlock(nn.Module):
    """``x = x + drop_path(attn2conv(x))``, then ``x + drop_path(mlp(bn(x)))``; x (N, C, H, W), best channels_last."""

    def __init__(self, dim: int, window_size: int, mlp_ratio: float, drop: float, drop_path: float, **made):
        super().__init__()
        self.attn2conv = DWBlock(dim, window_size, **made)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = Mlp(dim, scaled("mlp_ratio", dim, mlp_ratio), drop, **made)
        self.bn = nn.BatchNorm2d(dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn2conv(x))
        branch = self.mlp(self.bn(x).permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class PatchMerging(nn.Module):
    """Every 2×2 pixels of x (N, C, H, W) become one of 2·C channels; odd maps are filled up with zeros, as timm's."""

    def __init__(self, dim: int, **made):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **made)
        self.norm = nn.LayerNorm(4 * dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Images (N, in_chans, H, W) to normalised patches (N, C, H/P, W/P), channels_last."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **made):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **made)
        self.norm = nn.LayerNorm(dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DWNet(ImageClassifier):
    """Swin Transformer with depthwise convolution instead of window attention, see :mod:`convnext_fast.dwnet`.

    Arguments are given by name. Of the original's, ``img_size`` is not needed; ``norm_layer``, ``ape``, ``patch_norm``
    and ``dynamic`` are what its published configurations of ``dwnet`` set; ``use_checkpoint`` is
    ``set_grad_checkpointing``.

    Args:
        patch_size: width and stride of the stem's convolution.
        in_chans: channels of the images.
        num_classes: size of the head; 0 leaves pooled features.
        embed_dim: channels of the first stage, doubled by every further one.
        depths: blocks per stage.
        window_size: odd width of the depthwise convolutions.
        mlp_ratio: hidden channels of the MLPs per channel.
        drop_rate: dropout after the stem and inside of the MLPs.
        drop_path_rate: probability of dropping a branch, growing linearly from 0 to this over all blocks.
        device, dtype: of the parameters.

    Images of any size from ``model.reduction`` pixels up are allowed.

    Raises:
        ValueError: an argument, or the shape of the images, is not one of the allowed.
    """

    def __init__(
        self,
        *,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_chans, num_classes, patch_size)
        check_integer("embed_dim", embed_dim, 1)
        check_odd("window_size", window_size)
        check_probability("drop_rate", drop_rate)
        check_ratio("mlp_ratio", mlp_ratio)
        depths = check_depths("depths", depths)
        made = {"device": device, "dtype": dtype}
        dims = [embed_dim << i for i in range(len(depths))]
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.reduction = patch_size << (len(depths) - 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **made)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = [SpatialBlock(dim, window_size, mlp_ratio, drop_rate, next(rates), **made) for _ in range(depth)]
            last = i == len(depths) - 1
            merging = {} if last else {"downsample": PatchMerging(dim, **made)}
            self.layers.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), **merging)))
        self.norm = nn.LayerNorm(dims[-1], **made)
        self.head = nn.Linear(dims[-1], num_classes, **made) if num_classes > 0 else nn.Identity()
        for module in self.modules():  # convolutions begin as PyTorch's do
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (N, C) of images x (N, in_chans, H, W): normalised, then pooled."""
        self._check_images(x)
        x = self.pos_drop(self.patch_embed(x))
        for layer in self.layers:
            x = self._run_blocks(layer.blocks, x)
            x = layer.downsample(x) if len(layer) == 2 else x
        return self.norm(x.permute(0, 2, 3, 1)).mean([1, 2])  # (N, C, H, W) -> (N, C)
