"""Every ConvNeXt of timm, torchvision, Hugging Face and mmpretrain computes the same before and after `accelerate`."""

import functools

import pytest
import torch

import convnext_fast

from .accelerated import assert_unchanged, outputs_and_gradients
from .networks import randomise

TIMM = {  # name: blocks of the full network
    "convnext_zepto_rms": 10, "convnext_zepto_rms_ols": 10, "convnext_atto": 12, "convnext_atto_ols": 12,
    "convnext_atto_rms": 12, "convnext_femto": 12, "convnext_femto_ols": 12, "convnext_pico": 12,
    "convnext_pico_ols": 12, "convnext_nano": 14, "convnext_nano_ols": 14, "convnext_tiny": 18, "convnext_tiny_hnf": 18,
    "convnext_small": 36, "convnext_base": 36, "convnext_large": 36, "convnext_large_mlp": 36, "convnext_xlarge": 36,
    "convnext_xxlarge": 40, "convnextv2_atto": 12, "convnextv2_femto": 12, "convnextv2_pico": 12, "convnextv2_nano": 14,
    "convnextv2_tiny": 18, "convnextv2_small": 36, "convnextv2_base": 36, "convnextv2_large": 36, "convnextv2_huge": 36,
    "test_convnext": 9, "test_convnext2": 4, "test_convnext3": 4,
}  # fmt: skip


def on_meta(build, **settings):
    with torch.device("meta"):
        return build(**settings)


def materialise(model, seed=0):
    return randomise(model.to_empty(device="cpu"), seed)


def test_these_are_all_of_timm():
    timm = pytest.importorskip("timm")
    assert sorted(TIMM) == sorted(timm.list_models(["convnext*", "test_convnext*"], exclude_filters="*_fast_*"))


OTHERWISE = {  # those whose blocks are not ConvNeXt's: why, and how many of their convolutions have kernels
    "convnext_zepto_rms": ("SimpleNorm2d", 10), "convnext_zepto_rms_ols": ("SimpleNorm2d", 10),
    "convnext_atto_rms": ("RmsNorm2d", 12), "test_convnext": ("GELUTanh", 9), "test_convnext2": ("GELUTanh", 4),
    "test_convnext3": ("SiLU", 3),
}  # fmt: skip


LIMITS = [100, pytest.param(300, marks=pytest.mark.full)]


def within(limit, build, **few):
    """``build()``, on meta; above ``limit`` million parameters, ``build(**few)``."""
    model = on_meta(build)
    return on_meta(build, **few) if sum(p.numel() for p in model.parameters()) > 1e6 * limit else model


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, limit):
    """The structure of the whole network without values; the numbers, where it is larger, of one with few blocks.

    Of the three above 300 M, whose few blocks are large as well, the numbers are left to the full lane.
    """
    timm = pytest.importorskip("timm")
    model = on_meta(timm.create_model, model_name=name)
    report = convnext_fast.accelerate(model)
    if name in OTHERWISE:
        reason, convolutions = OTHERWISE[name]
        assert len(report.swapped) == convolutions
        assert all("depthwise convolution" in what for _, what in report.swapped)
        blocks = [why for module, why in report.skipped if not module.endswith("conv_dw")]
        assert len(blocks) == TIMM[name]
        assert all(reason in why for why in blocks)
    else:
        assert len(report.swapped) == TIMM[name]
        assert not report.skipped
        assert all(" block of timm" in what for _, what in report.swapped)
    if limit == 100 and sum(p.numel() for p in model.parameters()) > 300e6:
        return
    model = within(limit, functools.partial(timm.create_model, name), depths=(1, 1, 2, 1))
    swapped = len(convnext_fast.accelerate(model).swapped)
    convnext_fast.restore(model)
    assert_unchanged(materialise(model), torch.randn(1, 3, 64, 64), swapped)


