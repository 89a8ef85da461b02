"""What the programs of one launch touched and what is wrong with it: bookkeeping for :mod:`tests.interpreter_guard`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SLOT_BITS = 44  # of a made-up address: the argument's number, then 44 bits around the middle of the argument's range


class GuardError(AssertionError):
    """A kernel did what it must not do."""


class OutOfBounds(GuardError):
    """It touched memory outside of the tensor that its pointer was made from."""


class Misaligned(GuardError):
    """It touched an address that is no multiple of the size of what is there."""


class IntegerOverflow(GuardError):
    """A result did not fit the integer type that it was computed in."""


class WriteConflict(GuardError):
    """Lanes of one store, or programs, stored to the same address."""


class ReadWriteRace(GuardError):
    """A program loaded from an address to which another program stores."""


class DeviceAssertion(GuardError):
    """A ``tl.device_assert`` was false."""


class AtomicOperation(GuardError):
    """It used an atomic operation."""


class Touched(NamedTuple):
    """What one program loaded from or stored to one argument: ``size`` bytes at each of the offsets."""

    program: int
    size: int
    offsets: np.ndarray
    bits: np.ndarray | None = None  # what was stored, as unsigned integers of that size

    def split(self, unit: int) -> Touched:
        if self.size == unit:
            return self
        offsets = (self.offsets[:, None] + np.arange(0, self.size, unit)).ravel()
        bits = None if self.bits is None else self.bits.view(f"u{unit}")
        return Touched(self.program, unit, offsets, bits)


class Argument:
    """A tensor argument of the running launch: where it is, what is in it, what was done to it.

    Args:
        number: its made-up addresses are those whose upper bits are this, from 1 on.
        name: the kernel's name for it.
        tensor: on the host.
    """

    def __init__(self, number: int, name: str, tensor):
        self.name = name
        self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
        self.itemsize = tensor.element_size()
        extent = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1
        self.span = extent * self.itemsize if tensor.numel() else 0
        self.real = tensor.data_ptr()
        # The low bits are the real ones, so that a kernel sees the real alignment.
        base = (number << SLOT_BITS) + (1 << SLOT_BITS - 1) + self.real % (1 << 20)
        self.base = np.uint64(base)
        self.to_real = np.uint64((self.real - base) % 2**64)
        # Dimensions from the outside in. Nested: a step in one is past all of the next; then an element has one index.
        self.dims = [d for d, size in enumerate(self.shape) if size > 1 and self.strides[d]]
        self.dims.sort(key=lambda d: -self.strides[d])
        inner, self.nested = 1, tensor.numel() > 0
        for d in reversed(self.dims):
            self.nested &= inner <= self.strides[d]
            inner += (self.shape[d] - 1) * self.strides[d]
        self.has_gaps = self.nested and extent > int(np.prod([self.shape[d] for d in self.dims]))
        # Of the running program, as it goes: (bytes per lane, offsets), (offsets, values). Of the programs before it.
        self.loads: list[tuple[int, np.ndarray]] = []
        self.stores: list[tuple[np.ndarray, np.ndarray]] = []
        self.reads: list[Touched] = []
        self.writes: list[Touched] = []

    def element(self, offset: int) -> str:
        """How messages call the element at an offset in bytes."""
        at = offset // self.itemsize
        if self.nested and 0 <= offset < self.span:
            index, there = self._indices(np.array([at]))
            if there[0]:
                return f"{self.name}[{', '.join(str(i[0]) for i in index)}]"
        return f"element {at} of {self.name}, which has shape {self.shape}, strides {self.strides}"

    def end_program(self, program: int, here: str) -> None:
        """Checks what can be checked later than at once, and keeps what the comparison of programs needs."""
        if self.loads:
            self._end_loads(program, here)
        if self.stores:
            self._end_stores(program, here)

    def _indices(self, elements: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Index in each dimension of elements counted from the first one in memory, and whether there are such."""
        index, there = [np.zeros_like(elements)] * len(self.shape), np.full(elements.shape, True)
        for d in self.dims:
            index[d], elements = np.divmod(elements, self.strides[d])
            there &= index[d] < self.shape[d]
        return index, there & (elements == 0)

    def _end_loads(self, program: int, here: str) -> None:
        for size in {size for size, _ in self.loads}:
            offsets = np.concatenate([offsets for each, offsets in self.loads if each == size])
            offsets = np.unique(offsets).astype(np.int64)
            self._check_places(f"{here}: load", offsets, size)
            self.reads.append(Touched(program, size, offsets))
        self.loads.clear()

    def _end_stores(self, program: int, here: str) -> None:
        """Keeps what is in each address at the program's end, after a look for lanes of one store that meet."""
        sizes = sorted({values.itemsize for _, values in self.stores})
        columns = []
        for size in sizes:
            some = [(i, o, v) for i, (o, v) in enumerate(self.stores) if v.itemsize == size]
            number = np.repeat([i for i, _, _ in some], [offsets.size for _, offsets, _ in some])
            offsets = np.concatenate([offsets for _, offsets, _ in some]).astype(np.int64)
            bits = np.concatenate([values.view(f"u{size}") for _, _, values in some])
            self._check_places(f"{here}: store", offsets, size)
            pieces = Touched(program, size, offsets, bits).split(sizes[0])
            columns.append((pieces.offsets, pieces.bits, np.repeat(number, size // sizes[0])))
        offsets, bits, number = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((number, offsets))
        offsets, bits, number = offsets[order], bits[order], number[order]
        again = offsets[1:] == offsets[:-1]
        lanes = again & (number[1:] == number[:-1])
        if lanes.any():
            raise WriteConflict(f"{here}: lanes of one store meet at {self.element(int(offsets[1:][lanes][0]))}")
        last = np.append(~again, True)
        self.writes.append(Touched(program, sizes[0], offsets[last], bits[last]))
        self.stores.clear()

    def _check_places(self, what: str, offsets: np.ndarray, size: int) -> None:
        crooked = (offsets + self.real) % size != 0
        if crooked.any():
            where = self.element(int(offsets[crooked][0]))
            raise Misaligned(f"{what} of {size} bytes at an address that is no multiple of {size}, {where}")
        if self.has_gaps:
            first, last = offsets // self.itemsize, (offsets + (size - 1)) // self.itemsize
            between = ~(self._indices(first)[1] & self._indices(last)[1])
            if between.any():
                where = self.element(int(offsets[between][0]))
                raise OutOfBounds(f"{what} between the elements of a view, at {where}")


def compare_programs(kernel: str, programs: list[tuple], arguments: Iterable[Argument], overlap: bool) -> None:
    """Raises WriteConflict or ReadWriteRace for what two programs of a launch must not both have done.

    Args:
        kernel, programs: for messages: its name, and the index in the grid of each program in the order they ran in.
        arguments: after ``end_program`` of the last program.
        overlap: may two programs store the same bits to the same address?
    """
    group: list[Argument] = []  # arguments that share memory are compared together
    end = 0
    for argument in sorted(arguments, key=lambda a: a.real):
        if argument.real >= end:
            _compare_group(kernel, programs, group, overlap)
            group = []
        group.append(argument)
        end = max(end, argument.real + argument.span)
    _compare_group(kernel, programs, group, overlap)


def _compare_group(kernel: str, programs: list[tuple], group: list[Argument], overlap: bool) -> None:
    if not any(argument.writes for argument in group):
        return
    unit = min(touched.size for argument in group for touched in (*argument.reads, *argument.writes))
    writes = [(a, t.split(unit)) for a in group for t in a.writes]
    addresses, writers = _columns(writes)
    bits = np.concatenate([t.bits for _, t in writes])
    order = np.lexsort((writers, addresses))
    addresses, writers, bits = addresses[order], writers[order], bits[order]
    clash = (addresses[1:] == addresses[:-1]) & (writers[1:] != writers[:-1])
    # The same bits from two programs are what neighbouring strips do on purpose: any order gives the same memory. They
    # are compared as bits, so that NaN is the same as itself and -0 is not the same as 0.
    if overlap:
        clash &= bits[1:] != bits[:-1]
    if clash.any():
        i = int(np.flatnonzero(clash)[0])
        raise WriteConflict(
            f"{kernel}: programs {programs[writers[i]]} and {programs[writers[i + 1]]} both store to "
            f"{_element_at(group, addresses[i])}, bits {int(bits[i]):#x} and {int(bits[i + 1]):#x}"
        )
    reads = [(a, t.split(unit)) for a in group for t in a.reads]
    if not reads:
        return
    addresses_read, readers = _columns(reads)
    first = np.searchsorted(addresses, addresses_read, "left")
    last = np.searchsorted(addresses, addresses_read, "right") - 1
    written = np.flatnonzero(first <= last)
    by_first, by_last = writers[first[written]], writers[last[written]]  # sorted: the two differ most
    race = (by_first != readers[written]) | (by_last != readers[written])
    if race.any():
        i = int(np.flatnonzero(race)[0])
        at = written[i]
        writer = by_first[i] if by_first[i] != readers[at] else by_last[i]
        raise ReadWriteRace(
            f"{kernel}: program {programs[readers[at]]} loads {_element_at(group, addresses_read[at])}, "
            f"to which program {programs[writer]} stores"
        )


def _columns(touched: list[tuple[Argument, Touched]]) -> tuple[np.ndarray, np.ndarray]:
    """Real addresses, and the program of each."""
    addresses = np.concatenate([t.offsets + a.real for a, t in touched])
    return addresses, np.repeat([t.program for _, t in touched], [t.offsets.size for _, t in touched])


def _element_at(group: list[Argument], address: int) -> str:
    argument = next(a for a in group if a.real <= address < a.real + a.span)
    return argument.element(int(address) - argument.real)
