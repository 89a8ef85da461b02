"""What dtypes are called, and in which values are summed; the one module besides torch that definitions may import."""

from __future__ import annotations

import torch

# Of those that kernels take, in launch choices and reports.
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def name_of(dtype: torch.dtype) -> str:
    """That of NAMES; of other dtypes PyTorch's, without its prefix: float64."""
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: fp32 for half types, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
