"""Reports say what the results file says: the right number in the right place, and nothing left out in silence."""

import builtins
import dataclasses
import hashlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks import plots, report, tables
from benchmarks import results as results_module
from benchmarks.report import END, START, readme_block
from benchmarks.results import OURS, Results, Row, newest
from tests.benchmarks import synthetic

ROOT = Path(__file__).parents[2]


def table_of(text: str, title: str = "") -> list[dict[str, str]]:
    """The first table after a heading, a dictionary for each line; cells of columns with the same head are joined."""
    lines = text[text.index(f"## {title}\n") if title else 0 :].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("|"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    head, rule, *rows = cells
    assert set(rule) == {"---"}
    assert all(len(row) == len(head) for row in rows)
    found = []
    for row in rows:
        line: dict[str, str] = {}
        for name, cell in zip(head, row, strict=True):
            line[name] = f"{line[name]}, {cell}" if name in line else cell
        found.append(line)
    return found


@pytest.fixture
def gpu(tmp_path):
    return synthetic.results(tmp_path, synthetic.everything())


# README.md


def test_readme_shows_the_newest_results():
    """Else: python -m benchmarks.report --readme"""
    text = (ROOT / "README.md").read_text()
    begin, end = report.block_of(text)
    path = newest()
    results = None if path is None else Results.read(path)
    assert text[begin:end] == readme_block(results) + "\n"
    if path is not None:
        assert path.with_suffix(".md").read_text() == report.markdown(results)
    for image in re.findall(r"\]\((benchmarks/results/[^)]+)\)", text[begin:end]):
        assert (ROOT / image).exists(), image
        if image.endswith(".svg"):
            assert plots.source(path) in (ROOT / image).read_text(), f"{image} was not made from {path.name}"


def test_readme_block_without_results_names_the_command():
    assert readme_block(None).startswith("None measured on a GPU yet")
    assert "`python -m benchmarks.device_check`" in readme_block(None)


def test_readme_block_has_the_numbers_of_the_file(gpu):
    block = readme_block(gpu)
    assert block.startswith("NVIDIA H100 80GB HBM3 · driver 570.1 · PyTorch 2.13.0 · Triton 3.6.0 · cuDNN 91002 ·")
    assert len(block.splitlines()) <= 18
    rows = {row[""]: row for row in table_of(block)}
    assert len(rows) == 7
    forward = rows["Depthwise, forward: 7×7 on 96×56×56, 192×28×28, 384×14×14, 768×7×7, N=128"]
    assert forward["dtype"] == "bf16"
    assert forward["ours"] == "100 · 50.0 · 25.0 · 12.5 µs"
    assert forward["of the floor"] == "50 % to 80 %"
    ratios = "others / ours (above 1, ours is ahead)"
    assert forward[ratios] == "eager 2.00 to 5.00, compile 0.50 to 1.50 (2 of 4)"
    training = rows["Networks, training step, convnext_tiny 224 N=256"]
    assert (training["ours"], training["of the floor"], training[ratios]) == ("2560 images/s", "40 %", "timm 1.25")
    assert rows["Networks, inference, convnext_tiny 224 N=256"]["ours"] == "10240 images/s"
    kept = rows["Kept by a block for its backward pass: 7×7 on 96×56×56, N=32"]
    assert (kept["ours"], kept[ratios]) == ("30.0 MiB", "ours_lean 0.50, eager 2.50")
    peak = rows["Peak of a training step: convnext_tiny 224, N=64"]
    assert (peak["ours"], peak[ratios]) == ("1000 MiB", "channels_last 1.50")
    failed = sum(not row.ok for row in gpu.rows)
    assert f"All {len(gpu.rows)} rows, {failed} of them without a result: [report](benchmarks/results/nvidia-" in block
    for plot in ("speedup", "roofline", "memory"):
        assert f"](benchmarks/results/{gpu.path.stem}-{plot}.svg)" in block


def test_readme_block_hides_neither_failure_nor_fallback(tmp_path):
    rows = synthetic.depthwise()
    ours = [at for at, row in enumerate(rows) if row.provider == OURS]
    rows[ours[0]] = Row(*rows[ours[0]].key[:2], OURS, "bf16", status="wrong: 0.3 away")
    rows[ours[1]] = dataclasses.replace(rows[ours[1]], ran="torch")
    (row,) = table_of(readme_block(synthetic.results(tmp_path, rows)))
    assert row["ours"] == "wrong · 50.0 · 25.0 · 12.5 µs, on PyTorch's kernels"
    assert row["of the floor"] == "60 % to 80 % (3 of 4)"


def test_readme_block_and_tables_say_what_is_not_tested_or_not_on_tensor_cores(tmp_path):
    rows = synthetic.depthwise()
    note = "not on tensor cores: Triton 3 does not compile a kernel"
    rows[0] = dataclasses.replace(rows[0], untested="all, depthwise", note=note)
    results = synthetic.results(tmp_path, rows)
    results.tests = {"depthwise": "unfinished: 0", "block": "passed: 3"}
    block, text = readme_block(results), report.markdown(results)
    assert "**tests of depthwise unfinished: 0**" in block.splitlines()[0]
    assert "**tests of depthwise unfinished: 0**" in text
    (row,) = table_of(block)
    assert row["ours"].endswith(" µs, not on tensor cores, tests not through")
    assert "Tests were not through, of:\n\n- ours, `all, depthwise`, 1 of 4 cases: C=96 56×56 7×7 N=128 bf16" in text
    assert f"- ours, `{note}`, 1 of 4 cases: C=96" in text
    assert "Besides" not in text


def test_cuda_graphs_are_compared_with_ours_in_one(tmp_path):
    ours = dataclasses.replace(synthetic.network("model_inference", 800.0, n=1)[0], dtype="bf16")
    graph = synthetic.peer(ours, "ours_graph", 0.5, fraction_of_floor=0.25)
    others = [synthetic.peer(ours, name, 1.0, over_graph=2.0) for name in ("reduce_overhead", "compile")]
    rows = [*synthetic.everything(), ours, graph, *others]
    results = synthetic.results(tmp_path, rows)
    block, text = readme_block(results), report.markdown(results)
    assert len(block.splitlines()) <= report.LINES
    (row,) = [row for row in table_of(block) if row[""].endswith("in CUDA graphs")]
    assert list(row.values()) == [
        "Networks, inference, convnext_tiny 224 N=1, in CUDA graphs", "bf16", "400 µs", "25 %", "reduce_overhead 2.00",
    ]  # fmt: skip
    assert "- convnext_tiny 224 N=1 bf16: reduce_overhead / ours_graph 2.00\n" in text


def test_readme_block_of_a_cpu_says_so_first(tmp_path):
    block = readme_block(synthetic.results(tmp_path, synthetic.network(), synthetic.CPU | {"quick": True}))
    assert block.startswith("**CPU: says nothing of a GPU** · CPU Some Processor · PyTorch 2.13.0")
    assert block.splitlines()[0].endswith("2026-01-02 · a quick run: fewer contests")
    assert "driver" not in block
    assert "memory.svg" not in block


def test_readme_block_of_a_file_without_rows(tmp_path):
    block = readme_block(synthetic.results(tmp_path))
    assert "All 0 rows" in block
    assert "|" not in block
    assert "![" not in block


def test_readme_block_depends_on_nothing_but_the_file(gpu, tmp_path):
    copy = tmp_path / "elsewhere" / gpu.path.name
    copy.parent.mkdir()
    copy.write_bytes(gpu.path.read_bytes())
    assert readme_block(Results.read(copy)) == readme_block(gpu)


def test_readme_block_replaces_what_stood_between_the_markers():
    text = f"# A\n\n{START}\nold\nlines\n{END}\n\nrest {START}\n"
    assert report.with_block(text, "new") == f"# A\n\n{START}\nnew\n{END}\n\nrest {START}\n"
    assert report.with_block(f"{START}\n{END}\n", "new") == f"{START}\nnew\n{END}\n"


MARKERS = {
    "none": "text\n",
    "no end": f"{START}\n",
    "end first": f"{END}\n{START}\n",
    "two starts": f"{START}\n{START}\n{END}\n",
    "inside of a line": f"- {START}\n{END}\n",
}


@pytest.mark.parametrize("text", MARKERS.values(), ids=MARKERS)
def test_readme_without_markers_is_refused(text, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    synthetic.results(tmp_path, synthetic.network())
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results_module, "FOLDER", tmp_path)
    assert report.main(["--readme"]) == 2
    assert "one of each is needed" in capsys.readouterr().err
    assert readme.read_text() == text
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}  # nothing was written


