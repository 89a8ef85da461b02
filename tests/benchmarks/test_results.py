"""A results file: what is written is what is read, whole or not at all, and never two machines in one."""

import json
import math
import os

import pytest

from benchmarks import results as module
from benchmarks.results import OURS, Results, Row, by_contest, file_name, newest, quartiles
from tests.benchmarks import synthetic


def test_what_is_written_is_read(tmp_path):
    written = Results(synthetic.GPU, tmp_path / "new" / "a.json")
    written.tests, written.left = {"depthwise": "passed: 180"}, ["block_training: C=96 56×56"]
    written.put(*synthetic.everything())
    read = Results.read(written.path)
    assert (read.meta, read.tests, read.left) == (written.meta, written.tests, written.left)
    assert read.rows == synthetic.everything()
    row = read.get("depthwise_forward", "C=192 28×28 7×7 N=128", "bf16", "compile")
    assert (row.speedup, row.speedup_quartiles, row.median_us) == (0.5, (0.45, 0.6), 25.0)
    assert read.get("depthwise_forward", "C=192 28×28 7×7 N=128", "bf16", "timm") is None


def test_a_row_replaces_that_of_the_same_key(tmp_path):
    first, other = (Row("host", "case", provider, "bf16", median_us=1.0) for provider in (OURS, "eager"))
    again = Row("host", "case", OURS, "bf16", status="failed: no")
    results = Results(synthetic.GPU, tmp_path / "a.json")
    results.put(first, other)
    results.put(again)
    assert results.rows == Results.read(results.path).rows == [again, other]


def test_nan_and_infinity_become_no_number(tmp_path):
    row = Row("host", "case", OURS, "bf16", median_us=math.nan, spread=math.inf, speedup_quartiles=(math.nan, 2.0))
    path = synthetic.results(tmp_path, [row]).path

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    values = json.loads(path.read_text(), parse_constant=refuse)["rows"][0]
    assert (values["median_us"], values["spread"], values["speedup_quartiles"]) == (None, None, [None, 2.0])
    read = Results.read(path).rows[0]
    assert (read.median_us, read.spread, read.images_per_second) == (None, None, None)


def test_numbers_have_six_digits_and_rows_a_line_each(tmp_path):
    rows = [Row("host", f"case {at}", OURS, "bf16", median_us=1234.56789, bytes=123456789) for at in range(3)]
    path = synthetic.results(tmp_path, rows).path
    lines = [line for line in path.read_text().splitlines() if '"suite"' in line]
    assert len(lines) == 3
    assert all('"median_us": 1234.57,' in line and '"bytes": 123456789' in line for line in lines)


def test_a_file_is_never_half_there(tmp_path, monkeypatch):
    results = synthetic.results(tmp_path, [Row("host", "old", OURS, "bf16", median_us=1.0)])
    before = results.path.read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.put(Row("host", "new", OURS, "bf16", median_us=2.0))
    assert results.path.read_bytes() == before
    assert newest(tmp_path) == results.path  # what was left of the new one is no results file


def test_rows_of_other_conditions_are_refused(tmp_path):
    results = synthetic.results(tmp_path)
    results.refuse_mixing(synthetic.GPU | {"date": "2026-01-03", "time": "00:00:01"})
    for name in module.IDENTITY:
        with pytest.raises(ValueError, match=f"{name} is .* there and 'other' here") as error:
            results.refuse_mixing(synthetic.GPU | {name: "other"})
        assert str(results.path) in str(error.value)


BROKEN = {
    "no JSON": "{",
    "half of one": '{"schema": 1, "meta": {',
    "a list": "[1]",
    "another schema": '{"schema": 2, "meta": {}, "rows": []}',
    "no rows": json.dumps({"schema": 1, "meta": synthetic.GPU}),
    "meta that lacks the GPU": '{"schema": 1, "meta": {"date": "2026-01-02"}, "rows": []}',
    "a row that is none": json.dumps({"schema": 1, "meta": synthetic.GPU, "rows": ["row"]}),
    "a row without a provider": json.dumps({"schema": 1, "meta": synthetic.GPU, "rows": [{"suite": "host"}]}),
    "an unknown status": json.dumps(
        {
            "schema": 1,
            "meta": synthetic.GPU,
            "rows": [{"suite": "a", "case": "b", "provider": "c", "dtype": "d", "status": "fine"}],
        }
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json is no results file"):
        Results.read(path)


def test_fields_of_a_later_version_do_no_harm(tmp_path):
    path = synthetic.results(tmp_path, [Row("host", "case", OURS, "bf16", median_us=1.0)]).path
    path.write_text(path.read_text().replace('"suite"', '"colour": "red", "suite"'))
    assert Results.read(path).rows == [Row("host", "case", OURS, "bf16", median_us=1.0)]


def test_meta_and_status_are_checked():
    with pytest.raises(ValueError, match="meta lacks driver, cudnn; needed: gpu, driver"):
        Results({name: value for name, value in synthetic.GPU.items() if name not in ("driver", "cudnn")})
    with pytest.raises(ValueError, match=r"status is 'okay'.*ok, skipped"):
        Row("host", "case", OURS, "bf16", status="okay")
    assert not Row("host", "case", OURS, "bf16", status="failed: ok").ok


def test_newest_prefers_a_gpu_then_the_day_then_the_hour(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "not there") is None

    def file(meta, **changes):
        return synthetic.results(tmp_path, meta=meta | changes, name=f"{len(list(tmp_path.iterdir()))}.json").path

    cpu = file(synthetic.CPU, date="2026-12-31")
    assert newest(tmp_path) == cpu
    morning = file(synthetic.GPU, date="2026-01-02", time="08:00:00")
    assert newest(tmp_path) == morning
    evening = file(synthetic.GPU, date="2026-01-02", time="20:00:00")
    file(synthetic.GPU, date="2025-12-31", time="23:00:00")
    assert newest(tmp_path) == evening


def test_names_of_files():
    assert file_name(synthetic.GPU) == "nvidia-h100-80gb-hbm3-2026-01-02-0123abcd.json"
    assert file_name(synthetic.CPU | {"commit": "../x"}) == "cpu-some-processor-2026-01-02-x.json"


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="samples is empty"):
        quartiles([])


def test_contests_are_of_one_suite_case_and_dtype():
    rows = synthetic.depthwise() + synthetic.depthwise(dtype="fp32")
    contests = by_contest(reversed(rows))
    assert len(contests) == 8
    contest = contests["depthwise_forward", "C=96 56×56 7×7 N=128", "fp32"]
    assert [row.provider for row in contest] == ["compile", "eager", "ours"]


def test_images_per_second():
    ours = synthetic.network()[0]
    assert ours.images_per_second == pytest.approx(2560)
    assert synthetic.depthwise()[0].images_per_second is None
