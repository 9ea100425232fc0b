"""Tables of ``paper_scale.py``'s results."""

from __future__ import annotations

from typing import Any

from memlong_vllm.config import GIB
from memlong_vllm.evaluation.reports import markdown_table

ACCOUNTING, RUN = "accounting", "run"


def accounting_tables(content: dict[str, Any]) -> str:
    """Sequences at once by model and variant, and what was run at this shape."""
    rows = content["rows"]
    lines = [_line(row) for row in rows if row["workload"] == ACCOUNTING]
    header = ["model", "way to attend", "memory", "weights", "KV, decoding", "bank", "on", "sequences", "limited by"]
    parts = [_title(content["settings"]), markdown_table(header, lines)]
    runs = [row for row in rows if row["workload"] == RUN]
    if runs:
        header = ["run here", "prefill tokens/s", "decode tokens/s", "peak RSS"]
        parts.append(markdown_table(header, [_run_line(row) for row in runs]))
    return "\n".join(parts)


def _title(settings: dict[str, Any]) -> str:
    return (
        f"Sequences of {settings['context']:,} tokens at once on a card of {settings['card_gib']:g} GiB, computed by "
        f"`memlong_vllm.capacity` (the reserve for activations is its estimate; host memory "
        f"{settings['host_gib']:g} GiB)\n"
    )


def _line(row: dict[str, Any]) -> list[str]:
    sequence = row["sequence"]
    place = "host" if "bank, host" in sequence else "card" if "bank" in sequence else ""
    bank = sequence.get("bank", sequence.get("bank, host"))
    return [
        row["model"],
        row["variant"],
        "" if row["memory_size"] is None else f"{row['memory_size']:,}",
        _gib(row["device"]["weights"]),
        _gib(sequence["KV in decode"]),
        "" if bank is None else _gib(bank),
        place,
        str(row["sequences"]),
        row["limited_by"],
    ]


def _run_line(row: dict[str, Any]) -> list[str]:
    name = f"{row['model']}, {row['length']:,} x {row['batch']}"
    if "skipped" in row:
        return [name, row["skipped"], "", ""]
    decode = row["decode_tokens_per_s"]
    return [
        name,
        f"{row['prefill_tokens_per_s']:.3g}",
        "" if decode is None else f"{decode:.3g}",
        _gib(row["peak_rss_bytes"]),
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