# Tables


def test_a_line_has_the_numbers_of_its_case(gpu):
    rows = table_of(report.markdown(gpu), "Depthwise, forward")
    assert len(rows) == 12
    first, second, third = rows[:3]
    assert first == {
        "case": "C=96 56×56 7×7 N=128", "dtype": "bf16", "ours, µs (spread)": "100 (1.2 %)", "of the floor": "50 %",
        "ran on": "triton", "eager / ours": "2.00 (1.80 to 2.40)", "compile / ours": "1.50 (1.35 to 1.80)",
    }  # fmt: skip
    assert (second["ours, µs (spread)"], second["compile / ours"]) == ("50.0 (1.2 %)", "0.50 (0.45 to 0.60)")
    assert (third["eager / ours"], third["compile / ours"]) == ("4.00 (3.60 to 4.80)", "failed")
    assert [row["dtype"] for row in rows[8:]] == ["fp32"] * 4


def test_networks_are_shown_in_images(gpu):
    (row,) = table_of(report.markdown(gpu), "Networks, training step")
    assert row["ours, images/s (spread)"] == "2560 (0.4 %)"
    assert row["timm / ours"] == "1.25 (1.12 to 1.50), 2048/s"
    assert row["ours_compile / ours"] == "0.80 (0.72 to 0.96), 3200/s"


