"""A results file that is written whole, with a summary."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write_result(output: Path, settings: dict[str, Any], rows: list[dict[str, Any]], summary: Any) -> None:
    """The file under ``benchmarks/results``: what was run, where, every measurement (one a line), and
    the summary, which is printed as well."""
    save_result(output, settings, rows, summary)
    print(json.dumps(summary, indent=2))


def save_result(output: Path, settings: dict[str, Any], rows: list[dict[str, Any]], summary: Any) -> None:
    """The file alone, for instance after every row."""
    result = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("memlong-vllm", "vllm", "torch", "transformers")},
        # The load includes the benchmark's own.
        "machine": {"cores": os.cpu_count(), "load_at_the_end": os.getloadavg()},
        "settings": settings,
        "summary": summary,
        "rows": [],
    }
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2).replace('"rows": []', f'"rows": [\n    {lines}\n  ]') + "\n")
