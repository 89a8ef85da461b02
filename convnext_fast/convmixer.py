"""ConvMixer (https://arxiv.org/abs/2201.09792), with the constructor arguments and state_dict keys of timm's."""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dwconv_kernels as dk

from .block import DropPath, check_odd
from .model import ImageClassifier, check_integer, check_probability, check_sizes, drop_path_rates


class Residual(nn.Module):
    """``drop_path(fn(x)) + x``"""

    def __init__(self, fn: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.fn(x)) + x


class ConvMixer(ImageClassifier):
    """Patches, then ``depth`` times a residual depthwise convolution over space and a 1×1 convolution over channels.

    Forward and state_dict are equal to those of timm's ConvMixer. Checkpoints of the original repository
    (locuslab/convmixer), whose keys begin with numbers, are read too.

    Args:
        dim: channels of all blocks.
        depth: number of blocks.
        kernel_size: odd width of the depthwise convolutions.
        patch_size: width and stride of the stem's convolution.
        in_chans: channels of the images.
        num_classes: size of the head; 0 leaves pooled features.
        global_pool: "avg", or "max".
        drop_rate: dropout before the head.
        act_layer: makes the activations.
        drop_path_rate: probability of dropping a depthwise branch, growing linearly from 0 to this over all blocks;
            timm's ConvMixer has none.
        device, dtype: of the parameters.

    Images of any size from ``patch_size`` pixels up are allowed.

    Raises:
        ValueError: an argument, or the shape of the images, is not one of the allowed.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        *,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_chans, num_classes, patch_size)
        check_integer("dim", dim, 1)
        check_integer("depth", depth, 1)
        check_odd("kernel_size", kernel_size)
        check_probability("drop_rate", drop_rate)
        if global_pool not in ("avg", "max"):
            raise ValueError(f'global_pool is {global_pool!r}; "avg" or "max" is allowed')
        made = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.reduction, self.global_pool = patch_size, global_pool
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **made), act_layer(), nn.BatchNorm2d(dim, **made)
        )
        blocks = []
        for rate in drop_path_rates(drop_path_rate, depth):
            depthwise = dk.DepthwiseConv2d(dim, dim, kernel_size, padding=kernel_size // 2, **made)
            over_space = nn.Sequential(depthwise, act_layer(), nn.BatchNorm2d(dim, **made))
            over_channels = nn.Conv2d(dim, dim, 1, **made), act_layer(), nn.BatchNorm2d(dim, **made)
            blocks.append(nn.Sequential(Residual(over_space, rate), *over_channels))
        self.blocks = nn.Sequential(*blocks)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes, **made) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled features (N, C) of images x (N, in_chans, H, W)."""
        self._check_images(x)
        x = self.stem(x).contiguous(memory_format=torch.channels_last)  # the layout in which blocks are fast
        x = self._run_blocks(self.blocks, x)
        return x.mean([-2, -1]) if self.global_pool == "avg" else x.amax([-2, -1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images x (N, in_chans, H, W)."""
        return self.head(self.head_drop(self.forward_features(x)))
