"""What ``memlong-vllm evaluate recall`` asks, and at which depths; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.evaluation.models import ModelSpec
from memlong_vllm.evaluation.recall import Recall, say_what_is_left_out
from memlong_vllm.evaluation.recall_report import rate_of, table
from memlong_vllm.evaluation.runs import Item
from memlong_vllm.evaluation.scoring import Continuation, Prompt
from memlong_vllm.evaluation.texts import Text
from memlong_vllm.recall_material import Prose, RecallPrompt

WINDOW, CHUNK = 500, 20
PROSE = "".join(f"On day {day} nobody thought of the house on the hill. " for day in range(1000, 1300))


class Characters:
    """A tokenizer with a token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, token_ids))


def task(**fields: Any) -> Recall:
    text = Text("prose.txt", "0f", list(map(ord, PROSE)))
    values: dict[str, Any] = {
        "tokenizer": Characters(),
        "texts": [text],
        "proses": [Prose(text.token_ids, frozenset({ord(".")}))],
        "kinds": ["passkey", "multikey"],
        "lengths": [1000, 8000],
        "depths": [0.1, 0.5, 0.9],
        "trials": 4,
        "sizes": [0, 512],
        "top_k": None,
        "num_keys": 4,
        "min_distance": WINDOW + CHUNK,
        "stride": CHUNK,
        "seed": 0,
    }
    return Recall(**(values | fields))


def spec() -> ModelSpec:
    block = {"memlong": {"chunk_size": CHUNK, "local_window": WINDOW}}
    return ModelSpec("memlong", Path("model"), Path("model"), "memlong", WINDOW, config=block)


def prompts(items: list[Item]) -> dict[tuple[Any, ...], Item]:
    """One item for each prompt: memory sizes share them."""
    return {tuple(item.row[name] for name in ("kind", "length", "depth", "trial")): item for item in items}


def test_every_row_of_a_model_is_a_trial_of_its_own() -> None:
    items = prompts(task().items(spec()))
    assert len(items) == 2 * 4 * (2 + 3)
    asked = [item.expected[0] for item in items.values()]
    assert len({tuple(prompt.token_ids) for prompt in asked}) == len(items)
    # Of 90,000 keys, 40 drawn independently are hardly ever the same two.
    assert len({prompt.expected for prompt in asked}) >= len(items) - 1
    ends = {(length, length - len(item.prompt.token_ids)) for (_, length, _, _), item in items.items()}
    assert all(0 <= less < CHUNK for _, less in ends)
    assert len(ends) > CHUNK // 2, "prompts end anywhere in a stride"
    for kind, length, _, trial in items:
        stretches = {tuple(items[kind, length, depth, trial].prompt.token_ids[:40]) for depth in (0.1, 0.5)}
        assert len(stretches) == 2, "the prose depends on the depth"


def test_memory_sizes_share_their_prompts() -> None:
    by_size = {size: [] for size in (0, 512)}  # type: dict[int, list[list[int]]]
    for item in task().items(spec()):
        by_size[item.row["memory_size"]].append(list(item.prompt.token_ids))
    assert by_size[0] == by_size[512]


def test_depths_that_are_one_place_are_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    recall = task()
    assert recall.depths_at(1000) == [0.1, 0.5]
    assert recall.depths_at(8000) == [0.1, 0.5, 0.9]
    assert recall.settings()["depths_measured"] == {"1000": [0.1, 0.5], "8000": [0.1, 0.5, 0.9]}
    assert {row["depth"] for row in (item.row for item in recall.items(spec())) if row["length"] == 1000} == {0.1, 0.5}
    say_what_is_left_out(recall)
    assert capsys.readouterr().err == (
        "SKIPPED: 1000 tokens, depth 0.9: outside the local window that is the same place as depth 0.5, "
        "about 0.48 of the prompt\n"
    )
    everywhere = task(min_distance=0)
    assert everywhere.depths_at(1000) == [0.1, 0.5, 0.9]
    say_what_is_left_out(everywhere)
    assert capsys.readouterr().err == ""


def test_half_a_needle_without_its_number_is_not_retrieved() -> None:
    """The note of a pass key says it twice; that of a house has a border of chunks before its number, or in it."""
    recall = task()
    needle = "The number of the house of Abbot is 12345. "
    at, is_retrieved = 2 * CHUNK - needle.index("1"), {}
    for kind, shift in (("before", 0), ("within", 2)):
        start = at - shift
        text = PROSE[:start] + needle + PROSE[: 4 * CHUNK - start]
        prompt = RecallPrompt(list(map(ord, text)), "12345", (start, start + len(needle)))
        assert [text[places[0] : places[-1] + 1] for places in recall.numbers(prompt)] == ["12345"]
        item = Item({"trial": 0}, Prompt(prompt.token_ids), (prompt, CHUNK))
        for chunks in ((0, 1), (2, 3), (1, 2)):
            row = recall.judge(item, Continuation([], chunks))
            is_retrieved[kind, chunks] = row["needle_retrieved"]
    assert is_retrieved == {
        ("before", (0, 1)): False,
        ("before", (2, 3)): True,
        ("before", (1, 2)): True,
        ("within", (0, 1)): False,
        ("within", (2, 3)): False,
        ("within", (1, 2)): True,
    }


def test_rows_and_tables_say_where_needles_stand() -> None:
    recall = task(kinds=["passkey"], depths=[0.1, 0.9])
    items = recall.items(spec())
    answers = [Continuation(list(map(ord, f" {item.expected[0].expected}.")), (0,)) for item in items]
    rows = [item.row | recall.judge(item, answer) for item, answer in zip(items, answers, strict=True)]
    for row in rows:
        assert row["needle_depth"] == pytest.approx(row["needle"][0] / row["tokens"], abs=1e-4)
        moved = row["length"] == 1000 and row["depth"] == 0.9
        # A needle's place is looked for at sentences' ends up to 64 tokens before.
        assert row["needle_depth"] == pytest.approx(0.43 if moved else row["depth"], abs=0.07)
        assert row["correct"]
    content = {"rows": rows, "models": {"memlong": {}}, "settings": {"kinds": ["passkey"]}}
    main = [row for row in rows if row["memory_size"] == 512]
    moved, there = (rate_of([r for r in main if (r["length"], r["depth"]) == (n, 0.9)]) for n in (1000, 8000))
    assert moved is not None
    assert there is not None
    cells = [f"{rate} of 4, {rate.num_retrieved / 4:.0%} retrieved, at {rate.depth:.2f}" for rate in (moved, there)]
    assert f"| 0.9 | {cells[0]} | {cells[1]} |" in table(content)
    assert moved.depth < 0.5 < 0.85 < there.depth
