"""Which tokens ``memlong-vllm evaluate perplexity`` scores; no model is loaded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.perplexity import Perplexity
from memlong_vllm.evaluation.texts import Text

LENGTHS, LAST, OFFSET, BEGIN = [30, 50, 100], 20, 7, 999
SPEC = ModelSpec("memlong", Path("model"), Path("model"), "memlong", 64)


def sequences(align: str, num_tokens: int = 500) -> dict[int, dict[int, list[int]]]:
    """Of a text whose tokens are numbered: by window and length."""
    task = Perplexity(
        texts=[Text("text", "0f", list(range(num_tokens)))],
        lengths=LENGTHS, sizes=[0], top_k=None, last=LAST, offset=OFFSET, windows=3, align=align, buckets=0,
        prefix=[BEGIN],
    )  # fmt: skip
    found: dict[int, dict[int, list[int]]] = {}
    for item in task.items(SPEC):
        found.setdefault(item.row["window"], {})[item.row["length"]] = list(item.prompt.token_ids)
    return found


@pytest.mark.parametrize("align", ["end", "start"])
def test_sequences_of_all_lengths_are_aligned(align: str) -> None:
    found = sequences(align)
    for window, by_length in found.items():
        assert list(by_length) == LENGTHS
        bodies = [token_ids[1:] for token_ids in by_length.values()]
        for length, (first, *body) in by_length.items():
            assert first == BEGIN
            assert len(body) == length - 1
            assert body == list(range(body[0], body[0] + len(body))), "a stretch of the text"
        if align == "end":
            assert len({tuple(body[-LAST:]) for body in bodies}) == 1, "the same tokens are scored"
            assert len({body[0] for body in bodies}) == len(LENGTHS)
        else:
            assert {body[0] for body in bodies} == {OFFSET + 99 * window}
            assert len({body[-1] for body in bodies}) == len(LENGTHS)


@pytest.mark.parametrize("align", ["end", "start"])
def test_stretches_are_disjoint(align: str) -> None:
    longest = [by_length[100][1:] for by_length in sequences(align).values()]
    assert len(longest) == 3
    assert longest[0][0] == OFFSET
    assert all(before[-1] + 1 == after[0] for before, after in pairwise(longest))


def test_a_stretch_that_is_too_short() -> None:
    """Aligned at the end it is left out; aligned at the start, for the lengths that it has not."""
    assert {window: list(of) for window, of in sequences("end", 280).items()} == {0: LENGTHS, 1: LENGTHS}
    assert {window: list(of) for window, of in sequences("start", 280).items()} == {
        0: LENGTHS, 1: LENGTHS, 2: [30, 50],
    }  # fmt: skip


def test_the_last_tokens_are_scored() -> None:
    values: dict[str, Any] = {"texts": [], "lengths": LENGTHS, "sizes": [0], "top_k": None, "offset": 0, "windows": 1}
    task = Perplexity(last=4, align="end", buckets=2, prefix=[BEGIN], **values)
    fields = task.score(-np.arange(10.0))
    assert (fields["tokens"], fields["nll"], fields["buckets"]) == (4, 7.5, [6.5, 8.5])
