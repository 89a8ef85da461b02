"""Which layers of other networks :func:`convnext_fast.accelerate` puts on the kernels, and which not, and why.

``python -m benchmarks.accelerated`` prints the table; ``--write`` puts it into convnext_fast/README.md. Nothing is run:
the networks are built without values, with the timm that is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NETWORKS = {  # as papers call them: timm's names
    "ConvMixer": ("convmixer_768_32",),
    "ConvFormer": ("convformer_s18",),
    "CAFormer": ("caformer_s18",),
    "InceptionNeXt": ("inception_next_tiny",),
    "FastViT": ("fastvit_t8",),
    "MambaOut": ("mambaout_tiny",),
    "StarNet": ("starnet_s1",),
    "RDNet": ("rdnet_tiny",),
    "MixNet": ("mixnet_s",),
    "EdgeNeXt": ("edgenext_small",),
    "FocalNet": ("focalnet_tiny_srf",),
    "CoAtNeXt": ("coatnext_nano_rw_224",),
    "CSATv2": ("csatv2",),
    "EfficientNet": ("efficientnet_b0",),
    "MobileNetV4": ("mobilenetv4_conv_small",),
    "EfficientViT": ("efficientvit_b1",),
    "ConvNeXt with RMS norms": ("convnext_zepto_rms", "convnext_atto_rms"),
}
START, END = "<!-- networks: start -->", "<!-- networks: end -->"
README = Path(__file__).parents[1] / "convnext_fast" / "README.md"


def cells(model_name: str) -> tuple[str, str]:
    """What of one of timm's networks is swapped, and what is skipped."""
    import timm
    import torch

    import convnext_fast

    with torch.device("meta"):
        report = convnext_fast.accelerate(timm.create_model(model_name))
    return _summary(report.swapped), _summary(report.skipped)


def _summary(entries: list[tuple[str, str]]) -> str:
    counts: dict[str, int] = {}
    for _, text in entries:
        # Of "it makes 96 channels of 48", the numbers differ from stage to stage.
        text = "convolution: it makes more channels than it has" if "it makes" in text else text
        text = text.removesuffix("; as many are allowed")
        counts[text] = counts.get(text, 0) + 1
    return "; ".join(f"{count} × {text}".replace("; ", ", ") for text, count in counts.items()) or "–"


def table() -> str:
    import timm

    lines = [f"timm {timm.__version__}:", "", "| network | on the kernels | not, and why |", "|---|---|---|"]
    for name, models in NETWORKS.items():
        for model in models:
            swapped, skipped = cells(model)
            lines.append(f"| {name}, `{model}` | {swapped} | {skipped} |")
    return "\n".join(lines)


def written(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the two marks."""
    before, after = readme.split(START)[0], readme.split(END)[1]
    return f"{before}{START}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into convnext_fast/README.md")
    text = table()
    if parser.parse_args().write:
        README.write_text(written(README.read_text(), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
