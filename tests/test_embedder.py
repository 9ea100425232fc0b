"""The encoder that makes vectors, against transformers alone."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from memlong_vllm.config import RetrieverConfig
from memlong_vllm.retriever.embedder import load_embedder
from tests.checkpoints import Checkpoints

TEXTS = ["The ship had left the harbour.", "Rain.", "Nobody had seen the letter since the winter before last. " * 20]


def test_vectors_are_those_of_the_plain_model(checkpoints: Checkpoints) -> None:
    folder = checkpoints.retriever
    embedder = load_embedder(RetrieverConfig(folder.name, "mean", 256), str(folder.parent), "cpu")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            wanted = torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1).numpy()
        found = embedder.embed([text])
        assert found.shape == (1, embedder.dimension)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6)
