"""Blocks with the children of a ConvNeXt block that compute something else, or something like it: none is mistaken."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convnext_fast

from .accelerated import assert_unchanged
from .networks import images, randomise
from .test_accelerate import operators_of

DIM = 8


class Norm(nn.Module):
    """The original repository's, no nn.LayerNorm."""

    def __init__(self, dim: int, data_format: str = "channels_last"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps, self.data_format, self.normalized_shape = 1e-6, data_format, (dim,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GRN(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim)), nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.epsilon = 1e-6

    def forward(self, x):
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (energy / (energy.mean(dim=-1, keepdim=True) + self.epsilon))) + self.beta + x


class Block(nn.Module):
    """As in the original repositories."""

    def __init__(self, dim: int = DIM, grn: bool = False):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.pwconv1, self.act = Norm(dim), nn.Linear(dim, 4 * dim), nn.GELU()
        if grn:
            self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if grn else nn.Parameter(torch.ones(dim))
        self.drop_path = nn.Identity()

    def branch(self, x):
        x = self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        x = self.pwconv2(self.grn(x) if hasattr(self, "grn") else x)
        return (x if self.gamma is None else self.gamma * x).permute(0, 3, 1, 2)

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


def changed(**children) -> nn.Module:
    block = Block(grn="grn" in children)
    for name, child in children.items():
        setattr(block, name, child)
    return block


def network(*blocks: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, DIM, 4, 4), Norm(DIM, "channels_first"), *blocks))


@pytest.mark.parametrize("grn", [False, True])
def test_the_originals_own_classes(grn):
    report = assert_unchanged(network(Block(grn=grn), Block(grn=grn)), images(2, 48, 64), 2)
    assert report.swapped[0] == ("2", f"ConvNeXt V{1 + grn} block of the original repository")


def outcome(report) -> str:
    """Of the last block: "swapped", or why not."""
    if report.swapped and "block" in report.swapped[-1][1]:
        return "swapped"
    return [why for _, why in report.skipped if why.startswith("block: ")][-1].removeprefix("block: ")


ELSE = "its forward computes something else"
MORE = "its forward does not take a map alone"


class Undoubled(Block):
    def forward(self, x):
        return super().forward(x) - x


class OnlyInTraining(Block):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class TwoArguments(Block):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Anything(Block):
    def forward(self, *args):
        return super().forward(*args)


class Optional(Block):
    def forward(self, x, mask=None, *, factor=1):
        return super().forward(x) * (factor if mask is None else mask)


class Static(Block):
    @staticmethod
    def forward():
        return 0


class Detached(Block):
    def forward(self, x):
        return x + self.branch(x).detach()


class WithoutGradients(Block):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class OfLargeMaps(Block):
    def forward(self, x):
        return super().forward(x) * (2 if x.shape[-1] > 10 else 1)


class InPlace(Block):
    def forward(self, x):
        return x.add_(self.branch(x))


class InTheDtypeOfTheMap(Block):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Raising(Block):
    def forward(self, x):
        raise NotImplementedError


class Mixing(Block):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.5 * (y - y.mean(0)) if self.training else y


class OfLargeMapsInEval(Block):
    def forward(self, x):
        return super().forward(x) * (2 if x.shape[-1] > 6 and not self.training else 1)


class InC(Block):
    forward = torch.relu


def wider(forward):
    @functools.wraps(forward)
    def call(self, x, scale=1.0):
        return forward(self, x * scale)

    return call


class Wider(Block):
    @wider
    def forward(self, x):
        return super().forward(x)


class TheSame(Block):
    def forward(self, features):
        return super().forward(features) + 0


