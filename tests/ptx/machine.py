"""Runs a program's instructions, for many programs of a launch at once: a register is an array, a number per thread.

Threads go their own ways: each has the block of instructions that it is to run next. The first block that anybody waits
for is run by all who wait for it, so that those who took different ways meet again where these join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from tests.ptx.memory import UNSIGNED, AccessError, GlobalMemory, SharedMemory
from tests.ptx.program import Instruction, Program, leaves

LANES = 8192  # threads at once, at most, of as many programs as that is
_DTYPES = {1: np.bool_, **{size: UNSIGNED[size] for size in (2, 4, 8)}}
Run = Callable[["Machine"], None]


class Machine:
    """Some programs of a launch: their registers, memory, and where each of their threads is.

    Attributes:
        registers: by name; a register that nothing was written to is 0.
        active: which threads run the block at hand, None where all do.
        pending: copies into shared memory that were begun and not waited for.
    """

    def __init__(self, program: Program, programs: np.ndarray, count: int, arguments: list[int], memory: GlobalMemory,
                 shared: int):  # fmt: skip
        self.program, self.memory = program, memory
        self.threads = program.threads
        self.lanes = np.arange(len(programs) * self.threads)
        self.shared = SharedMemory(len(programs), shared, self.threads)
        self.arguments = dict(zip(program.params, arguments, strict=True))
        self.registers: dict[str, np.ndarray] = {}
        self.active: np.ndarray | None = None
        self.groups = np.zeros(len(self.lanes), np.int64)  # of copies, that each thread has committed
        self.pending: list = []
        self.reads: list = []  # of shared memory by wgmma, which go on until they are waited for
        self.product_groups = np.zeros(len(self.lanes), np.int64)  # of wgmma
        self.accumulating: dict[str, np.ndarray] = {}  # registers of wgmma: the group after which they can be used
        thread = self.lanes % self.threads
        self.special = {
            "%tid.x": thread.astype(np.uint32),
            "%laneid": (thread % 32).astype(np.uint32),
            "%ctaid.x": np.repeat(programs, self.threads).astype(np.uint32),
            "%ntid.x": np.full(len(self.lanes), self.threads, np.uint32),
            "%nctaid.x": np.full(len(self.lanes), count, np.uint32),
            **{f"%{what}.{axis}": np.zeros(len(self.lanes), np.uint32) for what in ("tid", "ctaid") for axis in "yz"},
            **{f"%{what}.{axis}": np.ones(len(self.lanes), np.uint32) for what in ("ntid", "nctaid") for axis in "yz"},
        }

    # Operands.

    def get(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """An operand as numbers of a dtype: of a register, one per thread; else one for all."""
        if operand in self.registers:
            found = self.registers[operand]
            if found.dtype == dtype:
                return found
            # Of a register that is wider than what is read, the low part.
            return found.view(dtype)[:: found.itemsize // np.dtype(dtype).itemsize]
        if operand in self.special:
            return self.special[operand].view(dtype)
        if operand in self.program.shared:
            return np.full(len(self.lanes), self.program.shared[operand], dtype)
        if operand.startswith("%") or operand in self.program.widths:
            width = self.program.width(operand)
            self.registers[operand] = np.zeros(len(self.lanes), _DTYPES[width])
            return self.registers[operand].view(dtype)
        return np.full(len(self.lanes), immediate(operand, np.dtype(dtype)))

    def put(self, name: str, values: np.ndarray, where: np.ndarray | None) -> None:
        """Writes a register, in the threads ``where``; None is all."""
        if name == "_":
            return
        dtype = _DTYPES[self.program.width(name)]
        values = values if values.dtype == dtype else np.ascontiguousarray(values).view(dtype)
        if where is not None:
            before = self.registers.get(name)
            values = np.where(where, values, np.zeros(1, dtype) if before is None else before)
        self.registers[name] = values

    def program_of(self, lanes: np.ndarray) -> np.ndarray:
        """The numbers of their programs in the launch."""
        return self.special["%ctaid.x"][lanes].astype(np.int32)

    def everybody(self) -> np.ndarray:
        return np.ones(len(self.lanes), bool)

    def guarded(self, instruction: Instruction) -> np.ndarray | None:
        """The threads that run an instruction; None where all do."""
        if instruction.guard is None:
            return self.active
        guard = self.get(instruction.guard, np.dtype(bool))
        guard = ~guard if instruction.negated else guard
        return guard if self.active is None else guard & self.active

    def warps_of(self, instruction: Instruction) -> np.ndarray | None:
        """As ``guarded``, of an instruction that a warp runs together.

        Raises:
            AccessError: some threads of a warp are not there.
        """
        where = self.guarded(instruction)
        if where is not None and np.any(where.reshape(-1, 32).any(1) != where.reshape(-1, 32).all(1)):
            raise AccessError("some threads of a warp are not there")
        return where

    # Running.

    def run(self, blocks: list[list[tuple[Instruction, Run | None]]]) -> None:
        """From the first block on, until every thread has returned."""
        place = np.zeros(len(self.lanes), np.int64)
        waiting, gone = np.zeros(len(self.lanes), bool), np.zeros(len(self.lanes), bool)
        while True:
            ready = ~(waiting | gone)
            if not ready.any():
                if not waiting.any():
                    return
                self._pass_barrier(waiting, gone)
                waiting[:] = False
                continue
            at = int(place[ready].min())
            mask = ready & (place == at)
            self.active = None if mask.all() else mask
            block = blocks[at]
            for instruction, run in block:
                if run is not None:
                    try:
                        self._look_after(instruction)
                        run(self)
                    except Exception as error:
                        error.add_note(f"{self.program.name}: {instruction}")
                        raise
            self._leave(block[-1][0] if block else None, at, mask, place, waiting, gone)

    def _look_after(self, instruction: Instruction) -> None:
        """Registers that wgmma works on are its own until it was waited for."""
        if not self.accumulating or instruction.parts[0] == "wgmma":
            return
        here = self.everybody() if self.active is None else self.active
        for name in _names(instruction):
            group = self.accumulating.get(name)
            if group is not None and (group[here] >= 0).any():
                raise AccessError(f"{name} is used while wgmma works on it")

    def _leave(self, last: Instruction | None, at: int, mask, place, waiting, gone) -> None:
        place[mask] = at + 1
        match None if last is None or not leaves(last) else last.parts[0]:
            case "bra":
                taken = self.guarded(last)
                place[mask if taken is None else taken & mask] = self.program.labels[last.operands[0]]
            case "ret" | "exit":
                taken = self.guarded(last)
                gone[mask if taken is None else taken & mask] = True
                left = [group[gone] for group in self.accumulating.values()]
                if any((group >= 0).any() for group in left):
                    raise AccessError(f"{self.program.name}: it ends while wgmma works")
            case "bar" | "barrier":
                if last.guard is not None or "sync" not in last.parts or "cluster" in last.parts:
                    raise NotImplementedError(f"a barrier of some threads: {last}")
                if last.operands not in (("0",), ("0", str(self.threads))):
                    raise NotImplementedError(f"a barrier of some threads: {last}")
                waiting[mask] = True

    def _pass_barrier(self, waiting: np.ndarray, gone: np.ndarray) -> None:
        """All threads of a program wait, or none does: then it has returned."""
        by_program = waiting.reshape(-1, self.threads)
        there = by_program.any(1)
        if (there & ~by_program.all(1)).any():
            raise AccessError(f"{self.program.name}: some threads wait at a barrier, others have returned")
        self.shared.epoch[there] += 1


def _names(instruction: Instruction) -> Iterator[str]:
    """Of all registers, and whatever else is in the operands."""
    for operand in instruction.operands:
        yield from map(str, operand) if isinstance(operand, tuple) else (operand,)


@functools.cache
def immediate(text: str, dtype: np.dtype):
    """A number as PTX writes it."""
    if text.startswith(("0f", "0F")):
        return np.array(int(text[2:], 16), np.uint32).view(np.float32).astype(np.float32).view(dtype)[()]
    if text.startswith(("0d", "0D")):
        return np.array(int(text[2:], 16), np.uint64).view(dtype)[()]
    if text in ("true", "false"):
        return np.bool_(text == "true")
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.bool_(value != 0)
    size = dtype.itemsize
    return np.array(value % (1 << (8 * size)), UNSIGNED[size]).view(dtype)[()]
