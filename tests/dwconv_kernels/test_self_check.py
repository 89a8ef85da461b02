"""``python -m dwconv_kernels.self_check`` where there is no GPU: what it says, and that it sees what is wrong."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dwconv_kernels import runtime, self_check
from dwconv_kernels.depthwise import config

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not runtime.has_kernels("depthwise"), reason=runtime.kernel_status()[1])


def python(*arguments: str, folder=ROOT, **environment) -> tuple[int, str]:
    """Exit code and output, standard error included, of a Python process that sees no GPU."""
    unset = {"TRITON_INTERPRET", "DWCONV_KERNELS_STRICT"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
    )
    return done.returncode, done.stdout


def code(text: str) -> tuple[str, str]:
    return "-c", textwrap.dedent(text)


@needs_triton
def test_without_a_gpu_it_runs_the_interpreter_and_says_so(tmp_path):
    returned, out = python("-m", "dwconv_kernels.self_check", "--quick", folder=tmp_path)
    assert returned == 0, out
    assert "No GPU that the kernels run on: " in out
    assert "Triton's interpreter on the CPU, small maps" in out
    assert "nothing about a GPU" in out
    assert f"PyTorch {torch.__version__}" in out
    assert f"Triton {runtime.triton_version()}" in out
    checks = [line for line in out.splitlines() if line.startswith("ok ")]
    assert len(checks) == sum(len(case.checks) for case in self_check.CASES[: self_check.QUICK])
    assert "bf16 7×7" in checks[0]
    assert "[y+dx: fwd_pairs 7 strips, dw: bwd_weight_pairs 7 strips]" in checks[0]
    assert out.splitlines()[-1] == "The kernels are right."


# Each line spoils one thing, in a process that runs the interpreter; what is left of the cases is the second, fp32.
SABOTAGE = """
    import sys
    import torch
    from dwconv_kernels import runtime, self_check

    launch = runtime.launchers("depthwise")
    self_check.CASES = self_check.CASES[1:2]
    forward, backward = launch.depthwise_forward, launch.depthwise_backward
    calls = []

    def spoiled_forward(*arguments):
        calls.append(arguments)
        y = forward(*arguments)
        {forward}
        return y

    def spoiled_backward(*arguments):
        dx, dw, db = backward(*arguments)
        {backward}
        return dx, dw, db

    launch.depthwise_forward, launch.depthwise_backward = spoiled_forward, spoiled_backward
    """
SPOILED = {
    "a gradient": (
        "pass",
        "dw[4, 0, 3, 3] += 1",
        ["exact", "rounding"],
        "dw: 1 of 245 elements are wrong, the first at (4, 0, 3, 3): ",
    ),
    "chance": (
        "y[0, 0, 0, 0] *= 1 + 1e-6 * len(calls)",
        "pass",
        ["same bits"],
        "y: run 2 differs from the first, at (0",
    ),
    "a neighbour of NaN": ("y[y.isnan().roll(1, 1)] = torch.nan", "pass", ["Inf and NaN"], "y, as 0 or"),
    "an error": ("raise IndexError('no such row')", "pass", list(self_check.CHECKS), "IndexError: no such row"),
}


@needs_triton
@pytest.mark.parametrize("forward, backward, failing, message", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_fails_with_the_first_wrong_element(forward, backward, failing, message):
    program = code(
        textwrap.dedent(SABOTAGE).format(forward=forward, backward=backward) + "sys.exit(self_check.main([]))"
    )
    returned, out = python(*program, TRITON_INTERPRET="1")
    assert returned == 1, out
    lines = [line for line in out.splitlines() if line.startswith("FAILED ")]
    names = [re.split(r"\s{2,}", line)[2] for line in lines]
    assert set(failing) <= set(names), out
    assert message in lines[names.index(failing[0])]
    assert "FAILED: the kernels are not to be trusted" in out
    assert "The kernels are right." not in out


@needs_triton
def test_run_returns_the_results():
    program = textwrap.dedent(SABOTAGE).format(forward="y[0, 0, 0, 0] += 1", backward="pass")
    program += textwrap.dedent(
        """
        results = self_check.run("cpu", quick=True)
        print([(result.check, result.ok) for result in results])
        """
    )
    returned, out = python(*code(program), TRITON_INTERPRET="1")
    assert returned == 0, out
    assert out.splitlines()[-1] == str(
        [("exact", False), ("rounding", False), ("same bits", True), ("Inf and NaN", True)]
    )


def test_run_says_why_it_cannot():
    reason = "run on CUDA devices" if runtime.has_kernels("depthwise") else "no Triton kernels"
    if not runtime.INTERPRETER:
        with pytest.raises(RuntimeError, match=reason):
            self_check.run("cpu")


NO_TRITON = """
    import importlib.metadata, importlib.util, sys
    import torch, torch.utils.flop_counter
    {}
    from dwconv_kernels import self_check
    sys.exit(self_check.main([]))
    """


@pytest.mark.parametrize(
    "spoil, reason",
    [
        ("find_spec = importlib.util.find_spec\n"
         "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find_spec(name, *a)",
         "Triton is not installed"),
        ("importlib.util.find_spec = lambda name, *a: sys\nimportlib.metadata.version = lambda name: '3.5.1'",
         "Triton 3.5.1 is installed; the kernels need 3.6 or newer"),
    ],
    ids=["missing", "old"],
)  # fmt: skip
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_a_triton_that_will_do_nothing_is_proved(spoil, reason, interpret):
    returned, out = python(*code(textwrap.dedent(NO_TRITON).format(spoil)), TRITON_INTERPRET=interpret)
    assert returned == 2, out
    assert f"Nothing was checked: {reason}." in out
    assert "right" not in out


@pytest.mark.parametrize(
    "device, why", [("cuda:0", "Nothing was checked: "), ("tpu", "cpu, cuda or cuda:N is allowed")]
)
def test_a_device_that_is_not_there_is_an_error(device, why):
    returned, out = python("-m", "dwconv_kernels.self_check", "--device", device)
    assert returned == 2, out
    assert why in out


def choices(case, shape):
    """(kernel, strips, edge) of the three passes."""
    kh, kw = case.kernel
    same, (rows, columns) = case.pads == (kh // 2, kw // 2), case.pads
    at = (case.dtype, kh, kw, same)
    assert shape[2] + 2 * rows >= kh
    out = shape[3] + 2 * columns - kw + 1
    picked = (
        config.pick_forward(*at, out, case.strict),
        config.pick_forward(*at, shape[3], case.strict),
        config.pick_backward_weight(*at, out, case.strict),
    )
    return [(choice.kernel, choice.block_w, choice.edge) for choice in picked]


def test_the_cases_run_every_kernel_on_a_gpu_and_the_same_in_the_interpreter():
    met = {"half": set(), "fp32": set()}
    for case in self_check.CASES:
        assert choices(case, case.shape) == choices(case, case.small), case
        if case.kernel == (7, 7):
            met["fp32" if case.dtype == "fp32" else "half"].update(choices(case, case.shape))
    for kind, dtypes in {"half": ("bf16", "fp16"), "fp32": ("fp32",)}.items():
        shipped = {
            (choice.kernel, choice.block_w, choice.edge)
            for dtype in dtypes
            for strict in (False, True)
            for choice in config.shipped(dtype, 7, 7, strict)
        }
        assert met[kind] >= shipped
    kernels = {case.kernel for case in self_check.CASES}
    assert kernels >= {(3, 3), (5, 5), (7, 7), (9, 9), (1, 11), (11, 1)}
    assert {case.dtype for case in self_check.CASES} == set(config.DTYPES) == set(self_check.DTYPES)
    assert {check for case in self_check.CASES for check in case.checks} == set(self_check.CHECKS)
