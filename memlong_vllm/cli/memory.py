"""``memlong-vllm memory``: the named memories of a running server, or of a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from memlong_vllm.memories.errors import MemoryLibraryError
from memlong_vllm.memories.names import tenant_salt
from memlong_vllm.named import Memory

API_KEY_VARIABLE = "MEMLONG_API_KEY"
TENANT_HEADER = "X-Tenant"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Memories(Protocol):
    """Where memories are. All methods raise MemoryLibraryError if they fail."""

    def list(self) -> list[Memory]: ...

    def show(self, name: str) -> Memory: ...

    def delete(self, name: str) -> None: ...

    def set_index(self, name: str, factory: str, parameters: dict[str, int]) -> Memory: ...

    def export_archive(self, name: str, target: Path) -> None: ...

    def import_archive(self, name: str, source: Path) -> Memory: ...

    def import_text(self, name: str, text: str) -> Iterator[tuple[int, int]]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="memory_command", required=True)
    _add(commands, "list", run_list, "list memories")
    _add(commands, "show", run_show, "show one memory").add_argument("name")
    _add(commands, "delete", run_delete, "delete a memory").add_argument("name")
    export = _add(commands, "export", run_export, "write a memory to an archive")
    export.add_argument("name")
    export.add_argument("file", type=Path, help="archive to write, for example NAME.tar")
    imported = _add(commands, "import", run_import, "append texts to a memory, or make one of an archive")
    imported.add_argument("name")
    imported.add_argument("files", type=Path, nargs="+", metavar="file", help="text files (UTF-8), or one .tar archive")
    imported.add_argument("--model", metavar="DIR", help="with --memory-dir: checkpoint to compute with, or demo")
    imported.add_argument(
        "--options", type=json.loads, metavar="JSON", help='with --model: of vllm.LLM, such as \'{"dtype": "float32"}\''
    )
    index = _add(commands, "index", run_index, "choose the FAISS index that a memory is searched by")
    index.add_argument("name")
    index.add_argument("factory", help="for example Flat, IVF256,Flat or HNSW32")
    index.add_argument("parameters", nargs="*", metavar="name=value", help="for example nprobe=16")


def _add(commands: Any, name: str, run_it: Callable[..., None], description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(run_memory=run_it, model=None, options=None)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--url", help="of a running server, for example http://localhost:8000")
    place.add_argument("--memory-dir", type=Path, metavar="DIR", help="folder of memories, without a server")
    parser.add_argument(
        "--api-key", default=os.environ.get(API_KEY_VARIABLE), help=f"of the server; by default ${API_KEY_VARIABLE}"
    )
    parser.add_argument("--tenant", help="where tenants are told apart by a header or, in a folder, at all")
    parser.add_argument("--tenant-header", default=TENANT_HEADER, help=f"the server's; by default {TENANT_HEADER}")
    parser.add_argument("--cache-salt", help="where clients choose their salts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(arguments: argparse.Namespace) -> int:
    try:
        with open_memories(arguments) as memories:
            arguments.run_memory(memories, arguments)
    except (MemoryLibraryError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def open_memories(arguments: argparse.Namespace) -> AbstractContextManager[Memories]:
    """Where the arguments say that memories are."""
    if arguments.tenant is not None and arguments.cache_salt is not None:
        raise MemoryLibraryError("--tenant and --cache-salt exclude each other")
    if arguments.memory_dir is not None:
        from memlong_vllm.cli.memory_folder import FolderMemories

        salt = arguments.cache_salt if arguments.tenant is None else tenant_salt(arguments.tenant)
        model = None if arguments.model is None else located(arguments.model)
        return FolderMemories(arguments.memory_dir, salt, model, arguments.options or {})
    from memlong_vllm.cli.memory_server import ServerMemories

    if arguments.model is not None:
        raise MemoryLibraryError("--model is for --memory-dir: a server has its model")
    headers = {} if arguments.api_key is None else {"Authorization": f"Bearer {arguments.api_key}"}
    if arguments.tenant is not None:
        headers[arguments.tenant_header] = arguments.tenant
    return ServerMemories(arguments.url, headers, arguments.cache_salt)


def located(model: str) -> str:
    """The folder that ``--model`` stands for."""
    from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model

    try:
        return str(resolve_model(model))
    except ModelArgumentError as error:
        raise MemoryLibraryError(f"--model {error}") from error


def run_list(memories: Memories, arguments: argparse.Namespace) -> None:
    found = memories.list()
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print_table(found)


def run_show(memories: Memories, arguments: argparse.Namespace) -> None:
    print_memory(memories.show(arguments.name), arguments.json)


def run_delete(memories: Memories, arguments: argparse.Namespace) -> None:
    memories.delete(arguments.name)
    if arguments.json:
        print(json.dumps({"name": arguments.name, "deleted": True}))
    else:
        print(f"{arguments.name} is deleted")


def run_export(memories: Memories, arguments: argparse.Namespace) -> None:
    memories.export_archive(arguments.name, arguments.file)
    num_bytes = arguments.file.stat().st_size
    if arguments.json:
        print(json.dumps({"name": arguments.name, "file": str(arguments.file), "num_bytes": num_bytes}))
    else:
        print(f"{arguments.file}: {readable(num_bytes)}")


def run_import(memories: Memories, arguments: argparse.Namespace) -> None:
    archives = [file for file in arguments.files if file.suffix == ".tar"]
    if archives and len(arguments.files) > 1:
        raise MemoryLibraryError("an archive is imported alone: it makes a new memory")
    texts = [] if archives else [(file, file.read_text(encoding="utf-8")) for file in arguments.files]
    for file in archives:
        memories.import_archive(arguments.name, file)
    for file, text in texts:
        for sent, total in memories.import_text(arguments.name, text):
            print(f"{file}: {sent:,} of {total:,} tokens", file=sys.stderr)
    print_memory(memories.show(arguments.name), arguments.json)


def run_index(memories: Memories, arguments: argparse.Namespace) -> None:
    pairs = [pair.partition("=") for pair in arguments.parameters]
    if not all(name and value.isdecimal() for name, _, value in pairs):
        raise MemoryLibraryError("parameters are name=value, values whole numbers")
    parameters = {name: int(value) for name, _, value in pairs}
    print_memory(memories.set_index(arguments.name, arguments.factory, parameters), arguments.json)


def print_table(memories: list[Memory]) -> None:
    rows = [("NAME", "CHUNKS", "TOKENS", "SIZE", "UPDATED", "")]
    for memory in memories:
        counts = [f"{memory[name]:,}" for name in ("num_chunks", "num_tokens")]
        rows.append(
            (memory["name"], *counts, readable(memory["num_bytes"]), date(memory["updated"]), memory["error"] or "")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{row[i]:>{widths[i]}}" for i in range(1, 5)), row[5]]
        print("  ".join(cells).rstrip())


def print_memory(memory: Memory, as_json: bool) -> None:
    if as_json:
        print(json.dumps(memory, indent=1))
        return
    print_table([memory])
    if "parts" not in memory:
        return
    parts = ", ".join(f"{part['num_chunks']:,}" for part in memory["parts"])
    settings = "".join(f" {name}={value}" for name, value in memory["index"]["parameters"].items())
    print(f"created  {date(memory['created'])}")
    print(f"index    {memory['index']['factory']}{settings}")
    print(f"parts    {parts} chunks")
    print(f"made by  model {memory['format']['model_fingerprint'][:16]}…, {memory['format']['dtype']}")


def readable(num_bytes: float) -> str:
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} {_UNITS[-1]}"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"
