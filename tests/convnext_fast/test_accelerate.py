"""What `accelerate` and `restore` do to modules, when a module's own forward runs, and what the report says of it."""

import collections
import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import convnext_fast
import dwconv_kernels as dk
from convnext_fast.class_swap import is_swapped, swap_of

from .accelerated import assert_all_close, assert_unchanged, outputs_and_gradients
from .networks import CLASSIFIERS, DEPTHS, VARIANTS, huggingface, images, ours, randomise, timm, torchvision

BLOCKS = sum(DEPTHS)


class Operators(TorchDispatchMode):
    """Counts the operators of this package that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.ran = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "dwconv_kernels":
            self.ran[name] += 1
        return function(*args, **(kwargs or {}))


def child(model, name):
    return model.get_submodule(f"stages.1.blocks.0.{name}")


def operators_of(model, x=None) -> dict[str, int]:
    with Operators() as operators, dk.backend("reference"), torch.no_grad():
        model(images() if x is None else x)
    return dict(operators.ran)


@pytest.fixture
def model():
    return randomise(timm())


@pytest.mark.parametrize("size", [(64, 64), (61, 75)])
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("ours")])
def test_small_networks_of_every_library(name, size):
    _, v2, build = VARIANTS[name]
    x = images(2, *size)
    report = assert_unchanged(randomise(build()), x, BLOCKS)
    assert not report.skipped
    assert all(f"ConvNeXt V{1 + v2} block of" in what for _, what in report.swapped)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_all_that_runs_are_the_operators(name):
    model = randomise(CLASSIFIERS[name][2]())
    expected = outputs_and_gradients(model, images())
    convnext_fast.accelerate(model)
    assert operators_of(model) == {"convnext_block": BLOCKS}
    with dk.backend("reference"):  # the hand-written gradients
        assert_all_close(outputs_and_gradients(model, images()), expected, 2e-5)


def test_on_a_cpu_nothing_is_computed_differently(model):
    expected = outputs_and_gradients(model, images())
    report = convnext_fast.accelerate(model)
    assert "on cpu, they run on torch" in str(report)
    assert all(map(torch.equal, outputs_and_gradients(model, images()), expected))


def test_classes_go_by_their_old_names(model):
    block, conv = model.stages[0].blocks[0], model.stages[0].blocks[0].conv_dw
    before, text = type(block), repr(model)
    convnext_fast.accelerate(model)
    for module, original in ((block, before), (conv, nn.Conv2d)):
        cls = type(module)
        assert cls is not original
        assert issubclass(cls, original)
        assert (cls.__name__, cls.__qualname__, cls.__module__) == (
            original.__name__, original.__qualname__, original.__module__
        )  # fmt: skip
    assert repr(model) == text
    names = convnext_fast.restore(model)
    assert type(block) is before
    assert type(conv) is nn.Conv2d
    assert names[:2] == ["stages.0.blocks.0", "stages.0.blocks.0.conv_dw"]
    assert len(names) == 2 * BLOCKS
    assert convnext_fast.restore(model) == []


@pytest.mark.parametrize("name", ["original", "timm-v2-conv", "torchvision", "huggingface", "dinov3"])
def test_copies_and_pickles_are_accelerated(name):
    model = randomise(VARIANTS[name][2]())
    convnext_fast.accelerate(model, memory="lean")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model, 0))]
    for other in copies:
        assert operators_of(other) == {"convnext_block": BLOCKS}
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        convnext_fast.restore(other)
        assert operators_of(other) == {}
    assert operators_of(model) == {"convnext_block": BLOCKS}, "copies are restored alone"


def test_modules_built_like_an_accelerated_one_are_ordinary(model):
    """What adapters do, and what DataParallel does."""
    convnext_fast.accelerate(model)
    conv = child(model, "conv_dw")
    built = type(conv)(4, 6, 3)
    assert type(built) is nn.Conv2d
    assert built(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
    bare = huggingface().convnext.encoder
    convnext_fast.accelerate(bare)
    block = bare.stages[0].layers[0]
    with pytest.raises(TypeError, match="missing"):
        type(block)()
    block.dwconv.__init__(8, 8, 7, groups=8)
    assert type(block.dwconv) is nn.Conv2d
    replica = model.stages[1].blocks[0]._replicate_for_data_parallel()
    assert type(replica) is type(model.stages[1].blocks[0])


def test_twice_is_once_with_other_settings(model):
    first = convnext_fast.accelerate(model)
    second = convnext_fast.accelerate(model, memory="lean")
    assert first.swapped == second.swapped
    assert swap_of(model.stages[0].blocks[0]).settings.memory == "lean"
    convnext_fast.restore(model)
    assert operators_of(model) == {}


def test_filter_and_table(model):
    seen = []

    def not_the_first_stage(module, name):
        seen.append((type(module).__name__, name))
        return not name.startswith("stages.0")

    report = convnext_fast.accelerate(model, not_the_first_stage)
    assert ("ConvNeXtBlock", "stages.0.blocks.0") in seen
    assert ("Conv2d", "stages.0.blocks.0.conv_dw") in seen
    assert report.skipped == [
        ("stages.0.blocks.0", "block: filter_fn said no"),
        ("stages.0.blocks.0.conv_dw", "convolution: filter_fn said no"),
    ]
    assert [name for name, _ in report.swapped] == [
        "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"
    ]  # fmt: skip
    head, *rows = str(report).splitlines()
    assert head.startswith("ConvNeXt: 5 swapped, 2 skipped; on cpu, they run on ")
    assert [row.split()[:3] for row in rows] == [
        ["swapped", "5", "stages.1.blocks.0"],
        ["skipped", "1", "stages.0.blocks.0"],
        ["skipped", "1", "stages.0.blocks.0.conv_dw"],
    ]
    assert operators_of(model) == {"convnext_block": 5}


def test_nothing_to_swap_is_said():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 7, stride=3, groups=8))
    with pytest.warns(UserWarning, match="accelerate swapped nothing in this Sequential: 1 blocks or depthwise"):
        report = convnext_fast.accelerate(model)
    assert report.swapped == []
    assert "stride (3, 3)" in report.skipped[0][1]


def test_our_own_network_needs_none_of_it(recwarn):
    report = convnext_fast.accelerate(ours())
    assert not report.swapped
    text = "block: it is convnext_fast's own, and takes the kernels where there are any"
    assert {why for _, why in report.skipped} == {text}
    assert not recwarn.list


def test_wrong_arguments_are_named(model):
    with pytest.raises(TypeError, match=r"model is a dict; an nn\.Module is allowed"):
        convnext_fast.accelerate(model.state_dict().copy() and {})
    with pytest.raises(TypeError, match="model is a list"):
        convnext_fast.restore([])
    with pytest.raises(TypeError, match=r"filter_fn is a str; a function of \(module, name\)"):
        convnext_fast.accelerate(model, "stages")
    with pytest.raises(ValueError, match="memory is 'small'; allowed: default, lean, fast"):
        convnext_fast.accelerate(model, memory="small")


def test_a_module_alone(model):
    block = model.stages[1].blocks[0]
    x = torch.randn(2, 12, 9, 8)
    expected = block(x)
    assert convnext_fast.accelerate(block).swapped == [("", "ConvNeXt V1 block of timm")]
    assert operators_of(block, x) == {"convnext_block": 1}
    assert torch.equal(block(x), expected)
    conv = nn.Conv2d(4, 4, (1, 11), padding="same", groups=4)
    assert "(the model itself)  depthwise convolution 1×11" in str(convnext_fast.accelerate(conv))


@pytest.mark.parametrize("conv, reason", [
    (nn.Conv2d(4, 4, 7, padding=3, groups=4), None),
    (nn.Conv2d(4, 4, 5, groups=4, bias=False), None),
    (nn.Conv2d(4, 4, (11, 1), padding="same", groups=4), None),
    (nn.Conv2d(4, 4, (5, 3), padding="valid", groups=4), None),
    (nn.Conv2d(4, 4, 3, groups=4), "its kernel is 3×3; from 5 taps"),
    (nn.Conv2d(4, 4, 7, stride=2, groups=4), None),
    (nn.Conv2d(4, 4, 7, dilation=2, groups=4), None),
    (nn.Conv2d(4, 4, 13, padding=6, groups=4), None),
    (nn.Conv2d(4, 4, 7, stride=3, groups=4), r"stride \(3, 3\)"),
    (nn.Conv2d(4, 4, 7, padding=12, dilation=4, groups=4), r"dilation \(4, 4\)"),
    (nn.Conv2d(4, 4, 8, padding="same", groups=4), r"even size \(\(8, 8\)\)"),
    (nn.Conv2d(4, 4, 6, groups=4), "the kernel is 6×6"),
    (nn.Conv2d(4, 4, 53, padding=26, groups=4), "the kernel is 53×53"),
    (nn.Conv2d(4, 4, 5, padding=7, groups=4), r"padding is \(7, 7\)"),
    (nn.Conv2d(4, 8, 7, groups=4), "it makes 8 channels of 4"),
    (nn.Conv2d(4, 4, 7, groups=4, padding=3, padding_mode="circular"), "padding_mode is 'circular'"),
], ids=lambda value: str(value)[:60])  # fmt: skip
@pytest.mark.filterwarnings("ignore:accelerate swapped nothing", "ignore:Using padding='same'")
def test_convolutions(conv, reason):
    x = torch.randn(2, 4, 25, 24)
    expected = outputs_and_gradients(conv, x)
    model = nn.Sequential(conv)
    report = convnext_fast.accelerate(model)
    assert (len(report.swapped), len(report.skipped)) == ((1, 0) if reason is None else (0, 1))
    if reason is not None:
        assert re.search(reason, report.skipped[0][1])
    assert operators_of(model, x) == ({"depthwise_conv2d": 1} if reason is None else {})
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            assert_all_close(outputs_and_gradients(model, x), expected)


def test_ordinary_convolutions_are_no_candidates():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 7), nn.Conv2d(4, 4, 7, groups=2), nn.Conv2d(1, 1, 7), nn.Conv2d(4, 4, 1, groups=4)
    )
    with pytest.warns(UserWarning, match="0 blocks or depthwise convolutions"):
        assert convnext_fast.accelerate(model).skipped == []


@pytest.mark.parametrize("library", [timm, torchvision, huggingface])
def test_autocast_keeps_the_dtypes(library):
    model = randomise(library())
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs_and_gradients(model, images())
        convnext_fast.accelerate(model)
        with dk.backend("torch"):
            actual = outputs_and_gradients(model, images())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).norm() <= 0.05 * e.norm()


def test_scripting_says_what_to_do(model):
    convnext_fast.accelerate(model)
    with pytest.raises(RuntimeError, match=r"call convnext_fast\.restore\(model\) first"):
        torch.jit.script(model)


def test_gradients_have_the_strides_of_their_parameters():
    formats = torch.channels_last, torch.contiguous_format
    for name, layout in itertools.product(("timm-conv", "timm-v2-conv", "huggingface-v2", "torchvision"), formats):
        model = randomise(CLASSIFIERS[name][2]()).to(memory_format=layout)
        convnext_fast.accelerate(model)
        for backend in ("torch", "reference"):
            model.zero_grad()
            with dk.backend(backend):
                F.cross_entropy(
                    getattr(model(images()), "logits", None) if "hugging" in name else model(images()),
                    torch.tensor([1, 2]),
                ).backward()
            blocks = [m for m in model.modules() if is_swapped(m) and swap_of(m).settings is not None]
            assert len(blocks) == BLOCKS
            for block in blocks:
                for key, p in block.named_parameters():
                    assert p.grad.stride() == p.stride(), key
