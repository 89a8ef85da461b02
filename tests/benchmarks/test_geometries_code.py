"""The depthwise kernels for dilation, stride and large sizes, compiled for GPUs that are not there.

Every change: a sample of each. ``pytest -m full``: all of them, on two architectures.
"""

import contextlib
import itertools

import pytest
import torch

from dwconv_kernels import runtime
from dwconv_kernels.depthwise import config

if runtime.triton_version() is None or runtime.INTERPRETER:
    pytest.skip("There is nothing to compile, or no compiler", allow_module_level=True)

from benchmarks import machine_code
from dwconv_kernels.depthwise import launch
from tests.benchmarks import test_machine_code
from tests.benchmarks.test_machine_code import as_compiled_here, assert_within_limits, reports

launches = test_machine_code.launches  # a fixture

# (dtype, KH, KW, C, architecture, stride, dilation, only in this edge) and the most issue slots per output on the map
# that takes fewest, per value of y where there is a stride: a few above what was read when it was written.
ONE = (1, 1)
OTHERS = {
    "dilation, sm_80": (("fp32", 3, 3, 40, 80, ONE, (2, 2), "masked"), {"fwd": 85, "weight": 108}),
    "stride in rows, sm_80": (("fp32", 5, 5, 40, 80, (2, 1), ONE, "masked"), {"fwd": 90, "input": 90, "weight": 100}),
    "taps from the cache": (("bf16", 13, 5, 96, 90, ONE, ONE, "strips"), {"fwd": 87, "weight": 120}),
}
MORE = {
    "dilation in strips": (("fp32", 7, 7, 96, 90, ONE, (3, 3), "strips"), {"fwd": 66, "weight": 82}),
    "stride": (("bf16", 7, 7, 96, 90, (2, 2), ONE, "masked"), {"fwd": 130, "input": 100, "weight": 130}),
    "11×11": (("bf16", 11, 11, 96, 90, ONE, ONE, "strips"), {"fwd": 156, "weight": 185}),
    "a line, sm_80": (("fp32", 51, 1, 40, 80, ONE, ONE, "masked"), {"fwd": 140, "weight": 300}),
}


@pytest.mark.parametrize("other", [*OTHERS, *(pytest.param(more, marks=pytest.mark.full) for more in MORE)])
def test_other_geometries(other):
    (*key, stride, dilation, edge), limits = (OTHERS | MORE)[other]

    def wanted(build):
        return build.choice is not None and build.choice.edge == edge and not (build.residual or build.choice.pairs)

    rows = reports(*key, wanted, stride=stride, dilation=dilation)
    assert_within_limits(rows, {row["kernel"] for row in rows})
    slots = {name: [r["slots_per_output"] for r in rows if f"_{name}_" in r["kernel"]] for name in limits}
    assert all(found and min(found) <= limits[name] for name, found in slots.items()), slots


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel_size", [(13, 13), (15, 15), (17, 17), (5, 17), (17, 5), (1, 51), (31, 1)], ids=str)
def test_large_kernels(kernel_size, arch):
    for dtype in ("bf16", "fp32"):
        rows = reports(dtype, *kernel_size, 40, arch, lambda build: build.choice is not None)
        assert_within_limits(rows, {row["kernel"] for row in rows})


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("geometry", [{"dilation": (2, 2)}, {"dilation": (3, 3)}, {"stride": (2, 2)}], ids=str)
def test_dilation_and_stride(geometry, arch):
    for dtype, k in itertools.product(config.DTYPES, (5, 7, 9)):
        rows = reports(dtype, k, k, 96, arch, lambda build: build.choice is not None, **geometry)
        assert_within_limits(rows, {row["kernel"] for row in rows})


@pytest.mark.parametrize("kernel_size, stride, dilation", [
    ((7, 7), ONE, (2, 2)), ((3, 5), ONE, (1, 3)), ((5, 3), (2, 2), ONE), ((3, 5), (1, 2), ONE), ((13, 5), ONE, ONE),
], ids=str)  # fmt: skip
def test_launches_compile_exactly_these_builds(launches, kernel_size, stride, dilation):
    c, dtype = 40, torch.bfloat16
    for mode, (h, w), shift in itertools.product(
        (runtime.strict, contextlib.nullcontext), [(1, 56), (16, 28), (9, 14), (14, 33), (16, 16)], (0, 1)
    ):
        padding = tuple(d * (k // 2) - shift for d, k in zip(dilation, kernel_size, strict=True))
        x = torch.empty(2, h + 16, w, c, dtype=dtype).permute(0, 3, 1, 2)
        weight, bias = torch.empty(c, 1, *kernel_size, dtype=dtype), torch.empty(c, dtype=dtype)
        with mode():
            y = launch.depthwise_forward(x, weight, bias, stride, padding, dilation)
            launch.depthwise_backward(y, x, weight, bias, stride, padding, dilation, (True, True, True))
    builds = machine_code.depthwise_builds("bf16", *kernel_size, c, stride, dilation)
    parameters = ("weight_ptr", "dw_ptr")
    expected = [
        as_compiled_here(build)
        for build in builds
        if not build.residual and all(dict(build.types).get(name, "*bf16") == "*bf16" for name in parameters)
    ]
    assert launches
    assert [one for one in launches if one not in expected] == []
    assert [one for one in expected if one not in launches] == []
