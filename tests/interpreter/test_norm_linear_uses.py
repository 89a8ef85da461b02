"""What surrounds the layer norm + linear kernels, in Triton's interpreter: layouts, autocast, PyTorch's machinery."""

import functools
import itertools
import re

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import runtime, testing
from tests import norm_linear_cases as cases
from tests import norm_linear_proofs as proofs
from tests.dwconv_kernels.operands import norm_linear_operands, requiring_grad, with_gradients
from tests.norm_linear_cases import NormLinearCase

pytestmark = pytest.mark.usefixtures("guard")

OPS = torch.ops.dwconv_kernels
SMALL = NormLinearCase("fp32", (2, 3), 8, 5, "gelu")
WIDE = NormLinearCase("fp32", (2, 3), 136, 5, "gelu")


def layer(x, norm_weight, norm_bias, weight, bias=None, activation="gelu"):
    with dk.backend("triton"):
        return dk.layer_norm_linear(x, norm_weight, norm_bias, weight, bias, activation=activation)


def tensors(shape=(2, 3, 8), d=5, dtype=torch.float32):
    return norm_linear_operands(shape, d, dtype=dtype)


def kernels_in(launches):
    return [launch.kernel.removeprefix("_norm_linear_").removesuffix("_kernel") for launch in launches]


# Layouts


