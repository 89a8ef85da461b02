"""Which implementation runs: environment variables, the backend in force, facts about device and Triton.

The only module that reads environment variables:

- ``DWCONV_KERNELS_BACKEND``: the backend that is in force from import on (``auto`` where it is not set);
- ``DWCONV_KERNELS_STRICT=1``: what :class:`strict` does, from import on;
- ``TRITON_INTERPRET=1``: Triton's own switch; kernels then run on CPU tensors, in its interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference", "torch")
FAMILIES = ("depthwise", "norm_linear", "block")
MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("1", "true", "on", "yes")


INTERPRETER = _switched_on("TRITON_INTERPRET")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


_DEFAULT = _checked(os.environ.get("DWCONV_KERNELS_BACKEND", "auto"), "environment variable DWCONV_KERNELS_BACKEND")
_entered: tuple[str, ...] = ()  # backends of the context managers that are open, the latest last
_backend = _DEFAULT


def current_backend() -> str:
    """The backend in force: one of ``auto``, ``triton``, ``reference``, ``torch``."""
    return _backend


class backend:
    """Context manager: run this package's operators on one backend, in the whole process, all threads of it.

    A backward pass runs on the backend of its forward pass, wherever it is called. (What ``torch.utils.checkpoint``
    computes a second time is a forward pass, and runs on the backend that is in force then.)

    - ``auto``: CUDA tensors on the kernels where :func:`supports` says yes, everything else on ``torch``;
    - ``triton``: the kernels, or an error that says why not;
    - ``reference``: the registered operators on their plain PyTorch definition with the hand-written backward;
    - ``torch``: a composition of PyTorch's own operators, with PyTorch's own autograd.

    Raises:
        ValueError: ``name`` is none of these.
    """

    def __init__(self, name: str):
        self.name = _checked(name, "name")

    def __enter__(self) -> backend:
        global _backend, _entered
        _entered = (*_entered, self.name)
        _backend = self.name
        return self

    def __exit__(self, *_) -> None:
        # Not "what was before": threads may leave in another order than they came.
        global _backend, _entered
        last = len(_entered) - 1
        while _entered[last] != self.name:
            last -= 1
        _entered = _entered[:last] + _entered[last + 1 :]
        _backend = _entered[-1] if _entered else _DEFAULT


_strict = int(_switched_on("DWCONV_KERNELS_STRICT"))  # how many ask for it
_strict_lock = threading.Lock()


class strict:
    """Context manager: every output of a depthwise kernel depends on its own window alone, in half types, too.

    In the fast form for 7×7 in half types, two rows of outputs come from sums and differences over the eight rows of
    both windows. Then

    - an Inf or NaN also reaches one row of outputs beyond its window, an Inf may come out as NaN, and bf16 values above
      1.7e38 overflow;
    - the rounding error of an output is 2⁻²⁴ times a small multiple of what is in those eight rows: a row of outputs
      over zeros, beside a row of large values, is not exact to its own last bit. The same holds for taps of the
      weight's gradient where even and odd rows differ by orders of magnitude.

    Kernels on tensor cores multiply with zeros, too: an Inf or NaN becomes NaN a few rows and columns beyond its window
    (depthwise/README.md says how many).

    Strict kernels take one row at a time, as they always do in fp32, use no tensor cores, and need more instructions
    (``python -m benchmarks.machine_code`` says how many). Beyond their sizes PyTorch's operators run. This holds in the
    whole process, all threads of it, for forward and backward passes that run inside, but for backward passes of such
    sizes whose forward pass ran outside. Other backends do not change.

    What is said of Inf and NaN is about x and dy, in y and dx. In a weight's gradient, a channel with an Inf or NaN in
    its map may get NaN for all of its taps, strict or not, and an Inf in the weight meets zeros beside the map: what
    is outside of the map is multiplied as 0.
    """

    def __enter__(self) -> strict:
        global _strict
        with _strict_lock:
            _strict += 1
        return self

    def __exit__(self, *_) -> None:
        global _strict
        with _strict_lock:
            _strict -= 1


def strict_kernels() -> bool:
    """Are kernels to be :class:`strict`?"""
    return _strict > 0


def select(operator: str, x: Tensor, why_not: Callable[[], str | None]) -> str:
    """The backend that one call runs on: ``torch``, ``reference`` or ``triton``.

    Args:
        operator: its public name, for the error.
        x: its main input.
        why_not: says why the kernels cannot take this call, or returns None; called only where it matters.

    Raises:
        RuntimeError: the backend in force is ``triton`` and the kernels cannot take this call.
        TypeError: it is ``reference`` and x is not floating-point.
    """
    chosen = _backend
    if chosen == "auto":
        # Exporters know ATen's operators and not ours; the composition is what they can convert.
        fit = x.is_cuda and not INTERPRETER and not exporting()  # never the interpreter unless asked for
        return "triton" if fit and why_not() is None else "torch"
    if chosen == "reference" and not x.is_floating_point():
        raise TypeError(f'x is {x.dtype}; floating-point dtypes are allowed under backend("reference")')
    if chosen == "triton":
        reason = why_not()
        if reason is not None:
            raise RuntimeError(f'{operator} cannot run under backend("triton"): {reason}')
    return chosen


_SUPPORT: dict[Callable, Callable[..., str | None]] = {}


def explained_by(why_not: Callable[..., str | None]) -> Callable[[Callable], Callable]:
    """Decorator of a public operator: ``why_not``, of the same signature, answers for it in :func:`supports`."""

    def decorate(operator: Callable) -> Callable:
        _SUPPORT[operator] = why_not
        return operator

    return decorate


def supports(operator: Callable, *args, **kwargs) -> tuple[bool, str]:
    """Would this call run on the Triton kernels? ``(True, "")``, or ``(False, reason)``.

    ``supports(dk.depthwise_conv2d, x, weight, padding=3)``. The backend in force does not matter.

    Raises:
        TypeError: ``operator`` is not one of this package's.
        ValueError, TypeError: the arguments are not valid for the operator, as in the call itself.
    """
    if operator not in _SUPPORT:
        names = ", ".join(sorted(known.__name__ for known in _SUPPORT))
        raise TypeError(f"operator is {operator!r}; allowed: {names}")
    reason = _SUPPORT[operator](*args, **kwargs)
    return reason is None, reason or ""


def why_not_device(family: str, x: Tensor) -> str | None:
    """Why no kernel of ``family`` runs on x's device; None where they do."""
    if x.is_cuda:
        return _why_not_cuda(x.device.index if x.device.index is not None else -1) or _why_not_loaded(family)
    if x.device.type == "cpu" and INTERPRETER:
        return _why_not_loaded(family)
    if x.device.type == "cpu":
        return "x is on cpu; the kernels run on CUDA devices (or, with TRITON_INTERPRET=1, in Triton's interpreter)"
    return f"x is on {x.device.type}; the kernels run on CUDA devices"


