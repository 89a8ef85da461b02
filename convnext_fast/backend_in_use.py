"""Which backend serves ConvNeXt's blocks on a device, for people to read."""

from __future__ import annotations

import torch

import dwconv_kernels as dk


def describe_backend(device: torch.device) -> str:
    """Which backend of :mod:`dwconv_kernels` serves tensors of ``device``, and why not the kernels if these do not."""
    setting = dk.current_backend()
    if setting not in ("auto", "triton"):
        return f"{setting} (as set)"
    if setting == "auto" and device.type != "cuda":
        return f"torch (the kernels run on CUDA devices, this is {device.type})"
    (whole, reason), (convolution, _) = _support(device)
    if convolution and not whole:
        return f"triton for depthwise convolutions, torch for the rest ({reason})"
    if setting == "triton":
        return "triton (as set)"
    return "triton" if whole else f"torch ({reason})"


def kernels_take_blocks(device: torch.device) -> tuple[bool, str]:
    """Would a block of ConvNeXt-T run on the kernels on this device, at least its convolution, and why not?"""
    whole, convolution = _support(device)
    return whole if whole[0] else convolution


def _support(device: torch.device) -> tuple[tuple[bool, str], tuple[bool, str]]:
    """What :func:`dk.supports` says of a block of ConvNeXt-T and of its convolution."""
    vector, hidden = torch.empty(96, device=device), torch.empty(384, device=device)
    x, taps = torch.empty(1, 96, 7, 7, device=device), torch.empty(96, 1, 7, 7, device=device)
    fc1, fc2 = torch.empty(384, 96, device=device), torch.empty(96, 384, device=device)
    return (
        dk.supports(dk.convnext_block, x, taps, vector, vector, vector, fc1, hidden, fc2, vector, vector),
        dk.supports(dk.depthwise_conv2d, x, taps, vector, padding=3),
    )
