"""What the demo prints. Everything is measured in its run or computed from the checkpoint's shapes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from safetensors import safe_open

from memlong_vllm.config import MemLongConfig
from memlong_vllm.demo.session import Run

MIB = 1 << 20
WIDTH = 100


def gates_are_zero(checkpoint: Path) -> bool:
    """Whether every ``memory_gate`` of the checkpoint is zero, as conversion leaves them."""
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(".memory_gate")]  # noqa: SIM118
            if any(bool(tensors.get_tensor(name).any()) for name in names):
                return False
    return True


def print_answers(run: Run, config: MemLongConfig, tokenizer: Any, retrieved: dict[str, dict[str, Any]]) -> None:
    size = config.memory.chunk_size
    asked = {request_id: question for request_id, question in run.questions.items() if question.key is None}
    for number, (request_id, question) in enumerate(asked.items(), start=1):
        found = retrieved[request_id]
        print(f"\nQuestion {number}: {question.text}")
        print(f"  retrieved at the prompt's end (position {found['position']:,}), ", end="")
        print(f"{len(found['chunk_ids'])} of {found['eligible']} chunks outside the window:")
        for score, chunk in sorted(zip(found["scores"], found["chunk_ids"], strict=True), reverse=True):
            first = chunk * size
            text = tokenizer.decode(question.token_ids[first : first + size], skip_special_tokens=True)
            passage = " ".join(text.split())[:150]
            print(f"    chunk {chunk:3}, tokens {first:,}-{first + size - 1:,}, score {score:.3f}")
            print(textwrap.fill(passage + " …", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8))
        print(textwrap.fill(f"  answer: {question.answer.strip()}", WIDTH, subsequent_indent=" " * 10))
        elapsed = question.last_token_at - question.first_token_at
        speed = f", then {(question.num_tokens - 1) / elapsed:.1f} tokens/s" if elapsed > 0 else ""
        beside = " (beside the other prompts)" if question.first_token_at < run.prompt_seconds else ""
        print(f"  {question.num_tokens} tokens, the first after {question.first_token_at:.1f} s{speed}{beside}")


def print_keys(run: Run) -> None:
    """What was said to the questions for keys, with memory and without."""
    num_right, num_asked = {True: 0, False: 0}, {True: 0, False: 0}
    print("\nKeys: numbers that were written into the text")
    for question in run.questions.values():
        if (key := question.key) is None:
            continue
        if question.with_memory:
            distance = len(question.token_ids) - key.place
            print(f"  the {key.name} is {key.number}: at token {key.place:,}, {distance:,} before the question")
        digits = re.search(r"\d+", question.answer)
        is_right = digits is not None and digits.group() == key.number
        num_right[question.with_memory] += is_right
        num_asked[question.with_memory] += 1
        memory = "with memory" if question.with_memory else "without"
        print(f"    {memory:<12}{question.answer.strip()!r} ({'right' if is_right else 'wrong'})")
    print(f"  right: with memory {num_right[True]} of {num_asked[True]}, ", end="")
    print(f"without {num_right[False]} of {num_asked[False]}")


def print_measurements(run: Run, config: MemLongConfig) -> None:
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * run.itemsize  # A token in one layer.
    slot_bytes = config.memory.chunk_size * kv_bytes
    cache, bank = run.peak_blocks * run.block_bytes, run.peak_slots * slot_bytes
    full = config.num_hidden_layers * run.peak_tokens * kv_bytes
    rows = [
        ("KV cache", cache, f"{run.peak_blocks} blocks of {run.block_bytes / MIB:.2f} MiB (all layers)"),
        ("memory bank", bank, f"{run.peak_slots} chunks of {slot_bytes / MIB:.2f} MiB (one layer)"),
        ("both", cache + bank, f"{(cache + bank) / full:.1%} of the next line"),
        ("full attention", full, f"KV of {run.peak_tokens:,} tokens in {config.num_hidden_layers} layers (computed)"),
    ]
    print(f"\nThe run: {len(run.questions)} sequences in one batch; memory at its peak")
    for name, num_bytes, note in rows:
        print(f"  {name:<16}{num_bytes / MIB:>9,.1f} MiB        {note}")
    num_prompt_tokens = sum(len(question.token_ids) for question in run.questions.values()) - run.shared_tokens
    print(f"  {'prefill':<16}{num_prompt_tokens / run.prompt_seconds:>9,.0f} tokens/s", end="")
    print(f"   {num_prompt_tokens:,} tokens in {run.prompt_seconds:.1f} s, embedding and retrieval included")
    print(f"  {'':<35}and {run.shared_tokens:,} tokens taken over from earlier prompts")
    if run.decode_seconds > 0:
        print(f"  {'decode':<16}{run.decode_tokens / run.decode_seconds:>9,.0f} tokens/s", end="")
        print(f"   {run.decode_tokens} tokens after the last prompt was computed")


def print_gate_note(checkpoint: Path, config: MemLongConfig) -> None:
    if config.memory.fusion == "gated" and gates_are_zero(checkpoint):
        note = (
            "Note: every memory gate of this checkpoint is zero, as conversion leaves them. What is "
            "retrieved is attended to with weight 0, so the answers come from the last "
            f"{config.memory.local_window:,} tokens alone until trained gates (an adapter) are loaded."
        )
        print("\n" + textwrap.fill(note, WIDTH))
