"""``memlong-vllm memory``: in a folder of memories, and over the HTTP routes of a library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from memlong_vllm.cli import main as console
from memlong_vllm.endpoints.tenants import HeaderTenants, KeyTenants, Tenancy
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder, tenant_salt
from tests.endpoints_app import make_app
from tests.memory_files import FORMAT, PLENTY, append, read

Serve = Callable[..., str]


@pytest.fixture
def library(tmp_path: Path) -> Iterator[MemoryLibrary]:
    with MemoryLibrary(tmp_path / "memories", FORMAT, PLENTY) as opened:
        append(opened, "notes", 1, 2, 3)
        append(opened, "notes", 4)
        append(opened, "book", 5, tenant=tenant_folder("salt"))
        append(opened, "plan", 6, tenant=tenant_folder(tenant_salt("alice")))
        yield opened


@pytest.fixture
def serve(library: MemoryLibrary) -> Iterator[Serve]:
    """Starts our routes over the library on a port of this machine; returns the URL."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(tenancy: Tenancy | None = None) -> str:
        app = make_app(library, tenancy=tenancy, memory_dir=library._root)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``memlong-vllm memory``; returns the exit status and what went to the two outputs."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["memlong-vllm", "memory", *map(str, arguments)])
        try:
            status = console.main()
        except SystemExit as end:
            status = int(str(end.code))
        return status, *capsys.readouterr()

    return run


def test_a_folder_while_an_engine_uses_it(library: MemoryLibrary, command: Any, tmp_path: Path) -> None:
    here = ("--memory-dir", library._root)
    status, table, _ = command("list", *here)
    assert status == 0
    assert [line.split()[:3] for line in table.splitlines()] == [["NAME", "CHUNKS", "TOKENS"], ["notes", "4", "16"]]
    (entry,) = json.loads(command("list", *here, "--json", "--cache-salt", "salt")[1])
    assert (entry["name"], entry["num_chunks"]) == ("book", 1)
    assert "plan" in command("list", *here, "--tenant", "alice")[1]
    status, text, _ = command("show", "notes", *here)
    assert "parts    3, 1 chunks" in text
    assert "index    Flat" in text
    assert command("export", "notes", tmp_path / "notes.tar", *here)[0] == 0
    library.import_archive("default", "copy", tmp_path / "notes.tar")
    assert read(library, "copy") == (1, 2, 3, 4)
    status, _, error = command("delete", "notes", *here)
    assert status == 1
    assert "in use by another process" in error


def test_a_folder_that_nobody_uses(library: MemoryLibrary, command: Any) -> None:
    here = ("--memory-dir", library._root)
    library.close()
    assert command("delete", "notes", *here) == (0, "notes is deleted\n", "")
    assert command("list", *here)[1].splitlines()[1:] == []
    assert not (library._root / "default" / "notes").exists()
    assert "book" in command("list", *here, "--cache-salt", "salt")[1]


FAILURES = [
    (("show", "none"), "there is no memory named 'none'"),
    (("show", "../x"), "not valid"),
    (("show", "notes", "--cache-salt", "salt"), "there is no memory"),
    (("export", "notes", "/no/such/folder/x.tar"), "cannot be written"),
    (("import", "x", __file__), "--model"),
    (("import", "x", "/no/such/file"), "No such file"),
    (("import", "x", "a.tar", "b.txt"), "alone"),
    (("index", "notes", "Flat"), "--url"),
    (("index", "notes", "Flat", "nprobe"), "name=value"),
    (("list", "--tenant", "a", "--cache-salt", "b"), "exclude"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_what_fails_says_why(library: MemoryLibrary, command: Any, arguments: tuple[str, ...], message: str) -> None:
    status, out, error = command(*arguments, "--memory-dir", library._root)
    assert (status, out) == (1, "")
    assert error.startswith("error: ")
    assert message in error


def test_a_folder_that_is_not_there(command: Any, tmp_path: Path) -> None:
    assert "no such folder" in command("list", "--memory-dir", tmp_path / "none")[2]
    assert command("list")[0] == 2


def test_a_server(library: MemoryLibrary, command: Any, serve: Serve, tmp_path: Path) -> None:
    there = ("--url", serve())
    assert command("list", *there)[1] == command("list", "--memory-dir", library._root)[1]
    assert "parts    3, 1 chunks" in command("show", "notes", *there)[1]
    assert command("export", "notes", tmp_path / "notes.tar", *there)[0] == 0
    assert "copy" in command("import", "copy", tmp_path / "notes.tar", *there, "--cache-salt", "salt")[1]
    assert read(library, "copy", tenant_folder("salt")) == (1, 2, 3, 4)
    shown = json.loads(command("index", "notes", "IVF4,Flat", "nprobe=2", *there, "--json")[1])
    assert shown["index"] == {"factory": "IVF4,Flat", "parameters": {"nprobe": 2}}
    assert command("delete", "notes", *there)[0] == 0
    status, _, error = command("show", "notes", *there)
    assert (status, error) == (1, "error: there is no memory named 'notes'\n")
    assert command("export", "notes", tmp_path / "gone.tar", *there)[0] == 1
    assert sorted(path.name for path in tmp_path.glob("*.tar*")) == ["notes.tar"]
    taken = command("import", "copy", tmp_path / "notes.tar", *there, "--cache-salt", "salt")
    assert "already" in taken[2]


def test_servers_that_tell_tenants_apart(
    library: MemoryLibrary, command: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = serve(KeyTenants({"key-of-alice": "alice"}))
    assert "plan" in command("list", "--url", keyed, "--api-key", "key-of-alice")[1]
    assert "API key" in command("list", "--url", keyed)[2]
    monkeypatch.setenv("MEMLONG_API_KEY", "key-of-alice")
    assert "plan" in command("list", "--url", keyed)[1]
    by_header = serve(HeaderTenants("X-Team"))
    assert "plan" in command("list", "--url", by_header, "--tenant", "alice", "--tenant-header", "X-Team")[1]
    assert "x-team" in command("list", "--url", by_header, "--tenant", "alice")[2]


def test_no_server(command: Any) -> None:
    status, _, error = command("list", "--url", "http://127.0.0.1:9")
    assert status == 1
    assert "127.0.0.1:9" in error
