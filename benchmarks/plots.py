"""Plots of a results file, as SVG and PNG: speed against each peer, the roofline, memory.

Each SVG says in its description which results file it was made from, by SHA-256. The same file and the same matplotlib
give the same bytes. What is drawn of many cases is what :func:`benchmarks.headline.headline` picks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from benchmarks.headline import DEPTHWISE, blocks, by_suite, headline, is_peer, measured, of, providers, title
from benchmarks.results import OURS, Results, Row
from benchmarks.tables import MIB, number

PLOTS = ("speedup", "roofline", "memory")
GROUPS = 24  # cases of one plot, at most
CASES = 2  # of one suite; depthwise convolutions: each stage of ConvNeXt-T
COLUMNS = 3  # of panels
INSTALL = 'plots need matplotlib, which is not installed: pip install "convnext-fast[bench]"'
# Okabe and Ito's, told apart with any kind of colour vision; a provider has one colour in all plots.
COLOURS = {
    OURS: "#0072B2", "eager": "#E69F00", "channels_last": "#56B4E9", "compile": "#009E73", "max_autotune": "#8A7F00",
    "timm": "#D55E00", "timm_compile": "#CC79A7", "swin_tiny": "#000000", "vit_small": "#666666", "resnet50": "#999999",
}  # fmt: skip
OTHERS = "#444444"
MARKERS = "osD^v<>P*Xhp"
BYTES_PER_SECOND = {"GB/s": 1e9, "TB/s": 1e12, "GiB/s": 2**30}
FLOPS_PER_SECOND = {"GFLOP/s": 1e9, "TFLOP/s": 1e12}


class Panel(NamedTuple):
    """The bars of one suite: for each case, the rows of the peers that were compared with ours."""

    suite: str
    cases: list[list[Row]]


class Point(NamedTuple):
    """One row in the roofline: FLOPs per byte, TFLOP/s."""

    row: Row
    intensity: float
    rate: float


def file_name(results: Results, plot: str, suffix: str = "svg") -> str:
    return f"{results.path.stem}-{plot}.{suffix}"


def source(path: Path) -> str:
    """What the SVGs of a results file carry: which file it was, and what was in it."""
    return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def speedups(results: Results) -> list[Panel]:
    """At most :data:`GROUPS` cases in which a peer was timed in rounds with ours."""
    panels, left = [], GROUPS
    for suite, rows in by_suite(results.rows).items():
        cases = []
        for contest in headline(rows, 4 if suite in DEPTHWISE else CASES)[:left]:
            peers = [of(contest, name) for name in providers(contest) if is_peer(name)]
            peers = [row for row in peers if measured(row, "speedup")]
            if peers:
                cases.append(peers)
        left -= len(cases)
        if cases:
            panels.append(Panel(suite, cases))
    return panels


def points(results: Results) -> list[Point]:
    """The cases that stand for each suite, ours and peers, where bytes, FLOPs and time are known."""
    found = []
    for suite, rows in by_suite(results.rows).items():
        for contest in headline(rows, 4 if suite in DEPTHWISE else CASES):
            for row in contest:
                time = measured(row)
                if time and row.flops and row.bytes and (row.provider == OURS or is_peer(row.provider)):
                    found.append(Point(row, row.flops / row.bytes, row.flops / time / 1e6))
    return found


def limits(results: Results) -> tuple[list[tuple[Row, float]], list[tuple[Row, float]]]:
    """The measured ceilings: bandwidths in bytes per second, rates of products in FLOP per second."""
    rows = [row for row in results.rows if row.suite == "ceilings" and measured(row, "rate")]
    scaled = [
        [(row, row.rate * units[row.unit]) for row in rows if row.unit in units]
        for units in (BYTES_PER_SECOND, FLOPS_PER_SECOND)
    ]
    return scaled[0], scaled[1]


def kept(results: Results) -> list[list[Row]]:
    """Blocks of the suite "memory" with the rows whose saved bytes are known; eight cases at most."""
    rows = [row for row in results.rows if row.suite == "memory" and measured(row, "saved_bytes") is not None]
    return [[of(contest, name) for name in providers(contest)] for contest in headline(blocks(rows), limit=8)]


def missing(results: Results) -> dict[str, str]:
    """The plots that cannot be drawn from these results, each with the reason."""
    reasons = {
        "speedup": (speedups(results), "no peer was timed in rounds with ours"),
        "roofline": (points(results), "no row has bytes, FLOPs and a time"),
        "memory": (kept(results), "no block has saved bytes"),
    }
    return {plot: reason for plot, (found, reason) in reasons.items() if not found}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes the plots for which there are rows, and deletes those of earlier results for which there are none.

    Raises:
        ImportError: matplotlib is not installed; the message says what to install.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot, no display is ever asked for
    except ImportError as error:
        raise ImportError(INSTALL) from error
    description, left_out, written = source(results.path), missing(results), []
    painters = {"speedup": _draw_speedup, "roofline": _draw_roofline, "memory": _draw_memory}
    for plot, paint in painters.items():
        paths = [folder / file_name(results, plot, suffix) for suffix in ("svg", "png")]
        if plot in left_out:
            for path in paths:
                path.unlink(missing_ok=True)
            continue
        # The salt makes the names inside of an SVG, and with them the file, the same every time.
        with matplotlib.rc_context({"svg.hashsalt": "benchmarks", "font.size": 9, "axes.axisbelow": True}):
            figure = Figure(layout="constrained")
            paint(figure, results)
            figure.savefig(paths[0], format="svg", metadata={"Date": None, "Description": description})
            figure.savefig(paths[1], format="png", dpi=120, metadata={"Software": None, "Description": description})
        written += paths
    return written


def machine(results: Results) -> str:
    """What a title says of where the numbers come from."""
    parts = [results.meta["gpu"], *(["says nothing of a GPU"] if results.is_cpu else [])]
    if results.is_cpu and "cpu" not in results.meta["gpu"].lower():
        parts.insert(0, "CPU")
    parts += [results.meta["date"], results.meta["commit"], *(["quick run"] if results.meta.get("quick") else [])]
    return ", ".join(parts)


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OTHERS) if is_peer(provider) else COLOURS[OURS]


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _draw_speedup(figure, results: Results) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = speedups(results)
    columns = min(COLUMNS, len(panels))
    grid = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    # A line for each bar, one for the name of its case.
    lines = [max(sum(len(case) + 1.4 for case in panel.cases) for panel in row) for row in grid]
    figure.set_size_inches(max(7, 4.8 * columns), 1.0 + sum(0.19 * count + 0.8 for count in lines))
    everything = [value for panel in panels for case in panel.cases for row in case for value in _interval(row)]
    axes = figure.subplots(len(grid), columns, squeeze=False, height_ratios=[count + 4 for count in lines])
    low, high = min(0.9, *everything), max(1.2, *everything)
    for at, (place, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        _bars(place, panel)
        place.set_ylim(lines[at // columns] - 0.6, -0.8)  # bars of one row of panels are equally thick
        place.set_xscale("log", base=2)
        place.set_xlim(0.9 * low, 1.1 * high * (high / low) ** 0.2)  # room for the number beside the longest
        place.xaxis.set_major_locator(LogLocator(base=2))
        place.xaxis.set_minor_locator(NullLocator())
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(f"Time of others / time of ours: right of the line, ours is faster\n{machine(results)}")


def _head(axes, text: str, y: float) -> None:
    """The name of a case above its bars; the line at 1 does not run through it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(
        text, (0.005, y), xycoords=("axes fraction", "data"), va="center", weight="bold", fontsize=8, bbox=box, zorder=3
    )


