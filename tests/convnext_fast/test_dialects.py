"""Telling and converting dialects: names, shapes, variants, what a dialect cannot hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convnext_fast
from convnext_fast.checkpoint import (
    CheckpointError,
    convert_state_dict,
    detect_dialect,
    load_checkpoint,
)
from convnext_fast.dialects import DIALECTS

from .networks import (
    CLASSES,
    DIMS,
    HEADLESS,
    PAIRS,
    VARIANTS,
    assert_identical,
    huggingface,
    mmpretrain_state,
    ours,
    randomise,
    state_of,
    timm,
    v1,
)

# Telling dialects apart


@pytest.mark.parametrize("name", VARIANTS)
def test_detects(name):
    assert detect_dialect(VARIANTS[name][2]().state_dict()) == VARIANTS[name][0]


def test_detects_mmpretrain_and_isotropic():
    assert detect_dialect(mmpretrain_state()) == "mmpretrain"
    assert detect_dialect(convnext_fast.ConvNeXtIsotropic(depth=1, dim=8).state_dict()) == "facebook"


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"not the parameters of a ConvNeXt.*0\.bias, 0\.weight"):
        detect_dialect(nn.Sequential(nn.Linear(2, 2)).state_dict())


def test_two_networks_are_not_chosen_between():
    two = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in v1().items()}
    with pytest.raises(CheckpointError, match=r"'student\.', 'teacher\.'"):
        detect_dialect(two)


PREFIXES = ["module.", "_orig_mod.", "backbone.", "model.", "encoder.", "module.model.backbone.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["ours", "timm-v2-conv", "torchvision", "huggingface", "huggingface-bare", "dinov3"])
def test_prefixes_are_taken_off(name, prefix):
    state = state_of(name)
    wrapped = {prefix + key: tensor for key, tensor in state.items()}
    assert detect_dialect(wrapped) == VARIANTS[name][0]
    assert_identical(convert_state_dict(wrapped, to="facebook"), convert_state_dict(state, to="facebook"))
    assert_identical(convert_state_dict(wrapped, to=VARIANTS[name][0]), state)
    assert_identical(convert_state_dict(state, to=VARIANTS[name][0], like=wrapped), wrapped)


def test_compiled_and_wrapped_submodules():
    state = v1()
    inner = {key.replace("stages.1.", "stages.1._orig_mod."): tensor for key, tensor in state.items()}
    assert len(set(inner) - set(state)) > 10
    assert_identical(convert_state_dict(inner, to="facebook"), state)
    assert_identical(convert_state_dict(state, to="facebook", like=inner), inner)


@pytest.mark.parametrize(
    "path",
    [("model",), ("state_dict",), ("module",), ("model_ema",), ("checkpoint", "model")[1:], ("model", "state_dict")],
)
def test_training_checkpoints_are_unwrapped(path):
    state = v1()
    nested: dict = state
    for key in reversed(path):
        nested = {key: nested, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    assert_identical(convert_state_dict(nested, to="facebook"), state)


@pytest.mark.parametrize("names", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_are_taken_only_when_asked_for(names):
    plain, averaged = v1(), randomise(ours(), seed=2).state_dict()
    both = dict(zip(names, (plain, averaged), strict=True))
    assert_identical(convert_state_dict(both, to="facebook"), plain)
    assert_identical(convert_state_dict(both, to="facebook", use_ema=True), averaged)
    with pytest.raises(
        CheckpointError, match="use_ema=True, and state_dict has no model_ema or state_dict_ema, only model"
    ):
        convert_state_dict({"model": plain}, to="facebook", use_ema=True)


@pytest.mark.parametrize("kind", ["proj", "mlp"])
def test_openclip(kind):
    state = {f"visual.trunk.{k}": v for k, v in state_of("timm-linear").items() if not k.startswith("head.fc")}
    state |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    projection = torch.randn(5, DIMS[-1] if kind == "proj" else 40)
    if kind == "proj":
        state["visual.head.proj.weight"] = projection
    else:
        state |= {"visual.head.mlp.fc1.weight": torch.randn(40, DIMS[-1]), "visual.head.mlp.fc1.bias": torch.randn(40)}
        state["visual.head.mlp.fc2.weight"] = projection
    with pytest.warns(UserWarning, match="beside the network: logit_scale, transformer"):
        converted = convert_state_dict(state, to="timm")
    assert torch.equal(converted["head.fc.weight"], projection)
    assert torch.equal(converted["head.fc.bias"], torch.zeros(5))
    dropped = load_checkpoint(ours(num_classes=0), state).dropped
    assert len(set(dropped)) == len(dropped) >= 3
    peer = timm(num_classes=5, head_hidden_size=None if kind == "proj" else 40)
    peer.load_state_dict(converted, strict=True)
    assert torch.equal(peer.stages[2].blocks[1].mlp.fc2.weight, state["visual.trunk.stages.2.blocks.1.mlp.fc2.weight"])


# Converting


@pytest.mark.parametrize("source, target", [p for p in PAIRS if VARIANTS[p[0]][1] == VARIANTS[p[1]][1]])
def test_round_trip_between_every_pair(source, target):
    """There and back gives every name, shape, dtype and bit, in the order of the source."""
    (_, _, build), (dialect, _, build_other) = VARIANTS[source], VARIANTS[target]
    full = not HEADLESS & {source, target}
    state = randomise(build()).half().state_dict()
    like = build_other().half()
    if full:
        there = convert_state_dict(state, to=dialect, like=like)
        like.load_state_dict(there, strict=True)
        assert list(there) == list(like.state_dict())
        assert_identical(convert_state_dict(there, to=VARIANTS[source][0], like=build()), state)
        return
    # One of the two ends before the other: what both have goes there and back.
    there = load_checkpoint(like, state, strict=False)
    assert not there.mismatched
    assert not there.unexpected
    assert all(re.search(r"norm|head|classifier", name) for name, _ in there.missing)
    again = build().half()
    load_checkpoint(again, like.state_dict(), strict=False)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]) or re.search(r"^(convnext\w*\.)?(layer_?norm|norm|head|class)", name), (
            name
        )


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("name", [name for name in VARIANTS if "backbone" not in name])
def test_without_like_there_and_back(name, to):
    dialect, v2, _ = VARIANTS[name]
    state = state_of(name)
    if v2 and to in ("torchvision", "dinov3"):
        with pytest.raises(CheckpointError, match=f"{to} cannot hold .*GRN"):
            convert_state_dict(state, to=to)
        return
    if to == "dinov3" and name not in HEADLESS:
        with pytest.warns(UserWarning, match=r"dinov3 has no classifier; dropped: \S*weight, \S*bias"):
            there = convert_state_dict(state, to=to)
        assert detect_dialect(there) == to
        return
    there = convert_state_dict(state, to=to)
    assert detect_dialect(there) == to
    assert len(there) == len(state)
    back = convert_state_dict(there, to=dialect, like=state)
    assert_identical(back, state)


@pytest.mark.parametrize("v2", [False, True])
def test_mmpretrain_golden_names(v2):
    state = mmpretrain_state(v2)
    model = ours(v2=v2, depths=(1, 1, 1, 1))
    report = load_checkpoint(model, state)
    assert (report.dialect, report.fits, report.dropped) == ("mmpretrain", True, ())
    assert torch.equal(model.stages[2][0].pwconv2.weight, state["backbone.stages.2.0.pointwise_conv2.weight"])
    assert torch.equal(model.norm.bias, state["backbone.norm3.bias"])
    back = convert_state_dict(model.state_dict(), to="mmpretrain")
    assert back.keys() == state.keys()
    assert_identical(convert_state_dict(model.state_dict(), to="mmpretrain", like=state), state)
    as_convolutions = {k: v[..., None, None] if "pointwise" in k and v.ndim == 2 else v for k, v in state.items()}
    assert_identical(convert_state_dict(model.state_dict(), to="mmpretrain", like=as_convolutions), as_convolutions)
    assert_identical(convert_state_dict(as_convolutions, to="facebook"), model.state_dict())


def test_norms_of_every_stage():
    """Backbones of detectors: the original's norm0 … norm3 are mmpretrain's, and Hugging Face's by other names."""
    state = {k: v for k, v in v1().items() if not k.startswith(("norm.", "head."))}
    for i, dim in enumerate(DIMS):
        state |= {f"norm{i}.weight": torch.rand(dim), f"norm{i}.bias": torch.rand(dim)}
    mm = convert_state_dict(state, to="mmpretrain")
    assert torch.equal(mm["norm3.weight"], state["norm3.weight"])
    assert "stages.0.0.depthwise_conv.weight" in mm
    assert_identical(convert_state_dict(mm, to="facebook"), state)
    names = ["stage1", "stage2", "stage3", "stage4"]
    peer = huggingface(kind="Backbone", out_features=names)
    peer.load_state_dict(convert_state_dict(state, to="huggingface"), strict=True)
    assert torch.equal(peer.hidden_states_norms.stage2.bias, state["norm1.bias"])
    assert_identical(convert_state_dict(peer.state_dict(), to="facebook"), state)
    with pytest.raises(CheckpointError, match=r"timm has no place for norm0\.weight"):
        convert_state_dict(state, to="timm")
    assert load_checkpoint(ours(features_only=True), state).dropped[-1] == "norm3.bias"


