"""The registered operators under PyTorch's machinery: opcheck, compile, export, tracing, checkpointing, derivatives."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests.cases import EMPTY_MAPS
from tests.dwconv_kernels.operands import block_operands, norm_linear_operands, requiring_grad, with_gradients

OPS = torch.ops.dwconv_kernels
LAYOUTS = list(testing.in_layouts(torch.zeros(2, 4, 5, 6)))


def depthwise(x, weight, bias):
    return dk.depthwise_conv2d(x, weight, bias, padding=(1, 2))


def norm_linear(*tensors):
    return dk.layer_norm_linear(*tensors, activation="gelu")


def block(*tensors):
    return dk.convnext_block(*tensors)


def operands(name, dtype=torch.float32):
    if name == "depthwise":
        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(s, generator=g).to(dtype) for s in ((2, 4, 9, 8), (4, 1, 3, 5), (4,))]
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        return tensors
    if name == "norm_linear":
        return norm_linear_operands((2, 3, 7), 5, dtype=dtype)
    tensors = block_operands((2, 4, 7, 6), grn=True, dtype=dtype)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors


FUNCTIONS = {"depthwise": depthwise, "norm_linear": norm_linear, "block": block}
each_operator = pytest.mark.parametrize("name", FUNCTIONS)


def under(backend, function):
    def run(*tensors):
        with dk.backend(backend):
            return function(*tensors)

    return run


def assert_all_close(actual, expected, tolerance=1e-5):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max()), msg=f"number {i}")


# -- opcheck: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes --------------------------


def check_depthwise(x, weight, bias, dy):
    geometry = ([1, 1], [weight.shape[2] // 2, weight.shape[3] // 2], [1, 1])
    opcheck(OPS.depthwise_conv2d.default, (*requiring_grad([x, weight, bias]), *geometry, "reference"))
    for wanted in ([True, True, bias is not None], [True, False, False], [False, True, False]):
        opcheck(OPS.depthwise_conv2d_backward.default, (dy, x, weight, bias, *geometry, wanted, "reference"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_depthwise(layout, weight_format):
    x, weight, bias = torch.randn(2, 4, 9, 8), torch.randn(4, 1, 3, 5).to(memory_format=weight_format), torch.randn(4)
    layouts = testing.in_layouts(torch.randn(2, 4, 9, 8))
    check_depthwise(testing.in_layouts(x)[layout], weight, bias, layouts[LAYOUTS[-1 - LAYOUTS.index(layout)]])


@pytest.mark.parametrize("shape", [*EMPTY_MAPS, (2, 1, 6, 5), (1, 4, 1, 1)], ids=str)
def test_opcheck_depthwise_on_empty_and_ambiguous_maps(shape):
    check_depthwise(torch.randn(shape), torch.randn(shape[1], 1, 3, 3), torch.randn(shape[1]), torch.randn(shape))


@pytest.mark.parametrize("layout", ["contiguous", "strided", "permuted", "no_rows"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_opcheck_norm_linear(layout, activation):
    shape = (0, 3, 7) if layout == "no_rows" else (2, 3, 7)
    tensors = norm_linear_operands(shape, 5, bias=layout != "strided", dtype=torch.float32)
    dy = torch.randn(*shape[:-1], 5)
    if layout == "strided":
        tensors[0], dy = torch.randn(2, 5, 9)[:, ::2, 1:8], torch.randn(2, 3, 10)[..., ::2]
    if layout == "permuted":
        tensors[0], dy = torch.randn(7, 2, 3).permute(1, 2, 0), torch.randn(3, 2, 5).transpose(0, 1)
    settings = (1e-6, activation, torch.float32, "reference")
    opcheck(OPS.layer_norm_linear.default, (*requiring_grad(tensors), *settings))
    x, *parameters = tensors
    for wanted in ([True] * 4 + [tensors[-1] is not None], [False, True, False, True, False]):
        arguments = (dy, x, torch.randn(shape[:-1]), torch.rand(shape[:-1]), *parameters, activation, wanted)
        opcheck(OPS.layer_norm_linear_backward.default, (*arguments, "reference"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_slice"])
@pytest.mark.parametrize("memory, grn", [("default", True), ("lean", False), ("fast", True)])
def test_opcheck_block(layout, memory, grn):
    tensors = block_operands((2, 4, 6, 5), (3, 3), 5, grn=grn, row_scale=grn, dtype=torch.float32)
    check_block(testing.in_layouts(tensors[0])[layout], tensors[1:], memory)


@pytest.mark.parametrize("shape", EMPTY_MAPS[:3], ids=str)
def test_opcheck_block_on_empty_maps(shape):
    tensors = block_operands(shape, (3, 3), 5, dtype=torch.float32)
    check_block(tensors[0], tensors[1:], "default")


def check_block(x, others, memory):
    settings = (1e-6, memory, torch.float32)
    opcheck(OPS.convnext_block.default, (*requiring_grad([x, *others], but=10), *settings, "reference"))
    saved = OPS.convnext_block.default(x, *others, *settings, "reference")[1:]
    parameters = [x, *others[:9], *others[10:]]
    for wanted in ([t is not None for t in parameters], [False, True] * 6):
        wanted = [w and t is not None for w, t in zip(wanted, parameters, strict=True)]
        arguments = (torch.randn(x.shape), x, *others, *saved, *settings, wanted, "reference")
        opcheck(OPS.convnext_block_backward.default, arguments)


# -- torch.compile, checkpointing, export, tracing -------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.full)])
def test_compile_forward_and_backward(name, backend, dynamic):
    torch._dynamo.reset()
    function, tensors = FUNCTIONS[name], operands(name)
    compiled = torch.compile(under(backend, function), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_all_close(
        with_gradients(compiled, tensors, but=10), with_gradients(under(backend, function), tensors, but=10)
    )


def test_compiled_code_follows_the_backend_in_force():
    """A backend chosen outside of compiled code is part of what the code was compiled for."""
    torch._dynamo.reset()
    compiled = torch.compile(depthwise, fullgraph=True, backend="aot_eager")
    leaves = requiring_grad(operands("depthwise"))
    names = [type(under(b, compiled)(*leaves).grad_fn).__name__ for b in ("reference", "torch", "reference")]
    assert all("CompiledFunction" in n for n in names)
    with dk.backend("triton"), pytest.raises(Exception, match=r"cannot run under backend|Observed exception"):
        compiled(*leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_compile_does_not_compile_again_for_every_size(backend):
    torch._dynamo.reset()
    compiled = torch.compile(depthwise, fullgraph=True, backend="aot_eager", dynamic=True)
    _, weight, bias = operands("depthwise")
    with dk.backend(backend), torch._dynamo.config.patch(error_on_recompile=False):
        counter = torch._dynamo.utils.counters
        counter.clear()
        for n, h, w in itertools.product((2, 3), (9, 14), (8, 11)):
            x = torch.randn(n, 4, h, w).contiguous(memory_format=torch.channels_last)
            assert compiled(x, weight, bias).shape == (n, 4, h, w)
        assert counter["stats"]["unique_graphs"] <= 2


@each_operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(name, use_reentrant):
    function, tensors = under("reference", FUNCTIONS[name]), operands(name)
    gradients = []
    for run in (function, lambda *t: checkpoint(function, *t, use_reentrant=use_reentrant)):
        leaves = requiring_grad(tensors, but=10)
        run(*leaves).square().sum().backward()
        gradients.append([t.grad for t in leaves if t is not None and t.requires_grad])
    assert_all_close(*gradients, 1e-6)


class Network(nn.Module):
    """All three operators behind an ordinary layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.depthwise = dk.DepthwiseConv2d(4, 4, (3, 5), padding=(1, 2))
        self.linear = dk.LayerNormLinear(4, 4, activation="gelu")
        for i, t in enumerate(operands("block")[1:]):
            self.register_parameter(f"block{i}", None if t is None else nn.Parameter(t))

    def forward(self, x):
        x = self.depthwise(self.stem(x))
        x = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return dk.convnext_block(x, *(getattr(self, f"block{i}") for i in range(12))).tanh()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def network_gradients(module, x, backend="reference"):
    with dk.backend(backend):
        return torch.autograd.grad(module(x).square().sum(), list(module.parameters()))


