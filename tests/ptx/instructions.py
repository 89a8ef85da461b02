"""What an instruction does to a machine. ``bound(instruction)`` is a function of the machine, None for what has left.

Loads, stores, copies into shared memory, and what threads of a warp say to each other are here; arithmetic and matrix
instructions have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx import matrices
from tests.ptx.arithmetic import OPERATIONS, PACKED, TYPES
from tests.ptx.machine import Machine
from tests.ptx.memory import UNSIGNED, AccessError
from tests.ptx.program import Instruction, leaves

Run = Callable[[Machine], None]


# What may stand between an instruction's name and its type; a rounding that is not named here would be done wrongly.
_KNOWN = {"rn", "ftz", "lo", "hi", "wide", "approx", "full", "NaN", "sat", "rna", "rni", "rzi", "uni"}


def bound(instruction: Instruction) -> Run | None:
    """Raises NotImplementedError where this instruction, or this form of it, is not known."""
    if leaves(instruction):
        return None
    name, parts = instruction.parts[0], instruction.parts[1:]
    try:
        return _computed(instruction, parts) if name in OPERATIONS else OTHERS[name](instruction, parts)
    except (KeyError, ValueError, StopIteration) as error:
        raise NotImplementedError(f"{instruction}: {type(error).__name__}: {error}") from None


def _computed(instruction: Instruction, parts: list[str]) -> Run:
    name = instruction.parts[0]
    dtype, kinds, compute = OPERATIONS[name](parts)
    target, *operands = instruction.operands
    strange = set(parts) - _KNOWN - set(TYPES) - set(PACKED) - ({parts[0]} if name == "setp" else {"tf32"})
    if strange or ("sat" in parts and name != "mul"):
        raise NotImplementedError(f"{instruction}: {', '.join(strange or ['sat'])}")
    if len(operands) != len(kinds) or not isinstance(target, str):
        raise NotImplementedError(str(instruction))
    kinds = [np.dtype(kind) for kind in kinds]

    def run(machine: Machine) -> None:
        values = [machine.get(operand, kind) for operand, kind in zip(operands, kinds, strict=True)]
        machine.put(target, np.asarray(compute(*values), dtype), machine.guarded(instruction))

    return run


def _moved(instruction: Instruction, parts: list[str]) -> Run:
    """mov, also of a register into several that are its parts, and back."""
    target, source = instruction.operands
    if isinstance(target, tuple):
        size = np.dtype(TYPES[parts[-1]]).itemsize // len(target)

        def split(machine: Machine) -> None:
            whole = machine.get(source, np.dtype(TYPES[parts[-1]]))
            pieces = np.ascontiguousarray(whole).view(UNSIGNED[size]).reshape(len(whole), -1)
            for at, name in enumerate(target):
                machine.put(name, np.ascontiguousarray(pieces[:, at]), machine.guarded(instruction))

        return split
    if isinstance(source, tuple):
        size = np.dtype(TYPES[parts[-1]]).itemsize // len(source)

        def joined(machine: Machine) -> None:
            pieces = np.stack([machine.get(name, np.dtype(UNSIGNED[size])) for name in source], 1)
            whole = np.ascontiguousarray(pieces).view(TYPES[parts[-1]])[:, 0]
            machine.put(target, whole, machine.guarded(instruction))

        return joined
    kind = np.dtype(TYPES[parts[-1]])
    return lambda machine: machine.put(target, machine.get(source, kind), machine.guarded(instruction))


# Memory.


def _lanes(machine: Machine, where: np.ndarray | None) -> np.ndarray:
    return machine.lanes if where is None else np.flatnonzero(where)


def address(machine: Machine, operand: tuple, lanes: np.ndarray, wide: bool) -> np.ndarray:
    """Of each of these lanes, bytes."""
    _, base, offset = operand
    kind = np.dtype(np.uint64 if wide else np.uint32)
    found = machine.get(base, kind)[lanes]
    return found + kind.type(offset % (1 << (8 * kind.itemsize)))


def _access(parts: list[str]) -> tuple[str, int, int]:
    """(space, how many numbers, bytes of each) of a load or store."""
    space = next((part for part in parts if part in ("global", "shared", "param")), None)
    count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    if space is None:
        raise NotImplementedError(f"memory of no space: {parts}")
    return space, count, np.dtype(TYPES[parts[-1]]).itemsize


def _loaded(instruction: Instruction, parts: list[str]) -> Run:
    space, count, size = _access(parts)
    kind = TYPES[parts[-1]]
    target, source = instruction.operands[:2]
    names = target if isinstance(target, tuple) else (target,)
    if len(names) != count or len(instruction.operands) > 2:
        raise NotImplementedError(str(instruction))
    if space == "param":
        return lambda machine: _put_into(machine, target, _argument(machine, source, size).view(kind), machine.lanes)

    def run(machine: Machine) -> None:
        where = machine.guarded(instruction)
        lanes = _lanes(machine, where)
        begin = address(machine, source, lanes, wide=space == "global")
        _aligned(begin, count * size)
        for at, name in enumerate(names):
            here = begin + begin.dtype.type(at * size)
            found = (
                machine.memory.load(machine.program_of(lanes), here, size)
                if space == "global"
                else machine.shared.load(lanes, here, size)
            )
            _put_into(machine, name, found.view(kind), lanes)

    return run


def _argument(machine: Machine, source: tuple, size: int) -> np.ndarray:
    value = machine.arguments[source[1]]
    return np.full(len(machine.lanes), value % (1 << (8 * size)), UNSIGNED[size])


def _aligned(begin: np.ndarray, size: int) -> None:
    if (begin % begin.dtype.type(size)).any():
        raise AccessError(f"an address is no multiple of the {size} bytes that are read or written there at once")


def _put_into(machine: Machine, name: str, values: np.ndarray, lanes: np.ndarray) -> None:
    """Writes a register of some lanes, with a number for each of them."""
    if name == "_":
        return
    kind = np.dtype(UNSIGNED[machine.program.width(name)])
    whole = machine.get(name, kind).copy()
    if values.itemsize < kind.itemsize and values.dtype.kind == "i":
        values = values.astype(f"i{kind.itemsize}")  # with its sign
    whole[lanes] = values.astype(kind)
    machine.put(name, whole, None)


def _stored(instruction: Instruction, parts: list[str]) -> Run:
    space, count, size = _access(parts)
    target, source = instruction.operands
    names = source if isinstance(source, tuple) else (source,)
    if len(names) != count:
        raise NotImplementedError(str(instruction))

    def run(machine: Machine) -> None:
        lanes = _lanes(machine, machine.guarded(instruction))
        begin = address(machine, target, lanes, wide=space == "global")
        _aligned(begin, count * size)
        for at, name in enumerate(names):
            values = machine.get(name, np.dtype(UNSIGNED[size]))[lanes]
            here = begin + begin.dtype.type(at * size)
            if space == "global":
                machine.memory.store(machine.program_of(lanes), here, values, size)
            else:
                machine.shared.store(lanes, here, values, size)

    return run


def _copied(instruction: Instruction, parts: list[str]) -> Run:
    """cp.async: done when it was waited for, not before; what is not read is zero."""
    if parts[1] == "commit_group":

        def commit(machine: Machine) -> None:
            machine.groups[_lanes(machine, machine.guarded(instruction))] += 1

        return commit
    if parts[1] == "wait_group":
        return lambda machine: _wait(machine, int(instruction.operands[0]), machine.guarded(instruction))
    if parts[1] not in ("ca", "cg") or "shared" not in parts or len(instruction.operands) not in (3, 4):
        raise NotImplementedError(str(instruction))
    target, source, size, *read = instruction.operands
    size = int(size, 0)

    def copy(machine: Machine) -> None:
        lanes = _lanes(machine, machine.guarded(instruction))
        to = address(machine, target, lanes, wide=False)
        of = address(machine, source, lanes, wide=True)
        _aligned(to, size)
        count = machine.get(read[0], np.dtype(np.uint32))[lanes] if read else np.full(len(lanes), size, np.uint32)
        if not np.isin(count, (0, size)).all():
            raise NotImplementedError(f"{instruction} reads a part")
        parts = np.zeros((len(lanes), size), np.uint8)
        some = count > 0
        for at in range(0, size, 4):
            word = machine.memory.load(machine.program_of(lanes[some]), of[some] + np.uint64(at), 4)
            parts[some, at : at + 4] = word.view(np.uint8).reshape(-1, 4)
        _aligned(of[some], size)
        machine.shared.begin_copy(lanes, to, size)
        machine.pending.append((lanes, to, parts, machine.groups[lanes]))

    return copy


def _wait(machine: Machine, but: int, where: np.ndarray | None) -> None:
    """Until all but the latest so many groups are there."""
    active = np.ones(len(machine.lanes), bool) if where is None else where
    left = []
    for lanes, to, parts, group in machine.pending:
        there = active[lanes] & (group < machine.groups[lanes] - but)
        if there.any():
            machine.shared.end_copy(lanes[there], to[there], parts[there])
        if not there.all():
            left.append((lanes[~there], to[~there], parts[~there], group[~there]))
    machine.pending = left


# Between threads of a warp.


def _shuffled(instruction: Instruction, parts: list[str]) -> Run:
    how = parts[1]
    target, source, by, clamp, members = instruction.operands
    if parts[0] != "sync" or how not in ("bfly", "idx") or int(clamp, 0) != 31:
        raise NotImplementedError(str(instruction))

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        _all_meant(machine, members, where)
        lane = machine.lanes % 32
        step = machine.get(by, np.dtype(np.uint32)).astype(np.int64) % 32
        other = lane ^ step if how == "bfly" else step
        values = machine.get(source, np.dtype(np.uint32))
        machine.put(target, values[machine.lanes - lane + other], where)

    return run


def _all_meant(machine: Machine, members: str, where: np.ndarray | None) -> None:
    if (machine.get(members, np.dtype(np.uint32))[_lanes(machine, where)] != 0xFFFFFFFF).any():
        raise NotImplementedError("some threads of a warp are meant")


def _reduced(instruction: Instruction, parts: list[str]) -> Run:
    target, source, members = instruction.operands
    if parts[:2] != ["sync", "add"]:
        raise NotImplementedError(str(instruction))

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        _all_meant(machine, members, where)
        values = machine.get(source, np.dtype(np.uint32)).reshape(-1, 32)
        machine.put(target, np.repeat(values.sum(1, dtype=np.uint32), 32), where)

    return run


def _met(instruction: Instruction, parts: list[str]) -> Run:
    """bar.warp.sync: threads of a warp are together all the time."""
    return lambda machine: None


def _hinted(instruction: Instruction, parts: list[str]) -> Run:
    """prefetch: of any address, it changes nothing."""
    return lambda machine: None


def _cast(instruction: Instruction, parts: list[str]) -> Run:
    """cvta: a shared array's address is where it is."""
    if "to" not in parts or parts[-1] != "u64":
        raise NotImplementedError(str(instruction))
    return _moved(instruction, ["u64"])


OTHERS: dict[str, Callable[[Instruction, list[str]], Run]] = {
    "mov": _moved, "ld": _loaded, "st": _stored, "cp": _copied, "shfl": _shuffled, "redux": _reduced, "cvta": _cast,
    "ldmatrix": matrices.loaded, "stmatrix": matrices.stored, "mma": matrices.multiplied, "wgmma": matrices.of_group,
    "fence": matrices.fence, "prefetch": _hinted, "bar": _met,
}  # fmt: skip
