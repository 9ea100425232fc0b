"""What ``--model`` stands for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.cli import main
from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model
from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo_model import demo_checkpoint


def test_folders_and_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("demo") == demo_checkpoint()
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo") == demo_checkpoint()
    assert resolve_model("./demo") == Path("demo")


@pytest.mark.slow
def test_the_demo_before_training() -> None:
    base = resolve_model("demo-base")
    assert base == demo_checkpoint(adapted=False) != demo_checkpoint()
    assert "memlong_adapter" not in MemLongConfig.from_pretrained(base).to_dict()


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/has-this", ""])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ModelArgumentError, match=r'no such folder.*"demo" stands for'):
        resolve_model(name)


def test_a_file_is_no_model() -> None:
    with pytest.raises(ModelArgumentError, match="is a file"):
        resolve_model(__file__)


def test_a_demo_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelArgumentError, match="cannot be written"):
        resolve_model("demo")


COMMANDS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", "--context", "4096"),
    "demo": ("demo",),
    "finetune": ("finetune", "--texts", __file__, "--output", "a.safetensors"),
    "memory": ("memory", "import", "name", __file__, "--memory-dir", "memories"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["memlong-vllm", *COMMANDS[command], "--model", "no/such"])
    assert main.main() in (1, 2)
    assert '"demo" stands for the demo checkpoint' in capsys.readouterr().err


def test_where_a_model_is(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """And nothing else, for a shell to use."""
    monkeypatch.setattr(sys, "argv", ["memlong-vllm", "demo", "--path", "--model", str(model)])
    assert main.main() == 0
    assert capsys.readouterr().out == f"{model}\n"


def test_a_plan_of_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["memlong-vllm", "plan", "--context", "8192", "--model", "demo"])
    assert main.main() == 0
    assert capsys.readouterr().out.startswith("demo: 0.13 billion parameters")
