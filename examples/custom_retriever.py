"""Retrieve with an embedder of your own: here hashed character n-grams, without any model.

    python examples/custom_retriever.py [CHECKPOINT]

The setting names it ``"module:Class"``; the module must be importable by the engine. This file's
folder is on the path when it is run as a script. For a server:

    PYTHONPATH=examples vllm serve CHECKPOINT --trust-remote-code \\
        --additional-config '{"memlong": {"retriever": {"model": "custom_retriever:HashingEmbedder"}}}'
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from memlong_vllm.config import RetrieverConfig

NOVEL = Path(__file__).parent / "data" / "doyle_lost_world.txt"
QUESTION = "\n\nThe news editor McArdle of the Gazette says that Professor Challenger"


class HashingEmbedder:
    """Counts of character n-grams in hashed bins, damped by a square root.

    Attributes:
        dimension: bins. A power of two near the number of n-grams in a text collides little.
    """

    dimension = 4096
    lengths = (3, 4, 5)

    def __init__(self, config: RetrieverConfig, device: str) -> None:
        """The protocol's signature (memlong_vllm.retriever.embedder); nothing to load here."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """[len(texts), dimension] float32, L2-normalised; the same text always gives the same vector."""
        vectors = np.stack([self._counts(" ".join(text.lower().split())) for text in texts])
        vectors = np.sqrt(vectors)
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)

    def _counts(self, text: str) -> np.ndarray:
        data = text.encode()
        # crc32 rather than hash(), which differs from process to process.
        bins = [zlib.crc32(data[i : i + n]) % self.dimension for n in self.lengths for i in range(len(data) - n + 1)]
        return np.bincount(bins, minlength=self.dimension)


def main() -> None:
    from vllm import LLM, SamplingParams

    from memlong_vllm.demo_model import demo_checkpoint

    checkpoint = sys.argv[1] if len(sys.argv) > 1 else str(demo_checkpoint())
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        retriever = {"model": "custom_retriever:HashingEmbedder"}
        query = {"query_tokens": 32, "prompt_query_tokens": 32}
        settings = {"retriever": retriever, **query, "top_k": 4, "trace_file": str(trace)}
        llm = LLM(
            model=checkpoint,
            dtype="float32",  # This line and the next two suit a CPU.
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
            additional_config={"memlong": settings},
        )
        prompt = NOVEL.read_text()[:30_000] + QUESTION
        output = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24))[0]
        retrievals = [json.loads(line) for line in trace.read_text().splitlines()]
    found = next(line for line in retrievals if line["kind"] == "prompt_end")
    size = llm.llm_engine.model_config.hf_config.memory.chunk_size
    print(f"{len(retrievals)} retrievals; the last one of the prompt, from {found['eligible']} chunks:")
    for chunk, score in zip(found["chunk_ids"], found["scores"], strict=True):
        passage = llm.get_tokenizer().decode(output.prompt_token_ids[chunk * size : (chunk + 1) * size])
        print(f"  chunk {chunk:2}, score {score:.3f}: {' '.join(passage.split())[:90]} …")
    print(f"continued: {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file.
    main()
