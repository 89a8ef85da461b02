"""RepLKNet (https://arxiv.org/abs/2203.06717): kernels up to 31×31, trained with a small kernel beside each.

Arguments and state_dict keys are those of the authors' repository, DingXiaoH/RepLKNet-pytorch, ``replknet.py``.
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
from .model import ImageClassifier, check_depths, check_integer, check_ratio, drop_path_rates, scaled


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, relu: bool = False,
    depthwise: bool = False, **made,
) -> nn.Sequential:  # fmt: skip
    """Convolution that keeps the size of maps (up to its stride), batch norm and perhaps ReLU."""
    kind = dk.DepthwiseConv2d if depthwise else nn.Conv2d
    conv = kind(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **made)
    nonlinear = {"nonlinear": nn.ReLU()} if relu else {}
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels, **made), **nonlinear))


class ReparamLargeKernelConv(nn.Module):
    """A large depthwise convolution, and while training a small one beside it, each with a batch norm, added up.

    ``merge_kernel`` makes one convolution with bias of them, whose results in eval mode are the same up to rounding.

    Args:
        channels: of input and output.
        kernel_size: odd width of the large kernel.
        small_kernel: odd width of the small one, at most ``kernel_size``; None: there is none.
        small_kernel_merged: build what ``merge_kernel`` leaves.
    """

    def __init__(
        self, channels: int, kernel_size: int, small_kernel: int | None = None, small_kernel_merged: bool = False,
        **made,
    ):  # fmt: skip
        super().__init__()
        check_odd("kernel_size", kernel_size)
        if small_kernel is not None:
            check_odd("small_kernel", small_kernel)
            if small_kernel > kernel_size:
                raise ValueError(f"small_kernel is {small_kernel}; up to kernel_size={kernel_size} is allowed")
        if small_kernel_merged:
            self.lkb_reparam = dk.DepthwiseConv2d(channels, channels, kernel_size, padding=kernel_size // 2, **made)
            return
        self.lkb_origin = conv_bn(channels, channels, kernel_size, depthwise=True, **made)
        if small_kernel is not None:
            self.small_conv = conv_bn(channels, channels, small_kernel, depthwise=True, **made)

    def forward(self, x: Tensor) -> Tensor:
        if "lkb_reparam" in self._modules:
            return self.lkb_reparam(x)
        y = self.lkb_origin(x)
        return y + self.small_conv(x) if "small_conv" in self._modules else y

    @torch.no_grad()
    def merge_kernel(self) -> None:
        """One convolution ``lkb_reparam`` instead of two and their batch norms, by the norms' running statistics.

        Nothing happens where it is merged already, and nothing has where this fails. What is merged is trained if the
        large kernel was.
        """
        if "lkb_reparam" in self._modules:
            return
        large = self.lkb_origin.conv
        weight, bias = _without_norm(self.lkb_origin)
        if "small_conv" in self._modules:
            small_weight, small_bias = _without_norm(self.small_conv)
            rim = (weight.shape[-1] - small_weight.shape[-1]) // 2
            weight, bias = weight + F.pad(small_weight, [rim] * 4), bias + small_bias
        merged = dk.DepthwiseConv2d(
            large.in_channels, large.out_channels, large.kernel_size, padding=large.padding,
            device=large.weight.device, dtype=large.weight.dtype,
        )  # fmt: skip
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
        merged.requires_grad_(any(parameter.requires_grad for parameter in large.parameters()))
        del self.lkb_origin
        if "small_conv" in self._modules:
            del self.small_conv
        self.lkb_reparam = merged.train(self.training)


def _where_float64_is(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _without_norm(branch: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight (C, 1, K, K) and bias (C,) of a convolution that does what ``branch`` does in eval mode, in float64."""
    norm, device = branch.bn, _where_float64_is(branch.conv.weight.device)
    tensors = branch.conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, gamma, beta, mean, variance = (tensor.to(device).double() for tensor in tensors)  # in this order for MPS
    factor = gamma / (variance + norm.eps).sqrt()
    return weight * factor.view(-1, 1, 1, 1), beta - mean * factor


class RepLKBlock(nn.Module):
    """``x + drop_path(pw2(relu(large_kernel(pw1(prelkb_bn(x))))))`` over x (N, C, H, W), best channels_last.

    Args:
        in_channels: of input and output.
        dw_channels: of the depthwise convolution.
        block_lk_size, small_kernel, small_kernel_merged: see :class:`ReparamLargeKernelConv`.
        drop_path: probability of dropping the branch, per image.

    Raises:
        ValueError: an argument is not one of the allowed.
    """

    def __init__(
        self, in_channels: int, dw_channels: int, block_lk_size: int, small_kernel: int | None, drop_path: float,
        small_kernel_merged: bool = False, **made,
    ):  # fmt: skip
        super().__init__()
        self.pw1 = conv_bn(in_channels, dw_channels, 1, relu=True, **made)
        self.pw2 = conv_bn(dw_channels, in_channels, 1, **made)
        self.large_kernel = ReparamLargeKernelConv(
            dw_channels, block_lk_size, small_kernel, small_kernel_merged, **made
        )
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(in_channels, **made)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.large_kernel(self.pw1(self.prelkb_bn(x)))
        return x + self.drop_path(self.pw2(self.lk_nonlinear(y)))


