"""What the rows of ``evaluate icl`` say together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memlong_vllm.evaluation.icl_cases import MEMORY, NONE, PROMPT, RAG, SHUFFLED
from memlong_vllm.evaluation.reports import COLOURS, markdown_table
from memlong_vllm.evaluation.results import Row
from memlong_vllm.evaluation.statistics import mean, standard_error

METHODS = (NONE, MEMORY, SHUFFLED, PROMPT, RAG)
WHERE = {
    NONE: "no more",
    MEMORY: "{} in memory",
    SHUFFLED: "{} in memory, labels shuffled",
    PROMPT: "{} in the prompt",
    RAG: "the {rag} most similar of {}",
}
STYLES = {NONE: ":", MEMORY: "-", SHUFFLED: (0, (1, 3)), PROMPT: "--", RAG: "-."}
NO_SEED = None


@dataclass(frozen=True)
class Arm:
    """One model with demonstrations in one way."""

    model: str
    shots: int
    method: str
    memory_shots: int


@dataclass(frozen=True)
class Outcome:
    """Means over seeds, with standard errors where there are two or more; the sentences are the same
    for all seeds.

    Attributes:
        difference: mean over seeds of the accuracy less the one without further demonstrations.
        f1: macro-averaged over labels.
        favourite: the label predicted most often, and the share of sentences it was predicted for.
    """

    num_sentences: int
    num_seeds: int
    accuracy: float
    error: float | None
    difference: float | None
    difference_error: float | None
    f1: float
    favourite: tuple[int, float]


def arms_of(content: dict[str, Any]) -> list[Arm]:
    """The arms there are rows of: by model, then by shots, so that what is compared stands together."""
    found = {_arm(row) for row in content["rows"]}
    labels = list(content["models"])

    def order(arm: Arm) -> tuple[int, int, int, int]:
        return arm.shots, labels.index(arm.model), arm.memory_shots, METHODS.index(arm.method)

    return sorted(found, key=order)


def _arm(row: Row) -> Arm:
    return Arm(row["model"], row["shots"], row["method"], row["memory_shots"])


def outcomes(content: dict[str, Any], judged: str = "predicted") -> dict[Arm, Outcome]:
    """Of every arm.

    Args:
        judged: ``"predicted"``, or ``"calibrated"``.
    """
    by_seed: dict[Arm, dict[int | None, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in content["rows"]:
        by_seed[_arm(row)][row["seed"]].append(row)
    num_labels, found = len(content["settings"]["words"]), {}
    for arm in arms_of(content):
        base = by_seed.get(_base_of(arm, by_seed, next(iter(content["models"]))), {})
        found[arm] = _outcome(by_seed[arm], {} if base is by_seed[arm] else base, judged, num_labels)
    return found


def _base_of(arm: Arm, arms: Mapping[Arm, Any], main: str) -> Arm:
    """What an arm is compared with: its own model without further demonstrations, or the main one."""
    own = Arm(arm.model, arm.shots, NONE, 0)
    return own if own in arms else Arm(main, arm.shots, NONE, 0)


def _outcome(
    rows: Mapping[int | None, Sequence[Row]], base: Mapping[int | None, Sequence[Row]], judged: str, num_labels: int
) -> Outcome:
    accuracies = [_accuracy(part, judged) for part in rows.values()]
    differences = []
    for seed, part in rows.items():
        # Without demonstrations in prompts, the base is the same for all seeds.
        other = _on_the_same_sentences(base.get(seed, base.get(NO_SEED, [])), part)
        if len(other) == len(part):
            differences.append(_accuracy(part, judged) - _accuracy(other, judged))
    everything = [row[judged] for part in rows.values() for row in part]
    label, times = Counter(everything).most_common(1)[0]
    return Outcome(
        num_sentences=max(map(len, rows.values())),
        num_seeds=len(rows),
        accuracy=mean(accuracies),
        error=standard_error(accuracies),
        difference=mean(differences) if differences else None,
        difference_error=standard_error(differences),
        f1=mean([_macro_f1(part, judged, num_labels) for part in rows.values()]),
        favourite=(label, times / len(everything)),
    )


def _on_the_same_sentences(rows: Sequence[Row], like: Sequence[Row]) -> list[Row]:
    wanted = {row["example"] for row in like}
    return [row for row in rows if row["example"] in wanted]


def _accuracy(rows: Sequence[Row], judged: str) -> float:
    return mean([float(row[judged] == row["label"]) for row in rows])


def _macro_f1(rows: Sequence[Row], judged: str, num_labels: int) -> float:
    """The mean of the labels' F1; 0 for a label that is never right."""
    scores = []
    for label in range(num_labels):
        right = sum(row[judged] == row["label"] == label for row in rows)
        taken = sum(row[judged] == label for row in rows)
        there = sum(row["label"] == label for row in rows)
        scores.append(2 * right / (taken + there) if taken + there else 0.0)
    return mean(scores)


