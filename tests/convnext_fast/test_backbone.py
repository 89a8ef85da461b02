"""Backbones in the libraries that they are for: the same results as the network they stand for, and a training step."""

import copy
import importlib
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import convnext_fast
import dwconv_kernels as dk
from convnext_fast.backbone import ARCHITECTURES, ConvNeXtBackbone

from .accelerated import assert_all_close, outputs_and_gradients
from .networks import DIMS, VARIANTS, Original, huggingface, images, mmpretrain_state, ours, randomise, timm

SMALL = {"arch": {"depths": (1, 2, 2, 1), "channels": DIMS}}


def small(**settings):
    return randomise(
        ConvNeXtBackbone(**{**SMALL, "out_indices": (0, 1, 2, 3), "gap_before_final_norm": False, **settings})
    )


def one_step(model, loss, parameters):
    """A step of SGD: the loss is finite, every parameter has a gradient that is not zero, and the loss falls."""
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    first = loss()
    optimizer.zero_grad()
    first.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing, missing
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    second = loss()
    assert torch.isfinite(first)
    assert second < first


# mmpretrain's backbone.


@pytest.mark.parametrize("settings", [
    {}, {"out_indices": (1, 3), "gap_before_final_norm": False}, {"out_indices": -1},
    {"linear_pw_conv": False}, {"use_grn": True, "layer_scale_init_value": 0.0},
    {"use_grn": True, "linear_pw_conv": False, "norm_cfg": {"type": "LN2d", "eps": 1e-2}},
    {"norm_cfg": {"type": "LN2d"}}, {"norm_cfg": {"type": "LN2d", "eps": 1e-6, "requires_grad": False}},
    {"with_cp": True}, {"stem_patch_size": 2, "in_channels": 5}, {"frozen_stages": 2},
], ids=str)  # fmt: skip
def test_same_as_mmpretrain(settings):
    """State dict, results and gradients, on the modules and on the operators."""
    backbones = pytest.importorskip("mmpretrain.models.backbones")
    theirs = randomise(backbones.ConvNeXt(**{**SMALL, **copy.deepcopy(settings)}))
    mine = ConvNeXtBackbone(**{**SMALL, **settings})
    mine.load_state_dict(theirs.state_dict(), strict=True)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.eval()
    x = images(2, 61, 75, settings.get("in_channels", 3))
    expected = outputs_and_gradients(theirs, x)
    for backend in ("auto", "torch"):
        with dk.backend(backend):
            assert isinstance(mine(x), tuple)
            assert_all_close(outputs_and_gradients(mine, x), expected)
    names = [name for name, _ in theirs.named_parameters()]
    assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in theirs.parameters()]
    for name in names:
        assert mine.get_layer_depth(f"backbone.{name}", "backbone.") == theirs.get_layer_depth(
            f"backbone.{name}", "backbone."
        )
    assert mine.get_layer_depth("head.fc.weight", "backbone.") == theirs.get_layer_depth("head.fc.weight", "backbone.")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_mmpretrain(name):
    backbones = pytest.importorskip("mmpretrain.models.backbones")
    expected = backbones.ConvNeXt.arch_settings
    assert sorted(expected) == sorted(ARCHITECTURES)
    assert ARCHITECTURES[name] == (tuple(expected[name]["depths"]), tuple(expected[name]["channels"]))


def test_checkpoint_of_mmpretrain():
    state = {k.removeprefix("backbone."): v for k, v in mmpretrain_state().items() if k.startswith("backbone.")}
    model = ConvNeXtBackbone({"depths": (1, 1, 1, 1), "channels": DIMS})
    model.load_state_dict(state, strict=True)
    convnext_fast.load_checkpoint(model, mmpretrain_state())
    detector = ConvNeXtBackbone({"depths": (1, 1, 1, 1), "channels": DIMS}, out_indices=(0, 1, 2, 3))
    report = convnext_fast.load_checkpoint(detector, mmpretrain_state(), strict=False)
    assert torch.equal(detector.norm3.weight, state["norm3.weight"])
    assert [name for name, _ in report.missing] == [f"norm{i}.{p}" for i in range(3) for p in ("weight", "bias")]


