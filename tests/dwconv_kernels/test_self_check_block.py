"""The blocks that the self-check runs: they meet every kernel, and what is wrong with one shows."""

import itertools
from unittest import mock

import pytest

from dwconv_kernels import runtime, self_check_block
from dwconv_kernels.devices import MULTIPROCESSORS
from dwconv_kernels.self_check_block import CASES, CHECKS
from dwconv_kernels.self_check_common import DTYPES
from tests.dwconv_kernels.test_self_check import assert_fails, code, needs_triton

RESIDENT = "_block_fwd_resident_kernel"  # of so many rows that the interpreter would take an hour; sm_90 only


def launched(case, shape, arch):
    """(kernel, constants) of the block's own kernels, as a device of this architecture would be given them."""
    with mock.patch.object(runtime, "arch", return_value=arch):
        found = self_check_block.launches(case, shape, "cpu")
    return [(name, constants) for name, constants in found if name.startswith("_block_")]


def every_kernel() -> set[str]:
    return {name for name in runtime.launchers("block").kernels.__all__ if name.endswith("_kernel")}


@needs_triton
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_the_cases_meet_every_kernel(arch):
    met = list(itertools.chain.from_iterable(launched(case, case.shape, arch) for case in CASES))
    assert {name for name, _ in met} | {RESIDENT} == every_kernel()
    assert (RESIDENT in dict(met)) == (arch == 90)
    for flag, kernel in (
        ("GIVEN_PRODUCT", "_block_bwd_hidden_kernel"),
        ("BALANCED", "_block_scaled_kernel"),
        ("HAS_ROW_SCALE", "_block_fwd_kernel"),
        ("HAS_ROW_SCALE", "_block_bwd_rows_kernel"),
        ("HAS_LAYER_SCALE", "_block_bwd_finish_kernel"),
        ("STORE", "_block_bwd_gradient_kernel"),
    ):
        assert {constants[flag] for name, constants in met if name == kernel} == {False, True}, (flag, kernel)
    two = {bool(constants["N1"]) for name, constants in met if name == "_block_fwd_kernel"}
    assert two == {False, True}


@needs_triton
def test_the_interpreter_meets_every_kernel_but_the_resident_one():
    met = {name for case in CASES for name, _ in launched(case, case.small, 0)}
    assert met == every_kernel() - {RESIDENT}


def test_the_cases_have_every_dtype_check_and_option():
    assert {case.dtype for case in CASES} == set(DTYPES)
    assert {check for case in CASES for check in case.checks} == set(CHECKS)
    assert {case.memory for case in CASES} == {"default", "lean", "fast"}
    for option in ("given", "dropped", "grn", "autocast"):
        assert {getattr(case, option) for case in CASES} == {False, True}, option
    assert all(case.dropped for case in CASES if "dropped images" in case.checks)
    assert all(case.shape[0] > 1 and case.small[0] > 1 for case in CASES if "Inf and NaN" in case.checks)


SABOTAGE = """
    import sys
    from dwconv_kernels import runtime, self_check
    launch = runtime.launchers("block")
    forward, backward = launch.block_forward, launch.block_backward
    def wrong_forward(*arguments):
        out, *saved = forward(*arguments)
        {forward}
        return out, *saved
    def wrong_backward(*arguments):
        dx, *gradients = backward(*arguments)
        {backward}
        return dx, *gradients
    launch.block_forward, launch.block_backward = wrong_forward, wrong_backward
    self_check.CASES = self_check.FAMILIES["block"].CASES[:1]
    sys.exit(self_check.main(["--jobs", "1"]))
    """


@needs_triton
@pytest.mark.parametrize("forward, backward, failing, message", [
    ("out[1] *= 1.01", "pass", ["dropped images"], "out of dropped images"),
    pytest.param("pass", "dx[1] += 1", ["dropped images"], "dx of dropped images", marks=pytest.mark.full),
    pytest.param("pass", "gradients[4][0] *= 1.1", ["rounding"], "dW1", marks=pytest.mark.full),
    ("out[1:] += out[0, 0, 0, 0].isnan() * 1", "pass", ["Inf and NaN"], "change others"),
], ids=str)  # fmt: skip
def test_what_is_wrong_with_a_block_fails(forward, backward, failing, message):
    assert_fails(code(SABOTAGE.format(forward=forward, backward=backward)), failing, message)
