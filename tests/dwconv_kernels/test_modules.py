"""``DepthwiseConv2d`` and ``LayerNormLinear``: drop-in for what they replace."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dwconv_kernels as dk


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": (1, 11), "padding": (0, 5), "bias": False},
        {"kernel_size": 5, "stride": 2, "padding": 2},
        {"kernel_size": 4, "padding": "same", "dilation": 3},
        {"kernel_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_depthwise_conv2d_is_nn_conv2d(settings, backend):
    peer = nn.Conv2d(6, 6, groups=6, **settings)
    ours = dk.DepthwiseConv2d(6, 6, **settings)
    assert isinstance(ours, nn.Conv2d)
    ours.load_state_dict(peer.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(peer.state_dict())
    for x in (torch.randn(2, 6, 13, 12), torch.randn(6, 13, 12)):
        with dk.backend(backend):
            torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)
    assert repr(ours).replace("DepthwiseConv2d", "Conv2d") == repr(peer)


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ((4, 8, 3), {}, r"out_channels is 8; .*in_channels=4 is allowed"),
        ((4, 4, 3), {"groups": 2}, r"groups is 2; .*in_channels=4"),
        ((4, 4, 3), {"padding_mode": "circular"}, r"padding_mode is 'circular'; \"zeros\""),
    ],
)
def test_depthwise_conv2d_refuses_what_it_cannot_do(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        dk.DepthwiseConv2d(*arguments, **settings)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layer_norm_linear_is_the_sequence_it_replaces(activation, bias, backend):
    peer = nn.Sequential(nn.LayerNorm(7, eps=1e-6), nn.Linear(7, 5, bias=bias), *([nn.GELU()] if activation else []))
    nn.init.normal_(peer[0].weight)
    nn.init.normal_(peer[0].bias)
    ours = dk.LayerNormLinear(7, 5, bias=bias, activation=activation)
    ours.load_state_dict(peer.state_dict(), strict=True)
    x = torch.randn(2, 3, 7)
    with dk.backend(backend):
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)


def test_layer_norm_linear_refuses_other_activations():
    with pytest.raises(ValueError, match=r"activation is 'silu'; None or \"gelu\" is allowed"):
        dk.LayerNormLinear(7, 5, activation="silu")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hook(module):
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    return seen


@pytest.mark.parametrize("child", [0, 1, 2])
def test_hooks_on_children_are_called(child):
    module = dk.LayerNormLinear(7, 5, activation="gelu")
    x = torch.randn(3, 7, requires_grad=True)
    expected = module(x)
    seen = hook(module[child])
    with dk.backend("reference"):
        y = module(x)
        y.sum().backward()
    assert seen == ["pre", "forward", "backward"]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_replaced_and_parametrised_children_are_called():
    x = torch.randn(3, 7)
    module = dk.LayerNormLinear(7, 5)
    expected = module(x)
    replaced = copy.deepcopy(module)
    replaced[1] = Doubled(7, 5)
    replaced[1].load_state_dict(module[1].state_dict())
    torch.testing.assert_close(replaced(x), 2 * expected)
    nn.init.zeros_(module[1].bias)
    expected = module(x)
    parametrize.register_parametrization(module[1], "weight", Twice())
    torch.testing.assert_close(module(x), 2 * expected)
    patched = dk.LayerNormLinear(7, 5)
    patched[1].forward = lambda x: x[..., :5]
    assert torch.equal(patched(x), patched[0](x)[..., :5])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_changes_after_construction_are_seen(backend):
    module, x = dk.DepthwiseConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    peer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    peer.load_state_dict(module.state_dict())
    for conv in (module, peer):  # what makes a network's pictures tile
        conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    with dk.backend(backend):
        torch.testing.assert_close(module(x), peer(x))
        module._conv_forward = lambda x, weight, bias: x + 1
        assert torch.equal(module(x), x + 1)


class Quantised(torch.Tensor):
    """A weight with functions of its own, as torchao's: PyTorch's functions know it, nobody else's do."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (nn.functional.linear, nn.functional.conv2d):
            args = [a.values if isinstance(a, cls) else a for a in args]
            return function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} does not know this kind of tensor")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensor_classes_with_functions_of_their_own(backend):
    module, x = dk.LayerNormLinear(7, 5, activation="gelu"), torch.randn(3, 7)
    conv, image = dk.DepthwiseConv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    expected = [module(x).detach(), conv(image).detach()]
    norm, linear = module[0], module[1]
    for child in (linear, conv):
        weight = Quantised(child.weight.detach())
        del child.weight
        child.register_parameter("weight", None)
        child._parameters["weight"] = weight
    with torch.no_grad(), dk.backend(backend):
        torch.testing.assert_close(module(x), expected[0])
        torch.testing.assert_close(conv(image), expected[1])
        y = dk.layer_norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, activation="gelu")
    torch.testing.assert_close(y, expected[0])


def test_slices_are_ordinary_sequences():
    module, x = dk.LayerNormLinear(7, 5, activation="gelu"), torch.randn(3, 7)
    assert type(module[:2]) is nn.Sequential
    torch.testing.assert_close(module[2:](module[:2](x)), module(x))
    assert module[-1] is module[2]


def test_norms_kept_in_fp32_are_left_to_the_modules():
    module = dk.LayerNormLinear(7, 5).bfloat16()
    module[0].float()
    x = torch.randn(3, 7).bfloat16()
    assert torch.equal(module(x), module[1](module[0](x)))


@pytest.mark.parametrize("kind", ["depthwise", "norm_linear"])
def test_traced_modules_pickle(kind):
    module, x = dk.DepthwiseConv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    if kind == "norm_linear":
        module, x = dk.LayerNormLinear(7, 5), torch.randn(2, 7)
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module)))
    torch.testing.assert_close(traced(x), module(x))


def test_global_hooks_are_called():
    module, seen = dk.LayerNormLinear(7, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        module(torch.randn(3, 7))
    finally:
        handle.remove()
    assert seen == ["LayerNorm", "Linear", "LayerNormLinear"]


def test_modules_survive_copying_pickling_and_meta():
    for module, x in (
        (dk.DepthwiseConv2d(4, 4, 3), torch.randn(1, 4, 6, 6)),
        (dk.LayerNormLinear(7, 5), torch.randn(2, 7)),
    ):
        module(x).sum().backward()
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), module(x))
    with torch.device("meta"):
        assert dk.DepthwiseConv2d(4, 4, 3)(torch.randn(1, 4, 6, 6)).shape == (1, 4, 4, 4)
        assert dk.LayerNormLinear(7, 5)(torch.randn(2, 7)).shape == (2, 5)
    with dk.backend("reference"), torch.device("meta"):
        assert dk.DepthwiseConv2d(4, 4, 3)(torch.randn(1, 4, 6, 6)).shape == (1, 4, 4, 4)
