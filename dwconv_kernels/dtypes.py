"""In which precision values are summed; the one module besides torch that every definition may import."""

from __future__ import annotations

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: fp32 for half types, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