def table(content: dict[str, Any]) -> str:
    """Markdown: accuracies, differences and macro-F1; once more for calibrated answers."""
    settings = content["settings"]
    most = max(outcome.num_sentences for outcome in outcomes(content).values())
    parts = [
        f"{settings['task']}: accuracy in %, {most:,} sentences; means ± standard errors over draws of demonstrations "
        f"(the sentences are the same for all). 'Gain': less the line 'no more', draw by draw\n",
        _grid(content, "predicted"),
    ]
    if settings["calibrate"]:
        parts += ["Calibrated: each label's probability by the one it has without a sentence\n"]
        parts += [_grid(content, "calibrated")]
    return "\n".join(parts)


def _grid(content: dict[str, Any], judged: str) -> str:
    words, found = content["settings"]["words"], outcomes(content, judged)
    most = max(outcome.num_sentences for outcome in found.values())
    rows = []
    for arm, outcome in found.items():
        count = "" if outcome.num_sentences == most else f" (n={outcome.num_sentences})"
        label, share = outcome.favourite
        rows.append(
            [
                str(arm.shots),
                arm.model,
                where(arm, content),
                _percent(outcome.accuracy, outcome.error) + count,
                "" if outcome.difference is None else _percent(outcome.difference, outcome.difference_error, "+"),
                f"{100 * outcome.f1:.1f}",
                f"{words[label]} {share:.0%}",
                str(outcome.num_seeds),
            ]
        )
    header = ["in the prompt", "model", "and", "accuracy", "gain", "macro-F1", "most frequent answer", "draws"]
    return markdown_table(header, rows)


def where(arm: Arm, content: dict[str, Any]) -> str:
    """Where an arm's further demonstrations are."""
    retrieved = min(content["settings"]["rag_shots"], arm.memory_shots)
    return WHERE[arm.method].format(arm.memory_shots, rag=retrieved)


def _percent(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def draw(content: dict[str, Any], figure: Any) -> None:
    """Accuracy against the number of further demonstrations, one panel for each number in prompts."""
    found = outcomes(content)
    all_shots = sorted({arm.shots for arm in found})
    figure.set_size_inches(2 + 4.5 * len(all_shots), 4.5)
    panels = figure.subplots(1, len(all_shots), squeeze=False, sharey=True)[0]
    for axes, shots in zip(panels, all_shots, strict=True):
        of_shots = {arm: outcome for arm, outcome in found.items() if arm.shots == shots}
        shown = dict.fromkeys((arm.model, arm.method) for arm in of_shots if arm.method != NONE)
        # Every line begins without further ones; alone that is a point.
        for model, method in shown or dict.fromkeys((arm.model, NONE) for arm in of_shots):
            _draw_line(axes, of_shots, model, method)
        axes.set_xticks(sorted({arm.memory_shots for arm in of_shots}))
        axes.set_xlabel("further demonstrations")
        axes.set_title(f"{shots} in the prompt", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, % (± standard error)")
    panels[-1].legend(fontsize="small", frameon=False, handlelength=3)
    figure.suptitle(f"{content['settings']['task']}, {content['model']['name']}", fontsize="medium")


def _draw_line(axes: Any, found: Mapping[Arm, Outcome], model: str, method: str) -> None:
    """From the model's arm without further demonstrations on."""
    mine = {arm: outcome for arm, outcome in found.items() if arm.model == model and arm.method in (method, NONE)}
    points = {
        arm.memory_shots: outcome for arm, outcome in sorted(mine.items(), key=lambda entry: entry[0].memory_shots)
    }
    values = [100 * outcome.accuracy for outcome in points.values()]
    errors = [100 * (outcome.error or 0) for outcome in points.values()]
    place = {NONE: "none", MEMORY: "memory", SHUFFLED: "labels shuffled", PROMPT: "prompt", RAG: "RAG"}[method]
    colour = COLOURS.get(model, "#333333")
    axes.errorbar(
        list(points), values, errors, label=f"{model}, {place}", color=colour, linestyle=STYLES[method],
        marker="o", markersize=4, capsize=2,
    )  # fmt: skip
