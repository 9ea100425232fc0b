"""The probe from end to end on a tiny random model, its trials, and how it decides."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from memlong_vllm.cli import convert as convert_command
from memlong_vllm.cli import probe as probe_command
from memlong_vllm.cli.convert import parse_setting
from memlong_vllm.conversion import preset
from memlong_vllm.probe.measures import LayerMeasures, Samples
from memlong_vllm.probe.proposal import candidate_layers, propose, propose_by_worth
from memlong_vllm.probe.readers import Choice, ReaderMeasures, spread_layers
from memlong_vllm.probe.trials import Geometry, ProbeError, Trial, build_trials
from tests.checkpoints import Checkpoints, novel

GEOMETRY = Geometry(window=192, chunk_size=32, num_chunks=6, stride=64)
SIZES = shlex.split("--window 192 --chunk-size 32 --chunks 6 --trials 2 --facts 2 --fit-passages 5 --candidates 2")


def run(*words: str) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser()
    probe_command.add_arguments(parser)
    return probe_command.run(parser.parse_args(words))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(novel()[:60_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trials(checkpoints: Checkpoints) -> list[Trial]:
    return build_trials(checkpoints.tokenizer, [novel()[:60_000]], GEOMETRY, num_trials=3, num_facts=2, seed=0)


def test_facts_stand_where_the_geometry_says(checkpoints: Checkpoints, trials: list[Trial]) -> None:
    tokenizer, size = checkpoints.tokenizer, GEOMETRY.chunk_size
    assert list(GEOMETRY.fact_chunks) == [2, 3]
    for trial in trials:
        assert len(trial.context) == GEOMETRY.context_tokens == 320
        for question in trial.questions:
            fact = f"The number of {question.name} is {question.number}."
            chunk = trial.context[question.chunk * size : (question.chunk + 1) * size]
            assert fact in tokenizer.decode(chunk)
            assert tokenizer.decode(trial.context).count(question.number) == 1
            # Wholly out of the window of the question's first token.
            assert (question.chunk + 1) * size <= GEOMETRY.context_tokens - GEOMETRY.window + 1
            assert "".join(tokenizer.decode(question.token_ids[i]) for i in question.answer).strip() == question.number
            assert question.answer[-1] == len(question.token_ids) - 1


def test_an_answer_competes_with_numbers_of_its_length(checkpoints: Checkpoints, trials: list[Trial]) -> None:
    tokenizer = checkpoints.tokenizer
    for question in (question for trial in trials for question in trial.questions):
        for index, rivals in zip(question.answer, question.rivals, strict=True):
            token = tokenizer.decode(question.token_ids[index])
            assert question.token_ids[index] in rivals
            assert {len(tokenizer.decode(rival)) for rival in rivals} == {len(token)}
            assert all(tokenizer.decode(rival).strip().isdigit() for rival in rivals)
            assert len(token) > 1 or len(rivals) == 10


def test_trials_are_repeatable_and_differ(checkpoints: Checkpoints, trials: list[Trial]) -> None:
    text = [novel()[:60_000]]
    again = build_trials(checkpoints.tokenizer, text, GEOMETRY, num_trials=3, num_facts=2, seed=0)
    assert again == trials
    assert build_trials(checkpoints.tokenizer, text, GEOMETRY, num_trials=3, num_facts=2, seed=1) != trials
    assert len({question.number for trial in trials for question in trial.questions}) == 6


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (Geometry(200, 32, 6, 64), "--window has 200 tokens: must be a multiple of --chunk-size 32"),
        (Geometry(64, 32, 6, 96), "exceeds --window 64: raise it"),
        (Geometry(128, 32, 6, 64), "leave no room for a fact"),
        (Geometry(192, 16, 12, 64), "more than --chunk-size 16: raise it"),
        (Geometry(16384, 32, 512, 64), "--trials and --fit-passages ask for 3: give more --texts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(checkpoints: Checkpoints, geometry: Geometry, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        build_trials(checkpoints.tokenizer, [novel()[:60_000]], geometry, num_trials=3, num_facts=2, seed=0)


def test_end_to_end(checkpoints: Checkpoints, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "probe.json"
    assert run(str(checkpoints.base()), *SIZES, "--texts", text, "--output", str(output)) == 0
    printed, markdown = capsys.readouterr().out, output.with_suffix(".md").read_text()
    assert markdown in printed
    result = json.loads(output.read_text())
    assert result["texts"] == {Path(text).name: hashlib.sha256(Path(text).read_bytes()).hexdigest()[:16]}
    assert [row["layer"] for row in result["layers"]] == list(range(5))
    for row in result["layers"]:
        mean = (row["gain"]["mean"] + row["drop"]["mean"]) / 2
        assert row["worth"]["mean"] == pytest.approx(mean, abs=1e-6)
        assert row["gain"]["mean"] != 0
        assert row["gain"]["error"] > 0
    measured = [readers["memory_layer"] for readers in result["readers"]]
    worth = sorted(result["layers"], key=lambda row: -row["worth"]["mean"])[:2]
    assert measured == sorted({layer for row in worth for layer in (row["layer"], row["layer"] - 1) if layer >= 0})
    for readers in result["readers"]:
        above = list(range(readers["memory_layer"] + 1, 5))
        assert [row["layer"] for row in readers["layers"]] == above
        assert all(row["key_r_squared"] <= 1 for row in readers["layers"])
        assert all(choice["layers"][0] == readers["memory_layer"] for choice in readers["choices"])
        assert max(len(choice["layers"]) for choice in readers["choices"]) <= 4
    assert output.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert_converts(printed.splitlines(), result["proposal"], tmp_path / "converted")


def assert_converts(printed: list[str], proposal: dict[str, Any], folder: Path) -> None:
    """The printed line is one that ``convert`` takes, and says what was proposed."""
    line = next(line for line in printed if line.startswith("memlong-vllm convert"))
    words = shlex.split(line)[2:]
    words[1] = str(folder)
    parser = argparse.ArgumentParser()
    convert_command.add_arguments(parser)
    assert convert_command.run(parser.parse_args(words)) == 0
    block = json.loads((folder / "config.json").read_text())["memlong"]
    assert {"memory_layer", "retrieval_layers", "fusion"} <= set(proposal["settings"])
    assert proposal["settings"].items() <= block.items()
    assert dict(map(parse_setting, words[3::2])) == proposal["settings"]


def test_a_memlong_checkpoint_is_its_backbone(
    checkpoints: Checkpoints, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every chunk may be read by every question."""
    options = (*SIZES[:-1], "0", "--distractors", "facts", "--texts", text)
    tables = []
    for model in (checkpoints.base(), checkpoints.memlong()):
        assert run(str(model), *options) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")])
    assert len(tables[0]) == 12
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such folder"),
        (["demo", "--texts", "nowhere.txt"], "--texts nowhere.txt: No such file"),
        (["demo", "--output", "table.md"], "--output table.md: must end in .json"),
        (["demo", "--output", "nowhere/probe.json"], "is no folder"),
        (["demo", "--trials", "1"], "--trials 1: must be at least 2"),
        (["demo", "--fit-passages", "4"], "--fit-passages 4: must be at least 5, or --candidates 0"),
        (["{base}", *SIZES, "--memory-layer", "5"], "--memory-layer 5: the backbone has layers 0 to 4"),
        (["{base}", "--window", "1024"], "--window 1024: the backbone was trained on 512"),
        (["{base}", *SIZES, "--device", "nothing"], "--device nothing: "),
    ],
)
def test_mistakes_are_named(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(*(word.format(base=checkpoints.base()) for word in words)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("memlong-vllm probe: ")
    assert message in error


# Deciding.


def samples(mean: float, noise: float = 0.01, sign: int = 1) -> Samples:
    """Trials whose mean is exact; of different signs, their differences have an error."""
    by_trial = torch.tensor([mean + sign * noise * (-1) ** trial for trial in range(8)], dtype=torch.float64)
    return Samples(by_trial, by_trial, torch.zeros(8))


def layer_measures(gains: list[float], drops: list[float], noise: float) -> LayerMeasures:
    alone = tuple(samples(gain - 4, noise, layer % 4 - 2) for layer, gain in enumerate(gains))
    without = tuple(samples(-1 - drop, 0) for drop in drops)
    return LayerMeasures(samples(-4), samples(-1), samples(-1), alone, without)


def reader_measures(memory_layer: int, reached: float, noise: float = 0.01) -> ReaderMeasures:
    choices = (
        Choice((memory_layer,), samples(-3)),
        Choice((memory_layer, memory_layer + 1), samples(reached, noise, memory_layer % 4 - 2)),
        Choice((memory_layer, memory_layer + 2), samples(-2)),
    )
    return ReaderMeasures(memory_layer, {}, {}, samples(-3), {}, choices)


def test_the_layer_worth_most_is_proposed() -> None:
    measures = layer_measures([0, 0.1, 1, 2, 0.2], [0, 0.5, 3, 1, 0.1], noise=0.01)
    assert candidate_layers(measures, 3) == (1, 2, 3)
    assert candidate_layers(measures, 3, with_below=True) == (0, 1, 2, 3)
    assert propose_by_worth(measures).memory_layer == 2


def test_within_the_error_the_lower_layer_wins() -> None:
    drops = [0.0] * 5
    assert propose_by_worth(layer_measures([0, 1.95, 0, 2, 0], drops, noise=1.0)).memory_layer == 1
    assert propose_by_worth(layer_measures([0, 1.95, 0, 2, 0], drops, noise=0.001)).memory_layer == 3
    assert propose_by_worth(layer_measures([-5, -5, -5, 2, 1.95], drops, noise=1.0)).memory_layer == 3
    assert propose([reader_measures(5, -1.0), reader_measures(9, -0.5)]).memory_layer == 9
    assert propose([reader_measures(5, -1.0, 1.0), reader_measures(7, -0.95, 1.0)]).memory_layer == 5
    assert propose([reader_measures(5, -0.9), reader_measures(9, -1.0)]).retrieval_layers == (5, 6)


@pytest.mark.parametrize("num_layers", [5, 26, 30])
def test_every_fourth_layer_is_that_of_the_presets(num_layers: int) -> None:
    block = preset("released", num_layers, 2048)
    assert set(spread_layers(num_layers, block["memory_layer"])) == {*block["retrieval_layers"], block["memory_layer"]}
