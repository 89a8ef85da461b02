"""Choice of the backend, and what the package says about it."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dwconv_kernels as dk
from dwconv_kernels import runtime
from tests.dwconv_kernels.operands import block_operands, norm_linear_operands

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environment) -> str:
    """Output of ``code`` in a fresh interpreter; stderr is part of it where that fails."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
    )
    return done.stdout + (done.stderr if done.returncode else "")


CALLS = {
    dk.depthwise_conv2d: [torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3)],
    dk.layer_norm_linear: norm_linear_operands((3, 7), 5, dtype=torch.float32),
    dk.convnext_block: block_operands((2, 4, 8, 8), dtype=torch.float32),
}
each_call = pytest.mark.parametrize("operator, tensors", CALLS.items(), ids=[f.__name__ for f in CALLS])


@each_call
def test_supports_says_no_with_a_reason_on_cpu(operator, tensors):
    supported, reason = dk.supports(operator, *tensors)
    assert supported is False
    assert "x is on cpu" in reason


@each_call
def test_supports_checks_arguments_as_the_call_does(operator, tensors):
    wrong = [tensors[0][..., :1, :3] if t is tensors[0] else t for t in tensors]
    wrong[1] = torch.randn(9)
    with pytest.raises(ValueError, match="is allowed"):
        dk.supports(operator, *wrong)


def test_supports_takes_what_the_call_takes():
    x, weight = torch.randn(4, 8, 8), torch.randn(4, 1, 3, 3)  # no batch dimension
    assert dk.depthwise_conv2d(x, weight).shape == (4, 6, 6)
    assert "x is on cpu" in dk.supports(dk.depthwise_conv2d, x, weight)[1]


def test_fake_tensors_of_gpus_that_are_not_there():
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("this build of PyTorch asks CUDA's driver even for fake tensors, and there is none")
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, 6, 6, device="cuda"), torch.empty(4, 1, 3, 3, device="cuda")
        assert dk.depthwise_conv2d(x, weight).shape == (2, 4, 4, 4)


def test_supports_knows_its_own_operators():
    with pytest.raises(TypeError, match="allowed: convnext_block, depthwise_conv2d, layer_norm_linear"):
        dk.supports(torch.nn.functional.conv2d, torch.randn(1, 1, 3, 3))


@each_call
def test_the_triton_backend_runs_kernels_or_says_why_not(operator, tensors):
    with dk.backend("triton"), pytest.raises(RuntimeError, match=rf"{operator.__name__} cannot run .*x is on cpu"):
        operator(*tensors)


@each_call
def test_which_backend_ran_shows_in_the_graph(operator, tensors):
    tensors = [t if t is None else t.clone().requires_grad_() for t in tensors]
    names = {}
    for backend in ("auto", "torch", "reference"):
        with dk.backend(backend):
            names[backend] = type(operator(*tensors).grad_fn).__name__
    assert "FunctionBackward" in names["reference"]
    assert "Function" not in names["torch"]
    assert names["auto"] == names["torch"]  # on CPU, auto is plain PyTorch


def test_backends_nest_and_survive_errors():
    assert runtime.current_backend() == "auto"
    again = dk.backend("reference")
    with again, dk.backend("torch"):
        with again:
            assert runtime.current_backend() == "reference"
        assert runtime.current_backend() == "torch"
        with pytest.raises(ZeroDivisionError), dk.backend("triton"):
            _ = 1 / 0
        assert runtime.current_backend() == "torch"
    assert runtime.current_backend() == "auto"


def test_threads_that_leave_in_another_order_leave_nothing_behind():
    first, second = dk.backend("reference"), dk.backend("torch")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert runtime.current_backend() == "torch"
    second.__exit__()
    assert runtime.current_backend() == "auto"


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match=r"name is 'cuda'; allowed: auto, triton, reference, torch"):
        dk.backend("cuda")


def test_backward_runs_where_forward_ran():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3, requires_grad=True)
    with dk.backend("reference"):
        y = dk.depthwise_conv2d(x, weight)
    with dk.backend("triton"):  # would raise
        y.sum().backward()
    assert weight.grad.isfinite().all()


def test_environment_variable():
    code = "import dwconv_kernels.runtime as r; print(r.current_backend())"
    assert run_python(code, DWCONV_KERNELS_BACKEND="reference").strip() == "reference"
    out = run_python(code, DWCONV_KERNELS_BACKEND="fast")
    assert "DWCONV_KERNELS_BACKEND is 'fast'; allowed: auto, triton, reference, torch" in out


BLOCK_TRITON = """
    import sys

    class NoTriton:
        def find_spec(self, name, path=None, target=None):
            if name == "triton" or name.startswith("triton."):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NoTriton())
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
"""


def test_everything_but_the_kernels_works_without_triton():
    """The suite itself, in a process that cannot import Triton (macOS, Windows, CPU builds of PyTorch)."""
    code = textwrap.dedent(BLOCK_TRITON) + textwrap.dedent(
        """
        import pytest, torch
        import dwconv_kernels as dk
        x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
        print(dk.runtime.kernel_status())
        try:
            dk.runtime.launchers("depthwise")
        except RuntimeError as error:
            print(error)
        tests = ["tests/dwconv_kernels/test_depthwise.py", "tests/dwconv_kernels/test_modules.py"]
        print("exit code", int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))
        assert "triton" not in sys.modules
        """
    )
    out = run_python(code)
    assert "(False, 'Triton is not installed')" in out
    assert "no Triton kernels for depthwise: Triton is not installed" in out
    assert out.rstrip().endswith("exit code 0"), out


