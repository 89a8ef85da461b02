"""DWNet: names and shapes of the authors' repository, and their formula written out on the names of a state_dict."""

import pytest
import torch
from torch.nn import functional as F

import convnext_fast
from convnext_fast import CheckpointError, DWNet, load_checkpoint

from .small_models import with_statistics

SMALL = {"embed_dim": 6, "depths": (1, 2), "patch_size": 2, "num_classes": 5, "drop_path_rate": 0.0}

# As models/dwnet.py of Atten4Vis/DemystifyLocalViT registers them: of one block, of a stage's end, of what is around.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BLOCK = [
    "attn2conv.conv0.weight", *(f"attn2conv.bn0.{leaf}" for leaf in NORM),
    "attn2conv.conv.weight", "attn2conv.conv.bias", *(f"attn2conv.bn.{leaf}" for leaf in NORM),
    "attn2conv.conv2.weight", *(f"attn2conv.bn2.{leaf}" for leaf in NORM),
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", *(f"bn.{leaf}" for leaf in NORM),
]  # fmt: skip
MERGING = ["downsample.reduction.weight", "downsample.norm.weight", "downsample.norm.bias"]
STEM = ["patch_embed.proj.weight", "patch_embed.proj.bias", "patch_embed.norm.weight", "patch_embed.norm.bias"]
HEAD = ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def published_names(depths):
    names = list(STEM)
    for i, depth in enumerate(depths):
        names += [f"layers.{i}.blocks.{j}.{name}" for j in range(depth) for name in BLOCK]
        names += [f"layers.{i}.{name}" for name in MERGING if i < len(depths) - 1]
    return names + HEAD


def test_names_and_shapes_of_the_tiny_network():
    state = convnext_fast.dwnet_tiny(device="meta").state_dict()
    assert list(state) == published_names((2, 2, 6, 2))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["patch_embed.proj.weight"] == (96, 3, 4, 4)
    for i, dim in enumerate((96, 192, 384, 768)):
        block = f"layers.{i}.blocks.1."
        assert shapes[block + "attn2conv.conv0.weight"] == shapes[block + "attn2conv.conv2.weight"] == (dim, dim, 1, 1)
        assert shapes[block + "attn2conv.conv.weight"] == (dim, 1, 7, 7)
        assert shapes[block + "attn2conv.conv.bias"] == shapes[block + "bn.running_var"] == (dim,)
        assert shapes[block + "mlp.fc1.weight"] == (4 * dim, dim)
        assert shapes[block + "mlp.fc2.weight"] == (dim, 4 * dim)
        if i < 3:
            assert shapes[f"layers.{i}.downsample.reduction.weight"] == (2 * dim, 4 * dim)
            assert shapes[f"layers.{i}.downsample.norm.weight"] == (4 * dim,)
    assert shapes["head.weight"] == (1000, 768)
    assert list(convnext_fast.dwnet_base(device="meta").state_dict()) == published_names((2, 2, 18, 2))


def written_out(state, x, depths, training):
    """DWNet's logits as functions of tensors (N, H, W, C), with every pixel of a 2×2 patch named."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def batch_norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def depthwise(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        return y.permute(0, 2, 3, 1)

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=2).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            y = F.relu(batch_norm(x @ state[f"{block}.attn2conv.conv0.weight"][..., 0, 0].T, f"{block}.attn2conv.bn0"))
            y = F.relu(batch_norm(depthwise(y, f"{block}.attn2conv.conv"), f"{block}.attn2conv.bn"))
            y = batch_norm(y @ state[f"{block}.attn2conv.conv2.weight"][..., 0, 0].T, f"{block}.attn2conv.bn2")
            x = x + y
            y = batch_norm(x, f"{block}.bn") @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
            x = x + F.gelu(y) @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
        if i < len(depths) - 1:
            corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = norm(torch.cat(corners, -1), f"layers.{i}.downsample.norm")
            x = x @ state[f"layers.{i}.downsample.reduction.weight"].T
    return norm(x, "norm").mean((1, 2)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("training", [False, True])
def test_equal_to_the_formula(training):
    model = with_statistics(DWNet(**SMALL)).double().train(training)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    parameters = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    x = torch.randn(3, 3, 24, 20, dtype=torch.float64)
    logits, expected = model(x), written_out(state, x, SMALL["depths"], training)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(logits)
    ours = torch.autograd.grad(logits, list(model.parameters()), dy)
    theirs = torch.autograd.grad(expected, list(parameters.values()), dy)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11 * largest, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_left_of_swin_equals_timms():
    """Patches, patch merging (of odd maps, too) and MLPs."""
    swin = pytest.importorskip("timm.models.swin_transformer").SwinTransformer(
        img_size=56, patch_size=2, embed_dim=6, depths=(1, 1), num_heads=(1, 1), window_size=7
    )
    model = DWNet(**{**SMALL, "depths": (1, 1)})
    patches = swin.patch_embed
    model.patch_embed.load_state_dict(patches.state_dict(), strict=True)
    x = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model.patch_embed(x), patches(x).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    merging = swin.layers[1].downsample
    model.layers[0].downsample.load_state_dict(merging.state_dict(), strict=True)
    for size in ((8, 6), (7, 9)):
        x = torch.randn(2, *size, 6)
        ours = model.layers[0].downsample(x.permute(0, 3, 1, 2))
        torch.testing.assert_close(ours, merging(x).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    mlp = swin.layers[0].blocks[0].mlp
    model.layers[0].blocks[0].mlp.load_state_dict(mlp.state_dict(), strict=True)
    torch.testing.assert_close(model.layers[0].blocks[0].mlp(x), mlp(x), rtol=1e-5, atol=1e-6)


def test_checkpoints_and_what_does_not_fit():
    model = with_statistics(DWNet(**SMALL))
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    other = DWNet(**{**SMALL, "num_classes": 0})
    report = load_checkpoint(other, {"model": {**state, "decode_head.weight": torch.zeros(2)}})
    assert (report.dialect, report.dropped) == (
        "DWNet", ("decode_head.weight", "backbone.head.weight", "backbone.head.bias"),
    )  # fmt: skip
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(CheckpointError, match=r"kernels are 7×7, .* see its argument window_size=7\."):
        load_checkpoint(DWNet(**{**SMALL, "window_size": 5}), state)


@pytest.mark.parametrize("name, value", [
    ("embed_dim", 0), ("depths", ()), ("depths", 3), ("window_size", 6), ("mlp_ratio", 0), ("drop_rate", -1.0),
    ("drop_path_rate", 1), ("patch_size", 0), ("in_chans", 0), ("num_classes", -1), ("mlp_ratio", 0.01),
    ("depths", (1, True)), ("depths", (1, "2")), ("embed_dim", True),
])  # fmt: skip
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; .* allowed"):
        DWNet(**{**SMALL, name: value})
    with pytest.raises(TypeError):
        DWNet(224)  # the original's first argument is the size of images
