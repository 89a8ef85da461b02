"""The registry of operators: inputs, passes, providers, bytes and FLOPs of each, one row of :data:`OPERATORS`.

Bytes are those of inputs read once and outputs written once, parameters included; what an implementation keeps from
forward to backward, or writes and reads again in between, is its own affair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import dwconv_kernels as dk
from benchmarks.contest import Contest, Cost, Entry, Prepare, Unavailable, Wrong, relative_error
from benchmarks.machine import Machine, bytes_of
from benchmarks.results import FALLBACK, OURS
from benchmarks.timing import timed
from dwconv_kernels import runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Further from the expected result than this, by norm, is wrong. A convolution is rounded once, which is a fifth of this
# at most (and one tap of 31×31 that is left out 3e-2); PyTorch's own that is rounded again and again needs half of it.
ROUNDED_ONCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}
ROUNDED_OFTEN = {"bf16": 4e-2, "fp16": 6e-3, "fp32": 1e-4}
LATE = ("max_autotune",)  # tunes for minutes


class Case(NamedTuple):
    """A map (N, C, H, W) that an operator works on, and the size of the depthwise kernel where there is one."""

    n: int
    c: int
    h: int
    w: int
    dtype: str = "bf16"
    kernel: tuple[int, int] | None = None

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    @property
    def hidden(self) -> int:
        return 4 * self.c

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        kernel = "" if self.kernel is None else " {}×{}".format(*self.kernel)
        return f"C={self.c} {self.h}×{self.w}{kernel} N={self.n}"


class Pass(NamedTuple):
    """What of an operator is timed: ``gradients`` of so many inputs, with or without the forward pass before them."""

    gradients: tuple[str, ...]
    with_forward: bool
    cost: Callable[[Case], Cost]


@dataclass(frozen=True)
class Operator:
    """One row of the registry.

    Attributes:
        inputs: the arguments by name; maps first, in channels_last.
        providers: by name, what makes the function of those arguments for a case.
        passes: by name of the suite.
        supports: would ours run on kernels, for a case and its arguments, and why not.
        tolerance: by dtype, how far by norm a result may be from that of PyTorch in a wider one.
        contiguous: providers that are given maps as (N, C, H, W) in memory.
    """

    name: str
    inputs: Callable[[Case, torch.device], dict[str, Tensor]]
    providers: dict[str, Callable[[Case], Callable[..., Tensor]]]
    passes: dict[str, Pass]
    supports: Callable[..., tuple[bool, str]]
    tolerance: dict[str, float]
    contiguous: tuple[str, ...] = ()

    def contest(self, suite: str, case: Case, providers: tuple[str, ...] | None = None, **options) -> Contest:
        """Of one pass on one case, with all providers or some; ``options`` are further fields of :class:`Contest`."""
        names = tuple(self.providers) if providers is None else providers
        return Contest(
            suite,
            str(case),
            case.dtype,
            names,
            open=functools.partial(_open, self, self.passes[suite], case),
            costs=(self.passes[suite].cost(case),),
            needs=(self.name,) if self.name != "block" else ("depthwise", "norm_linear", "block"),
            **{"late": LATE, **options},
        )


def _open(operator: Operator, timed_pass: Pass, case: Case, machine: Machine) -> Prepare:
    # Where backward is repeated over one forward pass, compiled ones must not eat what was saved for them.
    functorch_config.donated_buffer = timed_pass.with_forward
    one = operator.inputs(case, machine.device)
    # A pass touches about as much: forward writes a map like dy, and leaves dy alone.
    count = machine.sets_of_inputs(bytes_of(tuple(one.values())))
    sets = [one, *(operator.inputs(case, machine.device) for _ in range(count - 1))]
    expected = _expected(operator, timed_pass, case, one)

    def prepare(provider: str) -> Entry:
        function = operator.providers[provider](case)
        mine = [_arguments(inputs, provider in operator.contiguous, timed_pass.gradients) for inputs in sets]
        calls = [_call(function, arguments, timed_pass) for arguments in mine]
        results = calls[0]()
        error = relative_error(results, expected)
        allowed = operator.tolerance[case.dtype]
        if not error <= allowed:
            raise Wrong(f"{error:.2g} of the right result's norm away from it; {allowed} is allowed")
        del results
        run, method = machine.lap(calls, graph=True)
        facts = {"method": method, "error": error}
        if provider == OURS:
            arguments = {name: value.detach() for name, value in mine[0].items() if name != "dy"}
            supported, reason = operator.supports(case, **arguments)
            facts |= {"ran": "triton" if supported else "torch"}
            facts |= {"note": fallback(case) if supported else reason or None}
        return Entry(timed(machine.clock, run, len(calls)), facts)

    return prepare


def fallback(case: Case | None = None) -> str | None:
    """That a case's convolution was to run on tensor cores, and why it does not; without a case, that of any kernel.

    It depends on what Triton has compiled so far: to be asked after the first call.
    """
    launch = runtime.launchers("depthwise")
    kernel = None if case is None else case.kernel
    if case is not None and (
        kernel is None
        or not launch.config.on_tensor_cores(case.dtype, *kernel, (1, 1), (1, 1), case.c, runtime.strict_kernels())
    ):
        return None
    if launch.tensor is None:
        return f"{FALLBACK}: {launch._NO_GLUON}"
    if kernel is None:
        reason = "; ".join(launch.tensor._refusals.values()) or None
    else:
        reason = launch.tensor.why_refused(*kernel)
    return None if reason is None else f"{FALLBACK}: {reason}"


def _arguments(inputs: dict[str, Tensor], contiguous: bool, gradients: tuple[str, ...]) -> dict[str, Tensor]:
    arguments = {}
    for name, value in inputs.items():
        value = value.contiguous() if contiguous else value
        # Leaves of their own: two providers on one tensor would share its gradients' graph.
        arguments[name] = value.detach().requires_grad_(name in gradients)
    return arguments


def _call(function: Callable[..., Tensor], arguments: dict[str, Tensor], timed_pass: Pass) -> Callable[[], tuple]:
    """What is timed: a function without arguments, which returns a tuple of tensors."""
    leaves = [arguments[name] for name in timed_pass.gradients]
    dy = arguments["dy"]
    operands = {name: value for name, value in arguments.items() if name != "dy"}
    if not leaves:

        def forward() -> tuple:
            with torch.no_grad():
                return (function(**operands),)

        return forward
    if timed_pass.with_forward:
        return lambda: torch.autograd.grad(function(**operands), leaves, dy)
    y = function(**operands)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _expected(operator: Operator, timed_pass: Pass, case: Case, inputs: dict[str, Tensor]) -> tuple:
    """By PyTorch in a wider dtype, from the same inputs, contiguous: that convolution is slow, but never very slow."""
    wide = torch.float64 if case.dtype == "fp32" else torch.float32
    arguments = {name: value.to(wide).contiguous().detach() for name, value in inputs.items()}
    for name in timed_pass.gradients:
        arguments[name].requires_grad_()
    return tuple(t.detach() for t in _call(operator.providers["eager"](case), arguments, timed_pass)())


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """``torch.compile`` for the sizes at hand, as a user with one size would have it.

    max-autotune without its own CUDA graphs: one is made of all providers.
    """
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def tuned(function: Callable) -> Callable:
    if not torch.cuda.is_available():
        raise Unavailable("max-autotune chooses between kernels for GPUs")
    return compiled(function, "max-autotune-no-cudagraphs")


def with_compiled(eager: Callable[[Case], Callable]) -> dict[str, Callable[[Case], Callable]]:
    """The two providers that torch.compile makes of PyTorch's."""
    return {"compile": lambda case: compiled(eager(case)), "max_autotune": lambda case: tuned(eager(case))}