def test_memory_is_shown_in_mib_and_against_ours(gpu):
    rows = {
        (row["case"][:5], row["provider"]): row for row in table_of(report.markdown(gpu), "Memory of a training step")
    }
    eager, lean = rows["block", "eager"], rows["block", "ours_lean"]
    assert (eager["kept for backward, MiB"], eager["peak, MiB"], eager["/ ours"]) == ("75.0", "100", "2.50, 1.25")
    assert (lean["kept for backward, MiB"], lean["/ ours"]) == ("15.0", "0.50, 0.75")
    assert rows["block", OURS]["/ ours"] == "–, –"
    assert rows["convn", "channels_last"]["peak, MiB"] == "1500"


def test_shapes_of_the_other_suites(gpu):
    text = report.markdown(gpu)
    (host,) = table_of(text, "Host time of a call")
    assert (host[OURS], host["eager"]) == ("12.3 µs (3.0 %)", "8.76 µs (4.0 %)")
    (cold,) = table_of(text, "Cold start")
    assert (cold[OURS], cold["compile"]) == ("4.50 s", "40.5 s")
    ours, compiled = table_of(text, "Variants that are compiled")
    assert (ours["variants"], ours["ms of a size, compilation included"]) == ("6", "5.30")
    assert compiled["variants"] == "timeout"
    copy, matmul = table_of(text, "Ceilings of this machine")
    assert (copy["case"], copy["rate (spread)"], copy["unit"]) == ("copy", "3000 (1.0 %)", "GB/s")
    assert (matmul["dtype"], matmul["rate (spread)"], matmul["unit"]) == ("bf16", "700 (2.0 %)", "TFLOP/s")


def test_an_unknown_suite_is_shown_with_all_it_has(gpu):
    text = report.markdown(gpu)
    good, bad = table_of(text, "of_tomorrow")
    assert good == {
        "case": "a case", "dtype": "int8", "provider": "somebody", "median_us": "3.25", "status": "ok", "rate": "17.5",
        "unit": "widgets/s", "note": "hm",
    }  # fmt: skip
    assert bad["status"] == "crashed: signal 11"
    assert text.index("## of_tomorrow") > text.index("## Ceilings")


