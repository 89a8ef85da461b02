"""Memory of a launch: which accesses are allowed, and what is there.

What compute-sanitizer's tools look for, is looked for here: accesses beside a tensor, or not aligned (memcheck); reads
of shared memory that nobody wrote (initcheck); accesses of several warps without a barrier in between (racecheck).
"""

from __future__ import annotations

import ctypes

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
HALF = 2  # bytes: what is looked after one by one in shared memory; no kernel of ours reads or writes single bytes
NOBODY, SEVERAL = -1, -2


class AccessError(Exception):
    """What a launch must not do; the text says which instruction did it and where."""


class GlobalMemory:
    """The tensors that a launch was given, at their own addresses. ``extents``: (first address, bytes) of each."""

    def __init__(self, extents: list[tuple[int, int]]):
        merged: list[list[int]] = []
        for begin, size in sorted(extents):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], begin + size)
            elif size:
                merged.append([begin, begin + size])
        self.ranges = [(begin, end, self._bytes(begin, end - begin)) for begin, end in merged]
        # By which program of the launch each byte was written or read: two of them know nothing of each other's order.
        self.writers, self.readers = (
            {begin: np.full(end - begin, NOBODY, np.int32) for begin, end, _ in self.ranges} for _ in range(2)
        )

    @staticmethod
    def _bytes(begin: int, size: int) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))

    def _places(self, addresses: np.ndarray, size: int):
        """(which of the addresses, bytes, where each is in them, writers, readers), tensor by tensor."""
        if (addresses % np.uint64(size)).any():
            raise AccessError(f"an address is no multiple of {size}")
        left = len(addresses)
        for begin, end, memory in self.ranges:
            inside = (addresses >= np.uint64(begin)) & (addresses < np.uint64(end))
            count = np.count_nonzero(inside)
            if count == 0:
                continue
            left -= count
            where = addresses[inside].astype(np.int64) - begin
            if (where + size > end - begin).any():
                raise AccessError("an access begins in a tensor and ends behind it")
            yield inside, memory, where, self.writers[begin], self.readers[begin]
        if left:
            known = [begin for begin, _, _ in self.ranges]
            bad = next(a for a in addresses.tolist() if not any(b <= a < e for b, e, _ in self.ranges))
            nearest = min(known, key=lambda begin: abs(begin - bad), default=0)
            raise AccessError(f"address {bad - nearest:+} bytes from a tensor of {self._size(nearest)} bytes")

    def _size(self, begin: int) -> int:
        return next((end - first for first, end, _ in self.ranges if first == begin), 0)

    def load(self, programs: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        values = np.zeros(len(addresses), UNSIGNED[size])
        for inside, memory, where, writers, readers in self._places(addresses, size):
            places, program = where[:, None] + np.arange(size), programs[inside, None]
            if ((writers[places] != NOBODY) & (writers[places] != program)).any():
                raise AccessError("a program reads what another one of the same launch writes")
            others = (readers[places] != NOBODY) & (readers[places] != program)
            readers[places] = np.where(others, SEVERAL, program)
            readers[places[readers[places] != program]] = SEVERAL
            parts = memory[places]
            values[inside] = np.ascontiguousarray(parts).view(UNSIGNED[size])[:, 0]
        return values

    def store(self, programs: np.ndarray, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        for inside, memory, where, writers, readers in self._places(addresses, size):
            parts = np.ascontiguousarray(values[inside], UNSIGNED[size]).view(np.uint8).reshape(-1, size)
            places, program = where[:, None] + np.arange(size), programs[inside, None]
            if ((readers[places] != NOBODY) & (readers[places] != program)).any():
                raise AccessError("a program writes what another one of the same launch reads")
            again = (writers[places] != NOBODY) & (writers[places] != program)
            before = memory[places]
            memory[places] = parts
            writers[places] = program
            if (again & (before != parts)).any() or (memory[places] != parts).any():
                raise AccessError("a launch writes different values to the same place of a tensor")


class SharedMemory:
    """Of ``programs`` programs, ``size`` bytes each. Accesses name the lanes that make them, for what is checked."""

    def __init__(self, programs: int, size: int, threads: int):
        self.size = -(-size // 16) * 16
        self.allowed = size
        self.threads = threads
        self.bytes = np.full(programs * self.size, 0xFF, np.uint8)  # NaN, whatever the dtype
        count = programs * self.size // HALF
        self.epoch = np.zeros(programs, np.int64)  # barriers that a program has passed
        self.written, self.writer = np.full(count, -1, np.int64), np.full(count, NOBODY, np.int32)
        self.read, self.reader = np.full(count, -1, np.int64), np.full(count, NOBODY, np.int32)
        self.coming = np.zeros(count, bool)  # copied to, and not waited for
        self.in_use = np.zeros(count, np.int32)  # of wgmma, that nobody has waited for: how many times
        self.generic = np.zeros(count, bool)  # written by stores, not copies: wgmma needs a fence to see that

    def _flat(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.astype(np.int64)
        if (addresses + size > self.allowed).any():
            raise AccessError(f"shared memory at {addresses.max()}, of {self.allowed} bytes")
        if (addresses % size).any():
            raise AccessError(f"shared memory at no multiple of {size}")
        return lanes // self.threads * self.size + addresses

    def _halves(self, flat: np.ndarray, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(1, size // HALF)
        halves = (flat // HALF)[:, None] + np.arange(count)
        return halves.ravel(), np.repeat(lanes, count)

    def note_read(self, halves: np.ndarray, lanes: np.ndarray, by_tensor_cores: bool = False) -> None:
        epoch, warp = self.epoch[lanes // self.threads], (lanes // 32).astype(np.int32)
        if (self.written[halves] < 0).any():
            raise AccessError(f"initcheck: shared memory is read at {self._at(halves, self.written[halves] < 0)}, "
                              "where nobody wrote")  # fmt: skip
        if self.coming[halves].any():
            raise AccessError(f"shared memory at {self._at(halves, self.coming[halves])} is read while it is copied to")
        bad = (self.written[halves] == epoch) & (self.writer[halves] != warp)
        if bad.any():
            raise AccessError(f"racecheck: shared memory at {self._at(halves, bad)} is read by a warp and was written "
                              "by another, with no barrier in between")  # fmt: skip
        if by_tensor_cores and self.generic[halves].any():
            raise AccessError("shared memory was stored to, and is read by wgmma without a fence in between")
        others = (self.read[halves] == epoch) & (self.reader[halves] != warp)
        self.read[halves] = epoch
        self.reader[halves] = np.where(others, SEVERAL, warp)
        mixed = self.reader[halves] != warp
        self.reader[halves[mixed]] = SEVERAL

    def note_write(self, halves: np.ndarray, lanes: np.ndarray, generic: bool = True) -> None:
        epoch, warp = self.epoch[lanes // self.threads], (lanes // 32).astype(np.int32)
        bad = (self.written[halves] == epoch) & (self.writer[halves] != warp)
        bad |= (self.read[halves] == epoch) & (self.reader[halves] != warp)
        taken = self.coming[halves] | (self.in_use[halves] > 0)
        if taken.any():
            raise AccessError(f"shared memory at {self._at(halves, taken)} is written while it is copied to, or while "
                              "wgmma reads it")  # fmt: skip
        self.written[halves], self.writer[halves], self.generic[halves] = epoch, warp, generic
        self.writer[halves[self.writer[halves] != warp]] = SEVERAL  # who all have to write the same
        if bad.any():
            raise AccessError(f"racecheck: shared memory at {self._at(halves, bad)} is written by a warp and was read "
                              "or written by another, with no barrier in between")  # fmt: skip

    def _at(self, halves: np.ndarray, bad: np.ndarray) -> int:
        return int(halves[bad][0] * HALF % self.size)

    def load(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        flat = self._flat(lanes, addresses, size)
        self.note_read(*self._halves(flat, lanes, size))
        return self.bytes.view(UNSIGNED[size])[flat // size]

    def store(self, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
        flat = self._flat(lanes, addresses, size)
        self.note_write(*self._halves(flat, lanes, size))
        memory = self.bytes.view(UNSIGNED[size])
        memory[flat // size] = values
        if (memory[flat // size] != values).any():
            raise AccessError("racecheck: threads write different values to the same place")

    def begin_copy(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """From here on, until the copy has been waited for, nobody else may touch these bytes."""
        flat = self._flat(lanes, addresses, size)
        halves, of_lanes = self._halves(flat, lanes, size)
        self.note_write(halves, of_lanes, generic=False)
        self.coming[halves] = True
        self.bytes.reshape(-1, size)[flat // size] = 0xFF

    def end_copy(self, lanes: np.ndarray, addresses: np.ndarray, parts: np.ndarray) -> None:
        size = parts.shape[1]
        flat = self._flat(lanes, addresses, size)
        halves, of_lanes = self._halves(flat, lanes, size)
        self.coming[halves] = False
        self.note_write(halves, of_lanes, generic=False)
        self.bytes.reshape(-1, size)[flat // size] = parts