def test_importing_the_packages_imports_nothing_optional():
    code = """
        import sys
        import torch, torch.utils.flop_counter  # which imports Triton and tqdm where they are
        before = set(sys.modules)
        import dwconv_kernels, convnext_fast
        names = "triton timm torchvision transformers safetensors matplotlib sklearn kornia tqdm PIL".split()
        names.append("torch._dynamo")  # takes a second
        print([name for name in names if name in set(sys.modules) - before])
    """
    assert run_python(code).strip() == "[]"


def test_facts_about_the_machine_are_constants_to_the_compiler():
    """Nothing of how they are found out can be traced; on a GPU every compiled call asks for all three."""

    def function(x):
        reasons = (runtime._why_not_triton(), runtime._why_not_family("depthwise"), runtime._why_not_cuda(0))
        return x + len([reason for reason in reasons if reason is None])

    torch._dynamo.reset()
    x = torch.zeros(2)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def test_an_old_triton_is_named(monkeypatch):
    for found_once in ("_why_not_family", "_why_not_triton"):
        monkeypatch.setattr(runtime, found_once, getattr(runtime, found_once).__wrapped__)
    monkeypatch.setattr(runtime, "triton_version", lambda: "3.2.0")
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match=r"Triton 3\.2\.0 is installed; the kernels need 3\.6 or newer"):
        runtime.launchers("depthwise")


def test_old_gpus_and_rocm_are_named(monkeypatch):
    assert runtime._why_not_cuda.__wrapped__(0) == "PyTorch sees no CUDA device" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "sm_75; the kernels need sm_80" in runtime._why_not_cuda.__wrapped__(0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in runtime._why_not_cuda.__wrapped__(0)


def test_who_engages(monkeypatch):
    """Under `auto`, floating-point tensors on a GPU with kernels; under other backends, whatever is not recorded."""
    x = torch.randn(2, 4, 8, 8)
    assert not dk.engages(x)
    for backend in ("torch", "reference"):
        with dk.backend(backend):
            assert dk.engages(x)
            assert not dk.engages(None)
            monkeypatch.setattr(runtime, "exporting", lambda: True)
            assert not dk.engages(x)
            monkeypatch.undo()
    monkeypatch.setattr(runtime, "_why_not_cuda", lambda index: None if index == 0 else "too old")
    monkeypatch.setattr(runtime, "_why_not_triton", lambda: None)
    monkeypatch.setattr(runtime, "INTERPRETER", False)
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dk.engages(torch.empty(1, dtype=dtype, device="cuda:0"))
        assert not dk.engages(torch.empty(1, dtype=torch.float64, device="cuda:0"))
        assert not dk.engages(torch.empty(1, device="cuda:1"))
        x = torch.empty(1, device="cuda:0")
        with torch.autograd.forward_ad.dual_level():
            assert not dk.engages(x)
    seen = []
    monkeypatch.setattr(runtime, "_why_not_cuda", lambda index: seen.append(index))
    torch.func.vmap(lambda t: seen.append(dk.engages(t)) or t)(torch.zeros(2))
    assert seen == [False]


@pytest.mark.parametrize("arguments, reason", [
    ((7, 1, 3), None), (((1, 11), 1, "same"), None), ((5, 1, "valid"), None), (((5, 3),), None),
    ((7, 2, 3), None), ((7, 1, 6, 2), None), ((13, 1, 6), None), ((7, 3, 3), r"stride \(3, 3\)"),
    ((7, 1, 12, 4), r"dilation \(4, 4\)"), ((6, 1, 3), "the kernel is 6×6"), ((6, 1, "same"), "even size"),
    ((53, 1, 26), "the kernel is 53×53"), ((7, 1, 7), r"padding is \(7, 7\)"),
], ids=str)  # fmt: skip
def test_geometry_with_kernels(arguments, reason):
    """As `supports` says of a call, where there are kernels at all."""
    taken, why = dk.depthwise_kernels_take(*arguments)
    assert taken == (reason is None)
    assert re.search(reason or "^$", why)


@pytest.mark.parametrize("arguments, error, message", [
    ((0,), ValueError, "kernel_size is 0"), (("a",), TypeError, "kernel_size is 'a'"),
    ((7, 0), ValueError, "stride is 0"), ((7, 1, "full"), TypeError, "padding is 'full'"),
    ((7, 1, -1), ValueError, "padding is -1"), ((7, 2, "same"), ValueError, "only stride 1"),
], ids=str)  # fmt: skip
def test_geometry_that_is_none(arguments, error, message):
    with pytest.raises(error, match=message):
        dk.depthwise_kernels_take(*arguments)


def test_tf32_in_convolutions_alone():
    """With either of PyTorch's ways to say it; reading the older one raises once the newer was used."""
    code = """
        import torch, dwconv_kernels as dk
        print(dk.tf32_in_convolutions_alone(), end=" ")
        torch.set_float32_matmul_precision("high")
        print(dk.tf32_in_convolutions_alone(), end=" ")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        print(dk.tf32_in_convolutions_alone(), end=" ")
        if hasattr(torch.backends.cudnn, "conv"):
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            print(dk.tf32_in_convolutions_alone(), end=" ")
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            print(dk.tf32_in_convolutions_alone(), end=" ")
    """
    assert run_python(code).split() in (["True", "False", "False"], ["True", "False", "False", "True", "False"])