@pytest.mark.parametrize("settings, swapped, reasons", [
    ({"output_stride": 8}, 4, {"dilation=(2, 2)", "dilation (4, 4)"}),
    ({"conv_bias": False}, 5, set()),
    ({"kernel_sizes": (9, 7, 5, 3)}, 5, set()),
    ({"kernel_sizes": (7, 11, 13, 7)}, 5, set()),
    ({"norm_eps": 1e-3}, 5, set()),
    ({"use_grn": True, "ls_init_value": None}, 5, set()),
    ({"use_grn": True, "conv_mlp": False}, 5, set()),
    ({"stem_type": "overlap_act", "head_norm_first": True, "features_only": True}, 5, set()),
    ({"act_layer": "relu"}, 5, {"ReLU"}),  # five convolutions
    ({"conv_mlp": True, "norm_layer": "batchnorm2d"}, 5, {"BatchNorm2d"}),
], ids=str)  # fmt: skip
def test_timm_arguments(settings, swapped, reasons):
    timm = pytest.importorskip("timm")
    small = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}
    model = randomise(timm.create_model("convnext_atto", **{**small, **settings}))
    report = assert_unchanged(model, torch.randn(2, 3, 61, 75), swapped)
    assert all(any(reason in why for _, why in report.skipped) for reason in reasons)
    assert all(any(reason in why for reason in reasons) for _, why in report.skipped)


FULL_SIZE = pytest.param("large", 36, marks=pytest.mark.full)


@pytest.mark.parametrize("size, blocks", [("tiny", 18), ("small", 36), ("base", 36), FULL_SIZE])
def test_torchvision(size, blocks):
    models = pytest.importorskip("torchvision.models")
    model = materialise(on_meta(getattr(models, f"convnext_{size}")))
    report = assert_unchanged(model, torch.randn(1, 3, 64, 64), blocks)
    assert not report.skipped
    assert report.swapped[0] == ("features.1.0", "ConvNeXt V1 block of torchvision")


@pytest.mark.parametrize("kind", ["ForImageClassification", "Model", "Backbone"])
@pytest.mark.parametrize("family", ["ConvNext", "ConvNextV2", "DINOv3ConvNext"])
def test_huggingface(family, kind):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    if (family, kind) == ("DINOv3ConvNext", "ForImageClassification"):
        pytest.skip("there is none")
    config = getattr(transformers, f"{family}Config")(hidden_sizes=[96, 192, 384, 768])  # tiny
    model = randomise(getattr(transformers, f"{family}{kind}")(config))
    report = assert_unchanged(model, torch.randn(1, 3, 64, 64), 18)
    assert not report.skipped


@pytest.mark.parametrize("settings", [
    {}, {"use_grn": True, "layer_scale_init_value": 0.0}, {"linear_pw_conv": False},
    {"linear_pw_conv": False, "use_grn": True}, {"with_cp": True},
    {"out_indices": [0, 1, 2, 3], "gap_before_final_norm": False},
], ids=str)  # fmt: skip
def test_mmpretrain(settings):
    backbones = pytest.importorskip("mmpretrain.models.backbones")
    model = randomise(backbones.ConvNeXt(arch="atto", **settings))
    report = assert_unchanged(model, torch.randn(1, 3, 64, 64), 12)
    assert not report.skipped


@pytest.mark.parametrize("library", ["timm", "torchvision", "huggingface", "huggingface-v2", "dinov3", "mmpretrain"])
def test_the_same_paths_are_dropped_in_training(library):
    if library == "timm":
        model = pytest.importorskip("timm").create_model("convnext_atto", drop_path_rate=0.6)
    elif library == "torchvision":
        model = pytest.importorskip("torchvision.models").convnext_tiny(stochastic_depth_prob=0.6)
    elif library == "mmpretrain":
        model = pytest.importorskip("mmpretrain.models.backbones").ConvNeXt(arch="atto", drop_path_rate=0.6)
    else:
        name = {"huggingface": "ConvNext", "huggingface-v2": "ConvNextV2", "dinov3": "DINOv3ConvNext"}[library]
        transformers = pytest.importorskip("transformers", minversion="4.56")
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(drop_path_rate=0.6))
    randomise(model)
    x = torch.randn(4, 3, 32, 32)
    still = outputs_and_gradients(model, x)
    model.train()
    moving = outputs_and_gradients(model, x)
    assert not torch.allclose(still[0], moving[0], rtol=1e-2), "nothing was dropped"
    assert_unchanged(model, x, len(convnext_fast.accelerate(model).swapped))
