"""Launches of Triton kernels on CPU tensors: compiled as for a GPU, run by :mod:`tests.ptx.machine`.

::

    with emulated(90) as launches:
        launch.depthwise_forward(x, weight, bias, (1, 1), (3, 3), (1, 1))

Triton believes that there is a GPU: everything between ``kernel[grid](...)`` and the GPU's driver is Triton's own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from dwconv_kernels import runtime
from dwconv_kernels.devices import SHARED_KB
from tests.ptx.instructions import bound
from tests.ptx.machine import LANES, Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import Program, read

_edits = itertools.count()


class NotEmulated(RuntimeError):
    """A kernel has an instruction, or a form of one, that is not run here; the text says which."""


@contextlib.contextmanager
def emulated(arch: int = 90, edit: Callable[[str], str] | None = None) -> Iterator[list[str]]:
    """Kernels launched inside run here, on CPU tensors; the list is of their names, as they were launched.

    Args:
        edit: of the PTX of every kernel; to plant mistakes.
    """
    launches: list[str] = []
    compiled: dict[str, object] = {}
    # What Triton keeps its compiled kernels by.
    device = f"emulated, sm_{arch}" + ("" if edit is None else f", edit {next(_edits)}")

    def loading(module, function, name, metadata_group, key):
        path = next(Path(path) for file, path in metadata_group.items() if file.endswith(".ptx"))
        text = path.read_text()
        try:
            compiled["next"] = _program(text if edit is None else edit(text))
        except NotImplementedError as error:  # which launchers would take for one of the compiler
            raise NotEmulated(str(error)) from error

    def load_binary(name, binary, shared, device):
        return "module", compiled.pop("next"), 0, 0, 1024

    def launcher(source, metadata):  # Triton keeps it as long as the kernel
        return functools.partial(_launch, source, metadata)

    driver = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        launcher_cls=launcher,
        utils=SimpleNamespace(
            load_binary=load_binary,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_KB[arch] * 1024},
        ),
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch(f"{__name__}._launched", launches.append),
        mock.patch.object(triton.knobs.runtime, "kernel_load_start_hook", loading),
        mock.patch.object(runtime, "arch", return_value=arch),
        mock.patch.dict(runtime.launchers("depthwise").tensor._refusals, clear=True),
        mock.patch.object(runtime, "why_not_device", lambda family, x: runtime._why_not_loaded(family)),
        np.errstate(all="ignore"),
    ):
        yield launches


def _launched(name: str) -> None:
    raise RuntimeError("no kernel is emulated here")


@functools.lru_cache(64)
def _program(text: str) -> tuple[Program, list]:
    """A program, and what its instructions do."""
    program = read(text)
    return program, [[(one, bound(one)) for one in block] for block in program.blocks]


def _launch(source, metadata, x, y, z, stream, function, packed, extra, enter, leave, *arguments) -> None:
    program, blocks = function
    if (y, z) != (1, 1):
        raise NotImplementedError(f"a grid of {x} × {y} × {z}")
    _launched(program.name)
    given = [(v, kind) for v, kind in zip(arguments, source.signature.values(), strict=True) if kind != "constexpr"]
    memory = GlobalMemory([_extent(one) for one, _ in given if isinstance(one, torch.Tensor)])
    numbers = [_as_bits(*one) for one in given]
    numbers += [0] * (len(program.params) - len(numbers))  # scratch memory, which no kernel of ours has
    at_once = max(1, LANES // program.threads)
    # The last first: what depends on the order is wrong.
    for begin in reversed(range(0, x, at_once)):
        some = np.arange(begin, min(x, begin + at_once))
        try:
            Machine(program, some, x, numbers, memory, metadata.shared).run(blocks)
        except NotImplementedError as error:
            raise NotEmulated(str(error)) from error


def _as_bits(value: torch.Tensor | float, kind: str) -> int:
    """An argument, as the bits of a parameter of the program."""
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return int(np.float32(value).view(np.uint32))
    if kind not in ("i1", "i32", "i64", "u32", "u64"):
        raise NotImplementedError(f"a parameter of type {kind}")
    return int(value)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """From a tensor's first byte on, as far as its strides reach."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize
