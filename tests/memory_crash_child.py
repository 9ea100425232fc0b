"""Processes that use a library until they are killed, for the crash tests.

Started as a process of its own, this module imports everything once and then forks: each line of
JSON on its standard input starts a child, whose process id it answers with; when the child has
ended it says so. A child writes what it is about to do and what was done to a log, a line each.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlong_vllm.memories.named_library import MemoryLibrary
from memlong_vllm.memories.pending import PendingWrite
from tests.memory_files import FORMAT, PLENTY, WAIT_S, commit, save_shards

NAMES = ("a", "b", "c")


class Child:
    """Random writes, deletions and imports. Every seed is used once, so any mixture would show."""

    def __init__(self, root: Path, log: Path, seed: int, first: int) -> None:
        self._random = random.Random(seed)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._next = first
        self._archive = log.with_suffix(".tar")
        self._library = MemoryLibrary(root, FORMAT, PLENTY)
        self._loose: PendingWrite | None = None

    def say(self, *line: object) -> None:
        os.write(self._log, (json.dumps(line) + "\n").encode())

    def seeds(self, count: int) -> tuple[int, ...]:
        self._next += count
        return tuple(range(self._next - count, self._next))

    def append(self, *names: str) -> None:
        """At once to several memories, so that a kill meets several writes under way."""
        writes = []
        for name in names:
            seeds = self.seeds(self._random.randint(1, 3))
            self.say("append", name, seeds)
            writes.append(self._library.begin_write("default", name, len(seeds)))
            commit(writes[-1], seeds, self._random.randint(1, 2), self._random.choice((1, 2)))
        assert self._library.flush(WAIT_S)
        for write in writes:
            assert write.error is None, write.error
            self.say("done", write.name)

    def delete(self, name: str) -> None:
        self.say("delete", name, [])
        self._library.delete("default", name)
        self.say("done", name)

    def move(self, source: str, target: str) -> None:
        self._library.export_archive("default", source, self._archive)
        self.say("copy", target, source)
        self._library.import_archive("default", target, self._archive)
        self.say("done", target)

    def step(self) -> None:
        if self._loose is not None:
            self._loose.abandon()
        there = [info.name for info in self._library.names("default")]
        absent = sorted(set(NAMES) - set(there))
        kind = self._random.random()
        if there and kind < 0.25:
            name = self._random.choice(there)
            opened = self._library.open("default", name) if kind < 0.15 else None
            self.delete(name)
            if opened is not None:
                self._library.release(opened)
        elif there and absent and kind < 0.45:
            self.move(self._random.choice(there), absent[0])
        elif there and kind < 0.55:
            self._library.set_index("default", there[0], f"IVF{self._random.randint(1, 99)},Flat", {})
        elif kind < 0.65:
            self._loose = self._library.begin_write("default", self._random.choice(NAMES), 1)
            save_shards(self._loose, (0,), 1, 2)
        else:
            self.append(*self._random.sample(NAMES, self._random.randint(1, 2)))

    def script(self) -> None:
        """One of each, for a kill at every point of it."""
        self.append("a")
        self.append("a", "b")
        self.move("a", "c")
        opened = self._library.open("default", "a")
        self.delete("a")
        self._library.release(opened)
        self._library.set_index("default", "b", "IVF2,Flat", {})
        self.delete("c")
        self.append("a")


def kill_at(number: int) -> None:
    """Die at the ``number``-th change of the file system, before or after it in turn."""
    calls = itertools.count(1)  # Of two threads.

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_last = next(calls) == number
            if is_last and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def run(order: dict[str, Any]) -> None:
    if order["kill_at"]:
        kill_at(order["kill_at"])
    child = Child(Path(order["root"]), Path(order["log"]), order["seed"], order["first"])
    if order["kill_at"]:
        child.script()
        return
    while True:
        child.step()


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                run(json.loads(line))
                os._exit(0)
            except BaseException:  # noqa: BLE001 (nothing of the parent may run in the child)
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
