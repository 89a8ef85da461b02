"""Kernels compiled for GPUs that are not there, within the limits of ``benchmarks.machine_code``; and that it sees what
it is there to see.

Every change: 7×7 in bf16 on sm_90, samples of the rest. ``pytest -m full``: everything, everywhere.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwconv_kernels import runtime
from dwconv_kernels.depthwise import config

if runtime.triton_version() is None:
    pytest.skip("Triton is not installed: there are no kernels to compile", allow_module_level=True)
if runtime.INTERPRETER:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from benchmarks import cubin, machine_code
from benchmarks.compiling import run
from benchmarks.launches import captured
from benchmarks.machine_code import Build, Family, Options, Programs
from dwconv_kernels.depthwise import launch
from dwconv_kernels.dtypes import NAMES

SLOW = Options(slow=2.0)  # machines that run tests are busy; the report's own limits are for those that do not
FORWARD, WEIGHT = ("_depthwise_fwd_kernel", "_depthwise_fwd_pairs_kernel"), "_depthwise_bwd_weight_pairs_kernel"


def reports(dtype, kh, kw, c, arch, wanted=lambda build: True, **geometry):
    rows = []
    for build in filter(wanted, machine_code.depthwise_builds(dtype, kh, kw, c, **geometry)):
        rows += machine_code.report(build, arch, SLOW)
    return rows


def assert_within_limits(rows, kernels):
    """Rows of exactly these kernels, all of them compiled, read, and within every limit."""
    assert {row["kernel"] for row in rows} == set(kernels)
    bad = [(row["kernel"], row["edge"], row["H"], row["broken"], row.get("error")) for row in rows if row["broken"]]
    assert not bad, bad
    assert all(row["registers"] > 0 and row["instructions"] > 50 for row in rows)
    for row in (row for row in rows if row["edge"]):
        in_loops = [loop["slots_per_output"] for loop in row["loops"]]
        assert row["KH"] * row["KW"] / 2 < in_loops[-1] <= sum(in_loops) < row["slots_per_output"] + 1, row


# The kernels of the package

# With a residual, sm_80 and sm_89 are left to test_everything, which takes its time.
WITH_RESIDUAL = [*((arch, False) for arch in machine_code.ARCHS), (90, True)]


@pytest.mark.full
@pytest.mark.parametrize("arch, residual", WITH_RESIDUAL)
def test_seven_by_seven_in_bf16(arch, residual):
    """What multiplies by FMAs, where tensor cores do not take the channels; of it, every change has SAMPLES."""
    rows = reports("bf16", 7, 7, 96, arch, lambda build: residual or not build.residual)
    small = {"_depthwise_taps_kernel", "_depthwise_sum_kernel"}
    assert_within_limits(rows, {*FORWARD, "_depthwise_bwd_weight_kernel", WEIGHT, *small})
    picked = [
        (row["kernel"] in FORWARD and f"forward, residual {row['residual']}", row["H"])
        for row in rows
        if not row["strict"] and row["edge"] != "masked" and row["H"]
    ]
    residuals = (None, "bf16", "fp32") if residual else (None,)
    ways = [False, *(f"forward, residual {dtype}" for dtype in residuals)]
    assert sorted(picked, key=str) == sorted(((way, h) for way in ways for h, _ in machine_code.MAPS), key=str)
    assert not any(row["spill"] for row in rows if row["residual"])  # beside sums and taps, it still fits in registers


SAMPLES = {
    "fp32 one row at a time": ("fp32", 7, 7, 96, 90, "strips"),
    "fp16 is widened in another way": ("fp16", 7, 7, 96, 90, "strips"),
    "K = 3": ("bf16", 3, 3, 96, 90, "strips"),
    "lanes beyond C, a kernel that is not square": ("fp32", 3, 7, 40, 89, "masked"),
    "packed products where there are some": ("bf16", 7, 7, 96, 100, "whole"),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_of_the_rest(sample):
    *key, arch, edge = SAMPLES[sample]

    def wanted(build):
        maps = machine_code.depthwise_maps(build, SLOW)
        return maps and build.choice.edge == edge and not all(strict for _, _, strict in maps) and not build.residual

    rows = reports(*key, arch, wanted)
    assert any(row["kernel"] in FORWARD for row in rows)
    assert_within_limits(rows, {row["kernel"] for row in rows})


@pytest.mark.full
@pytest.mark.parametrize("dtype", config.DTYPES)
@pytest.mark.parametrize("arch", machine_code.ALL_ARCHS)
def test_everything(arch, dtype):
    jobs = machine_code.jobs([arch], [dtype], machine_code.ALL_KERNEL_SIZES, machine_code.ALL_CHANNELS)
    found = list(run(jobs, SLOW, 2, machine_code.report, machine_code.failed))
    assert len(found) == len(jobs)
    assert_within_limits([row for rows in found for row in rows], {build.kernel for build, _ in jobs})


# What is compiled here is what a launch compiles


@pytest.fixture
def launches(monkeypatch):
    """What Triton would have compiled, of every launch of a kernel on FMAs."""
    monkeypatch.setattr(config, "on_tensor_cores", lambda *_: False)
    with captured() as seen:
        yield seen


def as_compiled_here(build):
    source = build.source
    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    options = json.loads(json.dumps(backend.parse_options(dict(build.options)).__dict__))
    return build.kernel, source.signature, source.constants, source.attrs, options


@pytest.mark.parametrize("c", [96, 40])
@pytest.mark.parametrize("kernel_size", [(7, 7), (3, 7)])
@pytest.mark.parametrize("dtype", config.DTYPES)
def test_launches_compile_exactly_these_builds(launches, dtype, kernel_size, c):
    """Whatever the sizes are (1, divisible by 16) and however aligned the pointers, with every kernel met."""
    (kh, kw), map_dtype = kernel_size, {v: k for k, v in NAMES.items()}[dtype]
    for parameter_dtype in (map_dtype, torch.float32):
        for mode in (runtime.strict, contextlib.nullcontext):
            for h, w, padding in [(1, 56, "same"), (16, 14, "same"), (7, 7, "same"), (9, 9, "same"), (16, 16, (2, 2))]:
                padding = (kh // 2, kw // 2) if padding == "same" else padding
                parent = torch.empty(2 * c * h * w + 1, dtype=map_dtype)
                x = parent[1:].view(2, h, w, c).permute(0, 3, 1, 2)  # 2 or 4 bytes off
                weight, bias = torch.empty(c, 1, kh, kw, dtype=parameter_dtype), torch.empty(c, dtype=parameter_dtype)
                with mode():
                    y = launch.depthwise_forward(x, weight, bias, (1, 1), padding, (1, 1))
                    launch.depthwise_backward(y, x, weight, bias, (1, 1), padding, (1, 1), (True, True, True))
                    for residual in (x, x.float()):
                        launch.depthwise_input_gradient(y, weight, padding, torch.empty_like(residual), residual)
    expected = [as_compiled_here(build) for build in machine_code.depthwise_builds(dtype, kh, kw, c)]
    assert launches
    assert [one for one in launches if one not in expected] == []
    assert [one for one in expected if one not in launches] == []


# What the report is there to see


@triton.jit
def spilling_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        x = tl.load(x_ptr + row * BLOCK + offs)
        a += x
        b = b * a + x
    tl.store(y_ptr + offs, a + b)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for row in range(rows):
        tl.atomic_add(y_ptr + offs, tl.load(x_ptr + row * BLOCK + offs))


@triton.jit
def forgotten_loop_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def nested_kernel(x_ptr, y_ptr, images, rows, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for image in range(images):
        part = tl.zeros((BLOCK,), tl.float32)
        for row in range(rows):
            x = tl.load(x_ptr + (image * rows + row).to(tl.int64) * BLOCK + offs)
            for _ in tl.static_range(100):  # as many as it takes for ptxas not to unroll the loop
                part = part * x + x
        for _ in tl.static_range(60):
            total = total * part + part
    tl.store(y_ptr + offs, total)


@pytest.fixture
def seeded(monkeypatch):
    """A report's row of one of the kernels above, on a map of 5 rows; two images."""

    def row_of(kernel, loops, block=32):
        arguments = [(p.name, "*fp32" if p.name.endswith("_ptr") else "i32") for p in kernel.params[:-1]]
        constants, options = (("BLOCK", block),), (("num_warps", 1),)
        build = Build("seeded", kernel.__name__, "fp32", 7, 7, 32, tuple(arguments), constants, options, loops)
        return build, machine_code.report(build, 90, SLOW)[0]

    family = Family(
        kernels=sys.modules[__name__],
        builds=lambda *key: iter(()),
        maps=lambda build, options: [(5, 1, False)],
        programs=lambda build, h, w, options: [Programs(1, (2, h)[-len(build.loops) :])],
    )
    monkeypatch.setitem(machine_code.FAMILIES, "seeded", family)
    return row_of


