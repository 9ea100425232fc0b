"""The configuration of a MemLong checkpoint. Shipped in checkpoints, so it imports nothing of ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


class MemoryConfigError(ValueError):
    """A field of the ``memlong`` block is invalid. The message names field, value and rule."""

    def __init__(self, name: str, value: object, rule: str) -> None:
        super().__init__(f"memlong.{name} = {value!r}: {rule}")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise MemoryConfigError(name, value, rule)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _reject_unknown(cls: type, block: dict[str, Any], prefix: str) -> None:
    known = {f.name for f in fields(cls)}
    for name in block:
        _require(name in known, prefix + name, block[name], f"unknown field; known are {sorted(known)}")


@dataclass(frozen=True)
class RetrieverConfig:
    """The text embedder that represents chunks and queries (section 3.2 of the paper).

    Attributes:
        model: folder (relative ones are looked up in the checkpoint first), hub name, or
            ``"module:Class"`` of an own embedder.
        pooling: how token states become one vector, ``"cls"`` or ``"mean"``.
        max_length: the embedder's tokens a text is truncated to.
        query_instruction: text put before every text that is embedded, or None.
    """

    model: str = "BAAI/bge-m3"
    pooling: Literal["cls", "mean"] = "cls"
    max_length: int = 512
    query_instruction: str | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.model, str) and self.model != "", "retriever.model", self.model, "must name a model")
        _require(self.pooling in ("cls", "mean"), "retriever.pooling", self.pooling, "must be 'cls' or 'mean'")
        _require(_is_count(self.max_length), "retriever.max_length", self.max_length, "must be a positive integer")
        _require(
            self.query_instruction is None or isinstance(self.query_instruction, str),
            "retriever.query_instruction",
            self.query_instruction,
            "must be a string or null",
        )


@dataclass(frozen=True)
class MemoryConfig:
    """The ``memlong`` block of a checkpoint. Token counts unless said otherwise; layers 0-based.

    Attributes:
        memory_layer: the layer whose un-rotated keys and values are stored (section 4.1).
        retrieval_layers: the layers that attend to memory, ascending, none below ``memory_layer``.
        chunk_size: tokens a chunk, the unit of storage and retrieval.
        top_k: chunks a retrieval takes at most.
        memory_size: capacity of a sequence's memory in tokens, a multiple of ``chunk_size``; 0:
            nothing is ever retrieved.
        local_window: tokens, itself included, a token attends to in every layer.
        retrieval_stride: distance between two retrievals, a multiple of ``chunk_size``.
        query_tokens: length of a query.
        prompt_query_tokens: length of the further query at a prompt's end, which asks for what answers it;
            None: ``query_tokens``.
        query_scope: ``"preceding"`` (strictly causal) or ``"current"`` (Eq. 1 of the paper).
        fusion: ``"gated"`` (Eq. 2-5), ``"joint"`` or ``"scaled_logits"`` (the authors' code).
        memory_softmax: ``gated`` only: one softmax over ``"all"`` memory, or one per ``"chunk"``.
        memory_bias: adds a learned bias per head to the memory scores.
        memory_adapter: ``"linear"`` maps stored keys and values anew for each retrieval layer.
        memory_adapter_width: stored tokens that it makes a token of: itself and those before it in its chunk.
        retriever: the embedder.
    """

    memory_layer: int
    retrieval_layers: tuple[int, ...]
    chunk_size: int = 128
    top_k: int = 8
    memory_size: int = 32768
    local_window: int = 2048
    retrieval_stride: int = 128
    query_tokens: int = 128
    prompt_query_tokens: int | None = None
    query_scope: Literal["preceding", "current"] = "preceding"
    fusion: Literal["gated", "joint", "scaled_logits"] = "gated"
    memory_softmax: Literal["all", "chunk"] = "all"
    memory_bias: bool = False
    memory_adapter: Literal["linear"] | None = None
    memory_adapter_width: int = 1
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_choices()
        _require(
            isinstance(self.memory_layer, int) and not isinstance(self.memory_layer, bool) and self.memory_layer >= 0,
            "memory_layer",
            self.memory_layer,
            "must be a layer number, 0 or above",
        )
        layers = self.retrieval_layers
        _require(
            isinstance(layers, tuple) and len(layers) > 0 and all(type(n) is int for n in layers),
            "retrieval_layers",
            layers,
            "must be a list of at least one layer number",
        )
        _require(list(layers) == sorted(set(layers)), "retrieval_layers", layers, "must ascend without repeats")
        _require(
            layers[0] >= self.memory_layer,
            "retrieval_layers",
            layers,
            f"no layer may lie below memory_layer ({self.memory_layer}), whose keys and values it reads",
        )

    def _check_counts(self) -> None:
        names = ("chunk_size", "top_k", "memory_size", "local_window", "retrieval_stride", "query_tokens")
        for name in names:
            if name == "memory_size" and type(self.memory_size) is int and self.memory_size == 0:
                continue
            _require(_is_count(getattr(self, name)), name, getattr(self, name), "must be a positive integer")
        width, most = self.memory_adapter_width, 1 if self.memory_adapter is None else self.chunk_size
        rule = f"must be from 1 to {most}, " + ("chunk_size" if self.memory_adapter else "as memory_adapter is null")
        _require(_is_count(width) and width <= most, "memory_adapter_width", width, rule)
        length = self.prompt_query_tokens
        rule = "must be a positive integer or null"
        _require(length is None or _is_count(length), "prompt_query_tokens", length, rule)
        for name in ("memory_size", "local_window", "retrieval_stride"):
            rule = f"must be a multiple of chunk_size ({self.chunk_size})"
            _require(getattr(self, name) % self.chunk_size == 0, name, getattr(self, name), rule)
        rule = f"must be at least retrieval_stride ({self.retrieval_stride}): a segment's tokens see its first"
        _require(self.local_window >= self.retrieval_stride, "local_window", self.local_window, rule)

    def _check_choices(self) -> None:
        choices = {
            "query_scope": ("preceding", "current"),
            "fusion": ("gated", "joint", "scaled_logits"),
            "memory_softmax": ("all", "chunk"),
            "memory_adapter": (None, "linear"),
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"must be one of {list(allowed)}")
        rule = "must be true or false"
        _require(isinstance(self.memory_bias, bool), "memory_bias", self.memory_bias, rule)
        _require(
            self.memory_softmax == "all" or self.fusion == "gated",
            "memory_softmax",
            self.memory_softmax,
            f"'chunk' goes with fusion 'gated' only, not {self.fusion!r}, whose softmax spans memory and window",
        )

    @property
    def capacity(self) -> int:
        """Chunks a sequence's memory holds at most."""
        return self.memory_size // self.chunk_size

    def prompt_query(self, prompt_len: int) -> tuple[int, int]:
        """The tokens [start, end) of the query at a prompt's end."""
        length = self.query_tokens if self.prompt_query_tokens is None else self.prompt_query_tokens
        return max(0, prompt_len - length), prompt_len

    @classmethod
    def from_dict(cls, block: dict[str, Any], num_layers: int) -> MemoryConfig:
        """Validate a ``memlong`` block for a backbone of ``num_layers`` layers.

        Raises:
            MemoryConfigError: naming the field, its value and the rule it breaks.
        """
        _reject_unknown(cls, block, "")
        values = dict(block)
        for name in ("memory_layer", "retrieval_layers"):
            _require(name in values, name, None, "is required")
        retriever = values.get("retriever", {})
        _require(isinstance(retriever, dict), "retriever", retriever, "must be an object")
        _reject_unknown(RetrieverConfig, retriever, "retriever.")
        values["retriever"] = RetrieverConfig(**retriever)
        layers = values["retrieval_layers"]
        values["retrieval_layers"] = tuple(layers) if isinstance(layers, list | tuple) else layers
        config = cls(**values)
        last = config.retrieval_layers[-1]
        _require(last < num_layers, "retrieval_layers", layers, f"the backbone has layers 0 to {num_layers - 1}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The block as it stands in ``config.json``."""
        block = asdict(self)
        block["retrieval_layers"] = list(self.retrieval_layers)
        return block


@strict
class MemLongConfig(LlamaConfig):
    """A Llama configuration with a ``memlong`` block.

    Attributes:
        memlong: the block as a dict; see :class:`MemoryConfig`.
        backbone_max_position_embeddings: the length the backbone was trained on.
            ``max_position_embeddings`` is how far sequences may reach with memory.
    """

    model_type = "memlong"
    memlong: dict | None = None
    backbone_max_position_embeddings: int | None = None

    @property
    def memory(self) -> MemoryConfig:
        """The validated ``memlong`` block.

        Raises:
            MemoryConfigError: if the block is missing or invalid.
        """
        if self.memlong is None:
            raise ValueError("config.json has no 'memlong' block: make the checkpoint with 'memlong-vllm convert'")
        return MemoryConfig.from_dict(self.memlong, self.num_hidden_layers)
