"""ConvMixer against timm's: names, initial weights, results and gradients; the original repository's checkpoints."""

import pytest
import torch
from torch import nn

import convnext_fast
from convnext_fast import CheckpointError, ConvMixer, load_checkpoint

from .small_models import assert_all_close, gradients, with_statistics

SMALL = {"dim": 12, "depth": 3, "kernel_size": 5, "patch_size": 4, "num_classes": 6}


def timm_convmixer(**kwargs):
    return pytest.importorskip("timm.models.convmixer").ConvMixer(**{**SMALL, **kwargs})


def original_convmixer(dim, depth, kernel_size, patch_size, num_classes):
    """The module tree of the original repository, whose names are numbers; ``fn`` is what is added to its input."""

    class Residual(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn = fn

        def forward(self, x):
            return x + self.fn(x)

    def after(conv):
        return conv, nn.GELU(), nn.BatchNorm2d(dim)

    def block():
        depthwise = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim)
        return nn.Sequential(Residual(nn.Sequential(*after(depthwise))), *after(nn.Conv2d(dim, dim, 1)))

    stem = after(nn.Conv2d(3, dim, patch_size, stride=patch_size))
    blocks = [block() for _ in range(depth)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, num_classes))


@pytest.mark.parametrize(
    "kwargs", [{}, {"act_layer": nn.ReLU, "kernel_size": 7, "in_chans": 1}, {"global_pool": "max"}]
)
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_timm(kwargs, training):
    peer = with_statistics(timm_convmixer(**kwargs)).double().train(training)
    model = ConvMixer(**{**SMALL, **kwargs}).double().train(training)
    model.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(4, kwargs.get("in_chans", 3), 26, 33, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(model, x), gradients(peer, x)
    # In training, a bias before a batch norm has no gradient but rounding.
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * largest)
    peer.load_state_dict(model.state_dict(), strict=True)
    for a, b in zip(model.buffers(), peer.buffers(), strict=True):
        assert torch.equal(a, b), "running statistics"


def test_the_same_seed_gives_the_same_weights_and_fp32_results_as_timm():
    torch.manual_seed(1)
    peer = timm_convmixer()
    torch.manual_seed(1)
    model = ConvMixer(**SMALL)
    assert list(model.state_dict()) == list(peer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), peer.parameters(), strict=True))
    x = torch.randn(3, 3, 32, 32)
    model.eval(), peer.eval()
    assert_all_close([model(x)], [peer(x)])
    assert_all_close(gradients(model, x), gradients(peer, x))


@pytest.mark.parametrize("name", ["convmixer_768_32", "convmixer_1536_20", "convmixer_1024_20_ks9_p14"])
def test_published_networks_have_timms_names_shapes_and_activations(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        peer, model = timm.create_model(name), convnext_fast.create_model(name)
    shapes = [[(key, tuple(t.shape)) for key, t in network.state_dict().items()] for network in (peer, model)]
    assert shapes[0] == shapes[1]
    assert type(model.stem[1]) is type(peer.stem[1])
    assert model.blocks[0][0].fn[0].kernel_size == peer.blocks[0][0].fn[0].kernel_size


def test_checkpoints_of_the_original_repository():
    peer = with_statistics(original_convmixer(**SMALL)).eval()
    model = ConvMixer(**SMALL).eval()
    report = load_checkpoint(model, {"state_dict": {f"module.{key}": t for key, t in peer.state_dict().items()}})
    assert (report.fits, report.dialect) == (True, "original ConvMixer")
    x = torch.randn(2, 3, 24, 28)
    with torch.no_grad():
        assert_all_close([model(x)], [peer(x)])
    headless = ConvMixer(**{**SMALL, "num_classes": 0})
    assert load_checkpoint(headless, peer.state_dict()).dropped == ("8.weight", "8.bias")
    without = {key: t for key, t in peer.state_dict().items() if not key.startswith("8.")}  # the last number: a block
    assert load_checkpoint(headless, without).dropped == ()
    with pytest.raises(CheckpointError, match=r"missing +head\.weight"):
        load_checkpoint(model, without)


def test_a_checkpoint_that_does_not_fit_says_what_to_build():
    state = ConvMixer(**SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r"depthwise kernels are 5×5, .* see its argument kernel_size=5\."):
        load_checkpoint(ConvMixer(**{**SMALL, "kernel_size": 9}), state)
    with pytest.raises(CheckpointError, match="different numbers of classes: build the model with num_classes=6"):
        load_checkpoint(ConvMixer(**{**SMALL, "num_classes": 7}), state)
    with pytest.raises(CheckpointError, match=r"missing +blocks\.3\.0\.fn\.0\.weight +\(12, 1, 5, 5\)"):
        load_checkpoint(ConvMixer(**{**SMALL, "depth": 4}), state)
    with pytest.raises(CheckpointError, match="the model is a ConvMixer, and this is of a DWNet"):
        load_checkpoint(ConvMixer(**SMALL), convnext_fast.dwnet_tiny(device="meta").state_dict())
    with pytest.raises(CheckpointError, match="these are not the parameters of a ConvNeXt"):
        load_checkpoint(convnext_fast.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4)), state)


@pytest.mark.parametrize("name, value", [
    ("dim", 0), ("depth", 0), ("kernel_size", 8), ("kernel_size", "9"), ("patch_size", 0), ("global_pool", "avgmax"),
    ("drop_rate", 1.0), ("drop_path_rate", -0.1), ("in_chans", 0), ("num_classes", -1), ("depth", True),
])  # fmt: skip
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?; .* allowed"):
        ConvMixer(**{**SMALL, name: value})
