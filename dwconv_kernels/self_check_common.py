"""What the checks of all families share: dtypes, random operands, the comparison of bits and of kinds of numbers.

A family's module has ``CASES``, ``CHECKS``, ``configuration(case, shape, device)``, which names the kernels and tiles
of a case, and ``reasons(case, shape, device)``, which says why they were taken. Its cases have the fields ``family``,
``shape``, ``small`` (what is run in the interpreter) and ``checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import NAMES

DTYPES = {name: dtype for dtype, name in NAMES.items()}
REPEATS = 100  # of a call whose bits have to stay the same; in the interpreter, 2
Results = dict[str, Tensor]
Launches = list[tuple[str, dict[str, object]]]  # kernels and their constants


class _Kernel(NamedTuple):
    name: str
    launches: Launches

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((self.name, constants))


class Recorder:
    """Takes the place of a module of kernels, and notes what is launched."""

    def __init__(self):
        self.launches: Launches = []

    def __getattr__(self, name: str) -> _Kernel:
        return _Kernel(name, self.launches)

    def note(self, kernel, programs: int, *arguments, **constants) -> None:
        """In place of a function that launches so many programs of a kernel."""
        self.launches.append((kernel.fn.__name__, constants))


def block_sizes(constants: dict[str, object]) -> list[object]:
    """A launch's block of rows, outputs and channels, as far as it has them."""
    return [constants[f"BLOCK_{name}"] for name in "PDC" if f"BLOCK_{name}" in constants]


def listed(launches: Callable[[], Launches], text: Callable[[str, dict[str, object]], str | None]) -> str:
    """What ``text`` says of each launch, once each; not of those of which it says None."""
    try:
        launched = launches()
    except Exception as error:  # what is wrong is what the checks say
        return f"none: {type(error).__name__}"
    texts = dict.fromkeys(text(kernel, constants) for kernel, constants in launched)
    return ", ".join(one for one in texts if one is not None)


def normal(seed: int) -> Callable[[Sequence[int]], Tensor]:
    """Makes tensors of normal values of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator)


def assert_same_bits(compute: Callable[[], Results], device: str | torch.device) -> None:
    """``compute`` has the same results every time."""
    first = compute()
    for repeat in range(2, (REPEATS if torch.device(device).type == "cuda" else 2) + 1):
        for name, again in compute().items():
            if not torch.equal(again, first[name]):
                place = tuple(again.ne(first[name]).nonzero()[0].tolist())
                values = f"{again[place].item()} instead of {first[name][place].item()}"
                raise AssertionError(f"{name}: run {repeat} differs from the first, at {place}: {values}")


def kind(t: Tensor) -> Tensor:
    """0 for finite values, ±1 for ±Inf, 2 for NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0).float())
