"""Processes killed while they write: every memory is as before or as after each operation."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memlong_vllm.memories.named_library import MemoryLibrary
from tests.memory_files import FORMAT, PLENTY, WAIT_S, files_expected, files_under, opened, seeds_in

NUM_KILLS = 36
MAX_KILL_POINTS = 250
State = dict[str, tuple[int, ...]]


class Nursery:
    """Forks children that are to be killed, from a process that has imported all they need."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.memory_crash_child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, **order: Any) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """The exit code of the child that was started last, once it has ended."""
        return self._answer()

    def close(self) -> None:
        self._process.kill()  # Ending in order takes Python seconds.
        self._process.wait(WAIT_S)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def possible(before: State, log: Path) -> tuple[State, State]:
    """The state after all that was done, and the other one of names that something was begun for."""
    certain, begun = dict(before), State()
    for line in log.read_text().splitlines() if log.exists() else []:
        kind, name, *rest = json.loads(line)
        if kind == "append":
            begun[name] = certain.get(name, ()) + tuple(rest[0])
        elif kind == "delete":
            begun[name] = ()
        elif kind == "copy":
            begun[name] = certain[rest[0]]
        else:
            certain[name] = begun.pop(name)
    return {name: seeds for name, seeds in certain.items() if seeds}, begun


def found_in(root: Path) -> State:
    """All memories, read in full; nothing else is on the disk."""
    with MemoryLibrary(root, FORMAT, PLENTY) as library:
        state: State = {}
        for info in library.names("default"):
            assert info.error is None
            memory = opened(library, info.name)
            state[info.name] = seeds_in(memory)
            library.release(memory)
        assert files_under(root) == files_expected(library, root)
        folders = {path.name for path in (root / "default").glob("*")}
        assert folders == set(state)
    return state


def check(before: State, log: Path, root: Path) -> tuple[State, int]:
    """Returns the state found, and how many operations had taken effect without having been told."""
    certain, begun = possible(before, log)
    found = found_in(root)
    num_untold = 0
    for name in certain.keys() | begun.keys() | found.keys():
        old = certain.get(name, ())
        allowed = [old, begun.get(name, old)]
        assert found.get(name, ()) in allowed
        num_untold += found.get(name, ()) != old
    return found, num_untold


def wait_for_lines(log: Path, number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while number and not (log.exists() and log.read_text().count("\n") >= number):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_kills_at_random_moments(nursery: Nursery, tmp_path: Path) -> None:
    clock, state, num_done, num_begun = random.Random(7), State(), 0, 0
    for i in range(NUM_KILLS):
        log = tmp_path / f"log{i}"
        first = 1 + i * 100_000
        pid = nursery.start(root=str(tmp_path / "m"), log=str(log), seed=i, first=first, kill_at=0)
        # So much is done on any machine; the pause puts the kill anywhere within an operation.
        wait_for_lines(log, clock.randrange(1, 16) if i % 4 else 0)
        time.sleep(clock.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        num_done += log.read_text().count("done") if log.exists() else 0
        num_begun += len(possible(state, log)[1])
        state, _ = check(state, log, tmp_path / "m")
    # The kills met what they should meet.
    assert num_done > NUM_KILLS
    assert num_begun > NUM_KILLS // 4


def test_a_kill_at_every_change_of_the_file_system(nursery: Nursery, tmp_path: Path) -> None:
    outcomes = []
    for number in range(1, MAX_KILL_POINTS):  # Odd: before the change, even: after it.
        root, log = tmp_path / f"m{number}", tmp_path / f"log{number}"
        nursery.start(root=str(root), log=str(log), seed=0, first=1, kill_at=number)
        exit_code = nursery.wait()
        assert exit_code in (0, -signal.SIGKILL)
        _, num_untold = check({}, log, root)
        if exit_code == 0:
            break
        outcomes.append(num_untold)
    else:
        pytest.fail("the script does not end")
    assert len(outcomes) > 80
    assert 0 < outcomes.count(1) < len(outcomes)
