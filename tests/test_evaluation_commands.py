"""``memlong-vllm evaluate`` from the command line to the results file, with tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.evaluation.models import model_specs
from memlong_vllm.evaluation.results import read_results
from memlong_vllm.recall_material import KINDS
from tests.checkpoints import Checkpoints, novel

Evaluate = Callable[..., int]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / name for name in ("one.txt", "two.txt")]
    for number, path in enumerate(paths):
        path.write_text(novel()[20_000 * (number + 1) :][:6000], encoding="utf-8")
    return paths


def by_key(path: Path) -> dict[tuple[Any, ...], Row]:
    return {(row["model"], row["text"], row["length"], row["memory_size"]): row for row in read_results(path)["rows"]}


def perplexity(model: Path, texts: list[Path], output: Path, *more: Any) -> list[Any]:
    common = ["--model", model, "--texts", *texts, "--last", 64, "--output", output, "--piece", 96]
    return ["perplexity", *common, "--lengths", "100,400", "--memory-sizes", "0,256", *more]


def test_perplexity_of_engine_and_reference(
    evaluate: Evaluate, model: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, reference = tmp_path / "engine.json", tmp_path / "reference.json"
    more = ["--baselines", "window", "--random-retrieval", "--buckets", 4]
    assert evaluate(*perplexity(model, texts, reference, *more, "--engine", "reference")) == 0
    assert evaluate(*perplexity(model, texts, engine, "--buckets", 4)) == 0
    expected, measured = by_key(reference), by_key(engine)
    assert len(measured) == 2 * 2 * 2
    assert len(expected) == 2 * 2 * (2 + 1 + 1)
    for key, row in measured.items():
        assert row["nll"] == pytest.approx(expected[key]["nll"], abs=1e-4)
        assert row["buckets"] == pytest.approx(expected[key]["buckets"], abs=1e-4)
        assert row["nll"] == pytest.approx(sum(row["buckets"]) / 4)
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
        assert row["tokens"] == 64
    for text in texts:
        assert expected["window", text.name, 400, None]["nll"] == pytest.approx(
            measured["memlong", text.name, 400, 0]["nll"], abs=1e-4
        )
        nlls = {expected[model, text.name, 400, 256]["nll"] for model in ("memlong", "random")}
        assert len(nlls | {measured["memlong", text.name, 400, 0]["nll"]}) == 3
    assert "| memlong, memory 256 |" in engine.with_suffix(".md").read_text()
    assert "positive: predicts worse" in capsys.readouterr().out


def test_control_stretches_and_alignment(
    evaluate: Evaluate, model: Path, checkpoints: Checkpoints, texts: list[Path], tmp_path: Path
) -> None:
    outputs, control = [tmp_path / "end.json", tmp_path / "start.json"], checkpoints.memlong(gates=1.5)
    for output, align in zip(outputs, ("end", "start"), strict=True):
        more = ["--engine", "reference", "--align", align, "--windows", 2, "--control", control]
        assert evaluate(*perplexity(model, texts[:1], output, *more)) == 0
    end, start = (
        {(row["model"], row["window"], row["length"], row["memory_size"]): row["nll"] for row in content["rows"]}
        for content in map(read_results, outputs)
    )
    assert end.keys() == start.keys()
    assert len(end) == 2 * 2 * (2 + 1)
    for window in (0, 1):
        # A control is measured with its memory off; without, this one is the model itself.
        for length in (100, 400):
            assert end["control", window, length, 0] == pytest.approx(end["memlong", window, length, 0], abs=1e-6)
        # The longest sequence is the whole stretch, wherever shorter ones are aligned.
        assert start["memlong", window, 400, 256] == pytest.approx(end["memlong", window, 400, 256], abs=1e-6)
        assert abs(start["memlong", window, 100, 0] - end["memlong", window, 100, 0]) > 1e-3
    assert abs(end["memlong", 0, 400, 0] - end["memlong", 1, 400, 0]) > 1e-3


def test_a_stopped_run_is_completed(
    evaluate: Evaluate, model: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    words = perplexity(model, texts, output, "--engine", "reference")
    assert evaluate(*words) == 0
    whole = json.loads(output.read_text())
    output.write_text(json.dumps(whole | {"rows": whole["rows"][:5]}))
    assert evaluate(*words) == 0
    again = json.loads(output.read_text())
    assert [row | {"seconds": 0} for row in again["rows"]] == [row | {"seconds": 0} for row in whole["rows"]]
    assert again["rows"][:5] == whole["rows"][:5]
    assert "5 of 8 rows" in capsys.readouterr().out
    assert evaluate(*words, "--offset", 3) == 2
    assert "Different: offset was 0, now 3" in capsys.readouterr().err
    assert json.loads(output.read_text())["rows"] == again["rows"]


def test_short_texts_are_left_out_loudly(
    evaluate: Evaluate, model: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, output = tmp_path / "short.txt", tmp_path / "results.json"
    short.write_text(novel()[30_000:30_500], encoding="utf-8")
    assert evaluate(*perplexity(model, [texts[0], short], output, "--engine", "reference")) == 0
    assert {row["text"] for row in read_results(output)["rows"]} == {"one.txt"}
    assert "SKIPPED: short.txt" in capsys.readouterr().err
    assert evaluate(*perplexity(model, [short], output, "--engine", "reference")) == 2
    assert "no text is long enough" in capsys.readouterr().err


def test_recall(evaluate: Evaluate, model: Path, texts: list[Path], tmp_path: Path) -> None:
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    for output, engine in zip(outputs, ("vllm", "reference"), strict=True):
        words = ["--model", model, "--texts", *texts, "--lengths", "300,500", "--depths", "0.1,0.6", "--trials", 2]
        more = ["--memory-sizes", "0,512", "--engine", engine, "--output", output, "--batch", 4]
        assert evaluate("recall", *words, *more) == 0
    rows, others = (read_results(output)["rows"] for output in outputs)
    assert len(rows) == len(KINDS) * 2 * 2 * 2 * 2
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in others]
    for row in rows:
        assert row["length"] - row["needle"][1] >= 64 + 16
        assert row["expected"].isdigit()
        if row["memory_size"] == 0:
            assert row["needle_retrieved"] is False
    assert any(row["needle_retrieved"] for row in rows), "the question finds the needle"
    assert "95 % Wilson interval" in outputs[0].with_suffix(".md").read_text()


REFUSED = [
    (["--memory-sizes", "100"], "--memory-sizes 100 is no multiple of the chunk size (16)"),
    (["--lengths", "40000"], "no text is long enough"),
    (["--lengths", "1,50"], "--lengths 1: too few tokens"),
    (["--buckets", "200"], "--offset and --buckets must not be negative"),
    (["--control", "{tmp}"], "--control {tmp} is no folder with a model"),
    (["--control", "{tmp}/none"], "--control '{tmp}/none': no such folder"),
    (["--backbone", "{tmp}/none"], "--backbone '{tmp}/none': no such folder"),
    (["--texts", "{text}", "{text}"], "another file is called one.txt too"),
    (["--texts", "{tmp}/none.txt"], "--texts {tmp}/none.txt"),
    (["--model", "{base}"], "is no MemLong checkpoint: make one with memlong-vllm convert"),
    (["--model", "{tmp}/none"], '"demo" stands for the demo checkpoint'),
    (["--memlong", '{{"top_k": 0}}'], "memlong.top_k = 0: must be a positive integer"),
    (
        ["--engine", "reference", "--memlong", '{{"bank_gib": 2, "trace_file": "x", "top_k": 1}}'],
        "--memlong bank_gib, trace_file: a matter of the engine",
    ),
    (
        ["--engine", "reference", "--memlong", '{{"retrieval_layers": [1, 2, 3]}}'],
        "has other memory parameters than --memlong asks for (model.layers.3.self_attn.memory_gate, …)",
    ),
    (["--engine", "reference", "--memlong", '{{"retriever_path": "{tmp}/none"}}'], "'{tmp}/none' cannot be loaded"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_is_refused(
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    """Before anything is written."""
    places = {"tmp": tmp_path, "text": texts[0], "base": checkpoints.base()}
    output = tmp_path / "results.json"
    words = [word.format(**places) for word in words]
    assert evaluate(*perplexity(checkpoints.memlong(), texts, output, *words)) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("words", [["--lengths", "90"], ["--memlong", '{"retriever_path": "/none"}']])
def test_results_outlive_a_run_that_cannot_overwrite_them(
    evaluate: Evaluate, checkpoints: Checkpoints, texts: list[Path], tmp_path: Path, words: list[str]
) -> None:
    """It has no place for needles outside the window, or no retriever."""
    output = tmp_path / "results.json"
    output.write_text("a week's work")
    common = ["--model", checkpoints.memlong(), "--texts", *texts, "--lengths", 300, "--engine", "reference"]
    assert evaluate("recall", *common, "--output", output, "--overwrite", *words) == 2
    assert output.read_text() == "a week's work"


def test_settings_of_a_deployment_count_wherever_they_are_asked_for(model: Path) -> None:
    served = {"local_window": 96, "chunk_size": 32, "retrieval_stride": 32, "query_tokens": 32, "bank_gib": 1}
    main, window = model_specs(model, baselines=["window"], memlong=served)
    assert (main.window, window.window) == (96, 96)
    assert main.config["memlong"]["chunk_size"] == 32
    assert "bank_gib" not in main.config["memlong"]
    assert main.config["memlong"]["top_k"] == 2


def test_sequences_beyond_the_checkpoint_are_refused(
    evaluate: Evaluate, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "long.txt", tmp_path / "results.json"
    text.write_text(novel()[:100_000], encoding="utf-8")
    words = perplexity(checkpoints.memlong(), [text], output, "--lengths", "33000")
    assert evaluate(*words) == 2
    assert "add --max-model-len 33000, or convert with --max-length 33000" in capsys.readouterr().err


def test_what_the_engine_refuses(
    evaluate: Evaluate, model: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = perplexity(model, texts, tmp_path / "results.json", "--memlong", '{"bank_gib": 1e-6}')
    assert evaluate(*words) == 2
    assert "memlong.bank_gib = 1e-06: a sequence of max_model_len (401) may need" in capsys.readouterr().err


def test_render(evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("render", tmp_path / "none.json") == 2
    assert "cannot be read as results" in capsys.readouterr().err
