"""Children of blocks that are replaced, changed, watched or of another kind: they are called; the report says so."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import convnext_fast
import dwconv_kernels as dk
from convnext_fast.class_swap import is_swapped, unswap

from .accelerated import assert_all_close, assert_unchanged, outputs_and_gradients
from .networks import huggingface, images, randomise, timm
from .test_accelerate import BLOCKS, child, operators_of
from .test_accelerate_forks import DIM, changed


@pytest.fixture
def model():
    return randomise(timm())


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class HalfPath(nn.Module):
    drop_prob = 0.5

    def forward(self, x):
        return x * torch.empty_like(x).bernoulli_(0.5) * 2 if self.training else x


def replace(model, name, new):
    parent, _, last = name.rpartition(".")
    old = child(model, name)
    setattr(child(model, parent) if parent else model.stages[1].blocks[0], last, new)
    if {k: v.shape for k, v in new.state_dict().items()} == {k: v.shape for k, v in old.state_dict().items()}:
        new.load_state_dict(old.state_dict())


@pytest.mark.parametrize("name, new, reason", [
    ("norm", lambda: nn.GroupNorm(1, 12), "norm is torch.nn.modules.normalization.GroupNorm; a layer norm"),
    ("norm", lambda: Shifted(12), "Shifted; a layer norm over the channels is allowed"),
    ("mlp.act", nn.SiLU, r"mlp.act is SiLU\(\); GELU"),
    ("mlp.act", lambda: nn.GELU("tanh"), r"mlp.act is GELU\(approximate='tanh'\)"),
    ("mlp.fc1", lambda: nn.Sequential(nn.Linear(12, 48)), "mlp.fc1 is torch.nn.modules.container.Sequential"),
    ("mlp.fc2", lambda: nn.Conv2d(48, 12, 1, padding=1), "mlp.fc2 is torch.nn.modules.conv.Conv2d; nn.Linear or a 1×1"),
    ("shortcut", lambda: nn.Conv2d(12, 12, 1), "shortcut is torch.nn.modules.conv.Conv2d; nn.Identity or nn.Dropout"),
    ("drop_path", HalfPath, "HalfPath, which does not drop whole images"),
    ("drop_path", lambda: nn.Dropout(0.5), "Dropout, which does not drop whole images"),
    ("mlp.norm", lambda: nn.LayerNorm(48), "mlp.norm is torch.nn.modules.normalization.LayerNorm; nn.Identity"),
    ("mlp.drop1", lambda: nn.AlphaDropout(0.0), "mlp.drop1 is torch.nn.modules.dropout.AlphaDropout; nn.Identity"),
], ids=lambda value: getattr(value, "__name__", str(value))[:30])  # fmt: skip
def test_parts_that_are_none(model, name, new, reason):
    replace(model, name, new())
    report = convnext_fast.accelerate(model)
    (why,) = [why for module, why in report.skipped if module == "stages.1.blocks.0"]
    assert re.search(reason, why), why
    assert len(report.swapped) == BLOCKS
    assert ("stages.1.blocks.0.conv_dw", "depthwise convolution 7×7") in report.swapped


def test_a_further_child_is_not_overlooked(model):
    model.stages[1].blocks[0].adapter = nn.Linear(12, 12)
    report = convnext_fast.accelerate(model)
    assert report.skipped == [
        (
            "stages.1.blocks.0",
            "block: its child adapter (torch.nn.modules.linear.Linear) has no part in a ConvNeXt block",
        )
    ]


def test_other_epsilons(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.3
    assert_unchanged(model, images(), BLOCKS)
    v2 = randomise(timm(v2=True))
    v2.stages[1].blocks[0].mlp.grn.eps = 1e-2
    report = assert_unchanged(v2, images(), BLOCKS)
    assert report.skipped == [("stages.1.blocks.0", "block: the ε of mlp.grn is 0.01; 1e-06 is allowed")]


# What happens to children later, and is looked at in every call.


def hook(module):
    module.register_forward_hook(lambda *_: None)


def pre_hook(module):
    module.register_forward_pre_hook(lambda *_: None)


def backward_hook(module):
    module.register_full_backward_hook(lambda *_: None)


def tripled_forward(module):
    original = module.forward
    module.forward = lambda x: 3 * original(x)


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def parametrised(module):
    parametrize.register_parametrization(module, "weight", Tripled())


def circular(module):
    module.padding_mode, module._reversed_padding_repeated_twice = "circular", [3, 3, 3, 3]


@pytest.mark.parametrize("name, change, said", [
    *((name, change, f"{name} has hooks, or a forward")
      for name in ("conv_dw", "norm", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.fc2", "drop_path", "shortcut")
      for change in (hook, pre_hook, backward_hook)),
    ("mlp.fc1", tripled_forward, "mlp.fc1 has hooks, or a forward"),
    ("mlp.fc1", parametrised, "mlp.fc1 is torch.nn.utils.parametrize"),
    ("norm", lambda m: nn.utils.parametrizations.weight_norm(m, dim=None), "norm is torch.nn.utils.parametrize"),
    ("mlp.drop2", lambda m: setattr(m, "p", 0.5), None),
    ("conv_dw", circular, "conv_dw is Conv2d"),
    ("conv_dw", lambda m: m.__dict__.update(dilation=(2, 2), padding=(6, 6)), "conv_dw is Conv2d"),
], ids=lambda value: getattr(value, "__name__", str(value)[:20]))  # fmt: skip
def test_children_that_change_are_called(model, name, change, said):
    convnext_fast.accelerate(model)
    assert operators_of(model) == {"convnext_block": BLOCKS}
    change(child(model, name))
    if said is not None:
        ran = operators_of(model)
        assert ran["convnext_block"] == BLOCKS - 1
        (text,) = [what for module, what in convnext_fast.accelerate(model).swapped if module == "stages.1.blocks.0"]
        assert text.startswith("ConvNeXt V1 block of timm; for now by its own forward: ")
        assert said in text
    actual = outputs_and_gradients(model, images())
    with dk.backend("torch"):
        composed = outputs_and_gradients(model, images())
    for module in model.modules():  # `restore` would refuse what parametrisation derived from our class
        if is_swapped(module):
            unswap(module)
    expected = outputs_and_gradients(model, images())
    assert_all_close(actual, expected)
    assert_all_close(composed, expected)


def test_replaced_children_are_called(model):
    convnext_fast.accelerate(model)
    replace(model, "norm", Shifted(12))
    assert operators_of(model) == {"convnext_block": BLOCKS - 1, "depthwise_conv2d": 1}
    del model.stages[1].blocks[1].shortcut
    with pytest.raises(AttributeError, match="shortcut"):  # as the original says
        model(images())


def test_dropout_in_training_only(model):
    convnext_fast.accelerate(model)
    child(model, "mlp.drop1").p = 0.5
    assert operators_of(model) == {"convnext_block": BLOCKS}
    assert operators_of(model.train()) == {"convnext_block": BLOCKS - 1, "depthwise_conv2d": 1}
    report = convnext_fast.accelerate(model)
    assert "mlp.drop1 drops with p = 0.5" in dict(report.swapped)["stages.1.blocks.0"]


def test_hooks_on_all_modules(model):
    convnext_fast.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert operators_of(model) == {"depthwise_conv2d": BLOCKS}
    finally:
        handle.remove()
    assert operators_of(model) == {"convnext_block": BLOCKS}


def test_grad_cam(model):
    """The maps and gradients that hooks on a convolution and on a norm see are those of the network before."""

    def seen(network):
        got = {}
        for name in ("stages.3.blocks.0.conv_dw", "stages.3.blocks.0.norm"):
            module = network.get_submodule(name)
            module.register_forward_hook(lambda m, args, y, name=name: got.__setitem__(name, y))
            module.register_full_backward_hook(lambda m, gin, gout, name=name: got.__setitem__(name + "'", gout[0]))
        network(images())[:, 2].sum().backward()
        return [got[name].detach() for name in sorted(got)]

    expected = seen(copy.deepcopy(model))
    convnext_fast.accelerate(model)
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            actual = seen(copy.deepcopy(model))
        assert len(actual) == 4
        assert_all_close(actual, expected)


def test_instances_with_a_forward_of_their_own_are_left_alone(model):
    tripled_forward(model.stages[1].blocks[0])
    tripled_forward(model.stages[1].blocks[1].conv_dw)
    report = convnext_fast.accelerate(model)
    assert ("stages.1.blocks.0", "block: its forward was replaced on the instance") in report.skipped
    assert len(report.swapped) == BLOCKS


def test_parameters_of_several_dtypes():
    """Norms in fp32 inside a bf16 network: what comes out is for the modules to say."""
    model = randomise(huggingface())
    convnext_fast.accelerate(model)
    model.to(torch.bfloat16)
    block = model.convnext.encoder.stages[0].layers[0]
    x = torch.randn(1, 8, 8, 8, dtype=torch.bfloat16)
    assert operators_of(block, x) == {"convnext_block": 1}
    block.layernorm.float()
    assert operators_of(block, x) == {"depthwise_conv2d": 1}


def set_all(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("change", [
    lambda block: setattr(block, "norm", nn.LayerNorm((8, DIM))),
    lambda block: set_all(block.dwconv, padding=(2, 2), kernel_size=(5, 5), weight=parameter(DIM, 1, 5, 5)),
    lambda block: set_all(block.dwconv, groups=4, weight=parameter(DIM, 2, 7, 7)),
], ids=["norm", "kernel", "groups"])  # fmt: skip
def test_parts_that_change_shape(change):
    block = changed(norm=nn.LayerNorm(DIM))
    plain = copy.deepcopy(block)
    convnext_fast.accelerate(block)
    torch.manual_seed(0)
    change(block)
    torch.manual_seed(0)
    change(plain)
    x = torch.randn(2, DIM, 8, 8)
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-5)


def test_epsilon_of_a_grn_that_changes():
    timm = pytest.importorskip("timm")
    block = randomise(timm.create_model("convnextv2_atto")).stages[0].blocks[0]
    convnext_fast.accelerate(block)
    block.mlp.grn.eps = 0.5
    assert operators_of(block, torch.randn(1, 40, 8, 8)) == {"depthwise_conv2d": 1}
    assert "the ε of mlp.grn is 0.5" in str(convnext_fast.accelerate(block))


@pytest.mark.parametrize("probability", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_probabilities_that_change(probability):
    """A tensor is no number that the operator can ask for, and the block then calls its children."""
    timm = pytest.importorskip("timm")
    block = changed(drop_path=timm.layers.DropPath(0.1)).train()
    plain = copy.deepcopy(block)
    convnext_fast.accelerate(block)
    for b in (block, plain):
        b.drop_path.drop_prob = probability
    x, results = torch.randn(16, DIM, 8, 8), []
    for b in (block, plain):
        torch.manual_seed(0)
        with dk.backend("torch"):
            results.append(b(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], plain.eval()(x))


def test_half_precision_parameters_under_autocast_with_wider_maps():
    """torchvision adds in place, in the dtype of the branch; others add into the wider one."""
    models = pytest.importorskip("torchvision.models.convnext")
    block = models.CNBlock(DIM, 1.0, 0.0).to(torch.bfloat16)
    plain = copy.deepcopy(block)
    convnext_fast.accelerate(block)
    with torch.autocast("cpu", torch.bfloat16), dk.backend("torch"):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, DIM, 8, 8, dtype=dtype)
            assert block(x).dtype == plain(x).dtype == torch.bfloat16


def test_several_dtypes_are_reported():
    block = changed(norm=nn.LayerNorm(DIM)).to(torch.bfloat16)
    block.norm.float()
    assert "its parameters have several dtypes" in str(convnext_fast.accelerate(block))
