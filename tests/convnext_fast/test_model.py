"""The networks: interface of the original, sizes, heads, the block, drop path and checkpointing."""

import copy

import pytest
import torch
from torch import nn

import convnext_fast
import dwconv_kernels as dk
from convnext_fast import GRN, Block, ConvNeXt, ConvNeXtIsotropic, DropPath

from .small_models import SMALL, VERSIONS, assert_all_close, each_version, gradients, randomised


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- interface of the original repository ----------------------------------------------------------------------------


def test_state_dict_keys_are_those_of_the_original():
    block = ["dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias", "pwconv1.weight", "pwconv1.bias"]
    block += ["pwconv2.weight", "pwconv2.bias"]
    expected = [f"downsample_layers.{i}.{j}.{p}" for i in range(4) for j in range(2) for p in ("weight", "bias")]
    for stage, depth in enumerate(SMALL["depths"]):
        for j in range(depth):
            expected += [f"stages.{stage}.{j}.{key}" for key in ["gamma", *block]]
    expected += ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert list(VERSIONS["v1"]().state_dict()) == expected  # the order, too: optimizers number parameters by it
    v2 = [k for k in expected if not k.endswith("gamma")]
    v2 += [
        f"stages.{s}.{j}.grn.{p}" for s, d in enumerate(SMALL["depths"]) for j in range(d) for p in ("gamma", "beta")
    ]
    assert sorted(VERSIONS["v2"]().state_dict()) == sorted(v2)
    assert VERSIONS["v2"]().stages[0][0].grn.gamma.shape == (1, 1, 1, 32)
    names = {k.split(".", 2)[-1] if k.startswith("blocks") else k for k in VERSIONS["isotropic"]().state_dict()}
    assert names == {*block, "stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_constructor_arguments_are_those_of_the_original():
    model = ConvNeXt(1, 7, [1, 1, 1, 1], [8, 8, 8, 8], 0.3, 0.25, 0.5)
    assert model.downsample_layers[0][0].in_channels == 1
    assert model.head.out_features == 7
    rates = [stage[0].drop_path.drop_prob for stage in model.stages[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert isinstance(model.stages[0][0].drop_path, nn.Identity)
    assert torch.equal(model.stages[2][0].gamma, torch.full((8,), 0.25))
    torch.manual_seed(0)
    full = ConvNeXt(1, 7, [1, 1, 1, 1], [8, 8, 8, 8], head_init_scale=1.0)
    torch.manual_seed(0)
    half = ConvNeXt(1, 7, [1, 1, 1, 1], [8, 8, 8, 8], head_init_scale=0.5)
    assert torch.equal(half.head.weight, full.head.weight * 0.5)
    assert ConvNeXtIsotropic(3, 7, 2, 16, layer_scale_init_value=0.1).blocks[0].gamma is not None


def test_initial_weights():
    model = convnext_fast.convnext_atto()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.bias.abs().max() == 0
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
        if isinstance(module, GRN):
            assert module.gamma.abs().max() == module.beta.abs().max() == 0


@each_version
def test_forward_features_are_pooled_and_normalised(build):
    model = randomised(build())
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model(x), model.head(features))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("depths", {"depths": (1, 1, 1)}),
        ("dims", {"dims": (8, 8, 8, 0)}),
        ("kernel_size", {"kernel_size": 6}),
        ("drop_path_rate", {"drop_path_rate": 1.0}),
        ("drop_path_rate", {"drop_path_rate": -0.1}),
        ("num_classes", {"num_classes": -1}),
        ("num_classes", {"num_classes": None}),
        ("in_chans", {"in_chans": 0}),
        ("patch_size", {"patch_size": 0}),
        ("layer_scale_init_value", {"layer_scale_init_value": -1.0}),
        ("memory", {"memory": "tiny"}),
        ("out_indices", {"features_only": True, "out_indices": 3}),
        ("out_indices", {"out_indices": (0, 1)}),
        ("out_indices", {"features_only": True, "out_indices": (0, 4)}),
        ("out_indices", {"features_only": True, "out_indices": (1, -3)}),
        ("out_indices", {"features_only": True, "out_indices": ()}),
    ],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=rf"{name} is .*"):
        ConvNeXt(**{**SMALL, **arguments})


@each_version
@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 4, 64, 64), (2, 3, 64)], ids=str)
def test_images_of_wrong_shape_are_named(build, shape):
    with pytest.raises(ValueError, match=r"images have shape .*; \(N, 3, H, W\) is allowed"):
        build()(torch.randn(shape))


