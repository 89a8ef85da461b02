"""``convnext_block``: the hand-written definition against the composition in its documentation."""

import pytest
import torch
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests.cases import CHANNELS, EMPTY_MAPS
from tests.dwconv_kernels.operands import block_operands, with_gradients

ROW_SCALE = 10


def ours(backend="reference", **settings):
    def run(*tensors):
        with dk.backend(backend):
            return dk.convnext_block(*tensors, **settings)

    return run


def pytorch(x, dw, dwb, nw, nb, w1, b1, w2, b2, layer_scale=None, row_scale=None, gw=None, gb=None, eps=1e-6):
    c = x.shape[1]
    t = F.conv2d(x, dw, dwb, padding=(dw.shape[2] // 2, dw.shape[3] // 2), groups=c).permute(0, 2, 3, 1)
    h = F.gelu(F.linear(F.layer_norm(t, (c,), nw, nb, eps), w1, b1))
    if gw is not None:
        g = h.norm(dim=(1, 2), keepdim=True)
        h = h + gw * (h * (g / (g.mean(-1, keepdim=True) + 1e-6))) + gb
    t = F.linear(h, w2, b2)
    t = t if layer_scale is None else layer_scale * t
    t = t.permute(0, 3, 1, 2)
    return x + t if row_scale is None else x + row_scale.view(-1, 1, 1, 1) * t


def to(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


# (shape, kernel, hidden, options): every option on and off, every memory policy, odd shapes, pairwise.
CASES = [
    ((2, 8, 7, 6), (7, 7), None, {}),
    ((3, 7, 5, 9), (7, 7), None, {"row_scale": True}),
    ((2, 6, 4, 4), (5, 3), 13, {"grn": True, "layer_scale": False}),
    ((5, 3, 6, 5), (3, 3), None, {"grn": True, "row_scale": True}),
    ((2, 17, 3, 3), (7, 7), 31, {"biases": False}),
    ((1, 1, 8, 8), (9, 9), None, {"norm": False}),
    ((2, 5, 1, 1), (7, 7), None, {"layer_scale": False, "row_scale": True, "biases": False}),
    ((1, 33, 5, 2), (1, 11), 40, {"norm": False, "grn": True}),
]


@pytest.mark.parametrize("shape, kernel, hidden, options", CASES, ids=str)
@pytest.mark.parametrize("memory", ["default", "lean", "fast"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_gradients_equal_pytorchs(shape, kernel, hidden, options, memory, backend):
    tensors = block_operands(shape, kernel, hidden, **options)
    actual = with_gradients(ours(backend, memory=memory), tensors, but=ROW_SCALE)
    expected = with_gradients(pytorch, tensors, but=ROW_SCALE)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10 * max(1.0, e.abs().max().item()), msg=f"number {i}")


@pytest.mark.parametrize("c", CHANNELS)
def test_every_number_of_channels(c):
    tensors = block_operands((1 + c % 2, c, 3, 2), (7, 7), 5 + c % 7, grn=c % 3 == 0, row_scale=c % 2 == 0)
    actual = with_gradients(ours(), tensors, but=ROW_SCALE)
    expected = with_gradients(pytorch, tensors, but=ROW_SCALE)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10 * max(1.0, e.abs().max().item()), msg=f"number {i}")


@pytest.mark.parametrize("memory", ["default", "lean", "fast"])
@pytest.mark.parametrize("grn", [False, True])
def test_gradcheck(memory, grn):
    tensors = block_operands((2, 3, 4, 5), (3, 3), 5, grn=grn, row_scale=True)
    tensors = [t if t is None or i == ROW_SCALE else t.requires_grad_() for i, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(ours(memory=memory), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"grn": True, "layer_scale": False}, {"row_scale": True}], ids=str)
@pytest.mark.parametrize("grn_std", [1.0, 0.02])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_precision_errors_no_larger_than_pytorchs(dtype, options, grn_std, backend):
    tensors = block_operands((3, 32, 14, 14), **options)
    tensors[-2:] = [None if t is None else t * grn_std for t in tensors[-2:]]
    tensors = to(tensors, dtype)
    dout = torch.randn(3, 32, 14, 14, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = with_gradients(ours(backend), tensors, lambda y: dout, but=ROW_SCALE)
    peer = with_gradients(pytorch, tensors, lambda y: dout, but=ROW_SCALE)
    expected = with_gradients(pytorch, to(tensors, torch.float64), lambda y: dout.double(), but=ROW_SCALE)
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        # A ratio of two errors of a few numbers is noise; and what PyTorch rounds in between is not ours to judge.
        rms, maximum = (1.1, 2) if e.numel() >= 1000 else (2, 3)
        testing.assert_no_worse(a, p, e, rms, maximum, f"number {i}")
        if backend == "reference":
            testing.assert_unbiased(a, e, what=f"number {i}")


def test_fp32_errors_no_larger_than_pytorchs():
    tensors = block_operands((4, 32, 14, 14), grn=True, row_scale=True, dtype=torch.float32)
    dout = torch.randn(4, 32, 14, 14, generator=torch.Generator().manual_seed(1))
    actual = with_gradients(ours(), tensors, lambda y: dout, but=ROW_SCALE)
    peer = with_gradients(pytorch, tensors, lambda y: dout, but=ROW_SCALE)
    expected = with_gradients(pytorch, to(tensors, torch.float64), lambda y: dout.double(), but=ROW_SCALE)
    for i, (a, p, e) in enumerate(zip(actual, peer, expected, strict=True)):
        testing.assert_no_worse(a, p, e, 2, 3, f"number {i}")


@pytest.mark.parametrize("layout", list(testing.in_layouts(torch.zeros(2, 4, 5, 6))))
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layouts_of_input_and_gradient(layout, backend):
    tensors = block_operands((2, 6, 7, 8), row_scale=True)
    expected = with_gradients(pytorch, tensors, but=ROW_SCALE)
    leaves = [t if t is None or i == ROW_SCALE else t.clone().requires_grad_() for i, t in enumerate(tensors)]
    leaves[0] = testing.in_layouts(tensors[0])[layout].requires_grad_()
    y = ours(backend)(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(y, wanted, testing.in_layouts(dy)[layout])
    for a, e in zip((y, *gradients), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == leaves[0].stride()


@pytest.mark.parametrize("shape", EMPTY_MAPS[:3], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("memory", ["default", "lean", "fast"])
def test_empty_maps(shape, backend, memory):
    tensors = block_operands(shape, grn=True, row_scale=True)
    y, dx, *gradients = with_gradients(ours(backend, memory=memory), tensors, but=ROW_SCALE)
    assert y.shape == dx.shape == shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_image_that_is_dropped_passes_through(backend):
    tensors = block_operands((2, 5, 6, 6), row_scale=True)  # row_scale is (0, 1.25)
    y, dx, *_ = with_gradients(ours(backend), tensors, lambda y: torch.ones_like(y), but=ROW_SCALE)
    assert torch.equal(y[0], tensors[0][0])
    assert torch.equal(dx[0], torch.ones_like(dx[0]))
    assert not torch.equal(y[1], tensors[0][1])


def test_gradients_with_the_other_tensors_frozen():
    tensors = block_operands((2, 5, 6, 6), grn=True)
    full = with_gradients(ours(), tensors, but=ROW_SCALE)[1:]
    present = [i for i, t in enumerate(tensors) if t is not None]
    for number, i in enumerate(present):
        leaves = [t if t is None else t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        y = ours()(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(y, [leaves[i]], dy)
        torch.testing.assert_close(gradient, full[number], rtol=1e-12, atol=1e-12)


def saved_bytes(function, *tensors) -> int:
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*tensors)
    for t in tensors:
        if t is not None:
            storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_memory_policies_save_what_they_promise():
    tensors = block_operands((2, 8, 16, 16), dtype=torch.float32)
    tensors = [t if t is None or i == ROW_SCALE else t.requires_grad_() for i, t in enumerate(tensors)]
    n, pixels = tensors[0].numel() * 4, 2 * 16 * 16 * 4
    assert saved_bytes(ours(memory="lean"), *tensors) == 0  # beyond x and the parameters
    assert saved_bytes(ours(memory="default"), *tensors) == n + 2 * pixels
    assert saved_bytes(ours(memory="fast"), *tensors) == n + 2 * pixels + 4 * n
    assert saved_bytes(ours("torch", memory="lean"), *tensors) == 0
    assert saved_bytes(ours("torch"), *tensors) >= 10 * n
