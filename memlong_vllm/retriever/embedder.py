"""From texts to vectors: the embedder interface and the FlagEmbedding implementation."""

from __future__ import annotations

import hashlib
import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.mkldnn import to_mkldnn
from transformers import PreTrainedConfig

from memlong_vllm.config import RetrieverConfig


class RetrieverLoadError(RuntimeError):
    """The embedder that the configuration names cannot be loaded."""


class Embedder(Protocol):
    """What the retriever needs of an embedder.

    An own one is named ``"module:Class"`` in ``retriever.model`` and constructed as
    ``Class(config: RetrieverConfig, device: str)``.

    Attributes:
        dimension: components of a vector.
    """

    dimension: int

    def embed(self, texts: list[str]) -> np.ndarray:
        """Embed non-empty texts, instruction included. Returns [len(texts), dimension] float32,
        L2-normalised. Called on the retriever's own thread."""
        ...


class FlagEmbedder:
    """Encoder models (BGE, MiniLM, …) loaded by ``FlagEmbedding.FlagModel``.

    FlagModel's ``encode`` runs its first batch twice to find a batch size that fits, which for
    one chunk doubles the cost, so its tokenizer, model and pooling are used directly.
    """

    def __init__(self, config: RetrieverConfig, device: str) -> None:
        from FlagEmbedding import FlagModel

        self._flag = FlagModel(
            config.model,
            pooling_method=config.pooling,
            devices=[device],
            use_fp16=device != "cpu",
            normalize_embeddings=True,
        )
        model = self._flag.model.to(device).eval()
        if config.max_length > (longest := _longest_text(model.config)):
            raise ValueError(f"memlong.retriever.max_length = {config.max_length}: it takes at most {longest} tokens")
        self._model = to_mkldnn(model) if device == "cpu" and is_onednn_faster() else model
        self._device = device
        self._max_length = config.max_length
        self.dimension: int = self._model.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        inputs = self._flag.tokenizer(
            texts, truncation=True, max_length=self._max_length, padding=True, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**inputs, return_dict=True).last_hidden_state
        vectors = self._flag.pooling(hidden, inputs["attention_mask"])
        return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def is_onednn_faster() -> bool:
    """Than PyTorch's own float32 products. These are MKL's, which use half of what AMD's processors have;
    on Intel's they take four fifths of oneDNN's time."""
    info = Path("/proc/cpuinfo")
    is_intel = info.exists() and "GenuineIntel" in info.read_text()
    return torch.backends.mkldnn.is_available() and not (is_intel and torch.backends.mkl.is_available())


def _longest_text(config: PreTrainedConfig) -> float:
    """Tokens that an encoder has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return math.inf
    # RoBERTa's positions begin behind that of its padding.
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def _located(model: str, checkpoint: str) -> str:
    inside = Path(checkpoint) / model
    return str(inside) if inside.is_dir() else model


def embedder_digest(config: RetrieverConfig, checkpoint: str) -> str:
    """Tells embedders apart: a digest of the files of one that is a folder, else its name.

    Args:
        checkpoint: as for :func:`load_embedder`.
    """
    folder = Path(_located(config.model, checkpoint))
    if not folder.is_dir():
        return config.model
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_embedder(config: RetrieverConfig, checkpoint: str, device: str) -> Embedder:
    """Load the embedder that a configuration names.

    Args:
        checkpoint: folder in which a relative ``config.model`` is looked up first.
        device: torch device.

    Raises:
        RetrieverLoadError: naming the model and what went wrong.
    """
    try:
        if ":" in config.model and not Path(config.model).exists():
            module, _, name = config.model.partition(":")
            return getattr(importlib.import_module(module), name)(config, device)
        config = replace(config, model=_located(config.model, checkpoint))
        return FlagEmbedder(config, device)
    except Exception as error:
        raise RetrieverLoadError(
            f"memlong.retriever.model = {config.model!r} cannot be loaded on {device!r} "
            f"({type(error).__name__}: {error}). Name a local folder or hub model there, or set "
            "retriever_path in --additional-config '{\"memlong\": {…}}'."
        ) from error
