"""How accelerated blocks are called: by name or with more than a map, in which layouts, by whoever kept a method."""

import inspect

import pytest
import torch
from torch import nn

import convnext_fast
import dwconv_kernels as dk
from convnext_fast.class_swap import swap_of

from .test_accelerate import operators_of
from .test_accelerate_forks import DIM, Block, Optional, TheSame, network


@pytest.mark.parametrize("library", ["timm", "torchvision", "original"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_layouts_of_results(library, layout):
    """A sum takes the layout of its first operand, which is the branch in timm's and torchvision's blocks."""
    if library == "timm":
        block = pytest.importorskip("timm").models.convnext.ConvNeXtBlock(DIM)
    elif library == "torchvision":
        block = pytest.importorskip("torchvision.models.convnext").CNBlock(DIM, 1.0, 0.0)
    else:
        block = Block()
    x = torch.randn(2, DIM, 6, 5).contiguous(memory_format=layout)
    expected = block(x).stride()
    convnext_fast.accelerate(block)
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            assert block(x).stride() == expected


def test_signatures_are_kept():
    """Exporters, tracers and callers by keyword go by the name of the argument."""
    block, x = TheSame(), torch.randn(2, DIM, 8, 8)
    conv = nn.Conv2d(DIM, DIM, 7, groups=DIM)
    convnext_fast.accelerate(nn.Sequential(block, conv))
    with dk.backend("torch"):
        torch.testing.assert_close(block(features=x), block(x))
        torch.testing.assert_close(conv(input=x), conv(x))
        with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
            block(x=x)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))
    program = torch.export.export(block, (x,), dynamic_shapes={"features": {0: torch.export.Dim("n", min=2)}})
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"][-1] == "features"
    traced = torch.jit.trace(block, example_kwarg_inputs={"features": x})
    torch.testing.assert_close(traced(features=x), block(x))


def test_calls_with_more_than_a_map():
    block, plain = Optional(), Optional()
    plain.load_state_dict(block.state_dict())
    convnext_fast.accelerate(block)
    x = torch.randn(2, DIM, 8, 8)
    with dk.backend("torch"):
        for args, kwargs in (((), {}), ((x * 0 + 2,), {}), ((), {"factor": 3}), ((), {"mask": x})):
            torch.testing.assert_close(block(x, *args, **kwargs), plain(x, *args, **kwargs))
    assert operators_of(block, x) == {"convnext_block": 1}
    assert inspect.signature(block.forward) == inspect.signature(plain.forward)
    shapes = {name: {0: torch.export.Dim("n", min=2)} for name in ("x", "mask")}
    program = torch.export.export(block, (x, x), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x, x), plain(x, x))


def test_methods_that_somebody_kept():
    """Wrappers on the instance, made while it was swapped, and still there after it was restored."""
    block, plain = Block(), Block()
    plain.load_state_dict(block.state_dict())
    convnext_fast.accelerate(block)
    kept = block.forward
    block.forward = lambda x: kept(x)
    assert convnext_fast.restore(block) == ["", "dwconv"]
    x = torch.randn(2, DIM, 8, 8)
    assert torch.equal(block(x), plain(x))


def test_memory_of_a_block_that_calls_its_children_for_now():
    model = network(Block())
    convnext_fast.accelerate(model)
    handle = model[2].norm.register_forward_hook(lambda *_: None)
    act, model[2].act = model[2].act, nn.SiLU()
    assert "for now by its own forward: norm has hooks" in str(convnext_fast.accelerate(model, memory="lean"))
    model[2].act = act
    handle.remove()
    assert swap_of(model[2]).settings.memory == "lean"
    assert operators_of(model) == {"convnext_block": 1}


def test_filter_is_asked_for_the_convolution_of_a_block():
    model = network(Block())
    report = convnext_fast.accelerate(model, lambda module, name: not isinstance(module, nn.Conv2d))
    assert [name for name, _ in report.swapped] == ["2"]
    assert type(model[2].dwconv) is nn.Conv2d
    assert operators_of(model) == {"convnext_block": 1}
