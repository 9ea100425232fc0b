"""Clients of the retriever service, with a real embedder made for tests: hashed bags of words."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from memlong_vllm.retriever.service import RetrieverService, Span

DIMENSION = 16
DEADLINE_S = 20.0


class BagOfWords:
    """Embeds a text as the normalised counts of its words, hashed to 16 places.

    A call waits while ``gate`` is closed. Texts with the word ``BAD`` raise, those with ``EXIT``
    end the thread, those with ``NAN`` have a vector that is not finite, those with ``WIDE`` make
    the whole call's shape wrong.

    Attributes:
        calls: the texts of every call; ``threads``: what it was made on.
        entered: set by the first call, also while it waits.
    """

    dimension = DIMENSION

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.threads: list[threading.Thread] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, texts: list[str]) -> np.ndarray:
        self.calls.append(list(texts))
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        if any("BAD" in text for text in texts):
            raise RuntimeError("cannot embed BAD")
        if any("EXIT" in text for text in texts):
            raise SystemExit("over")
        vectors = np.stack([self.vector(text) for text in texts])
        return vectors[:, :-1] if any("WIDE" in text for text in texts) else vectors

    @staticmethod
    def vector(text: str) -> np.ndarray:
        vector = np.zeros(DIMENSION, np.float32)
        for word in text.split():
            vector[zlib.crc32(word.encode()) % DIMENSION] += 1
        return vector * np.nan if "NAN" in text else vector / np.linalg.norm(vector)


WORDS = {-1: "BAD", -2: "NAN", -3: "WIDE", -4: "UNDECODABLE", -5: "EXIT"}


def decode(token_ids: Sequence[int]) -> str:
    """Token 0 is special: it has no text."""
    if -4 in token_ids:
        raise ValueError("no such token")
    return " ".join(WORDS.get(token_id, f"w{token_id}") for token_id in token_ids if token_id)


def text_vector(*token_ids: int) -> np.ndarray:
    return BagOfWords.vector(decode(token_ids))


class Client:
    """A service and what came out of it so far, by request."""

    def __init__(self, **options: object) -> None:
        self.embedder = BagOfWords()
        settings = {"instruction": None, "batch_size": 1, "cache_size": 100, **options}
        self.service = RetrieverService(self.embedder, decode, **settings)  # type: ignore[arg-type]
        self.results: dict[str, dict[Span, np.ndarray]] = {}
        self.failures: dict[str, str] = {}

    def submit(self, request_id: str, *texts: tuple[int, ...], urgent: bool = False) -> None:
        """Texts as token ids; the i-th has the span (i, i + 1)."""
        self.service.submit(request_id, {(i, i + 1): ids for i, ids in enumerate(texts)}, urgent)

    def until(self, condition: Callable[[], bool], *request_ids: str) -> None:
        """Collect results of ``request_ids`` until ``condition`` holds; fails at a deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for request_id in request_ids:
                self.results.setdefault(request_id, {}).update(self.service.take_results(request_id))
            self.failures |= self.service.take_failures()
            if condition():
                return
            assert time.monotonic() < deadline, (self.results, self.failures)
            # Returns when something finishes; the bound covers what finished just before the call.
            self.service.wait(0.05)

    def collect(self, **num_spans: int) -> None:
        """Until each request has so many embeddings."""
        self.until(lambda: all(len(self.results[r]) == n for r, n in num_spans.items()), *num_spans)

    def hold(self) -> None:
        """Keep the service busy with a text of nobody, so that what comes next queues up."""
        self.embedder.gate.clear()
        self.submit("nobody", (999,))
        assert self.embedder.entered.wait(DEADLINE_S)

    def release(self) -> None:
        self.embedder.gate.set()

    @property
    def texts_embedded(self) -> list[str]:
        return [text for call in self.embedder.calls for text in call]
