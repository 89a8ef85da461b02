"""RepLKNet: names and shapes of the authors' repository, mmpretrain's results, and merging of small kernels."""

import copy

import pytest
import torch

import convnext_fast
from convnext_fast import CheckpointError, RepLKBlock, RepLKNet, load_checkpoint
from convnext_fast.replknet import ReparamLargeKernelConv, _where_float64_is

from .small_models import with_statistics

SMALL = {
    "large_kernel_sizes": (9, 7), "layers": (1, 2), "channels": (6, 10), "drop_path_rate": 0.0, "small_kernel": 5,
    "num_classes": 5,
}  # fmt: skip

# As replknet.py of DingXiaoH/RepLKNet-pytorch registers them.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def conv_bn(name):
    return [f"{name}.conv.weight", *(f"{name}.bn.{leaf}" for leaf in NORM)]


LARGE = {
    "trained": [*conv_bn("large_kernel.lkb_origin"), *conv_bn("large_kernel.small_conv")],
    "alone": conv_bn("large_kernel.lkb_origin"),
    "merged": ["large_kernel.lkb_reparam.weight", "large_kernel.lkb_reparam.bias"],
}


def published_names(layers, large):
    depthwise = [*conv_bn("pw1"), *conv_bn("pw2"), *LARGE[large], *(f"prelkb_bn.{leaf}" for leaf in NORM)]
    mlp = [*(f"preffn_bn.{leaf}" for leaf in NORM), *conv_bn("pw1"), *conv_bn("pw2")]
    names = [name for i in range(4) for name in conv_bn(f"stem.{i}")]
    for i, depth in enumerate(layers):
        for j in range(2 * depth):
            names += [f"stages.{i}.blocks.{j}.{name}" for name in (mlp if j % 2 else depthwise)]
    names += [name for i in range(len(layers) - 1) for j in (0, 1) for name in conv_bn(f"transitions.{i}.{j}")]
    return [*names, *(f"norm.{leaf}" for leaf in NORM), "head.weight", "head.bias"]


@pytest.mark.parametrize("name, kwargs, large", [
    ("replknet_31b", {}, "trained"), ("replknet_31b", {"small_kernel_merged": True}, "merged"),
    ("replknet_31l", {}, "trained"), ("replknet_xl", {}, "alone"),
])  # fmt: skip
def test_names_of_published_networks(name, kwargs, large):
    state = convnext_fast.create_model(name, device="meta", **kwargs).state_dict()
    assert list(state) == published_names((2, 2, 18, 2), large)


def test_shapes_of_31b():
    state = convnext_fast.replknet_31b(device="meta").state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stem = [shapes[f"stem.{i}.conv.weight"] for i in range(4)]
    assert stem == [(128, 3, 3, 3), (128, 1, 3, 3), (128, 128, 1, 1), (128, 1, 3, 3)]
    for i, (dim, size) in enumerate(zip((128, 256, 512, 1024), (31, 29, 27, 13), strict=True)):
        block = f"stages.{i}.blocks"
        assert shapes[f"{block}.0.large_kernel.lkb_origin.conv.weight"] == (dim, 1, size, size)
        assert shapes[f"{block}.2.large_kernel.small_conv.conv.weight"] == (dim, 1, 5, 5)
        assert shapes[f"{block}.0.pw1.conv.weight"] == shapes[f"{block}.0.pw2.conv.weight"] == (dim, dim, 1, 1)
        assert shapes[f"{block}.1.pw1.conv.weight"] == (4 * dim, dim, 1, 1)
        assert shapes[f"{block}.1.pw2.conv.weight"] == (dim, 4 * dim, 1, 1)
        if i < 3:
            assert shapes[f"transitions.{i}.0.conv.weight"] == (2 * dim, dim, 1, 1)
            assert shapes[f"transitions.{i}.1.conv.weight"] == (2 * dim, 1, 3, 3)
    xl = convnext_fast.replknet_xl(device="meta").state_dict()
    assert xl["stages.0.blocks.0.large_kernel.lkb_origin.conv.weight"].shape == (384, 1, 27, 27)


@pytest.mark.parametrize("training", [False, True])
def test_equal_to_mmpretrains(training):
    """Its copy of the original; it keeps the final norm inside of the last stage, and the head elsewhere."""
    network = pytest.importorskip("mmpretrain.models.backbones.replknet").RepLKNet
    arch = {"large_kernel_sizes": [9, 7, 7, 7], "layers": [1, 2, 1, 1], "channels": [6, 10, 8, 12], "small_kernel": 5,
            "dw_ratio": 1.5}  # fmt: skip
    ours = {key: arch[key] for key in ("large_kernel_sizes", "layers", "channels")}
    model = RepLKNet(**{**SMALL, **ours, "dw_ratio": 1.5, "ffn_ratio": 3, "num_classes": 0})
    model = with_statistics(model).double().train(training)
    peer = network(arch, out_indices=(3,), ffn_ratio=3, drop_path_rate=0.0, norm_cfg={"type": "BN"}).double()
    last = {f"stages.3.{key}" if key.startswith("norm.") else key: key for key in model.state_dict()}
    peer.load_state_dict({theirs: model.state_dict()[key] for theirs, key in last.items()}, strict=True)
    peer.train(training)
    x = torch.randn(2, 3, 64, 70, dtype=torch.float64)
    features, (theirs,) = model(x), peer(x)
    theirs = theirs.mean((2, 3))
    torch.testing.assert_close(features, theirs, rtol=1e-10, atol=1e-10)
    dy, parameters = torch.randn_like(features), dict(peer.named_parameters())
    gradients = torch.autograd.grad(features, list(model.parameters()), dy)
    names = {key: theirs for theirs, key in last.items()}
    wanted = torch.autograd.grad(theirs, [parameters[names[key]] for key, _ in model.named_parameters()], dy)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# Merging


