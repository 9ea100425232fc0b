"""``memlong-vllm finetune`` as it is called, and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memlong_vllm.adapters.adapter_file import load_adapter
from memlong_vllm.cli import main as console
from memlong_vllm.training.documents import (
    Document,
    Excerpt,
    TextsError,
    dataset_loader,
    find_texts,
    read_documents,
    take,
)
from tests.checkpoints import Checkpoints, novel

OPTIONS = (
    "--cpu --precision fp32 --steps 2 --rows 2 --segment-tokens 64 --lora-rank 2 --lora-alpha 4 "
    "--warmup-steps 0 --learning-rate 1e-3 --valid-tokens 200 --calibrate-tokens 128"
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    text = novel()
    for idx in range(4):
        (folder / f"{'valid' if idx == 3 else 'train'}{idx}.txt").write_text(text[idx * 6000 : idx * 6000 + 6000])
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs ``memlong-vllm finetune``; returns the exit status and what was printed."""

    def run(*arguments: Any) -> tuple[int, str]:
        options = ["--cache-dir", str(tmp_path / "cache"), *OPTIONS.split(), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["memlong-vllm", "finetune", *options])
        status = console.main()
        return status, "".join(capsys.readouterr())

    return run


def test_texts_become_an_adapter(
    checkpoints: Checkpoints, texts: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    model = checkpoints.memlong(gates=0.0, fusion="joint", memory_bias=True, memory_adapter="linear")
    output = tmp_path / "out" / "adapter.safetensors"
    status, printed = command(
        "--model", model, "--output", output, "--texts", texts / "train*.txt", "--valid", texts / "valid3.txt",
        "--weave-facts", 50, "--document-tokens", 1000, "--bias-start", -1,
        "--memory-learning-rate", "1e-2", "--train-whole", "norms",
    )  # fmt: skip
    assert status == 0, printed
    assert "linear maps explain" in printed
    adapter = load_adapter(output)
    assert adapter.training["settings"]["memory_learning_rate"] == 1e-2
    assert adapter.training["command"].startswith("memlong-vllm finetune --cache-dir")
    assert [name.split()[0] for name in adapter.training["train"]] == ["train0.txt", "train1.txt", "train2.txt"]
    assert adapter.training["valid"][0].startswith("valid3.txt (200 tokens")
    assert "model.layers.3.input_layernorm.weight" in adapter.tensors
    assert "model.layers.1.input_layernorm.weight" not in adapter.tensors  # What is stored depends on it.
    lines = [json.loads(line) for line in (Path(f"{output}.run") / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert lines[1]["learning_rate"] == 1e-3  # Of LoRA; what reads memory has another.
    assert lines[-1]["validation"]["num_tokens"] > 0


def test_brackets_in_a_name_are_brackets(tmp_path: Path) -> None:
    named = tmp_path / "Emma [1815].txt"
    named.touch()
    assert find_texts([str(named)]) == [named]
    assert find_texts([str(tmp_path / "E*.txt")]) == [named]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextsError, match=r"--dataset needs the datasets library .*pip install datasets"):
        dataset_loader()


def test_a_dataset_in_a_folder(
    checkpoints: Checkpoints, texts: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": (texts / f"train{idx}.txt").read_text()} for idx in range(3)] + [{"text": "too short"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "adapter.safetensors"
    status, printed = command(
        "--model", checkpoints.memlong(), "--output", output, "--dataset", folder, "--max-documents", 4
    )
    assert status == 0, printed
    assert len(load_adapter(output).training["train"]) == 3


def test_a_part_of_a_text_is_used(checkpoints: Checkpoints, texts: Path) -> None:
    path = texts / "train0.txt"
    whole = checkpoints.tokenizer(path.read_text())["input_ids"]
    for excerpt, expected in (
        (Excerpt(), whole),
        (Excerpt(max_tokens=70), whole[:70]),
        (Excerpt(5, 70), whole[5:75]),
        (Excerpt(len(whole) - 3), whole[-3:]),
    ):
        (document,) = read_documents([path], checkpoints.tokenizer, excerpt, 3)
        assert list(document.token_ids) == expected
    with pytest.raises(TextsError, match=r"train0.txt has 0 tokens"):
        read_documents([path], checkpoints.tokenizer, Excerpt(len(whole)), 1)


def test_as_many_documents_are_taken_as_are_read() -> None:
    documents = [Document(str(idx), [0] * length) for idx, length in enumerate((100, 400, 50, 500))]
    for least, tokens, number in ((1, 100, 1), (2, 100, 2), (1, 101, 2), (1, 10_000, 4)):
        assert len(take(iter(documents), least, tokens)) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "nowhere/*.txt"], "no file matches 'nowhere/*.txt'"),
        ([], "nothing to train on: give --texts or --dataset"),
        (["--texts", __file__, "--lora-targets", "q_proj,wq"], "LoRA targets ['wq'] are unknown"),
        (["--texts", __file__, "--document-tokens", "10"], "at least one segment (64) is needed"),
        (["--texts", __file__, "--rows", "0"], "rows = 0: must be positive"),
        (["--texts", __file__], "1 training texts are too few for 2 rows"),
        (["--texts", __file__, "--valid", __file__], "is a training text too"),
        (["--texts", __file__, "--document-tokens", "-5"], "--document-tokens -5: must be positive"),
        (["--texts", __file__, "--cache-dir", __file__], "a file is where a folder is needed"),
        (["--texts", __file__, "--lora-targets", ""], "LoRA targets are none"),
        (["--texts", __file__, "--weave-facts", "-1"], "must be 0 or more"),
        (["--texts", __file__, "--document-offset", "-1"], "--document-offset -1: must be 0 or more"),
        (["--texts", __file__, "--start", "{output}"], "is --output too, and would be overwritten"),
        (["--texts", __file__, "--weave-copies", "1.5"], "--weave-copies 1.5: must be from 0 to 1"),
        (["--texts", __file__, "--rows", "1", "--start", __file__], "not a safetensors file"),
        (["--dataset", "any", "--document-tokens", "64"], "--document-tokens 64: texts must have "),
        (["--dataset", "no-such-dataset-here"], "--dataset no-such-dataset-here"),
        (["--texts", __file__, "--warmup-steps", "9"], "warmup_steps = 9: must not exceed steps (2)"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, checkpoints: Checkpoints, command: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    arguments = [argument.format(output=output) for argument in arguments]
    status, printed = command("--model", checkpoints.memlong(), "--output", output, *arguments)
    assert (status, message in printed) == (2, True), printed
    assert not output.exists()


@pytest.mark.slow
def test_two_processes_train_one_adapter(checkpoints: Checkpoints, texts: Path, tmp_path: Path) -> None:
    """Data-parallel on the CPU (gloo): both take part, gradients are averaged by tokens' weights, which
    differ from text to text, and one writes."""
    output = tmp_path / "adapter.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    arguments = [
        "-m", "memlong_vllm.cli.main", "finetune", "--cache-dir", str(tmp_path / "cache"), *OPTIONS.split(),
        "--model", str(checkpoints.memlong()), "--output", str(output), "--texts", str(texts / "train*.txt"),
        "--rows", "1", "--save-every", "1", "--weave-facts", "60",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_adapter(output).training["step"] == 2
    state = Path(f"{output}.run") / "state"
    ranks = [torch.load(state / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["streams"]["places"] != ranks[1]["streams"]["places"]
    # Two rows of one process read the same and learn the same.
    alone = tmp_path / "alone.safetensors"
    command = [sys.executable, *arguments, "--rows", "2", "--output", str(alone)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [Path(f"{path}.run/log.jsonl").read_text().splitlines() for path in (output, alone)]
    norms = [[json.loads(line)["grad_norm"] for line in log if "loss" in line] for log in logs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    together, single = load_adapter(output).tensors, load_adapter(alone).tensors
    for name, tensor in single.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