def test_images_too_small_are_named():
    with pytest.raises(ValueError, match=r"images are 31×40 pixels; at least 32×32 is allowed"):
        VERSIONS["v1"]()(torch.randn(1, 3, 31, 40))


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"name is 'convnext_medium'; allowed: convnext_atto, "):
        convnext_fast.create_model("convnext_medium")


# -- sizes, heads, features ------------------------------------------------------------------------------------------


@each_version
@pytest.mark.parametrize("size", [(32, 32), (61, 75), (64, 33)], ids=str)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_any_image_size_and_number_of_channels(build, size, in_chans):
    assert build(in_chans=in_chans)(torch.randn(2, in_chans, *size)).shape == (2, 5)


def test_kernel_and_patch_size():
    model = ConvNeXt(**SMALL, kernel_size=11, patch_size=1)
    assert model.stages[0][0].dwconv.weight.shape == (8, 1, 11, 11)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    "out_indices, channels",
    [(None, [8, 12, 16, 20]), ((1, 3), [12, 20]), ((-1, 0), [20, 8]), ((1, 0), [12, 8])],
)
def test_features_only(out_indices, channels):
    model = ConvNeXt(**SMALL, features_only=True, out_indices=out_indices)
    whole = ConvNeXt(**SMALL)
    assert not [k for k in model.state_dict() if k.startswith(("norm.", "head."))]
    missing = whole.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    x = torch.randn(2, 3, 64, 96)
    maps = model(x)
    assert [m.shape[1] for m in maps] == channels
    for m, i in zip(maps, out_indices or range(4), strict=True):
        info = model.feature_info[i]
        assert m.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
        assert dict(model.named_modules())[info["module"]] is model.stages[i]
    for m, expected in zip(maps, whole.forward_maps(x, out_indices), strict=True):
        assert torch.equal(m, expected)
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())  # DistributedDataParallel wants no idle ones
    with pytest.raises(ValueError, match="features_only"):
        model.forward_features(x)
    with pytest.raises(ValueError, match="features_only"):
        model.reset_classifier(3)


@each_version
def test_reset_classifier(build):
    model, x = build(), torch.randn(2, 3, 64, 64)
    model.to(torch.float64)
    model.reset_classifier(9)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model(x.double()).shape == (2, 9)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    model.reset_classifier(0)
    assert torch.equal(model(x.double()), model.forward_features(x.double()))
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)
    assert build(num_classes=0)(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", convnext_fast.list_models())
def test_every_network_builds_on_meta_and_has_shapes_there(name):
    with torch.device("meta"):
        model = convnext_fast.create_model(name, num_classes=11, drop_path_rate=0.1)
        assert model(torch.randn(2, 3, 64, 96)).shape == (2, 11)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert getattr(convnext_fast, name).__name__ == name
    made = convnext_fast.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}


# -- the block: fused and one module after another --------------------------------------------------------------------


def call_children(block, x):
    """The block as its modules compute it."""
    return x + block._branch(x)


