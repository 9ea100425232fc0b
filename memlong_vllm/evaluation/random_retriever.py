"""The random-retrieval control: chunks are chosen by chance, and all else is as with a retriever."""

from __future__ import annotations

import hashlib

import numpy as np

from memlong_vllm.config import RetrieverConfig


class RandomEmbedder:
    """A vector drawn for each text, the same in every run, that says nothing about what is in it.

    Named ``memlong_vllm.evaluation.random_retriever:RandomEmbedder`` in ``retriever.model``. As
    many chunks are retrieved as with any embedder; which ones is chance.
    """

    dimension = 64

    def __init__(self, config: RetrieverConfig, device: str) -> None:
        pass

    def embed(self, texts: list[str]) -> np.ndarray:
        """[len(texts), dimension] float32, uniform on the unit sphere, drawn with the text's hash."""
        vectors = np.stack([self._draw(text) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def _draw(self, text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(self.dimension)
