"""Recall, speed and size of corpus indexes over many chunks.

    python benchmarks/corpus_index.py --chunks 1000000 --factories Flat IVF4096,Flat HNSW32 \\
        --texts 'novels/*.txt' --output benchmarks/results/corpus_index_1m.json

The chunks are embeddings of real text, widened to the number asked for (PROCEDURE below says how,
and so does the output). The queries are embeddings of real text that is no part of the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from example_text import DOCUMENT

from memlong_vllm.config import RetrieverConfig
from memlong_vllm.demo_model import demo_checkpoint
from memlong_vllm.memories.index import CorpusIndex
from memlong_vllm.retriever.embedder import load_embedder

K = 8
BATCH = 64
SEED = 0
HELD_OUT = 0.05
NEIGHBOURS = 8
PROCEDURE = (
    "Real: windows of {words} words, evenly spaced over the texts ({spacing:.1f} words apart on average), "
    "embedded with all-MiniLM-L6-v2, rows of length 1. The windows of the last 5% of every text are held "
    "out; queries are evenly spaced among those. The corpus is all other real embeddings ({real}) and as "
    "many synthetic ones as are missing ({synthetic}): a real one a drawn uniformly, one of its 8 nearest "
    "real neighbours b drawn uniformly, t uniform in [0.2, 0.8), then t*a + (1-t)*b + 0.3*g, g Gaussian of "
    "expected length 1, all made length 1 again (NumPy default_rng, seed 0). Recall is against an exact "
    "search of the same corpus."
)


def windows(path: str, words_each: int, number: int) -> tuple[list[str], list[str]]:
    """Evenly spaced windows of a text, those of the corpus and those held out; none is in both."""
    words = Path(path).read_text(encoding="utf-8").split()
    border = int((1 - HELD_OUT) * len(words))
    starts = np.linspace(0, len(words) - words_each, number).astype(int)
    corpus = [start for start in starts if start + words_each <= border]
    held_out = [start for start in starts if start >= border]
    return tuple([" ".join(words[start : start + words_each]) for start in part] for part in (corpus, held_out))


def embed(texts: list[str]) -> np.ndarray:
    """[len(texts), dimension] float32, in the order of ``texts``."""
    checkpoint = demo_checkpoint()
    embedder = load_embedder(RetrieverConfig("retriever", "mean", 256), str(checkpoint), "cpu")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # Batches of like lengths.
    vectors = np.empty((len(texts), embedder.dimension), dtype=np.float32)
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        vectors[rows] = embedder.embed([texts[i] for i in rows])
        if first // BATCH % 100 == 0:
            print(f"embedded {first} of {len(texts)}", flush=True)
    return vectors


def embed_texts(paths: list[str], words_each: int, number: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Embeddings for the corpus and held-out ones, and the mean distance of windows in words."""
    corpus: list[str] = []
    held_out: list[str] = []
    lengths = [len(Path(path).read_text(encoding="utf-8").split()) for path in paths]
    for path, length in zip(paths, lengths, strict=True):
        inside, outside = windows(path, words_each, round(number * length / sum(lengths)))
        corpus += inside
        held_out += outside
    vectors = embed(corpus + held_out)
    return vectors[: len(corpus)], vectors[len(corpus) :], sum(lengths) / number