def test_frozen_stages_stay_frozen():
    model = small(frozen_stages=2, drop_path_rate=0.5)
    assert model.train() is model
    for i in range(4):
        for module in (model.downsample_layers[i], model.stages[i]):
            assert module.training == (i >= 2)
            assert all(p.requires_grad == (i >= 2) for p in module.parameters())
    assert model.norm0.training
    assert all(p.requires_grad for p in small(frozen_stages=-1).parameters())
    with pytest.raises(ValueError, match="model has frozen_stages=2, which are lost here"):
        convnext_fast.pyramid_stages(model)


@pytest.mark.parametrize("settings, message", [
    ({"arch": "giant"}, "arch is 'giant'; atto, femto"),
    ({"arch": {"depths": (1, 1, 1, 1)}}, 'a dict with "depths" and "channels"'),
    ({"arch": {"depths": (1, 1), "channels": (8, 8)}}, "four positive depths"),
    ({"out_indices": 4}, "out_indices is .*4.*; different stages out of 0, 1, 2, 3"),
    ({"out_indices": (1, -3)}, r"out_indices is \(1, -3\)"),
    ({"out_indices": ()}, "out_indices is"),
    ({"out_indices": "3"}, "out_indices is '3'"),
    ({"drop_path_rate": "a"}, "drop_path_rate is"),
    ({"layer_scale_init_value": None}, "layer_scale_init_value is None"),
    ({"out_indices": None}, "out_indices is None"),
    ({"out_indices": 2.0}, "out_indices is 2.0"),
    ({"arch": {"depths": (1.0, 1, 1, 1), "channels": DIMS}}, "four positive depths"),
    ({"frozen_stages": 5}, "frozen_stages is 5; an integer up to 4"),
    ({"frozen_stages": 1.0}, "frozen_stages is 1.0"),
    ({"in_channels": 0}, "in_channels is 0; an integer of at least 1"),
    ({"stem_patch_size": 0}, "stem_patch_size is 0"),
    ({"norm_cfg": "LN2d"}, "norm_cfg is 'LN2d'"),
    ({"norm_cfg": {"type": "LN2d", "eps": "a"}}, "the eps of norm_cfg is 'a'"),
    ({"norm_cfg": {"type": "BN"}}, "norm_cfg is .*BN.*LN2d"),
    ({"norm_cfg": {"type": "LN2d", "foo": 3}}, "norm_cfg is .*foo.*LN2d"),
    ({"act_cfg": {"type": "ReLU"}}, "act_cfg is .*ReLU.*GELU"),
    ({"drop_path_rate": 1.5}, r"drop_path_rate is 1\.5"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtBackbone(**settings)


def test_checkpointing_keeps_draws_and_gradients():
    plain, saving = small(drop_path_rate=0.5), small(drop_path_rate=0.5)
    saving.set_grad_checkpointing()
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            expected = outputs_and_gradients(plain.train(), images(4, 32, 32))
            assert_all_close(outputs_and_gradients(saving.train(), images(4, 32, 32)), expected)


def test_copies_and_tracing():
    model, x = small(), images(2, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert_all_close(list(other(x)), list(model(x)))


# mmengine, mmdetection, mmsegmentation.


@pytest.fixture
def registered():
    pytest.importorskip("mmengine")
    from mmengine.registry import MODELS

    import convnext_fast.mmengine_registry  # noqa: F401

    return MODELS


def test_built_from_a_config(registered, tmp_path):
    config = {"type": "ConvNeXtFast", **SMALL, "out_indices": [0, 1, 2, 3], "gap_before_final_norm": False}
    model = registered.build(copy.deepcopy(config))
    assert isinstance(model, ConvNeXtBackbone)
    assert model.out_indices == (0, 1, 2, 3)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    randomise(model)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "det.pth")
    checkpoint = {"type": "Pretrained", "checkpoint": str(tmp_path / "det.pth"), "prefix": "backbone."}
    other = registered.build({**copy.deepcopy(config), "init_cfg": checkpoint})
    other.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_retinanet_of_mmdetection_trains_a_step(registered):
    """Backbone, FPN, head, losses and data structures are mmdetection's; mmcv's compiled operators are stand-ins."""
    pytest.importorskip("mmdet.models")
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.structures import InstanceData

    register_all_modules(init_default_scope=True)
    config = {
        "type": "RetinaNet",
        "data_preprocessor": {"type": "DetDataPreprocessor", "pad_size_divisor": 32},
        "backbone": {
            "type": "ConvNeXtFast", **SMALL, "out_indices": [0, 1, 2, 3], "gap_before_final_norm": False,
            "layer_scale_init_value": 1.0, "drop_path_rate": 0.0,
        },
        "neck": {
            "type": "FPN", "in_channels": list(DIMS), "out_channels": 16, "start_level": 1, "num_outs": 5,
            "add_extra_convs": "on_input",
        },
        "bbox_head": {
            "type": "RetinaHead", "num_classes": 3, "in_channels": 16, "stacked_convs": 1, "feat_channels": 16,
            "anchor_generator": {
                "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0],
                "strides": [8, 16, 32, 64, 128],
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True},
            "loss_bbox": {"type": "L1Loss"},
        },
        "train_cfg": {
            "assigner": {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0},
            "sampler": {"type": "PseudoSampler"}, "allowed_border": -1, "pos_weight": -1,
        },
        "test_cfg": {"nms_pre": 9, "score_thr": 0.1, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 9},
    }  # fmt: skip
    torch.manual_seed(0)
    detector = MODELS.build(config)
    detector.init_weights()
    assert isinstance(detector.backbone, ConvNeXtBackbone)
    sample = DetDataSample(metainfo={"img_shape": (128, 128), "pad_shape": (128, 128), "batch_input_shape": (128, 128)})
    boxes = torch.tensor([[10.0, 12.0, 70.0, 80.0], [40.0, 30.0, 120.0, 126.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
    x = torch.randn(1, 3, 128, 128)

    def loss():
        losses = detector.loss(x, [sample])
        return sum(sum(part) if isinstance(part, list) else part for part in losses.values())

    # The norm of the first map is not used: the pyramid starts at the second.
    detector.backbone.norm0.requires_grad_(False)
    gradients = []
    for backend in ("auto", "reference"):
        detector.zero_grad()
        with dk.backend(backend):
            loss().backward()
        gradients.append([p.grad for p in detector.backbone.parameters() if p.requires_grad])
    assert_all_close(gradients[1], gradients[0], 1e-4)
    with dk.backend("reference"):
        one_step(detector, loss, [p for p in detector.parameters() if p.requires_grad])


# torchvision.


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "dinov3-backbone"])
def test_pyramid_stages_of_every_library(name):
    """Maps of the four stages, as our own network makes them of the same weights."""
    model = randomise(VARIANTS[name][2]())
    peer = randomise(ours(v2=VARIANTS[name][1], features_only=True))
    convnext_fast.load_checkpoint(peer, model.state_dict())
    x = images(2, 64, 64)
    maps = []
    for stage in convnext_fast.pyramid_stages(model):
        maps.append(stage(maps[-1] if maps else x))
    assert_all_close(maps, peer(x))


def test_pyramid_stages_of_feature_extractors():
    timm_module = pytest.importorskip("timm")
    model = randomise(timm_module.create_model("convnext_atto", features_only=True, out_indices=(0, 1, 2)))
    maps, x = [], images(2, 64, 64)
    for stage in convnext_fast.pyramid_stages(model):
        maps.append(stage(maps[-1] if maps else x))
    assert_all_close(maps, model(x))
    assert len(convnext_fast.pyramid_stages(ours(features_only=True, out_indices=(0, 1)))) == 2


def test_pyramid_stages_refuse_to_lose_checkpointing():
    model = ours()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        convnext_fast.pyramid_stages(model)


@pytest.mark.parametrize(
    "name", [None, "resnetv2_50", "mambaout_femto", "inception_next_tiny", "swin_t", "efficientnet_v2_s"]
)
def test_pyramid_stages_refuse_other_networks(name):
    if name is None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3))
    else:
        with torch.device("meta"):
            models = pytest.importorskip("torchvision.models")
            model = getattr(models, name)() if hasattr(models, name) else pytest.importorskip("timm").create_model(name)
    with pytest.raises(ValueError, match=f"model is a {type(model).__name__}; a ConvNeXt of"):
        convnext_fast.pyramid_stages(model)


@pytest.mark.parametrize("build", [ours, timm, huggingface, Original], ids=["ours", "timm", "huggingface", "original"])
def test_retinanet_of_torchvision_trains_a_step(build):
    """With torchvision's transform, anchors, head and losses; only its inference needs compiled operators."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = randomise(build())
    convnext_fast.accelerate(model)
    backbone = convnext_fast.fpn_backbone(model, out_channels=16, out_indices=(1, 2, 3))
    sizes = tuple((16 * 2**i,) for i in range(4))  # the pyramid has one more map, pooled
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
    detector = detection.RetinaNet(backbone, 3, anchor_generator=anchors, min_size=96, max_size=128).train()
    targets = [{"boxes": torch.tensor([[10.0, 12.0, 70.0, 80.0]]), "labels": torch.tensor([2])}]

    def loss():
        torch.manual_seed(1)
        return sum(detector([torch.rand(3, 96, 128)], targets).values())

    with dk.backend("reference"):
        one_step(detector, loss, list(detector.parameters()))


def test_fpn_of_the_first_stages_has_no_idle_parameters():
    pytest.importorskip("torchvision")
    backbone = convnext_fast.fpn_backbone(ours(), 16, out_indices=(0, 1))
    maps = backbone(images(1, 64, 64))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, 16, 16), (1, 16, 8, 8), (1, 16, 4, 4)]
    assert backbone.out_channels == 16
    sum(m.sum() for m in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    with pytest.raises(ValueError, match="out_indices is"):
        convnext_fast.fpn_backbone(ours(), 16, out_indices=(4,))
    with pytest.raises(ValueError, match="this network was built with 2 stages"):
        convnext_fast.fpn_backbone(ours(features_only=True, out_indices=(0, 1)), 16)


# timm, and segmentation_models_pytorch by timm's names.


@pytest.fixture
def timm_names():
    timm_module = pytest.importorskip("timm")
    import convnext_fast.timm_registry  # noqa: F401

    return timm_module


def test_timm_builds_accelerated_networks(timm_names):
    names = timm_names.list_models(["convnext*fast*"])
    originals = [name.replace("_fast", "") for name in names]
    assert len(names) == 28
    assert originals == [n for n in timm_names.list_models(["convnext_*", "convnextv2_*"]) if "_fast_" not in n]
    x = torch.randn(2, 3, 64, 64)
    for settings in ({"num_classes": 5}, {"features_only": True, "out_indices": (1, 3)}, {"output_stride": 16}):
        mine = timm_names.create_model("convnext_fast_atto", **settings)
        peer = timm_names.create_model("convnext_atto", **settings)
        peer.load_state_dict(mine.state_dict(), strict=True)
        randomise(mine), randomise(peer)
        assert len(convnext_fast.restore(copy.deepcopy(mine))) >= 20
        expected = outputs_and_gradients(peer, x)
        for backend in ("auto", "torch"):
            with dk.backend(backend):
                assert_all_close(outputs_and_gradients(mine, x), expected)


def test_timm_tags_name_the_weights_of_the_original(timm_names):
    cfg = timm_names.create_model("convnext_fast_tiny.in12k_ft_in1k_384").pretrained_cfg
    assert (cfg["architecture"], cfg["tag"], cfg["input_size"]) == ("convnext_tiny", "in12k_ft_in1k_384", (3, 384, 384))
    assert timm_names.create_model("convnextv2_fast_atto").pretrained_cfg["architecture"] == "convnextv2_atto"
    for name in ("convnext_tiny", "convnext_tiny.in12k_ft_in1k_384", "convnextv2_atto"):
        fast, original = (timm_names.get_pretrained_cfg(n) for n in (name.replace("_", "_fast_", 1), name))
        assert original.hf_hub_id.startswith("timm/convnext")
        assert (fast.hf_hub_id, fast.tag, fast.url) == (original.hf_hub_id, original.tag, original.url)
    assert "convnext_fast_tiny.in12k_ft_in1k_384" in timm_names.list_pretrained("convnext_fast_tiny*")
    tags = [len(timm_names.list_pretrained(pattern)) for pattern in ("convnext*_fast_*", "convnext_*", "convnextv2_*")]
    assert tags[0] == sum(tags[1:]) / 2


def test_registering_with_timm_again_changes_nothing(timm_names, recwarn):
    before = timm_names.list_models("*_fast_*")
    importlib.reload(sys.modules["convnext_fast.timm_registry"])
    assert timm_names.list_models("*_fast_*") == before
    assert not recwarn.list


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch_trains_a_step(timm_names, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(smp, decoder)("tu-convnext_fast_atto", encoder_weights=None, classes=3)
    model.train()
    x, masks = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    assert len(convnext_fast.restore(copy.deepcopy(model))) == 24

    def loss():
        torch.manual_seed(1)
        return nn.functional.cross_entropy(model(x), masks)

    # The last stage's classifier is not part of the encoder, and Unet does not use all maps.
    with dk.backend("reference"):
        one_step(model, loss, list(model.parameters()))
