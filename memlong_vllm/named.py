"""Named memories for programs that use ``vllm.LLM`` themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memlong_vllm.memories.errors import MemoryLibraryError, MemoryWriteError, UnknownMemoryError
from memlong_vllm.memories.names import tenant_folder, validate_name

POLL_S = 0.02

Memory = dict[str, Any]
"""Of ``memlong_vllm.memories.operations.describe``."""


def memory_params(
    read: str | Sequence[str] = (),
    write: str | None = None,
    memory_size: int | None = None,
    top_k: int | None = None,
) -> dict[str, Any]:
    """What ``SamplingParams(extra_args=…)``, or ``vllm_xargs`` over HTTP, take.

    Args:
        read: named memories whose chunks join the request's own.
        write: named memory that the request's complete chunks are appended to.
        memory_size: tokens of its own text that the request remembers at most.
        top_k: chunks a retrieval takes at most.

    Raises:
        MemoryNameError: if a name is not valid.
    """
    names = [read] if isinstance(read, str) else list(read)
    for name in [*names, *([] if write is None else [write])]:
        validate_name(name)
    values = {"memory_read": names or None, "memory_write": write, "memory_size": memory_size, "top_k": top_k}
    return {name: value for name, value in values.items() if value is not None}


def memorize(llm: Any, name: str, texts: Iterable[str], cache_salt: str | None = None) -> Memory:
    """Append texts to a memory, or make it. Returns what it is then.

    Only complete chunks are kept: of each text, up to ``chunk_size - 1`` tokens at its end are
    not. A text longer than the model takes at once is cut between chunks, and what follows a cut
    is computed without what precedes it. Texts are computed together; which comes first in the
    memory is not fixed.

    Args:
        llm: a ``vllm.LLM`` of a MemLong checkpoint.
        cache_salt: whose memory it is.

    Raises:
        MemoryWriteError: if a text has no complete chunk, or not everything was written.
        MemoryLibraryError: if the memory cannot be written to.
    """
    tokenizer = llm.get_tokenizer()
    return memorize_tokens(llm, name, [tokenizer.encode(text) for text in texts], cache_salt)


def memorize_tokens(llm: Any, name: str, texts: Iterable[Sequence[int]], cache_salt: str | None = None) -> Memory:
    """:func:`memorize` of texts that are token ids already."""
    from vllm import SamplingParams

    chunk_size = perform(llm, "list", tenant=tenant_folder(cache_salt))["chunk_size"]
    max_model_len = llm.llm_engine.vllm_config.model_config.max_model_len
    pieces = [piece for token_ids in texts for piece in split(token_ids, chunk_size, max_model_len)]
    show = shown(llm, name, cache_salt)
    before = num_chunks(show())
    prompts = [{"prompt_token_ids": piece} | ({"cache_salt": cache_salt} if cache_salt else {}) for piece in pieces]
    parameters = SamplingParams(max_tokens=1, temperature=0, extra_args=memory_params(write=name))
    for output in llm.generate(prompts, parameters, use_tqdm=False):
        completion = output.outputs[0]
        if completion.finish_reason == "error":
            raise MemoryWriteError(f"the memory '{name}' was not written: {completion.stop_reason}")
    return wait_until_written(show, name, before + sum(len(piece) // chunk_size for piece in pieces))


def list_memories(llm: Any, cache_salt: str | None = None) -> list[Memory]:
    """The memories of those who send this salt, by name, as ``MemoryInfo`` describes them."""
    return perform(llm, "list", tenant=tenant_folder(cache_salt))["memories"]


def delete_memory(llm: Any, name: str, cache_salt: str | None = None) -> None:
    """Delete a memory.

    Raises:
        UnknownMemoryError: if there is none.
    """
    perform(llm, "delete", tenant=tenant_folder(cache_salt), name=name)


def perform(llm: Any, operation: str, **arguments: Any) -> dict[str, Any]:
    """An operation of :func:`memlong_vllm.memories.operations.perform`, waited for if it takes time.

    Raises:
        MemoryLibraryError: of the class that the engine raised.
    """
    answer = _ask(llm, operation, arguments)
    while "ticket" in answer:
        time.sleep(POLL_S)
        state = _ask(llm, "poll", {"ticket": answer["ticket"]})
        if state["done"]:
            return state["result"]
    return answer


def _ask(llm: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    client = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        answer = client.call_utility("memlong_memory", operation, arguments)
    else:  # vLLM's client of an engine in this process has no such method.
        answer = client.engine_core.memlong_memory(operation, arguments)
    if "error" in answer and "kind" in answer:
        raise error_of(answer["error"], answer["kind"])
    return answer


def error_of(message: str, kind: str) -> MemoryLibraryError:
    """An error that was told of by the name of its class."""
    classes = {cls.__name__: cls for cls in MemoryLibraryError.__subclasses__()}
    return classes.get(kind, MemoryLibraryError)(message)


def split(token_ids: Sequence[int], chunk_size: int, max_model_len: int) -> list[list[int]]:
    """Cut a text between chunks into prompts that leave room for one token of answer. What is
    less than a chunk at the end is left out.

    Raises:
        MemoryWriteError: if the text has no complete chunk, or none fits.
    """
    longest = (max_model_len - 1) // chunk_size * chunk_size
    kept = len(token_ids) // chunk_size * chunk_size
    if not longest or not kept:
        raise MemoryWriteError(f"a text of {len(token_ids)} tokens has no complete chunk ({chunk_size} tokens)")
    return [list(token_ids[start : min(start + longest, kept)]) for start in range(0, kept, longest)]


def shown(llm: Any, name: str, cache_salt: str | None) -> Callable[[], Memory | None]:
    """A function that asks for a memory; None while there is no such."""

    def show() -> Memory | None:
        try:
            return perform(llm, "show", tenant=tenant_folder(cache_salt), name=name)
        except UnknownMemoryError:
            return None

    return show


def num_chunks(memory: Memory | None) -> int:
    return 0 if memory is None else memory["num_chunks"]


def wait_until_written(show: Callable[[], Memory | None], name: str, expected: int) -> Memory:
    """Wait until a memory has ``expected`` chunks.

    Raises:
        MemoryWriteError: if nothing is being written any more and it has less.
    """
    while True:
        memory = show()
        if memory is not None and memory["num_chunks"] >= expected:
            return memory
        if memory is None or not memory["is_busy"]:
            found = f"it has {num_chunks(memory)} chunks instead of {expected}"
            raise MemoryWriteError(f"the memory '{name}' was not written completely: {found}")
        time.sleep(POLL_S)
