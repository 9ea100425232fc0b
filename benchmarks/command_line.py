"""The options that the benchmarks of several engines have in common."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from cells import Cell, Size, parse_size
from contenders import AUTHORS, DTYPE_BYTES, FP8, FULL, MEMLONG, TITLES, WINDOW, Contenders, Options
from interleaved import InterleavedRun, MeasureCell, Turns
from measurement_file import MeasurementFile, available_bytes

from memlong_vllm.config import GIB
from memlong_vllm.demo_model import demo_checkpoint

ALL = (MEMLONG, WINDOW, FULL, FP8, AUTHORS)


def parser(description: str | None, engines: Sequence[str] = ALL) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, help="MemLong checkpoint; the demo model by default")
    made.add_argument("--engines", nargs="+", choices=TITLES, default=list(engines))
    made.add_argument("--lengths", type=int, nargs="+", help="tokens of each prompt")
    made.add_argument("--batches", type=int, nargs="+", help="requests at once; with every length")
    made.add_argument("--cells", type=parse_size, nargs="+", metavar="LxB", help="single combinations instead")
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--fewer", type=_count, nargs="*", default=[], metavar="ENGINE=N", help="repetitions of some")
    made.add_argument("--limit-s", type=float, default=900, help="leave out measurements that would take longer")
    made.add_argument("--retry", action="store_true", help="try again what was skipped")
    made.add_argument("--dtype", choices=DTYPE_BYTES, default="float32")
    made.add_argument("--compiled", action="store_true", help="without enforce_eager")
    made.add_argument("--step-tokens", type=int, default=2048, help="max_num_batched_tokens")
    made.add_argument("--kv-gib", type=float, default=3, help="each engine's KV cache (and bank) at most")
    made.add_argument("--memlong", type=json.loads, default={}, help="deployment settings of MemLong, JSON")
    made.add_argument("--output", type=Path, required=True, help="results; an unfinished run is gone on with")
    made.add_argument("--overwrite", action="store_true", help="begin anew")
    return made


def _count(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in TITLES or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=N with one of {', '.join(TITLES)}")
    return name, int(number)


def cells_of(arguments: argparse.Namespace, answers: dict[str, int], default: dict[str, Sequence[Size]]) -> list[Cell]:
    """The cells that the command line asks for, small ones first.

    Args:
        answers: by workload, the tokens of each answer; cells are made of these workloads.
        default: by workload, the sizes if none are asked for.
    """
    asked = arguments.cells
    if arguments.lengths and arguments.batches:
        asked = list(product(arguments.lengths, arguments.batches))
    elif arguments.lengths or arguments.batches:
        raise SystemExit("--lengths and --batches go together; or use --cells")
    cells = [Cell(name, *size, answers[name]) for name in answers for size in asked or default[name]]
    return sorted(cells, key=lambda cell: cell.length * cell.batch)


def run(
    benchmark: str,
    arguments: argparse.Namespace,
    cells: Sequence[Cell],
    measure: MeasureCell,
    kind: type[Contenders] = Contenders,
    **settings: Any,
) -> MeasurementFile:
    """Make all measurements that are missing in ``--output``.

    Args:
        kind: how the contenders are started.
        settings: of this benchmark; a file of other settings is refused.
    """
    checkpoint = arguments.model or demo_checkpoint()
    options = Options(
        dtype=arguments.dtype,
        enforce_eager=not arguments.compiled,
        max_num_batched_tokens=arguments.step_tokens,
        kv_bytes=int(arguments.kv_gib * GIB),
        memlong=arguments.memlong,
    )
    turns = Turns(arguments.repetitions, dict(arguments.fewer), arguments.limit_s, arguments.retry)
    common = {"dtype": options.dtype, "enforce_eager": options.enforce_eager, "kv_gib": arguments.kv_gib}
    common |= {"step_tokens": arguments.step_tokens, "memlong": arguments.memlong}
    with tempfile.TemporaryDirectory() as folder:
        contenders = kind(checkpoint, Path(folder), arguments.engines, cells, options)
        contenders.check_memory(available_bytes())
        described = contenders.describe()
        file = MeasurementFile(arguments.output, benchmark, common | settings, described, arguments.overwrite)
        InterleavedRun(file, contenders, measure, turns).run(cells)
    return file
