"""What a contest says: turns, rows, ratios, floors; and what it says of providers that cannot run."""

import math

import pytest
import torch

from benchmarks import contest as contests
from benchmarks.contest import Ceilings, Contest, Cost, Entry, Turn, relative_error
from benchmarks.machine import Machine
from benchmarks.results import Row
from benchmarks.timing import Timed
from tests.benchmarks import toys


def run(contest, providers=None, ceilings=None):
    said = []
    contests.run(contest, Machine("cpu"), providers or contest.providers, ceilings, said.append)
    rows = [message for message in said if isinstance(message[0], Row)]
    return said, rows, {row.provider: row for row, _ in rows}


def test_ratios_and_floors():
    ceilings = Ceilings(bytes_per_second=1e9, flops_per_second=5e8)
    _, _, last = run(toys.contest("ours", "slower"), ceilings=ceilings)
    ours, slower = last["ours"], last["slower"]
    assert ours.speedup is None
    assert slower.speedup == pytest.approx(3.0, rel=0.2)
    assert slower.speedup_quartiles[0] <= slower.speedup <= slower.speedup_quartiles[1]
    assert ours.median_us == pytest.approx(2000, rel=0.2)
    # 10^6 bytes take 1 ms and 10^6 operations 2 ms, of which the larger is the floor.
    assert ours.floor_us == pytest.approx(2000)
    assert ours.fraction_of_floor == pytest.approx(2000 / ours.median_us)
    assert (ours.bytes, ours.flops) == (10**6, 10**6)


def test_numbers_of_a_row():
    """Median and spread of known samples: quartiles 2, 3 and 5 µs."""
    contest = toys.contest("ours")
    entry = Entry(Timed(lambda: None), {"method": "clock"})
    row = contests._row(contest, "ours", entry, [1e-6, 2e-6, 3e-6, 5e-6, 9e-6], Ceilings(1e12, 1e12))
    assert row.median_us == pytest.approx(3.0)
    assert row.spread == pytest.approx(1.0)  # (5 - 2) / 3
    assert row.samples == 5
    assert row.floor_us == pytest.approx(1.0)
    assert row.fraction_of_floor == pytest.approx(1 / 3)
    assert row.method == "clock"


def test_rows_come_before_the_rounds_and_again_after_them():
    said, rows, _ = run(toys.contest("ours", "slower"))
    assert [row.provider for row, _ in rows] == ["ours", "slower", "ours", "slower"]
    assert rows[1][0].speedup is None
    assert rows[3][0].speedup is not None
    assert rows[1][0].samples == 3
    assert rows[3][0].samples == len(rows[3][1]) >= 5
    turns = [message.provider for message in said if isinstance(message, Turn)]
    assert turns[:2] == ["ours", "slower"]
    assert len(turns) == 2 + 2 * rows[3][0].samples


def test_providers_that_cannot_run_are_rows_that_say_why():
    _, _, last = run(toys.contest("raises", "missing", "wrong", "ours"))
    assert last["raises"].status == "failed: ValueError: what a peer says"
    assert last["missing"].status == "skipped: this peer is not installed"
    assert last["wrong"].status == "wrong: not the right result"
    assert all(last[name].median_us is None for name in ("raises", "missing", "wrong"))
    assert last["ours"].ok


def test_without_ours_there_are_times_and_no_ratios():
    _, _, last = run(toys.contest("slower"))
    assert last["slower"].ok
    assert last["slower"].speedup is None


def test_out_of_memory_is_said_in_short(monkeypatch):
    def prepare(provider):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB. And a page of advice")

    _, _, last = run(toys.contest("ours", open=lambda machine: prepare))
    assert last["ours"].status == "failed: out of memory"


def test_a_row_instead_of_an_entry_is_passed_on():
    whole = toys.contest("ours").row("ours", variants=3)
    _, rows, _ = run(toys.contest("ours", open=lambda machine: lambda provider: whole))
    assert rows == [(whole, [])]


def test_facts_of_the_entry_win():
    """A network of another family has no floor, whatever the contest's costs."""
    entry = Entry(Timed(lambda: sum(range(10**5))), {"fraction_of_floor": None, "floor_us": None, "images": 8})
    _, _, last = run(toys.contest("ours", open=lambda machine: lambda provider: entry), ceilings=Ceilings(1e9, 1e9))
    assert (last["ours"].fraction_of_floor, last["ours"].images) == (None, 8)


def test_floor_adds_pieces_each_at_its_own_limit():
    ceilings = Ceilings(bytes_per_second=10.0, flops_per_second=100.0)
    assert ceilings.floor([Cost(20, 100), Cost(1, 50)]) == pytest.approx(2.0 + 0.5)


def test_relative_error_is_that_of_the_worst_tensor():
    right = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert relative_error([right[0].clone(), right[1] + 0.25], right) == pytest.approx(0.25)
    assert relative_error([right[0] + torch.tensor([0.3, 0.4]), right[1]], right) == pytest.approx(0.1)
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert math.isnan(relative_error([torch.tensor([math.nan, 4.0]), right[1]], right))
    assert math.isnan(relative_error([right[1], torch.tensor([math.nan])], [right[1], right[1]]))


def test_status_of_rows_is_checked():
    with pytest.raises(ValueError, match="status is 'fine'"):
        Contest("s", "c", "fp32", ("ours",), open=lambda machine: None).row("ours", status="fine")
