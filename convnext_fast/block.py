"""The ConvNeXt block (V1: https://arxiv.org/abs/2201.03545, V2: https://arxiv.org/abs/2301.00808)."""

# No "from __future__ import annotations" here: torch.fx takes annotations of forward as they are, and cannot pickle a
# traced module where they are strings.

import torch
from torch import Tensor, nn

import dwconv_kernels as dk


class DropPath(nn.Module):
    """Stochastic depth per image (https://arxiv.org/abs/1603.09382).

    ``y[n] = x[n] · ρ[n]`` in training, with ρ = 0 or 1/(1 − drop_prob).

    The same draws from torch's generator as timm's and the original's DropPath, so equal seeds drop equal images.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob is {drop_prob}; a probability in [0, 1) is allowed")
        self.drop_prob = float(drop_prob)

    def row_scale(self, x: Tensor) -> Tensor | None:
        """ρ of shape (N,) for x (N, ...); None where nothing is dropped.

        In fp32 (float64 for such x): under autocast the branch may be wider than x, and 1/keep must not be narrower.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = x.new_empty((x.shape[0],), dtype=dtype).bernoulli_(keep_prob)
        return scale.div_(keep_prob) if keep_prob > 0 else scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.row_scale(x)
        return x if scale is None else x * scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt V2: ``γ·x·Nx + β + x`` over channels-last x (N, H, W, C).

    ``Gx[n,c] = ‖x[n,:,:,c]‖₂``, ``Nx = Gx / (mean_c Gx + 1e-6)``.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """γ and β as (C,), through views that hand back gradients with the strides of the parameters.

        DistributedDataParallel compares those literally, and channels_last changes the ones of γ (1, 1, 1, C).
        """
        return as_vector(self.gamma), as_vector(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.vectors()
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return gamma * (x * norm) + beta + x


def as_vector(parameter: Tensor) -> Tensor:
    """(C,), (C, 1, 1) or (1, 1, 1, C) as (C,).

    The backward of a squeeze writes the stride of the dimension that it brings back.
    """
    if isinstance(parameter, torch.fx.Proxy) or parameter.ndim < 4:  # symbolic tracing has no strides to look at
        return parameter.flatten()
    if parameter.stride(1) == 1:  # channels_last, (C, 1, C, 1)
        return parameter.permute(0, 2, 3, 1).squeeze(-1).flatten()
    return parameter.squeeze(1).flatten()


def check_odd(name: str, value: int) -> None:
    """Refuse what is no width of a convolution that keeps the size of maps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} is {value!r}; a positive odd integer is allowed, such as 7")


def fits_a_block(conv: nn.Conv2d) -> bool:
    """Is this the depthwise convolution of a block: as many channels and pixels as before, zeros around the map?"""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.padding_mode == "zeros"
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.kernel_size[0] % 2 == conv.kernel_size[1] % 2 == 1
        and conv.padding in ((conv.kernel_size[0] // 2, conv.kernel_size[1] // 2), "same")
    )


def under_autocast(x: Tensor) -> bool:
    """Does autocast round what a linear layer makes of x?"""
    if isinstance(x, torch.fx.Proxy):  # symbolic tracing has no devices to look at
        return False
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return False
    return x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(device)


class Block(nn.Module):
    """``x + drop_path(γ · pwconv2(grn(gelu(pwconv1(norm(dwconv(x)))))))``, one operator: :func:`dk.convnext_block`.

    Parameter names are those of the original repository. A child that somebody replaced (LoRA, quantisation) or put a
    hook on (Grad-CAM, feature extraction) is called as the module that it is, and the block is then not fused.

    Args:
        dim: channels C of input and output.
        drop_path: probability of dropping the branch, per image.
        layer_scale_init_value: initial γ; 0 builds a block without γ.
        kernel_size: odd width of the depthwise convolution.
        use_grn: the V2 block, with global response normalisation after GELU.
        norm_eps: ε of the layer norm.
        memory: what the operator saves for the backward pass, see :func:`dk.convnext_block`. Children that are called
            one after another save what PyTorch saves, whatever this is.
        half_residual: under autocast, keep x in autocast's dtype from block to block, where else a layer scale in fp32
            makes it fp32 and twice the memory; see :class:`convnext_fast.ConvNeXt` for what that costs.
            torch.fx does not trace it.

    Raises:
        ValueError: an argument is not one of the allowed.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        *,
        kernel_size: int = 7,
        use_grn: bool = False,
        norm_eps: float = 1e-6,
        memory: str = "default",
        half_residual: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_odd("kernel_size", kernel_size)
        if layer_scale_init_value is None:  # as timm spells a block without it
            layer_scale_init_value = 0.0
        if not layer_scale_init_value >= 0:
            raise ValueError(f"layer_scale_init_value is {layer_scale_init_value}; 0 (none) or more is allowed")
        if memory not in dk.MEMORY:
            raise ValueError(f"memory is {memory!r}; allowed: {', '.join(dk.MEMORY)}")
        made = {"device": device, "dtype": dtype}
        self.dwconv = dk.DepthwiseConv2d(dim, dim, kernel_size, padding=kernel_size // 2, **made)
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **made)
        self.pwconv1 = nn.Linear(dim, 4 * dim, **made)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim, **made) if use_grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim, **made)
        self.gamma = None
        if layer_scale_init_value > 0:
            self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value), **made))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.memory, self.half_residual = memory, half_residual

    def forward(self, x: Tensor) -> Tensor:
        if self.half_residual and under_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not (self._children_are_plain() and self._dtypes_agree(x)):
            return x + self.drop_path(self._branch(x))
        grn_weight, grn_bias = (None, None) if self.grn is None else self.grn.vectors()
        row_scale = self.drop_path.row_scale(x) if isinstance(self.drop_path, DropPath) else None
        return dk.convnext_block(
            x,
            self.dwconv.weight, self.dwconv.bias,
            self.norm.weight, self.norm.bias,
            self.pwconv1.weight, self.pwconv1.bias,
            self.pwconv2.weight, self.pwconv2.bias,
            layer_scale=self._layer_scale(x),
            row_scale=row_scale,
            grn_weight=grn_weight,
            grn_bias=grn_bias,
            eps=self.norm.eps,
            memory=self.memory,
        )  # fmt: skip

    def _branch(self, x: Tensor) -> Tensor:
        """The same formula, one module after another: what hooks and replaced children see."""
        x = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.act(self.pwconv1(self.norm(x)))
        if self.grn is not None:
            x = self.grn(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self._layer_scale(x) * x
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)

    def _layer_scale(self, x: Tensor) -> Tensor | None:
        """γ, in the dtype of x where that is to be the dtype of the result."""
        cast = self.gamma is not None and self.half_residual and under_autocast(x)
        return self.gamma.to(x.dtype) if cast else self.gamma

    def _dtypes_agree(self, x: Tensor) -> bool:
        grn = None if self.grn is None else self.grn.gamma
        weights = (self.dwconv.weight, self.norm.weight, self.pwconv1.weight, self.pwconv2.weight, self.gamma, grn)
        return dk.dtypes_agree(x, *weights)

    def _children_are_plain(self) -> bool:
        conv = self.dwconv
        return (
            dk.is_plain(conv, dk.DepthwiseConv2d, nn.Conv2d)
            and fits_a_block(conv)
            and dk.is_plain(self.norm, nn.LayerNorm)
            and dk.is_plain(self.pwconv1, nn.Linear)
            and dk.is_plain(self.act, nn.GELU)
            and self.act.approximate == "none"
            and (self.grn is None or dk.is_plain(self.grn, GRN))
            and dk.is_plain(self.pwconv2, nn.Linear)
            and dk.is_plain(self.drop_path, DropPath, nn.Identity)
        )
