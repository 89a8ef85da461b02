"""What the block's forward and backward pass share: sizes, parameters, layouts, the convolution, the sums of GRN."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import registration, runtime
from ..depthwise import launch as depthwise
from ..dtypes import NAMES, name_of
from . import config, kernels
from .reference import GRN_EPS, Parameters, same_padding

GRN = {"BLOCK_P": 32, "BLOCK_D": 64}
SMALL = {"num_warps": 4, "num_stages": 1}


def why_not_sizes(x: Tensor, p: Parameters, computed: torch.dtype) -> str | None:
    """Why no kernel takes a block of these sizes, computed in this dtype; None where they do."""
    n, c, h, w = x.shape
    if n * h * w >= 2**30:
        return f"x has shape {tuple(x.shape)}; the kernels take fewer than 2^30 pixels"
    return config.why_not(name_of(x.dtype), name_of(computed), c, p.fc1_weight.shape[0]) or depthwise.why_not(
        x, p.dw_weight, (1, 1), same_padding(p.dw_weight), (1, 1)
    )


_TAKEN = registration.Memo()  # sizes and dtypes of blocks that were found to be fine


class Call(NamedTuple):
    """What forward and backward pass share: sizes, parameters, and the dtype that is computed in."""

    p: Parameters
    row_scale: Tensor | None
    rows: int
    c: int
    d: int
    pixels: int  # of an image
    arch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return NAMES[self.dtype]

    @property
    def few(self) -> bool:
        return config.few_rows(self.rows, self.arch)

    def precision(self) -> tuple[bool, str]:
        tf32 = self.dtype == torch.float32 and runtime.tf32()
        return tf32, "tf32" if tf32 else "ieee"


def call_of(x: Tensor, p: Parameters, row_scale: Tensor | None, dtype: torch.dtype) -> Call:
    """The call of a block with x (N, C, H, W), its parameters without gaps.

    Raises:
        ValueError: the kernels do not take it, with the reason.
    """
    n, c, h, w = x.shape
    sizes = x.shape, p.dw_weight.shape, p.fc1_weight.shape, x.dtype, dtype
    if sizes not in _TAKEN:  # for callers of the raw operators; the public function has asked why_not before
        reason = why_not_sizes(x, p, dtype)
        if reason is not None:
            raise ValueError(f"the Triton kernels do not take this block: {reason}")
        _TAKEN.remember(sizes, True)
    if not all(t is None or t.is_contiguous() for t in p):
        p = Parameters(*(None if t is None else t.contiguous() for t in p))
    row_scale = None if row_scale is None else row_scale.contiguous()
    return Call(p, row_scale, n * h * w, c, p.fc1_weight.shape[0], h * w, runtime.arch(x), dtype)


def given(call: Call, *names: str) -> dict[str, bool]:
    """HAS_… of those parameters, not to be changed."""
    return _having(names, tuple([_parameter(call, name) is not None for name in names]))


def _parameter(call: Call, name: str) -> Tensor | None:
    return call.row_scale if name == "row_scale" else getattr(call.p, name)


@lru_cache(maxsize=4096)
def _having(names: tuple[str, ...], given: tuple[bool, ...]) -> dict[str, bool]:
    return {f"HAS_{name.upper()}": there for name, there in zip(names, given, strict=True)}


def pointer(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A pointer that is not read stands for what is not there."""
    return like if tensor is None else tensor


def as_map(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (N·H·W, C) as the channels_last map (N, C, H, W) that they are, x's size."""
    n, c, h, w = x.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def as_rows(x: Tensor) -> Tensor:
    """A map as rows, without a copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def convolved(x: Tensor, p: Parameters, dtype: torch.dtype) -> Tensor:
    """y (N, H, W, C) in ``dtype``."""
    n, c, h, w = x.shape
    y = torch.empty((n, h, w, c), dtype=dtype, device=x.device)
    depthwise.convolve(x.to(dtype), p.dw_weight, p.dw_bias, same_padding(p.dw_weight), y.permute(0, 3, 1, 2), False)
    return y


# Global response normalisation. What is computed by PyTorch's operators here are (N, D) numbers.


def grn_sums(call: Call, a: Tensor, dh: Tensor | None) -> Tensor:
    """Σ a² of each image (1, N, D). With dh, also Σ dh·a and Σ dh (3, N, D); a is then u without its bias."""
    images = call.rows // call.pixels
    sums = a.new_empty((1 if dh is None else 3, images, call.d), dtype=torch.float32)
    kernels._block_grn_sums_kernel[(images * -(-call.d // GRN["BLOCK_D"]),)](
        a, pointer(dh, a), pointer(call.p.fc1_bias, a), sums, call.pixels, images,
        D=call.d, BACKWARD=dh is not None, **given(call, "fc1_bias"), **GRN, **SMALL,
    )  # fmt: skip
    return sums


def grn_scales(call: Call, squares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, its mean + ε, R and s = 1 + w∘R of each image, from Σ a² (N, D)."""
    norm = squares.sqrt()
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    relative = norm / mean
    return norm, mean, relative, (1 + relative * call.p.grn_weight.float()).contiguous()


def grn_launch(call: Call, kernel, *arguments, **constants) -> None:
    """Launches ``kernel`` over blocks of pixels of each image, and of hidden channels."""
    images, blocks = call.rows // call.pixels, -(-call.d // GRN["BLOCK_D"])
    grid = (images * -(-call.pixels // GRN["BLOCK_P"]) * blocks,)
    kernel[grid](*arguments, D=call.d, **constants, **GRN, **SMALL)