@pytest.mark.parametrize("small_kernel", [None, 1, 5, 9])
def test_merging_keeps_results(small_kernel):
    model = with_statistics(ReparamLargeKernelConv(7, 9, small_kernel)).double().eval()
    x = torch.randn(2, 7, 13, 8, dtype=torch.float64)
    before = model(x)
    model.merge_kernel()
    assert list(model.state_dict()) == ["lkb_reparam.weight", "lkb_reparam.bias"]
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    model.merge_kernel()
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    model = with_statistics(ReparamLargeKernelConv(7, 9, 5)).eval()
    x, names = torch.randn(2, 7, 13, 8), list(model.state_dict())
    before = model(x)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr("convnext_fast.replknet.dk.DepthwiseConv2d", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.merge_kernel()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("frozen", [False, True])
def test_merging_keeps_what_is_frozen(frozen):
    model = ReparamLargeKernelConv(7, 9, 5)
    model.lkb_origin.conv.requires_grad_(not frozen)
    model.merge_kernel()
    assert [parameter.requires_grad for parameter in model.parameters()] == [not frozen] * 2


def test_merging_computes_on_the_cpu_where_a_device_has_no_float64():
    where = {name: _where_float64_is(torch.device(name)).type for name in ("cpu", "cuda", "mps")}
    assert where == {"cpu": "cpu", "cuda": "cuda", "mps": "cpu"}


def test_merged_network_equals_its_origin_and_keeps_dtype_and_device():
    model = with_statistics(RepLKNet(**SMALL)).eval()
    x = torch.randn(2, 3, 48, 40)
    merged = copy.deepcopy(model)
    merged.structural_reparam()
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    rebuilt = RepLKNet(**SMALL, small_kernel_merged=True).eval()
    assert load_checkpoint(rebuilt, merged.state_dict()).fits
    assert torch.equal(rebuilt(x), merged(x))
    half = RepLKNet(**SMALL, dtype=torch.bfloat16)
    half.structural_reparam()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        nowhere = convnext_fast.replknet_31b()
    nowhere.structural_reparam()
    assert {parameter.device.type for parameter in nowhere.parameters()} == {"meta"}


def test_a_checkpoint_that_does_not_fit_says_what_to_build():
    merged = RepLKNet(**SMALL, small_kernel_merged=True)
    with pytest.raises(CheckpointError, match=r"merged on one side: build the model with small_kernel_merged=True"):
        load_checkpoint(RepLKNet(**SMALL), merged.state_dict())
    with pytest.raises(CheckpointError, match=r"merged on one side: build the model with small_kernel_merged=False"):
        load_checkpoint(merged, RepLKNet(**SMALL).state_dict())
    with pytest.raises(CheckpointError, match=r"kernels are 7×7, 9×9, .* see its argument large_kernel_sizes\."):
        load_checkpoint(RepLKNet(**{**SMALL, "large_kernel_sizes": (13, 11)}), RepLKNet(**SMALL).state_dict())
    with pytest.raises(CheckpointError, match=r"small kernels are 5×5, .* argument small_kernel=5\.") as caught:
        load_checkpoint(RepLKNet(**{**SMALL, "small_kernel": 3}), RepLKNet(**SMALL).state_dict())
    assert "large_kernel_sizes" not in str(caught.value)


def test_block_alone():
    block = RepLKBlock(8, 12, block_lk_size=13, small_kernel=5, drop_path=0.0)
    x = torch.randn(2, 8, 10, 9, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    assert block.large_kernel.lkb_origin.conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name, value", [
    ("large_kernel_sizes", (9, 8)), ("large_kernel_sizes", (9,)), ("layers", (1, 0)), ("channels", 3),
    ("small_kernel", 4), ("small_kernel", 11), ("dw_ratio", 0), ("ffn_ratio", -1), ("in_channels", 0),
    ("num_classes", -1), ("drop_path_rate", 2), ("dw_ratio", 0.1), ("ffn_ratio", 0.1), ("layers", (1, True)),
    ("in_channels", True),
])  # fmt: skip
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; .* allowed"):
        RepLKNet(**{**SMALL, name: value})
