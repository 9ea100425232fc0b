"""Whether a model finds again what stands far back in real prose: pass keys and house numbers."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from memlong_vllm.evaluation.scoring import Continuation, EvaluationError, MemoryUse, Prompt, Scorer
from memlong_vllm.evaluation.texts import Text, beginning, read_texts
from memlong_vllm.recall_material import (
    KINDS,
    NUM_KEYS,
    MaterialError,
    Prose,
    RecallPrompt,
    recall_prompt,
    sentence_breaks,
)

MORE_TOKENS = 4  # Than the right answer has: a space, a full stop.


@dataclass(frozen=True)
class Recall:
    """The task.

    Attributes:
        texts, proses: what prompts are made of; trials take turns with them.
        depths: where needles are put, as fractions of the prose, ascending.
        trials: prompts of every kind, length and depth. Each has a key and a stretch of prose of
            its own, so that rows are independent of each other, as the intervals suppose.
        min_distance: tokens between needle and prompt's end at least.
        stride: prompts are shorter than their length by less than this, so that they end anywhere
            between two retrievals, as prompts do.
    """

    tokenizer: Any
    texts: list[Text]
    proses: list[Prose]
    kinds: list[str]
    lengths: list[int]
    depths: list[float]
    trials: int
    sizes: list[int]
    top_k: int | None
    num_keys: int
    min_distance: int
    stride: int
    seed: int
    command: str = "recall"
    key: tuple[str, ...] = ("model", "kind", "length", "depth", "trial", "memory_size")
    extensible: tuple[str, ...] = ("memory_sizes", "kinds", "lengths", "trials", "depths_measured")

    @property
    def max_length(self) -> int:
        return self.lengths[-1] + self.max_tokens

    @property
    def max_tokens(self) -> int:
        """What is generated: room for any five digits, however they are split."""
        return max(len(self.encode(f" {digit * 5}")) for digit in "0123456789") + MORE_TOKENS

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def settings(self) -> dict[str, Any]:
        names = ("kinds", "lengths", "depths", "trials", "num_keys", "min_distance", "stride", "seed")
        return {name: getattr(self, name) for name in names} | {
            "depths_measured": {str(length): self.depths_at(length) for length in self.lengths},
            "texts": {text.name: text.digest for text in self.texts},
        }

    def deepest(self, length: int) -> float:
        """About the depth that no needle can be beyond, because it is :attr:`min_distance` before the end."""
        return 1 - self.min_distance / length

    def depths_at(self, length: int) -> list[float]:
        """The depths that are measured at a length. Needles of all depths beyond :meth:`deepest` are
        moved back to the same place, so the first of these depths stands for all."""
        within = [depth for depth in self.depths if depth <= self.deepest(length)]
        return self.depths[: len(within) + 1]

    def prompt(self, kind: str, length: int, depth: float, trial: int) -> RecallPrompt:
        """Raises:
        EvaluationError: if there is no such prompt.
        """
        draw = random.Random(f"{self.seed} {kind} {length} {depth} {trial}")
        prose = self.proses[trial % len(self.proses)]
        length -= draw.randrange(self.stride)
        try:
            return recall_prompt(kind, self.encode, prose, length, depth, draw, self.min_distance, self.num_keys)
        except MaterialError as error:
            name = self.texts[trial % len(self.texts)].name
            raise EvaluationError(
                f"{error} (text {name}): change --lengths or --depths, add --allow-window, or name longer --texts"
            ) from error

    def items(self, spec: ModelSpec) -> list[Item]:
        items = []
        top_k = self.top_k if spec.kind == "memlong" else None
        chunk_size = spec.config["memlong"]["chunk_size"] if spec.kind == "memlong" else None
        for kind in self.kinds:
            for length in self.lengths:
                for trial in range(self.trials):
                    for depth in self.depths_at(length):
                        found = self.prompt(kind, length, depth, trial)
                        row = {"model": spec.label, "kind": kind, "length": length, "depth": depth, "trial": trial}
                        for size in spec.memory_sizes(self.sizes):
                            prompt = Prompt(found.token_ids, MemoryUse(size, top_k))
                            items.append(Item(row | {"memory_size": size}, prompt, (found, chunk_size)))
        return items

    def measure(self, scorer: Scorer, items: Sequence[Item]) -> list[Row]:
        answers = scorer.continuations([item.prompt for item in items], self.max_tokens)
        return [item.row | self.judge(item, answer) for item, answer in zip(items, answers, strict=True)]

    def judge(self, item: Item, answer: Continuation) -> Row:
        """The fields of a row from what the model said."""
        asked: RecallPrompt = item.expected[0]
        text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        digits = re.search(r"\d+", text)
        is_retrieved = None
        if answer.retrieved is not None:
            chunk_size = item.expected[1]
            numbers = [{place // chunk_size for place in places} for places in self.numbers(asked)]
            is_retrieved = any(chunks <= {*answer.retrieved} for chunks in numbers)
        return {
            "text": self.texts[item.row["trial"] % len(self.texts)].name,
            "tokens": len(item.prompt.token_ids),
            "expected": asked.expected,
            "answer": text,
            "correct": digits is not None and digits.group() == asked.expected,
            "needle": list(asked.needle),
            "needle_depth": round(asked.depth, 4),
            "needle_retrieved": is_retrieved,
        }

    def numbers(self, prompt: RecallPrompt) -> list[list[int]]:
        """Places of the tokens of every number in the needle: a chunk's border may run through it, and the
        half without the number answers nothing."""
        found: list[list[int]] = []
        for place in range(*prompt.needle):
            if not any(map(str.isdigit, self.tokenizer.decode([prompt.token_ids[place]], skip_special_tokens=True))):
                continue
            if found and found[-1][-1] == place - 1:
                found[-1].append(place)
            else:
                found.append([place])
        return found

    def line(self, row: Row) -> str:
        memory = "" if row["memory_size"] is None else f" memory {row['memory_size']}"
        found = {None: "", True: ", retrieved", False: ", not retrieved"}[row["needle_retrieved"]]
        where = f"{row['kind']} {row['length']} tokens, depth {row['needle_depth']:.2f}"
        verdict = "right" if row["correct"] else "wrong"
        return f"{row['model']}{memory} {where}: {row['expected']} <- {row['answer']!r} {verdict}{found}"


def fractions(text: str) -> list[float]:
    """An argument such as ``0.1,0.5``."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of fractions such as 0.1,0.5") from None
    if len(set(values)) < len(values) or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} repeats a fraction or has one that is not from 0 to 1")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 prose, as filler")
    parser.add_argument(
        "--lengths", type=comma_separated, required=True, metavar="N,…",
        help="tokens of prompts, each less a number below the retrieval stride that is drawn",
    )  # fmt: skip
    parser.add_argument(
        "--depths", type=fractions, default=[0.1, 0.5, 0.9], metavar="F,…",
        help="where needles are put, 0 to 1 (default: 0.1,0.5,0.9); rows and tables say where they came to stand",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=positive, default=10, metavar="N",
        help="prompts of each kind, length and depth, every one with a key and prose of its own (default: 10)",
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument(
        "--keys", type=positive, default=NUM_KEYS, metavar="N", help=f"house numbers in a prompt (default: {NUM_KEYS})"
    )
    parser.add_argument(
        "--allow-window", action="store_true",
        help="leave needles where their depth puts them, also inside the local window; by default they are moved "
        "back until they and their chunks are outside, and depths that are one place then are measured once",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of keys and places (default: 0)")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> ResultsFile:
    """Raises:
    EvaluationError: naming an option.
    """
    specs = specs_of(arguments)
    main, sizes = specs[0], memory_sizes_of(arguments, specs[0])
    tokenizer = load_tokenizer(main.source)
    texts = read_texts(arguments.texts, tokenizer)
    blocks = [spec.config["memlong"] for spec in specs if spec.kind == "memlong"]
    prefix = beginning(tokenizer)
    task = Recall(
        tokenizer=tokenizer,
        texts=texts,
        proses=[
            Prose(text.token_ids, sentence_breaks(text.token_ids, lambda token: tokenizer.decode([token])), prefix)
            for text in texts
        ],
        kinds=arguments.kinds,
        lengths=sorted(arguments.lengths),
        depths=sorted(arguments.depths),
        trials=arguments.trials,
        sizes=sizes,
        top_k=arguments.top_k,
        num_keys=arguments.keys,
        # Out of every model's sight: all are asked the same.
        min_distance=0 if arguments.allow_window else max(b["local_window"] + b["chunk_size"] for b in blocks),
        stride=max(block["retrieval_stride"] for block in blocks),
        seed=arguments.seed,
    )
    say_what_is_left_out(task)
    return run_task(task, arguments, specs, sizes)


def say_what_is_left_out(task: Recall) -> None:
    """Which depths are not measured, because others are the same place."""
    for length in task.lengths:
        measured = task.depths_at(length)
        if left_out := task.depths[len(measured) :]:
            print(
                f"SKIPPED: {length} tokens, depth {', '.join(map(str, left_out))}: outside the local window that is "
                f"the same place as depth {measured[-1]}, about {max(0, task.deepest(length)):.2f} of the prompt",
                file=sys.stderr,
            )