def called(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


IMAGES = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(1))


def test_symbolic_tracing_keeps_the_public_functions_and_their_gradients(network):
    traced = torch.fx.symbolic_trace(network)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {dk.depthwise_conv2d, dk.layer_norm_linear, dk.convnext_block} <= targets
    assert_all_close(network_gradients(traced, IMAGES), network_gradients(network, IMAGES))
    assert_all_close(network_gradients(traced, IMAGES, "torch"), network_gradients(network, IMAGES))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export_takes_operators_that_every_converter_knows(network, strict, dynamic, tmp_path):
    dim = torch.export.Dim.AUTO if dynamic else None
    shapes = {"x": {0: dim, 2: dim, 3: dim}} if dynamic else None
    program = torch.export.export(network, (IMAGES,), dynamic_shapes=shapes, strict=strict)
    assert not [target for target in called(program.graph) if "dwconv_kernels" in target]
    torch.export.save(program, tmp_path / "network.pt2")
    module = torch.export.load(tmp_path / "network.pt2").module()
    images = torch.randn(3, 3, 11, 10) if dynamic else IMAGES
    torch.testing.assert_close(module(images), network(images), rtol=1e-5, atol=1e-5)


def test_non_strict_export_of_the_raw_operators_still_trains(network, tmp_path):
    """This export looks inside autograd.Function; the raw operators' own formula is the net below it."""
    with dk.backend("reference"):
        program = torch.export.export(network, (IMAGES,), strict=False)
    assert len([target for target in called(program.graph) if "dwconv_kernels" in target]) == 3
    torch.export.save(program, tmp_path / "network.pt2")
    module = torch.export.load(tmp_path / "network.pt2").module()
    names = [name for name, _ in network.named_parameters()]
    exported = dict(module.named_parameters())
    gradients = torch.autograd.grad(module(IMAGES).square().sum(), [exported[name] for name in names])
    assert_all_close(gradients, network_gradients(network, IMAGES))


