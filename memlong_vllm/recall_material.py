"""Prompts that ask for something hidden far back in real prose. Standard library only.

Measured with ``memlong-vllm evaluate recall``; the notes and questions of keys are also among what
:mod:`memlong_vllm.training.woven_facts` trains on, with other keys. Needles are put between tokens, not
into a string, so that a prompt has exactly the length that is asked for and its needle's place is known.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

PASSKEY, MULTIKEY, REWORDED = "passkey", "multikey", "reworded"
KINDS = (PASSKEY, MULTIKEY, REWORDED)
NUM_KEYS = 4
# How far before the place that is asked for a sentence's end is looked for, in tokens.
BREAK_SEARCH = 64
# Of one or two syllables and unlike each other, so that no name is read for another.
NAMES = (
    "Abbot", "Baker", "Carter", "Dyer", "Ellis", "Fisher", "Grant", "Harvey", "Irving", "Jordan", "Keller", "Lambert",
    "Mason", "Norton", "Osborne", "Parker", "Quinn", "Rogers", "Sawyer", "Turner", "Underwood", "Vaughan", "Walker",
    "Yates",
)  # fmt: skip


class MaterialError(ValueError):
    """A prompt cannot be made as asked. The message says what is too short."""


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt and what it asks for.

    Attributes:
        token_ids: prose with needles in it, more prose, the question.
        expected: the digits that continue it right.
        needle: [start, end) of the tokens that say them.
    """

    token_ids: list[int]
    expected: str
    needle: tuple[int, int]

    @property
    def depth(self) -> float:
        """Where the needle starts, as a fraction of the prompt."""
        return self.needle[0] / len(self.token_ids)


@dataclass(frozen=True)
class Prose:
    """Tokens that needles are hidden in.

    Attributes:
        token_ids: of any text; as much as prompts are long, and more to choose from.
        breaks: ids of tokens after which a sentence ends, if they are known: needles are put there.
        prefix: special tokens that prompts begin with.
    """

    token_ids: Sequence[int]
    breaks: Container[int] = ()
    prefix: Sequence[int] = ()


def sentence_breaks(token_ids: Sequence[int], decode: Callable[[int], str]) -> frozenset[int]:
    """For :attr:`Prose.breaks`: those of the tokens whose text ends a sentence or a line.

    Args:
        decode: a token's text.
    """
    ends = (".", "!", "?", "\n", '."', ".\u201d")
    return frozenset(token for token in set(token_ids) if decode(token).rstrip(" ").endswith(ends))


def recall_prompt(
    kind: str,
    encode: Encode,
    prose: Prose,
    length: int,
    depth: float,
    draw: random.Random,
    min_distance: int = 0,
    num_keys: int = NUM_KEYS,
) -> RecallPrompt:
    """Make a prompt of exactly ``length`` tokens.

    Args:
        kind: ``"passkey"``: one five-digit key; ``"multikey"``: the numbers of several houses, one
            of which is asked for; ``"reworded"``: one number that is not called a key, in words that
            ``finetune`` trains nobody on.
        depth: where the needle that is asked for stands in the prose: 0 at its beginning, 1 at its end.
        draw: the stretch of prose, the keys, the names and the other needles' places come from it.
        min_distance: tokens between the needle's end and the prompt's at least; it moves the needle
            back. Windows of W and chunks of C tokens: W + C put it outside, its chunks stored.
        num_keys: needles of ``"multikey"``.

    Raises:
        MaterialError: if prose or prompt is too short.
    """
    needles, question, expected = _wording(kind, draw, num_keys)
    encoded, asked = [encode(needle) for needle in needles], encode(question)
    num_prose = length - len(prose.prefix) - sum(map(len, encoded)) - len(asked)
    filler = _stretch(prose, num_prose, draw)
    # The question is between needle and end as well; other needles may be, or may not.
    prose_after = max(0, min_distance - len(asked))
    latest = num_prose - prose_after
    if latest < 0 or not 0 <= depth <= 1:
        raise MaterialError(
            f"a prompt of {length} tokens has no place at depth {depth} that is {min_distance} tokens before its end; "
            f"it takes {length + prose_after - num_prose} tokens or more, and a depth from 0 to 1"
        )
    places = [min(round(depth * num_prose), latest), *(draw.randint(0, num_prose) for _ in needles[1:])]
    places = [_after_break(filler, place, prose.breaks) for place in places]
    token_ids, needle = _insert([*prose.prefix], filler, list(zip(places, encoded, strict=True)))
    return RecallPrompt(token_ids + asked, expected, needle)


