"""What "right" means for the block's kernels, as functions of a case; see depthwise_proofs.py.

Results are dicts by the names of NAMES: of out, and of the gradients of what is given and wanted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import dwconv_kernels as dk
from dwconv_kernels import runtime, testing
from dwconv_kernels.block.reference import GRN_EPS, Parameters
from tests import norm_linear_proofs
from tests.block_cases import BlockCase
from tests.depthwise_proofs import DTYPES, fp32_ratios, map_in_layout, weight_in_layout
from tests.dwconv_kernels.operands import block_operands
from tests.norm_linear_proofs import parameter_in_layout

NAMES = ("out", "dx", *(f"d{name}" for name in Parameters._fields))
ROW_SCALE = 10  # its place among the operator's thirteen tensors
EPS = 1e-6
CONVOLVED = {"contiguous": "contiguous", "offset": "contiguous", "transposed": "transposed", "slice": "slice"}
# Of the multiprocessors that the resident kernel's blocks of rows are dealt to: more blocks than programs.
RESIDENT_PROGRAMS = 1


def given(case: BlockCase, tensors: list) -> list[Tensor | None]:
    """The thirteen tensors, without those that the case does not have."""
    flags = dict(zip((2, 6, 8), case.biases, strict=True))
    flags |= dict(zip((3, 4), case.norm, strict=True))
    flags |= {9: case.layer_scale, ROW_SCALE: case.row_scale, 11: case.grn, 12: case.grn}
    return [t if flags.get(i, True) else None for i, t in enumerate(tensors)]


def placed(case: BlockCase, tensors: list[Tensor | None], dout: Tensor, device: str) -> tuple[list, Tensor]:
    """Float64 tensors and dout in the case's dtypes and layouts."""
    dtype = DTYPES[case.dtype]
    kept = dtype if case.x_dtype is None else torch.float32
    x, dw, *rest = given(case, tensors)
    dw = weight_in_layout(dw.to(device, kept), CONVOLVED[case.parameters], case.offset)
    return [
        map_in_layout(x.to(device, DTYPES[case.x_dtype or case.dtype]), case.x, case.offset),
        dw,
        *(None if t is None else parameter_in_layout(t.to(device, kept), case.parameters, case.offset) for t in rest),
    ], map_in_layout(dout.to(device, DTYPES[case.dout_dtype]), case.dout, case.offset)


