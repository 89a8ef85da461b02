"""What surrounds the depthwise kernels, in Triton's interpreter: layouts, autocast, empty maps, PyTorch's machinery."""

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests import depthwise_proofs as proofs
from tests.cases import EMPTY_MAPS, LAYOUTS, WEIGHT_LAYOUTS, KernelCase
from tests.dwconv_kernels.operands import requiring_grad, with_gradients

pytestmark = pytest.mark.usefixtures("guard")

OPS = torch.ops.dwconv_kernels
SMALL = KernelCase("fp32", 2, 3, 4, 8, 3, 3, 1, 1)


def integers(shape):
    return testing.integers(shape, generator=torch.Generator().manual_seed(sum(shape)))


def convolution(x, w, b=None):
    with dk.backend("triton"):
        return dk.depthwise_conv2d(x, w, b, padding=(w.shape[2] // 2, w.shape[3] // 2))


def tensors(shape=(2, 3, 4, 8), kernel=(3, 3), dtype=torch.float32):
    return [integers(s).to(dtype) for s in (shape, (shape[1], 1, *kernel), (shape[1],))]


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_x(layout):
    """And dy's layout shows in nothing."""
    (x, w, b), dy = proofs.operands(SMALL._replace(x=layout), integers)
    y, dx, _, _ = proofs.on_kernels(SMALL, [x, w, b], dy)
    channels_last = layout in ("channels_last", "channels_last_slice", "channels_last_offset")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_gradient_has_the_strides_of_the_weight(layout):
    (x, w, b), dy = proofs.operands(SMALL._replace(weight=layout), integers)
    _, _, dw, db = proofs.on_kernels(SMALL, [x, w, b], dy)
    assert dw.stride() == (w.stride() if layout in ("contiguous", "channels_last") else (9, 9, 3, 1))
    assert db.stride() == (1,)


@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if 0 < sum(w) < 3], ids=str)
def test_gradients_with_other_tensors_frozen(wanted, guard):
    (x, w, b), dy = proofs.operands(SMALL, integers)
    full = proofs.exactly(SMALL, [x, w, b], dy)
    actual = proofs.on_kernels(SMALL, [x, w, b], dy, wanted)
    for a, i in zip(actual[1:], (i for i in range(3) if wanted[i]), strict=True):
        testing.assert_exact(a, full[1 + i], proofs.NAMES[1 + i])
    ran = [launch.kernel for launch in guard.launches]
    assert ran.count("_depthwise_fwd_kernel") == 1 + wanted[0]
    assert ran.count("_depthwise_bwd_weight_kernel") == (wanted[1] or wanted[2])


def test_a_map_without_a_batch_dimension_and_padding_in_words():
    x, w, _ = tensors((1, 3, 5, 6), (3, 5))
    with dk.backend("triton"):
        for padding in ("same", "valid"):
            y = dk.depthwise_conv2d(x[0], w, padding=padding)
            testing.assert_exact(y, F.conv2d(x[0].double(), w.double(), padding=padding, groups=3), padding)


@pytest.mark.parametrize("shape", EMPTY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_empty_maps(shape, dtype, guard):
    x, w, b = (t.requires_grad_() for t in tensors(shape, (7, 7), dtype))
    y = convolution(x, w, b)
    assert y.shape == shape
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert dx.shape == shape
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))
    assert {launch.kernel for launch in guard.launches} == set()


# Autocast