def test_dinov3_names_of_before_transformers_5():
    state = state_of("dinov3")
    old = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    assert "stages.0.layers.0.gamma" in old
    assert_identical(convert_state_dict(old, to="dinov3"), state)
    assert_identical(convert_state_dict(old, to="facebook"), convert_state_dict(state, to="facebook"))
    distilled = convert_state_dict(state, to="facebook") | {"norms.3.weight": torch.ones(DIMS[-1])}
    assert load_checkpoint(ours(num_classes=0), distilled).dropped == ("norms.3.weight",)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm_variants_by_like(conv_mlp):
    state = v1()
    unpooled = timm(conv_mlp=conv_mlp, global_pool="")
    unpooled.load_state_dict(convert_state_dict(state, to="timm", like=unpooled), strict=True)
    assert unpooled.head.fc.weight.shape == (CLASSES, DIMS[-1], 1, 1)
    before = timm(conv_mlp=conv_mlp, head_norm_first=True)
    with pytest.warns(UserWarning, match="normalises after it pools"):
        converted = convert_state_dict(state, to="timm", like=before)
    assert "norm_pre.weight" in converted
    before.load_state_dict(converted, strict=True)
    with pytest.warns(UserWarning, match="normalises before it pools"):
        back = convert_state_dict(before.state_dict(), to="facebook")
    assert_identical(back, state)


