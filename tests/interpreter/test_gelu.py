"""GELU and its derivative on every pattern of the half types: the kernels' own source, with the exp2 of a GPU."""

import importlib.util
import inspect
import math
import re

import pytest
import torch

from benchmarks import gelu
from dwconv_kernels import primitives
from dwconv_kernels.norm_linear import reference

FUNCTIONS = ["gelu", "gelu_derivative"]
HALF = ["bf16", "fp16"]
both = pytest.mark.parametrize("function", FUNCTIONS)
half = pytest.mark.parametrize("dtype", HALF)

EXPECTED_AT_INFINITY = {"gelu": (math.inf, 0.0), "gelu_derivative": (1.0, 0.0)}
# Coefficients are the numbers with four digits and more; the clamps and powers of two have fewer.
COEFFICIENT = re.compile(r"-?\d+\.\d{4,}(?:e-?\d+)?")


def special(function, dtype, values):
    x = torch.tensor(values).repeat(8192)
    return gelu.applied(function, dtype, x)[: len(values)]


@half
@both
def test_every_pattern_is_within_a_quarter_of_an_ulp(function, dtype, guard):
    found = gelu.errors(function, dtype)
    assert found["ulps"] < 0.25
    if (function, dtype) == ("gelu", "bf16"):
        assert found["over"] <= 10
        assert found["to"] <= -13
        assert found["error"] < 4e-39
    else:
        assert found["over"] == 0


@pytest.mark.parametrize("dtype", [*HALF, "fp32"])
@both
def test_infinities_and_nan(function, dtype):
    plus, minus, nan = special(function, dtype, [math.inf, -math.inf, math.nan])
    assert (plus.item(), minus.item()) == EXPECTED_AT_INFINITY[function]  # −0 is 0
    assert nan.isnan()


@half
@both
def test_nan_and_only_nan_gives_nan(function, dtype):
    x = gelu.patterns(dtype)
    assert torch.equal(gelu.applied(function, dtype, x).isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [*HALF, "fp32"])
@pytest.mark.parametrize("value", [20.0, 65504.0, 2.0**127])
def test_far_from_zero(dtype, value):
    assert special("gelu", dtype, [value, -value]).tolist() == [value, 0]
    assert special("gelu_derivative", dtype, [value, -value]).tolist() == [1, 0]


@half
def test_zero(dtype):
    assert special("gelu", dtype, [0.0, -0.0]).tolist() == [0, 0]


@both
def test_fp32(function):
    """Φ from erf is as exact as the 1 in 1 + erf lets it be: absolutely, not relatively."""
    x = torch.linspace(-20, 20, 8192)
    exact = getattr(reference, function)(x.double())
    error = (gelu.applied(function, "fp32", x).double() - exact).abs()
    assert (error <= 2**-23 * (1 + x.abs())).all()


@both
def test_between_patterns(function):
    """u is the fp32 sum of a product of matrices in some kernels, not a value of the type: no worse between them."""
    x = torch.linspace(-5.5, 9, 8192)
    exact = getattr(reference, function)(x.double())
    away_from_zero = exact.abs() > 1e-3
    for dtype in HALF:
        ulps = (gelu.applied(function, dtype, x).double() - exact).abs() / gelu.ulp(exact, dtype)
        assert ulps[away_from_zero].max() < 0.3


def test_ulp():
    values = torch.tensor([1.0, -1.99, 2.0, 0.5, 0.0, 2.0**-24], dtype=torch.float64)
    assert gelu.ulp(values, "fp16").tolist() == [2**-10, 2**-10, 2**-9, 2**-11, 2**-24, 2**-24]
    assert gelu.ulp(values, "bf16").tolist() == [2**-7, 2**-7, 2**-6, 2**-8, 2**-133, 2**-31]


def test_exp2_is_that_of_a_gpu_only_where_asked_for():
    kept = gelu.triton.runtime.interpreter.InterpreterBuilder.create_exp2
    with gelu.flushing():
        assert gelu.triton.runtime.interpreter.InterpreterBuilder.create_exp2 is not kept
    assert gelu.triton.runtime.interpreter.InterpreterBuilder.create_exp2 is kept


def coefficients():
    """(function, number of the coefficient in its source, its text) for all of those of the half types."""
    for function in FUNCTIONS:
        source = inspect.getsource(getattr(primitives, function).fn)
        body = source[source.index("TYPE.is_fp16()") :]
        yield from ((function, number, text) for number, text in enumerate(COEFFICIENT.findall(body)))


def test_all_coefficients_are_found():
    found = [function for function, _, _ in coefficients()]
    assert (found.count("gelu"), found.count("gelu_derivative")) == (6 + 7, 8 + 9)


@pytest.mark.parametrize("function, number, text", list(coefficients()))
def test_a_wrong_coefficient_is_noticed(function, number, text, tmp_path, monkeypatch):
    source = inspect.getsource(primitives)
    start = source.index("TYPE.is_fp16()", source.index(f"def {function}("))
    at = start + list(COEFFICIENT.finditer(source[start:]))[number].start()
    assert source[at:].startswith(text)
    file = tmp_path / "mutated.py"
    file.write_text(source[:at] + repr(float(text) * 1.01) + source[at + len(text) :])
    spec = importlib.util.spec_from_file_location("mutated", file)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)
    monkeypatch.setattr(gelu, "primitives", mutated)
    found = [gelu.errors(function, dtype) for dtype in HALF]
    assert any(row["over"] > 10 for row in found)
