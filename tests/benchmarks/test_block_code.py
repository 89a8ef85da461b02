"""The block's kernels, compiled for GPUs that are not there, within the limits of the report; their predicted time.

Every change: the products of ConvNeXt-T's first two widths in bf16 on three architectures, samples of the rest.
``pytest -m full``: everything, everywhere, and the README's table.
"""

import itertools
import json
import re

import pytest

from dwconv_kernels import runtime

if runtime.triton_version() is None:
    pytest.skip("Triton is not installed: there are no kernels to compile", allow_module_level=True)
if runtime.INTERPRETER:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

from benchmarks import block_code as code
from benchmarks import block_time, cubin, products
from benchmarks.compiling import run
from benchmarks.launches import Launch
from benchmarks.machine_code import ALL_ARCHS, ARCHS, Options
from dwconv_kernels.norm_linear import config

SLOW = Options(slow=2.0)  # machines that run tests are busy; the report's own limits are for those that do not
GRADIENTS = {
    "_norm_linear_bwd_weight_kernel", "_norm_linear_column_sum_kernel", "_norm_linear_finish_kernel",
    "_norm_linear_norm_sum_kernel", "_block_bwd_gradient_kernel", "_block_scaled_kernel", "_block_bwd_finish_kernel",
    "_block_bwd_scale_sum_kernel",
}  # fmt: skip
ROWS = {"_block_fwd_kernel", "_block_bwd_rows_kernel"}  # the whole tail of a block of rows
HIDDEN = {"_block_out_kernel", "_block_bwd_hidden_kernel", "_norm_linear_bwd_x_kernel"}


def build(call, kernel, arch=90, **changes) -> products.Build:
    """A kernel that a call launches, with other constants or options where there are changes."""
    launch = next(one for one in code.launches(call, arch) if one.kernel == kernel)
    names = [p.name for p in products.kernel_named(kernel).params]
    constants = {where: changes.get(names[where[0]], value) for where, value in launch.constants.items()}
    options = {name: changes.get(name, value) for name, value in launch.options.items()}
    return products.Build(call, launch._replace(constants=constants, options=options))


def row_of(*arguments, arch=90, **changes):
    (row,) = products.report(build(*arguments, arch=arch, **changes), arch, SLOW)
    return row


def multiplies(launch: Launch) -> bool:
    return bool(products.products(launch.kernel, products.Build(code.Call("bf16", 0, 0), launch).constants))


def rows_of(call, arch, chosen=multiplies):
    found = [one for one in code.launches(call, arch) if chosen(one)]
    return [row for one in found for row in products.report(products.Build(call, one), arch, SLOW)]


def assert_within_limits(rows):
    bad = [
        (row["kernel"], row["case"], row["blocks"], row["broken"], row.get("error")) for row in rows if row["broken"]
    ]
    assert not bad, bad
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in rows)


def names(launches) -> set[str]:
    return {one.kernel for one in launches}


@pytest.mark.parametrize("c", [96, 192])
@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.full] * (a == 89)) for a in ARCHS])
def test_convnext_in_bf16(arch, c):
    rows = rows_of(code.Call("bf16", c, 4 * c), arch)
    assert_within_limits(rows)
    for row in rows:  # in a loop, not unrolled: else "no spill in a loop" says nothing
        assert max(loop["wgmma"] + loop["mma"] for loop in row["loops"]) > 0
    if arch == 90:
        assert {row["kernel"] for row in rows} == ROWS | {"_norm_linear_bwd_weight_kernel"}