def test_a_spill_in_a_loop_is_seen(seeded):
    _, row = seeded(spilling_kernel, ("rows",), block=32 * 256)
    assert row["spill_in_loops"] > 0
    assert row["spill"] > row["spill_in_loops"]
    assert row["broken"] == ["no spill in a loop"]


def test_an_atomic_is_seen(seeded):
    _, row = seeded(atomic_kernel, ("rows",))
    assert row["broken"] == ["no atomics"]
    assert cubin.atomics('.file 1 "/red.py"\n// atom.add\n\tredux.sync.add.s32 %r1;') == []
    assert cubin.atomics("\t{ .reg .pred p; @p red.global.add.f32 [%rd1], %f1; }") == ["red.global.add.f32"]


@pytest.mark.parametrize("kernel", [forgotten_loop_kernel, nested_kernel])
def test_a_forgotten_or_doubled_loop_is_seen(seeded, kernel):
    _, row = seeded(kernel, ("rows",))
    assert "the loops of the source" in row["broken"]
    assert row["slots_per_output"] is None


def test_slots_of_nested_loops(seeded):
    """Two images of five rows: the outer loop's instructions twice, the inner's ten times, the others once."""
    build, row = seeded(nested_kernel, ("images", "rows"))
    assert row["broken"] == []
    program = cubin.compile_for(build.source, 90, dict(build.options)).program
    outer, inner = (program.body(loop) for loop in program.loops)
    assert [sum(i.is_product for i in body) for body in (outer, inner)] == [60, 100]

    def slots(images, rows):
        return program.slots(lambda loop: (images, rows)[loop.depth])

    assert row["slots_per_output"] * 5 == slots(2, 5)
    assert slots(2, 6) - slots(2, 5) == 2 * len(inner)
    assert slots(3, 5) - slots(2, 5) == len(outer) + 5 * len(inner)
    assert slots(1, 1) <= len(program.instructions)
    found = [tuple(loop.values())[:4] for loop in row["loops"]]  # name, instructions, spills, share of products
    expected = [("images", outer, 60), ("rows", inner, 100)]
    assert found == [(name, len(body), 0, round(count / len(body), 3)) for name, body, count in expected]


