"""Bars and predictions: what they look for is in the plan of the benchmarks, and each of them can be missed."""

import dataclasses
import functools

import pytest

from benchmarks import bars, predictions, suites
from benchmarks.bars import BARS, IN_PART, MISSED, NOT_MEASURED, REACHED
from benchmarks.predictions import Prediction
from benchmarks.results import OURS, Results, Row
from tests.benchmarks.synthetic import CPU, GPU


@functools.cache
def everything_reached() -> Results:
    """Rows of all that the benchmarks measure on a GPU, as good as they are hoped to be."""
    found, known = Results(GPU), predictions.read()
    for contest in suites.plan(True):
        expected = known.get(contest.key)
        time = expected.low if expected else 10.0
        cost = {"bytes": int(time * 2.9e6)}  # so many per µs at 2.9 TB/s
        for provider in contest.providers:
            ours = provider.startswith(OURS)
            facts = {"median_us": time * (1 if ours else 9), "saved_bytes": 2**20 * (1 if ours else 12), **cost}
            facts |= {"speedup": None if provider == OURS else 9.0, "ran": "triton" if ours else None}
            facts |= {"rate": 3000.0, "unit": "GB/s"} if contest.suite == "ceilings" else {}
            facts |= {"variants": 4} if contest.suite == "variants" else {}
            facts |= {"over_graph": 2.0} if provider == "reduce_overhead" else {}
            facts |= {"images": 256} if contest.suite.startswith("model_") else {}
            found.put(contest.row(provider, **facts))
    return found


def test_everything_that_the_bars_look_for_is_in_the_plan():
    """No name of a case is misspelt, and no provider missing."""
    for one in bars.verdicts(everything_reached()):
        assert (one.said, one.missing) == (REACHED, 0), one
        assert one.count > 0


class Watched(Results):
    """Results that know which rows were looked at."""

    def __init__(self, rows):
        super().__init__(GPU)
        self.put(*rows)
        self.seen: list[Row] = []

    def get(self, *key) -> Row | None:
        self.seen.append(super().get(*key))
        return self.seen[-1]

    @property
    def rows(self) -> list[Row]:
        self.seen += super().rows
        return super().rows


def spoilt(bar: bars.Bar) -> Results:
    """Everything reached, but a number that a bar looks at far on its other side."""
    watched = Watched(everything_reached().rows)
    bars.verdict(bar, watched)
    for row in dict.fromkeys(watched.seen):
        for field in ("median_us", "speedup", "over_graph", "saved_bytes", "variants", "bytes"):
            value = getattr(row, field)
            for factor in (1e-4, 1e9) if value else ():
                changed = Watched(everything_reached().rows)
                changed.put(dataclasses.replace(row, **{field: type(value)(value * factor) or 1}))
                if bars.verdict(bar, changed).said == MISSED:
                    return changed
    raise AssertionError(f"nothing makes {bar.name!r} missed")


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.name)
def test_each_bar_can_be_missed(bar):
    missed = bars.verdict(bar, spoilt(bar))
    assert missed.said == MISSED
    assert not bar.reached_by(missed.worst.value)
    assert bars.verdict(bar, Results(GPU)).said == NOT_MEASURED


def test_what_was_not_measured_is_said():
    found, part = everything_reached(), Results(GPU)
    for row in found.rows:
        if row.case != "C=768 7×7 7×7 N=128":
            part.put(row)
    said = {one.bar.name: one for one in bars.verdicts(part)}
    first = said["7×7 forward and input gradient, share of a copy's bandwidth"]
    assert (first.said, first.count, first.missing) == (IN_PART, 6, 2)


def test_what_ran_on_pytorch_is_no_result_of_ours():
    found = Watched(everything_reached().rows)
    for row in everything_reached().rows:
        if row.provider == OURS and row.suite == "depthwise_forward":
            found.put(dataclasses.replace(row, ran="torch"))
    said = bars.verdict(BARS[0], found)
    assert (said.said, said.count) == (IN_PART, 4)  # input gradients


def test_what_was_not_tested_is_not_reached():
    found = Watched(everything_reached().rows)
    for row in everything_reached().rows:
        if row.provider == OURS and row.suite == "model_inference":
            found.put(dataclasses.replace(row, untested="block"))
    said = {one.bar.name: one.said for one in bars.verdicts(found)}
    assert [name for name, what in said.items() if what != REACHED] == [
        name for name in said if "inference" in name or name.startswith(("compiled", "batch 1"))
    ]
    assert set(said.values()) == {REACHED, bars.UNTESTED}


def test_another_gpu_has_other_times():
    other = Results(GPU | {"gpu": "NVIDIA H200"})
    other.put(*everything_reached().rows)
    said = {one.bar.name: one.said for one in bars.verdicts(other)}
    left = [name for name, what in said.items() if what == NOT_MEASURED]
    assert left == [name for name in said if "images/s" in name or "predicted" in name]


def test_a_cpu_reaches_nothing():
    found = Results(CPU)
    found.put(Row("cold_start", "convnext_tiny 64 N=2", OURS, "amp_bf16", median_us=1e6))
    assert {one.said for one in bars.verdicts(found)} == {NOT_MEASURED}


def test_command(tmp_path, capsys):
    reached, missed = Watched(everything_reached().rows), spoilt(BARS[0])
    for name, results, code in (("reached", reached, 0), ("missed", missed, 1), ("nothing", Results(GPU), 2)):
        results.path = tmp_path / f"{name}.json"
        results.write()
        assert bars.main([str(results.path)]) == code
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 + len(BARS)
        assert GPU["gpu"] in lines[0]
    assert bars.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


# Predictions


def test_predictions_are_of_cases_that_are_measured():
    predict = pytest.importorskip("benchmarks.predict", exc_type=ImportError)
    measured = {contest.key for contest in suites.plan(True)}
    known = predictions.read()
    assert set(known) == {(suite, str(case), case.dtype) for suite, case in predict.cases()}
    assert set(known) <= measured
    assert all(0 < one.low <= one.high for one in known.values())


def test_predictions_are_those_of_the_kernels_as_they_are():
    """Of some cases; else the file is to be written anew."""
    predict = pytest.importorskip("benchmarks.predict", exc_type=ImportError)
    known = predictions.read()
    chosen = [(suite, case) for suite, case in predict.cases() if case.c == 768 and case.kernel == (7, 7)]
    chosen = [one for one in chosen if one[0] in ("depthwise_forward", "depthwise_weight_gradient", "block_forward")]
    for key, one in predict.predict(chosen, 1).items():
        assert one.low == pytest.approx(known[key].low, rel=1e-3), "python -m benchmarks.predict"
        assert one.high == pytest.approx(known[key].high, rel=1e-3)


def test_distance_from_a_prediction():
    assert bars.off(100.0, Prediction(110.0, 110.0)) == pytest.approx(0.1)
    assert bars.off(80.0, Prediction(100.0, 200.0)) == pytest.approx(0.25)
    assert bars.off(150.0, Prediction(100.0, 200.0)) == 0.0
    assert bars.off(400.0, Prediction(100.0, 200.0)) == pytest.approx(0.5)


def test_a_file_that_holds_no_predictions(tmp_path):
    path = tmp_path / "predictions.json"
    for text in ("", "{}", '{"rows": [{"suite": 1}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"predictions.json holds no predictions"):
            predictions.read(path)
