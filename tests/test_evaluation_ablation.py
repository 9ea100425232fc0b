"""Variants of a checkpoint: how they are named and made, measured and reported."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from memlong_vllm.evaluation.ablation_report import groups_of
from memlong_vllm.evaluation.models import model_specs
from memlong_vllm.evaluation.reports import write_report
from memlong_vllm.evaluation.results import ResultsFile, read_results
from memlong_vllm.evaluation.scoring import EvaluationError
from memlong_vllm.evaluation.variants import untrained_for, variant_specs, variation
from memlong_vllm.evaluation.varied_checkpoint import varied_checkpoint
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from tests.checkpoints import Checkpoints, novel

Evaluate = Callable[..., int]
NAME = "model.layers.{}.self_attn.memory_gate"


def varied(model: Path, *texts: str) -> list[Any]:
    return variant_specs(model_specs(model)[0], [variation(text) for text in texts], [], ["memlong"])


def test_values_of_a_setting(model: Path) -> None:
    specs = varied(model, "top_k=1,2,4", "retrieval_layers=1+2,2-2+4", "fusion=joint", "chunk_size=32")
    # The checkpoint's own top_k is 2.
    labels = ["top_k=1", "top_k=4", "retrieval_layers=1+2", "retrieval_layers=2-2+4", "fusion=joint", "chunk_size=32"]
    assert [spec.label for spec in specs] == labels
    blocks = {spec.label: spec.config["memlong"] for spec in specs}
    assert blocks["top_k=4"]["top_k"] == 4
    assert blocks["retrieval_layers=2-2+4"]["retrieval_layers"] == [2, 4]
    assert [blocks["chunk_size=32"][name] for name in ("retrieval_stride", "query_tokens")] == [32, 32]
    assert blocks["fusion=joint"]["chunk_size"] == 16
    untrained = [spec.label for spec in specs if untrained_for(spec.changes)]
    assert untrained == ["retrieval_layers=1+2", "retrieval_layers=2-2+4", "fusion=joint"]
    assert {tuple(spec.memory_sizes([0, 128, 512])) for spec in specs} == {(512,)}


REFUSED = [
    ("top_k=0", r"--vary top_k=0: memlong.top_k = 0: must be a positive"),
    ("top_k=few", "--vary top_k=few: not a number"),
    ("fusion=sum", r"--vary fusion=sum: .*must be one of"),
    ("retrieval_layers=1-x", r"not layers such as 13\+17\+21"),
    ("retrieval_layers=0+4", "no layer may lie below memory_layer"),
    ("retrieval_layers=2+3", r"no trained gates in layers \[3\]"),
    ("local_window=72", "must be a multiple of chunk_size"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_no_variant(model: Path, text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        varied(model, text)


@pytest.mark.parametrize("text", ["top_k", "top_k=", "top_k=1,1", "memory_size=0,64", "retriever.model=/x"])
def test_what_cannot_be_varied(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="use --memory-sizes" if "size" in text else "top_k"):
        variation(text)


@pytest.mark.parametrize(("fusion", "result"), [("gated", "let no memory through"), ("scaled_logits", "halve all")])
def test_gates_that_were_never_trained(checkpoints: Checkpoints, fusion: str, result: str) -> None:
    """A joint checkpoint's: as a gated one it would be measured without memory."""
    joint = checkpoints.memlong(gates=0, fusion="joint")
    message = rf"--vary fusion={fusion}: .* no trained gates in layers \[1, 2, 4\], and zero ones {result}"
    with pytest.raises(EvaluationError, match=message):
        varied(joint, f"fusion={fusion}")
    assert [spec.label for spec in varied(joint, "top_k=1", "retrieval_layers=2+3")] == [
        "top_k=1", "retrieval_layers=2+3",
    ]  # fmt: skip


def test_fusions_with_the_gates_they_need(model: Path, checkpoints: Checkpoints) -> None:
    assert [spec.label for spec in varied(model, "fusion=joint,scaled_logits")] == [
        "fusion=joint", "fusion=scaled_logits",
    ]  # fmt: skip
    assert [spec.label for spec in varied(checkpoints.memlong(gates=0), "fusion=joint")] == ["fusion=joint"]


