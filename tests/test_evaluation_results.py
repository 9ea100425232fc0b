"""Results files, statistics and what is made of rows; no model is loaded."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlong_vllm.config import RetrieverConfig
from memlong_vllm.evaluation.models import ModelSpec, describe, model_name
from memlong_vllm.evaluation.perplexity_report import summarise
from memlong_vllm.evaluation.random_retriever import RandomEmbedder
from memlong_vllm.evaluation.recall_report import Rate
from memlong_vllm.evaluation.reports import footer, write_report
from memlong_vllm.evaluation.results import ResultsFile, code_digest, read_results
from memlong_vllm.evaluation.scoring import EvaluationError
from memlong_vllm.evaluation.statistics import standard_error, wilson_interval

KEY = ("model", "text", "window", "length", "memory_size")
SETTINGS = {"lengths": [64, 128], "last": 32, "engine": "vllm", "dtype": "float32", "kinds": ["passkey"]}


def description(**fields: Any) -> dict[str, Any]:
    common = {"name": "tiny", "digest": "0f", "attention": "memory", "local_window": 64, "trained_length": 512}
    return common | {"random_retrieval": False} | fields


MODELS = {"memlong": description(), "full": description(attention="full", digest="1f")}


def row(model: str, text: str, length: int, memory_size: int | None, nll: float, window: int = 0) -> dict[str, Any]:
    fields = {"model": model, "text": text, "window": window, "length": length, "memory_size": memory_size}
    return fields | {"tokens": 32, "nll": nll, "ppl": math.exp(nll)}


def open_results(path: Path, settings: Any = SETTINGS, models: Any = MODELS, **options: Any) -> ResultsFile:
    return ResultsFile(path, "perplexity", settings, models, KEY, **options)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "results.json"
    monkeypatch.setattr("sys.argv", ["somewhere/memlong-vllm", "evaluate", "perplexity", "--texts", "a b.txt"])
    first = open_results(path)
    first.append([row("memlong", "a", 64, 0, 2.5), row("memlong", "a", 64, 128, 2.25)])
    second = open_results(path)
    assert second.rows == first.rows
    assert second.has(row("memlong", "a", 64, 128, 0.0))
    assert not second.has(row("memlong", "b", 64, 128, 0.0))
    second.append([row("full", "a", 64, None, 2.0)])
    content = read_results(path)
    assert content["command_lines"] == ["memlong-vllm evaluate perplexity --texts 'a b.txt'"]
    assert [entry["nll"] for entry in content["rows"]] == [2.5, 2.25, 2.0]
    assert content["model"] == MODELS["memlong"]
    packages = {"python", "torch", "vllm", "transformers", "memlong_vllm"}
    assert content["versions"].keys() == packages | {"platform", "cpu", "gpu"}
    assert list(path.parent.iterdir()) == [path]


def test_a_run_may_ask_for_more_of_what_rows_name(tmp_path: Path) -> None:
    path, extensible = tmp_path / "results.json", ("lengths", "kinds", "trials", "places")
    first = SETTINGS | {"trials": 4, "places": {"64": [0.1]}}
    open_results(path, first, extensible=extensible).append([row("memlong", "a", 64, 0, 2.5)])
    more = first | {"lengths": [64, 32], "trials": 2, "places": {"32": [0.5]}}
    later = open_results(path, more, extensible=extensible)
    joined = {"lengths": [32, 64, 128], "kinds": ["passkey"], "trials": 4, "places": {"64": [0.1], "32": [0.5]}}
    assert later.content["settings"] == SETTINGS | joined
    assert len(later.rows) == 1
    with pytest.raises(EvaluationError, match="Different: last was 32, now 16"):
        open_results(path, more | {"last": 16}, extensible=extensible)


def test_writing_takes_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written at once is at the next row that comes later, or by a flush."""
    now = [100.0]
    monkeypatch.setattr("memlong_vllm.evaluation.results.time.monotonic", lambda: now[0])
    path = tmp_path / "results.json"
    results = open_results(path)
    write = results._write
    monkeypatch.setattr(results, "_write", lambda: (write(), now.__setitem__(0, now[0] + 1)))

    def num_written() -> int:
        return len(read_results(path)["rows"])

    found = []
    for text, seconds in (("a", 0), ("b", 40), ("c", 20)):
        now[0] += seconds
        results.append([row("memlong", text, 64, 0, 2.5)])
        found.append(num_written())
    assert found == [1, 1, 3]
    results.append([row("memlong", "d", 64, 0, 2.5)])
    assert num_written() == 3
    results.flush()
    assert num_written() == 4


