"""Which examples a model is shown, and in what order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Protocol

import numpy as np

from memlong_vllm.evaluation.labelled_sentences import Example
from memlong_vllm.evaluation.scoring import EvaluationError

Encode = Callable[[str], list[int]]


class Embeds(Protocol):
    """The part of a retriever's embedder that is needed here."""

    def embed(self, texts: list[str]) -> np.ndarray: ...


def draw_demonstrations(
    pool: Sequence[Example], num_labels: int, in_prompt: int, in_memory: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw those for the prompt and others for the memory.

    The first n of either have every label equally often, as far as n can be divided; and they are
    the same whatever numbers are asked for, so that runs with more of them differ by these alone.

    Raises:
        EvaluationError: if the pool has too few of a label.
    """
    # Named: as numbers, -n and n are one seed.
    draw = random.Random(f"{seed} examples")
    prompts: list[list[Example]] = []
    memories: list[list[Example]] = []
    for label in range(num_labels):
        examples = [example for example in pool if example.label == label]
        draw.shuffle(examples)
        middle = len(examples) // 2
        most = -(-max(in_prompt, in_memory) // num_labels)
        if middle < most:
            raise EvaluationError(
                f"there are {len(examples)} sentences with label {label} to demonstrate with, and {2 * most} are "
                "needed: name a longer file with --train, or lower --shots and --memory-shots"
            )
        prompts.append(examples[:middle])
        memories.append(examples[middle:])
    return (
        _balanced(prompts, in_prompt, random.Random(f"{seed} prompt")),
        _balanced(memories, in_memory, random.Random(f"{seed} memory")),
    )


def _balanced(by_label: Sequence[Sequence[Example]], num: int, draw: random.Random) -> list[Example]:
    """Rounds with one example of each label, in an order of their own each."""
    drawn: list[Example] = []
    for turn in range(max(map(len, by_label))):
        order = list(range(len(by_label)))
        draw.shuffle(order)
        drawn += [by_label[label][turn] for label in order if turn < len(by_label[label])]
        if len(drawn) >= num:
            break
    return drawn[:num]


def memory_tokens(texts: Sequence[str], encode: Encode, chunk_size: int) -> list[int]:
    """Texts as the tokens of a memory. Only complete chunks are kept, so the last one is filled with
    texts from the beginning once more.

    Args:
        encode: text to tokens, with the special tokens that texts begin with.
    """
    whole = "".join(texts)
    token_ids = encode(whole)
    num = -(-len(token_ids) // chunk_size) * chunk_size
    for text in cycle(texts):
        if len(token_ids) >= num:
            break
        whole += text
        token_ids = encode(whole)
    return token_ids[:num]


class SentenceRetriever:
    """Finds the examples most like a sentence, by the retriever that the memory has.

    Args:
        instruction: put before every text, as the memory does.
    """

    def __init__(self, embedder: Embeds, instruction: str | None) -> None:
        self._embedder, self._instruction = embedder, instruction or ""
        self._vectors: dict[str, np.ndarray] = {}

    def nearest(self, sentence: str, examples: Sequence[Example], num: int) -> list[Example]:
        """The ``num`` most similar ones, the best last: next to the question."""
        asked = self._vector(sentence)
        ranked = sorted(examples, key=lambda example: float(self._vector(example.sentence) @ asked))
        return ranked[len(ranked) - min(num, len(ranked)) :]

    def _vector(self, text: str) -> np.ndarray:
        if text not in self._vectors:
            # One by one: padding would make a vector depend on its neighbours.
            self._vectors[text] = self._embedder.embed([self._instruction + text])[0]
        return self._vectors[text]
