"""ConvNeXt and isotropic ConvNeXt, with the constructor arguments and state_dict keys of the original repository."""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import dwconv_kernels as dk

from .block import Block


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of x (N, C, H, W); the result has channels_last strides."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class ImageClassifier(nn.Module):
    """What all networks share: pooling, the head, and how blocks are run.

    Expects ``in_chans``, ``reduction``, ``num_features`` and the module ``head`` of its subclass, and for ``_pool`` and
    ``_init_weights``, which are those of ConvNeXts, the module ``norm``.
    """

    grad_checkpointing = False

    def _init_weights(self, head_init_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
                self.head.bias.mul_(head_init_scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations, wherever gradients are on."""
        self.grad_checkpointing = bool(enable)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 leaves pooled features (N, C)."""
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; 0 (no head) or more is allowed")
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _run_blocks(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks:
            if torch.compiler.is_compiling():  # the backend is part of what was compiled
                x = checkpoint(block, x, use_reentrant=False)
            else:
                again = _StatisticsAsTheyAre(block)
                x = checkpoint(
                    _run_on, dk.current_backend(), block, x, use_reentrant=False,
                    context_fn=lambda again=again: (nullcontext(), again),
                )  # fmt: skip
        return x

    def _check_images(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):  # symbolic tracing has no shapes to look at
            return
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; (N, {self.in_chans}, H, W) is allowed (in_chans={self.in_chans})"
            )
        if min(x.shape[2], x.shape[3]) < self.reduction:
            raise ValueError(
                f"images are {x.shape[2]}×{x.shape[3]} pixels; at least {self.reduction}×{self.reduction} is allowed, "
                f"since this network reduces by {self.reduction}"
            )

    def _pool(self, x: Tensor) -> Tensor:
        return self.norm(x.mean([-2, -1]))  # (N, C, H, W) -> (N, C)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images x (N, in_chans, H, W)."""
        return self.head(self.forward_features(x))


class ConvNeXt(ImageClassifier):
    """ConvNeXt V1 and V2 (``use_grn=True``).

    The arguments up to ``head_init_scale`` are those of the original ``models/convnext.py``.

    Args:
        in_chans: channels of the images.
        num_classes: size of the head; 0 leaves pooled, normalised features.
        depths: blocks per stage, four numbers.
        dims: channels per stage, four numbers.
        drop_path_rate: probability of dropping a block's branch, growing linearly from 0 to this over all blocks.
        layer_scale_init_value: initial layer scale; 0 builds blocks without it (as V2 does).
        head_init_scale: factor on the head's initial weights.
        use_grn: the blocks of V2.
        kernel_size: odd width of the depthwise convolutions.
        patch_size: width and stride of the stem's convolution.
        norm_eps: ε of every layer norm.
        features_only: return the list of the maps ``out_indices`` (N, C_i, H_i, W_i) instead of logits; such a network
            has neither final norm nor head, and no stage after the last of these.
        out_indices: stages whose maps ``features_only`` returns, negative ones counted from the end.
        memory: what each block saves for the backward pass, see :func:`dwconv_kernels.convnext_block`.
        half_residual: under autocast, keep the maps between blocks in autocast's dtype. Without it, the fp32 layer
            scale of V1 makes them fp32, as in the original network. It halves the memory of what blocks hand on, and
            rounds the sum of the branches once per block: in bf16, the error of ConvNeXt-T's logits grows from 0.47 to
            0.57 percent, that of its gradients from 1.07 to 1.34 (``python -m benchmarks.residual``).
            Not for fp16, where layer scales below 6e-5, as they begin, and their gradients lose digits.
        device, dtype: of the parameters.

    Images of any size from ``model.reduction`` pixels up are allowed.

    Raises:
        ValueError: an argument, or the shape of the images, is not one of the allowed.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        *,
        use_grn: bool = False,
        kernel_size: int = 7,
        patch_size: int = 4,
        norm_eps: float = 1e-6,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        memory: str = "default",
        half_residual: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        depths, dims = tuple(depths), tuple(dims)
        check_sizes(in_chans, num_classes, patch_size)
        if not (four_positive(depths) and four_positive(dims)):
            raise ValueError(f"depths is {depths} and dims is {dims}; four positive numbers each are allowed")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices is given without features_only=True, which is what returns those maps")
        made = {"device": device, "dtype": dtype}
        # A feature extractor ends with its last map: DistributedDataParallel wants no idle parameters.
        self.out_indices = stage_indices(out_indices) if features_only else None
        count = max(self.out_indices) + 1 if features_only else 4
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        depths, dims = depths[:count], dims[:count]
        self.in_chans, self.num_classes, self.num_features = in_chans, 0 if features_only else num_classes, dims[-1]
        self.reduction = patch_size << (count - 1)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size << i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=patch_size, stride=patch_size, **made),
            LayerNorm2d(dims[0], eps=norm_eps, **made),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in pairwise(dims):
            norm = LayerNorm2d(dim, eps=norm_eps, **made)
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(dim, next_dim, 2, stride=2, **made)))

        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            blocks = [
                Block(
                    dim, next(rates), layer_scale_init_value, kernel_size=kernel_size, use_grn=use_grn,
                    norm_eps=norm_eps, memory=memory, half_residual=half_residual, **made,
                )
                for _ in range(depth)
            ]  # fmt: skip
            self.stages.append(nn.Sequential(*blocks))

        self.norm = nn.Identity() if features_only else nn.LayerNorm(dims[-1], eps=norm_eps, **made)
        self.head = nn.Linear(dims[-1], num_classes, **made) if self.num_classes > 0 else nn.Identity()
        self._init_weights(head_init_scale)

    def forward_maps(self, x: Tensor, out_indices: Sequence[int] | None = None) -> list[Tensor]:
        """The maps (N, C_i, H_i, W_i) after the stages ``out_indices`` (all there are by default), not normalised."""
        self._check_images(x)
        wanted = tuple(range(len(self.stages))) if out_indices is None else stage_indices(out_indices)
        if max(wanted) >= len(self.stages):
            raise ValueError(
                f"out_indices is {tuple(out_indices)}; this network was built with {len(self.stages)} stages"
            )
        maps = []
        for i in range(max(wanted) + 1):
            x = self._run_blocks(self.stages[i], self.downsample_layers[i](x))
            maps.append(x)
        return [maps[i] for i in wanted]

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled and normalised features (N, C) of images x (N, in_chans, H, W)."""
        if self.out_indices is not None:
            raise ValueError("forward_features: this network was built with features_only=True and has no final norm")
        return self._pool(self.forward_maps(x, (3,))[0])

    def forward(self, x: Tensor):  # no annotation: PyTorch 2.6's torch.fx cannot pickle one with a |
        """Logits (N, num_classes) of images x (N, in_chans, H, W); a list of maps where ``features_only``."""
        if self.out_indices is not None:
            return self.forward_maps(x, self.out_indices)
        return super().forward(x)

    def reset_classifier(self, num_classes: int) -> None:
        if self.out_indices is not None:
            raise ValueError("reset_classifier: this network was built with features_only=True and has no head")
        super().reset_classifier(num_classes)


class ConvNeXtIsotropic(ImageClassifier):
    """ConvNeXt of one resolution and width (section 3.3 of the paper); arguments of ``models/convnext_isotropic.py``.

    Args are those of :class:`ConvNeXt`, with one ``depth`` and one ``dim``, and a stem of 16×16 patches.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 18,
        dim: int = 384,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        head_init_scale: float = 1.0,
        *,
        kernel_size: int = 7,
        patch_size: int = 16,
        norm_eps: float = 1e-6,
        memory: str = "default",
        half_residual: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_chans, num_classes, patch_size)
        made = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.reduction = patch_size
        self.stem = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **made)
        blocks = [
            Block(
                dim, rate, layer_scale_init_value, kernel_size=kernel_size, norm_eps=norm_eps, memory=memory,
                half_residual=half_residual, **made,
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        ]  # fmt: skip
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **made)
        self.head = nn.Linear(dim, num_classes, **made) if num_classes > 0 else nn.Identity()
        self._init_weights(head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pooled and normalised features (N, C) of images x (N, in_chans, H, W)."""
        self._check_images(x)
        # There is no norm after this stem to make the map channels_last, the layout in which blocks are fast.
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        return self._pool(self._run_blocks(self.blocks, x))


def _run_on(backend: str, block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)`` on the backend of the first time, also when it runs again inside the backward pass."""
    with dk.backend(backend):
        return block(x)


class _StatisticsAsTheyAre:
    """Inside, batch norms leave their running statistics alone, which have had this batch. Can be entered again.

    With a momentum of 0, and a count that is thrown away: autograd keeps what it kept the first time.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __enter__(self) -> None:
        norms = [m for m in self.block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()

    def __exit__(self, *_) -> None:
        for norm, momentum, count in self.before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def drop_path_rates(rate: float, count: int) -> list[float]:
    """``count`` probabilities growing linearly from 0 to ``rate``."""
    check_probability("drop_path_rate", rate)
    return torch.linspace(0, rate, count, device="cpu").tolist()


def four_positive(numbers: Sequence) -> bool:
    return len(numbers) == 4 and all(isinstance(number, int) and number > 0 for number in numbers)


def check_sizes(in_chans: int, num_classes: int, patch_size: int) -> None:
    for name, value, lowest in (
        ("in_chans", in_chans, 1),
        ("num_classes", num_classes, 0),
        ("patch_size", patch_size, 1),
    ):
        check_integer(name, value, lowest)


def check_integer(name: str, value: int, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name} is {value!r}; an integer of at least {lowest} is allowed")


def check_probability(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; a probability in [0, 1) is allowed")


def check_ratio(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; a positive number is allowed")


def scaled(name: str, channels: int, ratio: float) -> int:
    """``channels`` times the ratio ``name``, rounded down.

    Raises:
        ValueError: nothing is left of them.
    """
    width = int(channels * ratio)
    if width == 0:
        raise ValueError(
            f"{name} is {ratio}, so that no channel of {channels} is left; 1/{channels} or more is allowed"
        )
    return width


def check_depths(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    integers = isinstance(numbers, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not integers or not numbers or min(numbers) < 1:
        raise ValueError(f"{name} is {numbers!r}; one positive number per stage is allowed")
    return tuple(numbers)


def stage_indices(out_indices: Sequence[int] | None) -> tuple[int, ...]:
    if out_indices is None:
        return (0, 1, 2, 3)
    if not isinstance(out_indices, Sequence) or not all(isinstance(i, int) for i in out_indices):
        raise ValueError(f"out_indices is {out_indices!r}; a sequence of stages is allowed")
    indices = tuple(i + 4 if i < 0 else i for i in out_indices)
    if not indices or any(i not in range(4) for i in indices) or len(set(indices)) != len(indices):
        raise ValueError(f"out_indices is {tuple(out_indices)}; different stages out of 0, 1, 2, 3 are allowed")
    return indices
