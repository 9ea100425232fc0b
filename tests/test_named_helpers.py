"""Named memories for programs with a ``vllm.LLM``, in this process and in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

import memlong_vllm
from memlong_vllm.memories.errors import MemoryExistsError, MemoryNameError, MemoryWriteError, UnknownMemoryError
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.named import perform, split, wait_until_written
from tests.checkpoints import novel

CHUNK = 16


def test_parameters_of_requests() -> None:
    assert memlong_vllm.memory_params() == {}
    assert memlong_vllm.memory_params(read="a", write="b") == {"memory_read": ["a"], "memory_write": "b"}
    all_of_them = memlong_vllm.memory_params(read=("a", "b"), memory_size=0, top_k=3)
    assert all_of_them == {"memory_read": ["a", "b"], "memory_size": 0, "top_k": 3}
    for names in ({"read": ["../a"]}, {"write": ""}, {"read": ""}):
        with pytest.raises(MemoryNameError):
            memlong_vllm.memory_params(**names)  # type: ignore[arg-type]


def test_importing_the_package_does_not_import_vllm() -> None:
    code = "import memlong_vllm, sys; assert callable(memlong_vllm.memorize); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("num_tokens", "max_model_len", "lengths"),
    [(16, 17, [16]), (31, 64, [16]), (100, 33, [32, 32, 32]), (100, 49, [48, 48]), (112, 49, [48, 48, 16])],
)
def test_texts_are_cut_between_chunks(num_tokens: int, max_model_len: int, lengths: list[int]) -> None:
    pieces = split(range(num_tokens), CHUNK, max_model_len)
    assert [len(piece) for piece in pieces] == lengths
    assert [token for piece in pieces for token in piece] == list(range(sum(lengths)))


@pytest.mark.parametrize(("num_tokens", "max_model_len"), [(0, 64), (15, 64), (100, 16)])
def test_texts_without_a_chunk(num_tokens: int, max_model_len: int) -> None:
    with pytest.raises(MemoryWriteError, match="no complete chunk"):
        split(range(num_tokens), CHUNK, max_model_len)


def test_a_write_that_is_lost_is_noticed() -> None:
    states: list[Any] = [{"num_chunks": 1, "is_busy": True}, {"num_chunks": 1, "is_busy": False}]
    with pytest.raises(MemoryWriteError, match="1 chunks instead of 2"):
        wait_until_written(lambda: states.pop(0), "a", 2)
    with pytest.raises(MemoryWriteError, match="0 chunks instead of 2"):
        wait_until_written(lambda: None, "a", 2)


def test_in_this_process(start_engine: Any, checkpoints: Any, tmp_path: Path) -> None:
    settings = {"memory_dir": str(tmp_path / "memories"), "memory_quota_names": 2}
    llm = start_engine(checkpoints.memlong(), memlong=settings).llm
    assert memlong_vllm.list_memories(llm) == []
    texts = [novel()[:2000], novel()[20_000:28_000]]
    counts = [len(llm.get_tokenizer().encode(text)) // CHUNK for text in texts]
    assert counts[1] * CHUNK > 2048
    made = memlong_vllm.memorize(llm, "book", texts)
    assert (made["num_chunks"], len(made["parts"])) == (sum(counts), 3)
    assert memlong_vllm.memorize(llm, "book", texts[:1])["num_chunks"] == sum(counts) + counts[0]
    memlong_vllm.memorize(llm, "secret", texts[:1], cache_salt="salt")
    assert [entry["name"] for entry in memlong_vllm.list_memories(llm)] == ["book"]
    assert [entry["name"] for entry in memlong_vllm.list_memories(llm, "salt")] == ["secret"]

    def answer(**settings: Any) -> list[float]:
        extra = memlong_vllm.memory_params(**settings)
        parameters = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True, extra_args=extra)
        (output,) = llm.generate([novel()[90_000:90_400]], parameters, use_tqdm=False)
        return [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]

    assert answer(read="book") != pytest.approx(answer(), abs=1e-2)
    memlong_vllm.memorize(llm, "second", texts[:1])
    with pytest.raises(MemoryWriteError, match="2 are allowed"):
        memlong_vllm.memorize(llm, "third", texts[:1])
    memlong_vllm.delete_memory(llm, "book")
    with MemoryLibrary(tmp_path / "memories", None, None, read_only=True) as library:
        library.export_archive("default", "second", tmp_path / "second.tar")
    copied = perform(llm, "import_archive", tenant="default", name="copy", path=str(tmp_path / "second.tar"))
    assert copied["num_chunks"] == counts[0]
    with pytest.raises(MemoryExistsError):
        perform(llm, "import_archive", tenant="default", name="copy", path=str(tmp_path / "second.tar"))
    with pytest.raises(UnknownMemoryError):
        memlong_vllm.delete_memory(llm, "book")


@pytest.mark.slow
def test_in_processes_of_its_own_by_the_command(checkpoints: Any, tmp_path: Path) -> None:
    """Imports a text into a folder with a model."""
    (tmp_path / "text.txt").write_text(novel()[:3000])
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

    def memory(*arguments: str) -> Any:
        command = [sys.executable, "-m", "memlong_vllm.cli.main", "memory", *arguments, "--json"]
        command += ["--memory-dir", str(tmp_path / "memories")]
        result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return json.loads(result.stdout)

    options = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 4, "kv_cache_memory_bytes": 64 << 20}
    options["additional_config"] = {"memlong": {"bank_gib": 0.1}}  # The folder stays what it is.
    computing = ("--model", str(checkpoints.memlong()), "--options", json.dumps(options))
    made = memory("import", "book", str(tmp_path / "text.txt"), *computing)
    assert made["num_chunks"] > 10
    (entry,) = memory("list")
    assert (entry["name"], entry["num_chunks"]) == ("book", made["num_chunks"])
