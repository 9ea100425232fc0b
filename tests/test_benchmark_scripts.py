"""The benchmarks' scripts: that each of them runs, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import command_line
import paper_scale
import pytest
import throughput
import torch
from accounting_report import ACCOUNTING
from goals import retrieval_costs
from measurement_file import read_results
from report import write_report

from tests.checkpoints import NOVEL

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--dtype", "float32", "--step-tokens", "128", "--repetitions", "1"]


def run(script: str, output: Path, *words: Any) -> dict[str, Any]:
    """Run a benchmark to its end; its results."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words), "--output", str(output)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


def by_cell(content: dict[str, Any]) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    return {(row["engine"], row["workload"], row["length"], row["batch"]): row for row in content["rows"]}


def test_the_accounting_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "paper_scale.json"
    monkeypatch.setattr("sys.argv", ["paper_scale.py", "--output", str(output)])
    paper_scale.main()
    rows = [row for row in read_results(output)["rows"] if row["workload"] == ACCOUNTING]
    sequences = {(row["model"], row["variant"], row["memory_size"]): row["sequences"] for row in rows}
    assert len(sequences) == 3 * (3 + 2 * 2)
    # As 'memlong-vllm plan' and the README have it.
    assert sequences["openllama-3b", "full attention", None] == 0
    assert sequences["openllama-3b", "MemLong, bank on device", 32768] == 12
    assert sequences["openllama-3b", "MemLong, bank on host", 32768] == 20
    assert "openllama-3b" in write_report([output], tmp_path / "report.md")[0].read_text()


def test_throughput_runs(checkpoints: Any, tmp_path: Path) -> None:
    """The authors' loop leaves the checkpoint's maps of memory out."""
    model = checkpoints.memlong(memory_adapter="linear", memory_adapter_width=2)
    words = ["--model", model, *TINY, "--lengths", 320, "--batches", 1, 2, "--answer", 6, "--decoded", 24]
    engines = ("memlong", "window", "off", "authors")
    content = run("throughput.py", tmp_path / "throughput.json", *words, "--engines", *engines)
    rows = by_cell(content)
    workloads = ("prefill", "decode", "document")
    assert rows.keys() == {
        (engine, workload, 320, batch) for engine in engines for workload in workloads for batch in (1, 2)
    }
    assert "one sequence" in rows["authors", "prefill", 320, 2]["skipped"]
    assert rows["authors", "document", 320, 2]["skipped"]
    assert rows["off", "prefill", 320, 2]["counters"]["searches"] == 0
    assert rows["off", "prefill", 320, 2]["counters"]["embedded_texts"] == 0
    prefill = rows["memlong", "prefill", 320, 2]
    assert prefill["counters"]["embedded_texts"] > 0
    # The second time everything is computed, but nothing embedded.
    assert prefill["known_counters"] | {"embedded_texts": 0, "prefix_hit_tokens": 0} == prefill["known_counters"]
    assert 0 < prefill["known_counters"]["searches"] <= prefill["counters"]["searches"]
    decode = rows["memlong", "decode", 320, 2]
    assert decode["known_prompt_tokens"] > 0
    assert decode["counters"]["embedded_texts"] > 0
    assert rows["memlong", "document", 320, 2]["known_prompt_percent"] > 50
    # The authors embed for every token that is answered.
    assert rows["authors", "prefill", 320, 1]["tokens_per_s"] > 0
    texts = {engine: rows[engine, "prefill", 320, 1]["counters"]["embedded_texts"] for engine in ("memlong", "authors")}
    assert texts["authors"] >= texts["memlong"] + 4
    assert set(content["engines"]) == set(engines)
    assert {row["setup"] for row in rows.values() if "skipped" not in row} == {0}
    assert "MemLong / window" in write_report([tmp_path / "throughput.json"], tmp_path / "report.md")[0].read_text()


