"""Tables and plots of a results file. ``python -m benchmarks.report [FILE] [--out DIR] [--readme]``

Writes ``<stem>.md`` with a table for each suite, and the plots of :mod:`benchmarks.plots`, beside FILE or into DIR.
Without FILE: the newest results in ``benchmarks/results``. ``--readme`` also puts the headline of these into README.md,
between ``<!-- results: start -->`` and ``<!-- results: end -->``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import bars, plots
from benchmarks import results as results_module
from benchmarks.headline import (
    DEPTHWISE,
    GRAPHS,
    NETWORKS,
    STAGES,
    batch,
    blocks,
    by_suite,
    headline,
    is_peer,
    measured,
    of,
    providers,
    stage,
    title,
    without_batch,
)
from benchmarks.results import FALLBACK, META, OURS, OURS_GRAPH, Results, Row, by_contest
from benchmarks.tables import MIB, NONE, number, percent, plain, suite_table, table

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- results: start -->", "<!-- results: end -->"
LINES = 18  # of the README's block, at most
NOTHING_YET = (
    "None measured on a GPU yet. `python -m benchmarks.device_check` measures,\n"
    "`python -m benchmarks.report --readme` writes the results here."
)
CPU = "**CPU: says nothing of a GPU**"
LABELS = {
    "gpu": "",
    "driver": "driver ",
    "torch": "PyTorch ",
    "triton": "Triton ",
    "cudnn": "cuDNN ",
    "commit": "commit ",
}
LEGEND = """\
Times are medians; the spread is the distance of the quartiles / the median. “eager / ours” is the time of eager / the
time of ours, the median over rounds in which both ran, with its quartiles: above 1, ours is faster. The floor is the
time that the measured ceilings allow."""
TAGS = {"speedup": "Speed against each peer", "roofline": "Roofline", "memory": "Memory kept for the backward pass"}


def meta_line(results: Results) -> str:
    """Where the numbers come from, in one line; that of a CPU says so first."""
    parts = [CPU] if results.is_cpu else []
    for name in META:
        value = results.meta[name]
        if value not in (None, ""):
            parts.append(f"{LABELS.get(name, '')}{plain(value)}")
    if results.meta.get("quick"):
        parts.append("a quick run: fewer contests")
    parts += [f"**tests of {name} {plain(said)}**" for name, said in results.tests.items() if _is_news(results, said)]
    return " · ".join(parts)


def _is_news(results: Results, said: str) -> bool:
    """Tests that passed are no news; nor is it that a CPU has no GPU to test."""
    return not said.startswith("passed") and not results.is_cpu


def markdown(results: Results) -> str:
    """The whole report: conditions, a table for each suite, what is missing and why."""
    meta = results.meta
    lines = [f"# Results: {plain(meta['gpu'])}, {meta['date']}, {meta['commit']}", "", meta_line(results), ""]
    lines += [f"Made by `python -m benchmarks.report {results.path.name}`.", LEGEND, ""]
    bad = [row for row in results.rows if not row.ok]
    kinds = [row.status.split(":")[0] for row in bad]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    lines += [f"{len(results.rows)} rows, {len(bad)} of them without a result{f': {counts}' if bad else ''}.", ""]
    if not results.is_cpu:
        lines += ["## What was to be reached", "", *bars.table(results), ""]
    left_out = plots.missing(results)
    for plot in plots.PLOTS:
        if plot in left_out:
            lines += [f"No plot “{plot}”: {left_out[plot]}.", ""]
        else:
            lines += [_image(results, plot, ""), ""]
    for suite, rows in by_suite(results.rows).items():
        lines += [f"## {plain(title(suite))}", "", *suite_table(suite, rows), ""]
    if results.tests:
        lines += ["## Tests", "", *table(["tests", "outcome"], [[key, str(v)] for key, v in results.tests.items()]), ""]
    if results.left:
        lines += ["## Left out, for want of time", "", *(f"- {plain(what)}" for what in results.left), ""]
    others = [[key, str(value)] for key, value in results.meta.items() if key not in META]
    if others:
        lines += ["## Conditions", "", *table(["field", "value"], others), ""]
    return "\n".join(lines)


def readme_block(results: Results | None, folder: str = "benchmarks/results/") -> str:
    """What stands between the markers of README.md. It depends on the content and the name of the file alone.

    ``folder``: where the file and its plots are, as seen from the README.
    """
    if results is None:
        return NOTHING_YET
    lines = [meta_line(results), ""]
    headlines = _headlines(results)
    if headlines:
        lines += [
            *table(["", "dtype", "ours", "of the floor", "others / ours (above 1, ours is ahead)"], headlines),
            "",
        ]
    drawn = [plot for plot in plots.PLOTS if plot not in plots.missing(results)]
    if drawn:
        lines += [" ".join(_image(results, plot, folder) for plot in drawn), ""]
    silent = sum(not row.ok for row in results.rows)
    lines.append(
        f"Measured by `{results.meta.get('by', 'unknown')}`. All {len(results.rows)} rows, {silent} of them without a "
        f"result: [report]({folder}{results.path.stem}.md)."
    )
    assert len(lines) <= LINES, f"the README's block has {len(lines)} lines; {LINES} are allowed"
    return "\n".join(lines)


def _image(results: Results, plot: str, folder: str) -> str:
    return f"![{TAGS[plot]}]({folder}{plots.file_name(results, plot)})"


def _headlines(results: Results) -> list[list[str]]:
    """Lines of the README's table: each depthwise pass, two networks of each kind, memory; of what there is."""
    suites, lines = by_suite(results.rows), []
    for suite in DEPTHWISE:
        if suite in suites:
            lines.append(_headline(title(suite), headline(suites[suite]), _times))
    for suite in NETWORKS:
        for contest in headline(suites.get(suite, []), limit=2):
            lines.append(_headline(f"{title(suite)}, {contest[0].case}", [contest], _speeds))
    lines += _latency(suites.get("model_inference", []))
    memory = suites.get("memory", [])
    for contests, name, field in (
        (headline(blocks(memory)), "Kept by a block for its backward pass", "saved_bytes"),
        (headline(blocks(memory, wanted=False), limit=1), "Peak of a training step", "peak_bytes"),
    ):
        if any(measured(row, field) is not None for contest in contests for row in contest):
            lines.append(_headline(name, contests, _sizes(field), field))
    return lines


