"""Markdown tables of the suites of a results file: a shape for each kind of suite, a general one for the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.headline import COMPOSITIONS, DEPTHWISE, GRAPHS, NETWORKS, measured, of, providers
from benchmarks.results import OURS, OURS_GRAPH, Row, by_contest

NONE = "–"
MIB = 2**20
KEY = ("suite", "case", "dtype", "provider")
MANY = 12  # cases that are named one by one in a list


def number(value: float | None) -> str:
    """Three significant digits, without exponents where there is no need for one."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def plain(text: object) -> str:
    """Text such that Markdown neither ends a cell at it nor swallows it as HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [[plain(cell) for cell in line] for line in (head, *lines)]
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(head), *rows[1:])]


def code(text: str, limit: int = 300) -> str:
    """Text of others, such as a reason: as it is, in one line."""
    text = " ".join(text.split()).replace("`", "'")
    return f"`{text if len(text) <= limit else text[: limit - 1] + '…'}`"


def suite_table(suite: str, rows: list[Row]) -> list[str]:
    """Lines of Markdown: the table of a suite, then what has no number and why, notes, methods, errors."""
    shape = SHAPES.get(suite, Shape(everything, ()))
    lines = shape.table(suite, rows)
    known = {*KEY, "status", "note", "untested", "method", "error", *shape.shown}
    more = [name for name in _fields(rows) if name not in known]
    if shape.shown and more:
        lines += ["", "Besides:", "", *everything(suite, [row for row in rows if _any(row, more)], more)]
    numbers = shape.numbers or [name for name in _fields(rows) if name not in {*KEY, "status", "note", "method"}]
    silent = [
        row for row in rows if not any(measured(row, name) is not None for name in numbers if _numeric(row, name))
    ]
    reasons = {row.key: "ok, but without a number" if row.ok else row.status for row in silent}
    lines += _section("No number:", _grouped(silent, rows, lambda row: reasons[row.key]))
    lines += _section("In CUDA graphs, against ours in one:", _in_graphs(rows))
    marked = [row for row in rows if row.untested]
    lines += _section("Tests were not through, of:", _grouped(marked, rows, lambda row: row.untested))
    lines += _section("Notes:", _grouped([row for row in rows if row.note], rows, lambda row: row.note))
    lines += _section("", _methods(rows) + _errors(rows))
    return lines


def times(suite: str, rows: list[Row]) -> list[str]:
    """A line for each case: the time of ours, and each peer's time as a multiple of it."""
    networks = suite in NETWORKS
    ours = [row for row in rows if row.provider == OURS]
    peers = [name for name in providers(rows) if name != OURS]
    floor, ran = (any(getattr(row, name) is not None for row in ours) for name in ("fraction_of_floor", "ran"))
    head = ["case", "dtype", "ours, images/s (spread)" if networks else "ours, µs (spread)"]
    head += ["of the floor"] * floor + ["ran on"] * ran + [f"{name} / ours" for name in peers]
    lines = []
    for (_, case, dtype), contest in by_contest(rows).items():
        row = of(contest, OURS)
        cells = [case, dtype, _with_spread(row, _speed if networks else _time)]
        cells += [percent(measured(row, "fraction_of_floor"))] * floor + [(row and row.ran) or NONE] * ran
        lines.append(cells + [_against_ours(of(contest, name), networks) for name in peers])
    return table(head, lines)


def _against_ours(row: Row | None, networks: bool) -> str:
    time, speedup = measured(row), measured(row, "speedup")
    if time is None and speedup is None:
        return _missing(row)
    absolute = _speed(row) if networks else _time(row) + " µs"
    if speedup is None:
        return absolute + "/s" * (networks and bool(row.images))
    text = number(speedup)
    if row.speedup_quartiles is not None:
        text += f" ({number(row.speedup_quartiles[0])} to {number(row.speedup_quartiles[1])})"
    return f"{text}, {absolute}/s" if networks and row.images and time is not None else text


def columns(cell: Callable[[Row], str]) -> Callable[[str, list[Row]], list[str]]:
    """A shape with a line for each case and a column for each provider."""

    def shape(suite: str, rows: list[Row]) -> list[str]:
        names = providers(rows)
        lines = [
            [case, dtype, *(_with_spread(of(contest, name), cell) for name in names)]
            for (_, case, dtype), contest in by_contest(rows).items()
        ]
        return table(["case", "dtype", *names], lines)

    return shape


def memory(suite: str, rows: list[Row]) -> list[str]:
    head = ["case", "dtype", "provider", "kept for backward, MiB", "/ ours", "peak, MiB", "/ ours"]
    lines = []
    for (_, case, dtype), contest in by_contest(rows).items():
        for name in providers(contest):
            row, cells = of(contest, name), [case, dtype, name]
            for field in ("saved_bytes", "peak_bytes"):
                size, own = measured(row, field), measured(of(contest, OURS), field)
                cells.append(_missing(row) if size is None else number(size / MIB))
                cells.append(NONE if size is None or not own or name == OURS else number(size / own))
            lines.append(cells)
    return table(head, lines)


