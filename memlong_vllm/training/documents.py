"""The texts that a model is trained on."""

from __future__ import annotations

import glob
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class TextsError(ValueError):
    """The training or validation texts cannot be used. The message says which and why."""


@dataclass(frozen=True)
class Document:
    """A text in tokens; memory begins empty at its start.

    Attributes:
        name: for logs and provenance.
        token_ids: the tokens, never changed.
        loss_weights: one a token, how much predicting it counts; None: all count 1.
        questions: where the last tokens of questions are, at most one a retrieval stride; what follows reads
            what is retrieved for it as at a prompt's end.
    """

    name: str
    token_ids: Sequence[int]
    loss_weights: tuple[float, ...] | None = None
    questions: tuple[int, ...] = ()


def find_texts(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, sorted.

    Raises:
        TextsError: for a pattern without a file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        # A shell puts names here, in which brackets are brackets.
        named = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = [Path(match) for match in named if Path(match).is_file()]
        if not matches:
            raise TextsError(f"no file matches {pattern!r}")
        found.update(matches)
    return sorted(found)


@dataclass(frozen=True)
class Excerpt:
    """Which tokens of a text are used: from ``offset`` on, ``max_tokens`` at most."""

    offset: int = 0
    max_tokens: int | None = None

    def of(self, text: str, tokenizer: Any) -> list[int]:
        if self.max_tokens is not None:
            # Far more characters than the tokens wanted, so that a long book is not tokenized in vain.
            text = text[: (self.offset + self.max_tokens) * 12]
        token_ids: list[int] = tokenizer(text)["input_ids"][self.offset :]
        return token_ids[: self.max_tokens]


def read_documents(paths: Sequence[Path], tokenizer: Any, excerpt: Excerpt, min_tokens: int) -> list[Document]:
    """Each file as a document.

    Args:
        min_tokens: a shorter one is refused: nothing of it would be trained on.

    Raises:
        TextsError: for a file that is not UTF-8 or too short.
    """
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TextsError(f"{path} cannot be read as UTF-8 text: {error}") from error
        documents.append(make_document(path.name, text, tokenizer, excerpt, min_tokens))
    return documents


def dataset_documents(name: str, split: str, tokenizer: Any, excerpt: Excerpt, min_tokens: int) -> Iterator[Document]:
    """The ``text`` column of a dataset of the ``datasets`` library: a hub name or a local folder.

    Too short texts are passed over.

    Raises:
        TextsError: if the dataset cannot be loaded, has no such column or no text that is long enough.
    """
    load_dataset, num_documents = dataset_loader(), 0
    try:
        for idx, row in enumerate(load_dataset(name, split=split, streaming=True)):
            try:
                document = make_document(f"{name}/{split}/{idx}", row["text"], tokenizer, excerpt, min_tokens)
            except TextsError:
                continue
            num_documents += 1
            yield document
    except (OSError, ValueError, KeyError) as error:
        raise TextsError(f"--dataset {name} (split {split}) has no usable 'text' column here: {error}") from error
    if not num_documents:
        raise TextsError(f"--dataset {name} (split {split}) has no text of {min_tokens} tokens")


def take(documents: Iterable[Document], min_documents: int, enough_tokens: int) -> list[Document]:
    """Documents until they have so many tokens, but no fewer than ``min_documents``."""
    taken, num_tokens = [], 0
    for document in documents:
        taken.append(document)
        num_tokens += len(document.token_ids)
        if num_tokens >= enough_tokens and len(taken) >= min_documents:
            break
    return taken


def dataset_loader() -> Any:
    """``datasets.load_dataset``.

    Raises:
        TextsError: if the library is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextsError(f"--dataset needs the datasets library ({error}): pip install datasets") from error
    return load_dataset


def make_document(name: str, text: str, tokenizer: Any, excerpt: Excerpt, min_tokens: int) -> Document:
    """Raises TextsError if what is used of the text is shorter than ``min_tokens``."""
    token_ids = excerpt.of(text, tokenizer)
    if len(token_ids) < min_tokens:
        raise TextsError(f"{name} has {len(token_ids)} tokens; at least one segment ({min_tokens}) is needed")
    return Document(name, array("i", token_ids))