def test_reports_tell_of_rows_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    open_results(path).append([row("memlong", "a", 64, 0, 2.5)])
    open_results(path).append([row("memlong", "b", 64, 0, 2.5)])
    assert read_results(path)["code"] == [code_digest()]
    assert "states of this package's code" not in footer(read_results(path))
    monkeypatch.setattr("memlong_vllm.evaluation.results.code_digest", lambda: "another")
    open_results(path).append([row("memlong", "c", 64, 0, 2.5)])
    assert f"with 2 states of this package's code**: {code_digest()}, another" in footer(read_results(path))


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    open_results(path).append([row("memlong", "a", 64, 0, 2.5)])
    with pytest.raises(EvaluationError, match=r"--overwrite. Different: last was 32, now 16$"):
        open_results(path, SETTINGS | {"last": 16})
    with pytest.raises(EvaluationError, match=r"memlong.digest was '0f', now '2f'"):
        open_results(path, models=MODELS | {"memlong": description(digest="2f")})


def test_a_model_may_be_renamed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    open_results(path).append([row("memlong", "a", 64, 0, 2.5)])
    later = open_results(path, models=MODELS | {"memlong": description(name="another")})
    assert (later.content["models"]["memlong"]["name"], len(later.rows)) == ("another", 1)


def test_what_is_overwritten_stays_until_there_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    open_results(path).append([row("memlong", "a", 64, 0, 2.5)])
    before = path.read_text()
    later = open_results(path, SETTINGS | {"last": 16}, overwrite=True)
    assert later.rows == []
    assert path.read_text() == before
    later.append([row("memlong", "b", 64, 0, 3.5)])
    content = read_results(path)
    assert (content["settings"]["last"], [entry["text"] for entry in content["rows"]]) == (16, ["b"])


def test_models_can_be_added(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    open_results(path, models={"memlong": MODELS["memlong"]}).append([row("memlong", "a", 64, 0, 2.5)])
    later = open_results(path)
    assert list(later.content["models"]) == ["memlong", "full"]
    assert len(later.rows) == 1


def test_what_is_no_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for text, message in (("{", "cannot be read"), ("[]", "no results file"), ('{"rows": []}', "no results file")):
        path.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            open_results(path)
        assert path.read_text() == text


def test_standard_error_and_wilson() -> None:
    values = [random.Random(0).gauss(3, 2) for _ in range(50)]
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(50))
    assert standard_error([1.0]) is None
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def perplexity_content(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    results = open_results(path)
    draw = random.Random(0)
    for text in "abc":
        level = draw.uniform(2, 4)
        for length in (64, 128):
            for window in (0, 1):
                results.append([row("memlong", text, length, 0, level + 0.5, window)])
                results.append([row("memlong", text, length, 512, level + 0.2 + 0.2 * window, window)])
        results.append([row("full", text, 128, None, level + draw.uniform(0, 0.1))])
    results.flush()
    return path


def test_perplexities_are_paired_by_text(tmp_path: Path) -> None:
    cells = {(cell.line, cell.length): cell for cell in summarise(read_results(perplexity_content(tmp_path)))}
    assert len(cells) == 5
    off, memory = cells[("memlong", 0), 64], cells[("memlong", 512), 64]
    assert off.num_texts == memory.num_texts == off.num_paired == 3
    # Texts differ much more than the models on the same text.
    assert off.error is not None
    assert off.error > 0.1
    assert off.difference == pytest.approx(0.5 - 0.3)
    assert off.difference_error == pytest.approx(0)
    assert off.perplexity == pytest.approx(math.exp(off.nll))
    assert memory.difference == 0
    assert cells[("full", None), 128].difference < 0


def recall_content(tmp_path: Path) -> Path:
    key = ("model", "kind", "length", "depth", "trial", "memory_size")
    results = ResultsFile(tmp_path / "recall.json", "recall", SETTINGS, MODELS, key)
    for model, size, rate in (("memlong", 0, 0.0), ("memlong", 512, 0.5), ("full", None, 1.0)):
        for depth in (0.1, 0.9):
            for trial in range(4):
                fields = {"model": model, "kind": "passkey", "length": 64, "depth": depth, "trial": trial}
                found = None if size is None else size > 0
                outcome = {"memory_size": size, "correct": trial < 4 * rate, "needle_retrieved": found}
                outcome |= {"needle_depth": min(depth, 0.4) + trial / 100}
                results.append([fields | outcome])
    results.flush()
    return results.path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (perplexity_content, ["| memlong, memory off |", "| full |  |", "+0.2000 ± 0.0000", "3 texts"]),
        (
            recall_content,
            [
                "| memlong, memory 512 | 50% [22%, 78%] of 8, 100% retrieved |",
                "| full | 100%",
                "| 0.9 | 50%",
                "retrieved, at 0.42 |",
            ],
        ),
    ],
)
def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, expected: list[str]) -> None:
    path = make(tmp_path)
    markdown, *images = write_report(path)
    text = markdown.read_text()
    assert [part for part in expected if part not in text] == []
    shown = capsys.readouterr().out
    assert text in shown
    if images:
        assert images[0].read_bytes().startswith(b"\x89PNG")
    else:
        assert "pip install 'memlong-vllm[eval]'" in shown


