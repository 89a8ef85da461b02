"""How this package proves an operator right, for its own tests and for those of its users.

Notation: r is the float64 result of the inputs as they are (already rounded to their dtype), u the unit roundoff of the
output's dtype, S the same operator on absolute values, n the number of terms of a sum. The rules are explained in
CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def integers(shape: Sequence[int], dtype: torch.dtype = torch.float32, generator=None, largest: int = 2) -> Tensor:
    """Whole numbers from −largest to largest: their products and sums are exact, so tests need no tolerance."""
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).to(dtype)


def in_layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of a map x (N, C, H, W) in every kind of strides that users bring.

    Slices are cut out of parents filled with NaN, so that reading a neighbour shows.
    """
    n, c, h, w = x.shape
    parent = x.new_full((n + 1, h + 2, w + 3, c + 5), math.nan)
    channels_last_slice = parent[1:, 1 : 1 + h, 2 : 2 + w, 3 : 3 + c].permute(0, 3, 1, 2)
    parent = x.new_full((n, c + 2, h + 1, w + 3), math.nan)
    contiguous_slice = parent[:, 1 : 1 + c, 1:, 3:]
    every_other = x.new_full((n, 2 * c, h, 2 * w), math.nan)[:, ::2, :, ::2]
    offset = x.new_full((x.numel() + 7,), math.nan)[7:].view(x.shape)
    transposed = torch.empty_like(x).transpose(2, 3).contiguous().transpose(2, 3)
    layouts = {
        "contiguous": torch.empty_like(x, memory_format=torch.contiguous_format),
        "channels_last": torch.empty_like(x, memory_format=torch.channels_last),
        "channels_last_slice": channels_last_slice,
        "contiguous_slice": contiguous_slice,
        "every_other": every_other,
        "storage_offset": offset,
        "transposed": transposed,
    }
    with torch.no_grad():
        return {name: layout.copy_(x) for name, layout in layouts.items()}


def _assert_same_shape(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: the shape is {tuple(actual.shape)} instead of {tuple(expected.shape)}")


def assert_exact(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """``actual`` is the float64 ``expected`` rounded once to its dtype, every element of it. For integer inputs."""
    _assert_same_shape(actual, expected, what)
    rounded = expected.to(actual.dtype)
    if not torch.equal(actual, rounded):
        wrong = actual.ne(rounded) | actual.isnan()
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {actual.numel()} elements are wrong, the first at {place}: "
            f"{actual[place].item()} instead of {rounded[place].item()}"
        )


def assert_componentwise(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int, what: str = "result") -> None:
    """Every element within the bound of a sum of ``terms`` products in fp32, rounded once to the output's dtype.

    fp32: ``|y − r| ≤ (n + 2)·2⁻²⁴·S``; half: ``|y − r| ≤ u·(|r| + (n + 2)·2⁻²⁴·S) + (n + 2)·2⁻²⁴·S``; plus half of the
    smallest number that the dtype has, which is what rounding costs below its normal numbers.
    """
    _assert_same_shape(actual, expected, what)
    error = (actual.double() - expected).abs()
    bound = (terms + 2) * UNIT_ROUNDOFF[torch.float32] * magnitude
    if actual.dtype in (torch.bfloat16, torch.float16):
        bound = bound + UNIT_ROUNDOFF[actual.dtype] * (expected.abs() + bound)
    bound = bound + torch.finfo(actual.dtype).smallest_normal * UNIT_ROUNDOFF[actual.dtype]
    if not bool((error <= bound).all()):  # a NaN fails, too
        worst = (error / bound.clamp_min(1e-300)).nan_to_num(math.inf).max().item()
        raise AssertionError(f"{what}: an element is {worst:.3g} times its rounding bound away from the exact value")


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Root mean square and maximum of ``|actual − expected|``, in float64; 0 of nothing."""
    if actual.numel() == 0:
        return 0.0, 0.0
    error = (actual.double() - expected).abs()
    return error.square().mean().sqrt().item(), error.max().item()


def assert_no_worse(
    actual: Tensor, peer: Tensor, expected: Tensor, rms: float, maximum: float, what: str = "result"
) -> None:
    """Errors of ``actual`` against float64 ``expected`` at most ``rms`` and ``maximum`` times those of ``peer``.

    Both are given the rounding noise of the expected values themselves, so that a ratio of two errors near zero does
    not fail.
    """
    if actual.dtype != peer.dtype or actual.shape != peer.shape:
        raise AssertionError(f"{what}: {actual.dtype} {actual.shape} instead of {peer.dtype} {peer.shape}")
    noise = UNIT_ROUNDOFF[torch.float32] * expected.abs().max().item() if expected.numel() else 0.0
    for name, bound, ours, theirs in zip(
        ("rms", "maximum"), (rms, maximum), errors(actual, expected), errors(peer, expected), strict=True
    ):
        if not ours <= bound * (theirs + noise):
            raise AssertionError(f"{what}: {name} error {ours:.3g} is more than {bound} times PyTorch's {theirs:.3g}")


def assert_unbiased(actual: Tensor, expected: Tensor, sigmas: float = 5.0, what: str = "result") -> None:
    """``mean((y − r)·sign r)`` within ``sigmas`` standard errors of 0: truncation instead of rounding is not."""
    _assert_same_shape(actual, expected, what)
    signed = (actual.double() - expected) * expected.sign()
    standard_error = signed.square().mean().sqrt().item() / math.sqrt(signed.numel())
    if not abs(signed.mean().item()) <= sigmas * standard_error:
        raise AssertionError(
            f"{what}: rounding is biased by {signed.mean().item() / standard_error:.1f} standard errors"
        )
