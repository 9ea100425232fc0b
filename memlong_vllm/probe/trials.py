"""Passages of prose with numbers to be remembered, and questions for them. Plain token ids."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_DIGITS = 5
SYLLABLES = ("bar", "den", "fol", "gar", "hol", "kes", "lin", "mor", "nor", "pel", "ros", "sil", "tam", "ver", "wex")
ENDINGS = ("by", "combe", "ford", "ham", "ley", "mouth", "ster", "ton", "well", "wick")
# As vocabularies write it: a marker of the space before, and digits.
NUMBER = re.compile("([Ġ▁]?)([0-9]+)")
FACT = " The number of {name} is {number}."
QUESTION = "\n\nWhat is the number of {name}? The number of {name} is"


class ProbeError(ValueError):
    """The probe cannot run as asked. The message is one line for the user."""


@dataclass(frozen=True)
class Geometry:
    """Where things stand in a trial; tokens unless said otherwise.

    A passage is memory (``num_chunks`` chunks, some with a fact) and then prose until every chunk
    is wholly outside the window of the question segment's last token: each is eligible then
    (``(c+1)τ <= b + S - W``) and each is read, so the chunks of the other facts are distractors.

    Attributes:
        window: W. chunk_size: τ. stride: S, the question segment, at most the window.
        num_chunks: chunks read, the k of a retrieval.
    """

    window: int
    chunk_size: int
    num_chunks: int
    stride: int

    @property
    def memory_tokens(self) -> int:
        return self.num_chunks * self.chunk_size

    @property
    def context_tokens(self) -> int:
        """b, where the question segment starts."""
        return self.memory_tokens + self.window - self.stride

    @property
    def fact_chunks(self) -> range:
        """Chunks that may hold a fact: out of the window of the question's *first* token, so that
        it must come from memory, and in the window where memory alone precedes the question, so
        that the ceiling is one."""
        overlap = self.stride // self.chunk_size
        hidden = max(0, self.memory_tokens + self.stride - self.window)
        return range(-(-hidden // self.chunk_size), self.num_chunks - overlap)

    def num_facts(self, most: int) -> int:
        """Facts of a passage, at most one a chunk."""
        return min(most, len(self.fact_chunks))

    def check(self) -> None:
        """Raises:
        ProbeError: naming the option, if no fact fits.
        """
        for name, value in (("--window", self.window), ("the question segment", self.stride)):
            if value <= 0 or value % self.chunk_size:
                raise ProbeError(f"{name} has {value} tokens: must be a multiple of --chunk-size {self.chunk_size}")
        if self.stride > self.window:
            raise ProbeError(f"a question of up to {self.stride} tokens exceeds --window {self.window}: raise it")
        if not self.fact_chunks:
            raise ProbeError(
                f"{self.num_chunks} chunks of {self.chunk_size} tokens leave no room for a fact that is both outside "
                f"the question's window and within a window of {self.window}: change --chunks or --chunk-size"
            )


@dataclass(frozen=True)
class Question:
    """Token ids of a question with its answer, the ``number`` that ``chunk`` gives to ``name``.

    Attributes:
        answer: indices of the answer's tokens that are digits.
        rivals: of each of them, the token ids of all numbers of its length, its own among them.
    """

    name: str
    number: str
    chunk: int
    token_ids: tuple[int, ...]
    answer: tuple[int, ...]
    rivals: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Trial:
    """A passage, ``context_tokens`` token ids, and the questions asked after it, one at a time."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def random_names(rng: random.Random, count: int) -> list[str]:
    """Names that no text has taught the model, all different."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[(rng.choice(SYLLABLES) + rng.choice(SYLLABLES) + rng.choice(ENDINGS)).capitalize()] = None
    return list(names)


def number_tokens(tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """By token that is a number: all tokens that are numbers of its length (alike in a space before).

    Raises:
        ProbeError: if the vocabulary has no digits.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if found := NUMBER.fullmatch(token):
            groups.setdefault((found[1], len(found[2])), []).append(token_id)
    if not groups:
        raise ProbeError("the model's tokenizer has no digits: numbers cannot be asked for")
    return {token_id: tuple(sorted(group)) for group in groups.values() for token_id in group}


