"""What changed between two results files. ``python -m benchmarks.compare OLD NEW [--only ours]``

A time has changed where new / old is further from 1 than the spread of either, and than 2 %. Sizes and numbers of
variants repeat exactly: any change counts. Rows that are in one file only are listed, and are neither better nor worse.

Exits with 0 where nothing is worse, 1 where something is, 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.headline import measured
from benchmarks.results import Results, Row

NOISE = 0.02  # below this, a difference of times is none, however small the spread
ALONE = 0.2  # of times without a spread, a single sample each: nobody knows how far the next one would be
MACHINE = ("gpu", "device")  # times of two of them say nothing of the code
CPU = ("threads",)  # besides, where a CPU was measured
SIZES = ("saved_bytes", "peak_bytes", "variants")
CANNOT = 2


class Incomparable(ValueError):
    """Two results files whose rows say nothing of each other."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What is different in one row; ``factor`` is how many times worse it is, below 1 better."""

    key: tuple[str, str, str, str]
    what: str  # "slower", "faster", "broken", "mended", "more saved_bytes", "only in OLD", ...
    old: str
    new: str
    factor: float | None = None
    worse: bool = False

    @property
    def rank(self) -> tuple:
        """Worst first: what broke, what got slower by factor, what is in one file only, what got better."""
        if self.factor is None:
            return (0 if self.worse else 2, 0.0, self.key)
        return (1 if self.worse else 3, -self.factor, self.key)


def different_meta(old: Results, new: Results) -> dict[str, tuple]:
    """The fields of ``meta`` in which two files differ, each with both values; when they were made left out."""
    names = dict.fromkeys([*old.meta, *new.meta])
    return {
        name: (old.meta.get(name), new.meta.get(name))
        for name in names
        if name not in ("date", "time") and old.meta.get(name) != new.meta.get(name)
    }


def machines_differ(old: Results, new: Results) -> list[str]:
    fields = MACHINE + (CPU if old.is_cpu or new.is_cpu else ())
    return [name for name in fields if name in different_meta(old, new)]


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """All changes, worst first.

    Raises:
        Incomparable: no row is in both.
    """
    before, after = ({row.key: row for row in rows} for rows in (old, new))
    if not before.keys() & after.keys():
        raise Incomparable(f"no row is in both: {len(before)} rows in OLD, {len(after)} in NEW")
    changes = [change for key in before if key in after for change in changes_of(before[key], after[key])]
    changes += [Change(key, "only in OLD", before[key].status, "") for key in before if key not in after]
    changes += [Change(key, "only in NEW", "", after[key].status) for key in after if key not in before]
    return sorted(changes, key=lambda change: change.rank)


def changes_of(old: Row, new: Row) -> list[Change]:
    """What differs between two rows of the same key."""
    key = old.key
    if old.ok != new.ok:
        return [Change(key, "mended" if new.ok else "broken", old.status, new.status, worse=not new.ok)]
    if not old.ok:
        kinds = [row.status.split(":")[0] for row in (old, new)]
        return [] if kinds[0] == kinds[1] else [Change(key, "still no result", old.status, new.status)]
    changes = []
    if old.ran != new.ran and None not in (old.ran, new.ran):
        changes.append(Change(key, "runs on something else", old.ran, new.ran, worse=new.ran == "torch"))
    higher = old.suite == "ceilings"
    name, unit = ("rate", f" {new.unit or ''}".rstrip()) if higher else ("median_us", " µs")
    changes += _lost_or_found(old, new, name)
    a, b = measured(old, name), measured(new, name)
    if a and b:
        factor = a / b if higher else b / a
        if abs(b / a - 1) > _noise(old, new):
            what = "slower" if factor > 1 else "faster"
            changes.append(Change(key, what, f"{a:.4g}{unit}", f"{b:.4g}{unit}", factor, factor > 1))
    for name in SIZES:
        changes += _lost_or_found(old, new, name)
        a, b = measured(old, name), measured(new, name)
        if a is not None and b is not None and a != b:
            what = f"{'more' if b > a else 'less'} {name}"
            changes.append(Change(key, what, f"{a:,}", f"{b:,}", b / a if a else math.inf, b > a))
    return changes


def _lost_or_found(old: Row, new: Row, name: str) -> list[Change]:
    """A number that only one of two rows has, though both are ok."""
    a, b = measured(old, name), measured(new, name)
    if (a is None) == (b is None):
        return []
    said = ["none" if value is None else f"{value:.4g}" for value in (a, b)]
    return [Change(old.key, f"{'lost' if b is None else 'new'} {name}", *said, worse=b is None)]


def _noise(old: Row, new: Row) -> float:
    spreads = [row.spread for row in (old, new) if row.spread is not None and (row.samples is None or row.samples > 1)]
    return max(*spreads, NOISE) if spreads else ALONE


def text(changes: list[Change], compared: int) -> str:
    """The table, and a line of totals."""
    lines = [["what", "factor", "suite", "case", "dtype", "provider", "old", "new"]]
    for change in changes:
        suite, case, dtype, provider = change.key
        factor = "" if change.factor is None else f"{change.factor:.3f}"
        cells = [change.what.upper() if change.worse else change.what, factor, suite, case, dtype, provider]
        lines.append([" ".join(cell.split())[:120] for cell in (*cells, change.old, change.new)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    worse = sum(change.worse for change in changes)
    alone = {side: sum(change.what == f"only in {side}" for change in changes) for side in ("OLD", "NEW")}
    other = len(changes) - worse - sum(alone.values())
    total = (
        f"{compared} rows compared: {worse} changes for the worse, {other} others; "
        f"{alone['OLD']} rows only in OLD, {alone['NEW']} only in NEW"
    )
    return "\n".join([*(shown if changes else []), *([""] if changes else []), total])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="compare the rows of these providers only: ours")
    parser.add_argument("--different-machines", action="store_true", help="compare times of two machines all the same")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT


def _run(arguments: argparse.Namespace) -> int:
    old, new = Results.read(arguments.old), Results.read(arguments.new)
    for name, values in different_meta(old, new).items():
        print(f"{name}: {values[0]!r} in OLD, {values[1]!r} in NEW")
    differing = machines_differ(old, new)
    if differing and not arguments.different_machines:
        raise Incomparable(
            f"the files are of two machines ({', '.join(differing)} differ), whose times say nothing of the code; "
            "--different-machines compares them all the same"
        )
    rows = [old.rows, new.rows]
    if arguments.only:
        known = {row.provider for some in rows for row in some}
        for name in arguments.only:
            if name not in known:
                raise Incomparable(f"--only is {name!r}; the files have {', '.join(sorted(known))}")
        rows = [[row for row in some if row.provider in arguments.only] for some in rows]
    changes = compare(*rows)
    print(text(changes, len({row.key for row in rows[0]} & {row.key for row in rows[1]})))
    return 1 if any(change.worse for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
