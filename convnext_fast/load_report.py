"""What became of a checkpoint, and what to build where it does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .checkpoint_files import some

_ROWS = 20  # of the table in a report

# Depthwise convolutions of blocks in every dialect, and RepLKNet's small ones. Their shapes alone do not tell them from
# stems for grey images.
_DEPTHWISE = re.compile(
    r"(dwconv|conv_dw|depthwise_conv|\.block\.0|\.fn\.0|attn2conv\.conv|lkb_origin\.conv|lkb_reparam)\.weight$"
)
_SMALL = re.compile(r"small_conv\.conv\.weight$")


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint; ``str(report)`` is a table.

    Attributes:
        dialect: the checkpoint's.
        missing: (name, shape) of what the model has and the checkpoint does not.
        unexpected: (name, shape) of what the checkpoint has and the model does not.
        mismatched: (the model's name, the model's shape, the checkpoint's shape) where shapes differ.
        dropped: the checkpoint's names that were rightly left out: a head, norms or last stages where the model ends
            before them, and what lies beside the network (a detector's neck, CLIP's text tower).
    """

    dialect: str
    missing: tuple[tuple[str, tuple[int, ...]], ...] = ()
    unexpected: tuple[tuple[str, tuple[int, ...]], ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.dialect} checkpoint: {'everything fits' if self.fits else 'not everything fits'}"]
        rows = [("missing", name, str(shape), "–") for name, shape in self.missing]
        rows += [("unexpected", name, "–", str(shape)) for name, shape in self.unexpected]
        rows += [("shape", name, str(ours), str(theirs)) for name, ours, theirs in self.mismatched]
        if rows:
            table = [("", "name", "model", "checkpoint"), *rows[:_ROWS]]
            widths = [max(len(row[column]) for row in table) for column in range(4)]
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        if len(rows) > _ROWS:
            lines.append(f"  … and {len(rows) - _ROWS} more")
        if self.dropped:
            lines.append(f"  left out, since the model has no place for it: {some(self.dropped)}")
        return "\n".join(lines)


def hint(report: LoadReport, checkpoint: Mapping[str, Tensor]) -> str:
    """What to build instead, one line each; ``report`` is of ``checkpoint``."""
    hints = []
    heads = [theirs for name, _, theirs in report.mismatched if is_head(name)]
    if heads:
        hints.append(
            f"The heads have different numbers of classes: build the model with num_classes={heads[0][0]} or call "
            f"reset_classifier({heads[0][0]}); strict=False keeps the model's own head."
        )
    gamma = re.compile(r"\.(gamma|layer_scale|layer_scale_parameter)$")
    for rows, value in ((report.unexpected, "1e-6"), (report.missing, "0")):
        if any(gamma.search(name) and ".grn." not in name for name, *_ in rows):
            hints.append(f"Layer scale is only on one side: build the model with layer_scale_init_value={value}.")
    kernels = {name: t.shape for name, t in checkpoint.items() if t.ndim == 4 and name not in report.dropped}
    large = {"DWNet": "window_size", "RepLKNet": "large_kernel_sizes"}.get(report.dialect, "kernel_size")
    for pattern, what, argument in ((_DEPTHWISE, "depthwise", large), (_SMALL, "small", "small_kernel")):
        if any(pattern.search(name) and ours[:2] == theirs[:2] for name, ours, theirs in report.mismatched):
            # All of them: where only some differ from the model's, no single size is right.
            widths = sorted({shape[2] for name, shape in kernels.items() if pattern.search(name)})
            text = f"The checkpoint's {what} kernels are " + ", ".join(f"{width}×{width}" for width in widths)
            value = f"={widths[0]}" if len(widths) == 1 and argument != "large_kernel_sizes" else ""
            hints.append(f"{text}, the model's are others: see its argument {argument}{value}.")
    merged = re.compile(r"\.lkb_reparam\.")
    for rows, value in ((report.unexpected, True), (report.missing, False)):
        if any(merged.search(name) for name, *_ in rows):
            hints.append(f"Small kernels are merged on one side: build the model with small_kernel_merged={value}.")
    return "".join(f"\n{hint}" for hint in hints)


def is_head(name: str) -> bool:
    return re.search(r"(^|\.)(head|head\.fc|classifier|classifier\.2)\.(weight|bias)$", name) is not None
