"""Training texts of facts and questions: the facts are out of sight where they are asked for."""

from __future__ import annotations

import random

import pytest

from memlong_vllm.config import MemoryConfig
from memlong_vllm.training.recall_documents import RecallRecipe, recall_document, recall_documents
from tests.checkpoints import Checkpoints

MEMORY = MemoryConfig(1, (1,), chunk_size=16, local_window=64, retrieval_stride=16, query_tokens=16)
RECIPE = RecallRecipe(num_tokens=1200, facts=4, copies=1)


def encode_with(checkpoints: Checkpoints):
    return lambda text: list(checkpoints.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("seed", range(4))
def test_answers_stand_in_the_text_before_but_not_in_the_window(
    seed: int, checkpoints: Checkpoints, tokens: list[int]
) -> None:
    encode = encode_with(checkpoints)
    document = recall_document("x", tokens[:4000], encode, MEMORY, RECIPE, random.Random(seed))
    assert len(document.token_ids) == len(document.loss_weights)
    answers = 0
    position = 0
    while position < len(document.token_ids):
        if document.loss_weights[position] != RECIPE.answer_weight:
            position += 1
            continue
        end = position
        while end < len(document.token_ids) and document.loss_weights[end] == RECIPE.answer_weight:
            end += 1
        # The question's last token opens a segment, so the segment's query is the question.
        assert (position - 1) % MEMORY.retrieval_stride == 0
        answer = checkpoints.tokenizer.decode(document.token_ids[position:end]).strip(" .")
        assert answer.isdigit()
        assert len(answer) == 5
        window_start = position - 1 - MEMORY.local_window
        question = checkpoints.tokenizer.decode(document.token_ids[position - 24 : position])
        assert question.rstrip().endswith("is")
        assert answer in checkpoints.tokenizer.decode(document.token_ids[:window_start])
        in_sight = checkpoints.tokenizer.decode(document.token_ids[max(0, window_start) : position])
        assert answer not in in_sight
        answers += 1
        position = end
    assert answers >= 3


def test_the_same_seed_makes_the_same(checkpoints: Checkpoints, tokens: list[int]) -> None:
    encode, proses = encode_with(checkpoints), [("a", tokens[:9000]), ("b", tokens[9000:18000])]
    first, again, other = (recall_documents(proses, 3, encode, MEMORY, RECIPE, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({document.name for document in first}) == 3


def test_a_text_must_be_long_enough(checkpoints: Checkpoints, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="need a text that is longer"):
        recall_documents([("a", tokens[:500])], 1, encode_with(checkpoints), MEMORY, RECIPE, 0)