@pytest.mark.parametrize("use_grn", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fused_block_equals_its_modules(use_grn, backend):
    block = randomised(Block(12, layer_scale_init_value=0.0 if use_grn else 1.0, use_grn=use_grn)).double()
    x = torch.randn(2, 12, 9, 10, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    with dk.backend(backend):
        y = block(x)
    expected = call_children(block, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    assert_all_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), 1e-10)


@pytest.mark.parametrize("child", ["dwconv", "norm", "pwconv1", "act", "grn", "pwconv2", "drop_path"])
def test_hooks_on_children_of_a_block_are_called(child):
    """Grad-CAM and feature extractors put hooks on these."""
    block, seen = randomised(Block(6, drop_path=0.1, use_grn=True)).eval(), []
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    expected = block(x)
    getattr(block, child).register_forward_hook(lambda *_: seen.append("forward"))
    getattr(block, child).register_full_backward_hook(lambda *_: seen.append("backward"))
    y = block(x)
    y.sum().backward()
    assert seen == ["forward", "backward"]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def reflecting():
    return nn.Conv2d(6, 6, 7, padding=3, groups=6, padding_mode="reflect")


def dense():
    return nn.Conv2d(6, 6, 7, padding=3)


def patched():
    conv = nn.Conv2d(6, 6, 7, padding=3, groups=6)
    conv._conv_forward = lambda x, weight, bias: 2 * x
    return conv


@pytest.mark.parametrize("make", [reflecting, dense, patched])
def test_convolutions_that_are_no_plain_depthwise_ones_are_called(make):
    block, x = randomised(Block(6)), torch.randn(2, 6, 8, 8)
    block.dwconv = make()
    torch.testing.assert_close(block(x), call_children(block, x))


def test_norms_kept_in_fp32_are_left_to_the_modules():
    block = randomised(Block(6)).bfloat16()
    block.norm.float()
    x = torch.randn(2, 6, 8, 8).bfloat16()
    assert torch.equal(block(x), call_children(block, x))
    with torch.autocast("cpu", torch.bfloat16), dk.backend("reference"):
        assert "Function" in type(block(x).grad_fn).__name__  # under autocast they are the operator's business


class LowRank(nn.Module):
    """What LoRA puts in the place of a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_replaced_children_are_called():
    block, x = randomised(Block(6)), torch.randn(2, 6, 8, 8)
    before = block(x)
    block.pwconv1 = LowRank(block.pwconv1)
    y = block(x)
    assert not torch.allclose(y, before)
    y.sum().backward()
    assert block.pwconv1.up.weight.grad.abs().max() > 0
    quick = randomised(Block(6))
    exact = quick(x)
    quick.act = nn.GELU(approximate="tanh")
    assert not torch.equal(quick(x), exact)
    dilated = randomised(Block(6))
    dilated.dwconv.dilation, dilated.dwconv.padding = (2, 2), (6, 6)
    torch.testing.assert_close(dilated(x), call_children(dilated, x))


@each_version
def test_memory_policy_reaches_the_operator_and_changes_nothing(build):
    x, results = torch.randn(2, 3, 64, 64), []
    for memory in ("default", "lean", "fast"):
        torch.manual_seed(0)
        model = randomised(build(memory=memory))
        with dk.backend("reference"):
            results.append(gradients(model, x))
    assert_all_close(results[1], results[0])
    assert_all_close(results[2], results[0])


# -- drop path, checkpointing ----------------------------------------------------------------------------------------


def test_drop_path_draws_per_image_and_keeps_the_mean():
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 2, 3))
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    drop.drop_prob = 1.0
    assert drop(torch.ones(5)).tolist() == [0.0] * 5
    drop.drop_prob = 0.1
    assert drop.row_scale(torch.ones(5, dtype=torch.bfloat16)).max().item() == pytest.approx(1 / 0.9, rel=1e-6)
    assert drop.eval()(torch.ones(5)).tolist() == [1.0] * 5
    assert drop.row_scale(torch.ones(5)) is None


@each_version
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_grad_checkpointing_draws_the_same_images(build, backend):
    model, x = randomised(build(drop_path_rate=0.5)), torch.randn(4, 3, 64, 64)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(7)
        with dk.backend(backend):
            results.append(gradients(model, x))
    assert_all_close(*results, 1e-5)
    torch.manual_seed(8)
    assert not torch.equal(results[0][0], gradients(model, x)[0])  # the draws do depend on the seed


def test_grad_checkpointing_saves_memory():
    def saved(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(1, 3, 64, 64))
        return sum(sizes)

    model = VERSIONS["v1"]()
    before = saved(model)
    model.set_grad_checkpointing()
    assert saved(model) < before / 2


@pytest.mark.parametrize("half_residual", [False, True])
@pytest.mark.parametrize("use_grn", [False, True])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_half_residual_decides_the_dtype_between_blocks(half_residual, use_grn, drop_path):
    torch.manual_seed(0)
    settings = {"layer_scale_init_value": 0.0 if use_grn else 0.5, "use_grn": use_grn}
    block = Block(8, drop_path, half_residual=half_residual, **settings)
    hooked = copy.deepcopy(block)
    hooked.pwconv1.register_forward_hook(lambda *_: None)  # which has its children called one after another
    x = torch.randn(4, 8, 5, 5)
    for module in (block, hooked):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == (torch.bfloat16 if half_residual else torch.float32)
        torch.manual_seed(1)
        torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)
    assert block(x).dtype == torch.float32
    assert torch.equal(block.eval()(x), convnext_block_without_it(block)(x))


def convnext_block_without_it(block):
    block = copy.deepcopy(block)
    block.half_residual = False
    return block


@pytest.mark.parametrize("build", [convnext_fast.convnext_atto, convnext_fast.convnext_isotropic_small])
def test_half_residual_is_an_option_of_all_networks(build):
    model = build(half_residual=True, num_classes=3)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert blocks
    assert all(block.half_residual for block in blocks)


def test_half_residual_on_the_meta_device():
    block = Block(8, half_residual=True, device="meta")
    assert block(torch.empty(1, 8, 5, 5, device="meta")).shape == (1, 8, 5, 5)