def test_timm_variants_that_only_timm_has_go_into_themselves():
    for kwargs in ({"stem_type": "overlap_tiered"}, {"norm_layer": "rmsnorm", "conv_mlp": True}):
        state = randomise(timm(**kwargs)).state_dict()
        assert_identical(convert_state_dict(state, to="timm"), state)
        model = timm(**kwargs, num_classes=3)
        report = load_checkpoint(model, state, strict=False)
        assert [name for name, _, _ in report.mismatched] == ["head.fc.weight", "head.fc.bias"]
        assert not report.missing
        assert torch.equal(model.stem[0].weight, state["stem.0.weight"])
        with pytest.raises(CheckpointError, match=r"holds what no ConvNeXt has: stem\.2|lacks: .*norm.*\.bias"):
            convert_state_dict(state, to="facebook")


def test_mlp_head_has_no_place_elsewhere():
    state = randomise(timm(head_hidden_size=24)).state_dict()
    with pytest.raises(CheckpointError, match=r"facebook has no place for head\.pre_logits\.fc\.weight"):
        convert_state_dict(state, to="facebook")
    as_wide_as_features = randomise(timm(head_hidden_size=DIMS[-1])).state_dict()
    with pytest.raises(CheckpointError, match=r"unexpected +head\.pre_logits\.fc\.weight"):
        load_checkpoint(ours(), as_wide_as_features)
    assert load_checkpoint(ours(num_classes=0), as_wide_as_features).fits