def _random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).add_(mean).to(dtype)


def _map(case: Case, device: torch.device) -> Tensor:
    x = _random(device, DTYPES[case.dtype], case.n, case.h, case.w, case.c)
    return x.permute(0, 3, 1, 2)


# --- depthwise convolution


def _depthwise_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    dtype, (kh, kw) = DTYPES[case.dtype], case.kernel
    return {
        "x": _map(case, device),
        "dy": _map(case, device),
        "weight": _random(device, dtype, case.c, 1, kh, kw, scale=(kh * kw) ** -0.5),
        "bias": _random(device, dtype, case.c),
    }


def _padding(case: Case) -> tuple[int, int]:
    return case.kernel[0] // 2, case.kernel[1] // 2


def _depthwise_ours(case: Case) -> Callable[..., Tensor]:
    return functools.partial(dk.depthwise_conv2d, padding=_padding(case))


def _depthwise_eager(case: Case) -> Callable[..., Tensor]:
    def conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=_padding(case), groups=case.c)

    return conv2d


def _depthwise_cost(with_bias: bool) -> Callable[[Case], Cost]:
    """Two maps and the weight, with the bias or without; every pass has the same products."""

    def cost(case: Case) -> Cost:
        moved = 2 * case.pixels * case.c + case.c * (case.kernel[0] * case.kernel[1] + with_bias)
        return Cost(moved * case.itemsize, 2 * _products(case))

    return cost


