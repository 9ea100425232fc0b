"""Plots of results files: a picture a file, a panel a measure, a line an engine and batch; where there is
one length only, batches are what the axis has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from summaries import MEASURES, MIB, Measure, Spread, loses_to, of, sizes, skip_reason

from memlong_vllm.evaluation.reports import COLOURS

ENGINE_COLOURS = {name: COLOURS[name] for name in ("memlong", "full", "window")}
ENGINE_COLOURS |= {"off": "#74a9cf", "fp8": "#d98c00", "int8": "#8e44ad", "authors": "#c0392b"}
# By batch, the smallest first.
LOOKS = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (1, 3)), "v"))
# By benchmark, the fields that are drawn.
FIGURES = {
    "throughput": (
        "prefill_tokens_per_s",
        "tokens_per_s",
        "decode_tokens_per_s",
        "later_questions_per_s",
        "peak_bytes_total",
    ),
    "latency": ("ttft_p50_s", "itl_p50_ms", "itl_p99_ms"),
    "memory": ("peak_bytes_total",),
}
LARGE_FACTOR = 4


def draw(content: dict[str, Any], fields: tuple[str, ...], path: Path) -> Path | None:
    """Draw what there are rows of; returns ``path``, or None if there is nothing or no matplotlib."""
    measures = [measure for measure in MEASURES[content["command"]] if measure.field in fields]
    measures = [
        m for m in measures if any(of(content["rows"], m, "memlong", s) for s in sizes(content["rows"], m.workload))
    ]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'memlong-vllm[eval]')")
        return None
    if not measures:
        return None
    columns = min(2, len(measures))
    rows = -(-len(measures) // columns)
    figure = Figure(figsize=(6 * columns, 4 * rows + 0.8), layout="constrained")
    entries: dict[str, Any] = {}
    for place, measure in enumerate(measures):
        axes = figure.add_subplot(rows, columns, place + 1)
        panel(content, measure, axes)
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=(2, 6)[columns - 1],
        fontsize="small",
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    return path


def panel(content: dict[str, Any], measure: Measure, axes: Any) -> None:
    """Draw a measure on matplotlib's ``axes``: along lengths, or along batches where there is one length only."""
    rows, engines = content["rows"], list(content["models"])
    found = sizes(rows, measure.workload)
    is_by_batch = len({length for length, _ in found}) == 1 < len(found)
    along, other = (1, 0) if is_by_batch else (0, 1)
    # Of the whole picture, which has one legend.
    others = [found[0][0]] if is_by_batch else sorted({row["batch"] for row in rows})
    scale = MIB if "bytes" in measure.field else 1
    for engine in engines:
        for same, (style, marker) in zip(others, LOOKS * len(others), strict=False):
            spreads = {size[along]: of(rows, measure, engine, size) for size in found if size[other] == same}
            look = {"color": ENGINE_COLOURS[engine], "linestyle": style, "marker": marker}
            label = engine if is_by_batch else f"{engine}, batch {same}"
            _line(spreads, scale, axes, label=label, **look)
    _mark_losses(rows, measure, engines, axes, scale, along)
    places = sorted({size[along] for size in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    _scale_y(axes)
    axes.set_xlabel(f"sequences of {found[0][0]:,} tokens" if is_by_batch else "tokens of context")
    axes.set_title(measure.title.replace("bytes", "MiB"), fontsize="medium")
    axes.grid(alpha=0.3)


def _line(spreads: Mapping[int, Spread | None], scale: float, axes: Any, **look: Any) -> None:
    """Medians by their place on the axis, with ranges; nothing if none is known."""
    known = {place: value for place, value in spreads.items() if value is not None}
    if known:
        medians = [value.median / scale for value in known.values()]
        below = [(value.median - value.low) / scale for value in known.values()]
        above = [(value.high - value.median) / scale for value in known.values()]
        axes.errorbar(list(known), medians, yerr=[below, above], markersize=5, capsize=2, **look)


def _scale_y(axes: Any) -> None:
    """From zero, or by factors where the values differ by large ones."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [value for line in axes.get_lines() for value in line.get_ydata() if value > 0]
    if max(values) < LARGE_FACTOR * min(values):
        axes.set_ylim(0, 1.1 * max(values))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.4g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_losses(rows: Any, measure: Measure, engines: list[str], axes: Any, scale: float, along: int) -> None:
    """Rings around MemLong's points where an alternative is better, and crosses at the lower edge
    where an engine could not be measured."""
    rings, crosses = [], []
    for size in sizes(rows, measure.workload):
        mine = of(rows, measure, "memlong", size)
        if mine is not None and loses_to(rows, measure, size, engines):
            rings.append((size[along], mine.median / scale))
        for engine in engines:
            if of(rows, measure, engine, size) is None and skip_reason(rows, measure.workload, engine, size):
                crosses.append((size[along], engine))
    if rings:
        look = {"facecolors": "none", "edgecolors": "#e00000", "linewidths": 1.5, "zorder": 5}
        axes.scatter(*zip(*rings, strict=True), s=110, label="MemLong loses", **look)
    order = list(ENGINE_COLOURS)
    for position, engine in sorted(set(crosses)):
        place, colour = 0.03 + 0.03 * order.index(engine), ENGINE_COLOURS[engine]
        look = {"marker": "x", "s": 26, "color": colour, "transform": axes.get_xaxis_transform()}
        axes.scatter([position], [place], label=f"{engine}: not measured", **look)
