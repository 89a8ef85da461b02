"""The tensor-core kernels, compiled for GPUs that are not there, within the limits of ``benchmarks.tensor_code``.

Every change: what has a bar, on sm_80 and sm_90; bank conflicts of all layouts; that what is wrong is seen.
``pytest -m full``: everything, everywhere, and the README's table.
"""

import json
from collections import Counter

import pytest

from dwconv_kernels import runtime

if runtime.triton_version() is None:
    pytest.skip("Triton is not installed: there are no kernels to compile", allow_module_level=True)
if runtime.INTERPRETER:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benchmarks import block_time, conflicts, cubin, products, tensor_time
from benchmarks import tensor_code as code
from benchmarks.compiling import run
from benchmarks.machine_code import ALL_ARCHS, MAPS, Options
from benchmarks.tensor_code import FORWARD, WEIGHT, Case
from dwconv_kernels.depthwise import config_tensor

SLOW = Options(slow=2.0)  # machines that run tests are busy; the report's own limits are for those that do not
STREAM, LARGE = "_depthwise_fwd_stream_kernel", "_depthwise_fwd_large_kernel"
GRADIENT = "_depthwise_bwd_weight_stream_kernel"
GLUON = {STREAM, LARGE, GRADIENT}


def gluon_build(case, side=56, arch=90, **changes) -> products.Build:
    """The Gluon kernel that a pass launches, with other constants or options where there are changes."""
    (one,) = (one.launch for one in code.launched(case, side, side, arch) if one.launch.kernel in GLUON)
    names = [p.name for p in products.kernel_named(one.kernel).params]
    constants = {where: changes.get(names[where[0]], value) for where, value in one.constants.items()}
    options = {name: changes.get(name, value) for name, value in one.options.items()}
    return products.Build(case, one._replace(constants=constants, options=options))


def row_of(build, arch=90):
    (row,) = code.report(code.Job(build, []), arch, SLOW)
    return row


def assert_within_limits(rows):
    bad = [(row["arch"], row["case"], row["kernel"], row["broken"], row.get("error")) for row in rows if row["broken"]]
    assert not bad, bad
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in rows)


# The kernels of the package


@pytest.mark.parametrize("what, size", code.BARS)
def test_what_has_a_bar(what, size):
    case = Case(what, "bf16", int(size), int(size))
    # The first of them is that of large maps, which is what the bar is for.
    job = next(job for job, _ in code.jobs([90], [case]) if job.build.launch.kernel in GLUON)
    (row,) = code.report(job, 90, SLOW)
    assert_within_limits([row])
    assert code.BARS[what, size] / 2 < row["steady"]["slots"] <= code.BARS[what, size]
    assert row["accesses"] > 10
    assert row["steady"]["hmma"] >= 16 * 16 * 8 / 4096 * int(size) ** 2 / 32  # a product is 2048 FMAs, some with zeros
    for one in row["maps"]:
        assert all(one[name] > 0.9 * row["steady"][name] for name in code.COUNTS), (one, row["steady"])


@pytest.mark.parametrize("size", [7, 31])
def test_nothing_spills_on_sm_80(size):
    row = row_of(gluon_build(Case(FORWARD, "bf16", size, size), arch=80), 80)
    assert_within_limits([row])
    assert row["spill"] == row["stack"] == 0


def test_the_small_kernels():
    case = Case(FORWARD, "bf16", 3, 3)
    todo = code.jobs([90], [case, case._replace(what=WEIGHT)])
    small = [(job, arch) for job, arch in todo if job.build.launch.kernel not in GLUON]
    assert {job.build.launch.kernel for job, _ in small} == {
        "_depthwise_fragments_kernel",
        "_depthwise_diagonals_kernel",
    }
    rows = [row for job, arch in small for row in code.report(job, arch, SLOW)]
    assert_within_limits(rows)
    assert all(row["steady"] is None and 0 < row["maps"][0]["slots"] < 1 for row in rows)


@pytest.mark.full
@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_everything(arch):
    found = list(code.cases(config_tensor.DTYPES, code.ALL_KERNEL_SIZES, (96, 40, 33), everything=True))
    todo = code.jobs([arch], found)
    rows = [row for rows in run(todo, SLOW, 2, code.report, code.failed) for row in rows]
    assert len(rows) == len(todo) > 200
    assert_within_limits(rows)


