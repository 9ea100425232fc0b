"""Fixtures: a tiny random model with a real tokenizer and a real embedder, and engines of it."""

from __future__ import annotations

import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # vLLM pins engines to cores: each worker's to one of its own.
    _cores = sorted(os.sched_getaffinity(0))
    _core = _cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_core))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.cli.main import main
from tests.checkpoints import Checkpoints, novel
from tests.engines import Engine, Reference

_unfreeze = gc.unfreeze
# Few tests, minutes each: begun first, so that no worker is left alone with them.
LONGEST = ("test_engine_processes", "test_demo_model", "test_memory_http", "test_server", "test_benchmark_scripts")


def pytest_collection_finish() -> None:
    """Leave modules out of garbage collections: an engine's end takes several, of half a second each with them.

    vLLM would thaw them, and freeze what an engine consists of.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def pytest_unconfigure() -> None:
    _unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def tokens(checkpoints: Checkpoints) -> list[int]:
    """A novel in the checkpoints' tokens."""
    return checkpoints.tokenizer(novel()[3000:200_000])["input_ids"]


@pytest.fixture(scope="session")
def model(checkpoints: Checkpoints) -> Path:
    return checkpoints.memlong()


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines in this process; each is shut down before the next and at the end."""
    running: list[Engine] = []

    def start(model: Path, **options: Any) -> Engine:
        while running:
            running.pop().shutdown()
        running.append(Engine(model, trace_file=tmp_path / f"trace{len(list(tmp_path.iterdir()))}.jsonl", **options))
        return running[0]

    yield start
    while running:
        running.pop().shutdown()


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``memlong-vllm evaluate`` with these words; returns its exit status."""

    def run(*words: Any) -> int:
        monkeypatch.setattr("sys.argv", ["memlong-vllm", "evaluate", *map(str, words)])
        return main()

    return run
