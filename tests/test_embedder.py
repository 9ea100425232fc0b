"""The encoder that makes vectors, against transformers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from memlong_vllm.config import RetrieverConfig
from memlong_vllm.retriever.embedder import RetrieverLoadError, load_embedder
from tests.checkpoints import Checkpoints

MAX_LENGTH = 64
TEXTS = ["The ship had left the harbour.", "Rain.", "Nobody had seen the letter since the winter before last. " * 20]


@pytest.mark.parametrize("with_onednn", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_the_plain_model(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, pooling: str, with_onednn: bool
) -> None:
    """One by one and as a batch with padding; the last text is cut."""
    monkeypatch.setattr("memlong_vllm.retriever.embedder.is_onednn_faster", lambda: with_onednn)
    folder = checkpoints.retriever
    embedder = load_embedder(RetrieverConfig(folder.name, pooling, MAX_LENGTH), str(folder.parent), "cpu")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = []
    for text in TEXTS:
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            (hidden,) = model(**inputs).last_hidden_state
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        wanted.append(torch.nn.functional.normalize(vector, dim=-1).numpy())
    assert inputs["input_ids"].shape[1] == MAX_LENGTH
    together = embedder.embed(TEXTS)
    assert together.shape == (len(TEXTS), embedder.dimension)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, wanted, atol=1e-6)
    for text, vector in zip(TEXTS, wanted, strict=True):
        np.testing.assert_allclose(embedder.embed([text]), [vector], atol=1e-6)


def test_texts_longer_than_the_model_takes_are_refused(checkpoints: Checkpoints) -> None:
    folder = checkpoints.retriever
    positions = AutoConfig.from_pretrained(folder).max_position_embeddings
    load_embedder(RetrieverConfig(folder.name, "mean", positions), str(folder.parent), "cpu").embed(TEXTS)
    with pytest.raises(RetrieverLoadError, match=rf"max_length = {positions + 1}: it takes at most {positions} tokens"):
        load_embedder(RetrieverConfig(folder.name, "mean", positions + 1), str(folder.parent), "cpu")