def test_pipes_are_those_of_the_loop(seeded):
    _, row = seeded(nested_kernel, ("images", "rows"))
    for loop, times in zip(row["loops"], (2 / 5, 10 / 5), strict=True):
        assert loop["slots_per_output"] == pytest.approx(loop["instructions"] * times, abs=0.01)
        assert set(loop["pipes"]) <= {"fma", "integer", "memory", "special", "tensor", "control", "uniform"}
    images, rows = (loop["pipes"] for loop in row["loops"])
    assert images["fma"] >= 60 * 2 / 5
    assert rows["fma"] >= 100 * 2
    assert rows["memory"] == 4 * 2  # one load
    assert pipes("FFMA.FTZ", 80) == {"fma": 2}  # half as many lanes there
    assert pipes("F2FP.BF16.PACK_AB", 90) == {"integer": 2}
    assert pipes("F2F.BF16.F32", 90) == {"special": 8}
    assert pipes("HGMMA.64x128x16.F32.BF16", 90) == {"tensor": 1}
    assert pipes("HFMA2.MMA", 90) == {"fma": 1}
    assert pipes("UIADD3", 90) == {"uniform": 1}


def pipes(opcode, arch):
    return cubin.pipe_cycles([cubin.Instruction(0, "", opcode, "")], arch)


def test_a_kernel_that_does_not_compile_is_reported(seeded):
    _, row = seeded(nested_kernel, ("images", "rows"), block=33)
    assert row["broken"] == ["compiles"]
    assert "power of 2" in row["error"]


