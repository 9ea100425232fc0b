"""lm-evaluation-harness runs a MemLong checkpoint as ``--model vllm``, memory included."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import MEMORY, Checkpoints, novel
from tests.engines import Reference

EXAMPLE = Path(__file__).parent.parent / "examples" / "lm_eval"
ENGINE = {
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 2,
    "kv_cache_memory_bytes": 64 << 20,
}


def write_data(folder: Path) -> None:
    """In SST-2's format; what the labels say is of no account."""
    draw = random.Random(0)
    lines = [line.replace("\t", " ") for line in novel()[20_000:40_000].splitlines() if len(line) > 40]
    for name, rows in (("sst2_train.tsv", lines[:40]), ("sst2_dev.tsv", lines[40:60])):
        text = [f"{line}\t{draw.randint(0, 1)}" for line in rows]
        (folder / name).write_text("\n".join(["sentence\tlabel", *text]) + "\n", encoding="utf-8")


def run_lm_eval(folder: Path, model: Path, trace: Path) -> list[dict[str, Any]]:
    """The command of the example. Returns its samples."""
    memlong = {"bank_gib": 0.1, "trace_file": str(trace)}
    arguments = {"pretrained": str(model), "additional_config": {"memlong": memlong}} | ENGINE
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--model_args", json.dumps(arguments)]
    command += ["--include_path", str(EXAMPLE), "--tasks", "memlong_sst2", "--num_fewshot", "6", "--limit", "2"]
    command += ["--batch_size", "2", "--output_path", str(folder / "results"), "--log_samples"]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HOME": str(folder / "hub"), "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (results,) = (folder / "results").rglob("results_*.json")
    # Of two samples.
    assert json.loads(results.read_text())["results"]["memlong_sst2"]["acc,none"] in (0, 0.5, 1)
    (samples,) = (folder / "results").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install lm-eval)")
def test_log_probabilities_are_the_references(
    checkpoints: Checkpoints, model: Path, reference: Reference, tmp_path: Path
) -> None:
    write_data(tmp_path)
    samples = run_lm_eval(tmp_path, model, tmp_path / "trace.jsonl")
    assert len(samples) == 2
    for sample in samples:
        for number, arguments in enumerate(sample["arguments"].values()):
            context, answer = arguments["arg_0"], arguments["arg_1"]
            assert context.count("Review: ") == 7
            asked = checkpoints.tokenizer(context)["input_ids"]
            token_ids = checkpoints.tokenizer(context + answer)["input_ids"]
            assert token_ids[: len(asked)] == asked
            assert len(asked) > 2 * MEMORY["local_window"], "most demonstrations are in memory"
            measured = float(sample["resps"][number][0][0])
            expected = reference.logprobs(token_ids, len(token_ids))[len(asked) - 1 :].sum().item()
            assert measured == pytest.approx(expected, abs=1e-3)
            without = reference.logprobs(token_ids, len(token_ids), with_memory=False)[len(asked) - 1 :].sum().item()
            assert abs(measured - without) > 0.01, "memory makes no difference here"
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "segment" and line["chunk_ids"] for line in lines)
