"""Tiny random MemLong checkpoints. Their weights are random; tokenizer and embedder are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlong_vllm.conversion import convert
from memlong_vllm.demo_model import demo_checkpoint

NOVEL = Path(__file__).parent.parent / "examples" / "data" / "doyle_lost_world.txt"
MEMORY = {
    "memory_layer": 1,
    "retrieval_layers": [1, 2, 4],
    "chunk_size": 16,
    "top_k": 2,
    "memory_size": 512,
    "local_window": 64,
    "retrieval_stride": 16,
    "query_tokens": 16,
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def novel() -> str:
    return NOVEL.read_text(encoding="utf-8")


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


class Checkpoints:
    """Makes checkpoints under ``root``, each once a test session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = train_tokenizer(novel()[:200_000])
        self.retriever = demo_checkpoint() / "retriever"

    def base(self, **shape: Any) -> Path:
        """A plain Llama with random weights of moderate logits; ``shape`` overrides SHAPE."""
        values = SHAPE | shape
        path = self.root / f"base-{self._key(values)}"
        if not path.exists():
            torch.manual_seed(0)
            config = LlamaConfig(vocab_size=len(self.tokenizer), bos_token_id=0, eos_token_id=1, **values)
            model = LlamaForCausalLM(config)
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    # Sharp attention, so that what is attended to shows in the logits.
                    torch.nn.init.normal_(parameter, std=0.16 if "self_attn" in name else 0.08)
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        return path

    def memlong(self, gates: float = 0.7, shape: dict[str, Any] | None = None, **memory: Any) -> Path:
        """A MemLong checkpoint whose memory parameters are random of scale ``gates``."""
        block = MEMORY | {"retriever.model": str(self.retriever), "retriever.pooling": "mean"} | memory
        path = self.root / f"memlong-{self._key([gates, shape, block])}"
        if not path.exists():
            base = self.base(**(shape or {}))
            convert(base, path, settings=block, max_length=32768)
            self._randomise(path / "model.safetensors", gates)
        return path

    @staticmethod
    def _randomise(weights: Path, gates: float) -> None:
        tensors = load_file(weights)
        generator = torch.Generator().manual_seed(1)
        for name in sorted(tensors):
            if ".memory_" in name:
                scale = gates if tensors[name].dim() == 1 else gates / 10
                tensors[name] += torch.randn(tensors[name].shape, generator=generator) * scale
        save_file(tensors, weights, metadata={"format": "pt"})

    @staticmethod
    def _key(values: object) -> str:
        return f"{abs(hash(json.dumps(values, sort_keys=True))):x}"
