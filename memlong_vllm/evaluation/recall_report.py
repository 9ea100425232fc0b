"""What the rows of ``evaluate recall`` say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlong_vllm.evaluation.reports import Line, line_name, line_style, lines_of, main_line, markdown_table
from memlong_vllm.evaluation.results import Row
from memlong_vllm.evaluation.statistics import mean, wilson_interval


@dataclass(frozen=True)
class Rate:
    """How often answers were right.

    Attributes:
        num_retrieved: prompts of whose needle a number was, whole, in the chunks that the first answer
            token attended to; None for models without memory.
        depth: where needles started, as a fraction of the prompt: the mean.
    """

    num: int
    num_right: int
    num_retrieved: int | None
    depth: float

    @property
    def rate(self) -> float:
        return self.num_right / self.num

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        return wilson_interval(self.num_right, self.num)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.0%} [{low:.0%}, {high:.0%}]"


def rate_of(rows: Sequence[Row]) -> Rate | None:
    """None without rows."""
    if not rows:
        return None
    found = [row["needle_retrieved"] for row in rows]
    retrieved = None if None in found else sum(found)
    depth = mean([row["needle_depth"] for row in rows])
    return Rate(len(rows), sum(row["correct"] for row in rows), retrieved, depth)


def select(rows: Sequence[Row], line: Line, **fields: Any) -> list[Row]:
    """A line's rows with these values."""
    wanted = {"model": line[0], "memory_size": line[1]} | fields
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows: Sequence[Row], name: str) -> list[Any]:
    return sorted({row[name] for row in rows})


def table(content: dict[str, Any]) -> str:
    """Markdown: by kind and length, over all depths; and the main model with its memory by depth
    asked for, with the depth that it came to be."""
    rows = content["rows"]
    lines = lines_of(rows, list(content["models"]))
    lengths = distinct(rows, "length")
    parts = []
    for kind in content["settings"]["kinds"]:
        parts.append(f"{kind}: right answers [95 % Wilson interval], needle retrieved, by tokens of the prompt\n")
        body = [
            [line_name(line), *(_cell(rate_of(select(rows, line, kind=kind, length=n))) for n in lengths)]
            for line in lines
        ]
        parts.append(markdown_table(["", *(f"{length:,}" for length in lengths)], body))
        main = main_line(content)
        parts.append(f"{kind}: {line_name(main)}, by the depth asked for ('at': where needles came to stand, a mean)\n")
        body = []
        for depth in distinct(rows, "depth"):
            rates = [rate_of(select(rows, main, kind=kind, length=n, depth=depth)) for n in lengths]
            body.append([f"{depth:g}", *(_cell(rate) + (f", at {rate.depth:.2f}" if rate else "") for rate in rates)])
        parts.append(markdown_table(["depth", *(f"{length:,}" for length in lengths)], body))
    return "\n".join(parts)


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return ""
    retrieved = "" if rate.num_retrieved is None else f", {rate.num_retrieved / rate.num:.0%} retrieved"
    return f"{rate} of {rate.num}{retrieved}"


def draw(content: dict[str, Any], figure: Any) -> None:
    """For each kind: accuracy against length by line, and the main model's depth x length."""
    rows, kinds = content["rows"], content["settings"]["kinds"]
    figure.set_size_inches(10.5, 4 * len(kinds))
    grid = figure.subplots(len(kinds), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), kind in zip(grid, kinds, strict=True):
        of_kind = [row for row in rows if row["kind"] == kind]
        _draw_lines(left, of_kind, lines_of(rows, list(content["models"])))
        left.set_title(f"{kind}, all depths", fontsize="medium")
        _draw_depths(right, of_kind, main_line(content))
        right.set_title(f"{kind}, {line_name(main_line(content))}", fontsize="medium")
    figure.suptitle(content["model"]["name"], fontsize="medium")


def _draw_lines(axes: Any, rows: Sequence[Row], lines: Sequence[Line]) -> None:
    lengths = distinct(rows, "length")
    for number, line in enumerate(lines):
        rates = {length: rate for length in lengths if (rate := rate_of(select(rows, line, length=length)))}
        if not rates:
            continue
        errors = [[rate.rate - rate.interval[0] for rate in rates.values()]]
        errors.append([rate.interval[1] - rate.rate for rate in rates.values()])
        values = [rate.rate for rate in rates.values()]
        # Side by side, or equal lines would hide each other.
        places = [length * 2 ** (0.02 * (number - (len(lines) - 1) / 2)) for length in rates]
        axes.errorbar(places, values, errors, label=line_name(line), capsize=2, **line_style(line, lines))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("right answers (95 % interval)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False, handlelength=3)


def _draw_depths(axes: Any, rows: Sequence[Row], line: Line) -> None:
    lengths, depths = distinct(rows, "length"), distinct(rows, "depth")
    rates = [[rate_of(select(rows, line, length=length, depth=depth)) for length in lengths] for depth in depths]
    values = [[float("nan") if rate is None else rate.rate for rate in row] for row in rates]
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth asked for")
    for y, row in enumerate(rates):
        for x, rate in enumerate(row):
            if rate is not None:
                colour = "white" if rate.rate > 0.6 else "black"
                said = f"{rate.num_right}/{rate.num}\nat {rate.depth:.2f}"
                axes.text(x, y, said, ha="center", va="center", color=colour, fontsize="small")
