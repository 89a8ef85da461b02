"""Parts of blocks that are of some other class: which are right, and that asking changes nothing."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convnext_fast
import dwconv_kernels as dk

from .accelerated import assert_unchanged
from .networks import images
from .test_accelerate_forks import DIM, ELSE, Block, Norm, Set, TheSame, changed, network, outcome


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


class OtherEpsilon(Norm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-12)


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


@pytest.mark.parametrize("block, expected", [
    (lambda: changed(grn=NamedOtherwise()), ELSE),
    (lambda: changed(grn=nn.Identity()), "swapped"),
    (lambda: changed(gamma=nn.Parameter(torch.ones(1))), ELSE),
    (Gated, ELSE),
    (lambda: changed(norm=BiasFlag(DIM)), "norm is"),
    (lambda: changed(norm=Norm(4)), "norm is"),
    (lambda: changed(norm=OtherEpsilon(DIM)), "norm is"),
    (lambda: changed(act=nn.RReLU()), "act is RReLU"),
    (lambda: changed(act=nn.Sequential(nn.GELU())), "its child act.0"),
    (lambda: changed(norm=Fp32Norm(DIM)), "swapped"),
    (lambda: changed(drop_path=OtherIdentity()), "drop_path is"),
    (lambda: changed(drop_path=AlwaysDropping()), "drop_path is"),
    (lambda: torch.fx.symbolic_trace(Block()), "it is a graph that torch.fx traced"),
], ids=range(13))  # fmt: skip
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
