"""The memories in a folder, for ``memlong-vllm memory --memory-dir``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlong_vllm.memories.errors import MemoryLibraryError
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.names import tenant_folder
from memlong_vllm.memories.operations import describe
from memlong_vllm.named import Memory, memorize, perform

_FLUSH_TIMEOUT_S = 60.0


class FolderMemories:
    """Memories on disk, beside a running engine or without one.

    Args:
        folder: the engine's ``memory_dir``.
        cache_salt: whose memories they are.
        model: checkpoint that memories are imported with; only then can they be.
        options: of ``vllm.LLM``, for example ``{"dtype": "float32"}``. Memories fit only engines
            that compute in the same dtype.
    """

    def __init__(self, folder: Path, cache_salt: str | None, model: str | None, options: dict[str, Any]) -> None:
        self._folder, self._salt, self._tenant = folder, cache_salt, tenant_folder(cache_salt)
        self._model, self._options = model, options
        self._llm: Any = None
        if model is None and not folder.is_dir():
            raise MemoryLibraryError(f"{folder}: there is no such folder")

    def __enter__(self) -> FolderMemories:
        return self

    def __exit__(self, *error: object) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()

    def list(self) -> list[Memory]:
        with self._open() as library:
            return [asdict(info) for info in library.names(self._tenant)]

    def show(self, name: str) -> Memory:
        with self._open() as library:
            return describe(library, self._tenant, name)

    def export_archive(self, name: str, target: Path) -> None:
        with self._open() as library:
            library.export_archive(self._tenant, name, target)

    def delete(self, name: str) -> None:
        with MemoryLibrary(self._folder, None, None) as library:
            library.delete(self._tenant, name)
            library.flush(_FLUSH_TIMEOUT_S)

    def set_index(self, name: str, factory: str, parameters: dict[str, int]) -> Memory:
        raise MemoryLibraryError("the index of a memory is set through a running server: give --url")

    def import_archive(self, name: str, source: Path) -> Memory:
        path = str(source.absolute())
        return perform(self._engine(), "import_archive", tenant=self._tenant, name=name, path=path)

    def import_text(self, name: str, text: str) -> Iterator[tuple[int, int]]:
        """Append a text to a memory.

        Yields:
            Tokens computed so far, and of all of them.
        """
        llm = self._engine()
        total = len(llm.get_tokenizer().encode(text))
        yield 0, total
        memorize(llm, name, [text], self._salt)
        yield total, total

    def _open(self) -> MemoryLibrary:
        return MemoryLibrary(self._folder, None, None, read_only=True)

    def _engine(self) -> Any:
        if self._model is None:
            raise MemoryLibraryError("importing computes with the model: give --model DIR, or --url of a server")
        if self._llm is None:
            os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # What is printed may be JSON.
            from vllm import LLM

            # Compiling takes longer than it saves for a few texts.
            options = {"enforce_eager": True, "trust_remote_code": True} | self._options
            additional = options.pop("additional_config", None) or {}
            memlong = (additional.get("memlong") or {}) | {"memory_dir": str(self._folder)}
            self._llm = LLM(model=self._model, additional_config=additional | {"memlong": memlong}, **options)
        return self._llm
