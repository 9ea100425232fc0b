"""The text that all benchmarks read: a novel, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "examples" / "data" / "doyle_lost_world.txt"
STRIDE = 997
"""Tokens between the beginnings of texts, so that no two chunks of them are alike."""
Piece = tuple[int, int]
"""(first token, number of tokens) of the novel, which begins again at its end."""


class ExampleText:
    """The novel in a model's tokens.

    Args:
        vocab_size: of the model; greater token ids, of a tokenizer that is not its own, are folded.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        ids = tokenizer(DOCUMENT.read_text(encoding="utf-8"))["input_ids"]
        self._tokens = [token % vocab_size for token in ids]

    def prompt(self, pieces: Sequence[Piece]) -> list[int]:
        return [token for piece in pieces for token in self._piece(*piece)]

    def _piece(self, start: int, length: int) -> list[int]:
        start %= len(self._tokens)
        rounds = -(-(start + length) // len(self._tokens))
        return (self._tokens * rounds)[start : start + length]
