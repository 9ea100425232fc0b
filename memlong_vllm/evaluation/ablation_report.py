"""What the rows of ``evaluate ablation`` say together: one group for each thing that was varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlong_vllm.evaluation.perplexity_report import Cell, summarise
from memlong_vllm.evaluation.reports import Line, line_name, lines_of, main_line, markdown_table
from memlong_vllm.evaluation.variants import CHECKPOINT, untrained_for

MEMORY_SIZE, OTHERS = "memory_size", "other models"
TITLES = {MEMORY_SIZE: "memory size, tokens", CHECKPOINT: "other checkpoints", OTHERS: OTHERS}
UNTRAINED, PEEKS = "†", "‡"
LEGEND = {
    UNTRAINED: "trained with another value: what its parameters learned was meant for something else",
    PEEKS: "queries of a segment are its own text, so the retriever has seen the tokens that are scored",
}


@dataclass(frozen=True)
class Choice:
    """One value in a group, and the line that measured it.

    Attributes:
        name: the value.
        marks: keys of :data:`LEGEND`.
    """

    name: str
    line: Line
    marks: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.marks}".strip()


def groups_of(content: dict[str, Any]) -> dict[str, list[Choice]]:
    """What was varied, and its values, the checkpoint's own among them."""
    lines = lines_of(content["rows"], list(content["models"]))
    base = main_line(content)
    groups: dict[str, list[Choice]] = {}
    sizes = [line for line in lines if line[0] == base[0]]
    if len(sizes) > 1:
        groups[MEMORY_SIZE] = [Choice(f"{size or 0:,}" if size else "off", (base[0], size)) for _, size in sizes]
    for line in lines:
        if line[0] == base[0]:
            continue
        group = content["models"][line[0]].get("group") or OTHERS
        if group not in groups:
            groups[group] = [_own(content, group, base)]
        groups[group].append(_choice(content, group, line, base))
    return {group: _in_order(choices) for group, choices in groups.items()}


def _own(content: dict[str, Any], group: str, base: Line) -> Choice:
    name = base[0] if group in (CHECKPOINT, OTHERS) else _text(content["model"]["memlong"][group])
    return Choice(name, base, _marks(content["model"]))


def _choice(content: dict[str, Any], group: str, line: Line, base: Line) -> Choice:
    description = content["models"][line[0]]
    marks = _marks(description)
    if group not in (CHECKPOINT, OTHERS):
        return Choice(_text(description["changes"][group]), line, marks)
    return Choice(line[0] if line[1] in (None, base[1]) else line_name(line), line, marks)


def _marks(description: dict[str, Any]) -> str:
    marks = UNTRAINED if untrained_for(description.get("changes")) else ""
    peeks = (description.get("memlong") or {}).get("query_scope") == "current"
    return marks + (PEEKS if peeks else "")


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _in_order(choices: list[Choice]) -> list[Choice]:
    """Numbers ascending; others as they were named, the checkpoint's own first."""
    if all(choice.name.isdigit() for choice in choices):
        return sorted(choices, key=lambda choice: int(choice.name))
    return choices


def table(content: dict[str, Any]) -> str:
    """Markdown: of each group, perplexities and differences to the checkpoint as it is."""
    cells = {(cell.line, cell.length): cell for cell in summarise(content)}
    lengths = sorted({length for _, length in cells})
    most, base = max(cell.num_texts for cell in cells.values()), main_line(content)
    groups = groups_of(content)
    parts = [
        f"Perplexity of the last {content['settings']['last']:,} tokens of sequences of N tokens, {most} "
        f"text{'s' * (most > 1)}; in brackets, nats a token more than {line_name(base)}, as it is: mean ± standard "
        "error over texts, paired (positive: predicts worse)\n"
    ]
    for group, choices in groups.items():
        rows = [
            [choice.title, *(_show(cells.get((choice.line, length)), choice.line == base) for length in lengths)]
            for choice in choices
        ]
        parts.append(markdown_table([TITLES.get(group, group), *(f"{length:,}" for length in lengths)], rows))
    used = {mark for choices in groups.values() for choice in choices for mark in choice.marks}
    return "\n".join([*parts, *(f"{mark} {text}\n" for mark, text in LEGEND.items() if mark in used)])


def _show(cell: Cell | None, is_base: bool) -> str:
    if cell is None:
        return ""
    if is_base:
        return f"{cell.perplexity:.3f} (as it is)"
    if cell.difference is None:
        return f"{cell.perplexity:.3f}"
    error = "" if cell.difference_error is None else f" ± {cell.difference_error:.4f}"
    return f"{cell.perplexity:.3f} ({cell.difference:+.4f}{error})"


def draw(content: dict[str, Any], figure: Any) -> None:
    """A panel for each group: perplexity at the greatest length, with the checkpoint as it is dashed."""
    cells = {(cell.line, cell.length): cell for cell in summarise(content)}
    length = max(length for _, length in cells)
    groups, base = groups_of(content), cells.get((main_line(content), length))
    if not groups:  # Of a run that was stopped early.
        return
    num_columns = min(3, len(groups))
    num_rows = math.ceil(len(groups) / num_columns)
    figure.set_size_inches(4.5 * num_columns, 3.8 * num_rows)
    # Scales of their own: without memory perplexity is so much higher that all else would be a line.
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, (group, choices) in zip(panels, groups.items(), strict=False):
        _draw_group(axes, choices, [cells.get((choice.line, length)) for choice in choices], base)
        axes.set_title(TITLES.get(group, group), fontsize="medium")
        axes.set_ylabel("perplexity")
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    last = content["settings"]["last"]
    figure.suptitle(f"{content['model']['name']}: perplexity of the last {last:,} of {length:,} tokens")


def _draw_group(axes: Any, choices: Sequence[Choice], cells: Sequence[Cell | None], base: Cell | None) -> None:
    places = [place for place, cell in enumerate(cells) if cell is not None]
    values = [cell.perplexity for cell in cells if cell is not None]
    # Paired by text, so texts' own difficulty is no part of the error.
    errors = [cell.perplexity * (cell.difference_error or 0) for cell in cells if cell is not None]
    if base is not None:
        axes.axhline(base.perplexity, color="#7f8c8d", linestyle="--", linewidth=1)
    style = "-" if len(choices) > 2 and all(choice.name.replace(",", "").isdigit() for choice in choices[1:]) else ""
    axes.errorbar(places, values, errors, color="#1f5fa8", linestyle=style, marker="o", markersize=5, capsize=2)
    axes.set_xticks(range(len(choices)), [choice.title for choice in choices], rotation=20, ha="right")
    axes.grid(alpha=0.3)
