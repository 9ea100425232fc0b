"""``memlong-vllm evaluate icl``: its material, its command with tiny models, and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlong_vllm.evaluation.demonstrations import SentenceRetriever, draw_demonstrations, memory_tokens
from memlong_vllm.evaluation.icl_cases import PROMPT, RAG, SHUFFLED, CaseMaker, Plan
from memlong_vllm.evaluation.icl_report import Arm, arms_of, outcomes, where
from memlong_vllm.evaluation.labelled_sentences import TASKS, Example, held_out, read_examples
from memlong_vllm.evaluation.reports import write_report
from memlong_vllm.evaluation.results import ResultsFile, read_results
from memlong_vllm.evaluation.scoring import EvaluationError
from tests.checkpoints import Checkpoints, novel

Row = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of a novel with labels that mean nothing."""
    path = tmp_path_factory.mktemp("icl") / "lines.tsv"
    lines = [line for line in novel()[20_000:40_000].splitlines() if len(line) > 40]
    rows = [f"{line}\t{number // 3 % 2}" for number, line in enumerate(lines[:80])]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


def test_files_are_read_in_both_formats(tmp_path: Path) -> None:
    tsv, csv = tmp_path / "a.tsv", tmp_path / "a.csv"
    tsv.write_text('sentence\tlabel\nit "works , mostly .\t1\nno .\t0\n')
    csv.write_text('1,"it ""works , mostly ."\n0,no .\n')
    expected = [Example(0, 'it "works , mostly .', 1), Example(1, "no .", 0)]
    assert read_examples(tsv, "--data", 2) == read_examples(csv, "--data", 2) == expected
    csv.write_text('text,label\n"it ""works , mostly .",1\nno .,0\n')
    assert read_examples(csv, "--data", 2) == expected
    csv.write_text("\ufeff" + csv.read_text(), encoding="utf-8")  # As spreadsheets write it.
    assert read_examples(csv, "--data", 2) == expected


UNREADABLE = [
    ("a.tsv", "no .\t0\n", "the first line must name the columns sentence and label"),
    ("a.tsv", "words\tlabel\nno .\t0\n", "names no column sentence or text"),
    ("a.tsv", "sentence\tlabel\nno .\t2\n", r"row 2: \['no .', '2'\] is no sentence with a label from 0 to 1"),
    ("a.csv", "0,yes\nno\n", r"row 2: \['no'\]"),
    ("a.csv", "", "is empty"),
    ("a.csv", "label,text\n", "names columns, and no sentence"),
    ("a.txt", "0,no\n", "name a .tsv or .csv file"),
]