class ConvFFN(nn.Module):
    """``x + drop_path(pw2(gelu(pw1(preffn_bn(x)))))``, an MLP of 1×1 convolutions."""

    def __init__(self, channels: int, internal_channels: int, drop_path: float, **made):
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.preffn_bn = nn.BatchNorm2d(channels, **made)
        self.pw1 = conv_bn(channels, internal_channels, 1, **made)
        self.pw2 = conv_bn(internal_channels, channels, 1, **made)
        self.nonlinear = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x)))))


class RepLKNet(ImageClassifier):
    """A stem, and stages of :class:`RepLKBlock` and :class:`ConvFFN` in turn.

    Of the original's arguments, ``use_checkpoint`` is ``set_grad_checkpointing``, ``use_sync_bn`` is
    ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``, and there is no ``out_indices``: this network classifies.

    Args:
        large_kernel_sizes: odd widths of the large kernels, one per stage.
        layers: pairs of blocks per stage.
        channels: per stage.
        drop_path_rate: probability of dropping a branch, growing linearly from 0 to this over all pairs.
        small_kernel: odd width of the kernel beside each large one; None for none.
        dw_ratio: channels of the depthwise convolutions per channel.
        ffn_ratio: hidden channels of the MLPs per channel.
        in_channels: channels of the images.
        num_classes: size of the head; 0 leaves pooled features.
        small_kernel_merged: build the network that ``structural_reparam`` leaves, for checkpoints of such.
        device, dtype: of the parameters.

    Images of any size from ``model.reduction`` pixels up are allowed.

    Raises:
        ValueError: an argument, or the shape of the images, is not one of the allowed.
    """

    def __init__(
        self,
        large_kernel_sizes: Sequence[int],
        layers: Sequence[int],
        channels: Sequence[int],
        drop_path_rate: float,
        small_kernel: int | None,
        dw_ratio: float = 1,
        ffn_ratio: float = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        small_kernel_merged: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        layers, channels = check_depths("layers", layers), check_depths("channels", channels)
        sizes = tuple(large_kernel_sizes) if isinstance(large_kernel_sizes, Sequence) else (large_kernel_sizes,)
        if not len(sizes) == len(layers) == len(channels):
            raise ValueError(
                f"large_kernel_sizes is {large_kernel_sizes}, layers is {layers} and channels is {channels}; as many "
                "numbers each are allowed"
            )
        for size in sizes:
            check_odd("large_kernel_sizes", size)
        check_integer("in_channels", in_channels, 1)
        check_integer("num_classes", num_classes, 0)
        check_ratio("dw_ratio", dw_ratio)
        check_ratio("ffn_ratio", ffn_ratio)
        made = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_channels, num_classes, channels[-1]
        self.reduction = 4 << (len(layers) - 1)
        width = channels[0]
        self.stem = nn.ModuleList([
            conv_bn(in_channels, width, 3, 2, relu=True, **made),
            conv_bn(width, width, 3, relu=True, depthwise=True, **made),
            conv_bn(width, width, 1, relu=True, **made),
            conv_bn(width, width, 3, 2, relu=True, depthwise=True, **made),
        ])  # fmt: skip
        rates = iter(drop_path_rates(drop_path_rate, sum(layers)))
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, (size, depth, dim) in enumerate(zip(sizes, layers, channels, strict=True)):
            blocks = []
            for rate in (next(rates) for _ in range(depth)):
                width = scaled("dw_ratio", dim, dw_ratio)
                depthwise = RepLKBlock(dim, width, size, small_kernel, rate, small_kernel_merged, **made)
                blocks += [depthwise, ConvFFN(dim, scaled("ffn_ratio", dim, ffn_ratio), rate, **made)]
            self.stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
            if i < len(layers) - 1:
                next_dim = channels[i + 1]
                widen = conv_bn(dim, next_dim, 1, relu=True, **made)
                shrink = conv_bn(next_dim, next_dim, 3, 2, relu=True, depthwise=True, **made)
                self.transitions.append(nn.Sequential(widen, shrink))
        self.norm = nn.BatchNorm2d(channels[-1], **made)
        self.head = nn.Linear(channels[-1], num_classes, **made) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (N, C) of images x (N, in_channels, H, W): normalised, then pooled."""
        self._check_images(x)
        x = x.contiguous(memory_format=torch.channels_last)  # the layout in which everything after it is fast
        for layer in self.stem:
            x = layer(x)
        for i, stage in enumerate(self.stages):
            x = self._run_blocks(stage.blocks, x)
            x = self.transitions[i](x) if i < len(self.transitions) else x
        return self.norm(x).mean([-2, -1])  # (N, C, H, W) -> (N, C)

    def structural_reparam(self) -> None:
        """Merge all small kernels into the large ones, see :class:`ReparamLargeKernelConv`; for eval mode."""
        for module in list(self.modules()):
            if isinstance(module, ReparamLargeKernelConv):
                module.merge_kernel()
