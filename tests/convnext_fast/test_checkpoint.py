"""Loading checkpoints into networks of every library, and the report of what does not fit."""

import pytest
import torch
from torch import Tensor, nn

from convnext_fast.checkpoint import (
    CheckpointError,
    convert_state_dict,
    load_checkpoint,
)

from .networks import (
    DIMS,
    VARIANTS,
    assert_identical,
    ours,
    randomise,
    state_of,
    torchvision,
    v1,
)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in VARIANTS if "bare" not in name and "dinov3" not in name])
def test_loads_into_models_of_every_library(name):
    _, v2, build = VARIANTS[name]
    model, state = build(), randomise(ours(v2=v2)).state_dict()
    report = load_checkpoint(model, {"model": {f"module.{k}": v for k, v in state.items()}})
    assert (report.dialect, report.fits, report.dropped) == ("facebook", True, ())
    assert_identical(convert_state_dict(model.state_dict(), to="facebook"), state)
    assert str(report) == "facebook checkpoint: everything fits"


def test_error_is_one_table_and_nothing_changes():
    state = state_of("timm-linear")
    del state["stages.2.blocks.1.mlp.fc1.bias"]
    state["stem.0.weight"] = torch.zeros(DIMS[0], 4, 4, 4)
    state["extra.weight"] = torch.zeros(3)
    model = ours()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, state)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the checkpoint does not fit ConvNeXt. timm checkpoint: not everything fits"
    assert [line.split() for line in lines[1:5]] == [
        ["name", "model", "checkpoint"],
        ["missing", "stages.2.1.pwconv1.bias", "(64,)", "–"],
        ["unexpected", "extra.weight", "–", "(3,)"],
        ["shape", "downsample_layers.0.0.weight", "(8,", "3,", "4,", "4)", "(8,", "4,", "4,", "4)"],
    ]
    assert_identical(model.state_dict(), before)
    report = load_checkpoint(model, state, strict=False)
    assert not report.fits
    assert torch.equal(model.norm.weight, state["head.norm.weight"])
    assert torch.equal(model.downsample_layers[0][0].weight, before["downsample_layers.0.0.weight"])


def test_long_table_is_cut():
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(ours(depths=(3, 3, 3, 3)), v1())
    assert "  … and " in str(caught.value)
    assert len(str(caught.value).splitlines()) < 30


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("strict", [True, False])
def test_nan_and_infinity_are_refused(poison, strict):
    state, model = state_of("huggingface"), ours()
    state["convnext.encoder.stages.2.layers.1.dwconv.weight"][3, 0, 2, 5] = poison
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"tensors hold NaN or infinity: stages\.2\.1\.dwconv\.weight$"):
        load_checkpoint(model, state, strict=strict)
    assert_identical(model.state_dict(), before)


def test_integers_are_refused():
    state = v1()
    state["norm.weight"] = torch.ones(DIMS[-1], dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"other things than floating-point numbers: norm\.weight"):
        load_checkpoint(ours(), state)


def test_other_number_of_classes():
    state, model = state_of("torchvision"), ours(num_classes=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"reset_classifier\(7\); strict=False keeps the model's own head"):
        load_checkpoint(model, state)
    assert_identical(model.state_dict(), before)
    report = load_checkpoint(model, state, strict=False)
    assert [name for name, *_ in report.mismatched] == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.norm.weight, state["classifier.0.weight"])


def test_layer_scale_on_one_side():
    with pytest.raises(CheckpointError, match="layer_scale_init_value=1e-6"):
        load_checkpoint(ours(layer_scale_init_value=0.0), state_of("huggingface"))
    with pytest.raises(CheckpointError, match=r"layer_scale_init_value=0\."):
        load_checkpoint(ours(), ours(layer_scale_init_value=0.0).state_dict())


@pytest.mark.parametrize(
    "name, head, norm",
    [
        ("ours", "head.", "norm."),
        ("timm-conv", "head.fc.", "head.norm."),
        ("torchvision", "classifier.2.", "classifier.0."),
        ("huggingface", "classifier.", "convnext.layernorm."),
    ],
)
def test_models_that_end_before_the_classifier(name, head, norm):
    state = state_of(name)
    report = load_checkpoint(ours(num_classes=0), state)
    assert report.dropped == (f"{head}weight", f"{head}bias")
    assert f"no place for it: {head}weight, {head}bias" in str(report)
    report = load_checkpoint(ours(features_only=True), state)
    assert set(report.dropped) == {f"{head}weight", f"{head}bias", f"{norm}weight", f"{norm}bias"}


