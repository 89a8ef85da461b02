"""Telling, converting, reading, loading and saving checkpoints."""

import argparse
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convnext_fast
from convnext_fast.checkpoint import (
    CheckpointError,
    convert_state_dict,
    detect_dialect,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from convnext_fast.dialects import DIALECTS

from .networks import CLASSES, CLASSIFIERS, DIMS, dinov3, huggingface, ours, randomise, timm, torchvision

# One network of every variant, each with the dialect that it must be told to be.
VARIANTS = {
    **{name: (dialect, v2, build) for name, (dialect, v2, build) in CLASSIFIERS.items()},
    "ours": ("facebook", False, ours),
    "ours-v2": ("facebook", True, lambda: ours(v2=True)),
    "huggingface-bare": ("huggingface", False, lambda: huggingface(kind="Model")),
    "huggingface-v2-bare": ("huggingface", True, lambda: huggingface(v2=True, kind="Model")),
    "dinov3": ("dinov3", False, dinov3),
    "dinov3-backbone": ("dinov3", False, lambda: dinov3("Backbone")),
}
HEADLESS = {"huggingface-bare", "huggingface-v2-bare", "dinov3", "dinov3-backbone"}
PAIRS = list(itertools.product(VARIANTS, VARIANTS))


def state_of(name: str) -> dict[str, Tensor]:
    return randomise(VARIANTS[name][2]()).state_dict()


def v1() -> dict[str, Tensor]:
    return randomise(ours()).state_dict()


def assert_identical(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def mmpretrain_state(v2: bool = False) -> dict[str, Tensor]:
    """A classifier's names as mmpretrain 1.2 writes them, spelled out for depths (1, 1, 1, 1)."""
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.rand(shape, generator=torch.Generator().manual_seed(len(state)))

    for i, (before, dim) in enumerate(zip((3, *DIMS), DIMS, strict=False)):
        conv, norm = (0, 1) if i == 0 else (1, 0)
        patch = 4 if i == 0 else 2
        put(f"backbone.downsample_layers.{i}.{conv}.weight", dim, before, patch, patch)
        put(f"backbone.downsample_layers.{i}.{conv}.bias", dim)
        put(f"backbone.downsample_layers.{i}.{norm}.weight", dim if i == 0 else before)
        put(f"backbone.downsample_layers.{i}.{norm}.bias", dim if i == 0 else before)
        block = f"backbone.stages.{i}.0"
        if not v2:
            put(f"{block}.gamma", dim)
        put(f"{block}.depthwise_conv.weight", dim, 1, 7, 7)
        put(f"{block}.depthwise_conv.bias", dim)
        put(f"{block}.norm.weight", dim)
        put(f"{block}.norm.bias", dim)
        put(f"{block}.pointwise_conv1.weight", 4 * dim, dim)
        put(f"{block}.pointwise_conv1.bias", 4 * dim)
        if v2:
            put(f"{block}.grn.gamma", 4 * dim)
            put(f"{block}.grn.beta", 4 * dim)
        put(f"{block}.pointwise_conv2.weight", dim, 4 * dim)
        put(f"{block}.pointwise_conv2.bias", dim)
    put("backbone.norm3.weight", DIMS[-1])
    put("backbone.norm3.bias", DIMS[-1])
    put("head.fc.weight", CLASSES, DIMS[-1])
    put("head.fc.bias", CLASSES)
    return state


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


# Files


class Payload:
    """What a hostile checkpoint holds: a call."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl", ".safetensors"])
def test_reads_what_was_saved(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    state, file = v1(), tmp_path / f"net{suffix}"
    save = torch.save if suffix in (".bin", ".pkl") else save_checkpoint
    save(state, file)
    assert_identical({k: read_checkpoint(file)[k] for k in state}, state)
    assert load_checkpoint(ours(), file).fits
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_original_training_checkpoint(tmp_path):
    """The original's hold its arguments as a Namespace, and the optimizer's state."""
    state = v1()
    args = argparse.Namespace(model="convnext_tiny", lr=4e-3, betas=(0.9, 0.999), opt=None)
    torch.save({"model": state, "args": args, "epoch": 299, "optimizer": {"state": {}}}, tmp_path / "c.pth")
    assert_identical(read_checkpoint(tmp_path / "c.pth"), state)
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "left open for everybody"


@pytest.mark.parametrize("legacy", [False, True])
def test_python_objects_are_refused_and_do_not_run(tmp_path, legacy):
    trap, file = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"model": v1(), "args": Payload(trap)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"hostile\.pth holds Python objects other than tensors.*posix\.system"):
        load_checkpoint(ours(), file)
    assert not trap.exists()


def test_plain_pickle_is_refused_and_does_not_run(tmp_path):
    trap, file = tmp_path / "ran", tmp_path / "plain.pkl"
    file.write_bytes(pickle.dumps({"model": Payload(trap)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.pkl"):
        read_checkpoint(file)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "a web page", "header only"])
def test_damaged_files(tmp_path, suffix, damage):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"damaged{suffix}"
    save_checkpoint(v1(), file)
    whole = file.read_bytes()
    file.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "a web page": b"<!DOCTYPE html><html>404</html>"}.get(
            damage, whole[:6]
        )
    )
    with pytest.raises(CheckpointError, match=r"damaged\.(pth|safetensors) is damaged"):
        load_checkpoint(ours(), file)


def test_other_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_checkpoint(ours(), tmp_path / "nowhere.pth")
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth holds no tensors, only epoch, names"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth is a list, not a dictionary"):
        read_checkpoint(tmp_path / "list.pth")
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"net\.onnx: its suffix may be \.safetensors \.pth"):
        read_checkpoint(tmp_path / "net.onnx")
    loop: dict = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(CheckpointError, match=r"loop\.pth holds no tensors"):
        read_checkpoint(tmp_path / "loop.pth")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ImportError, match=r"net\.safetensors.*pip install safetensors"):
        read_checkpoint(file)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_checkpoint(v1(), file)
    assert file.read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saves_views_and_shared_tensors(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    base = torch.rand(1000, 8)
    state = {
        "view": base[:2],
        "same": base[:2],
        "tied": base,
        "to it": base,
        "strided": base.t(),
        "cl": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save_checkpoint(state, tmp_path / f"views{suffix}")
    again = read_checkpoint(tmp_path / f"views{suffix}")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert again["view"].untyped_storage().nbytes() == 64, "the whole of base was saved with it"


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "net.pth"
    save_checkpoint(v1(), file)
    before = file.read_bytes()

    def full_disk(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint({"a": torch.ones(2)}, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    for state, path, message in (
        ({"a": torch.ones(1)}, tmp_path / "net.onnx", r"suffix may be \.safetensors, \.pth or \.pt"),
        ({"a": torch.ones(1), "epoch": 3}, file, "state_dict holds epoch; "),
        ({}, file, "state_dict holds nothing; "),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(state, path)
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        save_checkpoint({"a": torch.ones(1)}, tmp_path / "missing" / "net.pth")


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


# Loading


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


def test_dtype_and_device_of_the_model_stay():
    model = ours().bfloat16()
    load_checkpoint(model, v1())
    assert model.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(ours(device="meta"), v1())
