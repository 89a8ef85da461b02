"""Matrix instructions: which thread holds which element is in PTX's tables of ``mma``, ``ldmatrix`` and ``wgmma``.

Products and the sum so far are added up exactly and cut off to fp32, as tensor cores do (which add up with few bits
more than fp32 has, and do not round to nearest).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.arithmetic import from_bf16
from tests.ptx.machine import Machine
from tests.ptx.memory import AccessError
from tests.ptx.program import Instruction

Run = Callable[[Machine], None]
_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def cut_off(sums: np.ndarray) -> np.ndarray:
    """fp64 → fp32, toward zero."""
    nearest = sums.astype(np.float32)
    beyond = (np.abs(nearest) > np.abs(sums)) & np.isfinite(nearest)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


# Between shared memory and registers: 8×8 matrices of 16 bits, each of whose rows has the address that a thread gives.


def _rows(machine: Machine, operand: tuple, count: int, where: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(lanes, addresses), a row for each warp that is there and column for each of 8·count rows of matrices."""
    warps = np.arange(len(machine.lanes) // 32) if where is None else np.flatnonzero(where.reshape(-1, 32).any(1))
    _, base, offset = operand
    addresses = machine.get(base, np.dtype(np.uint32)).reshape(-1, 32)[warps, : 8 * count] + np.uint32(offset)
    if (addresses % 16).any():
        raise AccessError("a row of a matrix is at no multiple of 16 bytes")
    return warps[:, None] * 32 + np.arange(8 * count), addresses


def _matrices(parts: list[str], instruction: Instruction) -> tuple[int, bool]:
    if "m8n8" not in parts or parts[-1] != "b16":
        raise NotImplementedError(str(instruction))
    return next(int(part[1:]) for part in parts if part in ("x1", "x2", "x4")), "trans" in parts


def loaded(instruction: Instruction, parts: list[str]) -> Run:
    """ldmatrix"""
    count, turned = _matrices(parts, instruction)
    targets, source = instruction.operands
    names = targets if isinstance(targets, tuple) else (targets,)

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        lanes, addresses = _rows(machine, source, count, where)
        columns = 2 * np.arange(8, dtype=np.uint32)
        every = (addresses[..., None] + columns).reshape(-1)
        values = machine.shared.load(np.repeat(lanes.reshape(-1), 8), every, 2).reshape(-1, count, 8, 8)
        if turned:
            values = values.swapaxes(2, 3)
        pairs = np.ascontiguousarray(values).view(np.uint32)  # (warps, count, 8 rows, 4 pairs)
        warps = lanes[:, 0] // 32
        for at, name in enumerate(names):
            whole = machine.get(name, np.dtype(np.uint32)).reshape(-1, 32).copy()
            whole[warps] = pairs[:, at].reshape(-1, 32)
            machine.put(name, whole.reshape(-1), None)

    return run


def stored(instruction: Instruction, parts: list[str]) -> Run:
    """stmatrix"""
    count, turned = _matrices(parts, instruction)
    target, sources = instruction.operands
    names = sources if isinstance(sources, tuple) else (sources,)

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        lanes, addresses = _rows(machine, target, count, where)
        warps = lanes[:, 0] // 32
        pairs = np.stack([machine.get(name, np.dtype(np.uint32)).reshape(-1, 32)[warps] for name in names], 1)
        values = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if turned:
            values = values.swapaxes(2, 3)
        every = (addresses[..., None] + 2 * np.arange(8, dtype=np.uint32)).reshape(-1)
        machine.shared.store(np.repeat(lanes.reshape(-1), 8), every, values.reshape(-1), 2)

    return run


# Products of a warp.

_FROM = {"bf16": from_bf16, "f16": lambda bits: bits.view(np.float16)}


def _operands(machine: Machine, names: tuple[str, ...]) -> np.ndarray:
    """(warps, registers, 32)"""
    return np.stack([machine.get(name, np.dtype(np.uint32)).reshape(-1, 32) for name in names], 1)


def _elements(words: np.ndarray, kind: str) -> np.ndarray:
    """Elements of registers, in fp64: (warps, registers, 32, elements of a register)."""
    if kind == "tf32":
        return np.ascontiguousarray(words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return _FROM[kind](halves).astype(np.float64)


def first_of(words: np.ndarray, kind: str) -> np.ndarray:
    """The first factor, (warps, 16, K), of four registers."""
    elements = _elements(words, kind)
    wide = elements.shape[-1]  # elements of a register lie side by side
    half = 4 * wide
    found = np.zeros((len(words), 16, 2 * half))
    for register in range(4):
        for at in range(wide):
            row = _GROUP + 8 * (register % 2)
            found[:, row, wide * _IN_GROUP + at + half * (register // 2)] = elements[:, register, :, at]
    return found


def second_of(words: np.ndarray, kind: str) -> np.ndarray:
    """The second factor, (warps, K, 8), of two registers."""
    elements = _elements(words, kind)
    wide = elements.shape[-1]
    found = np.zeros((len(words), 8 * wide, 8))
    for register in range(2):
        for at in range(wide):
            found[:, wide * _IN_GROUP + at + 4 * wide * register, _GROUP] = elements[:, register, :, at]
    return found


def multiplied(instruction: Instruction, parts: list[str]) -> Run:
    """mma.sync of 16 × K by K × 8"""
    kind = parts[-2]
    shape = next(part for part in parts if part.startswith("m16n8"))
    if parts[-1] != "f32" or (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")):
        raise NotImplementedError(str(instruction))
    targets, first, second, sums = instruction.operands

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        products = first_of(_operands(machine, first), kind) @ second_of(_operands(machine, second), kind)
        for register, (name, before) in enumerate(zip(targets, sums, strict=True)):
            row, column = _GROUP + 8 * (register // 2), 2 * _IN_GROUP + register % 2
            added = machine.get(before, np.dtype(np.float32)).astype(np.float64)
            machine.put(name, cut_off(products[:, row, column].reshape(-1) + added), where)

    return run


# Products of four warps, whose factors lie in shared memory.

_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # bytes of a row; of the row's number, which bits turn it


def _in_shared(machine: Machine, descriptor: int, rows: int, turned: bool) -> np.ndarray:
    """Addresses of a factor's elements, (rows, 16): of A its rows, of B its columns."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    pitch, bits = _SWIZZLES[descriptor >> 62 & 3]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if turned:  # a row of memory holds one k
        wide = pitch // 2
        found = row // wide * leading + k // 8 * stride + k % 8 * pitch + row % wide * 2
    elif pitch == 16:
        found = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    else:
        found = row // 8 * stride + row % 8 * pitch + k * 2
    found = found + start
    return found ^ ((found >> 7 & bits) << 4)


def _read_factor(machine: Machine, descriptors: np.ndarray, groups: np.ndarray, rows: int, turned: bool, kind: str):
    """(groups, rows, 16) of fp64."""
    addresses = np.stack([_in_shared(machine, int(descriptors[32 * 4 * g]), rows, turned) for g in groups])
    # Which warp reads is not said; the group's first stands for all four.
    lanes = np.repeat(groups * 128, rows * 16)
    flat = machine.shared._flat(lanes, addresses.reshape(-1).astype(np.uint32), 2)
    halves = flat // 2
    machine.shared.note_read(halves, lanes, by_tensor_cores=True)
    np.add.at(machine.shared.in_use, halves, 1)
    machine.reads.append((halves, lanes, machine.product_groups[lanes]))
    bits = machine.shared.bytes.view(np.uint16)[halves].reshape(len(groups), rows, 16)
    return _FROM[kind](bits).astype(np.float64)


def of_group(instruction: Instruction, parts: list[str]) -> Run | None:
    """wgmma"""
    if parts[0] == "fence":
        return None  # of registers; LLVM moves some of them behind it, which ptxas puts right
    if parts[0] == "commit_group":
        return _commit
    if parts[0] == "wait_group":
        return lambda machine: _wait(machine, int(instruction.operands[0]))
    if parts[0] != "mma_async" or parts[-1] not in _FROM or parts[-3] != "f32":
        raise NotImplementedError(str(instruction))
    kind = parts[-1]
    columns = int(next(part for part in parts if part.startswith("m64n")).removeprefix("m64n").split("k")[0])
    targets, first, second, keep, *settings = instruction.operands
    in_registers = isinstance(first, tuple)
    if [int(one) for one in settings[:2]] != [1, 1] or len(targets) != columns // 2:
        raise NotImplementedError(str(instruction))
    turned_first, turned_second = (False, *settings[2:]) if in_registers else settings[2:]

    def run(machine: Machine) -> None:
        where = machine.warps_of(instruction)
        every = len(machine.lanes) // 128
        groups = np.arange(every) if where is None else np.flatnonzero(where.reshape(-1, 128).all(1))
        if where is not None and where.reshape(-1, 128).any(1).sum() != len(groups):
            raise AccessError("some of the four warps are not there")
        if in_registers:
            a = first_of(_operands(machine, first), kind).reshape(every, 64, 16)[groups]
        else:
            a = _read_factor(machine, machine.get(first, np.dtype(np.uint64)), groups, 64, _flag(turned_first), kind)
        descriptors = machine.get(second, np.dtype(np.uint64))
        b = _read_factor(machine, descriptors, groups, columns, _flag(turned_second), kind)
        products = np.zeros((every, 64, columns))
        products[groups] = a @ b.swapaxes(1, 2)
        products = products.reshape(-1, 16, columns)  # of each warp
        keeping = machine.get(keep, np.dtype(bool))
        for register, name in enumerate(targets):
            row, column = _GROUP + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * _IN_GROUP + register % 2
            before = machine.get(name, np.dtype(np.float32)).astype(np.float64)
            result = products[:, row, column].reshape(-1) + np.where(keeping, before, 0)
            machine.put(name, cut_off(result), where)
        here = machine.everybody() if where is None else where
        for name in (*targets, *(first if in_registers else ())):
            before = machine.accumulating.get(name, np.full(len(here), -1))
            machine.accumulating[name] = np.where(here, machine.product_groups, before)

    return run


def _flag(text: str | bool) -> bool:
    return bool(int(text))


def _commit(machine: Machine) -> None:
    machine.product_groups[machine.everybody() if machine.active is None else machine.active] += 1


def _wait(machine: Machine, but: int) -> None:
    """All but the latest so many groups may have read until now, and no longer."""
    active, left = machine.everybody() if machine.active is None else machine.active, []
    for halves, lanes, group in machine.reads:
        here = active[lanes]
        machine.shared.note_read(halves[here], lanes[here], by_tensor_cores=True)
        going_on = ~here | (group >= machine.product_groups[lanes] - but)
        np.add.at(machine.shared.in_use, halves[~going_on], -1)
        if going_on.any():
            left.append((halves[going_on], lanes[going_on], group[going_on]))
    machine.reads = left
    for name, group in list(machine.accumulating.items()):
        still = np.where(active & (group < machine.product_groups - but), -1, group)
        machine.accumulating[name] = still
        if (still < 0).all():
            del machine.accumulating[name]


def fence(instruction: Instruction, parts: list[str]) -> Run:
    if parts[0] != "proxy" or "async" not in parts:
        raise NotImplementedError(str(instruction))

    def run(machine: Machine) -> None:
        machine.shared.generic[:] = False

    return run
