"""One report of several results files: tables (Markdown), plots (PNG), goals met and missed.

    python benchmarks/report.py benchmarks/results/throughput.json benchmarks/results/retrieval.json

Made from the JSON alone. Where something a user could serve instead is better than MemLong, the
row says so; what an engine could not do is a footnote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accounting_report import accounting_tables
from cells import Size
from contenders import TITLES
from goals import goals, retrieval_costs
from measurement_file import read_results
from plots import FIGURES, draw
from summaries import MEASURES, MIB, Measure, Spread, loses_to, measured, of, ratio, sizes, skip_reason

from memlong_vllm.evaluation.reports import markdown_table

COMPARED = ("full", "window")
# Files of what is not how an engine would be set up for speed: little memory, short steps.
NO_GOALS = ("fixed_memory",)


class Footnotes:
    """Reasons, numbered as they come; equal ones once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {text}" for text, number in self._numbers.items()]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shown(value: Spread | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    text = number(value.median / scale)
    return text if value.number == 1 else f"{text} ({number(value.low / scale)}-{number(value.high / scale)})"


def table(content: dict[str, Any], measure: Measure, footnotes: Footnotes) -> str:
    """One measure: a row a size, a column an engine, MemLong's ratios, and whom it loses to."""
    rows, engines = content["rows"], list(content["models"])
    scale = MIB if "bytes" in measure.field else 1.0
    compared = [name for name in COMPARED if name in engines]
    lines, has_measures = [], False
    for size in sizes(rows, measure.workload):
        cells = [cell(content, measure, engine, size, scale, footnotes) for engine in engines]
        if not any(cells):
            continue
        has_measures |= any(of(rows, measure, engine, size) is not None for engine in engines)
        ratios = [compare(content, measure, name, size, footnotes) for name in compared]
        losing = loses_to(rows, measure, size, engines)
        mark = f"**loses to {', '.join(losing)}**" if losing else ""
        lines.append([f"{size[0]:,} x {size[1]}", *cells, *ratios, mark])
    if not has_measures:
        return ""
    title = measure.title.replace("bytes", "MiB") if scale != 1 else measure.title
    header = ["length x batch", *engines, *(f"MemLong / {name}" for name in compared), ""]
    return f"**{title}** ({'more' if measure.more_is_better else 'less'} is better)\n\n" + markdown_table(header, lines)


def compare(content: dict[str, Any], measure: Measure, other: str, size: Size, footnotes: Footnotes) -> str:
    """MemLong's ratio to another engine."""
    rows = content["rows"]
    value = ratio(rows, measure, "memlong", other, size)
    if value is None and all(of(rows, measure, engine, size) is not None for engine in ("memlong", other)):
        return f"- {footnotes.mark(f'memlong and {other} were not measured in one run, so they are not compared')}"
    return shown(value)


def cell(content: dict[str, Any], measure: Measure, engine: str, size: Size, scale: float, footnotes: Footnotes) -> str:
    rows = content["rows"]
    found = of(rows, measure, engine, size)
    if found is None:
        reason = skip_reason(rows, measure.workload, engine, size)
        if measured(rows, workload=measure.workload, engine=engine, length=size[0], batch=size[1], simultaneous=False):
            reason = f"the requests of {size[0]:,} x {size[1]} never decode all at once"
        if not reason and any(of(rows, measure, other, size) is not None for other in content["models"]):
            reason = "was not asked for, or has not had its turn"
        return f"- {footnotes.mark(f'{engine}: {reason}')}" if reason else ""
    text = shown(found, scale)
    mine = measured(rows, workload=measure.workload, engine=engine, length=size[0], batch=size[1])
    fewest = min(row.get("fits", size[1]) for row in mine)
    if fewest < size[1]:
        text += " " + footnotes.mark(f"{engine}: its KV cache holds {fewest} of {size[1]} sequences; the others wait")
    most = max(row["repetition"] for row in rows if row["workload"] == measure.workload and "skipped" not in row) + 1
    if found.number < most:
        text += f", n={found.number}"
    return text


