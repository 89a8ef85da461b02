"""What launches would compile, found without a GPU: the package's own launchers are called, and stopped in time.

So nothing has to be written down twice: not which kernels an operator runs, not with which constants, and not what
Triton makes of arguments (which of them are multiples of 16).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from dwconv_kernels import runtime


class Launch(NamedTuple):
    """A kernel as Triton would compile it: its name, and what defines it beside its source."""

    kernel: str
    signature: dict[str, str]
    constants: dict
    attributes: dict
    options: dict


@contextlib.contextmanager
def captured(arch: int = 90) -> Iterator[list[Launch]]:
    """Kernels launched inside are neither compiled nor run; the list is of what would have been, for ``sm_<arch>``."""
    seen: list[Launch] = []

    def before_compiling(*, fn, compile, **rest):
        attributes = {where: found for where, found in compile["configs"][0].items() if found}
        options = json.loads(compile["specialization_data"])["options"]
        seen.append(Launch(fn.name, compile["signature"], dict(compile["constants"]), attributes, options))
        return True  # do not compile, do not launch

    # A GPU's driver as far as Triton asks before it compiles; the device is a key of caches that no real one has.
    driver = SimpleNamespace(
        get_current_device=lambda: f"none, sm_{arch}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", before_compiling),
        mock.patch.object(runtime, "arch", return_value=arch),
    ):
        yield seen
