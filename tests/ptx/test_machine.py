"""The machine that runs PTX: what it computes, and which mistakes it finds. Programs of a few instructions."""

import numpy as np
import pytest

from tests.ptx.instructions import bound
from tests.ptx.machine import Machine
from tests.ptx.matrices import cut_off
from tests.ptx.memory import AccessError, GlobalMemory
from tests.ptx.program import read

THREADS = 64
HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<30>;
	.reg .b64 	%rd<9>;
	.loc	1 38 0                          // a line of the source
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	mad.lo.s32 	%r4, %r2, 64, %r1;
	mul.wide.s32 	%rd3, %r4, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
"""
TAIL = """
	ret;
}
"""


def run(body: str, given: np.ndarray, programs: int = 1, shared: int = 4096) -> np.ndarray:
    """What a program writes to its second tensor, that has as many numbers of 32 bits as the first."""
    program = read(HEAD + body + TAIL)
    given = np.ascontiguousarray(given, np.float32)
    result = np.full_like(given, np.nan)
    memory = GlobalMemory([(a.ctypes.data, a.nbytes) for a in (given, result)])
    blocks = [[(one, bound(one)) for one in block] for block in program.blocks]
    arguments = [given.ctypes.data, result.ctypes.data]
    with np.errstate(all="ignore"):
        Machine(program, np.arange(programs), programs, arguments, memory, shared).run(blocks)
    return result


def each(instructions: str, given: np.ndarray, programs: int = 1) -> np.ndarray:
    """Every thread makes %r6 of its number in %r5."""
    body = f"ld.global.b32 %r5, [%rd4];\n{instructions}\nst.global.b32 [%rd5], %r6;"
    return run(body, given, programs)


X = np.random.default_rng(0).standard_normal(THREADS).astype(np.float32)
BITS = X.view(np.int32)

COMPUTED = {
    "add.f32 %r6, %r5, 0f3F800000;": X + np.float32(1),
    "fma.rn.f32 %r6, %r5, %r5, %r5;": (X.astype(float) * X + X).astype(np.float32),
    "neg.f32 %r6, %r5;": -X,
    "{ .reg .f32 n; neg.f32 n, %r5; mul.rn.sat.f32 %r6, n, 0f40000000; }": np.clip(-2 * X, 0, 1),
    "max.f32 %r6, %r5, 0f7FC00000;": X,
    "max.NaN.f32 %r6, %r5, 0f7FC00000;": np.full_like(X, np.nan),
    "shr.s32 %r6, %r5, 7;": BITS >> 7,
    "shr.u32 %r6, %r5, 40;": np.zeros_like(BITS),
    "mul.hi.u32 %r6, %r5, 65536;": (X.view(np.uint32) >> 16).view(np.int32),
    "div.s32 %r6, %r5, 1000;": np.trunc(BITS / 1000).astype(np.int32),
    "rem.s32 %r6, %r5, 1000;": np.fmod(BITS, 1000).astype(np.int32),
    "bfe.u32 %r6, %r5, 23, 8;": (X.view(np.uint32) >> 23 & 0xFF).view(np.int32),
    "bfe.s32 %r6, %r5, 30, 2;": BITS >> 30,
    "prmt.b32 %r6, %r5, 0, 0x5410U;": BITS & 0xFFFF,
    "setp.gt.f32 %p1, %r5, 0f00000000; selp.b32 %r6, 1, -1, %p1;": np.where(X > 0, 1, -1).astype(np.int32),
    "setp.neu.f32 %p1, %r5, %r5; selp.b32 %r6, 1, 0, %p1;": np.zeros_like(BITS),
    "mov.b32 {%rs1, %rs2}, %r5; mov.b32 %r6, {%rs2, %rs1};": (BITS << 16) | (BITS >> 16 & 0xFFFF),
    "cvt.rn.bf16x2.f32 %r7, %r5, 0f00000000; and.b32 %r6, %r7, 0xffff0000;": None,
    "shfl.sync.bfly.b32 %r6, %r5, 3, 31, -1;": X[np.arange(THREADS) ^ 3],
    "mov.b32 %r7, 1; redux.sync.add.s32 %r6, %r7, -1;": np.full_like(BITS, 32),
    "@!%p2 mov.b32 %r6, 5;": np.full_like(BITS, 5),
    "add.s32 %r7, %r1, 65537; mov.b16 %rs1, %r7; cvt.u32.u16 %r6, %rs1;": np.arange(1, THREADS + 1, dtype=np.int32),
    "cvt.u64.u32 %rd6, %r3; cvt.u32.u64 %r6, %rd6;": np.arange(THREADS, dtype=np.int32) * 4,
}


@pytest.mark.parametrize("instructions", COMPUTED)
def test_computes(instructions):
    expected = COMPUTED[instructions]
    if expected is None:  # to bf16, of which NumPy has none: to nearest even
        bits = X.view(np.uint32)
        expected = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32)
    result = each(instructions, X)
    np.testing.assert_array_equal(result, np.ascontiguousarray(expected).view(np.float32))


def test_threads_that_take_different_ways_meet_again():
    body = """
    and.b32 %r7, %r1, 3;
    mov.b32 %r6, 0;
    $L__BB0_1:
    setp.ge.s32 %p1, %r6, %r7;
    @%p1 bra $L__BB0_2;
    add.s32 %r6, %r6, 1;
    bra.uni $L__BB0_1;
    $L__BB0_2:
    shfl.sync.bfly.b32 %r6, %r6, 1, 31, -1;
    """
    expected = (np.arange(2 * THREADS) % 4) ^ 1
    np.testing.assert_array_equal(each(body, np.zeros(2 * THREADS), 2).view(np.int32), expected)


SWAP = """
ld.global.b32 %r5, [%rd4];
mov.b32 %r10, global_smem;
add.s32 %r11, %r10, %r3;
st.shared.b32 [%r11], %r5;
bar.sync 0;
xor.b32 %r12, %r3, 252;
add.s32 %r13, %r10, %r12;
ld.shared.b32 %r6, [%r13];
st.global.b32 [%rd5], %r6;
"""
COPY = """
mov.b32 %r10, global_smem;
shl.b32 %r11, %r1, 4;
shl.b64 %rd6, %rd3, 2;
setp.lt.u32 %p1, %r1, 16;
add.s64 %rd7, %rd1, %rd6;
selp.b64 %rd7, %rd7, %rd1, %p1;
selp.b32 %r14, 16, 0, %p1;
cp.async.cg.shared.global [ %r11 + 0 ], [ %rd7 + 0 ], 0x10, %r14;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.b32 %r6, [%r3];
st.global.b32 [%rd5], %r6;
"""


def test_shared_memory():
    np.testing.assert_array_equal(run(SWAP, X), X[::-1])
    np.testing.assert_array_equal(run(COPY, X), X)


@pytest.mark.parametrize("body, old, new, reason", [
    (SWAP, "bar.sync 0;", "", "racecheck"),
    (SWAP, "xor.b32 %r12, %r3, 252;", "add.s32 %r12, %r3, 256;", "initcheck"),
    (SWAP, "st.shared.b32 [%r11]", "st.shared.b32 [%r11+4000]", "of 4096 bytes"),
    (SWAP, "add.s32 %r11, %r10, %r3;", "mov.b32 %r11, %r10;", "racecheck"),
    (SWAP, "ld.global.b32 %r5, [%rd4];", "ld.global.b32 %r5, [%rd4+4];", r"\+256 bytes from a tensor of 256|\+0 bytes"),
    (SWAP, "ld.global.b32 %r5, [%rd4];", "ld.global.b32 %r5, [%rd4+-4];", "bytes from a tensor of 256"),
    (SWAP, "ld.global.b32 %r5, [%rd4];", "ld.global.b32 %r5, [%rd4+2];", "no multiple of"),
    (SWAP, "ld.global.b32 %r5, [%rd4];", "ld.global.v2.b32 {%r5, %r7}, [%rd4];", "no multiple of the 8 bytes"),
    (SWAP, "st.global.b32 [%rd5]", "st.global.b32 [%rd2]", "different values to the same place"),
    (SWAP, "bar.sync 0;", "setp.gt.u32 %p1, %r1, 40; @%p1 bra $L__BB0_9; bar.sync 0; $L__BB0_9:", "racecheck"),
    (SWAP, "bar.sync 0;", "setp.gt.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0;", "wait at a barrier, others have returned"),
    (SWAP, "xor.b32", "setp.gt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r5, %r5, 1, 31, -1; xor.b32", "a warp"),
    (COPY, "bar.sync 0;", "", "racecheck"),
    (COPY, "cp.async.wait_group 0;\nbar.sync 0;", "bar.sync 0;\ncp.async.wait_group 0;", "racecheck"),
    (COPY, "cp.async.wait_group 0;", "", "is read while it is copied to"),
    (COPY, "cp.async.wait_group 0;", "st.shared.b32 [%r3], %r5;", "is written while it is copied to"),
])  # fmt: skip
def test_mistakes_are_found(body, old, new, reason):
    assert old in body
    with pytest.raises(AccessError, match=reason):
        run(body.replace(old, new), np.concatenate([X, X]) if "rd4+2" in new else X)


def test_programs_of_a_launch_do_not_know_each_other():
    """One that reads, or writes, what another has written."""
    given = np.concatenate([X, X])
    other = "xor.b32 %r12, %r4, 64; mul.wide.s32 %rd6, %r12, 4; add.s64 %rd7, %rd2, %rd6;"
    for body in (
        f"{other} st.global.b32 [%rd5], %r1; ld.global.b32 %r6, [%rd7];",
        f"{other} ld.global.b32 %r6, [%rd5]; st.global.b32 [%rd7], %r6;",
        f"{other} st.global.b32 [%rd5], %r4; st.global.b32 [%rd7], %r4;",
    ):
        run(body.replace("xor.b32 %r12, %r4, 64", "mov.b32 %r12, %r4"), given, 2)
        with pytest.raises(AccessError, match=r"of the same launch|different values"):
            run(body, given, 2)


@pytest.mark.parametrize("instruction", [
    "atom.global.add.f32 %r6, [%rd4], %r5;", "bar.sync 0, 32;", "bar.arrive 0, 64;", "bar.sync 1;",
    "add.sat.s32 %r6, %r1, %r2;", "fma.rz.f32 %r6, %r5, %r5, %r5;",
    "cvt.rp.f32.s32 %r6, %r5;",
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;", "shfl.sync.up.b32 %r6, %r5, 3, 0, -1;", "mma.sync.aligned.m8n8k4 %r6;",
])  # fmt: skip
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(NotImplementedError):
        each(instruction, X)


def test_sums_of_tensor_cores_are_cut_off():
    sums = np.array([1 + 2.0**-24 + 2.0**-30, -1 - 2.0**-23 * 0.9, 3.0, 0.0])
    np.testing.assert_array_equal(cut_off(sums), np.array([1, -1, 3, 0], np.float32))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(cut_off(np.array([1e39, -1e39])), [np.inf, -np.inf])
