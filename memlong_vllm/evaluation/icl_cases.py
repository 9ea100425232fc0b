"""The questions of ``evaluate icl``: every tested sentence after, or beside, every choice of demonstrations."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memlong_vllm.evaluation.demonstrations import SentenceRetriever, draw_demonstrations, memory_tokens
from memlong_vllm.evaluation.labelled_sentences import Example, Wording
from memlong_vllm.evaluation.results import Row
from memlong_vllm.evaluation.scoring import EvaluationError

# What is done with the demonstrations that the prompt does not have anyway.
NONE, MEMORY, SHUFFLED, PROMPT, RAG = "none", "memory", "shuffled", "prompt", "rag"
BESIDE = (SHUFFLED, PROMPT, RAG)
CONTENT_FREE = "N/A"


@dataclass(frozen=True)
class Demonstrations:
    """A named memory of demonstrations."""

    name: str
    token_ids: list[int]


@dataclass(frozen=True)
class Case:
    """A question, as it is put to every model.

    Attributes:
        row: the fields that identify it, but for the model.
        prompt: tokens of demonstrations and question.
        content_free: the same around a sentence that says nothing, to calibrate with.
        memory: what is read beside the prompt.
    """

    row: Row
    label: int
    prompt: Sequence[int]
    content_free: Sequence[int] | None
    memory: Demonstrations | None


@dataclass(frozen=True)
class Plan:
    """Which cases there are.

    Attributes:
        shots: numbers of demonstrations in every prompt.
        memory_shots: numbers of further ones, above 0.
        beside: what is done with the further ones, beside putting them into memory.
        num_retrieved: how many of them ``"rag"`` puts into a prompt.
    """

    tested: list[Example]
    pool: list[Example]
    shots: list[int]
    memory_shots: list[int]
    beside: list[str]
    num_retrieved: int
    num_seeds: int
    calibrate: bool


class CaseMaker:
    """Words the cases of a plan.

    Args:
        tokenizer: of the models.
        retriever: needed for ``"rag"``.
    """

    def __init__(
        self, plan: Plan, wording: Wording, tokenizer: Any, chunk_size: int, retriever: SentenceRetriever | None
    ) -> None:
        self._plan, self._wording, self._tokenizer = plan, wording, tokenizer
        self._chunk_size, self._retriever = chunk_size, retriever

    def cases(self) -> Iterator[Case]:
        """By seed and memory: a memory's cases follow on one another."""
        plan = self._plan
        for seed in range(plan.num_seeds):
            in_prompt, in_memory = draw_demonstrations(
                plan.pool, len(self._wording.words), max(plan.shots), max([0, *plan.memory_shots]), seed
            )
            for shots in plan.shots:
                # Without any demonstration there is nothing to draw: one seed says it all.
                if shots or not seed:
                    row = {"method": NONE, "shots": shots, "memory_shots": 0, "seed": seed if shots else None}
                    yield from self._arm(row, in_prompt[:shots], [], None)
            for num in plan.memory_shots:
                more = in_memory[:num]
                for method in (MEMORY, *plan.beside):
                    shown, read = more, None
                    if method in (MEMORY, SHUFFLED):
                        shown, read = [], self._memory(f"icl-{seed}-{num}-{method}", more, method == SHUFFLED)
                    for shots in plan.shots:
                        row = {"method": method, "shots": shots, "memory_shots": num, "seed": seed}
                        yield from self._arm(row, in_prompt[:shots], shown, read)

    def _memory(self, name: str, examples: Sequence[Example], is_shuffled: bool) -> Demonstrations:
        if is_shuffled:
            # The same sentences and as many of each label, but which belongs to which is by chance.
            labels = [example.label for example in examples]
            random.Random(name).shuffle(labels)
            examples = [replace(example, label=label) for example, label in zip(examples, labels, strict=True)]
        texts = [self._wording.demonstrate(example) for example in examples]
        return Demonstrations(name, memory_tokens(texts, self.encode, self._chunk_size))

    def _arm(
        self, row: Row, near: Sequence[Example], more: Sequence[Example], memory: Demonstrations | None
    ) -> Iterator[Case]:
        """Every tested sentence after the same demonstrations, or after those of ``more`` that are like it."""
        for example in self._plan.tested:
            before = more
            if row["method"] == RAG and self._retriever is not None:
                before = self._retriever.nearest(example.sentence, more, self._plan.num_retrieved)
            context = "".join(self._wording.demonstrate(shown) for shown in (*before, *near))
            free = self._tokens(context, CONTENT_FREE) if self._plan.calibrate else None
            numbered = row | {"example": example.number}
            yield Case(numbered, example.label, self._tokens(context, example.sentence), free, memory)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def _tokens(self, context: str, sentence: str) -> Sequence[int]:
        # Compact: there can be tens of thousands of prompts.
        return array("i", self.encode(context + self._wording.ask(sentence)))

    def label_ids(self) -> list[int]:
        """The first token of each label's word, as it follows a question.

        Raises:
            EvaluationError: if two are the same.
        """
        question, words = self._wording.ask(CONTENT_FREE), self._wording.words
        asked, first = self.encode(question), []
        for word in words:
            answered = self.encode(f"{question} {word}")
            if answered[: len(asked)] != asked or len(answered) == len(asked):
                raise EvaluationError(f"this tokenizer joins the question's end with {word!r}: other --label-words")
            first.append(answered[len(asked)])
        for other, word in enumerate(words):
            same = words[first.index(first[other])]
            if same != word:
                raise EvaluationError(
                    f"the label words {same!r} and {word!r} begin with the same token, so one token cannot tell them "
                    "apart: name others with --label-words"
                )
        return first