@pytest.mark.parametrize(("name", "text", "message"), UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(EvaluationError, match=rf"^--train .*{message}"):
        read_examples(path, "--train", 2)


def examples(num: int, num_labels: int) -> list[Example]:
    """Sorted by label, as some files are."""
    return [Example(number, f"sentence {number}", number * num_labels // num) for number in range(num)]


def test_a_file_for_both_gives_every_label_to_both() -> None:
    tested, pool = held_out(examples(100, 2))
    assert Counter(example.label for example in pool) == {0: 12, 1: 13}
    assert len(tested) == 75
    assert not {example.number for example in tested} & {example.number for example in pool}


@pytest.mark.parametrize("num_labels", [2, 5])
def test_demonstrations_are_balanced_and_the_same_for_all_numbers(num_labels: int) -> None:
    pool = examples(200, num_labels)
    near, far = draw_demonstrations(pool, num_labels, 20, 18, seed=3)
    assert len({example.number for example in near + far}) == 38
    for num, drawn in product(range(1, 19), (near, far)):
        counts = Counter(example.label for example in drawn[:num])
        assert max(counts.values()) - min(counts[label] for label in range(num_labels)) <= 1
    assert draw_demonstrations(pool, num_labels, 4, 6, seed=3) == (near[:4], far[:6])
    assert draw_demonstrations(pool, num_labels, 4, 6, seed=4) != (near[:4], far[:6])
    drawn_by_seed = [draw_demonstrations(pool, num_labels, 18, 18, seed) for seed in range(5)]
    for (_, memory), (prompt, _) in pairwise(drawn_by_seed):
        orders = [[example.label for example in drawn] for drawn in (memory, prompt)]
        assert orders[0] != orders[1], "a seed's memory does not repeat the next one's prompt"
    with pytest.raises(EvaluationError, match=r"are 1 sentences with label 0 .* 2 are needed: name a longer file"):
        draw_demonstrations(examples(num_labels, num_labels), num_labels, 0, 1, seed=0)


@pytest.mark.parametrize("num", [1, 3, 7])
def test_a_memory_has_complete_chunks_only(num: int) -> None:
    texts = [f"This is demonstration {number}. " for number in range(num)]
    token_ids = memory_tokens(texts, lambda text: [7, *map(ord, text)], 16)
    whole = "".join(texts)
    assert len(token_ids) % 16 == 0
    assert 0 <= len(token_ids) - len(whole) - 1 < 16
    assert "".join(map(chr, token_ids[1:])) == (whole + texts[0])[: len(token_ids) - 1]


def test_the_most_similar_comes_last() -> None:
    class Lengths:
        """Texts are alike if they are about as long."""

        def embed(self, texts: list[str]) -> np.ndarray:
            angles = [len(text) / 50 for text in texts]
            return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=np.float32)

    pool = [Example(number, "x" * number, 0) for number in (1, 30, 12, 9)]
    retriever = SentenceRetriever(Lengths(), None)
    assert [example.number for example in retriever.nearest("x" * 10, pool, 2)] == [12, 9]
    assert [example.number for example in retriever.nearest("x" * 10, pool, 9)] == [30, 1, 12, 9]


def test_questions_stand_after_the_demonstrations_that_are_asked_for() -> None:
    """In the prompt: all of the memory's, or those like the sentence. In memory: the same; none in the prompt."""

    class Characters:
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": list(map(ord, text))}

    class Numbers:
        """A sentence of one's digit and another's are alike if the digits are near."""

        def embed(self, texts: list[str]) -> np.ndarray:
            angles = [float(text.split()[-1]) / 100 for text in texts]
            return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], dtype=np.float32)

    pool = examples(40, 2)
    tested = [Example(90, "sentence 90", 1)]
    plan = Plan(tested, pool, [0, 2], [4], [SHUFFLED, PROMPT, RAG], 2, 1, calibrate=True)
    maker = CaseMaker(plan, TASKS["sst2"], Characters(), 16, SentenceRetriever(Numbers(), None))
    near, far = draw_demonstrations(pool, 2, 2, 4, seed=0)
    found = {(case.row["method"], case.row["shots"]): case for case in maker.cases()}
    assert set(found) == set(product(("none", "memory", "shuffled", "prompt", "rag"), (0, 2)))
    alike = sorted(far, key=lambda example: example.number)[-2:]
    for (method, shots), case in found.items():
        shown = {"prompt": far, "rag": alike}.get(method, []) + near[:shots]
        before = "".join(f"Review: {one.sentence}\nSentiment: {TASKS['sst2'].words[one.label]}\n\n" for one in shown)
        assert "".join(map(chr, case.prompt)) == before + "Review: sentence 90\nSentiment:"
        assert "".join(map(chr, case.content_free or ())) == before + "Review: N/A\nSentiment:"
        assert (case.memory is not None) == (method in ("memory", "shuffled"))
        if case.memory is not None:
            text = "".join(map(chr, case.memory.token_ids))
            assert all(one.sentence in text for one in far)


def words(model: Path, data: Path, output: Path, *more: Any) -> list[Any]:
    common = ["--model", model, "--task", "sst2", "--data", data, "--output", output, "--piece", 96, "--limit", 3]
    return ["icl", *common, "--shots", "0,2", "--memory-shots", "4", "--seeds", 2, *more]


def by_key(path: Path) -> dict[tuple[Any, ...], Row]:
    names = ("model", "method", "shots", "memory_shots", "seed", "example")
    return {tuple(row[name] for name in names): row for row in read_results(path)["rows"]}


def test_engine_and_reference_agree(
    evaluate: Callable[..., int], checkpoints: Checkpoints, model: Path, data: Path, tmp_path: Path
) -> None:
    engine, reference = tmp_path / "engine.json", tmp_path / "reference.json"
    common = ["--calibrate", "--control", checkpoints.memlong(memory_size=0)]  # As a control's is converted.
    more = ["--beside", "shuffled", "prompt", "rag", "--rag-shots", 2, "--baselines", "full", "--random-retrieval"]
    assert evaluate(*words(model, data, reference, *common, *more, "--engine", "reference")) == 0
    assert evaluate(*words(model, data, engine, *common, "--batch", 4)) == 0
    measured, expected = by_key(engine), by_key(reference)
    # Without any demonstration there is no draw: 1 + 2 seeds; then memory, for both numbers of shots.
    assert len(measured) == 3 * ((3 + 2 * 2) + 3)
    assert len(expected) == 3 * ((3 + 4 * 2 * 2) + 2 * (3 + 2 * 2 * 2) + 2 * 2)
    for key, row in measured.items():
        assert row["scores"] == pytest.approx(expected[key]["scores"], abs=2e-4)
        assert row["content_free"] == pytest.approx(expected[key]["content_free"], abs=2e-4)
        assert row["predicted"] == int(np.argmax(row["scores"]))
        # Log-probabilities: less is a quotient.
        assert row["calibrated"] == int(np.argmax(np.subtract(row["scores"], row["content_free"])))
    assert any(row["calibrated"] != row["predicted"] for row in measured.values())
    for (name, method, shots, num, seed, number), row in measured.items():
        if method == "memory":
            none = measured[name, "none", shots, 0, seed if shots else None, number]
            assert np.abs(np.subtract(row["scores"], none["scores"])).max() > 1e-3, "memory makes a difference"
            chance = expected["random", method, shots, num, seed, number]["scores"]
            assert np.abs(np.subtract(chance, none["scores"])).max() > 1e-3, "chunks chosen by chance are read"
            assert np.abs(np.subtract(chance, row["scores"])).max() > 1e-3, "and are others"
    shuffled = {key: row for key, row in expected.items() if key[1] == "shuffled"}
    assert {key[0] for key in shuffled} == {"memlong"}
    assert any(row["scores"] != expected[key[0], "memory", *key[2:]]["scores"] for key, row in shuffled.items())
    text = engine.with_suffix(".md").read_text()
    assert "| 2 | memlong | 4 in memory |" in text
    assert "Calibrated:" in text
    assert "| 4 in memory, labels shuffled |" in reference.with_suffix(".md").read_text()
    assert "the 2 most similar of 4" in reference.with_suffix(".md").read_text()


