"""The demo's document and what is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import memlong_vllm
from memlong_vllm.config import MemLongConfig
from memlong_vllm.recall_material import key_note, key_question, sentence_breaks

NOVEL = Path(memlong_vllm.__file__).parents[1] / "examples" / "data" / "doyle_lost_world.txt"
NOVEL_QUESTIONS = (
    "Who was Maple White, how did he die, and what was found in the sketch-book that he left behind?",
    "What does Tarp Henry, the bacteriologist of Nature, tell Malone about the zoologist George Edward Challenger?",
    "What kind of man does Gladys want to love and to marry? What must a man do before she would be his wife?",
    "What does the news editor McArdle tell Malone about Professor Challenger's expedition to South America?",
)
GENERAL_QUESTIONS = (
    "Who is the most important person in this text, and how is this person described when first mentioned?",
    "Where do the events of this text take place, and how is that place described?",
    "What do the people in this text argue about, and who disagrees with whom?",
    "What problem is described at the beginning of this text, and what is planned to solve it?",
)
# Written into the text at these fractions of it; the wording of Mohtashami and Jaggi (2023).
KEYS = (
    ("pass key", "71432", 0.1),
    ("secret code", "90586", 0.3),
    ("combination of the safe", "23817", 0.5),
    ("number of the account", "64059", 0.7),
)
DEFAULT_TOKENS = 16384


class DemoError(ValueError):
    """The demo cannot run as asked. The message is one line for the user."""


@dataclass(frozen=True)
class Key:
    """A number that is written into the document: ``place`` is its note's first token in a prompt."""

    name: str
    number: str
    place: int


@dataclass
class Question:
    """A question, its whole prompt as tokens, and the answer. Times are seconds since the batch began.

    Attributes:
        key: the key that is asked for, in the plain text's continuation.
        with_memory: False: nothing is retrieved for this prompt.
    """

    text: str
    token_ids: list[int]
    key: Key | None = None
    with_memory: bool = True
    answer: str = ""
    num_tokens: int = 0
    first_token_at: float = 0.0
    last_token_at: float = 0.0


def read_document(path: Path | None) -> str:
    if path is None and not NOVEL.is_file():
        raise DemoError("the novel is in the source checkout only (examples/data): name a text with --document FILE")
    try:
        return (path or NOVEL).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise DemoError(f"--document {path or NOVEL}: {reason}") from error


def build_prompts(
    tokenizer: Any, config: MemLongConfig, document: str, num_tokens: int | None, questions: Sequence[str]
) -> list[Question]:
    """One prompt a question: the document's first ``num_tokens`` tokens, then the question, as a
    user's message in the model's chat format; then two for each of :data:`KEYS`, with memory and
    without. All share their tokens up to the question.

    Raises:
        DemoError: if the document has fewer tokens, or so few are asked for that all stay in the window.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    document_ids = encode(document)
    if num_tokens is not None and num_tokens > len(document_ids):
        raise DemoError(f"the document has {len(document_ids)} tokens; --tokens {num_tokens} is more")
    num_tokens = num_tokens or min(DEFAULT_TOKENS, len(document_ids))
    least = config.memory.local_window + 2 * config.memory.chunk_size
    if num_tokens < least:
        raise DemoError(
            f"{num_tokens} tokens are too few: with less than {least}, nothing has left the local window "
            f"of {config.memory.local_window} tokens, so there is nothing to retrieve"
        )
    before, after = "", "\nAnswer:"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": "\x00"}]
        before, _, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).partition(
            "\x00"
        )
    shared = encode(before) + document_ids[:num_tokens]
    breaks = sentence_breaks(shared, lambda token: tokenizer.decode([token]))
    keys = []
    for name, number, fraction in KEYS:  # In order, so that a note moves none that is there already.
        earliest = int(fraction * len(shared))
        place = next((n for n in range(earliest, earliest + len(shared) // 10) if shared[n - 1] in breaks), earliest)
        shared[place:place] = encode(f"\n\n{key_note(number, name)}\n\n")
        keys.append(Key(name, number, place))
    prompts = [Question(q, shared + encode(f"\n\n{q} Answer in one sentence.{after}")) for q in questions]
    for key, with_memory in product(keys, (True, False)):
        asked = key_question(key.name)
        prompts.append(Question(asked, shared + encode(f"\n\n{asked}"), key, with_memory))
    return prompts
