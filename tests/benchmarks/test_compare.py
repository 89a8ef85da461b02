"""Two results files side by side: what is slower is found, what is noise is not, and machines are not mixed up."""

import dataclasses
import json

import pytest

from benchmarks import compare
from benchmarks.compare import Change, changes_of
from benchmarks.results import OURS, Row
from tests.benchmarks import synthetic


def row(median_us=100.0, spread=0.0, **changes):
    return Row(
        **{"suite": "host", "case": "c", "provider": OURS, "dtype": "bf16"} | changes,
        median_us=median_us,
        spread=spread,
    )


def what(old, new):
    return [(change.what, change.worse) for change in changes_of(old, new)]


TIMES = {
    "within 2 %": (row(), row(101.9), []),
    "beyond 2 %": (row(), row(102.1), [("slower", True)]),
    "faster by less than 2 %": (row(), row(98.1), []),
    "faster by more": (row(), row(97.9), [("faster", False)]),
    "within the old spread": (row(spread=0.1), row(109.0), []),
    "within the new spread": (row(), row(109.0, 0.1), []),
    "beyond both spreads": (row(spread=0.1), row(111.0, 0.05), [("slower", True)]),
    "single samples": (row(spread=None, samples=1), row(119.0, None, samples=1), []),
    "single samples far apart": (row(spread=None, samples=1), row(121.0, None, samples=1), [("slower", True)]),
    "the spread of a single sample is none": (row(samples=1), row(110.0, samples=1), []),
    "a lost time": (row(), row(None), [("lost median_us", True)]),
    "NaN": (row(), row(float("nan")), [("lost median_us", True)]),
    "a found time": (row(None), row(), [("new median_us", False)]),
}


@pytest.mark.parametrize("case", TIMES)
def test_times(case):
    old, new, expected = TIMES[case]
    assert what(old, new) == expected


def test_factors_are_of_what_got_worse():
    (slower,) = changes_of(row(), row(150.0))
    assert (slower.factor, slower.old, slower.new) == (1.5, "100 µs", "150 µs")
    (faster,) = changes_of(row(), row(50.0))
    assert faster.factor == 0.5
    ceiling = {"suite": "ceilings", "unit": "GB/s"}
    (lower,) = changes_of(row(rate=3000.0, **ceiling), row(rate=2000.0, **ceiling))
    assert (lower.what, lower.worse, lower.factor, lower.new) == ("slower", True, 1.5, "2000 GB/s")
    assert changes_of(row(rate=3000.0, **ceiling), row(200.0, rate=3000.0, **ceiling)) == []


STATUS = {
    "broken": ("ok", "failed: out of memory", [("broken", True)]),
    "wrong": ("ok", "wrong: 0.5 away", [("broken", True)]),
    "mended": ("timeout: 60 s", "ok", [("mended", False)]),
    "failed in another way": ("failed: a", "crashed: b", [("still no result", False)]),
    "failed with other words": ("failed: a", "failed: b", []),
}


@pytest.mark.parametrize("case", STATUS)
def test_status(case):
    old, new, expected = STATUS[case]
    assert what(row(status=old), row(status=new)) == expected


@pytest.mark.parametrize("name", ["saved_bytes", "peak_bytes", "variants"])
def test_sizes_are_exact(name):
    assert what(row(**{name: 1000}), row(**{name: 1001})) == [(f"more {name}", True)]
    assert what(row(**{name: 1000}), row(**{name: 999})) == [(f"less {name}", False)]
    assert what(row(**{name: 1000}), row(**{name: 1000})) == []
    assert what(row(**{name: 1000}), row()) == [(f"lost {name}", True)]
    assert what(row(**{name: 0}), row(**{name: 1})) == [(f"more {name}", True)]


def test_falling_back_to_pytorch_is_worse():
    assert what(row(ran="triton"), row(ran="torch")) == [("runs on something else", True)]
    assert what(row(ran="torch"), row(ran="triton")) == [("runs on something else", False)]
    assert what(row(), row(ran="torch")) == []


