"""Instructions that compute, of one thread each: what they make of their operands.

``OPERATIONS``: by the first part of an opcode, a function of its other parts that returns (dtype of the result, dtypes
of the operands, what to compute). Results are rounded as PTX says; a fused multiply-add is made in fp64, whose own
rounding comes first (twice in 2²⁹ it is another last bit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

TYPES = {
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    "f16": np.float16, "bf16": np.uint16, "b8": np.uint8, "u8": np.uint8,
}  # fmt: skip
WIDE = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
Operation = tuple[np.dtype, Sequence[np.dtype], Callable[..., np.ndarray]]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 in uint16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 in uint16 → fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _of(kind: str, count: int, function: Callable) -> Operation:
    return TYPES[kind], (TYPES[kind],) * count, function


def _two(function: Callable, floats: Callable | None = None) -> Callable[[list[str]], Operation]:
    def operation(parts: list[str]) -> Operation:
        kind = parts[-1]
        if kind in PACKED:
            return _packed(kind, 2, floats or function)
        return _of(kind, 2, floats if floats is not None and kind.startswith("f") else function)

    return operation


PACKED = ("bf16", "f16", "bf16x2", "f16x2", "f32x2")


def _packed(kind: str, count: int, function: Callable) -> Operation:
    """Numbers of 16 bits, or two numbers in a register, each computed in fp64 and rounded."""
    register = {"f32x2": np.uint64, "bf16x2": np.uint32, "f16x2": np.uint32}.get(kind, np.uint16)

    def computed(*operands: np.ndarray) -> np.ndarray:
        if kind == "f32x2":
            pairs = (np.ascontiguousarray(operand).view(np.float32).astype(np.float64) for operand in operands)
            return function(*pairs).astype(np.float32).view(register)
        halves = [np.ascontiguousarray(operand).view(np.uint16) for operand in operands]
        if kind.startswith("bf16"):
            wide = function(*(from_bf16(half).astype(np.float64) for half in halves))
            return to_bf16(wide.astype(np.float32)).view(register)
        wide = function(*(half.view(np.float16).astype(np.float64) for half in halves))
        return wide.astype(np.float16).view(register)

    return register, (register,) * count, computed


def _mul(parts: list[str]) -> Operation:
    kind = parts[-1]
    if kind in PACKED:
        return _packed(kind, 2, np.multiply)
    if kind.startswith("f"):
        saturate = "sat" in parts
        return _of(kind, 2, lambda a, b: _saturated(a * b) if saturate else a * b)
    if "wide" in parts:
        wide = WIDE[kind]
        return wide, (TYPES[kind],) * 2, lambda a, b: a.astype(wide) * b.astype(wide)
    if "hi" in parts:
        wide, bits = WIDE[kind], 8 * np.dtype(TYPES[kind]).itemsize
        return _of(kind, 2, lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(TYPES[kind]))
    return _of(kind, 2, np.multiply)


def _saturated(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.float32(0), np.clip(values, np.float32(0), np.float32(1)))


def _mad(parts: list[str]) -> Operation:
    kind = parts[-1]
    if "wide" in parts:
        wide = WIDE[kind]
        return wide, (TYPES[kind], TYPES[kind], wide), lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if "lo" not in parts:
        raise NotImplementedError(f"mad.{'.'.join(parts)}")
    return _of(kind, 3, lambda a, b, c: a * b + c)


def _fma(parts: list[str]) -> Operation:
    kind = parts[-1]
    if kind in PACKED:
        return _packed(kind, 3, lambda a, b, c: a * b + c)
    if kind != "f32":
        raise NotImplementedError(f"fma.{'.'.join(parts)}")

    def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)

    return _of(kind, 3, fused)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Toward zero; by zero, all bits, as GPUs do."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - _divided(a, b) * b)


def _shift(left: bool) -> Callable[[list[str]], Operation]:
    """By more than there are bits: nothing is left, or the sign."""

    def operation(parts: list[str]) -> Operation:
        kind = TYPES[parts[-1]]
        bits = 8 * np.dtype(kind).itemsize

        def shifted(a: np.ndarray, by: np.ndarray) -> np.ndarray:
            small = np.minimum(by, bits - 1).astype(kind)
            moved = a << small if left else a >> small
            if not left and np.dtype(kind).kind == "i":
                return moved
            return np.where(by >= bits, kind(0), moved)

        return kind, (kind, np.uint32), shifted

    return operation


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _setp(parts: list[str]) -> Operation:
    if parts[-1] == "bf16":
        dtype, _, compared = _setp([*parts[:-1], "f32"])
        return dtype, (np.uint16, np.uint16), lambda a, b: compared(from_bf16(a), from_bf16(b))
    how, kind = parts[0], TYPES[parts[-1]]
    unordered = how.endswith("u") and how != "u"
    compare = _COMPARE[how.removesuffix("u")]

    def compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nan = np.isnan(a) | np.isnan(b) if np.dtype(kind).kind == "f" else np.zeros(1, bool)
        return (compare(a, b) | nan) if unordered else (compare(a, b) & ~nan)

    if len([part for part in parts if part != "ftz"]) != 2:
        raise NotImplementedError(f"setp.{'.'.join(parts)}")
    return np.bool_, (kind, kind), compared


def _selp(parts: list[str]) -> Operation:
    kind = TYPES[parts[-1]]
    return kind, (kind, kind, np.bool_), lambda a, b, which: np.where(which, a, b)


def _extracted(parts: list[str]) -> Operation:
    """bfe: ``length`` bits from ``begin`` on, with the sign of their highest."""
    kind = TYPES[parts[-1]]
    bits = 8 * np.dtype(kind).itemsize

    def extracted(a: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
        begin, length = begin.astype(kind), np.minimum(length, bits).astype(kind)
        up = np.clip(bits - begin.astype(np.int64) - length.astype(np.int64), 0, bits - 1).astype(kind)
        moved = (a << up) >> np.minimum(up + begin, kind(bits - 1))
        return np.where(length == 0, kind(0), moved)

    return kind, (kind, np.uint32, np.uint32), extracted


def _permuted(parts: list[str]) -> Operation:
    if parts != ["b32"]:
        raise NotImplementedError(f"prmt.{'.'.join(parts)}")

    def permuted(a: np.ndarray, b: np.ndarray, how: np.ndarray) -> np.ndarray:
        bytes_of = np.concatenate([np.ascontiguousarray(v).view(np.uint8).reshape(-1, 4) for v in (a, b)], axis=1)
        chosen = (how[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(0xF)
        picked = np.take_along_axis(bytes_of, (chosen & np.uint32(7)).astype(np.int64), 1)
        sign = np.where(picked & np.uint8(0x80), np.uint8(0xFF), np.uint8(0))
        return np.ascontiguousarray(np.where(chosen & np.uint32(8), sign, picked)).view(np.uint32)[:, 0]

    return np.uint32, (np.uint32,) * 3, permuted


def _lop3(parts: list[str]) -> Operation:
    def combined(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        found = np.zeros_like(a)
        for row in range(8):
            if int(table[0]) >> row & 1:
                terms = (v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
                found |= np.bitwise_and.reduce(list(terms))
        return found

    return np.uint32, (np.uint32,) * 4, combined


def _converted(parts: list[str]) -> Operation:
    *how, to, of = parts
    rounded = {"rn", "rz", "rna", "sat", "ftz", "rni", "rzi", "relu"} & set(how)
    if (to, of) == ("f32", "bf16"):
        return np.float32, (np.uint16,), from_bf16
    if (to, of) == ("bf16", "f32") and rounded == {"rn"}:
        return np.uint16, (np.float32,), to_bf16
    if to in ("bf16x2", "f16x2") and of == "f32" and rounded == {"rn"}:

        def paired(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            pair = np.stack([low, high], 1)
            half = to_bf16(pair) if to == "bf16x2" else pair.astype(np.float16).view(np.uint16)
            return np.ascontiguousarray(half).view(np.uint32)[:, 0]

        return np.uint32, (np.float32, np.float32), paired
    if to == "tf32" and of == "f32":
        even = "rn" in how

        def cut(a: np.ndarray) -> np.ndarray:
            bits = np.ascontiguousarray(a).view(np.uint32)
            half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)) if even else np.uint32(0x1000)
            return np.where(np.isnan(a), bits, (bits + half) & np.uint32(0xFFFFE000))

        return np.uint32, (np.float32,), cut
    if to[0] in "su" and of[0] in "su" and not rounded:
        return TYPES[to], (TYPES[of],), lambda a: a.astype(TYPES[to])
    if to.startswith("f") and (of[0] in "suf") and rounded <= {"rn", "ftz"}:
        return TYPES[to], (TYPES[of],), lambda a: a.astype(TYPES[to])
    if to[0] in "su" and of.startswith("f") and rounded in ({"rzi"}, {"rni"}):
        whole = np.trunc if rounded == {"rzi"} else np.rint
        info = np.iinfo(TYPES[to])
        return TYPES[to], (TYPES[of],), lambda a: np.clip(
            np.nan_to_num(whole(a.astype(np.float64))), info.min, info.max
        ).astype(TYPES[to])  # fmt: skip
    raise NotImplementedError(f"cvt.{'.'.join(parts)}")


def _one(function: Callable) -> Callable[[list[str]], Operation]:
    return lambda parts: _packed(parts[-1], 1, function) if parts[-1] in PACKED else _of(parts[-1], 1, function)


def _extremum(function: Callable, not_nan: Callable) -> Callable[[list[str]], Operation]:
    def operation(parts: list[str]) -> Operation:
        chosen = function if "NaN" in parts or parts[-1][0] in "su" else not_nan
        return _packed(parts[-1], 2, chosen) if parts[-1] in PACKED else _of(parts[-1], 2, chosen)

    return operation


def _wide(function: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


OPERATIONS: dict[str, Callable[[list[str]], Operation]] = {
    "add": _two(np.add), "sub": _two(np.subtract), "mul": _mul, "mad": _mad, "fma": _fma,
    "div": _two(_divided), "rem": _two(_remainder),
    "min": _extremum(np.minimum, np.fmin), "max": _extremum(np.maximum, np.fmax),
    "and": _two(np.bitwise_and), "or": _two(np.bitwise_or), "xor": _two(np.bitwise_xor), "not": _one(np.invert),
    "neg": _one(np.negative), "abs": _one(np.abs), "shl": _shift(True), "shr": _shift(False),
    "setp": _setp, "selp": _selp, "bfe": _extracted, "prmt": _permuted, "lop3": _lop3, "cvt": _converted,
    "ex2": _one(_wide(np.exp2)), "lg2": _one(_wide(np.log2)), "rcp": _one(_wide(lambda a: 1 / a)),
    "rsqrt": _one(_wide(lambda a: 1 / np.sqrt(a))), "sqrt": _one(_wide(np.sqrt)), "tanh": _one(_wide(np.tanh)),
}  # fmt: skip
