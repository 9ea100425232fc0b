"""Engines in processes of their own, asked by a benchmark.

All processes are forked from one that has imported vLLM (``multiprocessing``'s fork server), so
that an engine starts in the time its weights take.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

# Imported once, by a process that must have no OpenMP threads when an engine's is forked off: their
# pool would be the child's as well, and it would wait for them for ever.
PRELOADED = ("vllm.entrypoints.llm", "memlong_vllm.model")
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


class EngineError(RuntimeError):
    """An engine cannot be started, or cannot do what it was asked. The message says why."""


class LoadedEngine(Protocol):
    """What a process serves."""

    def describe(self) -> dict[str, Any]:
        """Facts about the engine that was loaded, for the results file."""
        ...

    def answer(self, **request: Any) -> dict[str, Any]:
        """One measurement."""
        ...


Loader = Callable[[Path, dict[str, Any]], LoadedEngine]
"""(model, settings) -> the engine; a function of a module, called in the new process."""


# Of anything that an engine is asked: one that takes longer hangs.
ANSWER_S = 4 * 3600.0


class EngineProcess:
    """One engine; measures on request.

    Attributes:
        facts: what the engine says about itself (:meth:`LoadedEngine.describe`).

    Raises:
        EngineError: if the engine does not start.
    """

    def __init__(self, load: Loader, model: Path, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        num_threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        with _environment(ENVIRONMENT | {"OMP_NUM_THREADS": "1"}):
            forkserver.ensure_running()
        self._connection, theirs = context.Pipe()
        # A daemon: it ends with the benchmark, however that ends.
        self._process = context.Process(target=_serve, args=(theirs, num_threads, load, model, settings), daemon=True)
        self._process.start()
        theirs.close()
        self.facts = self._receive()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have one measurement made. Blocks, so that engines take turns.

        Raises:
            EngineError: if it fails, or the process ended.
        """
        try:
            self._connection.send(request)
        except OSError as error:
            raise EngineError("the engine's process ended; its messages are above") from error
        return self._receive()

    def peak_rss_bytes(self) -> int:
        """The most of the machine's memory that the process had at once, so far."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def stop(self) -> None:
        with suppress(OSError):  # It may have ended.
            self._connection.send(None)
            self._process.join(60)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> dict[str, Any]:
        try:
            if not self._connection.poll(ANSWER_S):
                raise EngineError(f"the engine did not answer within {ANSWER_S:,.0f} s")
            reply: dict[str, Any] = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            status = self._process.exitcode
            raise EngineError(f"the engine's process ended (exit status {status}); its messages are above") from error
        if "failed" in reply:
            raise EngineError(reply["failed"])
        return reply


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, num_threads: int, load: Loader, model: Path, settings: dict[str, Any]) -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    try:
        engine = load(model, settings)
        connection.send(engine.describe())
        while (request := connection.recv()) is not None:
            connection.send(engine.answer(**request))
    except EOFError:  # The benchmark ended.
        pass
    except Exception as error:  # noqa: BLE001 (whatever it is, the benchmark records it as the reason)
        traceback.print_exc()
        connection.send({"failed": _reason(error)})
    # An engine's threads must not keep its process.
    os._exit(0)


def _reason(error: Exception) -> str:
    """What an error says, without the object that pydantic prints after it."""
    errors = getattr(error, "errors", None)
    text = "; ".join(entry["msg"] for entry in errors()) if callable(errors) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split())[:600]