def goal_table(contents: dict[Path, dict[str, Any]]) -> str:
    words = {True: "met", False: "**missed**", None: "not measured"}
    lines = []
    files = [(path.stem, content["command"], content["rows"]) for path, content in contents.items()]
    for goal in goals([file for file in files if file[0] not in NO_GOALS]):
        bound = f"{'at least' if goal.is_least else 'at most'} {goal.bound:g} {goal.unit}"
        value = "" if goal.value is None else f"{goal.value:.3g} {goal.unit}"
        lines.append([goal.name, bound, value, words[goal.is_met], goal.detail])
    return markdown_table(["goal", "asked", "measured", "", "of"], lines)


def retrieval_table(content: dict[str, Any]) -> str:
    """Where the time of a decoding step goes, with and without a retrieval."""
    lines = [
        [
            f"{cost['workload']} {cost['length']:,} x {cost['batch']}",
            *("" if cost[name] is None else f"{cost[name]:.3f}" for name in ("plain_own_ms", "own_ms")),
            *("" if cost[name] is None else f"{cost[name]:.4g}" for name in ("plain_whole_ms", "whole_ms")),
            f"{cost['share_percent']:.2f} %",
            f"{cost['held_percent']:.2f} %",
            f"{cost['steps']} ({cost['matched']})",
        ]
        for cost in retrieval_costs(content["rows"])
    ]
    header = ["", "scheduler's own ms, plain step", "retrieving step", "whole ms, plain step", "retrieving step"]
    return markdown_table([*header, "retrieval's share", "held", "retrieving steps (compared)"], lines) if lines else ""


def section(content: dict[str, Any], path: Path) -> str:
    benchmark, footnotes = content["command"], Footnotes()
    parts = [f"## {benchmark} (`{path.name}`)\n"]
    if benchmark == "paper_scale":
        parts.append(accounting_tables(content))
    else:
        titles = [f"- `{name}`: {TITLES.get(name, model['title'])}" for name, model in content["models"].items()]
        parts.append("\n".join(titles) + "\n")
        parts += [text for measure in MEASURES[benchmark] if (text := table(content, measure, footnotes))]
        if benchmark == "retrieval":
            parts.append(retrieval_table(content))
    return "\n".join([*parts, *(f"{line}\n" for line in footnotes.lines()), provenance(content)])


def provenance(content: dict[str, Any]) -> str:
    versions, machine = content["versions"], content["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items() if value not in ({}, None))
    load = "-".join(f"{machine[name][0]:.1f}" for name in ("load_at_the_start", "load"))
    return "\n".join(
        [
            *(f"- `{line}`" for line in content["command_lines"]),
            f"- {settings}; code {', '.join(content.get('code', ['not noted']))}",
            f"- vLLM {versions['vllm']}, torch {versions['torch']}, {versions['cpu']}, "
            f"{machine['usable_cores']} cores, {machine['memory_gib']} GiB; load {load}",
            "",
        ]
    )


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the report and its plots beside it; returns what was written. Without matplotlib there
    are no plots, and a line that says so."""
    contents = {path: read_results(path) for path in paths}
    contents = {path: content for path, content in contents.items() if content["command"] in (*MEASURES, "paper_scale")}
    output.parent.mkdir(parents=True, exist_ok=True)
    images = [
        image
        for benchmark, measures in FIGURES.items()
        for path, content in contents.items()
        if content["command"] == benchmark
        and (image := draw(content, measures, output.with_name(f"{path.stem}.png"))) is not None
    ]
    pictures = [f"![{image.stem}]({image.name})\n" for image in images]
    intro = (
        "Medians, and in brackets the least and the most of the repetitions. So are ratios: each is of the turns that "
    )
    intro += "two engines took in one repetition.\n"
    parts = ["# Benchmarks\n", intro, "## Goals\n", goal_table(contents)]
    if left_out := [path.name for path in contents if path.stem in NO_GOALS]:
        parts.append(f"Left out of the goals, for little memory and short steps: {', '.join(left_out)}.\n")
    parts += pictures
    parts += [section(content, path) for path, content in contents.items()]
    output.write_text("\n".join(parts), encoding="utf-8")
    return [output, *images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="report.md beside the first file by default")
    arguments = parser.parse_args()
    for path in write_report(arguments.results, arguments.output or arguments.results[0].with_name("report.md")):
        print(path)


if __name__ == "__main__":
    main()