def kernel_status() -> tuple[bool, str]:
    """Do kernels run on this machine's GPU at all? ``(True, "")``, or ``(False, reason)``."""
    reason = _why_not_triton()
    reason = reason or _why_not_cuda(-1)
    if reason is None and not any(map(has_kernels, FAMILIES)):
        reason = _why_not_family(FAMILIES[0])
    return reason is None, reason or ""


def has_kernels(family: str) -> bool:
    """Are there kernels of ``family``, and the Triton to run them?"""
    return _why_not_family(family) is None


def launchers(family: str) -> ModuleType:
    """The module ``dwconv_kernels.<family>.launch``, imported at the first call: nothing else imports Triton.

    Raises:
        RuntimeError: the kernels of this family cannot be imported, with the reason.
    """
    reason = _why_not_loaded(family)
    if reason is not None:
        raise RuntimeError(f"no Triton kernels for {family}: {reason}")
    return _LAUNCHERS[family]


_LAUNCHERS: dict[str, ModuleType] = {}


def triton_version() -> str | None:
    """Version of the installed Triton, or None; does not import it."""
    for distribution in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _constant(function: Callable) -> Callable:
    """torch.compile takes the result of ``function`` as it is and does not trace how it was found out.

    What ``torch.compiler.assume_constant_result`` does, without the second that it takes to import Dynamo.
    """
    function._dynamo_marked_constant = True
    return function