def _latency(rows: list[Row]) -> list[list[str]]:
    """The first case of networks in CUDA graphs, those of others against ours."""
    for (_, case, dtype), contest in by_contest(rows).items():
        graph = of(contest, OURS_GRAPH)
        peers = [row for row in contest if row.provider in GRAPHS and measured(row, "over_graph") is not None]
        if measured(graph) is not None and peers:
            name = f"{title('model_inference')}, {case}, in CUDA graphs"
            said = ", ".join(f"{row.provider} {number(row.over_graph)}" for row in peers)
            floor = percent(measured(graph, "fraction_of_floor"))
            return [[name, dtype, _times([graph]) + _mark([graph]), floor, said]]
    return []


def _mark(ours: list[Row | None]) -> str:
    """What is to be known of numbers of ours, wherever they stand."""
    ours = [row for row in ours if row is not None and row.ok]
    said = f", {FALLBACK}" if any(FALLBACK in (row.note or "") for row in ours) else ""
    return said + (", tests not through" if any(row.untested for row in ours) else "")


def _headline(name: str, cases: list[list[Row]], text, field: str = "median_us") -> list[str]:
    """A line of the headline table: one case, or several with what each came to and the range of the ratios."""
    ours = [of(contest, OURS) for contest in cases]
    if len(cases) > 1 or field != "median_us":
        name += ": " + _several([contest[0].case for contest in cases])
    own = text(ours)
    if any(row is not None and row.ok and row.ran == "torch" for row in ours):
        own += ", on PyTorch's kernels"
    own += _mark(ours)
    floors = [share for row in ours if (share := measured(row, "fraction_of_floor")) is not None]
    peers = []
    for peer in providers(row for contest in cases for row in contest):
        # Ours in another way is worth a comparison where it is made to save memory.
        if is_peer(peer) or (field != "median_us" and peer != OURS):
            rows = [of(contest, peer) for contest in cases]
            ratios = [_ratio(row, own_row, field) for row, own_row in zip(rows, ours, strict=True)]
            peers.append(f"{peer} {_range([ratio for ratio in ratios if ratio is not None], number, len(cases))}")
    floor = _range(floors, percent, len(cases)) if floors else NONE
    return [name, cases[0][0].dtype, own, floor, ", ".join(peers) or NONE]


