"""Checkpoints of the networks that are no ConvNeXts: telling them, and their names in this package.

ConvMixer's are timm's, and the original repository's (locuslab/convmixer), where the same modules have numbers; DWNet's
and RepLKNet's are those of their authors' repositories. This module looks at names only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .dialects import CheckpointError, clean_name, find_prefixes


@dataclass(frozen=True)
class Vocabulary:
    """``rename``: from the names of a whole network to those of this package. ``marks`` are two names to tell it by."""

    dialect: str
    network: str
    marks: tuple[str, str]
    rename: Callable[[list[str]], list[str]] = lambda names: names


@dataclass(frozen=True)
class NamedNetwork:
    """A state_dict that was understood: ``keys`` maps this package's names to those in it.

    ``outside`` maps the names of what lies beside the network, free of what wrappers put into them, to those in it.
    """

    vocabulary: Vocabulary
    prefix: str
    keys: dict[str, str]
    outside: dict[str, str]


def _numbers_to_names(names: list[str]) -> list[str]:
    """Of ConvMixer's original: 0 and 2 are the stem, then come the blocks, pooling and flattening, and the head."""
    numbered = [name.partition(".")[::2] for name in names if re.match(r"\d+\.", name)]
    last = max(int(number) for number, _ in numbered)
    has_head = {rest for number, rest in numbered if int(number) == last} <= {"weight", "bias"}
    renamed = []
    for name in names:
        number, _, rest = name.partition(".")
        if not number.isdecimal():
            renamed.append(name)
        elif int(number) < 3:
            renamed.append(f"stem.{name}")
        else:
            renamed.append(f"head.{rest}" if has_head and int(number) == last else f"blocks.{int(number) - 3}.{rest}")
    return renamed


VOCABULARIES = (
    Vocabulary("timm's ConvMixer", "ConvMixer", ("stem.0.weight", "blocks.0.0.fn.0.weight")),
    Vocabulary("original ConvMixer", "ConvMixer", ("0.weight", "3.0.fn.0.weight"), _numbers_to_names),
    Vocabulary("DWNet", "DWNet", ("patch_embed.proj.weight", "layers.0.blocks.0.attn2conv.conv.weight")),
    Vocabulary("RepLKNet", "RepLKNet", ("stem.0.conv.weight", "stages.0.blocks.0.prelkb_bn.weight")),
)


def read_names(state_dict: Mapping[str, Tensor]) -> NamedNetwork | None:
    """Which of these networks a flat state_dict is of, with whatever prefix; None where it is of none.

    Raises:
        CheckpointError: there is more than one.
    """
    originals = {clean_name(key): key for key in state_dict}
    found = [
        (vocabulary, prefix) for vocabulary in VOCABULARIES for prefix in find_prefixes(originals, *vocabulary.marks)
    ]
    if not found:
        return None
    if len(found) > 1:
        kinds = " and ".join(dict.fromkeys(f"{vocabulary.network}s" for vocabulary, _ in found))
        prefixes = ", ".join(repr(prefix) for prefix in sorted(prefix for _, prefix in found))
        raise CheckpointError(f"there are {len(found)} {kinds}, under the prefixes {prefixes}; pass only one of them")
    vocabulary, prefix = found[0]
    inside = [name for name in originals if name.startswith(prefix)]
    renamed = vocabulary.rename([name.removeprefix(prefix) for name in inside])
    keys = {ours: originals[name] for ours, name in zip(renamed, inside, strict=True)}
    outside = {name: key for name, key in originals.items() if not name.startswith(prefix)}
    return NamedNetwork(vocabulary, prefix, keys, outside)


def outside_pairs(goal: NamedNetwork, source: NamedNetwork) -> dict[str, str]:
    """Of what lies beside two networks, the names of the same: in ``goal`` -> in ``source``.

    What only one of them is wrapped in (``module.``) is no part of the names.
    """
    ours, theirs = goal.prefix.split("."), source.prefix.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop(), theirs.pop()
    wraps = ["".join(f"{part}." for part in parts) for parts in (ours, theirs)]
    named = {name.removeprefix(wraps[1]): key for name, key in source.outside.items()}
    pairs = {key: named.get(name.removeprefix(wraps[0])) for name, key in goal.outside.items()}
    return {key: other for key, other in pairs.items() if other is not None}
