"""Operators for convolutional networks, forward and backward: Triton kernels, and plain PyTorch where they do not run.

``depthwise_conv2d``, ``layer_norm_linear`` and ``convnext_block`` are drop-in for the PyTorch expressions that their
documentation names. ``supports`` says whether a call runs on the kernels, ``backend`` decides what runs.
"""

from ._version import __version__
from .block.op import MEMORY, convnext_block
from .depthwise.op import depthwise_conv2d, depthwise_kernels_take
from .modules import DepthwiseConv2d, LayerNormLinear, dtypes_agree, is_plain
from .norm_linear.op import layer_norm_linear
from .runtime import (
    backend,
    current_backend,
    engages,
    kernel_status,
    strict,
    supports,
    tf32_in_convolutions_alone,
)

__all__ = [
    "MEMORY",
    "DepthwiseConv2d",
    "LayerNormLinear",
    "__version__",
    "backend",
    "convnext_block",
    "current_backend",
    "depthwise_conv2d",
    "depthwise_kernels_take",
    "dtypes_agree",
    "engages",
    "is_plain",
    "kernel_status",
    "layer_norm_linear",
    "strict",
    "supports",
    "tf32_in_convolutions_alone",
]