def test_labels_and_vocabularies_are_checked(model: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    main = model_specs(model)[0]
    other = variant_specs(main, [], [("later", model)], ["memlong"])[0]
    assert (other.label, other.group, other.changes) == ("later", "checkpoint", {})
    for label, path, message in (
        ("memlong", model, "two models are called 'memlong'"),
        ("plain", checkpoints.base(), "plain ones are baselines"),
        ("none", model / "none", "--variant none .* is no folder with a model"),
    ):
        with pytest.raises(EvaluationError, match=message):
            variant_specs(main, [], [(label, path)], ["memlong"])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    for option in ({"control": other}, {"backbone": other, "baselines": ["full"]}):
        with pytest.raises(EvaluationError, match="has another vocabulary than --model"):
            model_specs(model, **option)
    with pytest.raises(EvaluationError, match=r"'later' .* has another vocabulary than --model"):
        variant_specs(main, [], [("later", other)], ["memlong"])


def test_other_settings_link_to_the_weights(model: Path, tmp_path: Path) -> None:
    (spec,) = varied(model, "top_k=1")
    folder = varied_checkpoint(model, tmp_path / "varied", spec.config)
    assert json.loads((folder / "config.json").read_text()) == spec.config
    others = [file for file in folder.iterdir() if file.name != "config.json"]
    assert {file.name for file in others} == {file.name for file in model.iterdir()} - {"config.json"}
    assert all(file.is_symlink() for file in others)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_other_layers_get_parameters_of_their_own(model: Path, tmp_path: Path, is_sharded: bool) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    if is_sharded:
        shard(source)
    specs = varied(model, "retrieval_layers=2+4")
    config = specs[0].config | {"memlong": specs[0].config["memlong"] | {"retrieval_layers": [2, 3], "fusion": "joint"}}
    folder = varied_checkpoint(source, tmp_path / "varied", config)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    before = load_file(model / "model.safetensors")
    assert set(tensors) == set(before) - {NAME.format(1), NAME.format(4)} | {NAME.format(3)}
    assert not tensors[NAME.format(3)].any()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors if name in before)
    loaded, report = MemLongForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys"))
    assert torch.equal(loaded.state_dict()[NAME.format(2)], before[NAME.format(2)])
    if is_sharded:
        kept = [file for file in folder.glob("*.safetensors") if file.is_symlink()]
        assert kept, "what need not change is not copied"


