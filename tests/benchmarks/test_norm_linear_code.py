"""The kernels of layer norm + linear, compiled for GPUs that are not there, within the limits of the report.

Every change: ConvNeXt-T's first three widths in bf16 on three architectures, samples of the rest. ``pytest -m full``:
everything, everywhere.
"""

import json

import pytest

from dwconv_kernels import runtime

if runtime.triton_version() is None:
    pytest.skip("Triton is not installed: there are no kernels to compile", allow_module_level=True)
if runtime.INTERPRETER:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from benchmarks import norm_linear_code as code
from benchmarks import products
from benchmarks.compiling import run
from benchmarks.launches import Launch
from benchmarks.machine_code import ALL_ARCHS, ARCHS, Options
from dwconv_kernels.norm_linear import config, kernels

SLOW = Options(slow=2.0)  # machines that run tests are busy; the report's own limits are for those that do not
FORWARD = {"_norm_linear_fwd_kernel"}
WIDE = {"_norm_linear_norm_kernel", "_norm_linear_product_kernel"}
BACKWARD = {
    "_norm_linear_norm_kernel", "_norm_linear_bwd_du_kernel", "_norm_linear_bwd_x_kernel",
    "_norm_linear_bwd_weight_kernel", "_norm_linear_column_sum_kernel", "_norm_linear_finish_kernel",
    "_norm_linear_norm_sum_kernel",
}  # fmt: skip


def rows_of(call, arch):
    return [row for one in code.launches(call, arch) for row in products.report(products.Build(call, one), arch, SLOW)]


def assert_within_limits(rows):
    bad = [(row["kernel"], row["blocks"], row["broken"], row.get("error")) for row in rows if row["broken"]]
    assert not bad, bad
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in rows)


@pytest.mark.parametrize("c", code.CHANNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_convnext_in_bf16(arch, c):
    rows = rows_of(code.Call("bf16", c, 4 * c), arch)
    assert_within_limits(rows)
    of_sums = set() if config.whole_rows(c, arch) else {"_norm_linear_vectors_kernel"}
    assert {row["kernel"] for row in rows} == BACKWARD | (WIDE if c > 192 else FORWARD) | of_sums
    products = [row for row in rows if row["tile"] != [0, 0]]
    assert len(products) == 4
    for row in products:  # in a loop, not unrolled: else "no spill in a loop" says nothing
        loop = max(row["loops"], key=lambda loop: loop["wgmma"] + loop["mma"])
        assert loop["wgmma"] + loop["mma"] == row["wgmma"] + row["mma"] > 0
        if arch == 90:
            assert loop["waits"] == loop["steps"] == (2 if row["kernel"] in FORWARD else 1)
            assert row["programs"] >= 2


SAMPLES = {
    "IEEE": (code.Call("fp32", 96, 384), 90),
    "IEEE, of 128 channels": (code.Call("fp32", 128, 512), 90),
    "TF32, of 128 channels": (code.Call("fp32", 128, 512, tf32=True), 90),
    "rows that are far apart": (code.Call("bf16", 128, 512, gap=8), 90),
    "IEEE, wide": (code.Call("fp32", 384, 1536), 80),
    "TF32": (code.Call("fp32", 384, 1536, tf32=True), 90),
    "rows of any alignment": (code.Call("bf16", 97, 195, gelu=False), 90),
    "few rows": (code.Call("fp16", 384, 1536, few=True), 89),
    "x in fp32": (code.Call("bf16", 192, 768, x_dtype="fp32"), 90),
    "tensor memory": (code.Call("bf16", 384, 1536), 100),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_of_the_rest(sample):
    call, arch = SAMPLES[sample]
    rows = rows_of(call, arch)
    assert_within_limits(rows)
    if sample == "TF32":
        assert all(row["wgmma"] > 0 for row in rows if row["tile"] != [0, 0])
    if sample.startswith("IEEE"):
        assert not any(row["wgmma"] or row["mma"] for row in rows)


@pytest.mark.full
@pytest.mark.parametrize("dtype", config.DTYPES)
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_everything(arch, dtype):
    jobs = products.jobs(code.FAMILY, [arch], [dtype], code.ALL_CHANNELS, everything=True)
    rows = [row for rows in run(jobs, SLOW, 2, products.report, products.failed) for row in rows]
    assert len(rows) == len(jobs)
    assert_within_limits(rows)


def changed(launch: Launch, **changes) -> Launch:
    """The same launch with other constants; names of options change those."""
    names = [p.name for p in getattr(kernels, launch.kernel).params]
    constants = {where: changes.get(names[where[0]], value) for where, value in launch.constants.items()}
    options = {name: changes.get(name, value) for name, value in launch.options.items()}
    return launch._replace(constants=constants, options=options)


def broken(call, kernel, **changes):
    (launch,) = [one for one in code.launches(call, 90) if one.kernel == kernel]
    (row,) = products.report(products.Build(call, changed(launch, **changes)), 90, SLOW)
    assert "error" not in row
    return row["broken"]


def test_the_report_sees_what_it_is_there_to_see():
    call = code.Call("bf16", 384, 1536)
    assert broken(call, "_norm_linear_bwd_weight_kernel") == []
    assert "one wait a step" in broken(call, "_norm_linear_bwd_weight_kernel", num_warps=8)
    two = "two programs a multiprocessor for tiles of 128×128"
    assert broken(call, "_norm_linear_bwd_du_kernel", maxnreg=None) == [two]
    assert two in broken(call, "_norm_linear_product_kernel", num_stages=5)
    ieee = code.Call("fp32", 384, 1536)
    assert "no spill in a loop" in broken(ieee, "_norm_linear_product_kernel", maxnreg=40)


def test_two_calls_that_launch_the_same_are_compiled_once():
    few = products.jobs(code.FAMILY, [90], ["bf16"], [96], everything=False)
    assert len(few) == len({(build.launch.kernel, repr(build.launch.constants)) for build, _ in few})
    assert len(products.jobs(code.FAMILY, [90], ["bf16"], [96, 96], everything=False)) == len(few)


def test_rows_and_sizes_are_no_constants():
    """At most eight variants per (C, dtype), whatever the numbers of rows; few rows are others."""
    seen = {}
    for rows in (128 * 170, 128 * 171 + 16, 128 * 300 + 1):
        for one in code.launches(code.Call("bf16", 96, 384), 90, rows):
            seen.setdefault(one.kernel, []).append(one)
    assert all(one == ones[0] for ones in seen.values() for one in ones)


@pytest.mark.full
def test_command_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--arch", "90", "--dtype", "fp16", "--channels", "16", "--jobs", "1", "--json", str(file)]
    assert code.main([*arguments, "--slow", "3"]) == 0
    rows = json.loads(file.read_text())
    assert {row["kernel"] for row in rows} == FORWARD | BACKWARD
    assert "0 with broken limits" in capsys.readouterr().out
    assert code.main([*arguments, "--slow", "0.000001"]) == 1
    assert "BROKEN sm_90 fp16 C=16 D=64 GELU _norm_linear_fwd_kernel" in capsys.readouterr().out
