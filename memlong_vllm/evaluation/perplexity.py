"""Perplexity of the end of long texts, against how much of them the model was given (section 4.2)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memlong_vllm.evaluation.models import ModelSpec, load_tokenizer
from memlong_vllm.evaluation.results import ResultsFile, Row
from memlong_vllm.evaluation.runs import (
    Item,
    add_run_arguments,
    comma_separated,
    memory_sizes_of,
    positive,
    run_task,
    specs_of,
)
from memlong_vllm.evaluation.scoring import EvaluationError, MemoryUse, Prompt, Scorer
from memlong_vllm.evaluation.texts import Text, beginning, read_texts


@dataclass(frozen=True)
class Perplexity:
    """The task.

    Attributes:
        lengths: tokens of the sequences, ascending.
        last: tokens at a sequence's end that are scored; fewer where it is shorter.
        offset: tokens of a text that are left out at its beginning.
        windows: disjoint stretches of the longest length that are taken of each text.
        align: ``"end"``: of a stretch, sequences of every length have the same last token, so that
            the same tokens are scored with more or less before them; ``"start"``: the same first.
        buckets: equal parts of the scored tokens whose mean is written as well; 0: none.
        prefix: special tokens that every sequence begins with; they count towards its length.
    """

    texts: list[Text]
    lengths: list[int]
    sizes: list[int]
    top_k: int | None
    last: int
    offset: int
    windows: int
    align: str
    buckets: int
    prefix: list[int]
    command: str = "perplexity"
    key: tuple[str, ...] = ("model", "text", "window", "length", "memory_size")
    extensible: tuple[str, ...] = ("memory_sizes",)

    @property
    def max_length(self) -> int:
        return self.lengths[-1]

    def settings(self) -> dict[str, Any]:
        return {
            "texts": {text.name: text.digest for text in self.texts},
            "lengths": self.lengths,
            "last": self.last,
            "offset": self.offset,
            "windows": self.windows,
            "align": self.align,
            "buckets": self.buckets,
        }

    def items(self, spec: ModelSpec) -> list[Item]:
        items = []
        for text in self.texts:
            for window in range(self.windows):
                for length in self.lengths:
                    token_ids = self._sequence(text, window, length)
                    if token_ids is None:
                        continue
                    for size in spec.memory_sizes(self.sizes):
                        row = {"model": spec.label, "text": text.name, "window": window, "length": length}
                        memory = MemoryUse(size, self.top_k if spec.kind == "memlong" else None)
                        items.append(Item(row | {"memory_size": size}, Prompt(token_ids, memory)))
        return items

    def stretch(self, text: Text, window: int) -> list[int]:
        """The tokens that sequences of one window are taken from: :attr:`max_length` of them, less
        where the text ends."""
        start = self.start(window)
        return text.token_ids[start : start + self.max_length - len(self.prefix)]

    def start(self, window: int) -> int:
        """Of a text, the token at which its stretches begin."""
        return self.offset + window * (self.max_length - len(self.prefix))

    def _sequence(self, text: Text, window: int, length: int) -> list[int] | None:
        stretch, num = self.stretch(text, window), length - len(self.prefix)
        if len(stretch) < (num if self.align == "start" else self.max_length - len(self.prefix)):
            return None
        return self.prefix + (stretch[:num] if self.align == "start" else stretch[len(stretch) - num :])

    def measure(self, scorer: Scorer, items: Sequence[Item]) -> list[Row]:
        logprobs = scorer.logprobs([item.prompt for item in items])
        return [item.row | self.score(values) for item, values in zip(items, logprobs, strict=True)]

    def score(self, logprobs: np.ndarray) -> Row:
        """The fields of a row from a sequence's log-probabilities, [tokens - 1]."""
        scored = -logprobs[max(len(self.prefix) - 1, len(logprobs) - self.last, 0) :]
        nll = float(scored.mean())
        fields: Row = {"tokens": len(scored), "nll": nll, "ppl": math.exp(nll)}
        if self.buckets:
            fields["buckets"] = [float(part.mean()) for part in np.array_split(scored, self.buckets)]
        return fields

    def line(self, row: Row) -> str:
        memory = "" if row["memory_size"] is None else f" memory {row['memory_size']}"
        return f"{row['model']} {row['text']}[{row['window']}] {row['length']} tokens{memory}: ppl {row['ppl']:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    parser.add_argument("--lengths", type=comma_separated, required=True, metavar="N,…", help="tokens of sequences")
    parser.add_argument("--last", type=positive, default=2048, metavar="N", help="tokens scored (default: 2048)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="tokens left out at a text's beginning")
    parser.add_argument(
        "--windows", type=positive, default=1, metavar="N", help="disjoint stretches of a text (default: 1)"
    )
    parser.add_argument(
        "--align", choices=("end", "start"), default="end",
        help="'end': sequences of all lengths end at the same token, so that they score the same tokens; 'start': "
        "they begin at the same (default: end)",
    )  # fmt: skip
    parser.add_argument("--buckets", type=int, default=0, metavar="N", help="also write the nll of N parts in order")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> ResultsFile:
    """Raises:
    EvaluationError: naming an option.
    """
    specs = specs_of(arguments)
    sizes = memory_sizes_of(arguments, specs[0])
    return run_task(task_of(arguments, specs[0], sizes), arguments, specs, sizes)


def task_of(arguments: argparse.Namespace, main: ModelSpec, sizes: list[int]) -> Perplexity:
    """What :func:`add_arguments` asks for.

    Raises:
        EvaluationError: naming an option.
    """
    tokenizer = load_tokenizer(main.source)
    task = Perplexity(
        texts=read_texts(arguments.texts, tokenizer),
        lengths=sorted(arguments.lengths),
        sizes=sizes,
        top_k=arguments.top_k,
        last=arguments.last,
        offset=arguments.offset,
        windows=arguments.windows,
        align=arguments.align,
        buckets=arguments.buckets,
        prefix=beginning(tokenizer),
    )
    check(task)
    return task


def check(task: Perplexity) -> None:
    """Refuse what cannot be measured, and say which texts are too short.

    Raises:
        EvaluationError: if nothing is left to measure.
    """
    if task.lengths[0] < len(task.prefix) + 2:
        raise EvaluationError(f"--lengths {task.lengths[0]}: too few tokens to score any")
    if task.offset < 0 or task.buckets < 0 or task.buckets > min(task.last, task.lengths[0] - 1):
        raise EvaluationError("--offset and --buckets must not be negative, nor buckets more than the tokens scored")
    lengths = task.lengths if task.align == "start" else task.lengths[-1:]
    num_used = 0
    for text in task.texts:
        for window in range(task.windows):
            held = len(task.stretch(text, window)) + len(task.prefix)
            for length in lengths:
                num_used += held >= length
                if held < length:
                    where = f"stretch {window + 1} of {task.windows}" if task.windows > 1 else "the text"
                    print(
                        f"SKIPPED: {text.name} has {len(text.token_ids)} tokens; {where} (from token "
                        f"{task.start(window)}) has {held}, too few for {length}",
                        file=sys.stderr,
                    )
    if not num_used:
        raise EvaluationError("no text is long enough: lower --lengths, --offset or --windows, or name longer --texts")