def shard(checkpoint: Path) -> None:
    """One file for each layer, and one for the rest."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    places = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in tensors}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.slow
def test_engine_and_reference_agree_on_variants(
    evaluate: Evaluate, checkpoints: Checkpoints, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(novel()[20_000:24_000], encoding="utf-8")
    other = checkpoints.memlong(gates=1.5)
    measured = {}
    for engine in ("vllm", "reference"):
        output = tmp_path / f"{engine}.json"
        words = ["--model", model, "--texts", text, "--lengths", 400, "--last", 200, "--memory-sizes", "0,256"]
        words += ["--vary", "retrieval_layers=2+4", "--variant", f"wide={other}"]
        assert evaluate("ablation", *words, "--piece", 96, "--engine", engine, "--output", output) == 0
        rows = read_results(output)["rows"]
        measured[engine] = {(row["model"], row["memory_size"]): row["nll"] for row in rows}
    expected = [("memlong", 0), ("memlong", 256), ("retrieval_layers=2+4", 256), ("wide", 256)]
    assert list(measured["vllm"]) == list(measured["reference"]) == expected
    assert measured["vllm"] == pytest.approx(measured["reference"], abs=1e-4)
    assert len({round(nll, 3) for nll in measured["vllm"].values()}) == 4, "every variant is another model"
    report = (tmp_path / "vllm.md").read_text()
    assert "| retrieval_layers | 400 |" in report
    assert "| 2+4 † |" in report
    assert "† trained with another value" in report


def test_what_the_command_refuses(
    evaluate: Evaluate, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(novel()[20_000:24_000], encoding="utf-8")
    words = ["--model", checkpoints.memlong(), "--texts", text, "--lengths", 400, "--output", tmp_path / "results.json"]
    for more, message in (
        (["--memory-sizes", "256"], "there is nothing to compare: add --vary"),
        (["--memory-sizes", "0", "--random-retrieval"], "there is nothing to compare: add --vary"),
        (["--vary", "top_k=1", "--top-k", 4], "--vary top_k and another option that sets it"),
        (["--vary", "chunk_size=32", "--memory-sizes", "0,48"], "'chunk_size=32' has chunks of 32 tokens"),
    ):
        assert evaluate("ablation", *words, *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_recall_of_variants(evaluate: Evaluate, model: Path, tmp_path: Path) -> None:
    """Chunks of another size hold the needle in other places."""
    text, output = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(novel()[20_000:24_000], encoding="utf-8")
    words = ["--model", model, "--texts", text, "--lengths", 400]
    words += ["--trials", 1, "--depths", "0.5", "--kinds", "passkey"]
    # All chunks are retrieved, so the needle's is, if it is looked for where it is.
    more = ["--memory-sizes", "0,512", "--engine", "reference", "--top-k", "64", "--vary", "chunk_size=32"]
    assert evaluate("recall", *words, *more, "--output", output) == 0
    found = {(row["model"], row["memory_size"]): row["needle_retrieved"] for row in read_results(output)["rows"]}
    assert list(found) == [("memlong", 0), ("memlong", 512), ("chunk_size=32", 512)]
    assert found["memlong", 512] is found["chunk_size=32", 512] is True


def test_needles_are_out_of_every_variants_sight(evaluate: Evaluate, model: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(novel()[20_000:24_000], encoding="utf-8")
    words = [
        "--model",
        model,
        "--texts",
        text,
        "--lengths",
        600,
        "--trials",
        1,
        "--depths",
        "0.9",
        "--kinds",
        "passkey",
    ]
    more = ["--engine", "reference", "--vary", "local_window=256", "--output", output]
    assert evaluate("recall", *words, *more) == 0
    content = read_results(output)
    assert content["settings"]["min_distance"] == 256 + 16
    assert all(row["tokens"] - row["needle"][1] >= 256 for row in content["rows"])
    assert {row["model"] for row in content["rows"]} == {"memlong", "local_window=256"}


def described(**fields: Any) -> dict[str, Any]:
    common = {"name": "tiny", "digest": "0f", "attention": "memory", "local_window": 64, "trained_length": 512}
    block = {"top_k": 8, "fusion": "gated", "query_scope": "preceding"}
    return common | {"random_retrieval": False, "memlong": block, "group": None, "changes": None} | fields


def test_groups_and_their_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        "memlong": described(),
        "random": described(random_retrieval=True),
        "control": described(),
        "top_k=16": described(group="top_k", changes={"top_k": 16}),
        "top_k=2": described(group="top_k", changes={"top_k": 2}),
        "fusion=joint": described(group="fusion", changes={"fusion": "joint"}),
        "query_scope=current": described(
            group="query_scope", changes={"query_scope": "current"}, memlong={"query_scope": "current"}
        ),
        "later": described(group="checkpoint"),
    }
    settings = {"last": 32, "engine": "vllm", "dtype": "float32"}
    results = ResultsFile(tmp_path / "r.json", "ablation", settings, models, ("model", "text", "memory_size"))
    for text, level in (("a", 2.0), ("b", 3.0)):
        for number, model in enumerate(models):
            for size in {"memlong": (0, 64), "control": (0,)}.get(model, (64,)):
                common = {"model": model, "text": text, "window": 0, "length": 128, "memory_size": size}
                nll = level + number / 10 + (0.5 if size == 0 else 0)
                results.append([common | {"tokens": 32, "nll": nll, "ppl": math.exp(nll)}])
    results.flush()
    groups = groups_of(read_results(results.path))
    names = {group: [choice.title for choice in choices] for group, choices in groups.items()}
    assert names == {
        "memory_size": ["off", "64"],
        "other models": ["memlong", "random", "control, memory off"],
        "top_k": ["2", "8", "16"],
        "fusion": ["gated", "joint †"],
        "query_scope": ["preceding", "current ‡"],
        "checkpoint": ["memlong", "later"],
    }
    write_report(results.path)
    shown = capsys.readouterr().out
    stopped = ResultsFile(tmp_path / "stopped.json", "ablation", settings, models, ("model", "text", "memory_size"))
    stopped.append(read_results(results.path)["rows"][:1])
    assert len(write_report(stopped.path)) == 2  # No group yet, and no panel of the plot.
    assert "| 8 | 12.182 (as it is) |" in shown
    assert "| 2 | 18.174 (+0.4000 ± 0.0000) |" in shown
    assert "‡ queries of a segment are its own text" in shown