def _wording(kind: str, draw: random.Random, num_keys: int) -> tuple[list[str], str, str]:
    """The needles, the one that is asked for first; the question; and the digits that answer it."""
    if kind == PASSKEY:
        return _passkey(draw)
    if kind == MULTIKEY:
        return _multikey(draw, num_keys)
    if kind == REWORDED:
        return _reworded(draw)
    raise MaterialError(f"kind {kind!r}: must be one of {KINDS}")


def key_note(key: str, name: str = "pass key") -> str:
    """The usual test's wording (Mohtashami and Jaggi, 2023), also of keys of another name."""
    return f"The {name} is {key}. Remember it. {key} is the {name}."


def key_question(name: str = "pass key") -> str:
    return f"What is the {name}? The {name} is"


def _passkey(draw: random.Random) -> tuple[list[str], str, str]:
    key = five_digits(draw)
    return [f"\n\n{key_note(key)}\n\n"], f"\n\n{key_question()}", key


def _multikey(draw: random.Random, num_keys: int) -> tuple[list[str], str, str]:
    if not 1 <= num_keys <= len(NAMES):
        raise MaterialError(f"num_keys = {num_keys}: there are {len(NAMES)} names")
    names = draw.sample(NAMES, num_keys)
    keys: list[str] = []
    while len(keys) < num_keys:
        key = five_digits(draw)
        keys += [key] if key not in keys else []
    needles = [f"\n\nThe number of the house of {name} is {key}.\n\n" for name, key in zip(names, keys, strict=True)]
    question = f"\n\nWhat is the number of the house of {names[0]}? The number of the house of {names[0]} is"
    return needles, question, keys[0]


def _reworded(draw: random.Random) -> tuple[list[str], str, str]:
    number = five_digits(draw)
    text = "To open the iron gate of the old orchard, turn the dial to"
    return [f"\n\n{text} {number} and push.\n\n"], f"\n\n{text}", number


def five_digits(draw: random.Random) -> str:
    """A number of five digits, the first not 0."""
    return str(draw.randint(10000, 99999))


def _stretch(prose: Prose, num: int, draw: random.Random) -> list[int]:
    if num < 1:
        raise MaterialError(f"a prompt has no room for prose: it is {1 - num} tokens too short")
    if num > len(prose.token_ids):
        raise MaterialError(f"a prompt takes {num} tokens of prose, and there are {len(prose.token_ids)}")
    start = draw.randint(0, len(prose.token_ids) - num)
    return list(prose.token_ids[start : start + num])


def _after_break(filler: Sequence[int], place: int, breaks: Container[int]) -> int:
    """The last place up to ``place`` after a sentence's end, if there is one near."""
    for candidate in range(place, max(0, place - BREAK_SEARCH), -1):
        if filler[candidate - 1] in breaks:
            return candidate
    return place


def _insert(
    token_ids: list[int], filler: Sequence[int], needles: Sequence[tuple[int, list[int]]]
) -> tuple[list[int], tuple[int, int]]:
    """``token_ids`` with ``filler`` and, at their places in it, the needles. Also says where the
    first of them has come to stand. Of needles with one place, it is the first there."""
    found, done = (0, 0), 0
    for number, (place, needle) in sorted(enumerate(needles), key=lambda entry: (entry[1][0], entry[0])):
        token_ids += filler[done:place]
        done = place
        if number == 0:
            found = len(token_ids), len(token_ids) + len(needle)
        token_ids += needle
    return token_ids + list(filler[done:]), found