def test_what_a_dialect_cannot_hold():
    with pytest.raises(CheckpointError, match=r"torchvision cannot hold .* need a layer scale"):
        convert_state_dict(ours(layer_scale_init_value=0.0).state_dict(), to="torchvision")
    both = ours(v2=True, layer_scale_init_value=1.0).state_dict()
    with pytest.raises(CheckpointError, match=r"huggingface cannot hold .* have both"):
        convert_state_dict(both, to="huggingface")
    assert len(convert_state_dict(both, to="timm")) == len(both)
    with pytest.raises(CheckpointError, match=r"depthwise kernels are 7×7, and these are \[\(5, 5\)\]"):
        convert_state_dict(ours(kernel_size=5).state_dict(), to="huggingface")
    isotropic = convnext_fast.ConvNeXtIsotropic(depth=1, dim=8).state_dict()
    assert_identical(convert_state_dict(isotropic, to="facebook"), isotropic)
    for to in set(DIALECTS) - {"facebook"}:
        with pytest.raises(CheckpointError, match=f"{to} cannot hold .*isotropic"):
            convert_state_dict(isotropic, to=to)


@pytest.mark.parametrize(
    "name", ["stages.1.0.pwconv1.bias", "downsample_layers.2.1.weight", "stages.2.0.gamma", "head.bias"]
)
def test_incomplete_state_dict_is_not_converted(name):
    state = v1()
    del state[name]
    with pytest.raises(CheckpointError, match=f"lacks: {name}"):
        convert_state_dict(state, to="timm")


def test_gap_between_blocks_is_not_converted():
    state = {k: v for k, v in v1().items() if not k.startswith("stages.1.0.")}
    with pytest.raises(CheckpointError, match=r"lacks: stages\.1\.0"):
        convert_state_dict(state, to="timm")


def test_convert_arguments_are_checked():
    with pytest.raises(ValueError, match=r"to is 'keras'; allowed: 'facebook', 'timm'"):
        convert_state_dict(v1(), to="keras")
    with pytest.raises(ValueError, match=r"to is 'timm', and like is a network of the dialect 'facebook'"):
        convert_state_dict(v1(), to="timm", like=ours())
    with pytest.raises(
        CheckpointError, match=r"does not fit like.*\n.*\n.*shape +head.fc.weight +\(3, 20\) +\(7, 20\)"
    ):
        convert_state_dict(v1(), to="timm", like=timm(num_classes=3))


def test_values_dtypes_and_memory_are_kept():
    state = {k: v.bfloat16() for k, v in v1().items()}
    converted = convert_state_dict(state, to="timm", like=timm(conv_mlp=True))
    for ours_name, name in (
        ("stages.0.0.pwconv1.weight", "stages.0.blocks.0.mlp.fc1.weight"),
        ("stages.3.0.gamma", "stages.3.blocks.0.gamma"),
        ("norm.weight", "head.norm.weight"),
    ):
        assert converted[name].dtype == torch.bfloat16
        assert converted[name].data_ptr() == state[ours_name].data_ptr(), "copied"


def test_needs_none_of_the_libraries_that_it_reads_from():
    blocked = ["timm", "torchvision", "transformers", "safetensors", "mmpretrain", "mmengine"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import torch
from convnext_fast.checkpoint import convert_state_dict
from convnext_fast import ConvNeXt
state = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4)).state_dict()
assert "stem.0.weight" in convert_state_dict(state, to="timm")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
