"""Prompts for recall: exact lengths, needles where they were asked for, the same for the same seed."""

from __future__ import annotations

import random
import re

import pytest

from memlong_vllm.recall_material import (
    KINDS,
    MULTIKEY,
    PASSKEY,
    REWORDED,
    MaterialError,
    Prose,
    RecallPrompt,
    recall_prompt,
    sentence_breaks,
)
from memlong_vllm.training.woven_facts import make_fact

LENGTH = 3000


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(character) for character in text]


def decode(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


SENTENCE = "it was a fine day and nobody thought of the house on the hill. "
PROSE = Prose(encode(SENTENCE * 200), frozenset({ord(".")}), [1])


def make(kind: str, seed: int = 0, depth: float = 0.5, **options: object) -> RecallPrompt:
    values: dict[str, object] = {"length": LENGTH, "depth": depth} | options
    return recall_prompt(kind, encode, PROSE, draw=random.Random(seed), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_needle_is_where_it_should_be(kind: str, depth: float, seed: int) -> None:
    prompt = make(kind, seed, depth)
    assert len(prompt.token_ids) == LENGTH
    assert prompt.token_ids[0] == 1
    start, end = prompt.needle
    text = decode(prompt.token_ids[start:end])
    assert prompt.expected in text
    assert re.fullmatch(r"[1-9]\d{4}", prompt.expected)
    # Before it: at most what depth asks for, less the search for a break, and other needles.
    asked = depth * (LENGTH - len(text))
    assert asked - 400 <= start <= asked + 400
    assert decode(prompt.token_ids[1:start]).rstrip().endswith(".") or start == 1


def test_passkey_wording() -> None:
    text = decode(make(PASSKEY).token_ids)
    key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.", text)
    assert key is not None
    assert text.endswith("What is the pass key? The pass key is")


def test_reworded_is_not_what_training_asks() -> None:
    text = decode(make(REWORDED).token_ids)
    number = re.search(r"To open the iron gate of the old orchard, turn the dial to (\d{5}) and push\.", text)
    assert number is not None
    assert text.endswith("\n\nTo open the iron gate of the old orchard, turn the dial to")
    draw = random.Random(0)
    trained = " ".join(made.statement + made.question for made in (make_fact(draw) for _ in range(2000)))
    assert not {"gate", "orchard", "dial"} & set(re.findall(r"\w+", trained))


def test_multikey_asks_for_one_of_several() -> None:
    prompt = make(MULTIKEY, num_keys=6)
    found = dict(re.findall(r"The number of the house of (\w+) is (\d{5})\.", decode(prompt.token_ids)))
    assert len(found) == len(set(found.values())) == 6
    (name,) = re.findall(r"What is the number of the house of (\w+)\?", decode(prompt.token_ids))
    assert found[name] == prompt.expected
    start, end = prompt.needle
    assert name in decode(prompt.token_ids[start:end])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [500, 1000, 2500])
def test_distance_to_the_end(kind: str, distance: int) -> None:
    for seed in range(5):
        prompt = make(kind, seed, depth=0.95, min_distance=distance)
        assert LENGTH - prompt.needle[1] >= distance


def test_the_prose_is_whole() -> None:
    """Without the needle and the question it is one stretch of the text."""
    prompt = make(PASSKEY)
    start, end = prompt.needle
    text = decode(prompt.token_ids)
    rest = text[1:start] + text[end : text.rindex("\n\nWhat")]
    assert rest in SENTENCE * 200


def test_seeds() -> None:
    assert make(PASSKEY, 1) == make(PASSKEY, 1)
    assert make(PASSKEY, 1) != make(PASSKEY, 2)
    assert make(PASSKEY, 1).expected != make(PASSKEY, 2).expected


def test_without_breaks_the_place_is_exact() -> None:
    prose = Prose(encode(SENTENCE * 200))
    prompt = recall_prompt(PASSKEY, encode, prose, LENGTH, 0.5, random.Random(0))
    asked = encode("\n\nWhat is the pass key? The pass key is")
    num_prose = LENGTH - len(asked) - (prompt.needle[1] - prompt.needle[0])
    assert prompt.needle[0] == round(0.5 * num_prose)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 60}, "tokens too short"),
        ({"length": 50_000}, "takes 49.* tokens of prose, and there are"),
        ({"min_distance": 2990}, "no place at depth 0.5 that is 2990 tokens before its end; it takes 30"),
        ({"depth": 1.5}, "a depth from 0 to 1"),
        ({"kind": "riddle"}, "must be one of"),
        ({"kind": MULTIKEY, "num_keys": 99}, "num_keys = 99"),
    ],
)
def test_what_cannot_be_made(options: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"kind": PASSKEY} | options
    with pytest.raises(MaterialError, match=message):
        make(**values)  # type: ignore[arg-type]


def test_sentence_breaks() -> None:
    words = {1: " the", 2: ".", 3: '."', 4: " Mr", 5: "\n\n", 6: ". "}
    assert sentence_breaks([1, 2, 3, 4, 5, 6, 1], words.__getitem__) == {2, 3, 5, 6}