SAMPLES = {
    "weights that stay": (code.Call("bf16", 96, 384, rows="most"), 90, "_block_fwd_resident_kernel"),
    "balanced": (code.Call("fp16", 128, 512), 90, "_block_bwd_rows_kernel"),
    "dropped rows": (code.Call("bf16", 192, 768, row_scale=True), 90, "_block_fwd_kernel"),
    "u that was kept": (code.Call("bf16", 768, 3072), 90, "_block_bwd_hidden_kernel"),
    "u again": (code.Call("bf16", 384, 1536), 90, "_block_bwd_hidden_kernel"),
    "TF32": (code.Call("fp32", 96, 384, tf32=True), 90, "_block_bwd_hidden_kernel"),
    "IEEE": (code.Call("fp32", 96, 384), 90, "_block_out_kernel"),
    "rows of any alignment": (code.Call("bf16", 97, 388), 90, "_block_bwd_hidden_kernel"),
    "x in fp32": (code.Call("bf16", 96, 384, x_dtype="fp32"), 90, "_block_fwd_kernel"),
    "images": (code.Call("bf16", 96, 384, grn=True), 90, "_block_grn_bwd_kernel"),
    "tensor memory": (code.Call("bf16", 384, 1536), 100, "_block_out_kernel"),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_of_the_rest(sample):
    call, arch, kernel = SAMPLES[sample]
    row = row_of(call, kernel, arch=arch)
    assert_within_limits([row])
    if sample == "IEEE":
        assert row["wgmma"] == row["mma"] == 0


@pytest.mark.full
@pytest.mark.parametrize("dtype", config.DTYPES)
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_everything(arch, dtype):
    jobs = products.jobs(code.FAMILY, [arch], [dtype], code.ALL_CHANNELS, everything=True)
    rows = [row for rows in run(jobs, SLOW, 2, products.report, products.failed) for row in rows]
    assert len(rows) == len(jobs)
    assert_within_limits(rows)


def test_which_kernels_a_call_launches():
    def of(c=96, **others):
        return names(code.launches(code.Call("bf16", c, 4 * c, **others), 90))

    assert of() == ROWS | GRADIENTS
    assert of(rows="most", grad=False) == {"_block_fwd_resident_kernel"}
    assert of(c=192, rows="most", grad=False) == {"_block_fwd_kernel"}
    assert of(c=384) > HIDDEN | {"_norm_linear_norm_kernel"}
    for others in ({"memory": "fast"}, {"rows": "few"}):
        assert of(**others) > HIDDEN
    assert of(grn=True) > {"_block_grn_sums_kernel", "_block_grn_apply_kernel", "_block_grn_bwd_kernel"}
    u = {
        given: build(code.Call("bf16", c, 4 * c), "_block_bwd_hidden_kernel")
        for given, c in ((False, 384), (True, 768))
    }
    assert all(one.constants["GIVEN_PRODUCT"] == given for given, one in u.items())


def test_two_calls_that_launch_the_same_are_compiled_once():
    few = products.jobs(code.FAMILY, [90], ["bf16"], [96], everything=False)
    assert len(few) == len({repr(build.launch) for build, _ in few})
    assert len(products.jobs(code.FAMILY, [90], ["bf16"], [96, 96], everything=False)) == len(few)


def test_the_report_sees_what_it_is_there_to_see():
    call = code.Call("bf16", 96, 384)
    # Two products into the same sums, ahead: ptxas waits after each instruction.
    serialised = row_of(call, "_block_fwd_kernel", K0=64, K1=32)
    assert {"one wait a step", "one wait a block of hidden channels"} <= set(serialised["broken"])
    assert "no spill in a loop" in row_of(call, "_block_fwd_kernel", maxnreg=128)["broken"]
    behind = row_of(call, "_block_fwd_kernel", AHEAD=False)
    assert behind["broken"] == ["one wait a block of hidden channels"]
    assert row_of(call, "_norm_linear_bwd_weight_kernel", arch=80, num_warps=1)["broken"] != []


KEPT = {
    "kernel": "_block_bwd_rows_kernel", "arch": 90, "dtype": "bf16", "tf32": False, "dots": 3, "tile": [64, 64],
    "spill_in_loops": 0, "registers": 255, "warps": 8, "shared": 227 * 1024, "atomics": [], "compile_seconds": 20,
    "wgmma": 10, "mma": 0, "waits": 4, "steps": 3, "programs": 1, "loops": [{"steps": 3, "waits": 3}],
}  # fmt: skip
BROKEN = {
    "no spill in a loop": {"spill_in_loops": 1},
    "registers × threads ≤ 65536": {"warps": 9},
    "shared memory within the architecture's": {"shared": 227 * 1024 + 1},
    "no atomics": {"atomics": ["atom.add"]},
    "every product on tensor cores": {"loops": [{"steps": 2, "waits": 2}]},
    "wgmma in every product": {"mma": 1},
    "one wait a step": {"loops": [{"steps": 3, "waits": 4}]},
    "one wait a block of hidden channels": {"kernel": "_block_fwd_kernel"},
    "two programs a multiprocessor for tiles of 128×128": {"dots": 1, "tile": [128, 128]},
    "20 s to compile": {"compile_seconds": 20.1},
}


def test_every_limit_can_be_broken():
    def broken(row):
        return [name for name, kept, _ in products.LIMITS if not kept(row, Options())]

    assert broken(KEPT) == []
    assert list(BROKEN) == [name for name, *_ in products.LIMITS]
    for name, changes in BROKEN.items():
        assert broken(KEPT | changes) == [name]
        # fp32 on FMA units has neither products on tensor cores nor waits.
        ieee = broken(KEPT | changes | {"dtype": "fp32"})
        assert ieee == ([name] if name in list(BROKEN)[:4] + list(BROKEN)[-1:] else [])


# The predicted time.


def program(*code: str) -> cubin.Program:
    """Of lines like "BRA 0x10"."""
    return cubin.Program(cubin.parse("\n".join(f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(code))))


LOOP = program(
    "MOV R1, c[0x0][0x28]",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24",  # 0x10: a loop
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P0 BRA 0x10",
    "FADD R1, R1, R2",  # 0x40: and another one
    "@P1 BRA 0x40",
    "EXIT",
)


def test_products_of_toy_instructions():
    wgmma, mma = LOOP.instructions[1:3]
    assert products.multiplied([wgmma], 8) == 2 * 64 * 128 * 16
    assert products.multiplied([mma], 8) == 8 * 16 * 8 * 16
    assert products.multiplied([*LOOP.instructions], 4) == 64 * 128 * 16 + 4 * 16 * 8 * 16


def test_time_of_a_toy_program():
    times = block_time.of_loops(LOOP, (5, 7))
    assert [times(loop) for loop in LOOP.loops] == [5, 7]
    assert LOOP.slots(times) == block_time.total(LOOP, times, len) == 1 + 5 * 3 + 7 * 2 + 1
    split = block_time.of_loops(LOOP, (10,))  # by ptxas
    assert [split(loop) for loop in LOOP.loops] == [3, 3]
    with pytest.raises(cubin.Unreadable, match="2 loops, not 3"):
        block_time.of_loops(LOOP, (1, 2, 3))


def test_a_line_takes_as_long_as_its_longest_pipe():
    one = block_time.line("forward", "96", "a", 2, tensor=3.0, issue=2.0, hbm=4.0, l2=1.0, rows=5.0)
    assert (one.tensor, one.overlapping, one.apart, one.all_operands) == (6, 8, 10, 12)
    other = block_time.line("forward", "96", "b", 1, tensor=3.0)
    both = block_time.summed([one, other], "", "", "both")
    assert (both.launches, both.tensor, both.overlapping, both.apart) == (3, 9, 11, 13)


def test_launches_with_their_sizes():
    """Of the first stage: the bytes of all maps and weights, and how often loops are run."""
    seen = {one.launch.kernel: (blocks, one) for _, stage, blocks, one in block_time.launched(True) if stage == "96"}
    pixels = block_time.BATCH * 56 * 56
    blocks, forward = seen["_block_fwd_resident_kernel"]
    assert (blocks, forward.programs) == (3, 132)
    vectors = 2 * (4 * 96 + 384)
    assert forward.bytes == pixels * (3 * 96 * 2 + 2 * 4) + 2 * 96 * 384 * 2 + vectors
    values = forward.numbers | products.Build(code.Call("bf16", 0, 0), forward.launch).constants
    assert block_time.trips("_block_fwd_resident_kernel", values) == (-(-pixels // 128 // 132),)
    _, convolution = seen["_depthwise_fwd_stream_kernel"]
    tables = 7 * 96 * 128 * 2 + 96 * 4
    residual = convolution.bytes - 2 * pixels * 96 * 2 - tables  # of the input gradient, which comes last
    assert residual in (0, pixels * 96 * 2)


def shown(text: str, title: str) -> dict[tuple[str, str], list[float]]:
    """The lines of a table: (name, stage) → figures."""
    part = text[text.index(f"| {title}, µs per image") :].splitlines()[2:]
    cells = [row.split(" | ") for row in itertools.takewhile(lambda row: row.startswith("|"), part)]
    return {(name[2:], stage.strip()): [float(one.strip(" |")) for one in some] for name, stage, *some in cells}


@pytest.mark.parametrize("title, training", [("Inference", False), ("Training step", True)])
def test_readme_has_all_launches(title, training):
    text = block_time.README.read_text()
    assert block_time.with_block(text, text.split(block_time.BEGIN)[1].split(block_time.END)[0]) == text
    found = shown(text, title)
    whole = found.pop(("**all**", ""))
    seen = block_time.launched(training)
    pytorch = block_time.pytorch(training)
    assert whole[0] == sum(blocks for *_, blocks, _ in seen) + len(pytorch), (
        "python -m benchmarks.block_code --time --readme"
    )
    assert [round(sum(column), 1) for column in zip(*found.values(), strict=True)] == pytest.approx(whole, abs=0.3)
    kernels = {
        (f"{where}: {one.launch.kernel.strip('_').removesuffix('_kernel')}", stage) for where, stage, _, one in seen
    }
    assert {line for line in found if "PyTorch" not in line[0] and block_time.OTHERS not in line[0]} <= kernels
    said = re.search(rf"{title}: ([\d.]+) µs per image where all\s+overlaps, ([\d.]+)", text)
    assert [float(figure) for figure in said.groups()] == pytest.approx(whole[-2:], abs=0.051)
    assert whole[-2] <= block_time.BARS["training" if training else "forward"]


@pytest.mark.full
def test_readme_is_what_the_command_says():
    text = block_time.README.read_text()
    assert block_time.with_block(text, block_time.block()) == text, "python -m benchmarks.block_code --time --readme"


def test_a_readme_without_markers():
    with pytest.raises(ValueError, match="time:begin"):
        block_time.with_block(block_time.END + block_time.BEGIN, "")


def test_command_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--arch", "90", "--dtype", "fp16", "--channels", "16", "--jobs", "1", "--json", str(file)]
    assert code.main([*arguments, "--slow", "3"]) == 0
    rows = json.loads(file.read_text())
    assert {row["kernel"] for row in rows} >= ROWS | GRADIENTS
    assert "0 with broken limits" in capsys.readouterr().out