def test_reports_need_rows(tmp_path: Path) -> None:
    results = open_results(tmp_path / "results.json")
    results.append([])
    path = results.path
    with pytest.raises(EvaluationError, match="has no rows"):
        write_report(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": "poetry"}))
    with pytest.raises(EvaluationError, match="there are reports of"):
        write_report(path)


def test_a_report_says_that_predictions_saw_what_they_predict(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for scope, is_said in (("preceding", False), ("current", True)):
        models = {"memlong": description(memlong={"query_scope": scope})}
        open_results(path, models=models, overwrite=True).append([row("memlong", "a", 64, 0, 2.5)])
        assert ("have seen what they predict" in footer(read_results(path))) == is_said


def test_a_rate_says_how_sure_it_is() -> None:
    assert str(Rate(10, 9, None, 0.5)) == "90% [60%, 98%]"


def test_a_merged_adapter_is_named_not_told(tmp_path: Path) -> None:
    """A checkpoint's config.json lists all that an adapter was trained on."""
    training = {"step": 400, "train": [f"text {number}" for number in range(1000)]}
    block = {"digest": "2f", "training": training, "merged_before": {"digest": "1f", "training": {}}}
    config = {"max_position_embeddings": 512, "memlong": {}, "memlong_adapter": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    described = describe(ModelSpec("memlong", tmp_path, tmp_path, "memlong", 64, config=config))
    assert described["adapter"] == {"digest": "2f", "step": 400, "merged_before": {"digest": "1f", "step": None}}
    assert "text 999" not in json.dumps(described)
    plain = describe(ModelSpec("full", tmp_path, tmp_path, "plain", None, config={"max_position_embeddings": 512}))
    assert plain["adapter"] is None


def test_models_of_the_hub_have_its_name() -> None:
    assert model_name(Path("checkpoints/tiny")) == "tiny"
    assert model_name(Path("hub/models--some--tiny-v2/snapshots/0a1b")) == "some/tiny-v2"


def test_random_vectors_depend_on_the_text_alone() -> None:
    config = RetrieverConfig("memlong_vllm.evaluation.random_retriever:RandomEmbedder")
    one, other = RandomEmbedder(config, "cpu"), RandomEmbedder(config, "cpu")
    vectors = one.embed(["a", "b", "a"])
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[[0, 1]], other.embed(["b", "a"])[[1, 0]])
    assert np.array_equal(vectors[0], vectors[2])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert abs(vectors[0] @ vectors[1]) < 0.5