def test_cases():
    few = list(code.cases(("bf16",), [(7, 7)], (96,), False))
    assert few == [Case(FORWARD, "bf16", 7, 7), Case(WEIGHT, "bf16", 7, 7)]
    every = list(code.cases(("bf16", "fp16"), [(7, 7)], (96, 40, 33), True))
    assert len(every) == len(set(every)) == 2 * 4 + 4
    assert {(case.residual, case.y) for case in every} > {("bf16", None), ("fp32", None), ("fp32", "fp32")}


# Bank conflicts


def test_no_bank_conflicts_in_any_configuration():
    """J 1 and 2, PIXELS 1, 2 and 4, CHUNK 4 and 8, staged outputs of 16 and 32 bits."""
    added = {"residual": "bf16"}
    builds = [gluon_build(Case(FORWARD, "bf16", k, k, **more), PIXELS=p)
              for k in (7, 17) for p in (1, 2, 4) for more in ({}, added)]  # fmt: skip
    builds += [gluon_build(Case(WEIGHT, "bf16", k, k), PIXELS=p) for k in (7, 17) for p in (2, 4)]
    for chunk, more in ((4, {}), (8, added), (4, added), (8, {})):
        builds.append(gluon_build(Case(FORWARD, "bf16", 21, 21, **more), PATCH_ROWS=4, CHUNK=chunk))
    seen = Counter()
    for build in builds:
        accesses = conflicts.of_build(build)
        assert [str(one) for one in accesses if one.conflicts] == [], build.constants
        seen.update((one.kind, one.dtype) for one in accesses)
        seen.update((name, build.constants[name]) for name in ("J", "PIXELS", "CHUNK") if name in build.constants)
    # All ways: blocks stored, factors loaded, sums staged and loaded again, copies.
    assert set(seen) == {
        ("store", "bf16"), ("load", "bf16"), ("store", "fp32"), ("load", "fp32"), ("copy", "bf16"),
        ("J", 1), ("J", 2), ("PIXELS", 1), ("PIXELS", 2), ("PIXELS", 4), ("CHUNK", 4), ("CHUNK", 8),
    }  # fmt: skip