@pytest.mark.parametrize("case", [SMALL, WIDE._replace(dtype="bf16")], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_show_in_nothing(layout, case):
    """Neither that of x, nor of dy, nor of parameters: the same bits, and results without gaps."""
    (x, *parameters), dy = proofs.normal_operands(case)
    if layout == "expanded":
        x, dy = (t[:1, :1].expand_as(t).contiguous() for t in (x, dy))
    expected = proofs.on_kernels(case, [x, *parameters], dy)
    for i, parameter_layout in enumerate(cases.PARAMETER_LAYOUTS):
        other = [proofs.parameter_in_layout(t, parameter_layout, 5 * i + 1) for t in parameters]
        placed = [proofs.in_layout(t, layout, 15 - i) for t in (x, dy)]
        actual = proofs.on_kernels(case, [placed[0], *other], placed[1])
        proofs.assert_layouts(case, [placed[0], *other], actual)
        assert all(torch.equal(a, expected[name]) for name, a in actual.items())


def test_rows_that_lie_evenly_are_read_in_place():
    """Else they are copied, which shows in the memory that is taken, and nowhere else."""
    launch = runtime.launchers("norm_linear")
    (x, *_), _ = proofs.normal_operands(SMALL)
    for layout in cases.LAYOUTS:
        placed = proofs.in_layout(x, layout)
        in_place = launch.as_rows(placed).x.data_ptr() == placed.data_ptr()
        assert in_place == (layout in ("contiguous", "offset", "slice", "expanded")), layout
    assert launch.as_rows(proofs.in_layout(x, "expanded")).stride == 0


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 2, 3, 1, 8), (8, 1, 1)], ids=str)
def test_any_number_of_leading_dimensions(shape):
    operands = tensors(shape)
    results = with_gradients(layer, operands)
    assert results[0].shape == (*shape[:-1], 5)
    assert results[1].shape == shape
    flat = [operands[0].reshape(-1, shape[-1]), *operands[1:]]
    for a, e in zip(results, with_gradients(layer, flat, lambda y: torch.randn(
        results[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).float().view(y.shape)), strict=True):  # fmt: skip
        assert torch.equal(a.reshape(e.shape), e)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8), (0, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_rows(shape, dtype, guard):
    y, dx, *gradients = with_gradients(layer, tensors(shape, dtype=dtype))
    assert y.shape == (*shape[:-1], 5)
    assert dx.shape == shape
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert guard.launches == []


# What is given, and what is wanted


@pytest.mark.parametrize("given", list(itertools.product((True, False), repeat=3)), ids=str)
def test_parameters_that_are_none(given, guard):
    for case in (SMALL, WIDE):
        inputs, dy = proofs.normal_operands(case._replace(given=given))
        actual = proofs.on_kernels(case, inputs, dy)
        assert len(actual) == 3 + sum(given)
        neutral = (None, torch.ones(case.c), torch.zeros(case.c), None, torch.zeros(case.d))
        filled = [n if t is None else t for t, n in zip(inputs, neutral, strict=True)]
        expected = proofs.on_kernels(case, filled, dy)
        for name, a in actual.items():
            assert torch.equal(a, expected[name]), name


SUBSETS = list(itertools.product((True, False), repeat=5))[1:-1]
ALONE = [wanted for wanted in SUBSETS if sum(wanted) == 1]


@functools.cache
def all_gradients(case):
    return proofs.on_kernels(case, *proofs.normal_operands(case))


@pytest.mark.parametrize("case, wanted", [
    *((SMALL, wanted) for wanted in SUBSETS),
    *((WIDE, wanted) for wanted in ALONE),
    *((case._replace(activation=None), wanted) for case in (SMALL, WIDE) for wanted in ALONE),
], ids=str)  # fmt: skip
def test_gradients_with_other_tensors_frozen(case, wanted, guard):
    """The same bits as with all of them; and only the kernels that they need run."""
    inputs, dy = proofs.normal_operands(case)
    full = all_gradients(case)
    before = len(guard.launches)
    actual = proofs.on_kernels(case, inputs, dy, wanted)
    assert list(actual) == ["y", *(name for name, need in zip(proofs.NAMES[1:], wanted, strict=True) if need)]
    for name, a in actual.items():
        assert torch.equal(a, full[name]), name
    ran = kernels_in(guard.launches[before:])[1 if case.resident() else 2 :]
    dx, dgamma, dbeta, dweight, _ = wanted
    gelu, whole = case.activation is not None, case.tiles()["dx"][1]
    recomputed = gelu or (dx and not whole)
    assert ran == [
        kernel for kernel, needed in (
            ("norm", recomputed or dgamma or dweight), ("vectors", dx and not whole),
            ("bwd_du", recomputed or any(wanted[1:])), ("bwd_x", dx), ("bwd_weight", dgamma or dweight),
            ("finish", any(wanted[1:])), ("norm_sum", dgamma or dbeta),
        ) if needed
    ]  # fmt: skip


# Autocast


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("x_dtype", ["fp32", "half"])
@pytest.mark.parametrize("case", [SMALL, WIDE._replace(activation=None)], ids=str)
def test_autocast_rounds_weights_and_not_their_gradients(case, x_dtype, dtype):
    """The norm sees x and its own parameters as they came; W and its bias are rounded as they are read."""
    case = case._replace(dtype=dtype, x_dtype=dtype if x_dtype == "half" else "fp32", c=64, shape=(40, 10))
    inputs, dy = proofs.normal_operands(case)
    actual = proofs.on_kernels(case, inputs, dy)
    half = proofs.DTYPES[dtype]
    assert actual["y"].dtype == half
    assert actual["dx"].dtype == inputs[0].dtype
    assert all(actual[name].dtype == torch.float32 for name in proofs.NAMES[2:])
    # Neither was any of them rounded to half on its way: dx of x in fp32, too.
    for name in proofs.NAMES[1:] if x_dtype == "fp32" else proofs.NAMES[2:]:
        kept = actual[name].to(half).float() != actual[name]
        assert kept.float().mean() > 0.5, name
    assert inputs[3].to(half).float().ne(inputs[3]).any()


def test_autocast_with_all_in_half():
    """A model that was cast: nothing is wider than what autocast computes in."""
    case = SMALL._replace(dtype="bf16")
    inputs, dy = proofs.normal_operands(case)
    expected = proofs.on_kernels(case, inputs, dy)
    with torch.autocast("cpu", torch.bfloat16):
        actual = proofs.on_kernels(case, inputs, dy)
    assert all(torch.equal(a, expected[name]) for name, a in actual.items())


def test_dtypes_that_differ_without_autocast():
    x, *parameters = tensors()
    with pytest.raises(TypeError, match=r"weight is torch\.float32; the dtype of x, torch\.bfloat16, is allowed"):
        layer(x.bfloat16(), *parameters)


# What the kernels do not take


@pytest.mark.parametrize("change, what", [
    ({"dtype": torch.float64}, "x is float64; the kernels take bfloat16, float16 and float32"),
    ({"d": 0}, "C=8, D=0; the kernels take C up to 16384, D from 1 to 2^23"),
    ({"shape": (1, 16385)}, "C=16385, D=5; the kernels take C up to 16384"),
], ids=["float64", "no outputs", "too many channels"])  # fmt: skip
def test_what_is_not_taken_is_said(change, what):
    operands = tensors(**change)
    assert dk.supports(dk.layer_norm_linear, *tensors()) == (True, "")
    supported, reason = dk.supports(dk.layer_norm_linear, *operands)
    assert not supported
    assert what in reason
    said = re.escape(f'layer_norm_linear cannot run under backend("triton"): {what}')
    with pytest.raises(RuntimeError, match=said):
        layer(*operands)


@pytest.mark.parametrize("rows, c, d, taken", [
    (2**30 - 1, 8, 5, True), (2**30, 8, 5, False), (5, 2**14, 2**16, True), (5, 2**14, 2**16 + 1, False),
    (5, 8, 2**23, True), (5, 8, 2**23 + 1, False),
], ids=str)  # fmt: skip
def test_sizes_that_are_too_large_for_offsets_in_32_bits(rows, c, d, taken):
    """Nothing is computed here, and no tensor has more than one element."""
    x, weight = torch.zeros(()).expand(rows, c), torch.zeros(()).expand(d, c)
    supported, reason = dk.supports(dk.layer_norm_linear, x, None, None, weight)
    assert supported == taken
    assert taken or "2^30" in reason


def test_raw_operators_refuse_what_the_public_function_does():
    operands = tensors(dtype=torch.float64)
    with pytest.raises(ValueError, match="do not take this layer norm with linear layer: x is float64"):
        OPS.layer_norm_linear(*operands, 1e-6, None, torch.float64, "triton")


# PyTorch's machinery


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_opcheck(activation):
    operands = tensors((2, 3))
    opcheck(OPS.layer_norm_linear.default, (*requiring_grad(operands), 1e-6, activation, torch.float32, "triton"))
    y, mean, rstd = OPS.layer_norm_linear(*operands, 1e-6, activation, torch.float32, "triton")
    for wanted in ([True] * 5, [False, True, False, False, True]):
        opcheck(
            OPS.layer_norm_linear_backward.default,
            (torch.ones_like(y), operands[0], mean, rstd, *operands[1:], activation, wanted, "triton"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        operands = tensors((n, 4, 8))
        results = [with_gradients(function, operands) for function in (compiled, layer)]
        assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_an_error_that_says_so(transform):
    x, *parameters = tensors()
    calls = {
        "vmap": lambda: torch.func.vmap(lambda x: layer(x, *parameters))(x),
        "grad": lambda: torch.func.grad(lambda x: layer(x, *parameters).sum())(x),
        "jvp": lambda: torch.func.jvp(lambda x: layer(x, *parameters), (x,), (x,)),
    }
    with pytest.raises(RuntimeError, match=r"layer_norm_linear cannot run .*: a torch\.func transform is active"):
        calls[transform]()


def test_checkpointing_and_inference_mode():
    operands = tensors()
    expected = with_gradients(layer, operands)
    actual = with_gradients(
        lambda *t: torch.utils.checkpoint.checkpoint(lambda *t: layer(*t), *t, use_reentrant=False), operands
    )
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(layer(*operands), expected[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
def test_what_is_saved_for_the_backward_pass(layout, activation, autocast):
    """x as it lies in memory, two fp32 a row, and the parameters as they are: no copy, no u, no x̂."""
    case = SMALL._replace(shape=(20, 5), x=layout, dtype="bf16", x_dtype="fp32" if autocast else None)
    inputs, _ = proofs.normal_operands(case)
    leaves = [t.detach().requires_grad_() for t in inputs]
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), proofs.in_autocast(case, "cpu"):
        y = layer(*leaves, activation=activation)
    places = {t.untyped_storage().data_ptr() for t in inputs}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in places]
    assert [(t.dtype, t.shape) for t in new] == [(torch.float32, (20, 5))] * 2
    assert len(saved) == 7
    testing.assert_exact(torch.stack(new).isfinite().double(), torch.ones(2, 20, 5, dtype=torch.float64))
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in saved}


def test_bytes_that_a_row_keeps():
    """The figures of the family's README: x and two fp32; PyTorch keeps what the norm and the linear layer made."""
    inputs, _ = proofs.normal_operands(NormLinearCase("bf16", (50,), 96, 384, "gelu"))

    def bytes_of_a_row(function):
        leaves, kept = [t.detach().requires_grad_() for t in inputs], {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(*leaves)
        parameters = {t.untyped_storage().data_ptr() for t in leaves[1:]}
        assert y.shape == (50, 384)
        return sum(size for place, size in kept.items() if place not in parameters) / 50

    assert bytes_of_a_row(lambda *t: layer(*t, activation="gelu")) == 96 * 2 + 8 == 200
    composition = lambda x, g, b, w, c: F.gelu(F.linear(F.layer_norm(x, (96,), g, b), w, c))  # noqa: E731
    assert bytes_of_a_row(composition) == 1156  # on a CPU, whose norm keeps its statistics in bf16
