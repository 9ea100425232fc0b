"""What the rows of ``evaluate perplexity`` say together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memlong_vllm.evaluation.reports import Line, line_name, line_style, lines_of, main_line, markdown_table
from memlong_vllm.evaluation.statistics import mean, standard_error

Place = tuple[str, int]
"""(text, window)"""


@dataclass(frozen=True)
class Cell:
    """One model with one memory size at one length. Errors are standard errors over texts, None for
    a single text.

    Attributes:
        nll: mean over texts, each of them the mean of its windows, in nats a token.
        difference: mean over texts of this cell's nll less the base's on the same windows; the base is
            the main model with its largest memory. None if the base was run on none of them.
        num_paired: texts that ``difference`` is of.
    """

    line: Line
    length: int
    num_texts: int
    nll: float
    error: float | None
    difference: float | None
    difference_error: float | None
    num_paired: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def by_text(values: Mapping[Place, float]) -> list[float]:
    """Means of the stretches of each text."""
    texts: dict[str, list[float]] = defaultdict(list)
    for text, window in sorted(values):
        texts[text].append(values[text, window])
    return [mean(of_text) for of_text in texts.values()]


def summarise(content: dict[str, Any]) -> list[Cell]:
    """Every line at every length there are rows of."""
    found: dict[tuple[Line, int], dict[Place, float]] = defaultdict(dict)
    for row in content["rows"]:
        found[(row["model"], row["memory_size"]), row["length"]][row["text"], row["window"]] = row["nll"]
    base, cells = main_line(content), []
    for line in lines_of(content["rows"], list(content["models"])):
        for length in sorted({length for other, length in found if other == line}):
            mine, other = found[line, length], found.get((base, length), {})
            paired = by_text({place: mine[place] - other[place] for place in mine.keys() & other.keys()})
            values = by_text(mine)
            difference = mean(paired) if paired else None
            error, paired_error = standard_error(values), standard_error(paired)
            cells.append(Cell(line, length, len(values), mean(values), error, difference, paired_error, len(paired)))
    return cells


def table(content: dict[str, Any]) -> str:
    """Markdown: perplexities, nlls and differences to the base, by line and length."""
    cells = summarise(content)
    most, last = max(cell.num_texts for cell in cells), content["settings"]["last"]

    def count(cell: Cell, num: int) -> str:
        return "" if num == most else f" (n={num})"

    def plus_minus(value: float, error: float | None, sign: str = "") -> str:
        return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")

    def nll(cell: Cell) -> str:
        return plus_minus(cell.nll, cell.error) + count(cell, cell.num_texts)

    def difference(cell: Cell) -> str:
        if cell.difference is None:
            return ""
        return plus_minus(cell.difference, cell.difference_error, "+") + count(cell, cell.num_paired)

    base = main_line(content)
    return "\n".join(
        [
            f"Perplexity of the last {last:,} tokens by tokens of the sequence, {most} text{'s' * (most > 1)}\n",
            _grid(content, cells, lambda cell: f"{cell.perplexity:.3f}" + count(cell, cell.num_texts)),
            "Negative log-likelihood, nats a token: mean ± standard error over texts\n",
            _grid(content, cells, nll),
            f"Its difference to {line_name(base)}, paired by text (positive: predicts worse)\n",
            _grid(content, [cell for cell in cells if cell.line != base], difference),
        ]
    )


def _grid(content: dict[str, Any], cells: list[Cell], show: Callable[[Cell], str]) -> str:
    lengths = sorted({cell.length for cell in cells})
    shown = {(cell.line, cell.length): show(cell) for cell in cells}
    rows = []
    for line in lines_of(content["rows"], list(content["models"])):
        values = [shown.get((line, length), "") for length in lengths]
        if any(values):
            rows.append([line_name(line), *values])
    return markdown_table(["", *(f"{length:,}" for length in lengths)], rows)


def draw(content: dict[str, Any], figure: Any) -> None:
    """Perplexity against length, one line a model and memory size."""
    cells, axes = summarise(content), figure.add_subplot()
    lines = lines_of(content["rows"], list(content["models"]))
    for line in lines:
        mine = [cell for cell in cells if cell.line == line]
        lengths, values = [cell.length for cell in mine], [cell.perplexity for cell in mine]
        axes.plot(lengths, values, label=line_name(line), **line_style(line, lines))
    lengths = sorted({cell.length for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel(f"perplexity of the last {content['settings']['last']:,}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False, handlelength=3)
    num_texts = max(cell.num_texts for cell in cells)
    axes.set_title(f"{content['model']['name']}, {num_texts} text{'s' * (num_texts > 1)}", fontsize="medium")