@gluon.jit
def rows_and_columns(x_ptr, WIDTH: gl.constexpr):
    """A warp stores 32×16 values, a row per lane and a column per lane, into the left half of rows of 2·WIDTH."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 1], [1, 0])
    BY_COLUMN: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [1, 1], [1, 0])
    memory = gl.allocate_shared_memory(gl.float32, [32, 2 * WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    part = memory.slice(0, WIDTH, dim=1)
    part.store(gl.zeros([32, WIDTH], gl.float32, layout=BY_COLUMN))
    value = part.load(BY_ROW)
    memory.store(gl.join(value, value).permute([0, 2, 1]).reshape([32, 2 * WIDTH]))


def test_the_checker_sees_conflicts():
    """Rows of 32 words: a row per lane is one bank for all lanes. As a part of 16 words alone it would be two banks."""
    source = cubin.source(rows_and_columns, {"x_ptr": "*fp32"}, {"WIDTH": 16})
    stored, loaded, both = conflicts.of_source(source, 90, 1)
    assert (stored.kind, stored.shape, stored.of) == ("store", (32, 16), (32, 32))
    assert stored.conflicts == 1, "two rows of 16, 32 words apart, are the same 16 banks"
    assert loaded.conflicts > stored.conflicts
    assert both.conflicts == loaded.conflicts, "of the whole, without anything done for parts"
    assert "load of fp32 32×16 of 32×32" in str(loaded)
    alone = cubin.source(rows_and_columns, {"x_ptr": "*fp32"}, {"WIDTH": 8})
    assert conflicts.of_source(alone, 90, 1)[1].conflicts < loaded.conflicts


def test_conflicts_are_broken_limits(monkeypatch):
    found = conflicts.Access("load", "bf16", (1,), (1,), 2)
    monkeypatch.setattr(conflicts, "_access", lambda *args: found)
    row = row_of(gluon_build(Case(FORWARD, "bf16", 1, 3)))
    assert row["broken"] == ["no bank conflicts"]
    assert str(found) in code.text(row)


# What is counted


def test_what_moves_in_how_many_wavefronts():
    lines = {
        "LDG.E.128 R4, [R2.64]": 4, "LDG.E.U16 R4, [R2.64]": 1, "LDG.E.64.CONSTANT R4, [R2.64]": 2,
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]": 4, "LDSM.16.M88.4 R4, [R1]": 4, "LDSM.16.MT88.2 R4, [R1]": 2,
        "LDSM.16.M88 R4, [R1]": 1, "STSM.16.M88.4 [R1], R4": 4, "LDS.128 R4, [R1]": 4, "STS.U16 [R1], R4": 1,
        "STG.E.128 [R2.64], R4": 4, "SHFL.BFLY PT, R1, R2, 0x1, 0x1f": 1, "LDGDEPBAR": 0, "LDC.64 R4, c[0x0][R1]": 0,
        "DEPBAR.LE SB0, 0x0": 0, "FFMA R1, R2, R3, R4": 0, "BAR.SYNC 0x0": 0,
    }  # fmt: skip
    instructions = cubin.parse("\n".join(f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(lines)))
    assert {line: code.wavefronts([i]) for line, i in zip(lines, instructions, strict=True)} == lines
    assert code.wavefronts(instructions) == sum(lines.values())


def toy(*lines: str) -> cubin.Program:
    return cubin.Program(cubin.parse("\n".join(f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(lines))))


NESTED = toy(
    "MOV R1, c[0x0][0x28]",
    "IADD3 R2, R2, 0x1, RZ",  # 0x10: tiles
    "LDSM.16.M88.4 R8, [R1]",  # 0x20: steps
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P0 BRA 0x20",
    "@P1 BRA 0x10",
    "EXIT",
)


@pytest.mark.parametrize("what", [FORWARD, WEIGHT])
def test_counts_of_a_toy_program(what):
    case = Case(what, "bf16", 7, 7)
    (one,) = (one for one in code.launched(case, 56, 56, 90) if one.launch.kernel in GLUON)
    build = products.Build(case, one.launch)
    # A step is 16 outputs of each lane.
    assert code.steady(build, NESTED) == {"slots": round(3 / 16, 2), "hmma": round(1 / 16, 2), "wavefronts": 4 / 16}
    numbers = one.numbers | {"tiles": 20, "tiles_per_program": 5, "jobs_per_program": 5, "rows": 56}
    steps = 30  # of two rows, of 59: 56 + 6 without the three above the map, or below it
    outputs = 100 * 32 * 8
    found = code.per_output(build, NESTED, code.OnMap(56, 56, outputs, 4, numbers))
    slots = 1 + 5 * (2 + 3 * steps) + 1
    assert found == {
        "slots": pytest.approx(4 * slots / 100), "hmma": pytest.approx(4 * 5 * steps / 100),
        "wavefronts": pytest.approx(4 * 4 * 5 * steps / 100),
    }  # fmt: skip


def test_counts_of_a_large_kernel():
    case = Case(FORWARD, "bf16", 31, 31)
    build = gluon_build(case)
    loops = toy("LDSM.16.M88.4 R8, [R1]", "@P0 BRA 0x0", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA 0x20", "EXIT")
    # 8 pairs of blocks; 7 patch rows × 4 strips × 4 outputs of a lane.
    expected = {"slots": 4 * 8 / 112, "hmma": 8 / 112, "wavefronts": 4 * 8 / 112}
    assert code.steady(build, loops) == {name: round(count, 2) for name, count in expected.items()}


def test_trips_of_the_stream_kernels():
    v = {"OH": 56, "H": 56, "rows": 56, "padding_h": 3, "R": 1, "GROUPS": 7, "PIXELS": 2, "J": 2}
    v |= {"tiles": 10, "tiles_per_program": 4, "jobs_per_program": 4}
    tiles = 10 / 3  # three programs
    assert block_time.trips(STREAM, v) == (tiles, (56 + 6 - 3 + 1) // 2)
    assert block_time.trips(GRADIENT, v) == (tiles, (56 + 3 + 1) // 2)
    # In two parts: 34 rows less the three above the map, and 34.
    v |= {"rows": 28, "tiles_per_program": 10, "jobs_per_program": 10}
    assert block_time.trips(STREAM, v) == (10, (16 + 17) / 2)
    assert block_time.trips(GRADIENT, v) == (10, (17 + 16) / 2)
    assert block_time.trips(STREAM, v | {"J": 1}) == (10, (8 + 9) / 2)


def test_trips_of_the_large_kernel():
    v = {"OH": 56, "R": 4, "PATCH_ROWS": 7, "GROUPS": 9, "CHUNK": 8, "shift_h": 3, "HB": 15, "pairs": 8}
    assert block_time.trips(LARGE, v) == (8, 8), "all of two chunks of two programs"
    assert block_time.trips(LARGE, v | {"OH": 7, "PATCH_ROWS": 4, "HB": 3}) == (8, 0), "the second is below the map"
    assert block_time.trips(LARGE, v | {"GROUPS": 2, "shift_h": 8}) == (4,), "for half of the programs above it"


def test_loops_that_some_programs_skip():
    times = block_time.of_loops(NESTED, (1, 0.5))
    assert NESTED.slots(times) == block_time.total(NESTED, times, len) == 1 + 2 + 1.5 + 1


# Limits

KEPT = {
    "what": FORWARD, "kernel": STREAM, "arch": 90, "dtype": "bf16", "K": "7", "C": 96, "residual": None, "y": None,
    "constants": {}, "warps": 8, "registers": 255, "spill": 0, "spill_in_loops": 0, "stack": 0, "shared": 227 * 1024,
    "atomics": [], "compile_seconds": 30, "conflicts": 0, "steady": {"slots": 9, "hmma": 1}, "maps": [{"slots": 10}],
}  # fmt: skip
BROKEN = {
    "no spill in a loop": {"spill_in_loops": 1},
    "registers × threads ≤ 65536": {"warps": 9},
    "shared memory within the architecture's": {"shared": 227 * 1024 + 1},
    "no atomics": {"atomics": ["atom.add"]},
    "no spill at all": {"spill": 1},
    "no bank conflicts": {"conflicts": 1},
    "products on tensor cores": {"steady": {"slots": 9, "hmma": 0}},
    "the loops of the source": {"maps": [{"slots": 10}, {"slots": None}]},
    "30 s to compile": {"compile_seconds": 30.1},
    "9 slots per output": {"steady": {"slots": 9.01, "hmma": 1}},
}


def test_every_limit_can_be_broken():
    assert code.broken(KEPT, Options()) == []
    assert list(BROKEN) == [*(name for name, *_ in code.LIMITS), "9 slots per output"]
    for name, changes in BROKEN.items():
        assert code.broken(KEPT | changes, Options()) == [name]
    elsewhere = KEPT | {"arch": 100, "spill": 1, "steady": {"slots": 99, "hmma": 1}}
    assert code.broken(elsewhere, Options()) == [], "spills in front of loops, and no bars but on sm_90"
    assert code.broken(KEPT | {"stack": 8}, Options()) == ["no spill at all"]


def test_bars_are_for_what_they_say():
    slow = KEPT | {"steady": {"slots": 100, "hmma": 1}}
    for (what, size), bar in code.BARS.items():
        of_bar = slow | {"what": what, "K": size}
        assert code.broken(of_bar, Options()) == [f"{bar} slots per output"]
        assert code.broken(of_bar | {"steady": {"slots": bar, "hmma": 1}}, Options()) == []
        for other in ({"dtype": "fp16"}, {"C": 40}, {"residual": "bf16"}, {"y": "fp32"}, {"constants": {"STRIPS": 2}}):
            assert code.broken(of_bar | other, Options()) == []
        assert code.broken(of_bar | {"constants": {"PATCH_ROWS": 7, "STRIPS": 4}}, Options()) != []
    assert code.broken(slow | {"K": "21"}, Options()) == []


def test_the_report_sees_what_it_is_there_to_see():
    case = Case(FORWARD, "bf16", 7, 7)
    spilled = row_of(gluon_build(case, maxnreg=96))
    assert {"no spill in a loop", "no spill at all"} <= set(spilled["broken"])
    assert code.report(code.Job(gluon_build(case, J=3), []), 90, SLOW)[0]["broken"] == ["compiles"]


def test_command_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--arch", "90", "--kernel-size", "1x3", "--jobs", "1", "--slow", "3", "--json", str(file)]
    assert code.main(arguments) == 0
    rows = json.loads(file.read_text())
    kernels = {STREAM, GRADIENT, "_depthwise_fragments_kernel", "_depthwise_diagonals_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    assert [(one["H"], one["W"]) for one in rows[0]["maps"]] == list(MAPS)
    assert "0 with broken limits" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["53", "0", "3x5x7"])
def test_sizes_that_no_kernel_takes(size, capsys):
    with pytest.raises(SystemExit):
        code.main(["--kernel-size", size])
    assert "no size up to 51" in capsys.readouterr().err


# The predicted time


def test_time_of_a_launch_is_that_of_its_longest_pipe():
    issue = tensor_time.time(29.568, 0, 0, 0)
    assert (issue.slots, issue.issue, issue.predicted) == (29.568, pytest.approx(1), pytest.approx(1))
    assert tensor_time.time(0, 16 * 0.231, 0, 0).tensor == pytest.approx(1), "two cycles of 4.329 ps, for 32 lanes"
    assert tensor_time.time(0, 0, 32 * 0.231, 0).predicted == pytest.approx(1)
    both = tensor_time.time(0, 0, 0, 6) + tensor_time.time(0, 0, 32 * 0.231, 1.5, ["a"])
    assert both.hbm == pytest.approx(2.5)
    assert both.predicted == pytest.approx(3)
    assert both.unread == {"a"}


def test_launches_with_and_without_tensor_cores():
    case = Case(FORWARD, "bf16", 31, 31)
    kernels = [one.launch.kernel for one in tensor_time.launched(case, 56, 56, True)]
    assert kernels == ["_depthwise_fragments_kernel", "_depthwise_blocks_kernel", LARGE]
    assert tensor_time.launched(case, 56, 56, False) is None
    for what, kernel in ((FORWARD, "_depthwise_fwd_pairs_kernel"), (WEIGHT, "_depthwise_bwd_weight_pairs_kernel")):
        found = tensor_time.launched(Case(what, "bf16", 7, 7), 56, 56, False)
        assert kernel in {one.launch.kernel for one in found}
        taps = [one.bytes for one in found if one.launch.kernel == "_depthwise_taps_kernel"]
        assert all(size < 10**6 for size in taps), "x only tells its dtype"
    (one,) = (
        one for one in tensor_time.launched(Case(WEIGHT, "bf16", 7, 7), 56, 56, True) if one.launch.kernel == GRADIENT
    )
    parts = one.programs // 6
    outputs = code.PIXELS * 96
    assert parts > 1
    assert tensor_time.of_sum(one, outputs).hbm == pytest.approx((parts + 1) * 8 * 96 * 128 * 4 / outputs / 3)


def test_a_table_and_what_is_faster():
    seven, large = Case(FORWARD, "bf16", 7, 7), Case(FORWARD, "bf16", 51, 5)
    found = {}
    for side, _ in MAPS:
        found |= {
            (seven, side, True): tensor_time.time(10, 1, 1, 6),
            (large, side, True): tensor_time.time(90, 1, 1, 4),
        }
        found |= {(seven, side, False): tensor_time.time(side, 0, 1, 4), (large, side, False): None}
    rows = tensor_time.table(found, FORWARD)
    assert (
        rows[2]
        == "| 7 | 10.0 | 0.34 | 0.27 | 0.14 | 2.00 | **2.00** | 56.0 | 1.89 | 2.00 / 1.33 | 2.00 / 1.33 | 2.00 / 1.33 |"
    )
    assert rows[3].startswith("| 51×5 | 90.0 | 3.04 |")
    assert rows[3].endswith("| – | – | 3.04 / – | 3.04 / – | 3.04 / – |")
    assert tensor_time.faster(found) == [(seven, side) for side, _ in MAPS]


def test_readme_has_every_size():
    text = tensor_time.README.read_text()
    block = text.split(tensor_time.BEGIN)[1].split(tensor_time.END)[0]
    assert tensor_time.with_block(text, block) == text
    assert "not measured" in " ".join(block.split())
    sizes = [Case(FORWARD, "bf16", *size).size for size in tensor_time.KERNEL_SIZES]
    lines = [line.split(" | ") for line in block.splitlines() if line.startswith("| ")]
    assert [cells[0][2:] for cells in lines if "slots" not in cells] == 2 * sizes, (
        "python -m benchmarks.tensor_code --readme"
    )


@pytest.mark.full
def test_readme_is_what_the_command_says():
    text = tensor_time.README.read_text()
    assert tensor_time.with_block(text, tensor_time.block()) == text, "python -m benchmarks.tensor_code --readme"


def test_a_readme_without_markers():
    with pytest.raises(ValueError, match="tensor:begin"):
        tensor_time.with_block(tensor_time.END + tensor_time.BEGIN, "")