def test_a_field_that_a_shape_does_not_show_is_shown_besides(tmp_path):
    rows = synthetic.network()
    rows[0] = dataclasses.replace(rows[0], peak_bytes=123456789)
    text = report.markdown(synthetic.results(tmp_path, rows))
    (row,) = table_of(text[text.index("Besides:") :])
    assert (row["provider"], row["peak_bytes"]) == (OURS, "123456789")


def test_what_has_no_number_is_listed_with_its_reason(gpu, tmp_path):
    text = report.markdown(gpu)
    reason = "`failed: RuntimeError: <lambda> | no 'memory'`"
    cases = "C=384 14×14 7×7 N=128 bf16; C=768 7×7 7×7 N=128 bf16; C=384 14×14 7×7 N=32 bf16"
    assert f"- compile, {reason}, 6 of 12 cases: {cases}; " in text
    assert "- compile, `timeout: 240 s`, 1 of 1 cases: forward, 200 sizes bf16" in text
    assert "- nobody, `crashed: signal 11`, 1 of 1 cases: a case int8" in text
    assert f"{len(gpu.rows)} rows, 12 of them without a result: 10 failed, 1 timeout, 1 crashed." in text
    silent = Row("host", "case", OURS, "bf16", median_us=float("nan"))
    text = report.markdown(synthetic.results(tmp_path, [silent], name="silent.json"))
    assert "- ours, `ok, but without a number`, 1 of 1 cases: case bf16" in text


def test_a_reason_of_many_cases_names_a_dozen(tmp_path):
    rows = [Row("host", f"case {at}", OURS, "bf16", status="failed: " + "x" * 400) for at in range(15)]
    (line,) = [line for line in report.markdown(synthetic.results(tmp_path, rows)).splitlines() if line[:2] == "- "]
    assert line.startswith(f"- ours, `failed: {'x' * 291}…`, 15 of 15 cases: case 0 bf16; case 1 bf16; ")
    assert line.endswith("; case 11 bf16; and 3 more")


def test_peers_without_ours_show_their_time(tmp_path):
    ours, eager, _ = synthetic.depthwise()[:3]
    alone = dataclasses.replace(eager, speedup=None, speedup_quartiles=None)
    refused = Row(*ours.key[:2], OURS, "bf16", status="refused: tests failed")
    (row,) = table_of(report.markdown(synthetic.results(tmp_path, [refused, alone])), "Depthwise, forward")
    assert (row["ours, µs (spread)"], row["eager / ours"]) == ("refused", "200 µs")
    wrong = dataclasses.replace(eager, status="wrong: 0.5 away")
    (row,) = table_of(report.markdown(synthetic.results(tmp_path, [ours, wrong])), "Depthwise, forward")
    assert row["eager / ours"] == "wrong"


def test_conditions_tests_notes_methods_and_what_is_left(tmp_path):
    results = synthetic.results(tmp_path, synthetic.everything())
    results.tests, results.left = {"depthwise": "passed: 180 | all"}, ["block_training: C=96 56×56"]
    text = report.markdown(results)
    assert table_of(text, "Tests") == [{"tests": "depthwise", "outcome": "passed: 180 \\| all"}]
    assert "## Left out, for want of time\n\n- block_training: C=96 56×56" in text
    conditions = {row["field"]: row["value"] for row in table_of(text, "Conditions")}
    assert conditions == {"time": "10:00:00", "device": "cuda", "quick": "False", "threads": "8"}
    assert "- ours, `second 0.2 s`, 1 of 1 cases: convnext_tiny 224 N=8 amp_bf16" in text
    assert "- Timed with a CUDA graph, time of the GPU (ours, eager, compile)." in text
    assert "in fp32 or wider: ours 0.001, eager 0.001, compile 0.001" in text