def _interval(row: Row) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; the median is what all three are where quartiles are not known."""
    low, high = (row.speedup if end is None else end for end in row.speedup_quartiles or (None, None))
    return min(low, row.speedup), row.speedup, max(high, row.speedup)


def _bars(axes, panel: Panel) -> None:
    y, ticks, names = 0.0, [], []
    for case in panel.cases:
        _head(axes, case[0].case, y)
        for row in case:
            y += 1
            low, middle, high = _interval(row)
            axes.barh(y, middle - 1, left=1, height=0.8, color=_colour(row.provider))
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", capsize=2, linewidth=1)
            axes.annotate(
                f"{number(middle)}×", (max(high, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
            ticks.append(y)
            names.append(row.provider)
        y += 1.4
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(ticks, names)
    axes.set_title(f"{title(panel.suite)}, {panel.cases[0][0].dtype}", fontsize=10)
    _clean(axes)
    axes.grid(visible=False, axis="y")


def _draw_roofline(figure, results: Results) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure.set_size_inches(11, 6)
    axes, found = figure.subplots(), points(results)
    suites = list(dict.fromkeys(point.row.suite for point in found))
    marker = {suite: MARKERS[at % len(MARKERS)] for at, suite in enumerate(suites)}
    for point in sorted(found, key=lambda point: point.row.provider == OURS):  # ours on top
        colour = _colour(point.row.provider)
        fill = colour if point.row.provider == OURS else "none"
        style = {"s": 36, "marker": marker[point.row.suite], "edgecolors": colour, "facecolors": fill}
        axes.scatter(point.intensity * _aside(point, found), point.rate, **style)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOPs / byte that has to be moved (suites of nearly the same are drawn side by side)")
    _draw_ceilings(axes, found, *limits(results))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    handles = [
        Line2D([], [], color=_colour(name), marker="s", linestyle="", label=name)
        for name in providers(point.row for point in found)
    ]
    for suite in suites:
        dtype = next(point.row.dtype for point in found if point.row.suite == suite)
        style = {"color": "none", "markeredgecolor": "black", "marker": marker[suite], "linestyle": ""}
        handles.append(Line2D([], [], label=f"{title(suite)}, {dtype}", **style))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    axes.set_title(f"Work done and what this machine can do (filled: ours)\n{machine(results)}")
    _clean(axes)


def _aside(point: Point, found: list[Point]) -> float:
    """By what factor a marker is moved, so that suites with the same intensity do not cover each other."""
    same = [other.row.suite for other in found if abs(other.intensity / point.intensity - 1) < 0.05]
    suites = list(dict.fromkeys(same))
    return 1.08 ** (suites.index(point.row.suite) - (len(suites) - 1) / 2)


def _draw_ceilings(axes, found: list[Point], bandwidths, rates) -> None:
    """Lines up to which a row can be: bandwidth × intensity on the left, the rate of a matrix product on the right."""
    low = min(point.intensity for point in found) / 4
    top = max((rate / bandwidth for _, bandwidth in bandwidths for _, rate in rates), default=0)
    high = max(top, max(point.intensity for point in found)) * 4
    style = {"color": "#777777", "linewidth": 1, "zorder": 0}
    for row, bandwidth in bandwidths:
        end = max((rate / bandwidth for _, rate in rates), default=high)
        axes.plot([low, end], [low * bandwidth / 1e12, end * bandwidth / 1e12], **style)
        _name(axes, f"{row.case} {number(row.rate)} {row.unit}", low, low * bandwidth / 1e12, (6, -2))
    for row, rate in rates:
        start = min((rate / bandwidth for _, bandwidth in bandwidths), default=low)
        axes.plot([start, high], [rate / 1e12, rate / 1e12], **style)
        _name(axes, f"{row.case} {row.dtype} {number(row.rate)} {row.unit}", high, rate / 1e12, (0, 3), ha="right")
    axes.set_xlim(low, high)


def _name(axes, text: str, x: float, y: float, offset: tuple[float, float], **style) -> None:
    va = "top" if offset[1] < 0 else "bottom"
    axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=8, color="#444444", va=va, **style)


def _draw_memory(figure, results: Results) -> None:
    cases = kept(results)
    axes, y, ticks, names = figure.subplots(), 0.0, [], []
    for case in cases:
        _head(axes, f"{case[0].case}, {case[0].dtype}", y)
        for row in case:
            y += 1
            axes.barh(y, row.saved_bytes / MIB, height=0.8, color=_colour(row.provider))
            text = f"{number(row.saved_bytes / MIB)} MiB"
            axes.annotate(text, (row.saved_bytes / MIB, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
            ticks.append(y)
            names.append(row.provider)
        y += 1.4
    figure.set_size_inches(8, 1.4 + 0.2 * y)
    axes.set_yticks(ticks, names)
    axes.set_ylim(y - 0.6, -0.8)
    axes.set_xlim(0, 1.15 * max(row.saved_bytes for case in cases for row in case) / MIB or 1)
    axes.set_xlabel("MiB kept from forward to backward, parameters left out")
    figure.suptitle(f"Memory kept for the backward pass\n{machine(results)}")
    _clean(axes)
    axes.grid(visible=False, axis="y")