class Deadly:
    """Ends the process that unpickles it, as a compiler that crashes does."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_compiler_that_crashes_is_reported_and_the_rest_compiled():
    good = next(b for b in machine_code.depthwise_builds("fp32", 1, 3, 32) if b.kernel == "_depthwise_taps_kernel")
    deadly = replace(good, constants=(("KH", Deadly()),))
    (bad,), (row,) = run([(deadly, 90), (good, 90)], SLOW, 2, machine_code.report, machine_code.failed)
    assert (bad["broken"], bad["kernel"]) == (["compiles"], good.kernel)
    assert row["broken"] == []
    assert row["registers"] > 0


# Machine code written by hand: instructions of 16 bytes each, so 0x40 is number 4


def program(lines):
    lines = [f"        /*{16 * at:04x}*/    {line.strip()} ;   /* 0x0 */" for at, line in enumerate(lines.split(";"))]
    return cubin.Program(cubin.parse("\n".join(lines)))


PROGRAMS = {
    "the longer side of a branch": ("@P0 BRA 0x40; MOV; MOV; BRA 0x50; MOV; EXIT", 5),
    "a loop with its test at the end": ("MOV; FADD; FADD; @P0 BRA 0x10; EXIT", 1 + 3 * 10 + 1),
    "a loop with its test at the start": ("MOV; @P0 BRA 0x40; FADD; BRA 0x10; EXIT", 1 + 3 * 10 + 1 + 1),
    "a loop that is left by a jump": ("MOV; FADD; @!P0 CALL.REL.NOINC 0x40; BRA 0x10; EXIT", 1 + 3 * 9 + 2 + 1),
    "a loop that is left by the end": ("FADD; @P0 EXIT; BRA 0x0", 3 * 9 + 2),
    "a part of the loop out of line": ("FADD; @P1 BRA 0x40; @P0 BRA 0x0; EXIT; STG.E; BRA 0x20", 5 * 10 + 1),
    "padding that is never reached": ("MOV; EXIT; BRA 0x20; NOP", 2),
    "a predicate and notes among the operands": ("BRA.U !UP0, 0x30  &req={3,0}  ?trans6; MOV; MOV ?t1; EXIT", 4),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_slots_of_the_longest_way(case):
    lines, slots = PROGRAMS[case]
    assert program(lines).slots(lambda loop: 10) == slots


def test_two_loops_in_one():
    code = program("MOV; FADD; FADD; FADD; @P0 BRA 0x20; @P1 BRA 0x20; FADD; @P2 BRA 0x10; EXIT")
    assert [loop.depth for loop in code.loops] == [0, 1]
    assert [len(code.body(loop)) for loop in code.loops] == [3, 4]
    assert code.slots(lambda loop: (2, 5)[loop.depth]) == 1 + 2 * (3 + 5 * 4) + 1


UNREADABLE = {
    "a call": ("CALL.REL.NOINC 0x20; EXIT; RET.REL.NODEC R2 0x0", "is not followed"),
    "a computed jump": ("BRX R2 -0x10; EXIT", "is not followed"),
    "no end": ("MOV; BRA 0x0", "does not end"),
    "a loop with two entries": ("@P0 BRA 0x20; MOV; MOV; @P1 BRA 0x10; EXIT", "two entries"),
    "an instruction that is not understood": ("MOV; ??; EXIT", "missing"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_followed_is_an_error(case):
    lines, message = UNREADABLE[case]
    with pytest.raises(cubin.Unreadable, match=message):
        _ = program(lines).loops


def test_resources():
    text = " Function f:\n  REG:222 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0"
    assert cubin.parse_resources(text) == {"registers": 222, "stack": 8, "shared": 1024, "local": 0}
    with pytest.raises(cubin.Unreadable, match="no resources"):
        cubin.parse_resources("cuobjdump info: none")


# Programs of a map, limits, the command


@pytest.mark.parametrize(
    "kernel_index, c, size, options, programs",
    [
        (0, 96, (56, 56), Options(), [Programs(24, (28,))]),
        (0, 40, (9, 14), Options(), [Programs(4, (5,))]),  # an odd number of rows, a block of channels that is not full
        (0, 96, (28, 10), Options(rows=14), [Programs(6, (9,)), Programs(6, (9,))]),  # 17 rows of x, 18 rows of x
        (1, 96, (28, 28), Options(images=3), [Programs(12, (3, 14))]),
        (1, 96, (28, 28), Options(rows=16), [Programs(12, (1, 8)), Programs(12, (1, 6))]),
    ],
)
def test_programs_of_a_map(kernel_index, c, size, options, programs):
    builds = machine_code.depthwise_builds("bf16", 7, 7, c)
    pairs = [build for build in builds if build.choice is not None and build.choice.pairs and build.residual is None]
    assert machine_code.depthwise_programs(pairs[kernel_index], *size, options) == programs


def test_slots_have_a_limit_on_each_map():
    row = {
        "arch": 90, "dtype": "bf16", "K": "7", "C": 96, "strict": False, "plain": True,
        "kernel": "_depthwise_fwd_kernel", "H": 56, "W": 56, "registers": 255, "warps": 1, "shared": 0, "atomics": [],
        "spill_in_loops": 0,
        "residual": None, "compile_seconds": 9.0, "loops_as_expected": True, "slots_per_output": 53.9,
    }  # fmt: skip

    def broken(**changes):
        return machine_code.broken(row | changes, Options())

    assert broken() == []
    assert broken(slots_per_output=54.1) == broken(slots_per_output=None) == ["54 slots per output at 56×56"]
    assert broken(slots_per_output=54.1, strict=True) == broken(slots_per_output=54.1, arch=80) == []
    assert broken(kernel="_depthwise_bwd_weight_kernel", slots_per_output=60.1) == ["60 slots per output at 56×56"]
    assert broken(slots_per_output=58.9, residual="bf16") == []
    assert broken(slots_per_output=59.1, residual="bf16") == ["59 slots per output at 56×56"]
    assert broken(compile_seconds=10.1) == ["10 s to compile 7×7"]
    assert broken(compile_seconds=10.1, K="9") == []
    assert broken(compile_seconds=30.1, K="9") == ["30 s to compile"]
    assert machine_code.broken(row | {"compile_seconds": 19.9}, SLOW) == []
    assert broken(registers=255, warps=16) == ["registers × threads ≤ 65536"]
    assert broken(shared=228 * 1024) == ["shared memory within the architecture's"]


def only(monkeypatch, kernels):
    """The report knows only these kernels."""

    def builds(*key):
        return (build for build in machine_code.depthwise_builds(*key) if build.kernel in kernels)

    family = Family(launch.kernels, builds, machine_code.depthwise_maps, machine_code.depthwise_programs)
    monkeypatch.setattr(machine_code, "FAMILIES", {"depthwise": family})


def test_command_writes_rows(monkeypatch, tmp_path, capsys):
    only(monkeypatch, ["_depthwise_fwd_kernel", "_depthwise_taps_kernel"])
    file = tmp_path / "rows.json"
    arguments = ["--arch", "90", "--dtype", "fp32", "--kernel-size", "1x3", "--jobs", "1", "--json", str(file)]
    assert machine_code.main(arguments) == 0
    rows = json.loads(file.read_text())
    needed = {"kernel", "arch", "dtype", "K", "H", "W", "registers", "spill", "compile_seconds", "slots_per_output"}
    assert all(needed <= set(row) for row in rows)
    assert {(row["kernel"], row["K"], row["H"]) for row in rows} >= {("_depthwise_fwd_kernel", "1x3", 56)}
    printed = capsys.readouterr().out
    assert "0 limits broken" in printed
    assert "56×56:" in printed


def test_command_fails_without_kernels_and_on_broken_limits(monkeypatch, capsys):
    arguments = ["--arch", "90", "--dtype", "fp32", "--kernel-size", "3", "--jobs", "1"]
    only(monkeypatch, [])
    assert machine_code.main(arguments) == 1
    assert "No kernel was found" in capsys.readouterr().out
    only(monkeypatch, ["_depthwise_taps_kernel"])
    assert machine_code.main([*arguments, "--slow", "0.00001"]) == 1
    assert "_depthwise_taps_kernel, parameters fp32: 30 s to compile (" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--kernel-size=8", "--kernel-size=x", "--rows=7", "--jobs=0"])
def test_command_refuses_what_it_cannot_report(argument, capsys):
    with pytest.raises(SystemExit):
        machine_code.main([argument])
    assert argument.split("=")[0] in capsys.readouterr().err


def test_command_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-m", "benchmarks.machine_code"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stdout