def normal_operands(case: BlockCase, device: str = "cpu", seed: int = 0) -> tuple[list, Tensor]:
    """(the thirteen tensors, dout) of normal values, None for what is not given."""
    shape = case.n, case.c, case.h, case.w
    tensors = block_operands(shape, (case.kh, case.kw), case.d, row_scale=True, grn=True, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    return placed(case, tensors, torch.randn(shape, generator=random, dtype=torch.float64), device)


@contextlib.contextmanager
def chosen(case: BlockCase) -> Iterator[None]:
    """Kernels and tiles are chosen as the case says; on a GPU, as there is one."""
    launch = runtime.launchers("block")
    config = launch.config
    resident = config.resident
    with contextlib.ExitStack() as stack:
        patch = lambda *arguments, **values: stack.enter_context(mock.patch.object(*arguments, **values))  # noqa: E731
        if runtime.INTERPRETER:
            patch(runtime, "arch", return_value=case.arch)
            patch(runtime, "tf32", return_value=case.tf32)
        if case.few is not None:
            patch(launch.norm_linear_config, "few_rows", return_value=case.few)
        if case.few is not None or (case.resident and runtime.INTERPRETER):
            patch(config, "few_rows", return_value=case.few_blocks())
        if case.resident:
            patch(config, "resident", side_effect=lambda dtype, c, d, arch, rows: resident(dtype, c, d, arch, 2**29))
            if runtime.INTERPRETER and case.forward()[0] == "fwd_resident":
                patch(config, "multiprocessors", return_value=RESIDENT_PROGRAMS)
        yield


@contextlib.contextmanager
def nan_where_nothing_is_stored() -> Iterator[None]:
    """Memory that is allocated and not filled is full of NaN, as PyTorch has it for its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def in_autocast(case: BlockCase, device: str):
    return contextlib.nullcontext() if case.x_dtype is None else torch.autocast(device, DTYPES[case.dtype])


def by_name(out: Tensor, gradients, tensors: list, wanted=(True,) * 13) -> dict[str, Tensor]:
    inputs = [i for i in range(13) if i != ROW_SCALE]
    names = [
        name for name, i in zip(NAMES[1:], inputs, strict=True) if tensors[i] is not None and wanted[i]
    ]  # fmt: skip
    return dict(zip(("out", *names), (out.detach(), *gradients), strict=True))


def on_kernels(
    case: BlockCase, tensors: list, dout: Tensor, wanted: tuple[bool, ...] = (True,) * 13, eps: float = EPS
) -> dict[str, Tensor]:
    """out, and the gradients that are ``wanted`` (thirteen flags). The tensors' strides are kept."""
    leaves = [
        t if t is None else t.detach().requires_grad_(need and i != ROW_SCALE)
        for i, (t, need) in enumerate(zip(tensors, wanted, strict=True))
    ]
    with dk.backend("triton"), chosen(case), nan_where_nothing_is_stored():
        with in_autocast(case, tensors[0].device.type):
            out = dk.convnext_block(*leaves, eps=eps, memory=case.memory)
        gradients = torch.autograd.grad(out, [t for t in leaves if t is not None and t.requires_grad], dout)
    return by_name(out, gradients, tensors, wanted)


def _composed(residual, x, dw, dwb, nw, nb, w1, b1, w2, b2, layer_scale, row_scale, gw, gb, eps, round_):
    """The composition of the operator's documentation; ``round_`` is what autocast does to operands on CUDA."""
    c = x.shape[1]
    linear = lambda t, w, b: F.linear(round_(t), round_(w), None if b is None else round_(b))  # noqa: E731
    t = F.conv2d(
        round_(x), round_(dw), None if dwb is None else round_(dwb), padding=(dw.shape[2] // 2, dw.shape[3] // 2),
        groups=c,
    )  # fmt: skip
    t = t.permute(0, 2, 3, 1)
    t = t if nw is None and nb is None else t.to((nw if nb is None else nb).dtype)
    h = F.gelu(linear(F.layer_norm(t, (c,), nw, nb, eps), w1, b1))
    if gw is not None:
        norm = h.norm(dim=(1, 2), keepdim=True)
        h = h + gw * (h * (norm / (norm.mean(-1, keepdim=True) + GRN_EPS))) + gb
    t = linear(h, w2, b2)
    t = (t if layer_scale is None else layer_scale * t).permute(0, 3, 1, 2)
    return residual + t if row_scale is None else residual + row_scale.view(-1, 1, 1, 1) * t


def by_pytorch(case: BlockCase, tensors: list, dout: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """The same by PyTorch's own operators, in the inputs' dtype; as autocast does it on CUDA where they are fp32."""
    leaves = [t if t is None or i == ROW_SCALE else t.detach().clone().requires_grad_() for i, t in enumerate(tensors)]
    out = _composed(leaves[0], *leaves, eps, lambda t: t.to(DTYPES[case.dtype]))
    gradients = torch.autograd.grad(out, [t for i, t in enumerate(leaves) if t is not None and i != ROW_SCALE], dout)
    return by_name(out.to(dout.dtype), gradients, tensors)


def exactly(case: BlockCase, tensors: list, dout: Tensor, eps: float = EPS) -> dict[str, Tensor]:
    """The same in float64, of operands as autocast rounds them."""
    wide = [None if t is None else t.double() for t in tensors]
    for i in (0, 1, 2, 5, 6, 7, 8):
        wide[i] = None if tensors[i] is None else tensors[i].to(DTYPES[case.dtype]).double()
    leaves = [t if t is None or i == ROW_SCALE else t.detach().clone().requires_grad_() for i, t in enumerate(wide)]
    residual = tensors[0].double().clone().requires_grad_()  # which is not rounded
    out = _composed(residual, *leaves, eps, lambda t: t)
    wanted = [t for i, t in enumerate(leaves) if t is not None and i != ROW_SCALE]
    through, *gradients = torch.autograd.grad(out, [residual, *wanted], dout.double())
    gradients[0] = gradients[0] + through
    return by_name(out, gradients, tensors)


# T0


def integer_operands(case: BlockCase, seed: int = 0) -> tuple[list, Tensor, float, tuple[Tensor, Tensor, Tensor]]:
    """Float64 (tensors, dout), ε, and rows of y with their mean and 1/√(variance + ε): nearly all of it is exact.

    The convolution's weight is ±1 at its middle, so that y is whatever it is to be: rows of whole numbers of which the
    norm is exact. u is kept where GELU is 0 or u by a bias that is more than all else. GRN's weight is 0, as roots
    are not exact; its sums then show in its weight's gradient alone.
    """
    random = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return testing.integers(shape, torch.float64, random)

    n, c, h, w, d = case.n, case.c, case.h, case.w, case.d
    y, mean, rstd, eps = norm_linear_proofs._integer_rows(case.rows, c, 1.0, random)
    if case.x == "expanded":
        y, mean, rstd = (
            t.view(n, h * w, -1)[:, :1].expand(-1, h * w, -1).reshape(t.shape) for t in (y, mean, rstd)
        )  # fmt: skip
    sign = torch.where(integers(c) > 0, 1.0, -1.0).double()
    dw = torch.zeros(c, 1, case.kh, case.kw, dtype=torch.float64)
    dw[:, 0, case.kh // 2, case.kw // 2] = sign
    tensors = [
        None, dw, integers(c), integers(c), integers(c), integers(d, c), None, integers(c, d), integers(c), integers(c),
        torch.tensor([2.0, 0.0, 1.0, 0.5], dtype=torch.float64).repeat(n // 4 + 2)[case.offset % 3 :][:n],
        torch.zeros(d, dtype=torch.float64), integers(d),
    ]  # fmt: skip
    biases = (case.biases[0], True, case.biases[2])  # without the second one, GELU would not be exact
    tensors = given(case._replace(biases=biases), tensors)
    shifted = y if tensors[2] is None else y - tensors[2]
    tensors[0] = (shifted * sign).view(n, h, w, c).permute(0, 3, 1, 2)
    normed = _affine((y - mean[:, None]) * rstd[:, None], *tensors[3:5])
    most = (normed @ tensors[5].t()).abs().max().item() + 32
    tensors[6] = torch.where(integers(d) > 0, 1.0, -1.0).double() * 2.0 ** math.ceil(math.log2(most))
    dout = integers(n, c, h, w)
    dout = dout[:, :, :1, :1].expand_as(dout) if case.dout == "expanded" else dout
    return tensors, dout, eps, (y, mean[:, None], rstd[:, None])


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    xhat = xhat if weight is None else xhat * weight
    return xhat if bias is None else xhat + bias


class Expected:
    """Results of :func:`integer_operands` in float64, rounded where kernels store something; and their magnitudes.

    Magnitudes are sums of absolute values. Of whole numbers below 2^24 they say that every order of summation is exact.
    """

    def __init__(self, case: BlockCase, tensors: list, dout: Tensor, rows: tuple[Tensor, Tensor, Tensor]):
        self.case = case
        self.round = lambda t: t.to(DTYPES[case.dtype]).double()
        x, _dw, self.dwb, self.nw, self.nb, self.w1, self.b1, self.w2, self.b2, scale, row_scale, _, self.gb = tensors
        flat = lambda t: t.permute(0, 2, 3, 1).reshape(case.rows, case.c)  # noqa: E731
        self.x, self.dout, (self.y, mean, self.rstd) = flat(x), flat(dout), rows
        self.scale = torch.ones(case.c, dtype=torch.float64) if scale is None else scale
        ones = torch.ones(case.n, dtype=torch.float64) if row_scale is None else row_scale
        self.factors = ones.repeat_interleave(case.h * case.w)[:, None]
        self.xhat = (self.y - mean) * self.rstd
        self.dw = _dw
        self.values: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._forward()
        self._second()
        self._first()

    def _map(self, rows: Tensor) -> Tensor:
        n, c, h, w = self.case.n, self.case.c, self.case.h, self.case.w
        return rows.view(n, h, w, c).permute(0, 3, 1, 2)

    def _keep(self, name: str, value: Tensor, magnitude: Tensor, terms: int) -> None:
        self.values[name] = value, magnitude.expand_as(value), terms

    def _forward(self) -> None:
        r = self.round
        self.normed = _affine(self.xhat, self.nw, self.nb)
        product = self.normed @ self.w1.t()
        self.passes = (product + self.b1 > 0).double()
        a = r(product + self.b1) * self.passes
        h = r(a + self.gb) if self.case.grn else a
        # What the backward pass makes them of, which may have been stored without the bias.
        self.product = r(product) if self.case.given_u or self.case.grn else product
        self.a = r(self.product + self.b1) * self.passes
        self.h = r(self.a + self.gb) if self.case.grn else self.a
        bias = 0.0 if self.b2 is None else self.b2
        factor = self.factors * self.scale
        out = self.x + factor * (h @ self.w2.t() + bias)
        magnitude = self.x.abs() + factor.abs() * (h.abs() @ self.w2.abs().t() + abs(bias))
        self._keep("out", self._map(out), self._map(magnitude), self.case.d + 3)

    def _second(self) -> None:
        d = self.factors * self.dout
        self.d = self.round(d)
        q, wide = self.d.t() @ self.h, self.d.abs().t() @ self.h.abs()
        sums, p = d.sum(0), self.case.rows
        self._keep("dfc2_weight", q * self.scale[:, None], wide * self.scale.abs()[:, None], p)
        bias = torch.zeros_like(sums) if self.b2 is None else self.b2
        dscale, magnitude = (self.w2 * q).sum(1) + bias * sums, (self.w2.abs() * wide).sum(1)
        self._keep("dlayer_scale", dscale, magnitude + bias.abs() * d.abs().sum(0), p + self.case.d)
        self._keep("dfc2_bias", sums * self.scale, d.abs().sum(0) * self.scale.abs(), p)

    def _first(self) -> None:
        case, r = self.case, self.round
        dh = self.d @ (self.scale[:, None] * self.w2)
        wide_dh = self.d.abs() @ (self.scale[:, None] * self.w2).abs()
        if case.grn:
            dh = r(dh)
            image = lambda t: t.view(case.n, -1, case.d).sum(1)  # noqa: E731
            norm = image(self.a.square()).sqrt()
            relative = norm / (norm.mean(-1, keepdim=True) + GRN_EPS)
            products, wide = image(dh * self.a), image((dh * self.a).abs())
            self._keep("dgrn_weight", (products * relative).sum(0), (wide * relative).sum(0), 2 * case.rows + case.d)
            self._keep("dgrn_bias", dh.sum(0), dh.abs().sum(0), case.rows)
        du = dh * self.passes
        db = du.sum(0)
        self._keep("dfc1_bias", db, (wide_dh * self.passes).sum(0), case.rows)
        du = r(du)
        xhat = r(self.xhat)
        g, wide = du.t() @ xhat, du.abs().t() @ xhat.abs()
        weight = torch.ones(case.c, dtype=torch.float64) if self.nw is None else self.nw
        bias = torch.zeros_like(weight) if self.nb is None else self.nb
        wide_db = du.abs().sum(0)
        dfc1 = g * weight + db[:, None] * bias
        self._keep("dfc1_weight", dfc1, wide * weight.abs() + wide_db[:, None] * bias.abs(), case.rows)
        terms = case.rows + case.d
        self._keep("dnorm_weight", (self.w1 * g).sum(0), (self.w1.abs() * wide).sum(0), terms)
        self._keep("dnorm_bias", self.w1.t() @ db, self.w1.abs().t() @ wide_db, terms)
        self._convolution(du, (du @ self.w1) * weight, bias)

    def _convolution(self, du: Tensor, g: Tensor, norm_bias: Tensor) -> None:
        case, c = self.case, self.case.c
        by_xhat = (g * self.xhat).sum(1, keepdim=True)
        if not case._whole():  # the same sum, but of what was stored
            by_xhat = (du * (self.product - norm_bias @ self.w1.t())).sum(1, keepdim=True)
        means = g.sum(1, keepdim=True) / c, self.xhat * by_xhat / c
        dy = self.rstd * (g - means[0] - means[1])
        terms = self.rstd * (g.abs() + means[0].abs() + means[1].abs())  # each is off by a few units in the last place
        half = 0.0 if case.dtype == "fp32" else testing.UNIT_ROUNDOFF[DTYPES[case.dtype]] * 2.0**24 / 3  # of one step
        exact = case.c & (case.c - 1) == 0
        dy, off = self._map(self.round(dy)), self._map(terms + (0.0 if exact else half * dy.abs()))
        leaf = [self._map(self.x).requires_grad_(), self.dw.clone().requires_grad_()]
        padding = case.kh // 2, case.kw // 2
        results = []
        for x, upstream in ((leaf[0], dy), (leaf[0].detach().abs().requires_grad_(), off)):
            y = F.conv2d(x, leaf[1], padding=padding, groups=c)
            results.append(torch.autograd.grad(y, (x, leaf[1]), upstream))
        magnitude = self._map(self.dout.abs()) + self.dw.sum((1, 2, 3)).abs()[:, None, None] * off
        self._keep("dx", self._map(self.dout) + results[0][0], magnitude, 4)
        self._keep("ddw_weight", results[0][1], results[1][1].abs(), case.rows + 4)
        self._keep("ddw_bias", dy.sum((0, 2, 3)), off.sum((0, 2, 3)), case.rows + 4)

    def check(self, actual: dict[str, Tensor]) -> None:
        # Of more channels, a value less its mean has more bits than fp32.
        power = self.case.c & (self.case.c - 1) == 0 and (self.case.c <= 512 or self.case.dtype != "fp32")
        for name, a in actual.items():
            value, magnitude, terms = (t.to(a.device) if isinstance(t, Tensor) else t for t in self.values[name])
            of_dy = name in ("dx", "ddw_weight", "ddw_bias")
            # x̂ of rows of odd length has halves.
            exact = magnitude.max() < 2**22 and name != "dgrn_weight"
            if (name == "dx" and power) or (exact and not of_dy):
                testing.assert_exact(a, value, name)
            else:
                testing.assert_componentwise(a, value, magnitude, terms, name)


def prove_exact(case: BlockCase, device: str = "cpu", seed: int = 0) -> None:
    """T0: on integers, every element is the float64 result rounded once; dtypes and strides are as promised.

    Of what is made of dy, that holds where C is a power of two, in fp32 up to 512, as the norm's two means are exact
    there; else each of dy's three terms may be off by 4 units in the last place.
    """
    case = case._replace(biases=(case.biases[0], True, case.biases[2]))
    tensors, dout, eps, rows = integer_operands(case, seed)
    inputs, upstream = placed(case, tensors, dout, device)
    actual = on_kernels(case, inputs, upstream, eps=eps)
    Expected(case, tensors, dout, rows).check(actual)
    assert_layouts(case, inputs, actual)


def assert_layouts(case: BlockCase, tensors: list, actual: dict[str, Tensor]) -> None:
    """Dtypes are those promised; maps lie as x does, and gradients as a dense parameter."""
    x = tensors[0]
    assert actual["out"].dtype == DTYPES[case.dout_dtype], f"out is {actual['out'].dtype}"
    formats = torch.contiguous_format, torch.channels_last
    dense = sum(x.is_contiguous(memory_format=one) for one in formats) == 1  # of one pixel or channel, x is in both
    like = torch.empty_like(x) if dense else None
    for name in ("out", "dx"):
        if name in actual and like is not None:
            assert actual[name].stride() == like.stride(), f"{name} has strides {actual[name].stride()}"
    inputs = [t for i, t in enumerate(tensors) if i != ROW_SCALE]
    for name, t in zip(NAMES[1:], inputs, strict=True):
        if name not in actual:
            continue
        assert actual[name].dtype == t.dtype, f"{name} is {actual[name].dtype}"
        assert actual[name].shape == t.shape, f"{name} has shape {actual[name].shape}"
        if name != "dx" and t.is_contiguous():
            assert actual[name].stride() == t.stride(), f"{name} has strides {actual[name].stride()}"


# T1


def bound_of_out(case: BlockCase, tensors: list) -> Tensor:
    """How far out may be from what is exact, its own rounding apart: what each step rounds, through those after it.

    The norm of rows that are off by e is off by r·(e + mean e + |x̂|·mean(|x̂|·e)) to first order. Without GRN.
    """
    x, dw, dwb, nw, nb, w1, b1, w2, b2, scale, row_scale, *_ = (None if t is None else t.double() for t in tensors)
    u, fp32 = testing.UNIT_ROUNDOFF[DTYPES[case.dtype]], 2.0**-24
    settings = {"padding": (case.kh // 2, case.kw // 2), "groups": case.c}
    rows = lambda t: t.permute(0, 2, 3, 1).reshape(case.rows, case.c)  # noqa: E731
    zero = torch.zeros((), dtype=torch.float64)
    magnitude = lambda t: zero if t is None else t.abs()  # noqa: E731
    y, wide = rows(F.conv2d(x, dw, dwb, **settings)), rows(F.conv2d(x.abs(), dw.abs(), **settings)) + magnitude(dwb)
    off = u * y.abs() + (case.kh * case.kw + 2 + 3 * u / fp32 * (case.x_dtype is not None)) * fp32 * wide
    mean, rstd = y.mean(1, keepdim=True), (y.var(1, unbiased=False, keepdim=True) + EPS).rsqrt()
    xhat = (y - mean) * rstd
    off = rstd * (off + off.mean(1, keepdim=True) + xhat.abs() * (xhat.abs() * off).mean(1, keepdim=True))
    off += (case.c + 8) * fp32 * (xhat.abs() + 1 + mean.abs() * rstd)
    normed = _affine(xhat, nw, nb)
    off = (off if nw is None else off * nw.abs()) + 2 * u * normed.abs()
    rounded = 2 * u * (case.x_dtype is not None) + (case.c + 2) * fp32  # weights, under autocast; the sums
    pre = F.linear(normed, w1, b1)
    h = F.gelu(pre)
    off = 1.13 * (off @ w1.abs().t() + rounded * (normed.abs() @ w1.abs().t() + magnitude(b1)))
    off += (u + 2**-21) * h.abs() + 2**-22
    rounded = 2 * u * (case.x_dtype is not None) + (case.d + 4) * fp32
    off = off @ w2.abs().t() + rounded * (h.abs() @ w2.abs().t() + magnitude(b2))
    off = off if scale is None else off * scale.abs()
    off = off.view(case.n, case.h, case.w, case.c).permute(0, 3, 1, 2)
    # Second order, and what rounding does to roundings.
    return 1.1 * (off if row_scale is None else off * row_scale.abs().view(-1, 1, 1, 1))


# T2, T3

ENOUGH = 30  # elements, for a ratio of root mean squares to say something
# Standard errors take elements for independent. Those of a map share what hidden channels, sums over images and means
# were rounded to: with GRN, out is up to 9 of them off, PyTorch's 10. Truncation is 40 of them off, of 2000 elements.
SIGMAS = {"out": 15.0, "dx": 15.0}


def prove_rounding(
    case: BlockCase, device: str = "cpu", seed: int = 0,
    make: Callable[..., tuple[list, Tensor]] = normal_operands, bounded: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """T1 of out without GRN, T2, T3: within the rounding bound, no further off than PyTorch, not biased."""
    tensors, dout = make(case, device, seed)
    actual, exact = on_kernels(case, tensors, dout), exactly(case, tensors, dout)
    peer = by_pytorch(case, tensors, dout)
    if bounded and not case.grn:
        off = bound_of_out(case, tensors)
        off = off + testing.UNIT_ROUNDOFF[actual["out"].dtype] * (exact["out"].abs() + off)
        error = (actual["out"].double() - exact["out"]).abs()
        assert (error <= off).all(), f"out: an element is {(error / off).max():.3g} times its rounding bound away"
    for name, a in actual.items():
        assert (a.isfinite() >= peer[name].isfinite()).all(), f"{name} is not finite"
        if a.numel() >= ENOUGH and peer[name].isfinite().all():
            testing.assert_no_worse(a, peer[name], exact[name], *_ratios(case, a), name)
        if a.dtype != torch.float32 and name in SIGMAS and a.numel() >= 500:
            most = SIGMAS[name] + norm_linear_proofs.CUT_OFF * math.sqrt(a.numel())
            testing.assert_unbiased(a, exact[name], most, name)
    assert_layouts(case, tensors, actual)
    return actual


def _ratios(case: BlockCase, result: Tensor) -> tuple[float, float]:
    """Of the root mean square and of the maximum of errors to PyTorch's; a ratio of few numbers is noise.

    With GRN, all pixels share what a few sums over an image are off by: over 6 seeds, ratios spread from 0.5 to 1.14.
    """
    if case.dtype != "fp32" and result.numel() >= 1000:
        return 1.25 if case.grn else 1.1, 2
    return fp32_ratios(result, (2, 3))