def _products(case: Case) -> int:
    """Of a depthwise convolution with "same" padding; what lies beside the map is no work."""

    def of_line(size: int, taps: int) -> int:
        return sum(0 <= place + tap - taps // 2 < size for place in range(size) for tap in range(taps))

    return case.n * case.c * of_line(case.h, case.kernel[0]) * of_line(case.w, case.kernel[1])


# --- layer norm + linear + GELU


def _norm_linear_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    dtype, c, d = DTYPES[case.dtype], case.c, case.hidden
    return {
        "x": _random(device, dtype, case.n, case.h, case.w, c, mean=0.5),
        "dy": _random(device, dtype, case.n, case.h, case.w, d),
        "norm_weight": _random(device, dtype, c, scale=0.1, mean=1.0),
        "norm_bias": _random(device, dtype, c, scale=0.1),
        "weight": _random(device, dtype, d, c, scale=c**-0.5),
        "bias": _random(device, dtype, d, scale=0.1),
    }


def _norm_linear_ours(case: Case) -> Callable[..., Tensor]:
    return functools.partial(dk.layer_norm_linear, activation="gelu")


def _norm_linear_eager(case: Case) -> Callable[..., Tensor]:
    def layer_norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), weight, bias))

    return layer_norm_linear


def _norm_linear_cost(case: Case, training: bool) -> Cost:
    """In training also backward: reads x, dy and the parameters again, writes dx and the gradients of parameters."""
    c, d, pixels = case.c, case.hidden, case.pixels
    parameters = 2 * c + c * d + d
    moved = pixels * (c + d) + parameters + (pixels * (2 * c + d) + 2 * parameters if training else 0)
    return Cost(moved * case.itemsize, (3 if training else 1) * 2 * pixels * c * d)


# --- the block

BLOCK_PARAMETERS = (
    "dw_weight", "dw_bias", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
    "layer_scale",
)  # fmt: skip


def _block_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    dtype, c, d, (kh, kw) = DTYPES[case.dtype], case.c, case.hidden, case.kernel
    return {
        "x": _map(case, device),
        "dy": _map(case, device),
        "dw_weight": _random(device, dtype, c, 1, kh, kw, scale=(kh * kw) ** -0.5),
        "dw_bias": _random(device, dtype, c, scale=0.1),
        "norm_weight": _random(device, dtype, c, scale=0.1, mean=1.0),
        "norm_bias": _random(device, dtype, c, scale=0.1),
        "fc1_weight": _random(device, dtype, d, c, scale=c**-0.5),
        "fc1_bias": _random(device, dtype, d, scale=0.1),
        "fc2_weight": _random(device, dtype, c, d, scale=d**-0.5),
        "fc2_bias": _random(device, dtype, c, scale=0.1),
        "layer_scale": _random(device, dtype, c, scale=0.1, mean=0.5),
    }


