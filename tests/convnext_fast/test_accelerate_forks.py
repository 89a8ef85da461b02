"""Blocks with the children of a ConvNeXt block that compute something else, or something like it: none is mistaken."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convnext_fast
import dwconv_kernels as dk

from .accelerated import assert_unchanged
from .networks import images, randomise

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


class TheSame(Block):
    def forward(self, features):
        return super().forward(features) + 0


@pytest.mark.parametrize("fork, expected", [
    (Undoubled, ELSE), (OnlyInTraining, ELSE), (TwoArguments, MORE), (Anything, MORE), (Static, MORE),
    (Detached, ELSE), (Optional, "swapped"),
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


# Parts.


class Gated(Block):
    def __init__(self):
        super().__init__()
        self.pwconv1 = nn.Linear(DIM, 8 * DIM)

    def branch(self, x):
        value, gate = self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))).chunk(2, -1)
        return self.pwconv2(value * self.act(gate)).permute(0, 3, 1, 2)


class NamedOtherwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4 * DIM))

    def forward(self, x):
        return x * self.scale


class BiasFlag(Norm):
    def __init__(self, dim):
        super().__init__(dim)
        self.shift = self.bias
        del self.bias
        self.bias = False

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.shift, self.eps)


class Fp32Norm(nn.LayerNorm):
    """As in several libraries: in fp32, whatever it gets."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Permute(nn.Module):
    """torchvision's, in a fork of it."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class OtherDropout(nn.Module):
    p = 0.0

    def __init__(self):
        super().__init__()
        self.p = 0.0

    def forward(self, x):
        return F.dropout(x, self.p, self.training) if self.p > 0 else x


def test_forks_of_torchvision():
    models = pytest.importorskip("torchvision.models.convnext")
    block = models.CNBlock(DIM, 1.0, 0.0)
    block.block[1], block.block[6] = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))) == "swapped"
    convnext_fast.restore(block)
    block.block[1] = Permute([0, 3, 2, 1])
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))).startswith(ELSE)


def test_modules_that_may_drop_out_later():
    timm = pytest.importorskip("timm")
    block = timm.models.convnext.ConvNeXtBlock(DIM)
    block.mlp.drop1 = OtherDropout()
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))).startswith("mlp.drop1 is")
    block.mlp.drop1 = nn.Dropout(0.0)
    block.mlp = torch.fx.symbolic_trace(block.mlp)
    assert outcome(convnext_fast.accelerate(nn.Sequential(block))) == "mlp is a graph that torch.fx traced"


class OtherIdentity(nn.Identity):
    def forward(self, x):
        return 2 * x


class AlwaysDropping(nn.Module):
    drop_prob = 0.5

    def forward(self, x):
        return x * torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(0.5) * 2


def changed(**children) -> nn.Module:
    block = Block(grn="grn" in children)
    for name, child in children.items():
        setattr(block, name, child)
    return block


@pytest.mark.parametrize("block, expected", [
    (lambda: changed(grn=NamedOtherwise()), ELSE),
    (lambda: changed(grn=nn.Identity()), "swapped"),
    (lambda: changed(gamma=nn.Parameter(torch.ones(1))), ELSE),
    (Gated, ELSE),
    (lambda: changed(norm=BiasFlag(DIM)), "norm is"),
    (lambda: changed(norm=Norm(4)), "norm is"),
    (lambda: changed(act=nn.RReLU()), "act is RReLU"),
    (lambda: changed(act=nn.Sequential(nn.GELU())), "its child act.0"),
    (lambda: changed(norm=Fp32Norm(DIM)), "swapped"),
    (lambda: changed(drop_path=OtherIdentity()), "drop_path is"),
    (lambda: changed(drop_path=AlwaysDropping()), "drop_path is"),
    (lambda: torch.fx.symbolic_trace(Block()), "it is a graph that torch.fx traced"),
], ids=range(12))  # fmt: skip
def test_parts(block, expected):
    model = network(block())
    x = images(2, 32, 32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    report = convnext_fast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert outcome(report).startswith(expected)
    if expected == "swapped":
        convnext_fast.restore(model)
        assert_unchanged(model, x, 1)
    elif not isinstance(model[2].norm, Norm) or model[2].norm.weight.numel() == DIM:
        model(x)


def test_scripted_modules_with_such_names():
    inner = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Module(), Block())
    model[0].block = model[0].mlp = inner
    assert len(convnext_fast.accelerate(model).swapped) == 1


class Remembering(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


def test_nothing_of_the_model_is_written_to():
    model = network(Remembering(), Block())
    model[3].weights = [1, 2]
    state = copy.deepcopy(model.state_dict())
    convnext_fast.accelerate(model)
    assert model[2].seen == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Registered(Block):
    """A library that keeps a register of its subclasses."""

    names: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        Registered.names += (cls.__name__,)


def test_subclasses_are_not_registered():
    convnext_fast.accelerate(network(Registered()))
    assert Registered.names == ()


def test_in_every_mode():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert outcome(convnext_fast.accelerate(network(Block()))) == "swapped"
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert outcome(convnext_fast.accelerate(nn.Sequential(TheSame(), TheSame()))) == "swapped"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert outcome(convnext_fast.accelerate(nn.Sequential(changed(act=nn.GELU())))) == "swapped"
    finally:
        torch.set_default_dtype(before)


def test_other_threads_keep_their_backend():
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(dk.current_backend())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for i in range(3):
            convnext_fast.accelerate(network(Gated(), changed(act=nn.GELU()), *(Set() for _ in range(i))))
    finally:
        done.set()
        thread.join()
    assert seen == {"auto"}