def _several(cases: list[str]) -> str:
    """ConvNeXt-T's convolutions by their maps; other cases by their names."""
    batches = {batch(case) for case in cases}
    if all(stage(case) is not None for case in cases):
        sizes = [STAGES[stage(case)] for case in cases]
        said = "7×7 on " + ", ".join(f"{channels}×{rows}×{rows}" for channels, rows in sizes)
    else:
        said = "; ".join(without_batch(case) for case in cases)
    return said + (f", N={batches.pop()}" if len(batches) == 1 and batches != {0} else "")


def _ratio(row: Row | None, ours: Row | None, field: str) -> float | None:
    if field == "median_us":
        return measured(row, "speedup")
    size, own = measured(row, field), measured(ours, field)
    return size / own if size is not None and own else None


def _range(values: list[float], text, cases: int) -> str:
    """The smallest and the largest; how many there are, where some are missing."""
    if not values:
        return "without a number"
    low, high = text(min(values)), text(max(values))
    few = f" ({len(values)} of {cases})" if len(values) < cases else ""
    return f"{low if low == high else f'{low} to {high}'}{few}"


def _each(rows: list[Row | None], text, unit: str) -> str:
    """Numbers with their unit; where there is none, the kind of failure."""
    said = [text(row) if row is not None and row.ok else row.status.split(":")[0] if row else NONE for row in rows]
    return " · ".join(said) + (f" {unit}" if any(row is not None and row.ok for row in rows) else "")


def _times(rows: list[Row | None]) -> str:
    return _each(rows, lambda row: number(measured(row)), "µs")


def _speeds(rows: list[Row | None]) -> str:
    if not all(row is not None and row.images for row in rows):
        return _times(rows)
    return _each(rows, lambda row: number(row.images_per_second), "images/s")


def _sizes(field: str):
    def said(row: Row) -> str:
        size = measured(row, field)
        return NONE if size is None else number(size / MIB)

    return lambda rows: _each(rows, said, "MiB")


def block_of(text: str, name: str = "README.md") -> tuple[int, int]:
    """Where the block between the markers begins and ends.

    Raises:
        ValueError: there is not exactly one of each, in this order, each on a line of its own.
    """
    lines = text.splitlines()
    counts = {marker: lines.count(marker) for marker in (START, END)}
    if set(counts.values()) != {1} or lines.index(START) > lines.index(END):
        found = " and ".join(f"{count} lines {marker}" for marker, count in counts.items())
        raise ValueError(f"{name} has {found}; one of each is needed, the start first, the results go between them")
    return text.index(START + "\n") + len(START) + 1, text.index("\n" + END) + 1


def with_block(text: str, block: str, name: str = "README.md") -> str:
    """The README with this block between its markers."""
    begin, end = block_of(text, name)
    return text[:begin] + block + "\n" + text[end:]


def write(results: Results, folder: Path) -> list[Path]:
    """Writes the report, then the plots; returns the files.

    Raises:
        ImportError: matplotlib is not installed; the report is written nevertheless.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{results.path.stem}.md"
    report.write_text(markdown(results))
    return [report, *plots.draw(results, folder)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: the newest in benchmarks/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where report and plots go; default: beside FILE")
    parser.add_argument("--readme", action="store_true", help="write the headline of the newest results into README.md")
    arguments = parser.parse_args(argv)
    if arguments.readme and (arguments.file or arguments.out):
        parser.error("--readme shows the newest results, with plots beside them: neither FILE nor --out is allowed")
    try:
        return _run(arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    file = arguments.file or results_module.newest(results_module.FOLDER)
    text = README.read_text() if arguments.readme else ""
    if arguments.readme:
        block_of(text)  # refuses before anything is written
    if file is None and not arguments.readme:
        raise ValueError(
            f"there are no results in {results_module.FOLDER}, and no FILE is named; "
            "`python -m benchmarks.device_check` measures"
        )
    results = None if file is None else Results.read(file)
    if results is not None:
        for path in write(results, arguments.out or file.parent):
            print(path)
        for plot, reason in plots.missing(results).items():
            print(f"no plot {plot}: {reason}")
    if arguments.readme:
        README.write_text(with_block(text, readme_block(results)))
        print(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