def variants(suite: str, rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        count, time = measured(row, "variants"), measured(row)
        cells = [_missing(row) if count is None else str(count), _missing(row) if time is None else number(time / 1e3)]
        lines.append([row.case, row.dtype, row.provider, *cells])
    return table(["case", "dtype", "provider", "variants", "ms of a size, compilation included"], lines)


def ceilings(suite: str, rows: list[Row]) -> list[str]:
    lines = [
        [
            row.case,
            row.dtype,
            row.provider,
            _with_spread(row, lambda row: number(measured(row, "rate"))),
            row.unit or NONE,
        ]
        for row in rows
    ]
    return table(["case", "dtype", "provider", "rate (spread)", "unit"], lines)


def everything(suite: str, rows: list[Row], names: Sequence[str] | None = None) -> list[str]:
    """For suites that have no shape: each row as it is, all fields that any of them has."""
    names = [name for name in _fields(rows) if name not in KEY] if names is None else names

    def cell(value: object) -> str:
        if isinstance(value, (tuple, list)):
            return " to ".join(map(cell, value))
        return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [[row.case, row.dtype, row.provider, *(cell(getattr(row, name)) for name in names)] for row in rows]
    return table(["case", "dtype", "provider", *names], lines)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a suite is shown: the table, the fields it shows, and those of which a row has to have one."""

    table: Callable[[str, list[Row]], list[str]]
    numbers: tuple[str, ...]
    shown: tuple[str, ...] = ()


def _time(row: Row) -> str:
    return number(measured(row))


def _speed(row: Row) -> str:
    """Images per second; where nobody said how many images there were, the time."""
    return f"{_time(row)} µs" if not row.images else number(row.images_per_second if measured(row) else None)


def _seconds(row: Row | None) -> str:
    time = measured(row)
    return _missing(row) if time is None else number(time / 1e6)


def _with_spread(row: Row | None, text: Callable[[Row], str]) -> str:
    if row is None or not row.ok:
        return _missing(row)
    return f"{text(row)} ({percent(row.spread)})" if row.spread is not None else text(row)


def _missing(row: Row | None) -> str:
    """What a cell says that has no number: the kind of failure, whose reason stands below the table."""
    return NONE if row is None or row.ok else row.status.split(":")[0]


def _fields(rows: list[Row]) -> list[str]:
    return [field.name for field in dataclasses.fields(Row) if any(_any(row, [field.name]) for row in rows)]


def _any(row: Row, names: Iterable[str]) -> bool:
    return any(getattr(row, name) is not None for name in names)


def _numeric(row: Row, name: str) -> bool:
    return isinstance(getattr(row, name), (int, float))


def _section(head: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    return ["", *([head, ""] if head else []), *lines]


def _grouped(some: list[Row], every: list[Row], text: Callable[[Row], str]) -> list[str]:
    """A list entry for each provider and text, with the cases it is about."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in some:
        groups.setdefault((row.provider, text(row)), []).append(row)
    lines = []
    for (provider, said), members in groups.items():
        cases = "; ".join(plain(f"{row.case} {row.dtype}") for row in members[:MANY])
        if len(members) > MANY:
            cases += f"; and {len(members) - MANY} more"
        total = sum(row.provider == provider for row in every)
        lines.append(f"- {provider}, {code(said)}, {len(members)} of {total} cases: {cases}")
    return lines


def _in_graphs(rows: list[Row]) -> list[str]:
    """Where a network waits for Python, graphs are what is to be compared with graphs."""
    lines = []
    for (_, case, dtype), contest in by_contest(rows).items():
        peers = [row for row in contest if row.provider in GRAPHS and measured(row, "over_graph") is not None]
        if peers:
            said = ", ".join(f"{row.provider} / {OURS_GRAPH} {number(row.over_graph)}" for row in peers)
            lines.append(f"- {plain(case)} {dtype}: {said}")
    return lines


def _methods(rows: list[Row]) -> list[str]:
    said = {
        "graph": "a CUDA graph, time of the GPU",
        "events": "CUDA events, time of the GPU",
        "clock": "the host's clock",
    }
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.method:
            found.setdefault(row.method, []).append(row)
    if not found:
        return []
    parts = (f"{said.get(method, method)} ({', '.join(providers(of_method))})" for method, of_method in found.items())
    return [f"- Timed with {'; '.join(parts)}."]


def _errors(rows: list[Row]) -> list[str]:
    largest: dict[str, float] = {}
    for row in rows:
        if row.error is not None:
            largest[row.provider] = max(row.error, largest.get(row.provider, row.error))
    if not largest:
        return []
    return [
        "- Largest relative error against PyTorch in fp32 or wider: "
        + ", ".join(f"{name} {largest[name]:.2g}" for name in providers(rows) if name in largest)
    ]


_ONE_TIME = ("median_us", "spread", "samples", "images")
_TIMED = Shape(
    times,
    ("median_us",),
    (
        *_ONE_TIME,
        "fraction_of_floor",
        "floor_us",
        "speedup",
        "speedup_quartiles",
        "over_graph",
        "ran",
        "bytes",
        "flops",
    ),
)
SHAPES = {
    **dict.fromkeys([*DEPTHWISE, *COMPOSITIONS, *NETWORKS], _TIMED),
    "memory": Shape(memory, ("saved_bytes", "peak_bytes"), ("saved_bytes", "peak_bytes", "images")),
    "host": Shape(columns(lambda row: f"{_time(row)} µs"), ("median_us",), _ONE_TIME),
    "cold_start": Shape(columns(lambda row: f"{_seconds(row)} s"), ("median_us",), _ONE_TIME),
    "variants": Shape(variants, ("variants", "median_us"), ("variants", *_ONE_TIME)),
    "ceilings": Shape(ceilings, ("rate",), ("rate", "unit", "bytes", "flops", *_ONE_TIME)),
}
