"""What the frozen half of a model makes of a text, computed once and kept on disk.

Layers up to the memory layer do not change in training, nor does the retriever: hidden states,
stored keys and values, embeddings and therefore the retrieved sets of a text are the same in every
epoch and in every run with the same lower half.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from memlong_vllm.config import GIB, MemoryConfig
from memlong_vllm.memories.fingerprint import model_fingerprint
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.reference.retrieval import AttendedSpan, Embed, SequenceMemory
from memlong_vllm.training.documents import Document, TextsError
from memlong_vllm.training.layer_stack import LayerStack

_PIECE_TOKENS = 2048  # Of a document at a time through the lower layers.
_EMBED_BATCH = 32
FORMAT = 1

EmbedTexts = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class StrideMemory:
    """What the tokens of one retrieval stride attend to.

    Attributes:
        chunk_ids: ascending.
        first: the first token of the stride that does; 0 but where a question ends within it.
    """

    chunk_ids: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True)
class DocumentFeatures:
    """A document as the trained half sees it. T tokens, a whole number of retrieval strides.

    Attributes:
        document: the text.
        hidden: [T, hidden_size], what goes into the memory layer.
        keys, values: [T, R·d], un-rotated, of the memory layer.
        spans: one a retrieval stride.
    """

    document: Document
    hidden: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    spans: tuple[StrideMemory, ...]


class TextMemory(SequenceMemory):
    """Of a text with questions in it, at most one a retrieval stride, each of which is retrieved for as at
    a prompt's end. Before it, its stride reads nothing: a stride has one set."""

    def __init__(self, config: MemoryConfig, embed: Embed, questions: Sequence[int]) -> None:
        super().__init__(config, embed)
        self._questions = {question // config.retrieval_stride: question for question in questions}
        if len(self._questions) < len(questions):
            raise ValueError("two questions in one retrieval stride")

    def _ends_prompt(self, position: int) -> bool:
        return self._questions.get(position // self.config.retrieval_stride) == position

    def _retrieve(self, position: int, query: tuple[int, int]) -> None:
        if self._questions.get(position // self.config.retrieval_stride, -1) > position:
            self.retrieved = ()
        else:
            super()._retrieve(position, query)


def least_tokens(memory: MemoryConfig) -> int:
    """Of a text, so that something can be retrieved for its last stride: its window must leave a chunk out."""
    stride = memory.retrieval_stride
    first = memory.local_window + memory.chunk_size - stride  # Its window ends with the stride.
    return (-(-first // stride) + 1) * stride


class FrozenHalf:
    """The lower half of a checkpoint and its retriever, with a cache on disk.

    Args:
        checkpoint: the folder of ``model``.
        model: its weights; layers below the memory layer are used as they are.
        embed_texts: non-empty texts -> [len, dimension] float32, L2-normalised.
        decode: token ids -> the text that the retriever embeds.
        cache_dir: where results are kept; made if need be. None: nothing is.
        dtype: of what is kept.
        autocast: a context manager's factory that sets the precision of the forward pass.
        retriever_digest: tells embedders apart that the configuration gives one name.
    """

    def __init__(
        self,
        checkpoint: Path,
        model: MemLongForCausalLM,
        embed_texts: EmbedTexts,
        decode: Callable[[Sequence[int]], str],
        cache_dir: Path | None,
        dtype: torch.dtype,
        autocast: Callable[[], torch.autocast],
        retriever_digest: str,
    ) -> None:
        self.config = model.config.memory
        self.model, self.stack = model, LayerStack(model, range(self.config.memory_layer))
        self.embed_texts, self.decode = embed_texts, decode
        self.cache_dir, self.dtype, self.autocast = cache_dir, dtype, autocast
        lower = model_fingerprint(checkpoint, self.config.memory_layer)
        self._lower_key = [FORMAT, lower, str(dtype), model.device.type]
        self._retriever_key = [FORMAT, asdict(self.config.retriever), retriever_digest]
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)

    def check_space(self, documents: Sequence[Document]) -> None:
        """Raises:
        TextsError: if what the cache lacks of these documents does not fit on its disk.
        """
        if self.cache_dir is None:
            return
        used = [self._whole_strides(document) for document in documents]
        missing = [ids for ids, digest in used if not self._is_kept("lower", [*self._lower_key, digest])]
        config = self.model.config
        numbers = config.hidden_size + 2 * config.num_key_value_heads * config.head_dim
        needed = sum(map(len, missing)) * numbers * self.dtype.itemsize
        free = shutil.disk_usage(self.cache_dir).free
        if needed > free:
            raise TextsError(
                f"what the frozen layers make of {len(missing)} texts takes {needed / GIB:,.1f} GiB, and there are "
                f"{free / GIB:,.1f} in {self.cache_dir}: name another --cache-dir, lower --document-tokens, or keep "
                "nothing (--no-cache)"
            )

    def _whole_strides(self, document: Document) -> tuple[Sequence[int], str]:
        """The tokens that are used, and their digest."""
        count = len(document.token_ids) // self.config.retrieval_stride * self.config.retrieval_stride
        token_ids = document.token_ids[:count]
        return token_ids, hashlib.sha256(np.asarray(token_ids, np.int64).tobytes()).hexdigest()

    def _is_kept(self, kind: str, key: list[object]) -> bool:
        return self.cache_dir is not None and self._path(self.cache_dir, kind, key).exists()

    @staticmethod
    def _path(cache_dir: Path, kind: str, key: list[object]) -> Path:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return cache_dir / f"{kind}-{name}.safetensors"

    def features(self, document: Document) -> DocumentFeatures:
        """Of a document's whole strides; the rest of its tokens is left out."""
        token_ids, digest = self._whole_strides(document)
        lower = self._kept("lower", [*self._lower_key, digest], lambda: self._run_lower(token_ids))
        spans = self._spans(token_ids, [place for place in document.questions if place < len(token_ids)], digest)
        return DocumentFeatures(document, lower["hidden"], lower["keys"], lower["values"], spans)

    def _kept(
        self, kind: str, key: list[object], make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if self.cache_dir is None:
            return make()
        path = self._path(self.cache_dir, kind, key)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(make(), partial)
            os.replace(partial, path)
        return load_file(path)  # Mapped, not read: a document's pages come as they are used.

    @torch.no_grad()
    def _run_lower(self, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        model, stride = self.model, self.config.retrieval_stride
        layer = model.model.layers[self.config.memory_layer]
        parts: dict[str, list[torch.Tensor]] = {"hidden": [], "keys": [], "values": []}
        piece = max(stride, _PIECE_TOKENS // stride * stride)
        with self.autocast():
            carried = None
            for first in range(0, len(token_ids), piece):
                ids = torch.tensor(token_ids[first : first + piece], dtype=torch.long, device=model.device)
                hidden = model.model.embed_tokens(ids)[None].float()
                carried = self.stack.empty(1, hidden) if carried is None else carried
                hidden, carried = self.stack(hidden, carried)
                normed = layer.input_layernorm(hidden)
                made = hidden, layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
                for kept, tensor in zip(parts.values(), made, strict=True):
                    kept.append(tensor[0].to("cpu", self.dtype))
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _spans(self, token_ids: Sequence[int], questions: list[int], digest: str) -> tuple[StrideMemory, ...]:
        """What each stride attends to. Sets depend on the text alone (section 2 of the semantics)."""
        size, stride = self.config.chunk_size, self.config.retrieval_stride
        settings = [self.config.top_k, self.config.memory_size, self.config.local_window, stride, size]
        settings += [self.config.query_tokens, self.config.query_scope]
        key = [*self._retriever_key, *settings, self.config.prompt_query_tokens, questions, digest]
        kept = self._kept("spans", key, lambda: {"chunk_ids": self._retrieve(token_ids, questions, digest)})
        first = {question // stride: question % stride for question in questions}
        return tuple(
            StrideMemory(tuple(chunk for chunk in row if chunk >= 0), first.get(number, 0))
            for number, row in enumerate(kept["chunk_ids"].tolist())
        )

    def _retrieve(self, token_ids: Sequence[int], questions: list[int], digest: str) -> torch.Tensor:
        """[strides, top_k] chunk ids, -1 where there are fewer."""
        size, stride = self.config.chunk_size, self.config.retrieval_stride
        chunks = [tuple(token_ids[c : c + size]) for c in range(0, len(token_ids) - size + 1, size)]
        key = [*self._retriever_key, size, digest]
        vectors = self._kept("vectors", key, lambda: {"chunks": self._embed(chunks)})["chunks"]
        known = dict(zip(chunks, vectors, strict=True))

        def embed(ids: list[int]) -> torch.Tensor:
            if tuple(ids) not in known:
                known[tuple(ids)] = self._embed([tuple(ids)])[0]
            return known[tuple(ids)]

        spans = TextMemory(self.config, embed, questions).extend(token_ids)
        rows = torch.full((len(token_ids) // stride, self.config.top_k), -1, dtype=torch.int32)
        for span in spans:
            _fill(rows, span, stride)
        return rows

    def _embed(self, chunks: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """[chunks, dimension]; zeros for an empty text."""
        texts = [self.decode(chunk) for chunk in chunks]
        batch = 1 if self.model.device.type == "cpu" else _EMBED_BATCH
        instruction = self.config.retriever.query_instruction or ""
        made = [
            torch.as_tensor(self.embed_texts([instruction + (text or " ") for text in texts[first : first + batch]]))
            for first in range(0, len(texts), batch)
        ]
        empty = torch.tensor([text == "" for text in texts])
        return torch.cat(made).masked_fill(empty[:, None], 0.0)


class FeaturesAsRead(Sequence[DocumentFeatures]):
    """Features of documents, each made when it is asked for; the last few are held.

    Args:
        num_held: twice as many as are read side by side: one that ends is asked for beside the next.
    """

    def __init__(self, frozen: FrozenHalf, documents: Sequence[Document], num_held: int) -> None:
        self._frozen, self._documents, self._num_held = frozen, documents, num_held
        self._held: OrderedDict[int, DocumentFeatures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: int) -> DocumentFeatures:  # type: ignore[override]
        if number not in self._held:
            self._held[number] = self._frozen.features(self._documents[number])
            if len(self._held) > self._num_held:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def longest(self, window: int, num_tokens: int) -> list[DocumentFeatures]:
        """As many as have ``num_tokens`` when each gives a window: the first of those with two, then of the others."""
        order = sorted(range(len(self)), key=lambda number: -min(2, len(self._documents[number].token_ids) // window))
        return [self._frozen.features(self._documents[number]) for number in order[: -(-num_tokens // window)]]


def _fill(rows: torch.Tensor, span: AttendedSpan, stride: int) -> None:
    for row in range(span.start // stride, -(-span.end // stride)):
        rows[row, : len(span.chunk_ids)] = torch.tensor(span.chunk_ids, dtype=torch.int32)
