"""Reads ``benchmarks/predictions.json``: how long ours is going to take, as :mod:`benchmarks.predict` has said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_suffix(".json")
Key = tuple[str, str, str]  # suite, case, dtype


class Prediction(NamedTuple):
    """Microseconds of one call, on an H100."""

    low: float
    high: float


def read(path: Path = FILE) -> dict[Key, Prediction]:
    """What was predicted.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text())
        return {(r["suite"], r["case"], r["dtype"]): Prediction(r["low_us"], r["high_us"]) for r in content["rows"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no predictions: {type(error).__name__}: {error}") from error
