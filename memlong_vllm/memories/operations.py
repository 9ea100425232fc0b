"""What can be asked of an engine's library from another process, in plain values.

Questions are answered at once. What touches the disk is started on a thread, so that the engine
goes on, and answered with a ticket: ``poll`` says how it went.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlong_vllm.memories.catalogue import MemoryInfo
from memlong_vllm.memories.errors import MemoryLibraryError, UnknownMemoryError
from memlong_vllm.memories.index_settings import IndexSettingsError, check_index_settings
from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.tickets import Work

Arguments = dict[str, Any]
Answer = dict[str, Any]

# Each is looked up while the engine waits.
_MOST_NAMES = 1000


class OperationError(MemoryLibraryError):
    """An operation is unknown or an argument of it is missing or of another type."""


def perform(library: MemoryLibrary, operation: str, arguments: Arguments) -> Answer:
    """Do what is asked; never raises.

    ====================  =============================================  ===========================
    operation             arguments                                      answer
    ====================  =============================================  ===========================
    ``list``              tenant                                         memories, chunk_size
    ``show``              tenant, name                                   the memory and its parts
    ``missing``           tenant, names                                  names that nothing has
    ``delete``            tenant, name                                   ticket; then name
    ``set_index``         tenant, name, factory, parameters              ticket; then the memory
    ``import_archive``    tenant, name, path (on the engine's machine)   ticket; then the memory
    ``poll``              ticket                                         done; if so, result
    ====================  =============================================  ===========================

    ``tenant`` is a folder of :func:`memlong_vllm.memories.names.tenant_folder`.

    Returns:
        Values that JSON has. ``{"error": message, "kind": class of the error}`` if it failed.
    """
    try:
        if operation not in _OPERATIONS:
            raise OperationError(f"no such operation: {operation!r:.60}")
        return _OPERATIONS[operation](library, arguments)
    except MemoryLibraryError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except OSError as error:
        return {"error": f"the disk refuses: {error}", "kind": MemoryLibraryError.__name__}


def _take(arguments: Arguments, name: str, kind: type) -> Any:
    value = arguments.get(name)
    if not isinstance(value, kind):
        raise OperationError(f"{name} must be a {kind.__name__}")
    return value


def _place(arguments: Arguments) -> tuple[str, str]:
    return _take(arguments, "tenant", str), _take(arguments, "name", str)


def _list(library: MemoryLibrary, arguments: Arguments) -> Answer:
    infos = library.names(_take(arguments, "tenant", str))
    made = library.format
    return {"memories": list(map(asdict, infos)), "chunk_size": None if made is None else made.chunk_size}


def _show(library: MemoryLibrary, arguments: Arguments) -> Answer:
    return describe(library, *_place(arguments))


def describe(library: MemoryLibrary, tenant: str, name: str) -> Answer:
    """A memory: the fields of ``MemoryInfo``; whether a write is under way; and if its manifest
    can be read, its index, its parts in the order they were written, and what made it. One that
    is still to be made by a write under way has no chunks.

    Raises:
        UnknownMemoryError: if there is none.
    """
    is_busy = library.is_written(tenant, name)  # Before the rest: what ends now is then seen there.
    try:
        info = library.info(tenant, name)
    except UnknownMemoryError:
        if not is_busy:
            raise
        info = MemoryInfo(name, 0, 0, 0, 0.0, 0.0, None)
    answer = asdict(info) | {"is_busy": is_busy}
    try:
        manifest = library.manifest(tenant, name)
    except MemoryLibraryError:
        return answer  # The info says why.
    made = {key: value for key, value in asdict(manifest.format).items() if key != "probe"}
    parts = [
        {"num_chunks": part.num_chunks, "num_bytes": sum(file.num_bytes for file in part.files())}
        for part in manifest.parts
    ]
    index = {"factory": manifest.index_factory, "parameters": manifest.index_parameters}
    return answer | {"version": manifest.version, "index": index, "parts": parts, "format": made}


def _missing(library: MemoryLibrary, arguments: Arguments) -> Answer:
    tenant, names = _take(arguments, "tenant", str), _take(arguments, "names", list)
    if len(names) > _MOST_NAMES:
        raise OperationError(f"names must be at most {_MOST_NAMES}, not {len(names)}")
    return {"missing": [name for name in names if not library.is_known(tenant, name)]}


def _started(library: MemoryLibrary, work: Work) -> Answer:
    return {"ticket": library.tickets.start(work)}


def _delete(library: MemoryLibrary, arguments: Arguments) -> Answer:
    tenant, name = _place(arguments)

    def delete() -> Answer:
        library.delete(tenant, name)
        return {"name": name}

    return _started(library, delete)


def _set_index(library: MemoryLibrary, arguments: Arguments) -> Answer:
    tenant, name = _place(arguments)
    factory, parameters = _take(arguments, "factory", str), _take(arguments, "parameters", dict)

    def set_index() -> Answer:
        _check_index(factory, parameters, library.manifest(tenant, name).format.dimension)
        library.set_index(tenant, name, factory, parameters)
        return describe(library, tenant, name)

    return _started(library, set_index)


def _check_index(factory: str, parameters: dict[str, Any], dimension: int) -> None:
    from memlong_vllm.memories.index import IndexFactoryError, validate_factory

    check_index_settings(factory, parameters)
    try:
        validate_factory(factory, parameters, dimension)
    except IndexFactoryError as error:
        raise IndexSettingsError(str(error)) from error


def _import_archive(library: MemoryLibrary, arguments: Arguments) -> Answer:
    tenant, name = _place(arguments)
    path = Path(_take(arguments, "path", str))

    def import_archive() -> Answer:
        library.import_archive(tenant, name, path)
        return describe(library, tenant, name)

    return _started(library, import_archive)


def _poll(library: MemoryLibrary, arguments: Arguments) -> Answer:
    result = library.tickets.take_result(_take(arguments, "ticket", str))
    return {"done": False} if result is None else {"done": True, "result": result}


_OPERATIONS: dict[str, Callable[[MemoryLibrary, Arguments], Answer]] = {
    "list": _list,
    "show": _show,
    "missing": _missing,
    "delete": _delete,
    "set_index": _set_index,
    "import_archive": _import_archive,
    "poll": _poll,
}