@pytest.mark.slow
def test_the_bank_in_either_place_answers_alike(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--length", 400, "--batch", 2, "--max-tokens", 20, "--repetitions", 1]
    summary = run("bank_device.py", tmp_path / "bank_device.json", *words)["summary"]
    assert summary["equal_answers"] == summary["answers"] == 2
    assert summary["prefill_tokens_per_s, cpu"]["median"] > 0
    assert all(number > 0 for number in summary["working_set_gathers"].values())


@pytest.mark.slow
def test_a_shared_prefix_is_compared_with_a_cold_engine(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, "--length", 640, "--questions", 2, "--max-tokens", 4, "--repetitions", 1]
    summary = run("prefix_sharing.py", tmp_path / "prefix_sharing.json", *words, "--check")["summary"]
    assert summary["check"]["answers"] == 2
    assert summary["check"]["of_hits"] == 1  # The first question computes the document.
    assert summary["check"]["max_difference"] < 1e-3
    assert summary["table"]["shared, later questions"]["most_embedded_document_chunks"] == 0
    assert summary["table"]["full, later questions"]["first_token_s"] > 0


@pytest.mark.slow
def test_queries_of_a_length_are_ranked_among_a_novels_chunks(tmp_path: Path) -> None:
    words = ["--texts", NOVEL, "--lengths", 256, 2048, "--queries", 16, 64, "--trials", 2]
    summary = run("query_length.py", tmp_path / "query_length.json", *words)["summary"]
    assert {(cell["length"], cell["query_tokens"], cell["of"]) for cell in summary} == {
        (length, query, 2) for length in (256, 2048) for query in (16, 64)
    }
    found = {(cell["kind"], cell["length"], cell["query_tokens"]): cell["found"] for cell in summary}
    # Eight are taken, of four chunks and the needle's.
    assert all(share == 1.0 for (_, length, _), share in found.items() if length == 256)


@pytest.mark.slow
def test_an_index_of_clusters_is_measured_against_the_exact_one(tmp_path: Path) -> None:
    words = ["--chunks", 600, "--real", 200, "--queries", 5, "--factories", "Flat", "IVF4,Flat"]
    words += ["--nprobe", 1, 4, "--repetitions", 1]
    flat, clusters = run("corpus_index.py", tmp_path / "corpus_index.json", *words)["indexes"]
    assert flat["is_exact"]
    assert flat["settings"][0]["recall_at_8"] == 1.0
    some, every = (row["recall_at_8"] for row in clusters["settings"])
    assert some <= every == 1.0  # With all clusters searched.


SHORT = ["--lengths", 256, "--answer", 8]
RETRIEVAL = ["--lengths", 512, "--ledger-length", 256, "--ledger-steps", 40]


def measures_of(content: dict[str, Any]) -> set[tuple[str, str]]:
    """(engine, workload) of what was measured."""
    return {(row["engine"], row["workload"]) for row in content["rows"] if "skipped" not in row}


def test_latency_is_measured(model: Path, tmp_path: Path) -> None:
    words = ["--model", model, *TINY, *SHORT, "--batches", 2, "--engines", "memlong"]
    content = run("latency.py", tmp_path / "latency.json", *words)
    assert measures_of(content) == {("memlong", "burst")}
    for row in content["rows"]:
        assert 0 < row["ttft_p50_s"] <= row["ttft_max_s"] < row["total_s"]
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"] <= row["itl_max_ms"]


def test_time_in_the_scheduler_is_measured(model: Path, tmp_path: Path) -> None:
    content = run("retrieval.py", tmp_path / "retrieval.json", "--model", model, *TINY, "--batches", 2, *RETRIEVAL)
    assert {("memlong", workload) for workload in ("spread", "aligned", "ledger")} <= measures_of(content)
    costs = retrieval_costs(content["rows"])
    assert {cost["workload"] for cost in costs} == {"spread", "aligned"}
    assert all(cost["steps"] > 0 and 0 < cost["own_ms"] < cost["whole_ms"] for cost in costs)


@pytest.mark.slow
def test_every_benchmark_runs_with_every_contender(model: Path, tmp_path: Path) -> None:
    common = ["--model", model, *TINY, "--batches", 1]
    names = {"throughput": [*SHORT, "--decoded", 24], "latency": SHORT, "memory": SHORT}
    names["online"] = [*SHORT, "--rate", 5]
    names["retrieval"] = RETRIEVAL
    workloads = {"throughput": throughput.WORKLOADS, "latency": ("burst",), "memory": ("held",), "online": ("online",)}
    has_fp8 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    for name, words in names.items():
        content = run(f"{name}.py", tmp_path / f"{name}.json", *common, *words)
        engines = set(throughput.ENGINES) if name == "throughput" else set(command_line.ALL)
        engines -= {"authors"} if name == "online" else set()
        engines -= set() if has_fp8 else {"fp8"}
        if name in workloads:
            assert measures_of(content) == {(engine, workload) for engine in engines for workload in workloads[name]}
    words = [*common, *SHORT, "--decoded", 24, "--compiled", "--engines", "memlong", "window"]
    assert len(run("throughput.py", tmp_path / "compiled.json", *words)["rows"]) == 2 * 3
    words = ["--run", "--shape", model, "--model", model, "--length", 256, "--answer", 8]
    content = run("paper_scale.py", tmp_path / "paper_scale.json", *words)
    assert "skipped" not in content["rows"][-1]
    paths = [tmp_path / f"{name}.json" for name in (*names, "paper_scale")]
    text = write_report(paths, tmp_path / "report.md")[0].read_text()
    assert all(f"## {path.stem}" in text for path in paths)