def test_only_the_end_may_be_left_out():
    """A norm that a classifier lacks, or a head that the file lacks, is an error."""
    without_norm = {k: v for k, v in v1().items() if not k.startswith("norm.")}
    with pytest.raises(CheckpointError, match=r"missing +norm\.weight"):
        load_checkpoint(ours(num_classes=0), without_norm)
    with pytest.raises(CheckpointError, match=r"missing +head\.weight"):
        load_checkpoint(ours(), state_of("huggingface-bare"))
    deeper = randomise(ours(depths=(1, 3, 2, 1))).state_dict()
    with pytest.raises(CheckpointError, match=r"unexpected +stages\.1\.2\.gamma"):
        load_checkpoint(ours(features_only=True), deeper)


def test_last_stage_is_not_left_out_of_a_network_with_a_norm():
    state = {k: v for k, v in randomise(ours(dims=(4, 6, 8, 8))).state_dict().items() if not k.startswith("head.")}
    shorter = {k: v for k, v in state.items() if not k.startswith(("stages.3.", "downsample_layers.3."))}
    with pytest.raises(CheckpointError, match=r"unexpected +downsample_layers\.3\.0\.weight"):
        convert_state_dict(state, to="facebook", like=shorter)
    bare = {k: v for k, v in shorter.items() if not k.startswith("norm.")}
    assert_identical(convert_state_dict(state, to="facebook", like=bare), bare)


def test_timm_features_of_the_first_stages():
    module = pytest.importorskip("timm")
    full = module.create_model("test_convnext")
    pruned = module.create_model("test_convnext", features_only=True, out_indices=(0, 1))
    report = load_checkpoint(pruned, full.state_dict())
    assert report.fits
    assert {name.split(".")[1] for name in report.dropped if name.startswith("stages.")} == {"2", "3"}
    assert torch.equal(pruned.state_dict()["stages_1.downsample.1.weight"], full.stages[1].downsample[1].weight)


def test_detector_and_its_backbone():
    """What lies beside the backbone in a detector's checkpoint is left out, and said; as a target it must be filled."""
    detector = nn.ModuleDict({"backbone": ours(features_only=True), "neck": nn.Conv2d(4, 4, 1)})
    report = load_checkpoint(ours(features_only=True), randomise(detector).state_dict())
    assert report.dropped == ("neck.weight", "neck.bias")
    with pytest.raises(CheckpointError, match=r"missing +neck\.weight"):
        load_checkpoint(detector, v1())
    torchvision_body = {
        f"backbone.body.{k.removeprefix('features.')}": v for k, v in torchvision().features.state_dict().items()
    }
    assert load_checkpoint(ours(features_only=True), torchvision_body).fits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("strict", [True, False])
def test_values_beyond_the_models_dtype_are_refused(dtype, strict):
    state, model = state_of("timm-linear"), ours().to(dtype)
    state["stages.2.blocks.1.mlp.fc2.bias"][0] = 70000.0
    state["head.norm.weight"][1] = -1e6
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, state, strict=strict)
    largest = f"{torch.finfo(dtype).max:g}"
    assert str(caught.value) == (
        f"the checkpoint: tensors hold values beyond {largest}, the largest of the model's {dtype}: "
        "stages.2.1.pwconv2.bias, norm.weight"
    )
    assert all(torch.equal(t.float(), before[name].float()) for name, t in model.state_dict().items())
    assert load_checkpoint(ours().bfloat16(), state).fits, "which has the range of float32"


def test_advice_on_arguments_can_be_told_from_the_message():
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(ours(num_classes=9), v1())
    assert str(caught.value) == caught.value.message + caught.value.advice
    assert "reset_classifier" in caught.value.advice
    assert "reset_classifier" not in caught.value.message
    assert caught.value.message.count("\n") == 3


def test_dtype_and_device_of_the_model_stay():
    model = ours().bfloat16()
    load_checkpoint(model, v1())
    assert model.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(ours(device="meta"), v1())
