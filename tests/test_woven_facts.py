"""Training texts with facts and questions: facts are out of sight where they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.documents import Document
from memlong_vllm.training.woven_facts import WeaveRecipe, weave
from tests.checkpoints import Checkpoints

MEMORY = MemoryConfig(1, (1,), chunk_size=16, local_window=64, retrieval_stride=16, query_tokens=16)
RECIPE = WeaveRecipe(gap=60, answer_weight=7.0, copies=0.1)


@pytest.fixture
def encode(checkpoints: Checkpoints) -> Callable[[str], list[int]]:
    return lambda text: list(checkpoints.tokenizer(text, add_special_tokens=False)["input_ids"])


def answers(document: Document, weight: float) -> list[tuple[int, int]]:
    """[start, end) of the tokens that have the weight of answers."""
    assert document.loss_weights is not None
    found, start = [], None
    for position, value in enumerate([*document.loss_weights, 0.0]):
        if value == weight and start is None:
            start = position
        elif value != weight and start is not None:
            found.append((start, position))
            start = None
    return found


@pytest.mark.parametrize("seed", range(4))
def test_answers_stand_in_the_text_before_but_not_in_sight(
    seed: int, checkpoints: Checkpoints, tokens: list[int], encode: Callable[[str], list[int]]
) -> None:
    document = weave(Document("x", tuple(tokens[:4000])), encode, MEMORY, RECIPE, seed)
    assert document.loss_weights is not None
    assert len(document.token_ids) == len(document.loss_weights) == 4000
    decode = checkpoints.tokenizer.decode
    found = answers(document, RECIPE.answer_weight)
    assert len(found) >= 5
    assert 0 <= len(document.questions) - len(found) <= 1  # The last may be cut before its answer.
    stride = MEMORY.retrieval_stride
    assert len({question // stride for question in document.questions}) == len(document.questions)
    assert len({question % stride for question in document.questions}) > 3
    for start, end in found[:-1]:  # The last may be cut.
        assert start - 1 in document.questions
        answer, window = decode(document.token_ids[start:end]), start - 1 - MEMORY.local_window
        assert decode(document.token_ids[start - 24 : start]).rstrip().endswith("is")
        assert answer in decode(document.token_ids[:window])
        assert answer not in decode(document.token_ids[window:start])


def test_prose_counts_and_statements_do_not(tokens: list[int], encode: Callable[[str], list[int]]) -> None:
    document = weave(Document("x", tuple(tokens[:4000])), encode, MEMORY, RECIPE, 0)
    assert document.loss_weights is not None
    assert set(document.loss_weights) == {0.0, 1.0, RECIPE.answer_weight}
    prose = [t for t, weight in zip(document.token_ids, document.loss_weights, strict=True) if weight == 1.0]
    assert prose[:16] == tokens[:16]
    assert len(prose) > 1500


def test_name_and_seed_decide(tokens: list[int], encode: Callable[[str], list[int]]) -> None:
    first, again = (weave(Document("x", tuple(tokens[:2000])), encode, MEMORY, RECIPE, 1) for _ in range(2))
    assert first == again
    assert first != weave(Document("x", tuple(tokens[:2000])), encode, MEMORY, RECIPE, 2)
    assert first.token_ids != weave(Document("y", tuple(tokens[:2000])), encode, MEMORY, RECIPE, 1).token_ids


def test_copies_are_the_share_that_is_asked_for(tokens: list[int], encode: Callable[[str], list[int]]) -> None:
    """Of what is repeated, only copies count as prose does: their second half, a stride."""
    size = MEMORY.retrieval_stride

    def copied(share: float) -> int:
        document = weave(Document("x", tuple(tokens[:4000])), encode, MEMORY, WeaveRecipe(60, 7.0, share), 0)
        assert document.loss_weights is not None
        first: dict[tuple[int, ...], int] = {}
        found = 0
        for start in range(len(document.token_ids) - size + 1):
            passage = document.token_ids[start : start + size]
            is_prose = set(document.loss_weights[start : start + size]) == {1.0}
            found += is_prose and start - first.setdefault(passage, start) > MEMORY.local_window
        return found

    none, some, many = (copied(share) for share in (0.0, 0.2, 0.8))
    assert none < some / 4, (none, some, many)
    assert some < many / 2, (none, some, many)
