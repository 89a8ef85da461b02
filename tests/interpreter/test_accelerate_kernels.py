"""Accelerated networks of every library on the kernels: outputs and gradients are those of before."""

from collections import Counter

import pytest
import torch
from torch import nn

import convnext_fast
import dwconv_kernels as dk
from tests.convnext_fast.accelerated import assert_all_close, outputs_and_gradients
from tests.convnext_fast.networks import DEPTHS, VARIANTS, images, randomise
from tests.torchvision_shim import install

pytestmark = pytest.mark.usefixtures("guard")
BLOCKS = sum(DEPTHS)
install()


EVERY_CHANGE = ["original", "timm-linear", "timm-v2-conv", "huggingface"]
REST = ["original-v2", "timm-conv", "timm-v2-linear", "torchvision", "huggingface-v2", "dinov3"]


@pytest.mark.parametrize("name", [*EVERY_CHANGE, *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_small_networks_of_every_library(name, guard):
    model, x = randomise(VARIANTS[name][2]()), images(1, 32, 44)
    if name.endswith("conv"):
        model.to(memory_format=torch.channels_last)
    expected = outputs_and_gradients(model, x)
    assert len(convnext_fast.accelerate(model).swapped) == BLOCKS
    with dk.backend("triton"):
        assert_all_close(outputs_and_gradients(model, x), expected, 1e-5)
    ran = Counter(launch.kernel for launch in guard.launches)
    assert ran["_depthwise_bwd_weight_kernel"] == BLOCKS
    before = len(guard.launches)
    convnext_fast.restore(model)
    restored = outputs_and_gradients(model, x)
    assert all(a is b or torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
    assert len(guard.launches) == before


FULL = pytest.mark.full


@pytest.mark.parametrize("name", [
    "test_convnext2", "convnext_zepto_rms",
    *(pytest.param(name, marks=FULL) for name in (
        "test_convnext", "test_convnext3", "convnext_zepto_rms_ols", "convnext_atto", "convnext_atto_ols",
        "convnext_atto_rms", "convnextv2_atto", "convnext_femto", "convnext_femto_ols", "convnextv2_femto",
        "convnext_pico", "convnext_pico_ols", "convnextv2_pico", "convnext_nano", "convnext_nano_ols",
        "convnextv2_nano",
    )),
])  # fmt: skip
def test_networks_of_timm(name, guard):
    """Those below 20 M parameters."""
    model, x = randomise(pytest.importorskip("timm").create_model(name)), images(1, 32, 32)
    expected = outputs_and_gradients(model, x)
    swapped = len(convnext_fast.accelerate(model).swapped)
    with dk.backend("triton"):
        assert_all_close(outputs_and_gradients(model, x), expected, 1e-5)
    assert Counter(launch.kernel for launch in guard.launches)["_depthwise_bwd_weight_kernel"] == swapped


def test_the_same_paths_are_dropped(guard):
    model, x = randomise(VARIANTS["huggingface-v2"][2]()), images(3, 32, 32)
    for module in model.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = type(module).__init__.__globals__["ConvNextV2DropPath"](0.5)
    model.train()
    expected = outputs_and_gradients(model, x)
    assert len(convnext_fast.accelerate(model).swapped) == BLOCKS
    with dk.backend("triton"):
        assert_all_close(outputs_and_gradients(model, x), expected, 1e-5)
    assert guard.launches


def test_depthwise_convolutions_of_any_network(guard):
    """Those with kernels run on them; the others, and one whose padding somebody changed, are PyTorch's."""
    kernels = {"kernel_size": 5, "padding": 2}, {"kernel_size": (1, 11), "padding": "same"}, {"kernel_size": (7, 3)}
    others = {"kernel_size": 3, "padding": 1}, {"kernel_size": 7, "stride": 3, "padding": 3}
    model = nn.Sequential(
        *(nn.Conv2d(6, 6, groups=6, **settings) for settings in (*kernels, *others)), nn.Conv2d(6, 5, 1)
    )
    x = torch.randn(1, 6, 11, 12)
    expected = outputs_and_gradients(model, x)
    report = convnext_fast.accelerate(model)
    assert (len(report.swapped), len(report.skipped)) == (3, 2)
    with dk.backend("triton"):
        assert_all_close(outputs_and_gradients(model, x), expected)
        ran = Counter(launch.kernel for launch in guard.launches)
        assert ran["_depthwise_bwd_weight_kernel"] == 3
        model[0].padding_mode, model[0]._reversed_padding_repeated_twice = "circular", [2, 2, 2, 2]
        outputs_and_gradients(model, x)
        ran = Counter(launch.kernel for launch in guard.launches)
        assert ran["_depthwise_bwd_weight_kernel"] == 5
