"""Training texts that cannot be predicted without memory: facts in prose, asked for much later."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.documents import Document

Encode = Callable[[str], list[int]]

_FIRST = ("Anne", "Bertram", "Cecily", "Dorian", "Esther", "Felix", "Greta", "Hugo", "Irene", "Jasper", "Kate",
          "Lionel", "Mabel", "Norman", "Olive", "Percy", "Quentin", "Rose", "Silas", "Thomas", "Una", "Victor",
          "Winifred", "Agatha", "Barnaby", "Clement", "Dinah", "Edgar", "Flora", "Gilbert")  # fmt: skip
_LAST = ("Ashby", "Bellamy", "Crane", "Dawlish", "Eversley", "Farrow", "Garth", "Holloway", "Ives", "Jessop",
         "Kershaw", "Lacey", "Merton", "Norwood", "Oakley", "Pemberton", "Quill", "Rudge", "Stavely", "Thorne",
         "Underhill", "Vane", "Whitlock", "Yarrow")  # fmt: skip
_OBJECTS = ("house", "box at the bank", "railway ticket", "cabin on the ship", "lottery ticket", "locker at the club",
            "telephone", "carriage", "room at the inn", "letter")  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A statement to remember and the question whose answer it gives."""

    statement: str
    question: str
    answer: str


def passkey_fact(rng: random.Random) -> Fact:
    """The usual test's wording (Mohtashami and Jaggi, 2023)."""
    key = str(rng.randrange(10000, 100000))
    return Fact(
        f" The pass key is {key}. Remember it. {key} is the pass key.",
        " What is the pass key? The pass key is",
        f" {key}",
    )


def number_fact(rng: random.Random) -> Fact:
    number = str(rng.randrange(10000, 100000))
    owner, thing = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}", rng.choice(_OBJECTS)
    subject = f"number of {owner}'s {thing}"
    return Fact(f" The {subject} is {number}.", f" What is the {subject}? The {subject} is", f" {number}")


@dataclass
class _Builder:
    """Tokens and loss weights of a document under construction."""

    prose: Sequence[int]
    prose_weight: float
    answer_weight: float
    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    taken: int = 0

    def add_prose(self, count: int) -> None:
        self.add(self.prose[self.taken : self.taken + count], self.prose_weight)
        self.taken += count

    def add(self, token_ids: Sequence[int], weight: float) -> None:
        self.token_ids += token_ids
        self.weights += [weight] * len(token_ids)


@dataclass(frozen=True)
class RecallRecipe:
    """How recall documents are made.

    Attributes:
        num_tokens: about how long one is, in tokens.
        facts: statements per document, put into the first part of it.
        prose_weight, answer_weight: loss weights of prose and of answers, which are a few tokens of
            each segment; copy_weight: that of repeated passages. Statements and questions count 0.
        copies: passages of the prose repeated word for word later in the document, per document.
    """

    num_tokens: int = 6144
    facts: int = 12
    prose_weight: float = 1.0
    answer_weight: float = 8.0
    copy_weight: float = 1.0
    copies: int = 3


def recall_document(
    name: str, prose: Sequence[int], encode: Encode, memory: MemoryConfig, recipe: RecallRecipe, rng: random.Random
) -> Document:
    """A document of ``prose`` with facts, then questions about them and repeated passages.

    A question ends with the first token of a retrieval segment, so that what is retrieved there
    is retrieved with the question as the query, as at the end of a prompt.

    Args:
        prose: more than ``recipe.num_tokens`` tokens.
        encode: text -> tokens, without special ones.
    """
    builder = _Builder(prose, recipe.prose_weight, recipe.answer_weight)
    facts = [passkey_fact(rng)] + [number_fact(rng) for _ in range(recipe.facts - 1)]
    rng.shuffle(facts)
    stated = _state_facts(builder, facts, encode, recipe.num_tokens // 3, rng)
    # Whatever was stated has left the window of the segments that ask for it.
    builder.add_prose(memory.local_window + memory.retrieval_stride)
    copies, asked = recipe.copies, 0
    while len(builder.token_ids) < recipe.num_tokens:
        if copies and rng.random() < 0.25:
            copies -= 1
            _copy_passage(builder, stated, memory.retrieval_stride, recipe.copy_weight, rng)
        else:
            # In turn, so that an answer has left the window before it is asked for again.
            _ask(builder, facts[asked % len(facts)], encode, memory.retrieval_stride)
            asked += 1
    return Document(name, tuple(builder.token_ids), tuple(builder.weights))


def _state_facts(builder: _Builder, facts: Sequence[Fact], encode: Encode, within: int, rng: random.Random) -> int:
    gaps = [rng.randrange(within // len(facts) // 2, within // len(facts) * 3 // 2) for _ in facts]
    for fact, gap in zip(facts, gaps, strict=True):
        builder.add_prose(gap)
        builder.add(encode(fact.statement), 0.0)  # Nobody can predict these.
    return len(builder.token_ids)


def _ask(builder: _Builder, fact: Fact, encode: Encode, stride: int) -> None:
    question, answer = encode(fact.question), encode(fact.answer)
    length = len(builder.token_ids)
    # The question's last token is the first of a segment.
    end = -(-(length + len(question) + stride // 4) // stride) * stride + 1
    builder.add_prose(end - len(question) - length)
    builder.add(question, 0.0)
    builder.add(answer, builder.answer_weight)
    builder.add(encode("."), 0.0)


def _copy_passage(builder: _Builder, before: int, stride: int, weight: float, rng: random.Random) -> None:
    """Repeat two strides of what stands in the first ``before`` tokens; the second counts."""
    first = rng.randrange(0, max(1, before - 2 * stride))
    passage = builder.token_ids[first : first + 2 * stride]
    builder.add(passage[:stride], 0.0)
    builder.add(passage[stride:], weight)


def recall_documents(
    proses: Sequence[tuple[str, Sequence[int]]], count: int, encode: Encode, memory: MemoryConfig,
    recipe: RecallRecipe, seed: int,
) -> list[Document]:  # fmt: skip
    """``count`` documents of prose from the texts in turn, from places drawn with ``seed``.

    Raises:
        ValueError: if no text is long enough.
    """
    long_enough = [(name, tokens) for name, tokens in proses if len(tokens) > recipe.num_tokens]
    if not long_enough:
        raise ValueError(f"recall documents of {recipe.num_tokens} tokens need a text that is longer")
    documents = []
    for idx in range(count):
        rng = random.Random(f"{seed}/{idx}")
        name, tokens = long_enough[idx % len(long_enough)]
        first = rng.randrange(0, len(tokens) - recipe.num_tokens)
        prose = tokens[first : first + recipe.num_tokens]
        documents.append(recall_document(f"recall {idx} in {name}", prose, encode, memory, recipe, rng))
    return documents