def test_a_stopped_run_is_completed(evaluate: Callable[..., int], model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    run = words(model, data, output, "--engine", "reference")
    assert evaluate(*run) == 0
    whole = read_results(output)
    results = ResultsFile(output, "icl", whole["settings"], whole["models"], ("model",), overwrite=True)
    results.append(whole["rows"][:11])
    assert evaluate(*run) == 0
    again = read_results(output)["rows"]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in whole["rows"]]


def test_nothing_is_chosen_by_chance_where_all_is_taken(
    evaluate: Callable[..., int], model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    assert evaluate(*words(model, data, output, "--random-retrieval", "--top-k", 64, "--engine", "reference")) == 0
    assert "SKIPPED: random with 4 demonstrations in memory" in capsys.readouterr().err
    assert {key[0] for key in by_key(output)} == {"memlong"}


REFUSED = [
    (["--memlong", '{{"memory_dir": "x"}}'], "--memlong memory_dir: memories of demonstrations must end with the run"),
    (["--memory-sizes", "0"], "--memory-sizes: here it is --memory-shots"),
    (["--memory-shots", "30"], "name a longer file with --train, or lower --shots and --memory-shots"),
    (["--label-words", "bad"], "--label-words bad: needs 2 different words"),
    (["--label-words", "zeal,zero"], "begin with the same token, so one token cannot tell them apart"),
    (["--beside", "rag", "--memlong", '{{"retriever_path": "{tmp}/none"}}'], "'{tmp}/none' cannot be loaded"),
    (["--train", "{tmp}/none.tsv"], "--train {tmp}/none.tsv"),
    (["--task", "sst5", "--data", "{tmp}/x.md"], "name a .tsv or .csv file"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_is_refused(
    evaluate: Callable[..., int],
    checkpoints: Checkpoints,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "results.json"
    more = [word.format(tmp=tmp_path) for word in more]
    assert evaluate(*words(checkpoints.memlong(), data, output, *more)) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert not output.exists()


def results(path: Path) -> dict[str, Any]:
    """Two draws; without demonstrations 2 of 4 right, with them in memory 3 and 4 of 4."""
    models = {"memlong": {"name": "tiny", "digest": "0f", "attention": "memory", "local_window": 64}}
    models["memlong"] |= {"trained_length": 512, "random_retrieval": False}
    settings = {"task": "sst2", "words": ["negative", "positive"], "calibrate": False, "rag_shots": 4}
    settings |= {"engine": "vllm", "dtype": "float32"}
    file = ResultsFile(path, "icl", settings, models, ("model", "method", "seed", "example"))
    gold = [0, 1, 0, 1]
    answers = {("none", 0, None): [1, 1, 1, 1], ("memory", 18, 0): [0, 1, 1, 1], ("memory", 18, 1): gold}
    for (method, num, seed), predicted in answers.items():
        common = {"model": "memlong", "shots": 0, "method": method, "memory_shots": num, "seed": seed}
        rows = enumerate(zip(gold, predicted, strict=True))
        file.append([common | {"example": i, "label": label, "predicted": said} for i, (label, said) in rows])
    file.flush()
    return read_results(path)


def test_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    content = results(path)
    none, memory = Arm("memlong", 0, "none", 0), Arm("memlong", 0, "memory", 18)
    assert arms_of(content) == [none, memory]
    assert where(memory, content) == "18 in memory"
    found = outcomes(content)
    assert found[none].accuracy == 0.5
    assert found[none].difference is None
    assert found[none].f1 == pytest.approx((0 + 2 * 2 / 6) / 2)
    assert found[none].favourite == (1, 1.0)
    assert found[memory].accuracy == pytest.approx(0.875)
    assert found[memory].difference == pytest.approx(0.375)
    assert found[memory].difference_error == pytest.approx(0.125)
    write_report(path)
    assert "| 0 | memlong | 18 in memory | 87.5 ± 12.5 | +37.5 ± 12.5 |" in capsys.readouterr().out


def test_every_task_has_words_for_its_labels() -> None:
    assert {name: len(wording.words) for name, wording in TASKS.items()} == {
        "sst2": 2, "mr": 2, "subj": 2, "sst5": 5, "mpqa": 2,
    }  # fmt: skip
    example = Example(0, "a gem .", 1)
    assert TASKS["sst2"].demonstrate(example) == "Review: a gem .\nSentiment: positive\n\n"
