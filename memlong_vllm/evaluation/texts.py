"""Text files in the models' tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlong_vllm.evaluation.scoring import EvaluationError


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: of the file, which rows name it by.
        digest: of its contents.
    """

    name: str
    digest: str
    token_ids: list[int]


def read_texts(paths: Sequence[Path], tokenizer: Any) -> list[Text]:
    """Read UTF-8 files and tokenize them, without special tokens.

    Raises:
        EvaluationError: if a file cannot be read, or two have one name.
    """
    texts: list[Text] = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"--texts {path}: {error}") from error
        if path.name in {text.name for text in texts}:
            raise EvaluationError(
                f"--texts {path}: another file is called {path.name} too, so rows would not tell them apart"
            )
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        token_ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        texts.append(Text(path.name, digest, token_ids))
    return texts


def beginning(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, if any."""
    return list(tokenizer("")["input_ids"])
