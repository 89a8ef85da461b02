"""What is drawn is what was measured; and of many cases, those that stand for all."""

import dataclasses

import pytest

from benchmarks import headline, plots
from benchmarks.results import OURS, Row
from tests.benchmarks import synthetic


@pytest.fixture
def gpu(tmp_path):
    return synthetic.results(tmp_path, synthetic.everything())


# What stands for many


def test_headline_is_one_dtype_and_the_largest_batch():
    rows = [*synthetic.depthwise(dtype="fp32"), *synthetic.depthwise(n=32), *synthetic.depthwise(n=128)]
    rows += [dataclasses.replace(row, case=row.case.replace("7×7 N", "5×5 N")) for row in rows[-3:]]
    rows.reverse()
    chosen = headline.headline(rows)
    assert [contest[0].key[1:3] for contest in chosen] == [
        (f"C={c} {h}×{h} 7×7 N=128", "bf16") for c, h in synthetic.MAPS
    ]
    others = [dataclasses.replace(row, case=f"{name} N={n}") for row in rows[:1] for name in "abc" for n in (8, 16)]
    assert [contest[0].case for contest in headline.headline(others, limit=2)] == ["a N=16", "b N=16"]
    assert headline.headline([]) == []
    for first, second in (("amp_bf16", "fp16"), ("fp16", "fp32"), ("fp32", "int8")):
        rows = [*synthetic.depthwise(dtype=second), *synthetic.depthwise(dtype=first)]
        assert {contest[0].dtype for contest in headline.headline(rows)} == {first}


@pytest.mark.parametrize("suite, dtype", [("model_training", "amp_bf16"), ("model_inference", "bf16")])
def test_networks_are_trained_under_autocast(suite, dtype):
    rows = synthetic.network(suite)
    rows += [dataclasses.replace(row, dtype="bf16") for row in rows]
    ((ours, *_),) = headline.headline(rows)
    assert (ours.provider, ours.dtype) == (OURS, dtype)


def test_stages():
    stages = ["C=96 56×56 7×7 N=1", "block C=768 7×7 7×7", "C=96 28×28 7×7", "C=96 56×28 7×7", "C=96 56×56 3×3"]
    assert [headline.stage(case) for case in stages] == [0, 3, None, None, None]


def test_known_names_come_first_in_a_fixed_order():
    rows = [Row(suite, "case", name, "bf16") for suite in ("new", "host") for name in ("x", "timm", "ours", "eager")]
    assert headline.providers(rows) == ["ours", "eager", "timm", "x"]
    assert list(headline.by_suite(rows)) == ["host", "new"]


# Plots


def test_speedups_are_those_of_peers_and_not_too_many(tmp_path):
    suites = (*headline.DEPTHWISE, *headline.COMPOSITIONS, *headline.NETWORKS, *(f"new {at}" for at in range(9)))
    rows = []
    for suite in suites:
        rows += [*synthetic.depthwise(suite), *synthetic.depthwise(suite, n=8)]
    panels = plots.speedups(synthetic.results(tmp_path, [*rows, *synthetic.network("new 0")]))
    assert sum(len(panel.cases) for panel in panels) == 24
    assert [len(panel.cases) for panel in panels] == [4, 4, 4, *[2] * 6]
    assert [(row.provider, row.speedup) for row in panels[0].cases[1]] == [("eager", 3.0), ("compile", 0.5)]
    assert [row.provider for row in panels[0].cases[3]] == ["eager"]  # compile failed
    (panel,) = plots.speedups(synthetic.results(tmp_path, synthetic.network()))
    assert [row.provider for row in panel.cases[0]] == ["timm"]


def test_points_of_the_roofline(gpu):
    points = {(point.row.suite, point.row.case[:5], point.row.provider): point for point in plots.points(gpu)}
    ours = points["depthwise_forward", "C=192", OURS]
    assert (ours.intensity, ours.rate) == pytest.approx((24.5, 49.0))
    assert points["depthwise_forward", "C=192", "eager"].rate == pytest.approx(49 / 3)
    assert points["model_training", "convn", OURS].rate == pytest.approx(40)
    assert ("model_training", "convn", "ours_compile") not in points
    (copy, bandwidth), (matmul, rate) = (found[0] for found in plots.limits(gpu))
    assert (copy.case, bandwidth, matmul.case, rate) == ("copy", 3e12, "matmul", 7e14)


def test_memory_is_that_of_blocks(gpu):
    ((ours, lean, eager),) = plots.kept(gpu)
    assert (ours.provider, lean.provider, eager.provider) == (OURS, "ours_lean", "eager")
    assert eager.saved_bytes == 75 * 2**20


def test_intervals_of_quartiles():
    row = synthetic.network()[1]
    assert plots._interval(row) == (1.125, 1.25, 1.5)
    for unknown in (None, (None, None)):
        assert plots._interval(dataclasses.replace(row, speedup_quartiles=unknown)) == (1.25, 1.25, 1.25)


@pytest.mark.parametrize(
    "meta, said",
    [
        (synthetic.GPU, "NVIDIA H100 80GB HBM3, 2026-01-02, 0123abcd"),
        (synthetic.CPU, "CPU Some Processor, says nothing of a GPU, 2026-01-02, 0123abcd"),
        (
            synthetic.CPU | {"gpu": "x86", "quick": True},
            "CPU, x86, says nothing of a GPU, 2026-01-02, 0123abcd, quick run",
        ),
    ],
)
def test_titles_say_which_machine(tmp_path, meta, said):
    figure = pytest.importorskip("matplotlib.figure")
    results = synthetic.results(tmp_path, synthetic.everything(), meta)
    for paint in (plots._draw_speedup, plots._draw_roofline, plots._draw_memory):
        drawn = figure.Figure()
        paint(drawn, results)
        titles = [drawn.get_suptitle(), *(axes.get_title() for axes in drawn.axes)]
        assert any(title.endswith("\n" + said) for title in titles), titles


def test_bars_are_as_long_as_the_numbers(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = figure.Figure()
    plots._draw_speedup(drawn, synthetic.results(tmp_path, synthetic.depthwise()))
    ends = [bar.get_x() + bar.get_width() for bar in drawn.axes[0].patches]
    assert ends == pytest.approx([2, 1.5, 3, 0.5, 4, 5])
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts[:3] == ["C=96 56×56 7×7 N=128", "2.00×", "1.50×"]
    low, high = drawn.axes[0].get_xlim()
    assert low < 0.45
    assert high > 6.0
