"""The kernels as Triton compiles them for GPUs, run without one: exact on integers, within memory, without races."""

import re

import pytest
import torch

pytest.importorskip("triton")

import dwconv_kernels as dk
from dwconv_kernels import runtime
from tests import block_proofs, depthwise_proofs, norm_linear_proofs
from tests.block_cases import BlockCase, block_cases
from tests.cases import KernelCase, geometry_cases, kernel_cases
from tests.norm_linear_cases import NormLinearCase, norm_linear_cases
from tests.ptx.driver import emulated
from tests.ptx.memory import AccessError
from tests.tensor_cases import tensor_cases

pytestmark = pytest.mark.skipif(runtime.INTERPRETER, reason="TRITON_INTERPRET keeps kernels from being compiled")

PROOFS = {KernelCase: depthwise_proofs, NormLinearCase: norm_linear_proofs, BlockCase: block_proofs}
ON_TENSOR_CORES = KernelCase("bf16", 2, 40, 9, 12, 7, 7, 3, 3, cut="tensor whole")
LARGE = KernelCase("bf16", 1, 8, 17, 20, 31, 31, 15, 15, cut="tensor whole")
BLOCK = BlockCase("bf16", 1, 96, 5, 9, 384, 3, 3)

# (architecture, case): every family, with the matrix instructions of sm_90 and those that all others have.
EVERY_CHANGE = [
    (90, ON_TENSOR_CORES),
    (90, KernelCase("fp16", 1, 17, 14, 9, 13, 13, 6, 6, cut="tensor whole")),
    (90, LARGE),
    (90, KernelCase("fp32", 1, 33, 6, 10, 3, 3, 1, 1)),
    (90, BLOCK),
    (90, BLOCK._replace(dtype="fp16", arch=90, few=False)),
    (90, BLOCK._replace(arch=90, few=False, resident=True)),
    (90, NormLinearCase("bf16", (70,), 192, 72, "gelu")),
    (80, ON_TENSOR_CORES),
    (120, ON_TENSOR_CORES),
    (80, BLOCK._replace(arch=80, few=False, resident=True)),
]
FULL = [
    *((arch, case) for arch in (80, 90) for case in tensor_cases()),
    *((120, case) for case in tensor_cases() if "sm_90" not in case.cut),  # whose shared memory sm_120 does not have
    *((arch, case) for arch in (80, 90) for case in kernel_cases()[arch // 10 % 2 :: 4]),
    *((90, case) for case in geometry_cases()),
    # sm_100's products of matrices have instructions of their own, which are not run here.
    *((arch, case) for arch in (80, 90, 120) for case in norm_linear_cases()[arch // 10 % 2 :: 2]),
    *((arch, case) for arch in (80, 90, 120) for case in block_cases()[arch // 10 % 2 :: 2]),
]
CASES = [*EVERY_CHANGE, *(pytest.param(*one, marks=pytest.mark.full) for one in FULL)]


def name(value) -> str | None:
    return f"sm_{value}" if isinstance(value, int) else str(value)


@pytest.mark.parametrize("arch, case", CASES, ids=name)
def test_exact_on_integers(arch, case):
    with emulated(arch) as launches:
        PROOFS[type(case)].prove_exact(case)
    assert launches


ROUNDED = [
    KernelCase("bf16", 2, 40, 14, 14, 7, 7, 3, 3, cut="tensor whole"),
    KernelCase("fp16", 1, 16, 31, 33, 31, 31, 15, 15, cut="tensor whole"),
    KernelCase("fp16", 2, 33, 14, 14, 7, 7, 3, 3),
    KernelCase("fp32", 1, 40, 14, 14, 7, 7, 3, 3),
    NormLinearCase("fp16", (700,), 192, 96, None, mean=100.0),
    NormLinearCase("bf16", (700,), 96, 384, "gelu"),
    BlockCase("bf16", 2, 96, 14, 14, 384, 7, 7, arch=90, few=False, resident=True),
    BlockCase("fp16", 2, 192, 7, 7, 768, 7, 7, arch=90, few=False),
    BlockCase("fp16", 2, 96, 7, 7, 384, 7, 7),
]


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_rounding(case, arch):
    """With sums that are cut off, as those of tensor cores are."""
    with emulated(arch):
        more = (1.0,) if isinstance(case, KernelCase) else ()
        PROOFS[type(case)].prove_rounding(case, *more)


SUMS_OVER_THREADS = [  # of which a thread has one product
    NormLinearCase("fp16", (16,), 1, 64),
    NormLinearCase("bf16", (128,), 255, 33, "gelu"),
    pytest.param(BlockCase("fp32", 1, 96, 2, 8, 64, 1, 1, arch=80, few=False), marks=pytest.mark.full),
]


@pytest.mark.parametrize("case", SUMS_OVER_THREADS, ids=str)
def test_a_sum_has_the_same_bits_in_every_thread(case):
    """The machine refuses threads that write different values to one place, as then nobody knows which one stays."""
    proofs = PROOFS[type(case)]
    tensors, upstream = proofs.normal_operands(case)
    with emulated(80):
        proofs.on_kernels(case, tensors, upstream)
    with emulated(80, _fused), pytest.raises(AccessError, match="different values"):
        proofs.on_kernels(case, tensors, upstream)


def _fused(text: str) -> str:
    """With products whose rounding is not asked for, which a compiler fuses with the sums that they go to."""
    for product, a, b in re.findall(r"mul\.rn\.f32 (%r\d+), (%r\d+), (%r\d+);", text):
        text = re.sub(rf"add\.f32\s+(%r\d+), {product}, (%r\d+);", rf"fma.rn.f32 \1, {a}, {b}, \2;", text)
    return text


def test_what_runs_is_what_is_launched():
    """The kernels for tensor cores, of which the benchmarks' count of compiled variants has to know, too."""
    from benchmarks.probes import compiled_kernels

    with emulated(90) as launches:
        before = compiled_kernels()
        depthwise_proofs.prove_exact(ON_TENSOR_CORES._replace(kh=5, kw=7, ph=2))  # which no other test compiles
        after = compiled_kernels()
    fresh = {kernel for kernel, count in after.items() if count > before[kernel]}
    assert {"_depthwise_fwd_stream_kernel", "_depthwise_bwd_weight_stream_kernel"} <= fresh <= set(launches)
    assert launches[0] == "_depthwise_fragments_kernel"


def test_outside_there_is_no_gpu():
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3)
    with emulated():
        pass
    with dk.backend("triton"), pytest.raises(RuntimeError, match="x is on cpu"):
        dk.depthwise_conv2d(x, weight, padding=1)


# Mistakes, planted in what was compiled.


def dropped(pattern: str, kernel: str):
    """An edit that takes all instructions of a kernel away that match."""

    def edit(text: str) -> str:
        if f".entry {kernel}(" not in text:
            return text
        return _changed(rf"^\s*{pattern}[^;]*;", "", text)

    return edit


def swapped(pattern: str, kernel: str, which: int):
    """An edit that swaps two registers of the fragment ``which`` of every instruction that matches."""

    def turned(found: re.Match) -> str:
        fragments = re.findall(r"\{[^}]*\}", found[0])
        first, second, *rest = fragments[which].strip("{} ").split(",")
        return found[0].replace(fragments[which], "{" + ",".join([second, first, *rest]) + "}", 1)

    def edit(text: str) -> str:
        if f".entry {kernel}(" not in text:
            return text
        return _changed(rf"{pattern}[^;]*;", turned, text)

    return edit


def _changed(pattern: str, new, text: str) -> str:
    changed, count = re.subn(pattern, new, text, flags=re.MULTILINE)
    if count == 0:
        raise LookupError(f"nothing matches {pattern}")
    return changed


STREAM, GRADIENT, WINDOWS = (
    f"_depthwise_{what}_kernel" for what in ("fwd_stream", "bwd_weight_stream", "fwd_large")
)  # fmt: skip
MISTAKES = [
    (ON_TENSOR_CORES, dropped(r"bar\.sync", GRADIENT)),
    (ON_TENSOR_CORES, swapped(r"mma\.sync", STREAM, 2)),
    (ON_TENSOR_CORES, swapped(r"mma\.sync", GRADIENT, 1)),
    (ON_TENSOR_CORES, swapped(r"ldmatrix", GRADIENT, 0)),
    (LARGE, dropped(r"bar\.sync", WINDOWS)),
    (LARGE, dropped(r"cp\.async\.wait_group", WINDOWS)),
    (BLOCK, dropped(r"bar\.sync", "_block_out_kernel")),
    (BLOCK, dropped(r"cp\.async\.wait_group", "_norm_linear_bwd_x_kernel")),
    (BLOCK, dropped(r"wgmma\.wait_group", "_norm_linear_bwd_x_kernel")),
]


@pytest.mark.parametrize("case, edit", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_found(case, edit):
    found = r"racecheck|initcheck|wgmma|copied to|elements are wrong|is wrong"
    with emulated(90, edit), pytest.raises((AccessError, AssertionError), match=found):
        PROOFS[type(case)].prove_exact(case)
