"""Small networks of every version, and how two of them are compared."""

import pytest
import torch

from convnext_fast import ConvMixer, ConvNeXt, ConvNeXtIsotropic, DWNet, RepLKNet

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 5}
VERSIONS = {
    "v1": lambda **kw: ConvNeXt(**{**SMALL, "layer_scale_init_value": 1.0, **kw}),
    "v2": lambda **kw: ConvNeXt(**{**SMALL, "layer_scale_init_value": 0.0, "use_grn": True, **kw}),
    "isotropic": lambda **kw: ConvNeXtIsotropic(**{"depth": 3, "dim": 16, "num_classes": 5, "patch_size": 8, **kw}),
}
# Of the networks that are no ConvNeXts; each reduces images by 4.
OTHERS = {
    "convmixer": lambda **kw: ConvMixer(
        **{"dim": 12, "depth": 2, "kernel_size": 5, "patch_size": 4, "num_classes": 5, **kw}
    ),
    "dwnet": lambda **kw: DWNet(
        **{"embed_dim": 8, "depths": (1, 2), "patch_size": 2, "num_classes": 5, "drop_path_rate": 0.0, **kw}
    ),
    "replknet": lambda **kw: RepLKNet(
        **{"large_kernel_sizes": (9,), "layers": (2,), "channels": (8,), "small_kernel": 5, "num_classes": 5,
           "drop_path_rate": 0.0, **kw}
    ),
}  # fmt: skip
each_other = pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
each_version = pytest.mark.parametrize("build", VERSIONS.values(), ids=VERSIONS)


def randomised(model):
    """No parameter at an initial value that would hide it (γ = 1, β = 0, GRN's zeros)."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    return model


def with_statistics(model):
    """A randomised model whose batch norms have seen other images than those of a test."""
    g = torch.Generator().manual_seed(4)
    for name, buffer in randomised(model).named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=g) * 0.3)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)
    return model


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def assert_all_close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())
