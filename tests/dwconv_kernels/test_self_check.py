"""``python -m dwconv_kernels.self_check`` where there is no GPU: what it says, and that it sees what is wrong."""

import itertools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch

from dwconv_kernels import runtime, self_check, self_check_depthwise, self_check_norm_linear
from dwconv_kernels.depthwise import config
from dwconv_kernels.devices import MULTIPROCESSORS
from dwconv_kernels.norm_linear import config as norm_linear_config
from dwconv_kernels.self_check_common import DTYPES

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
    quick = [case for family in self_check.FAMILIES.values() for case in family.CASES[: self_check.QUICK]]
    assert len(checks) == sum(len(case.checks) for case in quick)
    assert "bf16 7×7" in checks[0]
    assert "[y+dx: fwd_pairs 7 strips, dw: bwd_weight_pairs 7 strips]" in checks[0]
    assert any("fp32 norm+linear GELU on 5×96×20  [fwd 64×32×(64+32), norm 32×128, bwd_du " in line for line in checks)
    assert "fp16 block default dropped on 2×17×3×4×24  [out 64×32×64, bwd_hidden 64×64×32]" in checks[-1]
    assert out.splitlines()[-1] == "The kernels are right."


# Each line spoils one thing, in a process that runs the interpreter; what is left of the cases is the second, fp32.
# Below, the same for layer norm + linear.
SABOTAGE = """
    import sys
    import torch
    from dwconv_kernels import runtime, self_check

    launch = runtime.launchers("depthwise")
    self_check.CASES = self_check.FAMILIES["depthwise"].CASES[1:2]
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
    "an error": (
        "raise IndexError('no such row')",
        "pass",
        list(self_check_depthwise.CHECKS),
        "IndexError: no such row",
    ),
}


@needs_triton
@pytest.mark.parametrize("forward, backward, failing, message", SPOILED.values(), ids=SPOILED)
def test_what_is_wrong_fails_with_the_first_wrong_element(forward, backward, failing, message):
    program = code(
        textwrap.dedent(SABOTAGE).format(forward=forward, backward=backward) + "sys.exit(self_check.main([]))"
    )
    assert_fails(program, failing, message)


def assert_fails(program, failing, message):
    """The command fails with ``message`` in the first of the checks ``failing``, all of which fail."""
    returned, out = python(*program, TRITON_INTERPRET="1")
    assert returned == 1, out
    lines = [line for line in out.splitlines() if line.startswith("FAILED ")]
    names = [re.split(r"\s{2,}", line)[2] for line in lines]
    assert set(failing) <= set(names), out
    assert message in lines[names.index(failing[0])]
    assert "FAILED: the kernels are not to be trusted" in out
    assert "The kernels are right." not in out


# Of layer norm + linear, one line each that spoils the launcher or a kernel; the cases are the second, fp32, and the
# fourth, fp16.
NORM_LINEAR_SABOTAGE = """
    import sys
    import torch
    from dwconv_kernels import primitives, runtime, self_check

    launch = runtime.launchers("norm_linear")
    self_check.CASES = self_check.FAMILIES["norm_linear"].CASES[1:4:2]
    from dwconv_kernels.norm_linear import kernels, kernels_backward

    def spoiled(function, spoil):
        def call(*arguments):
            results = function(*arguments)
            spoil(*results)
            return results

        return call

    def replace(module, **functions):
        for name, spoil in functions.items():
            setattr(module, name, spoiled(getattr(module, name), spoil))

    {}
    sys.exit(self_check.main(["--jobs", "1"]))
    """
NORM_LINEAR_SPOILED = {
    "an element of y": (
        "replace(launch, norm_linear_forward=lambda y, mean, rstd: y[1, 3].add_(1))",
        ["exact", "rounding"],
        "y: 1 of 100 elements are wrong, the first at (1, 3): ",
    ),
    "a gradient": (
        "replace(launch, norm_linear_backward=lambda dx, dgamma, dbeta, dw, db: dw[7, 5].add_(1))",
        ["exact", "rounding"],
        "dW: 1 of 1920 elements are wrong, the first at (7, 5): ",
    ),
    "a row next to NaN": (
        "replace(launch, norm_linear_forward=lambda y, mean, rstd: y[1].mul_(1 + 0 * y[0]))",
        ["Inf and NaN"],
        "y: row 1 is wrong",
    ),
    "the derivative of GELU": (
        "kernels_backward.gelu_derivative = primitives.gelu", ["exact", "rounding"], "elements are"
    ),
    "the norm's own": (
        "replace(launch, norm_linear_backward=lambda dx, dgamma, dbeta, dw, db: dgamma[95].add_(1))",
        ["exact", "rounding"],
        "dγ: 1 of 96 elements are wrong, the first at (95,): ",
    ),
    "the mean": (
        "replace(kernels, _statistics=lambda mean, rstd: mean.handle.data.__iadd__(0.01))", ["exact", "rounding"], "y: "
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("spoil, failing, message", NORM_LINEAR_SPOILED.values(), ids=NORM_LINEAR_SPOILED)
def test_what_is_wrong_with_layer_norm_and_linear_fails(spoil, failing, message):
    assert_fails(code(textwrap.dedent(NORM_LINEAR_SABOTAGE).format(spoil)), failing, message)


@needs_triton
@pytest.mark.parametrize("lost, kept", [("norm_linear", "depthwise"), ("depthwise", "norm_linear")])
def test_kernels_of_a_family_that_cannot_be_loaded(lost, kept):
    program = f"""
        import sys
        from dwconv_kernels import runtime, self_check
        runtime._FAILED["{lost}"] = "the kernels cannot be loaded: no such thing"
        self_check.CASES = self_check.FAMILIES["depthwise"].CASES[8:9] + self_check.FAMILIES["norm_linear"].CASES[3:4]
        code = self_check.main(["--jobs", "1"])
        assert [result.ok for result in self_check.run("cpu")].count(False) == 1
        sys.exit(code)
        """
    returned, out = python(*code(program), TRITON_INTERPRET="1")
    assert returned == 1, out
    failed = [line for line in out.splitlines() if line.startswith("FAILED ")]
    assert len(failed) == 1, out
    assert f"load         the kernels of {lost}  " in failed[0]
    assert "the kernels cannot be loaded: no such thing" in failed[0]
    case = self_check.FAMILIES[kept].CASES[8 if kept == "depthwise" else 3]
    assert sum(line.startswith("ok ") and str(case) in line for line in out.splitlines()) == len(case.checks), out


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
    """(kernel, strips, edge) of the three passes, or, of tensor cores, (kernel, patches)."""
    assert shape[2] + 2 * case.pads[0] >= case.kernel[0]
    picked = self_check_depthwise._choices(case, shape).values()
    return [
        (choice.name, choice.patches) if hasattr(choice, "patches") else (choice.kernel, choice.block_w, choice.edge)
        for choice in picked
    ]


def test_the_cases_run_every_kernel_on_a_gpu_and_the_same_in_the_interpreter():
    met = {"half": set(), "fp32": set()}
    for case in self_check_depthwise.CASES:
        assert choices(case, case.shape) == choices(case, case.small), case
        if case.kernel == (7, 7) and case.stride == case.dilation == 1:
            met["fp32" if case.dtype == "fp32" else "half"].update(choices(case, case.shape))
    for kind, dtypes in {"half": ("bf16", "fp16"), "fp32": ("fp32",)}.items():
        shipped = {
            (choice.kernel, choice.block_w, choice.edge)
            for dtype in dtypes
            for strict in (False, True)
            for choice in config.shipped(dtype, 7, 7, strict)
        }
        assert met[kind] >= shipped
    kernels = {case.kernel for case in self_check_depthwise.CASES}
    assert kernels >= {(3, 3), (5, 5), (7, 7), (9, 9), (1, 11), (11, 1), (13, 13), (31, 31), (51, 51), (51, 5), (5, 51)}
    names = {choice[0] for case in self_check_depthwise.CASES for choice in choices(case, case.shape)}
    assert names >= {"tensor cores, stream", "tensor cores, large"}
    assert {case.dtype for case in self_check_depthwise.CASES} == set(config.DTYPES) == set(DTYPES)
    assert {check for case in self_check_depthwise.CASES for check in case.checks} == set(self_check_depthwise.CHECKS)


def launched(case, shape, arch):
    """(kind of dtype, kernel, constants) of what a GPU of this architecture would be given."""
    kind = "fp32" if case.dtype == "fp32" else "half"
    with mock.patch.object(runtime, "arch", return_value=arch):
        return [(kind, name, constants) for name, constants in self_check_norm_linear.launches(case, shape, "cpu")]


CHANNELS = (33, 64, 66, 96, 128, 136, 200, 256, 384, 1000)
TILED = {"fwd": "fwd", "product": "bwd_du", "bwd_du": "bwd_du", "bwd_x": "bwd_x", "bwd_weight": "bwd_weight"}


def tile(kind, name, constants):
    """How a kernel multiplies, which product and bwd_du do alike; what it does before and after is counted apart."""
    name = TILED.get(name.removeprefix("_norm_linear_").removesuffix("_kernel"))
    names = ("BLOCK_P", "BLOCK_D", "BLOCK_C", "num_warps", "num_stages")
    # The channels of bwd_x are all there are, where rows are whole.
    return (kind, name, *(constants.get(size) for size in names if name and (name, size) != ("bwd_x", "BLOCK_C")))


COLUMN_SUM = "_norm_linear_column_sum_kernel"
WAYS = ("GELU", "SUMS", "WHOLE_ROWS", "HAS_NORM_WEIGHT", "HAS_BIAS", "DENSE", "C0", "C1")


@needs_triton
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_the_cases_of_layer_norm_and_linear_meet_every_kernel_and_tile(arch):
    met = [entry for case in self_check_norm_linear.CASES for entry in launched(case, case.shape, arch)]
    assert {name for _, name, _ in met} >= set(runtime.launchers("norm_linear").kernels.__all__)
    for kind in ("half", "fp32"):
        for kernel in ("_norm_linear_fwd_kernel", "_norm_linear_product_kernel", "_norm_linear_bwd_du_kernel"):
            with_gelu = {constants["GELU"] for k, name, constants in met if (k, name) == (kind, kernel)}
            assert with_gelu == {False, True}, (kind, kernel)
    assert {bool(constants["C1"]) for _, name, constants in met if name == "_norm_linear_fwd_kernel"} == {False, True}
    met = {tile(*entry) for entry in met}
    config = runtime.launchers("norm_linear").config
    for dtype, c, d, few in itertools.product(("fp16", "fp32"), CHANNELS, CHANNELS, (False, True)):
        with mock.patch.object(config, "few_rows", return_value=few):
            case = self_check_norm_linear.Case(dtype, (130, c, d), (130, c, d))
            missing = {tile(*entry) for entry in launched(case, case.shape, arch)} - met
        assert not missing, (case, few, missing)


@needs_triton
@pytest.mark.parametrize("case", self_check_norm_linear.CASES, ids=str)
def test_the_interpreter_takes_the_same_way_through_layer_norm_and_linear(case):
    ways = [
        {(name, *(constants.get(way) for way in WAYS)) for _, name, constants in launched(case, shape, arch)}
        for shape, arch in ((case.shape, 90), (case.small, 0))
    ]
    on_gpu, interpreted = ({way for way in each if way[0] != COLUMN_SUM} for each in ways)  # which takes 4097 rows
    assert on_gpu == interpreted
    assert (case.shape[0] > 1) == (case.small[0] > 1)


@needs_triton
def test_the_interpreter_meets_every_kernel_of_layer_norm_and_linear():
    met = {name for case in self_check_norm_linear.CASES for _, name, _ in launched(case, case.small, 0)}
    assert met >= set(runtime.launchers("norm_linear").kernels.__all__)


def test_the_cases_of_layer_norm_and_linear_have_every_dtype_and_check():
    cases = self_check_norm_linear.CASES
    assert {case.dtype for case in cases} == set(norm_linear_config.DTYPES) == set(DTYPES)
    assert {check for case in cases for check in case.checks} == set(self_check_norm_linear.CHECKS)
    assert {case.given for case in cases} == {False, True}
    assert any(case.x for case in cases)
    assert any(case.gap for case in cases)
    assert any(case.tf32 for case in cases)
    # tiles for many rows are more than the multiprocessors of any GPU
    assert sum(
        -(-p // 128) * -(-min(c, d) // 128) > max(MULTIPROCESSORS.values()) for p, c, d in (t.shape for t in cases)
    )