def _block_eager(case: Case) -> Callable[..., Tensor]:
    """As the original repository writes it."""

    def block(
        x, dw_weight, dw_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale
    ) -> Tensor:
        t = F.conv2d(x, dw_weight, dw_bias, padding=_padding(case), groups=case.c).permute(0, 2, 3, 1)
        t = F.layer_norm(t, (case.c,), norm_weight, norm_bias, 1e-6)
        t = layer_scale * F.linear(F.gelu(F.linear(t, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        return x + t.permute(0, 3, 1, 2)

    return block


def block_cost(case: Case, training: bool) -> Cost:
    """One operator: reads x and the parameters, writes the result.

    In training also backward: reads x, dout and the parameters again, writes dx and the gradients of parameters.
    """
    elements = case.pixels * case.c
    parameters = case.c * (case.kernel[0] * case.kernel[1] + 2 * case.hidden + 5) + case.hidden
    moved = 2 * elements + parameters + (3 * elements + 2 * parameters if training else 0)
    products = _products(case) + 2 * elements * case.hidden
    return Cost(moved * case.itemsize, (3 if training else 1) * 2 * products)


def _depthwise_supports(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[bool, str]:
    return dk.supports(dk.depthwise_conv2d, x, weight, bias, padding=_padding(case))


def _norm_linear_supports(case: Case, **arguments: Tensor) -> tuple[bool, str]:
    return dk.supports(dk.layer_norm_linear, **arguments, activation="gelu")


def _block_supports(case: Case, **arguments: Tensor) -> tuple[bool, str]:
    return dk.supports(dk.convnext_block, **arguments)


_PLAIN = {"eager": _depthwise_eager, "channels_last": _depthwise_eager}

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "depthwise",
            _depthwise_inputs,
            {OURS: _depthwise_ours, **_PLAIN, **with_compiled(_depthwise_eager)},
            {
                "depthwise_forward": Pass((), True, _depthwise_cost(with_bias=True)),
                "depthwise_input_gradient": Pass(("x",), False, _depthwise_cost(with_bias=False)),
                "depthwise_weight_gradient": Pass(("weight", "bias"), False, _depthwise_cost(with_bias=True)),
            },
            _depthwise_supports,
            ROUNDED_ONCE,
            contiguous=("eager",),
        ),
        Operator(
            "norm_linear",
            _norm_linear_inputs,
            {OURS: _norm_linear_ours, "eager": _norm_linear_eager, **with_compiled(_norm_linear_eager)},
            {
                "layer_norm_linear_forward": Pass((), True, functools.partial(_norm_linear_cost, training=False)),
                "layer_norm_linear_training": Pass(
                    ("x", "norm_weight", "norm_bias", "weight", "bias"),
                    True,
                    functools.partial(_norm_linear_cost, training=True),
                ),
            },
            _norm_linear_supports,
            ROUNDED_OFTEN,
        ),
        Operator(
            "block",
            _block_inputs,
            {
                OURS: lambda case: dk.convnext_block,
                "eager": _block_eager,
                "channels_last": _block_eager,
                **with_compiled(_block_eager),
            },
            {
                "block_forward": Pass((), True, functools.partial(block_cost, training=False)),
                "block_training": Pass(("x", *BLOCK_PARAMETERS), True, functools.partial(block_cost, training=True)),
            },
            _block_supports,
            ROUNDED_OFTEN,
            contiguous=("eager",),
        ),
    )
}