def widen(real: np.ndarray, number: int) -> np.ndarray:
    """``number`` embeddings, the real ones first; see PROCEDURE."""
    if len(real) >= number:
        return real[:number]
    generator = np.random.default_rng(SEED)
    _, neighbours = faiss.knn(real, real, NEIGHBOURS + 1, metric=faiss.METRIC_INNER_PRODUCT)
    corpus = np.empty((number, real.shape[1]), dtype=np.float32)
    corpus[: len(real)] = real
    for first in range(len(real), number, 65536):
        size = min(65536, number - first)
        a = generator.integers(0, len(real), size)
        b = neighbours[a, generator.integers(1, NEIGHBOURS + 1, size)]
        t = generator.uniform(0.2, 0.8, (size, 1)).astype(np.float32)
        noise = generator.standard_normal((size, real.shape[1]), dtype=np.float32) / np.sqrt(real.shape[1])
        rows = t * real[a] + (1 - t) * real[b] + np.float32(0.3) * noise
        corpus[first : first + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return corpus


def queries_per_s(index: CorpusIndex, queries: np.ndarray, batch: int, repetitions: int) -> dict[str, Any]:
    """Median and range; a repetition takes other queries and about 3 s at most."""
    rates, place = [], 0
    index.search(queries[:1], K)
    for _ in range(repetitions):
        began, count = time.perf_counter(), 0
        while count == 0 or (time.perf_counter() - began < 3 and count < len(queries)):
            rows = np.arange(place, place + batch) % len(queries)
            index.search(queries[rows], K)
            place, count = place + batch, count + batch
        rates.append(count / (time.perf_counter() - began))
    return {"batch": batch, "median": statistics.median(rates), "range": [min(rates), max(rates)]}


def settings_of(factory: str, probes: list[int], efforts: list[int]) -> list[dict[str, int]]:
    if factory.startswith("IVF"):
        return [{"nprobe": value} for value in probes]
    return [{"efSearch": value} for value in efforts] if factory.startswith("HNSW") else [{}]


def measure(
    factory: str, corpus: np.ndarray, queries: np.ndarray, expected: np.ndarray, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Build one index, and search it with each of its settings."""
    began = time.perf_counter()
    index = CorpusIndex(corpus, factory)
    result: dict[str, Any] = {"factory": factory, "is_exact": index.is_exact}
    result["build_s"] = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.write(path)
        del index
        result["index_bytes"] = path.stat().st_size
        result["settings"] = []
        for parameters in settings_of(factory, arguments.nprobe, arguments.ef_search):
            index = CorpusIndex.read(path, corpus, parameters)
            ids, _ = index.search(queries, K)
            hits = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), expected.tolist(), strict=True)]
            rates = [queries_per_s(index, queries, batch, arguments.repetitions) for batch in (1, BATCH)]
            row = {"parameters": parameters, "recall_at_8": float(np.mean(hits)) / K, "queries_per_s": rates}
            result["settings"].append(row)
            print(factory, json.dumps(row), flush=True)
            del index
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384, help="of the embedder; checked")
    parser.add_argument("--factories", nargs="+", default=["Flat", "IVF4096,Flat", "HNSW32"])
    parser.add_argument("--texts", default=str(DOCUMENT), metavar="GLOB", help="UTF-8 texts (default: the example)")
    parser.add_argument("--real", type=int, default=20_000, help="windows to embed")
    parser.add_argument("--words", type=int, default=32, help="words a window")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--ef-search", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    paths = sorted(glob(arguments.texts, recursive=True))
    if not paths:
        sys.exit(f"--texts {arguments.texts}: no such file")
    real, held_out, spacing = embed_texts(paths, arguments.words, arguments.real)
    if real.shape[1] != arguments.dimension:
        sys.exit(f"--dimension {arguments.dimension}: the embedder's is {real.shape[1]}")
    corpus = widen(real, arguments.chunks)
    places = np.linspace(0, len(held_out) - 1, min(arguments.queries, len(held_out))).astype(int)
    queries = held_out[np.unique(places)]
    print(f"{len(real)} real, {len(corpus)} in all, {len(queries)} queries", flush=True)
    expected, scores = CorpusIndex(corpus).search(queries, K)
    synthetic = max(0, len(corpus) - len(real))
    result = {
        "command": " ".join(["python", "benchmarks/corpus_index.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("memlong-vllm", "numpy", "torch", "transformers")}
        | {"faiss": faiss.__version__},
        "machine": {"cores": os.cpu_count(), "faiss_threads": faiss.omp_get_max_threads()},
        "data": {
            "procedure": PROCEDURE.format(
                words=arguments.words, spacing=spacing, real=min(len(real), len(corpus)), synthetic=synthetic
            ),
            "texts": len(paths),
            "chunks": len(corpus),
            "queries": len(queries),
            "mean_score_of_first": float(scores[:, 0].mean()),
            "mean_score_of_eighth": float(scores[:, -1].mean()),
        },
        "indexes": [],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for factory in arguments.factories:
        result["indexes"].append(measure(factory, corpus, queries, expected, arguments))
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