def build_question(
    tokenizer: Any, numbers: dict[int, tuple[int, ...]], name: str, number: str, chunk: int
) -> Question:  # fmt: skip
    """The answer's tokens are the numbers after the longest prefix that question and
    question-with-answer share: tokenizers differ in where they put the space before a number."""
    asked = encode(tokenizer, QUESTION.format(name=name))
    token_ids = encode(tokenizer, QUESTION.format(name=name) + " " + number)
    shared = next((i for i, (a, b) in enumerate(zip(asked, token_ids, strict=False)) if a != b), len(asked))
    answer = tuple(i for i in range(shared, len(token_ids)) if token_ids[i] in numbers)
    if not answer:
        raise ProbeError(f"the model's tokenizer makes no number of {number!r}: numbers cannot be asked for")
    return Question(name, number, chunk, tuple(token_ids), answer, tuple(numbers[token_ids[i]] for i in answer))


def insert_fact(tokenizer: Any, rng: random.Random, prose: Sequence[int], fact: Sequence[int]) -> list[int]:
    """``prose`` with ``fact`` after one of its sentences, or anywhere if no sentence ends in it."""
    ends = [i + 1 for i, token in enumerate(prose) if tokenizer.decode([token]).rstrip("\"'”’\n ").endswith((".", "?"))]
    cut = rng.choice(ends or range(len(prose) + 1))
    return [*prose[:cut], *fact, *prose[cut:]]


def build_trial(
    tokenizer: Any,
    numbers: dict[int, tuple[int, ...]],
    rng: random.Random,
    prose: Sequence[int],
    geometry: Geometry,
    num_facts: int,
) -> Trial:
    """A trial whose passage is cut from ``prose`` (at least ``context_tokens`` token ids)."""
    chunks = sorted(rng.sample(geometry.fact_chunks, geometry.num_facts(num_facts)))
    names = random_names(rng, len(chunks))
    answers = [str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)) for _ in chunks]
    facts = dict(zip(chunks, zip(names, answers, strict=True), strict=True))
    context: list[int] = []
    used = 0
    for chunk in range(geometry.num_chunks):
        fact = encode(tokenizer, FACT.format(name=facts[chunk][0], number=facts[chunk][1])) if chunk in facts else []
        room = geometry.chunk_size - len(fact)
        if room < 0:
            raise ProbeError(f"a fact has {len(fact)} tokens, more than --chunk-size {geometry.chunk_size}: raise it")
        context += insert_fact(tokenizer, rng, prose[used : used + room], fact)
        used += room
    context += prose[used : used + geometry.context_tokens - len(context)]
    questions = tuple(build_question(tokenizer, numbers, *fact, chunk) for chunk, fact in facts.items())
    return Trial(tuple(context), questions)


def build_trials(
    tokenizer: Any, texts: Sequence[str], geometry: Geometry, num_trials: int, num_facts: int, seed: int
) -> list[Trial]:
    """``num_trials`` trials from pieces spread evenly over the texts; equal seeds, equal trials.

    Raises:
        ProbeError: if the texts are too short, or a fact or question does not fit the geometry.
    """
    geometry.check()
    pieces = cut_pieces(tokenizer, texts, geometry.context_tokens)
    if len(pieces) < num_trials:
        raise ProbeError(
            f"the texts give {len(pieces)} passages of {geometry.context_tokens} tokens, --trials and --fit-passages "
            f"ask for {num_trials}: give more --texts, or less of these"
        )
    rng, numbers = random.Random(seed), number_tokens(tokenizer)
    chosen = [pieces[i * len(pieces) // num_trials] for i in range(num_trials)]
    return [build_trial(tokenizer, numbers, rng, piece, geometry, num_facts) for piece in chosen]


def cut_pieces(tokenizer: Any, texts: Sequence[str], size: int) -> list[list[int]]:
    """All texts in pieces of ``size`` token ids that do not overlap, each begun as the model's texts are."""
    start = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id][:1]
    body = size - len(start)
    pieces: list[list[int]] = []
    for text in texts:
        ids = encode(tokenizer, text)
        pieces += [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    return pieces
