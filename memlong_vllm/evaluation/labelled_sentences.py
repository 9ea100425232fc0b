"""Sentences with labels: the files of the usual classification tasks, and how a prompt words them."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memlong_vllm.evaluation.scoring import EvaluationError

SENTENCE_COLUMNS = ("sentence", "text")
LABEL_COLUMN = "label"
# Without a file of their own, demonstrations are every n-th sentence: also of a file sorted by label.
HELD_OUT = 4


@dataclass(frozen=True)
class Wording:
    """How a task is put to a model.

    Attributes:
        question: with ``{}`` for the sentence; the label's word follows after a space.
        words: of the labels 0, 1, …
    """

    question: str
    words: tuple[str, ...]

    def ask(self, sentence: str) -> str:
        return self.question.format(sentence)

    def demonstrate(self, example: Example) -> str:
        return f"{self.ask(example.sentence)} {self.words[example.label]}\n\n"


REVIEW = "Review: {}\nSentiment:"
# The wordings of Zhao et al. (2021) for two labels, the words of Gao et al. (2021) for five.
TASKS = {
    "sst2": Wording(REVIEW, ("negative", "positive")),
    "mr": Wording(REVIEW, ("negative", "positive")),
    "subj": Wording("Input: {}\nType:", ("subjective", "objective")),
    "sst5": Wording(REVIEW, ("terrible", "bad", "okay", "good", "great")),
    "mpqa": Wording(REVIEW, ("negative", "positive")),
}


@dataclass(frozen=True)
class Example:
    """A sentence with its label; ``number`` is its place in its file."""

    number: int
    sentence: str
    label: int


def read_examples(path: Path, option: str, num_labels: int) -> list[Example]:
    """Read labels and sentences: ``.tsv`` with the columns ``sentence`` and ``label`` named in its first
    line, or ``.csv`` with label and sentence, where a first line that names them may be missing.

    Args:
        option: what the file was named by, for errors.

    Raises:
        EvaluationError: naming the line that is wrong.
    """
    rows = _rows(path, option)
    if not rows:
        raise EvaluationError(f"{option} {path} is empty")
    label, sentence = 0, 1
    has_header = LABEL_COLUMN in rows[0]
    if has_header:
        named = [column for column in SENTENCE_COLUMNS if column in rows[0]]
        if not named:
            raise EvaluationError(f"{option} {path}: the first line names no column {' or '.join(SENTENCE_COLUMNS)}")
        label, sentence = rows[0].index(LABEL_COLUMN), rows[0].index(named[0])
    elif path.suffix == ".tsv":
        raise EvaluationError(f"{option} {path}: the first line must name the columns sentence and label")
    examples = []
    for number, row in enumerate(rows[has_header:]):
        if len(row) <= max(label, sentence) or row[label] not in map(str, range(num_labels)):
            raise EvaluationError(
                f"{option} {path}, row {number + 1 + has_header}: {row!r} is no sentence with a label from 0 to "
                f"{num_labels - 1}"
            )
        examples.append(Example(number, row[sentence].strip(), int(row[label])))
    if not examples:
        raise EvaluationError(f"{option} {path} has a first line that names columns, and no sentence")
    return examples


def _rows(path: Path, option: str) -> list[list[str]]:
    if path.suffix not in (".tsv", ".csv"):
        raise EvaluationError(f"{option} {path}: name a .tsv or .csv file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Spreadsheets put a mark before UTF-8.
            if path.suffix == ".tsv":  # Quotation marks there are the sentences' own.
                return [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
            return [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{option} {path}: {error}") from error


def held_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those to test and those to demonstrate with, of a file that serves for both."""
    tested = [example for example in examples if example.number % HELD_OUT != HELD_OUT - 1]
    return tested, [example for example in examples if example.number % HELD_OUT == HELD_OUT - 1]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
