"""Tables and plots of results files, made from the file alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from memlong_vllm.evaluation.results import Row, read_results
from memlong_vllm.evaluation.scoring import EvaluationError

# By command of the results file. A module each, with what :class:`Report` says.
REPORTS = {
    "perplexity": "memlong_vllm.evaluation.perplexity_report",
    "recall": "memlong_vllm.evaluation.recall_report",
    "ablation": "memlong_vllm.evaluation.ablation_report",
    "icl": "memlong_vllm.evaluation.icl_report",
}
# One colour a model, in every plot; memory sizes are shades of it.
COLOURS = {
    "memlong": "#1f5fa8",
    "control": "#c0392b",
    "random": "#8e44ad",
    "full": "#2e8b57",
    "window": "#7f8c8d",
}
VARIANTS = ("#d98c00", "#17a2a2", "#b5479c", "#6b8e23", "#8c564b", "#333333")
Line = tuple[str, int | None]
"""A model's label and a memory size: what a line of a table or plot is of."""


class Report(Protocol):
    """What a module in :data:`REPORTS` has."""

    def table(self, content: dict[str, Any]) -> str:
        """Markdown of a results file's contents."""
        ...

    def draw(self, content: dict[str, Any], figure: Any) -> None:
        """Plot them on an empty ``matplotlib.figure.Figure``."""
        ...


def write_report(path: Path) -> list[Path]:
    """Write a results file's table (``.md``) and plot (``.png``) beside it, and print the table.

    Without matplotlib there is no plot, and a line that says so.

    Returns:
        What was written.

    Raises:
        EvaluationError: if there is nothing to report.
    """
    content = read_results(path)
    if content["command"] not in REPORTS:
        raise EvaluationError(f"{path} is of {content['command']!r}; there are reports of {sorted(REPORTS)}")
    if not content["rows"]:
        raise EvaluationError(f"{path} has no rows yet")
    report: Report = importlib.import_module(REPORTS[content["command"]])
    text = report.table(content) + "\n" + footer(content)
    markdown, image = path.with_suffix(".md"), path.with_suffix(".png")
    markdown.write_text(text, encoding="utf-8")
    print(f"\n{text}")
    written = [markdown]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'memlong-vllm[eval]')")
        return written
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    report.draw(content, figure)
    figure.savefig(image, dpi=150)
    return [*written, image]


def footer(content: dict[str, Any]) -> str:
    """Which models the labels stand for, and what ran them."""
    lines = [f"- `{label}`: {_model(description)}" for label, description in content["models"].items()]
    settings, versions = content["settings"], content["versions"]
    runner = f"vLLM {versions['vllm']}" if settings["engine"] == "vllm" else f"transformers {versions['transformers']}"
    device = versions.get("gpu") or versions["cpu"]
    lines.append(f"- {runner}, {settings['dtype']}, torch {versions['torch']}, {device}")
    if len(codes := content.get("code", [])) > 1:
        lines.append(f"- **rows were measured with {len(codes)} states of this package's code**: {', '.join(codes)}")
    lines += [f"- `{line}`" for line in content.get("command_lines", [])]
    return "\n".join(lines) + "\n"


def _model(description: dict[str, Any]) -> str:
    name = f"{description['name']} ({description['digest']})"
    kinds = {
        "memory": f"MemLong, local window {description['local_window']}",
        "full": f"full attention, trained on {description['trained_length']} tokens",
        "window": f"sliding window of {description['local_window']} alone",
    }
    notes = ", chunks chosen by chance" if description["random_retrieval"] else ""
    if (description.get("memlong") or {}).get("query_scope") == "current":
        notes += "; **segments query with their own text, so predictions have seen what they predict**"
    if description.get("is_stripped"):
        notes += "; its weights were trained with the memory that it does not have here, so the fair one is --backbone"
    if differs := description.get("training_differs"):
        notes += f"; **its training was not the model's**: {', '.join(differs)}"
    return f"{name}, {kinds[description['attention']]}{notes}"


def lines_of(rows: Sequence[Row], labels: Sequence[str]) -> list[Line]:
    """The lines there are rows of: models in the order of ``labels``, memory sizes ascending."""
    found = {(row["model"], row["memory_size"]) for row in rows}
    return sorted(found, key=lambda line: (list(labels).index(line[0]), line[1] or 0))


def main_line(content: dict[str, Any]) -> Line:
    """The main model with its largest memory, which others are compared with."""
    main = next(iter(content["models"]))
    lines = [line for line in lines_of(content["rows"], list(content["models"])) if line[0] == main]
    return lines[-1] if lines else (main, None)


def line_name(line: Line) -> str:
    model, size = line
    return model if size is None else f"{model}, memory {size:,}" if size else f"{model}, memory off"


def line_style(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    """Of matplotlib: a model's colour, paler for smaller memories, dashed with memory off. Variants get others
    in turn."""
    sizes = sorted(size or 0 for model, size in lines if model == line[0])
    rank = (sizes.index(line[1] or 0) + 1) / len(sizes)
    style = "-" if line[1] else "-." if line[1] is None else "--"
    variants = list(dict.fromkeys(model for model, _ in lines if model not in COLOURS))
    colour = COLOURS[line[0]] if line[0] in COLOURS else VARIANTS[variants.index(line[0]) % len(VARIANTS)]
    return {"color": colour, "alpha": 0.35 + 0.65 * rank, "linestyle": style, "marker": "o", "markersize": 4}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
