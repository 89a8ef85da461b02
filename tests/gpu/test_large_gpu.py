"""Maps of more than 2^31 elements: every element of the result, compared a part at a time."""

import contextlib
import gc
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import testing
from tests import depthwise_proofs as proofs
from tests.cases import KernelCase
from tests.gpu.conftest import BACKEND, DEVICE, ON_GPU, skip_without_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
skip_without_gpu()

# One map whose rows are beyond 2^31, and many whose images are. Neither width is a multiple of a strip's.
SHAPES = {"one map": (1, 40, 9000, 7330), "many maps": (16500, 40, 64, 61)}
PART = 2**27  # elements of a result that are compared at a time
if not ON_GPU:
    SHAPES, PART = {"one map": (1, 5, 20, 10), "many maps": (3, 5, 4, 10)}, 400
WAYS = {
    "tensor cores": KernelCase("bf16", 0, 0, 0, 0, 7, 7, 3, 3, cut="tensor whole"),
    "tensor cores, large": KernelCase("bf16", 0, 0, 0, 0, 21, 21, 10, 10, cut="tensor whole"),
    "pairs": KernelCase("bf16", 0, 0, 0, 0, 7, 7, 3, 3),
    "row by row": KernelCase("bf16", 0, 0, 0, 0, 7, 7, 3, 3, strict=True),
    "masked": KernelCase("bf16", 0, 0, 0, 0, 7, 7, 2, 4),
}
# All of which take minutes: a few that meet every kernel for small windows, and both shapes.
USUAL = {"one map": ("tensor cores", "pairs", "row by row"), "many maps": ("tensor cores", "pairs", "masked")}


def random_map(n: int, c: int, h: int, w: int) -> Tensor:
    """Whole numbers from −2 to 2, channels_last, made in place: a copy would not fit."""
    return torch.randint(-2, 3, (n, h, w, c), dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)


def parts(n: int, c: int, h: int, w: int) -> Iterator[tuple[slice, int, int]]:
    """(images, first row, row after the last) for about PART elements at a time."""
    images, rows = max(1, PART // (c * h * w)), max(1, min(h, PART // (c * w)))
    for image in range(0, n, images):
        for row in range(0, h, rows):
            yield slice(image, image + images), row, min(h, row + rows)


def under(x: Tensor, images: slice, rows: tuple[int, int], padding: tuple[int, int], kernel: tuple[int, int]) -> Tensor:
    """What those rows of a result see of x: with the zeros around the map, in float64, contiguous."""
    first, last = rows[0] - padding[0], rows[1] - 1 - padding[0] + kernel[0]
    begin, end = max(first, 0), min(last, x.shape[2])
    seen = x[images, :, begin:end].double().contiguous()
    return F.pad(seen, (padding[1], padding[1], begin - first, last - end))


def assert_convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding, actual: Tensor, what: str) -> None:
    bias = None if bias is None else bias.double()
    for images, first, last in parts(*actual.shape):
        seen = under(x, images, (first, last), padding, weight.shape[2:])
        expected = F.conv2d(seen, weight.double(), bias, groups=x.shape[1])
        testing.assert_exact(actual[images, :, first:last], expected, f"{what}, images {images}, rows {first}…{last}")


def weight_gradient(dy: Tensor, x: Tensor, padding, kernel: tuple[int, int]) -> Tensor:
    """Σ dy[n,c,h,w] · x[n, c, h+i−p, w+j−p], in float64."""
    dw = torch.zeros(x.shape[1], 1, *kernel, dtype=torch.float64, device=x.device)
    for images, first, last in parts(*dy.shape):
        seen, upstream = under(x, images, (first, last), padding, kernel), dy[images, :, first:last].double()
        rows, columns = upstream.shape[2:]
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                dw[:, 0, i, j] += (upstream * seen[:, :, i : i + rows, j : j + columns]).sum((0, 2, 3))
    return dw


@pytest.fixture
def memory(request):
    """Skips where the map, its gradient, y and its gradient do not fit."""
    gc.collect()
    elements = math.prod(SHAPES[request.node.callspec.params["shape"]])
    if ON_GPU:
        assert elements > 2**31
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info()[0], 4 * 2 * elements * 1.02 + 10 * 8 * PART
        if free < needed:
            pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("shape, way", [
    pytest.param(shape, way, marks=() if way in USUAL[shape] or not ON_GPU else pytest.mark.full)
    for shape in SHAPES for way in WAYS
])  # fmt: skip
def test_forward_and_backward(shape, way):
    n, c, h, w = SHAPES[shape]
    case = WAYS[way]._replace(n=n, c=c, h=h, w=w)
    kernel, padding = (case.kh, case.kw), (case.ph, case.pw)
    x = random_map(n, c, h, w).requires_grad_()
    weight, bias = (testing.integers(s, torch.bfloat16).to(DEVICE).requires_grad_() for s in ((c, 1, *kernel), (c,)))
    dy = random_map(n, c, *case.output)
    context = dk.strict() if case.strict else contextlib.nullcontext()
    with dk.backend(BACKEND), proofs.cut(case.cut), context:
        y = dk.depthwise_conv2d(x, weight, bias, padding=padding)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    with torch.no_grad():
        assert_convolved(x, weight, bias, padding, y, "y")
        turned = tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))
        assert_convolved(dy, weight.flip(2, 3), None, turned, dx, "dx")
        testing.assert_exact(dw, weight_gradient(dy, x, padding, kernel), "dw")
        total = sum(dy[images, :, first:last].double().sum((0, 2, 3)) for images, first, last in parts(*dy.shape))
        testing.assert_exact(db, total, "db")