@pytest.mark.parametrize("fork, expected", [
    (Undoubled, ELSE), (OnlyInTraining, ELSE), (TwoArguments, MORE), (Anything, MORE), (Static, MORE),
    (Mixing, ELSE), (OfLargeMapsInEval, ELSE), (InC, MORE), (Wider, "swapped"), (Detached, ELSE), (Optional, "swapped"),
    (WithoutGradients, ELSE), (OfLargeMaps, ELSE), (InPlace, ELSE), (InTheDtypeOfTheMap, ELSE), (Raising, ELSE),
    (TheSame, "swapped"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_forwards(fork, expected):
    model = network(Block(), fork())
    report = convnext_fast.accelerate(model)
    assert outcome(report).startswith(expected)
    assert len(report.swapped) == 2, "the convolution, where not the block"


class Set(Block):
    """A block that does what it is set to, after one that computes what it should."""

    def __init__(self):
        super().__init__()
        self.activation, self.extra, self.settings, self.count = F.gelu, None, None, 0

    def branch(self, x):
        x = self.activation(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        if self.extra is not None:
            x = x * self.extra
        if self.settings is not None:
            x = x * self.settings["factor"]
        x = self.pwconv2(x) * (1 + self.count)
        return (self.gamma * x).permute(0, 3, 1, 2)


class Holder:
    factor = 2

    def __getitem__(self, name):
        return self.factor


@pytest.mark.parametrize("attribute, value", [
    ("activation", F.relu), ("extra", nn.Parameter(torch.ones(4 * DIM))), ("extra", torch.full((4 * DIM,), 2.0)),
    ("settings", {"factor": 2}), ("settings", Holder()), ("count", 1),
], ids=range(6))  # fmt: skip
def test_a_second_block_that_is_set_to_something_else(attribute, value):
    plain, other = Set(), Set()
    if isinstance(value, nn.Parameter):
        del other.extra
    setattr(other, attribute, value)
    report = convnext_fast.accelerate(network(plain, other))
    assert [why.partition(";")[0] for name, why in report.skipped if name == "3"] == [
        f"block: {ELSE} than x + drop_path(γ · fc2(grn(gelu(fc1(norm(conv(x)))))))"
    ]
    assert ("2", "ConvNeXt V1 block of the original repository") in report.swapped


def test_epsilon_of_a_grn_under_another_name():
    other = Block(grn=True)
    other.grn.epsilon = 0.5
    report = convnext_fast.accelerate(network(Block(grn=True), other))
    assert [name for name, why in report.skipped if ELSE in why] == ["3"]


def test_a_forward_that_was_exchanged_in_the_class(monkeypatch):
    class Exchanged(Block):
        def forward(self, x):
            return super().forward(x)

    assert outcome(convnext_fast.accelerate(network(Exchanged()))) == "swapped"
    monkeypatch.setattr(Exchanged, "forward", lambda self, x: 2 * Block.forward(self, x))
    assert outcome(convnext_fast.accelerate(network(Exchanged()))).startswith(ELSE)
    monkeypatch.undo()
    assert outcome(convnext_fast.accelerate(network(Exchanged()))) == "swapped"
    branch = Block.branch
    monkeypatch.setattr(Block, "branch", lambda self, x: 2 * branch(self, x))
    assert outcome(convnext_fast.accelerate(network(Exchanged()))).startswith(ELSE)


class Factor(Block):
    factor = 1

    def branch(self, x):
        return self.times(super().branch(x)) * self.factor

    @staticmethod
    def times(x):
        return x


@pytest.mark.parametrize("name, value", [("factor", 2), ("times", staticmethod(lambda x: 2 * x))])
def test_a_class_that_is_set_to_something_else(monkeypatch, name, value):
    assert outcome(convnext_fast.accelerate(network(Factor()))) == "swapped"
    monkeypatch.setattr(Factor, name, value)
    assert outcome(convnext_fast.accelerate(network(Factor()))).startswith(ELSE)


def test_blocks_that_change_are_found_out_the_second_time():
    """By a call, where they have other children; else by `accelerate`, which takes back what it did."""
    block = Set()
    convnext_fast.accelerate(block)
    block.count = 1
    x = torch.randn(2, DIM, 8, 8)
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))).startswith(ELSE)
    assert operators_of(block, x) == {"depthwise_conv2d": 1}
    other = Block()
    convnext_fast.accelerate(other)
    other.adapter = nn.Conv2d(DIM, DIM, 1)
    assert operators_of(other, x) == {"depthwise_conv2d": 1}
    assert "it has other children than when it was swapped" in str(convnext_fast.accelerate(other))


def test_blocks_that_were_compiled_alone():
    block = Block()
    block.compile(backend="eager")
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))) == "swapped"