@pytest.mark.parametrize(
    "value, text",
    [
        *((None, "–"), (float("nan"), "–"), (0.0, "0.00"), (0.01234, "0.0123"), (0.9951, "1.00"), (9.994, "9.99")),
        *((9.996, "10.0"), (99.94, "99.9"), (99.96, "100"), (12345.6, "12346"), (-2.5, "-2.50")),
    ],
)
def test_numbers(value, text):
    assert tables.number(value) == text


def test_percent():
    assert [tables.percent(value) for value in (None, 0.0042, 0.0996, 0.714, 1.04)] == [
        "–",
        "0.4 %",
        "10 %",
        "71 %",
        "104 %",
    ]


# The command


def test_command_writes_report_and_plots(gpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    assert report.main([str(gpu.path), "--out", str(out)]) == 0
    stem = gpu.path.stem
    plotted = {f"{stem}-{plot}.{suffix}" for plot in plots.PLOTS for suffix in ("svg", "png")}
    assert {path.name for path in out.iterdir()} == {f"{stem}.md", *plotted}
    assert set(capsys.readouterr().out.split()) == {str(path) for path in out.iterdir()}
    assert (out / f"{stem}.md").read_text() == report.markdown(gpu)
    sha = hashlib.sha256(gpu.path.read_bytes()).hexdigest()
    first = {path: path.read_bytes() for path in out.iterdir()}
    assert all(sha.encode() in content for content in first.values() if content.startswith(b"<?xml"))
    assert all(content.startswith(b"\x89PNG") for path, content in first.items() if path.suffix == ".png")
    assert report.main([str(gpu.path), "--out", str(out)]) == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == first


def test_plots_without_rows_are_not_drawn_and_old_ones_go(gpu, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plots.draw(gpu, tmp_path)
    assert len(list(tmp_path.glob("*.svg"))) == 3
    few = synthetic.results(tmp_path, [row for row in synthetic.network() if row.provider == "ours"])
    assert report.main([str(few.path)]) == 0
    assert [path.name for path in tmp_path.glob("*.svg")] == [f"{few.path.stem}-roofline.svg"]
    printed = capsys.readouterr().out
    assert "no plot speedup: no peer was timed in rounds with ours" in printed
    assert "no plot memory: no block has saved bytes" in printed
    assert "No plot “memory”: no block has saved bytes." in (tmp_path / f"{few.path.stem}.md").read_text()


def test_command_takes_the_newest_results_and_fills_the_readme(gpu, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n{START}\n{END}\nrest\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results_module, "FOLDER", tmp_path)
    synthetic.results(tmp_path, meta=synthetic.CPU)
    assert report.main(["--readme"]) == 0
    assert readme.read_text() == f"# A\n{START}\n{readme_block(gpu)}\n{END}\nrest\n"
    assert all(plots.source(gpu.path) in path.read_text() for path in tmp_path.glob("*.svg"))
    assert len(list(tmp_path.glob("*.svg"))) == 3
    once = readme.read_text()
    assert report.main(["--readme"]) == 0
    assert readme.read_text() == once
    with pytest.raises(SystemExit):
        report.main(["--readme", str(gpu.path)])
    assert "neither FILE nor --out is allowed" in capsys.readouterr().err


def test_command_without_results(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{START}\nold\n{END}\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(results_module, "FOLDER", tmp_path)
    assert report.main([]) == 2
    assert "there are no results" in capsys.readouterr().err
    assert report.main(["--readme"]) == 0
    assert readme.read_text() == f"{START}\n{readme_block(None)}\n{END}\n"
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_command_without_matplotlib_says_what_to_install(gpu, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert report.main([str(gpu.path)]) == 2
    assert 'pip install "convnext-fast[bench]"' in capsys.readouterr().err
    assert gpu.path.with_suffix(".md").read_text() == report.markdown(gpu)


def test_bench_extra_has_what_the_error_names():
    assert re.search(r'"bench": \[.*"matplotlib', (ROOT / "setup.py").read_text())