@pytest.mark.parametrize("dtype, kernel, x_dtype", [
    (torch.bfloat16, (7, 7), "half"), (torch.bfloat16, (3, 3), "fp32"), (torch.float16, (3, 5), "half"),
], ids=str)  # fmt: skip
def test_autocast_rounds_parameters_and_not_their_gradients(dtype, kernel, x_dtype, guard):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(1, 10, (2, 3, 5, 10), generator=g).float().contiguous(memory_format=torch.channels_last)
    sign = torch.randint(0, 2, x.shape, generator=g) * 2 - 1
    # Half way between neighbours of dtype and beside it, where sums in which much cancels show that they were rounded.
    step = torch.finfo(dtype).eps / 4
    w = 1 + step * torch.randint(-4, 5, (3, 1, *kernel), generator=g).float()
    b = 1 + step * torch.randint(-4, 5, (3,), generator=g).float()
    assert w.to(dtype).float().ne(w).any()
    for signed, dy in ((x * sign, torch.ones_like(x)), (x, x)):
        inputs = signed if x_dtype == "fp32" else signed.to(dtype)
        leaves = [inputs.requires_grad_(), w.clone().requires_grad_(), b.clone().requires_grad_()]
        with torch.autocast("cpu", dtype):
            y = convolution(*leaves)
        actual = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
        case = SMALL._replace(c=3, ph=kernel[0] // 2, pw=kernel[1] // 2)
        expected = proofs.exactly(case, [signed, w.to(dtype), b.to(dtype)], dy)
        assert [t.dtype for t in actual] == [dtype, inputs.dtype, torch.float32, torch.float32]
        # dx was rounded to the half type before it was what autocast's cast makes of it.
        for name, a, e in zip(proofs.NAMES, actual, expected, strict=True):
            testing.assert_exact(a, e.to(dtype).double() if name == "dx" else e, name)
    rounded_first = [t.to(dtype).float() for t in actual[2:]]
    assert rounded_first[0].ne(actual[2]).any()
    assert any("pairs" in launch.kernel for launch in guard.launches) == (kernel == (7, 7))


def test_dtypes_that_differ_without_autocast():
    x, w, b = tensors()
    with pytest.raises(TypeError, match=r"weight is torch\.float32; the dtype of x, torch\.bfloat16, is allowed"):
        convolution(x.bfloat16(), w, b)


# What the kernels do not take, and PyTorch's machinery


def test_what_is_not_taken_is_said():
    x, w, b = tensors((1, 3, 16, 16))
    assert dk.supports(dk.depthwise_conv2d, x, w, b, padding=1) == (True, "")
    for arguments, what in (
        ({"stride": 3}, r"stride \(3, 3\); the kernels go up to stride 2"),
        ({"dilation": 4}, r"dilation \(4, 4\); the kernels go up to dilation 3"),
        ({"stride": 2, "dilation": 2}, r"stride \(2, 2\), dilation \(2, 2\); the kernels have one or the other"),
        ({"padding": 3}, r"padding is \(3, 3\); .* here \(2, 2\)"),
        ({"x": x.double(), "weight": w.double()}, "x is float64; the kernels take bfloat16, float16 and float32"),
        ({"weight": w[:, :, :2]}, "the kernel is 2×3; the kernels take odd sizes"),
        ({"weight": torch.ones(3, 1, 19, 3), "padding": (9, 1)}, "the kernel is 19×3, and beyond 17×17"),
        ({"weight": torch.ones(3, 1, 1, 53), "padding": (0, 26)}, "the kernel is 1×53; the kernels go up to 51×51"),
        ({"weight": w[:, :, :2, :2], "padding": "same"}, "padded unevenly"),
    ):
        arguments = {"x": x, "weight": w, **arguments}
        assert dk.supports(dk.depthwise_conv2d, **arguments)[0] is False
        with dk.backend("triton"), pytest.raises(RuntimeError, match=rf"depthwise_conv2d cannot run .*: .*{what}"):
            dk.depthwise_conv2d(**arguments)


@pytest.mark.parametrize("shape, padding, taken", [
    ((1, 2**15, 1, 2**15 - 1), (0, 0), True),
    ((1, 2**15, 1, 2**15 - 1), (0, 1), False),
    ((1, 2**15, 1, 2**15), (0, 0), False),
    ((1, 1, 1, 2**15 + 1), (0, 0), False),
    ((2**30 - 1, 1, 1, 1), (0, 0), True),
    ((2**30, 1, 1, 1), (0, 0), False),
    ((1, 1, 2**30, 1), (0, 0), False),
], ids=str)  # fmt: skip
def test_maps_that_are_too_large_for_offsets_in_32_bits(shape, padding, taken):
    """Offsets of rows are computed in 64 bits, those within one in 32. Nothing is computed here."""
    x, w = torch.zeros(()).expand(shape), torch.zeros(()).expand(shape[1], 1, 1, 1 + 2 * padding[1])
    supported, reason = dk.supports(dk.depthwise_conv2d, x, w, padding=padding)
    assert supported == taken
    assert taken or all(part in reason for part in (str(shape), "W up to 32768", "C·W, N and H below 2^30"))


@pytest.mark.parametrize("x_format, w_format", [
    (torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format),
], ids=str)  # fmt: skip
def test_opcheck(x_format, w_format):
    x, w, b = tensors((1, 2, 3, 4))
    x, w = x.to(memory_format=x_format), w.to(memory_format=w_format)
    geometry = ([1, 1], [1, 1], [1, 1])
    opcheck(OPS.depthwise_conv2d.default, (*requiring_grad([x, w, b]), *geometry, "triton"))
    for wanted in ([True] * 3, [False, True, False]):
        opcheck(OPS.depthwise_conv2d_backward.default, (integers(x.shape), x, w, b, *geometry, wanted, "triton"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (1, 2):
        operands = tensors((n, 2, 4, 5))
        results = [with_gradients(function, operands) for function in (compiled, convolution)]
        assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_an_error_that_says_so(transform):
    x, w, _ = tensors()
    calls = {
        "vmap": lambda: torch.func.vmap(convolution, (0, None))(x.unsqueeze(0), w),
        "grad": lambda: torch.func.grad(lambda x: convolution(x, w).sum())(x),
        "jvp": lambda: torch.func.jvp(lambda x: convolution(x, w), (x,), (x,)),
    }
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d cannot run .*: a torch\.func transform is active"):
        calls[transform]()


def test_checkpointing_and_inference_mode():
    operands = tensors()
    expected = with_gradients(convolution, operands)
    actual = with_gradients(
        lambda *t: torch.utils.checkpoint.checkpoint(lambda *t: convolution(*t), *t, use_reentrant=False), operands
    )
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(convolution(*operands), expected[0])
