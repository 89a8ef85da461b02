"""What ``half_residual`` costs: the error of ConvNeXt's logits and gradients under autocast, with it and without.

``python -m benchmarks.residual``: ConvNeXt-T at 224×224, bf16 autocast on this machine's CPU or GPU, random parameters
with layer scales as large as those of trained networks (0.1 to 0.6), against the same network in fp32. Half a minute.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import convnext_fast


def network(half_residual: bool) -> torch.nn.Module:
    """ConvNeXt-T, with no parameter at a value that hides a term; the same ones every time."""
    torch.manual_seed(0)
    model = convnext_fast.convnext_tiny(half_residual=half_residual)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.1, 0.6)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def results(images: Tensor, dtype: torch.dtype | None, half_residual: bool) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the images for random gradients of these."""
    model = network(half_residual).to(images.device)
    images = images.detach().clone().requires_grad_()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    random = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    return logits.detach(), torch.autograd.grad(logits, images, random)[0]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """rms of the error, as a fraction of the rms of what is exact."""
    return ((actual.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args(argv)
    shape = arguments.images, 3, 224, 224
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(arguments.device)
    exact = results(images, None, False)
    print("relative error, rms, bf16 autocast | logits | gradient of the images")
    for half_residual in (False, True):
        errors = map(relative_error, results(images, torch.bfloat16, half_residual), exact)
        print(f"half_residual={half_residual!s:5} | " + " | ".join(f"{error:.2%}" for error in errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
