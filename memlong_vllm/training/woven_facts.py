"""Facts woven into prose and asked for much later: what cannot be predicted without memory.

Long texts seldom need what has left the window, so a model learns to read from memory slowly from
them alone. Every training text therefore also states facts, asks for them when they are out of
sight, and now and then repeats a passage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memlong_vllm.config import MemoryConfig
from memlong_vllm.recall_material import five_digits, key_note, key_question
from memlong_vllm.training.documents import Document

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

_FIRST = ("Anne", "Bertram", "Cecily", "Dorian", "Esther", "Felix", "Greta", "Hugo", "Irene", "Jasper", "Kate",
          "Lionel", "Mabel", "Norman", "Olive", "Percy", "Quentin", "Rose", "Silas", "Thomas", "Una", "Victor",
          "Winifred", "Agatha", "Barnaby", "Clement", "Dinah", "Edgar", "Flora", "Gilbert")  # fmt: skip
_LAST = ("Ashby", "Bellamy", "Crane", "Dawlish", "Eversley", "Farrow", "Garth", "Holloway", "Ives", "Jessop",
         "Kershaw", "Lacey", "Merton", "Norwood", "Oakley", "Pemberton", "Quill", "Rudge", "Stavely", "Thorne",
         "Underhill", "Vane", "Whitlock", "Yarrow")  # fmt: skip
_NUMBERED = ("house", "box at the bank", "railway ticket", "cabin on the ship", "lottery ticket", "locker at the club",
             "telephone", "carriage", "room at the inn", "letter")  # fmt: skip
_NAMED = ("horse", "dog", "ship", "cottage", "favourite song", "birthplace", "old teacher", "tailor")
_WORDS = ("Amber", "Beacon", "Cinder", "Dover", "Elm", "Falcon", "Garnet", "Heron", "Ivory", "Juniper", "Kestrel",
          "Lantern", "Marble", "Nectar", "Onyx", "Pepper", "Quartz", "Raven", "Saffron", "Thistle", "Umber",
          "Velvet", "Willow", "Yew", "Zephyr", "Bramble", "Copper", "Drake", "Ember", "Fern")  # fmt: skip
_KEYS = ("pass key", "secret code", "combination of the safe", "watchword", "number of the account")
# What stands around an inserted sentence: a paragraph of its own, or the running text.
_SETTINGS = (("\n\n", "\n\n"), (" ", ""))


@dataclass(frozen=True)
class Fact:
    """A statement to remember and the question whose answer it gives."""

    statement: str
    question: str
    answer: str


def named_key(draw: random.Random, name: str) -> Fact:
    key = five_digits(draw)
    return Fact(key_note(key, name), key_question(name), f" {key}")


def make_fact(draw: random.Random) -> Fact:
    """Something about a person, in one of a few forms: five digits, or a name of two words."""
    owner = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
    if draw.random() < 0.7:
        thing, answer = draw.choice(_NUMBERED), five_digits(draw)
        subject = draw.choice((f"number of {owner}'s {thing}", f"number of the {thing} of {owner}"))
    else:
        thing, answer = draw.choice(_NAMED), f"{draw.choice(_WORDS)} {draw.choice(_LAST)}"
        subject = f"name of {owner}'s {thing}"
    return Fact(f"The {subject} is {answer}.", f"What is the {subject}? The {subject} is", f" {answer}")


@dataclass(frozen=True)
class WeaveRecipe:
    """How facts are woven into a text.

    Attributes:
        gap: mean tokens of prose between two insertions.
        answer_weight: loss weight of an answer's tokens; prose has 1, statements and questions 0.
        copies: share of insertions that repeat a passage instead (two strides, the second counts 1).
    """

    gap: int = 300
    answer_weight: float = 4.0
    copies: float = 0.1


@dataclass
class _Stated:
    """A fact of the text and where it was last in sight: the end of its statement or answer."""

    fact: Fact
    last_seen: int


@dataclass
class _Weaver:
    """A document under construction."""

    prose: Sequence[int]
    encode: Encode
    memory: MemoryConfig
    recipe: WeaveRecipe
    draw: random.Random
    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    taken: int = 0
    facts: list[_Stated] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=lambda: list(_KEYS))

    def add(self, token_ids: Sequence[int], weight: float) -> None:
        self.token_ids += token_ids
        self.weights += [weight] * len(token_ids)

    def add_prose(self, count: int) -> None:
        self.add(self.prose[self.taken : self.taken + count], 1.0)
        self.taken += count

    def out_of_sight(self) -> list[_Stated]:
        """Facts that no token of the next two segments sees in its window, and that memory has not forgotten."""
        memory = self.memory
        distance = memory.local_window + memory.chunk_size
        is_complete = len(self.prose) <= memory.memory_size
        remembered = len(self.prose) if is_complete else memory.memory_size // 2
        ages = [(stated, len(self.token_ids) - stated.last_seen) for stated in self.facts]
        return [stated for stated, age in ages if distance < age < remembered]

    def insert(self) -> None:
        """State something, or ask for something that is out of sight, or repeat a passage."""
        ready = self.out_of_sight()
        passage = 2 * self.memory.retrieval_stride
        old = len(self.token_ids) - self.memory.local_window - 2 * passage
        if old > 0 and self.draw.random() < self.recipe.copies:
            self._repeat(self.draw.randrange(old), passage)
        elif ready and self.draw.random() < 0.6:
            self._ask(self.draw.choice(ready))
        else:
            self._state()

    def _state(self) -> None:
        if self.keys and self.draw.random() < 0.3:
            fact = named_key(self.draw, self.keys.pop(self.draw.randrange(len(self.keys))))
        else:
            fact = make_fact(self.draw)
        while any(stated.fact.question == fact.question for stated in self.facts):
            fact = make_fact(self.draw)  # A question has one answer.
        before, after = self.draw.choice(_SETTINGS)
        self.add(self.encode(before + fact.statement + after), 0.0)
        self.facts.append(_Stated(fact, len(self.token_ids)))

    def _ask(self, stated: _Stated) -> None:
        """The question ends anywhere in a retrieval stride, as prompts do."""
        before, _ = self.draw.choice(_SETTINGS)
        question, answer = self.encode(before + stated.fact.question), self.encode(stated.fact.answer)
        stride = self.memory.retrieval_stride
        end = len(self.token_ids) + len(question) - 1 + self.draw.randrange(stride)
        if self.questions and end // stride == self.questions[-1] // stride:
            end = (end // stride + 1) * stride
        self.add_prose(end + 1 - len(question) - len(self.token_ids))
        self.add(question, 0.0)
        self.questions.append(end)
        # The full stop counts as well: where an answer ends has to be learned, too.
        self.add(answer + self.encode("."), self.recipe.answer_weight)
        stated.last_seen = len(self.token_ids)

    def _repeat(self, first: int, length: int) -> None:
        for stated in self.facts:
            if first < stated.last_seen <= first + length:
                stated.last_seen = len(self.token_ids) + length
        passage = self.token_ids[first : first + length]
        self.add(passage[: length // 2], 0.0)
        self.add(passage[length // 2 :], 1.0)


def weave(document: Document, encode: Encode, memory: MemoryConfig, recipe: WeaveRecipe, seed: int) -> Document:
    """``document`` with facts, questions and repeated passages in it, as long as before.

    Args:
        encode: of the document's tokenizer.
        seed: with the document's name, decides everything that is inserted.
    """
    draw = random.Random(f"{seed}/{document.name}")
    weaver = _Weaver(document.token_ids, encode, memory, recipe, draw)
    length = len(document.token_ids)
    while len(weaver.token_ids) < length:
        weaver.add_prose(round(min(4 * recipe.gap, max(16.0, draw.expovariate(1 / recipe.gap)))))
        weaver.insert()
    questions = tuple(position for position in weaver.questions if position < length)
    return Document(document.name, tuple(weaver.token_ids[:length]), tuple(weaver.weights[:length]), questions)