def _found_once(function: Callable) -> Callable:
    """``function`` of what does not change while a process runs, and every call of an operator asks for."""
    found = {}

    @functools.wraps(function)
    def answer(*args):
        if args not in found:
            found[args] = function(*args)
        return found[args]

    return _constant(answer)


@_found_once
def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = triton_version()
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is installed; the kernels need {'.'.join(map(str, MIN_TRITON))} or newer"
    return None


@_found_once
def _why_not_family(family: str) -> str | None:
    reason = _why_not_triton()
    if reason is None and importlib.util.find_spec(f"{__package__}.{family}.launch") is None:
        reason = f"this version of dwconv_kernels has no Triton kernels for {family} yet"
    return reason


@_constant
def _why_not_loaded(family: str) -> str | None:
    # Apart from `launchers`, because torch.compile does not trace imports, and takes no module for a constant.
    reason = _why_not_family(family) or _FAILED.get(family)
    if reason is None and family not in _LAUNCHERS:
        try:
            _LAUNCHERS[family] = _import_launchers(family)
        except (ImportError, RuntimeError) as error:  # a reason like the others: `auto` then takes PyTorch's operators
            reason = _FAILED[family] = f"the kernels cannot be loaded: {error}"
    return reason


_FAILED: dict[str, str] = {}


def _import_launchers(family: str) -> ModuleType:
    interpreted = importlib.import_module("triton").knobs.runtime.interpret
    if interpreted != INTERPRETER:
        raise RuntimeError(
            f"Triton's interpreter is {'on' if interpreted else 'off'}, not as when dwconv_kernels was imported; set "
            f"TRITON_INTERPRET to 1 or 0 before Python starts"
        )
    if INTERPRETER:
        importlib.import_module(f"{__package__}.interpreter").repair()
    return importlib.import_module(f"{__package__}.{family}.launch")


@_found_once
def _why_not_cuda(index: int) -> str | None:
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the kernels are built for NVIDIA GPUs"
    if not torch.cuda.is_available():  # fake tensors can be on devices that are not there
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index if index >= 0 else None)
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer"
    return None


def arch(x: Tensor) -> int:
    """Compute capability of x's device, 90 for 9.0; 0 in the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and its current stream: x's, inside of this."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def tf32() -> bool:
    """Has the user let PyTorch multiply fp32 matrices in TF32?"""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9; since then, this raises once the new setting was used
        return torch.backends.cuda.matmul.allow_tf32
    return precision == "tf32"


@_constant
def tf32_in_convolutions_alone() -> bool:
    """May PyTorch multiply in TF32 in fp32 convolutions, but not in linear layers? That is its default.

    Our operators go by what linear layers may.
    """
    try:
        convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    except AttributeError:  # before PyTorch 2.9
        convolutions = torch.backends.cudnn.allow_tf32
    return convolutions and not tf32()


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 has none


def exporting() -> bool:
    """Is this call being recorded by torch.export, torch.jit.trace or an ONNX exporter?"""
    if torch.compiler.is_compiling():
        return _is_exporting()
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def engages(x: Tensor) -> bool:
    """Can an operator of this package do something else with x than PyTorch's own operators do, and is it to?

    Cheap, for modules that have a forward of their own to fall back to. True under every backend that somebody asked
    for; under ``auto`` for floating-point tensors on a GPU that kernels run on, and not for torch.func's transforms and
    forward-mode derivatives. Never while exporting or tracing, nor for proxies of torch.fx.
    """
    if not isinstance(x, Tensor) or exporting():
        return False
    if _backend != "auto":
        return True
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    if not x.is_cuda or INTERPRETER or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return _why_not_triton() is None and _why_not_cuda(x.device.index if x.device.index is not None else -1) is None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would have a convolution or a linear layer of x compute; None where it is off."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point():
        return None
    if device not in ("cuda", "cpu") and not torch.amp.is_autocast_available(device):  # meta
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
