"""What other processes ask of an engine's library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.memories import named_library as library_module
from memlong_vllm.memories import tickets
from memlong_vllm.memories.errors import MemoryLibraryBusyError, MemoryLibraryError
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.operations import perform
from memlong_vllm.memories.quota import Quota
from tests.memory_files import FORMAT, PLENTY, TAU, WAIT_S, append, read

OTHER = tenant_folder("another salt")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        yield opened


def ask(library: MemoryLibrary, operation: str, **arguments: Any) -> dict[str, Any]:
    """The final answer, having gone through JSON as between processes."""
    answer = json.loads(json.dumps(perform(library, operation, arguments)))
    deadline = time.monotonic() + WAIT_S
    while "ticket" in answer and time.monotonic() < deadline:
        state = json.loads(json.dumps(perform(library, "poll", {"ticket": answer["ticket"]})))
        if state.get("done") is not False:
            return state.get("result", state)
        time.sleep(0.005)
    return answer


def test_list_and_show(library: MemoryLibrary) -> None:
    assert ask(library, "list", tenant="default") == {"memories": [], "chunk_size": TAU}
    append(library, "a", 1, 2, 3)
    append(library, "a", 4)
    append(library, "b", 5, tenant=OTHER)
    (entry,) = ask(library, "list", tenant="default")["memories"]
    assert (entry["name"], entry["num_chunks"], entry["num_tokens"], entry["error"]) == ("a", 4, 4 * TAU, None)
    shown = ask(library, "show", tenant="default", name="a")
    assert entry.items() <= shown.items()
    assert [part["num_chunks"] for part in shown["parts"]] == [3, 1]
    assert sum(part["num_bytes"] for part in shown["parts"]) == shown["num_bytes"]
    assert shown["index"] == {"factory": "Flat", "parameters": {}}
    assert shown["format"]["chunk_size"] == TAU
    assert shown["is_busy"] is False
    assert ask(library, "show", tenant="default", name="b")["kind"] == "UnknownMemoryError"


def test_a_write_under_way_shows(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    write = library.begin_write("default", "a", 1)
    new = library.begin_write("default", "new", 1)
    assert ask(library, "show", tenant="default", name="a")["is_busy"] is True
    shown = ask(library, "show", tenant="default", name="new")
    assert (shown["num_chunks"], shown["is_busy"]) == (0, True)
    assert ask(library, "missing", tenant="default", names=["a", "new", "c"]) == {"missing": ["c"]}
    assert ask(library, "missing", tenant=OTHER, names=["a", "new"]) == {"missing": ["a", "new"]}
    write.abandon()
    new.abandon()
    assert ask(library, "show", tenant="default", name="a")["is_busy"] is False
    assert ask(library, "missing", tenant="default", names=["new"]) == {"missing": ["new"]}
    assert ask(library, "show", tenant="default", name="new")["kind"] == "UnknownMemoryError"


def test_a_damaged_memory_is_shown_with_the_reason(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    (library._root / "default" / "a" / "manifest.json").write_text("{}")
    root = library._root
    library.close()
    with MemoryLibrary(root, FORMAT, PLENTY) as again:
        shown = ask(again, "show", tenant="default", name="a")
        assert "manifest.json" in shown["error"]
        assert "kind" not in shown
        assert ask(again, "delete", tenant="default", name="a") == {"name": "a"}


def test_delete(library: MemoryLibrary) -> None:
    append(library, "a", 1)
    assert ask(library, "delete", tenant=OTHER, name="a")["kind"] == "UnknownMemoryError"
    assert ask(library, "delete", tenant="default", name="a") == {"name": "a"}
    assert ask(library, "delete", tenant="default", name="a")["kind"] == "UnknownMemoryError"
    assert ask(library, "list", tenant="default")["memories"] == []


def test_import(library: MemoryLibrary, tmp_path: Path) -> None:
    append(library, "a", 1, 2)
    library.export_archive("default", "a", tmp_path / "a.tar")
    shown = ask(library, "import_archive", tenant=OTHER, name="b", path=str(tmp_path / "a.tar"))
    assert (shown["name"], shown["num_chunks"]) == ("b", 2)
    assert read(library, "b", OTHER) == (1, 2)
    again = ask(library, "import_archive", tenant=OTHER, name="b", path=str(tmp_path / "a.tar"))
    assert again["kind"] == "MemoryExistsError"
    missing = ask(library, "import_archive", tenant=OTHER, name="c", path=str(tmp_path / "none.tar"))
    assert missing["kind"] == "MemoryLibraryError"
    (tmp_path / "bad.tar").write_bytes(b"no archive" * 1000)
    bad = ask(library, "import_archive", tenant=OTHER, name="c", path=str(tmp_path / "bad.tar"))
    assert bad["kind"] == "MemoryDamagedError"


def test_quota(library: MemoryLibrary, tmp_path: Path) -> None:
    append(library, "a", 1, 2)
    library.export_archive("default", "a", tmp_path / "a.tar")
    with MemoryLibrary(tmp_path / "small", FORMAT, Quota(max_bytes=10, max_names=1)) as small:
        answer = ask(small, "import_archive", tenant="default", name="a", path=str(tmp_path / "a.tar"))
    assert answer["kind"] == "QuotaExceededError"


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF4,SQ8", "HNSW16", "SQ8", "PQ3x4"])
def test_set_index(library: MemoryLibrary, factory: str) -> None:
    append(library, "a", 1)
    shown = ask(library, "set_index", tenant="default", name="a", factory=factory, parameters={})
    assert shown["index"] == {"factory": factory, "parameters": {}}


BAD_INDEXES = [
    ("IVF9999999999,Flat", {}),
    ("PQ3x24", {}),
    ("IVF16,Flat\n", {}),
    ("RCQ16x16", {}),
    ("", {}),
    ("IVF16,Flat", {"nprobe": "many"}),
    ("IVF16,Flat", {"no_such": 1}),
    ("Flat", {"nprobe": 1}),
    ("HNSW32", {"efSearch": 1 << 30}),  # Allocated by every search.
    ("HNSW32", {"efConstruction": 64}),
    ("PQ1x4", {"ht": 1}),  # Searches would fail.
    ("IVF16,Flat", {"nprobe": True}),
    ("PQ2", {}),  # Three dimensions.
]


@pytest.mark.parametrize(("factory", "parameters"), BAD_INDEXES)
def test_indexes_that_faiss_cannot_build_or_that_take_too_much(
    library: MemoryLibrary, factory: str, parameters: dict[str, Any]
) -> None:
    append(library, "a", 1)
    answer = ask(library, "set_index", tenant="default", name="a", factory=factory, parameters=parameters)
    assert answer["kind"] == "IndexSettingsError"
    assert ask(library, "show", tenant="default", name="a")["index"]["factory"] == "Flat"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {}, "OperationError"),
    ("list", {}, "OperationError"),
    ("list", {"tenant": "../x"}, "MemoryNameError"),
    ("show", {"tenant": "default"}, "OperationError"),
    ("show", {"tenant": "default", "name": "../a"}, "MemoryNameError"),
    ("show", {"tenant": "default", "name": ["a"]}, "OperationError"),
    ("missing", {"tenant": "default", "names": [["a"]]}, "MemoryNameError"),
    ("missing", {"tenant": "default", "names": ["a"] * 1001}, "OperationError"),
    ("set_index", {"tenant": "default", "name": "a", "factory": 1, "parameters": {}}, "OperationError"),
    ("set_index", {"tenant": "default", "name": "a", "factory": "Flat", "parameters": {}}, "UnknownMemoryError"),
    ("import_archive", {"tenant": "default", "name": "a", "path": 3}, "OperationError"),
    ("poll", {"ticket": "none"}, "MemoryLibraryError"),
]


@pytest.mark.parametrize(("operation", "arguments", "kind"), WRONG)
def test_wrong_arguments_are_answered(
    library: MemoryLibrary, operation: str, arguments: dict[str, Any], kind: str
) -> None:
    assert ask(library, operation, **arguments)["kind"] == kind


def test_work_does_not_keep_its_caller_waiting(library: MemoryLibrary) -> None:
    go = threading.Event()
    ticket = library.tickets.start(lambda: {"went": go.wait(WAIT_S)})
    assert perform(library, "poll", {"ticket": ticket}) == {"done": False}
    go.set()
    deadline = time.monotonic() + WAIT_S
    while not (state := perform(library, "poll", {"ticket": ticket}))["done"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert state == {"done": True, "result": {"went": True}}
    assert perform(library, "poll", {"ticket": ticket})["error"] == "no such ticket"


def test_too_much_work_at_once_is_refused(library: MemoryLibrary) -> None:
    go = threading.Event()
    for _ in range(tickets.MAX_RUNNING):
        library.tickets.start(lambda: {"went": go.wait(WAIT_S)})
    with pytest.raises(MemoryLibraryBusyError):
        library.tickets.start(dict)
    go.set()
    assert library.tickets.stop(WAIT_S)
    with pytest.raises(MemoryLibraryError, match="closed"):
        library.tickets.start(dict)


def test_a_thread_that_cannot_start_leaves_nothing(library: MemoryLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(tickets.MAX_RUNNING + 1):
            answer = perform(library, "delete", {"tenant": "default", "name": "a"})
            assert (answer["kind"], "can't start" in answer["error"]) == ("MemoryLibraryBusyError", True)
    assert ask(library, "delete", tenant="default", name="a")["kind"] == "UnknownMemoryError"
    assert library.tickets.stop(WAIT_S)


def test_a_failure_nobody_foresaw_is_told(library: MemoryLibrary) -> None:
    ticket = library.tickets.start(lambda: {"x": 1 // 0})
    assert library.tickets.stop(WAIT_S)
    answer = perform(library, "poll", {"ticket": ticket})
    assert "ZeroDivisionError" in answer["error"]


def test_the_library_is_not_given_to_others_while_work_goes_on(
    library: MemoryLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "CLOSE_TIMEOUT_S", 0.05)
    go = threading.Event()
    library.tickets.start(lambda: {"went": go.wait(WAIT_S)})
    library.close()
    with pytest.raises(MemoryLibraryBusyError):
        MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY)
    go.set()
