"""Bank conflicts of Gluon kernels: every access of shared memory that a kernel makes, by Gluon's own checker. No GPU.

While a kernel's source is turned into intermediate code, each load, store and asynchronous copy between registers (or
memory) and shared memory is looked at. Gluon's checker, ``gl.bank_conflicts``, takes no parts of an allocation; an
access of a part is the same as one of the whole in which each thread has more registers, those of the other parts, so
that is what it is asked about. ldmatrix and stmatrix move rows of 16 bytes, as the loads and stores it knows do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._semantic import GluonSemantic
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from benchmarks import cubin
from benchmarks.products import Build, kernel_named
from dwconv_kernels.depthwise import kernels_gluon

# What copies are called: the first until Triton 3.8, the second since.
_COPIES = ("async_copy_global_to_shared", "async_load")


class Access(NamedTuple):
    """One access: "load", "store" or "copy"; its shape, that of what it is a part of, and how often it has to wait."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    of: tuple[int, ...]
    conflicts: int

    def __str__(self) -> str:
        shape, of = ("×".join(map(str, sizes)) for sizes in (self.shape, self.of))
        part = "" if self.shape == self.of else f" of {of}"
        return f"{self.kind} of {self.dtype} {shape}{part}: {self.conflicts} conflicts"


def _access(semantic: GluonSemantic, kind: str, memory, layout) -> Access:
    of = list(memory.type.alloc_shape[-len(memory.shape) :])
    linear = gl.constexpr(semantic.to_linear_layout(layout, memory.shape)).value
    registers = list(linear.reg_bases)
    for axis, (size, whole) in enumerate(zip(memory.shape, of, strict=True)):
        if whole & (whole - 1):
            raise ValueError(f"a part of an allocation of {of}: what is not a power of two has no linear layout")
        while size < whole:
            registers.append([size if a == axis else 0 for a in range(len(of))])
            size *= 2
    wide = gl.DistributedLinearLayout(registers, linear.lane_bases, linear.warp_bases, linear.block_bases, of)
    count = semantic.bank_conflicts(
        gl.distributed_type(memory.dtype, of, wide),
        gl.shared_memory_descriptor_type(memory.dtype, of, memory.type.layout, of),
    )
    return Access(kind, str(memory.dtype), tuple(memory.shape), tuple(of), count)


@contextlib.contextmanager
def noted() -> Iterator[list[Access]]:
    """The accesses of all Gluon kernels that are compiled inside, by this process and from nothing."""
    found: list[Access] = []
    load, store = GluonSemantic.shared_load, GluonSemantic.shared_store

    def loading(self, memory, layout):
        found.append(_access(self, "load", memory, layout))
        return load(self, memory, layout)

    def storing(self, memory, value):
        found.append(_access(self, "store", memory, value.type.layout))
        return store(self, memory, value)

    def copying(copy):
        @functools.wraps(copy)  # with what tells Triton that it is no function of a kernel
        def wrapped(memory, pointer, *args, _semantic=None, **kwargs):
            found.append(_access(_semantic, "copy", memory, pointer.type.layout))
            return copy(memory, pointer, *args, _semantic=_semantic, **kwargs)

        return wrapped

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(GluonSemantic, "shared_load", loading))
        patches.enter_context(mock.patch.object(GluonSemantic, "shared_store", storing))
        copies = [getattr(async_copy, name) for name in _COPIES if hasattr(async_copy, name)]
        for module in (async_copy, kernels_gluon):  # which may have a name of its own for it
            for name, value in list(vars(module).items()):
                if any(value is copy for copy in copies):
                    patches.enter_context(mock.patch.object(module, name, copying(value)))
        yield found


def of_build(build: Build, arch: int = 90) -> list[Access]:
    """The accesses of one kernel, which is not compiled any further than that takes."""
    one = build.launch
    source = cubin.of_language(kernel_named(one.kernel), one.signature, one.constants, one.attributes)
    return of_source(source, arch, build.warps)


def of_source(source: cubin.ASTSource, arch: int, warps: int) -> list[Access]:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": warps, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with noted() as found:
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        source.make_ir(target, options, functions, modules, context)
    return found