def test_jit_trace_takes_pytorchs_operators(network):
    traced = torch.jit.trace(network, IMAGES)
    assert not [n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("dwconv_kernels")]
    torch.testing.assert_close(traced(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)


# -- derivatives that are not there: an error, never a wrong number --------------------------------------------------


@each_operator
def test_second_derivatives_raise(name):
    """Also where the penalty hides behind a loss whose gradient needs none: once_differentiable would drop it."""
    function, tensors = under("reference", FUNCTIONS[name]), requiring_grad(operands(name), but=10)
    y = function(*tensors)
    (dx,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative .*backend\("torch"\)'):
        (dx.square().sum() + y.sum()).backward()


@each_operator
def test_second_derivatives_of_the_torch_backend_are_right(name):
    tensors = [None if t is None else t.double() for t in operands(name)]
    if name == "block":
        tensors = block_operands((1, 2, 3, 3), (3, 3), 3, grn=True)
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(under("torch", FUNCTIONS[name]), tensors, fast_mode=True)


@each_operator
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_raises(name, grad):
    tensors = operands(name)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="jvp"):
            under("reference", FUNCTIONS[name])(dual, *tensors[1:])


@each_operator
def test_torch_func_raises_and_works_on_the_torch_backend(name):
    x, *others = operands(name)

    def loss(backend):
        return lambda x: under(backend, FUNCTIONS[name])(x, *others).square().sum()

    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss("reference"))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss("reference")(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss("torch"))(x), expected, rtol=1e-4, atol=1e-4)


@each_operator
def test_inference_mode_then_training(name):
    function, tensors = under("reference", FUNCTIONS[name]), operands(name)
    with torch.inference_mode():
        expected = function(*tensors)
    actual, *gradients = with_gradients(function, tensors, but=10)
    torch.testing.assert_close(actual, expected.clone(), rtol=1e-6, atol=1e-6)
    assert all(g.isfinite().all() for g in gradients)


# -- FLOP counts ------------------------------------------------------------------------------------------------------


@each_operator
def test_flops_are_those_that_pytorch_counts_for_its_own_operators(name):
    assert flops(under("reference", FUNCTIONS[name]), name) == flops(under("torch", FUNCTIONS[name]), name) > 0


def flops(function, name, gradients_of=()):
    tensors = [t if t is None else t.requires_grad_(i in gradients_of) for i, t in enumerate(operands(name))]
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        if gradients_of:
            y.sum().backward()
    return counter.get_total_flops()


@each_operator
def test_flops_of_backward_passes(name):
    """As many for the input's gradient as forward, and as many again for the weights'.

    (PyTorch's own count of a depthwise weight gradient is C times too large: it forgets the groups.)
    """
    function, everything = under("reference", FUNCTIONS[name]), [i for i in range(13) if i != 10]
    forward = flops(function, name)
    assert flops(function, name, everything) == 3 * forward
    assert flops(function, name, [0]) == 2 * forward
    second_linear = 2 * 2 * 4 * 7 * 6 * 16
    # The gradient of the last weight alone: of one layer where it is the operator's only one.
    assert flops(function, name, [{"depthwise": 1, "norm_linear": 3, "block": 7}[name]]) == forward + (
        second_linear if name == "block" else forward
    )
