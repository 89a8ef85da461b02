"""GELU's instructions in compiled kernels, and that the README says what ``python -m benchmarks.gelu`` says."""

import os
import subprocess
import sys

import pytest

from dwconv_kernels import runtime

if runtime.triton_version() is None:
    pytest.skip("Triton is not installed: there are no kernels to compile", allow_module_level=True)
if runtime.INTERPRETER:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from benchmarks import gelu

LIMITS = {
    ("gelu", "bf16"): 10,
    ("gelu", "fp16"): 9,
    ("gelu_derivative", "bf16"): 13,
    ("gelu_derivative", "fp16"): 12,
}


@pytest.mark.parametrize("arch", gelu.ARCHS)
@pytest.mark.parametrize("function, dtype", LIMITS)
def test_instructions(function, dtype, arch):
    found = gelu.instructions(function, dtype, arch, gelu.FEW)
    assert sum(found.values()) <= LIMITS[function, dtype]
    special = {name: count for name, count in found.items() if name.startswith("MUFU")}
    assert special == {"MUFU.EX2": 1}, "one exponential and no division"
    # What the interpreter cannot show, as NumPy's maximum always keeps NaN, and that of a GPU only where told to.
    assert found["FMNMX.NAN"] == 1
    assert "FMNMX" not in found


def test_what_is_counted():
    """The exact form costs more, and nothing costs nothing."""
    assert sum(gelu.instructions("gelu", "fp32", 90, gelu.FEW).values()) > 25
    assert gelu.instructions(None, "bf16", 90, gelu.FEW) == {}


@pytest.mark.full
def test_readme():
    text = gelu.README.read_text()
    assert gelu.with_block(text, gelu.block()) == text, "python -m benchmarks.gelu --readme"


def test_a_readme_without_markers():
    with pytest.raises(ValueError, match="gelu:begin"):
        gelu.with_block(gelu.END + gelu.BEGIN, "")


@pytest.mark.parametrize("interpret, argument", [("1", []), ("0", ["--errors"])])
def test_the_wrong_mode(interpret, argument):
    command = [sys.executable, "-m", "benchmarks.gelu", *argument]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(command, cwd=gelu.ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 must be set for --errors" in done.stderr