def test_all_changes_worst_first():
    def rows(**times):
        return [row(time, case=case) for case, time in times.items()]

    old = [*rows(a=100, b=100, c=100, d=100, gone=1), row(case="e"), row(case="m", saved_bytes=10)]
    new = [*rows(a=110, b=130, c=90, d=101, come=1), row(case="e", status="failed: x"), row(case="m", saved_bytes=12)]
    changes = compare.compare(old, new)
    assert [(change.what, change.key[1]) for change in changes] == [
        ("broken", "e"), ("slower", "b"), ("more saved_bytes", "m"), ("slower", "a"), ("only in NEW", "come"),
        ("only in OLD", "gone"), ("faster", "c"),
    ]  # fmt: skip
    text = compare.text(changes, 6)
    assert text.splitlines()[-1] == (
        "6 rows compared: 4 changes for the worse, 1 others; 1 rows only in OLD, 1 only in NEW"
    )
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["BROKEN", "SLOWER"]
    assert "1.300" in text.splitlines()[2]


def test_text_without_changes_is_one_line():
    assert compare.text([], 3).startswith("3 rows compared: 0 changes for the worse, 0 others")
    assert "\n" not in compare.text([], 3)


def test_a_line_for_each_change():
    change = Change(("s", "c", "d", "p"), "broken", "ok", "failed: a\nb" + "x" * 500, worse=True)
    lines = compare.text([change], 1).splitlines()
    assert len(lines) == 4
    assert "failed: a bxx" in lines[1]


# The command


@pytest.fixture
def files(tmp_path):
    """Runs the command on two results files with these rows; meta that differs is given."""

    def run(old, new, *arguments, **meta):
        meta = {"commit": "fedc3210"} | meta
        paths = [
            synthetic.results(tmp_path, old, name="old.json"),
            synthetic.results(tmp_path, new, synthetic.GPU | meta, "new.json"),
        ]
        return compare.main([*(str(results.path) for results in paths), *arguments])

    return run


def test_exit_status(files, capsys):
    rows = synthetic.everything()
    assert files(rows, rows) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "commit: '0123abcd' in OLD, 'fedc3210' in NEW"
    assert f"{len(rows)} rows compared: 0 changes for the worse" in printed
    slower = [dataclasses.replace(rows[0], median_us=rows[0].median_us * 1.5), *rows[1:]]
    assert files(rows, slower) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert files(slower, rows) == 0
    assert files(rows, rows[1:]) == 0
    assert "1 rows only in OLD, 0 only in NEW" in capsys.readouterr().out


def test_only_some_providers(files, capsys):
    rows = synthetic.network()
    slower = [dataclasses.replace(row, median_us=2 * row.median_us) if row.provider == "timm" else row for row in rows]
    assert files(rows, slower) == 1
    assert files(rows, slower, "--only", "ours") == 0
    assert "\n1 rows compared" in capsys.readouterr().out
    assert files(rows, slower, "--only", "ours", "timm") == 1
    assert files(rows, slower, "--only", "our") == 2
    assert "--only is 'our'; the files have ours, ours_compile, timm" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"gpu": "NVIDIA A100"}, {"device": "cpu"}, {"device": "cpu", "threads": 2}])
def test_two_machines_are_refused(files, capsys, changes):
    rows = synthetic.network()
    assert files(rows, rows, **changes) == 2
    printed = capsys.readouterr()
    assert "--different-machines" in printed.err
    for name, value in changes.items():
        assert f"{name}: {synthetic.GPU[name]!r} in OLD, {value!r} in NEW" in printed.out
        assert name in printed.err
    assert files(rows, rows, "--different-machines", **changes) == 0


def test_other_software_is_said_and_compared(files, capsys):
    rows = synthetic.network()
    assert files(rows, rows, torch="2.14.0", threads=2, date="2026-02-01") == 0
    printed = capsys.readouterr().out
    assert "torch: '2.13.0' in OLD, '2.14.0' in NEW" in printed
    assert "date" not in printed


def test_nothing_to_compare(files, tmp_path, capsys):
    assert files(synthetic.network(), synthetic.memory()) == 2
    assert "no row is in both: 3 rows in OLD, 5 in NEW" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([]))
    assert compare.main([str(broken), str(broken)]) == 2
    assert compare.main([str(tmp_path / "none.json"), str(broken)]) == 2
    assert "none.json" in capsys.readouterr().err
