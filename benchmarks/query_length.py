"""How often the retriever finds the chunk that a question asks for, by the length of the query.

    python benchmarks/query_length.py --texts 'novels/valid/*.txt' --output benchmarks/results/query_length.json

Pass keys and house numbers are put into pages of a novel and asked for on other pages. The query is
the end of such a prompt; the needle's chunks compete with those of the novel's first ``--lengths``
tokens, which the prompts have no part in. Only the demo's tokenizer and retriever are used.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from result_file import write_result
from transformers import AutoTokenizer

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo_model import demo_checkpoint
from memlong_vllm.recall_material import MULTIKEY, PASSKEY, Prose, recall_prompt, sentence_breaks
from memlong_vllm.retriever.embedder import load_embedder
from memlong_vllm.training.documents import find_texts

PAGES = 20_000  # Tokens behind the longest length that prompts are made of.


class Vectors:
    """Embeddings of token spans, each made once."""

    def __init__(self, checkpoint: Path) -> None:
        config = MemLongConfig.from_pretrained(checkpoint)
        self.chunk_size = config.memory.chunk_size
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, config=config)
        self._embedder = load_embedder(config.memory.retriever, str(checkpoint), "cpu")
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def of(self, token_ids: Sequence[int]) -> np.ndarray:
        """[dimension], L2-normalised."""
        key = tuple(token_ids)
        if key not in self._known:
            text = self.tokenizer.decode(key, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._known[key] = self._embedder.embed([text])[0]
        return self._known[key]

    def of_chunks(self, token_ids: Sequence[int]) -> np.ndarray:
        """[chunks, dimension], of the complete ones."""
        size = self.chunk_size
        starts = range(0, len(token_ids) - size + 1, size)
        return np.stack([self.of(token_ids[start : start + size]) for start in starts])


def measure(
    vectors: Vectors, text: list[int], kind: str, trials: int, lengths: list[int], queries: list[int]
) -> list[dict[str, Any]]:
    """A row a trial, length and query: how many other chunks score higher than the needle's."""
    chunks, size, rows = vectors.of_chunks(text[: max(lengths)]), vectors.chunk_size, []
    prose = Prose(text[max(lengths) :], sentence_breaks(text, lambda token: vectors.tokenizer.decode([token])))
    for trial in range(trials):
        draw = random.Random(f"{kind} {trial}")
        prompt = recall_prompt(kind, vectors.encode, prose, 12 * size, draw.random(), draw, min_distance=2 * size)
        start, end = prompt.needle
        own = np.stack([vectors.of(prompt.token_ids[n * size : (n + 1) * size])
                        for n in range(start // size, (end - 1) // size + 1)])  # fmt: skip
        for query in queries:
            asked = vectors.of(prompt.token_ids[-query:])
            best = float((own @ asked).max())
            for length in lengths:
                rank = int((chunks[: length // size] @ asked > best).sum())
                rows.append({"kind": kind, "trial": trial, "length": length, "query_tokens": query, "rank": rank})
    return rows


def summarise(rows: list[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    """Shares of needles among the ``top_k`` best."""
    cells = sorted({(row["kind"], row["length"], row["query_tokens"]) for row in rows})
    table = []
    for kind, length, query in cells:
        cell = {"kind": kind, "length": length, "query_tokens": query}
        ranks = [row["rank"] for row in rows if row.items() >= cell.items()]
        table.append(cell | {"found": round(sum(rank < top_k for rank in ranks) / len(ranks), 3), "of": len(ranks)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True, metavar="GLOB")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 24, 32, 48, 64, 128])
    parser.add_argument("--trials", type=int, default=30, help="of a text and kind")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    vectors, rows = Vectors(demo_checkpoint()), []
    for path in find_texts(arguments.texts):
        text = vectors.encode(path.read_text(encoding="utf-8"))[: max(arguments.lengths) + PAGES]
        for kind in (PASSKEY, MULTIKEY):
            found = measure(vectors, text, kind, arguments.trials, arguments.lengths, arguments.queries)
            rows += [{"text": path.name} | row for row in found]
    settings = {name: getattr(arguments, name) for name in ("lengths", "queries", "trials", "top_k")}
    write_result(arguments.output, settings, rows, summarise(rows, arguments.top_k))


if __name__ == "__main__":
    main()
