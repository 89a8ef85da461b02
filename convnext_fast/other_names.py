"""Checkpoints of the networks that are no ConvNeXts: telling them, and their names in this package.

ConvMixer's are timm's, and the original repository's (locuslab/convmixer), where the same modules have numbers; DWNet's
and RepLKNet's are those of their authors' repositories. This module looks at names only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .dialects import clean_name


@dataclass(frozen=True)
class Vocabulary:
    """``rename``: from the names of a whole network to those of this package. ``marks`` are two names to tell it by."""

    dialect: str
    network: str
    marks: tuple[str, str]
    rename: Callable[[list[str]], list[str]] = lambda names: names


@dataclass(frozen=True)
class NamedNetwork:
    """A state_dict that was understood: ``keys`` maps this package's names to those in it, ``outside`` lies beside."""

    vocabulary: Vocabulary
    keys: dict[str, str]
    outside: tuple[str, ...]


def _numbers_to_names(names: list[str]) -> list[str]:
    """Of ConvMixer's original: 0 and 2 are the stem, then come the blocks, pooling and flattening, and the head."""
    last = max(int(name.split(".")[0]) for name in names if re.match(r"\d+\.", name))
    renamed = []
    for name in names:
        number, _, rest = name.partition(".")
        if not number.isdecimal():
            renamed.append(name)
        elif int(number) < 3:
            renamed.append(f"stem.{name}")
        else:
            renamed.append(f"head.{rest}" if int(number) == last else f"blocks.{int(number) - 3}.{rest}")
    return renamed


VOCABULARIES = (
    Vocabulary("timm's ConvMixer", "ConvMixer", ("stem.0.weight", "blocks.0.0.fn.0.weight")),
    Vocabulary("original ConvMixer", "ConvMixer", ("0.weight", "3.0.fn.0.weight"), _numbers_to_names),
    Vocabulary("DWNet", "DWNet", ("patch_embed.proj.weight", "layers.0.blocks.0.attn2conv.conv.weight")),
    Vocabulary("RepLKNet", "RepLKNet", ("stem.0.conv.weight", "stages.0.blocks.0.prelkb_bn.weight")),
)


def read_names(state_dict: Mapping[str, Tensor]) -> NamedNetwork | None:
    """Which of these networks a flat state_dict is of, with whatever prefix; None where it is of none."""
    originals = {clean_name(key): key for key in state_dict}
    for vocabulary in VOCABULARIES:
        first, second = vocabulary.marks
        for name in originals:
            prefix = name.removesuffix(first)
            if not name.endswith(first) or (prefix and not prefix.endswith(".")) or prefix + second not in originals:
                continue
            inside = [name for name in originals if name.startswith(prefix)]
            renamed = vocabulary.rename([name.removeprefix(prefix) for name in inside])
            keys = {ours: originals[name] for ours, name in zip(renamed, inside, strict=True)}
            outside = tuple(key for name, key in originals.items() if not name.startswith(prefix))
            return NamedNetwork(vocabulary, keys, outside)
    return None
