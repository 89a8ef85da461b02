"""ConvNeXt computes what the original, timm, torchvision and Hugging Face compute from the same parameters.

Parameters travel by `convert_state_dict` in both directions, so this is also the proof of its tables: with every
parameter random, an exchanged, forgotten or wrongly shaped one changes logits or a gradient.
"""

import re

import pytest
import torch
from torch import Tensor, nn

import convnext_fast
from convnext_fast.checkpoint import convert_state_dict, load_checkpoint

from .networks import (
    CLASSIFIERS,
    DIMS,
    OriginalIsotropic,
    dinov3,
    huggingface,
    images,
    logits_of,
    ours,
    randomise,
    timm,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def match_final_eps(model: nn.Module, peer: nn.Module) -> None:
    """Hugging Face's last norm has ε = 1e-12, everybody else's 1e-6; a checkpoint does not say."""
    for name, module in peer.named_modules():
        if name in ("convnext.layernorm", "convnextv2.layernorm"):
            model.norm.eps = module.eps


def assert_same(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest expected value, which must not be zero."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} and {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    assert scale > 0, f"{what} is all zero and proves nothing"
    error = (got - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what} differs by {error:.2e} of its largest value"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_parity(model: nn.Module, peer: nn.Module, dialect: str, x: Tensor) -> None:
    """Equal outputs, and equal gradients of every parameter and of the images, after the peer's went the same way."""
    x_ours, x_peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = logits_of(model, x_ours), logits_of(peer, x_peer)
    assert_same(y, expected, "output")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    y.backward(dy)
    expected.backward(dy)
    assert_same(x_ours.grad, x_peer.grad, "gradient of the images")
    theirs = convert_state_dict(gradients(peer), to="facebook", like=model)
    mine = gradients(model)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_same(mine[name], theirs[name], f"gradient of {name}")
    back = convert_state_dict(mine, to=dialect, like=peer)
    for name, grad in gradients(peer).items():
        assert_same(back[name], grad, f"gradient of the peer's {name}")


@pytest.mark.parametrize("size", [(64, 64), (61, 75)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_from_peer(name, size):
    dialect, v2, build = CLASSIFIERS[name]
    peer, model = randomise(build()), ours(v2=v2).eval()
    converted = convert_state_dict(peer.state_dict(), to="facebook")
    model.load_state_dict(converted, strict=True)
    match_final_eps(model, peer)
    assert_parity(model, peer, dialect, images(2, *size))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_peer_from_ours(name):
    dialect, v2, build = CLASSIFIERS[name]
    peer, model = build().eval(), randomise(ours(v2=v2), seed=1)
    peer.load_state_dict(convert_state_dict(model.state_dict(), to=dialect, like=peer), strict=True)
    match_final_eps(model, peer)
    assert_parity(model, peer, dialect, images(2, 70, 39))


@pytest.mark.parametrize("layer_scale", [False, True])
def test_isotropic_from_original(layer_scale):
    peer = randomise(OriginalIsotropic(layer_scale))
    model = convnext_fast.ConvNeXtIsotropic(
        depth=3, dim=24, num_classes=7, layer_scale_init_value=1e-6 if layer_scale else 0.0
    )
    model.load_state_dict(peer.state_dict(), strict=True)
    assert_parity(model.eval(), peer, "facebook", images(2, 50, 67))


@pytest.mark.parametrize("v2", [False, True])
def test_pooled_features_from_bare_huggingface(v2):
    peer = randomise(huggingface(v2=v2, kind="Model"))
    model = ours(v2=v2, num_classes=0).eval()
    load_checkpoint(model, peer.state_dict())
    model.norm.eps = peer.layernorm.eps
    assert_parity(model, peer, "huggingface", images())


def test_pooled_features_from_dinov3():
    peer = randomise(dinov3())
    model = ours(num_classes=0).eval()
    load_checkpoint(model, peer.state_dict())
    assert_parity(model, peer, "dinov3", images())


def test_maps_from_dinov3_backbone():
    peer = randomise(dinov3("Backbone"))
    model = ours(features_only=True).eval()
    load_checkpoint(model, peer.state_dict())
    with torch.no_grad():
        hidden = peer.model(images(), output_hidden_states=True).hidden_states
        for i, (got, expected) in enumerate(zip(model(images()), hidden[-4:], strict=True)):
            assert_same(got, expected, f"map {i}")


def test_maps_from_timm_features_only():
    timm_module = pytest.importorskip("timm")
    peer = timm_module.create_model("test_convnext", features_only=True, norm_eps=1e-6, act_layer="gelu")
    randomise(peer)
    dims = peer.feature_info.channels()
    depths = [
        sum(name.endswith("conv_dw.weight") and f"stages_{i}." in name for name in peer.state_dict()) for i in range(4)
    ]
    model = ours(depths=depths, dims=dims, features_only=True).eval()
    load_checkpoint(model, peer.state_dict())
    with torch.no_grad():
        for i, (got, expected) in enumerate(zip(model(images()), peer(images()), strict=True)):
            assert_same(got, expected, f"map {i}")


@pytest.mark.parametrize("v2", [False, True])
def test_training_drops_the_same_paths_as_timm(v2):
    peer = randomise(timm(v2=v2, drop_path_rate=0.3)).train()
    model = ours(v2=v2, drop_path_rate=0.3).train()
    load_checkpoint(model, peer.state_dict())
    x, outputs = images(16, 32, 32), []
    for network in (model, peer):
        torch.manual_seed(3)
        outputs.append(network(x))
        outputs[-1].square().sum().backward()
    assert_same(*outputs, "logits")
    with torch.no_grad():
        assert (outputs[0] - model.eval()(x)).abs().max() > 1e-2, "nothing was dropped"
    theirs = convert_state_dict(gradients(peer), to="facebook", like=model)
    for name, grad in gradients(model).items():
        assert_same(grad, theirs[name], f"gradient of {name}")


def test_final_eps_is_all_that_huggingface_does_differently():
    peer, model = randomise(huggingface()), ours().eval()
    load_checkpoint(model, peer.state_dict())
    assert (peer.convnext.layernorm.eps, model.norm.eps) == (1e-12, 1e-6)
    with torch.no_grad():
        assert_same(model(images()), peer(images()).logits, "logits", tolerance=1e-4)


# Full size, on the meta device: names, shapes and numbers only.

PARAMETERS_IN_MILLIONS = {  # as published: the papers, their repositories, timm's for V1 atto to nano
    "convnext_atto": 3.70, "convnext_femto": 5.22, "convnext_pico": 9.05, "convnext_nano": 15.59,
    "convnext_tiny": 28.589128, "convnext_small": 50.22, "convnext_base": 88.59, "convnext_large": 197.77,
    "convnext_xlarge": 350.20, "convnext_isotropic_small": 22.3, "convnext_isotropic_base": 87.1,
    "convnext_isotropic_large": 305.9, "convnextv2_atto": 3.71, "convnextv2_femto": 5.23, "convnextv2_pico": 9.07,
    "convnextv2_nano": 15.62, "convnextv2_tiny": 28.64, "convnextv2_small": 50.32, "convnextv2_base": 88.72,
    "convnextv2_large": 197.96, "convnextv2_huge": 660.29, "convmixer_1536_20": 51.6, "convmixer_768_32": 21.1,
    "convmixer_1024_20_ks9_p14": 24.4, "dwnet_tiny": 24, "dwnet_base": 74, "replknet_31b": 79.864168,
    "replknet_31l": 172.671016, "replknet_xl": 335.435752,  # these of mmpretrain
}  # fmt: skip


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return convnext_fast.create_model(name, **kwargs)


def shapes(state_dict: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in state_dict.items()]


def test_every_network_has_a_published_size():
    assert sorted(PARAMETERS_IN_MILLIONS) == sorted(convnext_fast.list_models())


@pytest.mark.parametrize("name", PARAMETERS_IN_MILLIONS)
def test_number_of_parameters(name):
    published = PARAMETERS_IN_MILLIONS[name]
    digits = len(str(published).partition(".")[2])
    if name == "convnext_tiny":
        digits = 6
    assert round(sum(p.numel() for p in on_meta(name).parameters()) / 1e6, digits) == published


@pytest.mark.parametrize("name", [name for name in PARAMETERS_IN_MILLIONS if re.match("convnext(v2)?_[^i]", name)])
def test_names_and_shapes_of_timm(name):
    """Without ``like``: the dialect's published network, its 1×1 convolutions and its order included."""
    timm_module = pytest.importorskip("timm")
    with torch.device("meta"):
        peer = timm_module.create_model(name)
    state = on_meta(name).state_dict()
    assert shapes(convert_state_dict(state, to="timm")) == shapes(peer.state_dict())
    assert shapes(convert_state_dict(peer.state_dict(), to="facebook")) == shapes(state)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_names_and_shapes_of_torchvision(size):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        peer = getattr(models, f"convnext_{size}")()
    state = on_meta(f"convnext_{size}").state_dict()
    assert shapes(convert_state_dict(state, to="torchvision")) == shapes(peer.state_dict())
    assert shapes(convert_state_dict(peer.state_dict(), to="facebook")) == shapes(state)


@pytest.mark.parametrize("kind", ["ForImageClassification", "Model"])
@pytest.mark.parametrize("v2", [False, True])
def test_names_and_shapes_of_huggingface(v2, kind):
    transformers = pytest.importorskip("transformers")
    version = "V2" if v2 else ""
    config = getattr(transformers, f"ConvNext{version}Config")(num_labels=1000)  # the default is tiny
    with torch.device("meta"):
        peer = getattr(transformers, f"ConvNext{version}{kind}")(config)
    state = on_meta(f"convnext{version.lower()}_tiny", num_classes=1000 if kind != "Model" else 0).state_dict()
    assert shapes(convert_state_dict(state, to="huggingface")) == shapes(peer.state_dict())
    assert shapes(convert_state_dict(peer.state_dict(), to="facebook")) == shapes(state)


def test_names_and_shapes_of_dinov3():
    transformers = pytest.importorskip("transformers", minversion="4.56")
    with torch.device("meta"):
        peer = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig())
    state = on_meta("convnext_tiny", num_classes=0).state_dict()
    assert shapes(convert_state_dict(state, to="dinov3")) == shapes(peer.state_dict())
    assert shapes(convert_state_dict(peer.state_dict(), to="facebook")) == shapes(state)


def test_small_networks_differ_in_every_width():
    """So that tables which mix up stages cannot pass above."""
    assert len(set(DIMS)) == 4
