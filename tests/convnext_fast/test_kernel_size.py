"""ConvNeXts of any kernel size: names, results, checkpoints of timm's, and what does not fit."""

import re

import pytest
import torch

import convnext_fast
from convnext_fast import CheckpointError, ConvNeXt, convert_state_dict, load_checkpoint

from .small_models import SMALL, VERSIONS, assert_all_close, each_version, gradients, randomised

SIZES = (1, 3, 5, 9, 13, 31)


@each_version
def test_every_odd_size_keeps_names_and_shapes_of_maps(build):
    names = list(build().state_dict())
    for size in SIZES:
        model = build(kernel_size=size)
        assert list(model.state_dict()) == names
        kernels = {tuple(t.shape[1:]) for name, t in model.state_dict().items() if name.endswith("dwconv.weight")}
        assert kernels == {(1, size, size)}
        assert model(torch.randn(2, 3, 40, 33)).shape == (2, 5)


@pytest.mark.parametrize("value", [0, -3, 4, 7.0, "7", None, True, (7, 7)], ids=repr)
def test_bad_sizes_are_named(value):
    for version in VERSIONS.values():
        with pytest.raises(ValueError, match=r"kernel_size is .*; a positive odd integer is allowed, such as 7"):
            version(kernel_size=value)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_isotropic_small"])
def test_builders_pass_it_on(name):
    state = convnext_fast.create_model(name, kernel_size=11, device="meta").state_dict()
    (size,) = {tuple(t.shape[2:]) for key, t in state.items() if key.endswith("dwconv.weight")}
    assert size == (11, 11)


@pytest.mark.parametrize("size", [3, 9, 13])
def test_equal_to_timms_of_the_same_kernel_sizes(size):
    """What timm calls ``kernel_sizes``; both ways, logits and gradients."""
    network = pytest.importorskip("timm.models.convnext").ConvNeXt
    peer = randomised(network(depths=SMALL["depths"], dims=SMALL["dims"], num_classes=5, kernel_sizes=size)).double()
    model = ConvNeXt(**SMALL, kernel_size=size).double()
    assert load_checkpoint(model, peer.state_dict()).fits
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    assert_all_close([model(x)], [peer(x)], 1e-10)
    ours, theirs = (dict(zip(dict(m.named_parameters()), gradients(m, x), strict=True)) for m in (model, peer))
    theirs = convert_state_dict(theirs, to="facebook")
    assert_all_close([ours[name] for name in theirs], list(theirs.values()), 1e-8)
    assert_all_close(convert_state_dict(model.state_dict(), to="timm", like=peer).values(), peer.state_dict().values())


def test_a_checkpoint_of_another_size_says_which():
    seven, nine = ConvNeXt(**SMALL), ConvNeXt(**SMALL, kernel_size=9)
    before = {name: tensor.clone() for name, tensor in seven.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(seven, nine.state_dict())
    assert re.search(r"shape +stages\.0\.0\.dwconv\.weight +\(8, 1, 7, 7\) +\(8, 1, 9, 9\)", str(caught.value))
    assert "depthwise kernels are 9×9, the model's are others: see its argument kernel_size=9." in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in seven.state_dict().items())
    report = load_checkpoint(seven, nine.state_dict(), strict=False)
    assert len(report.mismatched) == sum(SMALL["depths"])
    assert torch.equal(seven.head.weight, nine.head.weight)
    grey = ConvNeXt(**SMALL, in_chans=1, patch_size=2)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(grey, ConvNeXt(**SMALL, in_chans=1).state_dict())
    assert "kernel_size" not in str(caught.value), "a stem is no depthwise kernel"


def test_sizes_that_differ_between_stages_are_listed():
    network = pytest.importorskip("timm.models.convnext").ConvNeXt
    sizes = (7, 11, 13, 9)
    peer = network(depths=SMALL["depths"], dims=SMALL["dims"], num_classes=5, kernel_sizes=sizes)
    with pytest.raises(CheckpointError, match=r"kernels are 7×7, 9×9, 11×11, 13×13, .* argument kernel_size\."):
        load_checkpoint(ConvNeXt(**SMALL), peer.state_dict())
    assert convert_state_dict(peer.state_dict(), to="facebook")["stages.2.0.dwconv.weight"].shape == (16, 1, 13, 13)


def test_a_size_that_is_right_for_some_stages_is_not_advised():
    network = pytest.importorskip("timm.models.convnext").ConvNeXt
    peer = network(depths=SMALL["depths"], dims=SMALL["dims"], num_classes=5, kernel_sizes=(9, 9, 7, 7))
    state = {f"backbone.{name}": tensor for name, tensor in peer.state_dict().items()}
    for target in (ConvNeXt(**SMALL), ConvNeXt(**SMALL, kernel_size=9)):
        with pytest.raises(CheckpointError, match=r"kernels are 7×7, 9×9, .* argument kernel_size\."):
            load_checkpoint(target, {**state, "neck.conv_dw.weight": torch.zeros(4, 1, 3, 3)})


def test_accelerate_says_what_runs():
    model = ConvNeXt(**SMALL, kernel_size=9)
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    report = convnext_fast.accelerate(model)
    assert not report.swapped
    assert {reason for _, reason in report.skipped if "takes the kernels where there are any" not in reason} == set()
    assert torch.equal(model(x), before)
