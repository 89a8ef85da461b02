"""Results of benchmarks: one JSON file for one machine, day and commit; never two of them in one file.

::

    {"schema": 1,
     "meta": {"gpu": ..., "driver": ..., "torch": ..., "triton": ..., "cudnn": ..., "commit": ..., "date": ..., ...},
     "tests": {"depthwise": "passed: 180", ...},
     "rows": [{"suite": ..., "case": ..., "provider": ..., "dtype": ..., "median_us": ..., "spread": ...,
               "fraction_of_floor": ..., "status": "ok", ...}, ...],
     "done": ["suite: case dtype (providers)", ...], "left": [...]}

:class:`Row` says what the fields of a row are. ``done`` names what was measured to its end, ``left`` what there was no
time for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
OURS = "ours"
OURS_GRAPH = "ours_graph"  # in a CUDA graph
FALLBACK = "not on tensor cores"  # in the note of a row of ours, where a kernel was to run on them and did not
# What two files have to agree in before their rows may stand in one.
IDENTITY = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "device", "quick", "threads", "timm")
META = ("gpu", "driver", "torch", "triton", "cudnn", "commit", "date")
# The first word of a row's status; a reason follows all but the first.
STATUSES = ("ok", "skipped", "refused", "failed", "wrong", "timeout", "crashed")


NUMBERS = (
    "median_us", "spread", "fraction_of_floor", "floor_us", "bytes", "flops", "samples", "speedup", "images", "error",
    "over_graph", "peak_bytes", "saved_bytes", "variants", "rate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One provider on one case. Times are microseconds of one call (or training step), sizes bytes."""

    suite: str
    case: str
    provider: str
    dtype: str
    median_us: float | None = None
    spread: float | None = None  # (upper quartile - lower quartile) / median of the samples
    fraction_of_floor: float | None = None  # floor_us / median_us: 1 is as fast as the measured ceilings allow
    status: str = "ok"  # or "<kind>: reason", one of STATUSES
    floor_us: float | None = None  # the larger of bytes / copy bandwidth and flops / rate of a matrix product
    bytes: int | None = None  # that any implementation has to move: inputs read once, outputs written once
    flops: int | None = None
    samples: int | None = None
    method: str | None = None  # "graph" and "events" are the GPU's time, "clock" is the host's
    speedup: float | None = None  # this provider's time / that of ours: median over rounds in which both ran
    speedup_quartiles: tuple[float, float] | None = None
    over_graph: float | None = None  # this provider's time / that of ours in a CUDA graph, as the speedup
    images: int | None = None  # of one call, for networks
    ran: str | None = None  # what ours ran on: "triton" or "torch"
    untested: str | None = None  # of what ours stands on: operators, ..., whose tests were not through
    error: float | None = None  # |result - expected| / |expected|, against PyTorch in fp32 or wider
    peak_bytes: int | None = None  # of the device's memory during a training step, over what was there before
    saved_bytes: int | None = None  # kept from forward to backward, parameters left out
    variants: int | None = None  # compiled over all sizes of the case
    rate: float | None = None  # of a ceiling, in `unit`
    unit: str | None = None
    note: str | None = None

    def __post_init__(self):
        for name in ("suite", "case", "provider", "dtype", "status"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; a string is allowed")
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{name} is {value!r}; a number is allowed")
        if self.speedup_quartiles is not None and len(self.speedup_quartiles) != 2:
            raise ValueError(f"speedup_quartiles is {self.speedup_quartiles!r}; two numbers are allowed")
        if self.status.split(":")[0] not in STATUSES:
            raise ValueError(f"status is {self.status!r}; one that begins with {', '.join(STATUSES)} is allowed")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.suite, self.case, self.dtype, self.provider)

    @property
    def contest(self) -> tuple[str, str, str]:
        """What providers are compared in."""
        return (self.suite, self.case, self.dtype)

    @property
    def images_per_second(self) -> float | None:
        return self.images / self.median_us * 1e6 if self.images and self.median_us else None

    def as_json(self) -> dict:
        required = {"suite", "case", "provider", "dtype", "median_us", "spread", "fraction_of_floor", "status"}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name in required or value is not None}

    @classmethod
    def from_json(cls, values: dict) -> Row:
        known = {field.name for field in dataclasses.fields(cls)}
        row = {name: value for name, value in values.items() if name in known}
        if row.get("speedup_quartiles") is not None:
            row["speedup_quartiles"] = tuple(row["speedup_quartiles"])
        return cls(**row)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single sample is all three."""
    if not samples:
        raise ValueError("samples is empty; at least one is needed")
    if len(samples) == 1:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


class Results:
    """The content of one results file, and the file, if it has one, which is never half written."""

    def __init__(self, meta: dict, path: Path | None = None):
        missing = [name for name in META if name not in meta]
        if missing:
            raise ValueError(f"meta lacks {', '.join(missing)}; needed: {', '.join(META)}")
        self.meta, self.path = dict(meta), path
        self.tests: dict[str, str] = {}
        self.done: list[str] = []
        self.left: list[str] = []
        self._rows: dict[tuple, Row] = {}

    @classmethod
    def read(cls, path: Path) -> Results:
        """A results file.

        Raises:
            ValueError: it is not one.
        """
        try:
            content = json.loads(path.read_text())
            schema = content["schema"]
            if schema != SCHEMA:
                raise ValueError(f"schema is {schema!r}; {SCHEMA} is allowed")
            results = cls(content["meta"], path)
            results.tests = dict(content.get("tests", {}))
            results.done, results.left = list(content.get("done", [])), list(content.get("left", []))
            for values in content["rows"]:
                row = Row.from_json(values)
                results._rows[row.key] = row
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no results file: {type(error).__name__}: {error}") from error
        return results

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def is_cpu(self) -> bool:
        return self.meta.get("device") == "cpu"

    def get(self, suite: str, case: str, dtype: str, provider: str) -> Row | None:
        return self._rows.get((suite, case, dtype, provider))

    def put(self, *rows: Row) -> None:
        """Adds rows, or replaces those of the same suite, case, dtype and provider; writes the file."""
        self._rows.update((row.key, row) for row in rows)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        head = {"schema": SCHEMA, "meta": self.meta, "tests": self.tests, "done": self.done, "left": self.left}
        rows = ",\n  ".join(json.dumps(_rounded(row.as_json()), ensure_ascii=False) for row in self.rows)
        text = f'{json.dumps(head, indent=1, ensure_ascii=False)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".part")
        unfinished.write_text(text)
        os.replace(unfinished, self.path)

    def refuse_mixing(self, meta: dict) -> None:
        """Raises ValueError where rows measured under ``meta`` do not belong into this file."""
        different = [name for name in IDENTITY if self.meta.get(name) != meta.get(name)]
        if different:
            said = "; ".join(
                f"{name} is {self.meta.get(name)!r} there and {meta.get(name)!r} here" for name in different
            )
            raise ValueError(f"{self.path} was measured under other conditions: {said}. Use another folder")


def _rounded(values: dict) -> dict:
    """Six significant digits, which is more than any timing has; NaN and Inf are no JSON."""

    def rounded(value):
        if isinstance(value, (list, tuple)):
            return [rounded(v) for v in value]
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else None

    return {name: rounded(value) for name, value in values.items()}


def file_name(meta: dict) -> str:
    """``<gpu>-<date>-<commit>.json``."""
    words = "-".join(str(meta[name]) for name in ("gpu", "date", "commit"))
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json"


def newest(folder: Path = FOLDER) -> Path | None:
    """The newest results in ``folder``: those of a GPU before those of a CPU, then by date and time."""
    files = [(path, Results.read(path)) for path in sorted(folder.glob("*.json"))]
    if not files:
        return None
    return max(files, key=lambda file: (not file[1].is_cpu, file[1].meta["date"], file[1].meta.get("time", "")))[0]


def by_contest(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of each suite, case and dtype together, in the order in which they came."""
    contests: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        contests.setdefault(row.contest, []).append(row)
    return contests
