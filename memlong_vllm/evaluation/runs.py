"""How every evaluation runs: which models, which rows are missing, and one model after the other."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from tqdm import tqdm

from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model
from memlong_vllm.config import DeploymentConfig
from memlong_vllm.evaluation.models import BASELINES, ModelSpec, deployed, describe, model_specs
from memlong_vllm.evaluation.opening import check_heads, open_scorer
from memlong_vllm.evaluation.results import ResultsFile, Row
from memlong_vllm.evaluation.scoring import EvaluationError, Prompt, Scorer, ScorerSettings
from memlong_vllm.evaluation.variants import add_variant_arguments, check_memory_size, variant_specs

# Of the deployment's settings, those that mean something without an engine.
FOR_THE_REFERENCE = ("retriever_path", "retriever_device")
# What follows from the options, or is read by the run.
OF_THE_RUN = {"trace_file", "max_memory_size", "max_top_k"}


@dataclass(frozen=True)
class Item:
    """A row that is to be measured.

    Attributes:
        row: the fields that identify it, ``"model"`` among them.
        prompt: what is computed for it.
        expected: what only the task knows about it.
    """

    row: Row
    prompt: Prompt
    expected: Any = None


class Task(Protocol):
    """One kind of evaluation."""

    @property
    def command(self) -> str:
        """Its name on the command line and in results files."""
        ...

    @property
    def key(self) -> tuple[str, ...]:
        """Fields that tell a row from every other."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, what is generated included."""
        ...

    @property
    def extensible(self) -> tuple[str, ...]:
        """Settings that rows name, so that a file with others of them can be added to."""
        ...

    def settings(self) -> dict[str, Any]:
        """What was asked for, as JSON; rows of other settings are not mixed with these."""
        ...

    def items(self, spec: ModelSpec) -> Sequence[Item]:
        """Everything to measure of a model, what is measured already included."""
        ...

    def measure(self, scorer: Scorer, items: Sequence[Item]) -> list[Row]:
        """Measure some items together. Returns their rows, in order."""
        ...

    def line(self, row: Row) -> str:
        """A row for a person who waits."""
        ...


def comma_separated(text: str) -> list[int]:
    """An argument such as ``1024,2048``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1024,2048") from None
    if len(set(values)) < len(values) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} repeats a number or has a negative one")
    return values


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def json_file(text: str) -> Path:
    if Path(text).suffix != ".json":
        raise argparse.ArgumentTypeError(f"{text!r} must end with .json: a table and a plot are put beside it")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every evaluation has."""
    _add_model_arguments(parser)
    add_variant_arguments(parser)
    _add_memory_arguments(parser)
    _add_running_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=json_file, required=True, metavar="JSON", help="results; the same command again completes them"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="discard what is in --output, once there is something to put there"
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model", required=True, help="MemLong checkpoint: a folder, a hub name that was downloaded before, or 'demo'"
    )
    models.add_argument("--control", metavar="MODEL", help="the same training without memory; run with memory off")
    models.add_argument(
        "--baselines", nargs="+", choices=BASELINES, default=[], metavar="KIND",
        help="'full': the backbone with full attention, also past the length it was trained on; 'window': with "
        "the model's local window alone",
    )  # fmt: skip
    models.add_argument(
        "--backbone", metavar="MODEL",
        help="what baselines are made of, for example 'demo-base' (default: the model's own weights without memory "
        "parameters; name the true base if the model's other weights were trained as well)",
    )  # fmt: skip
    models.add_argument(
        "--random-retrieval", action="store_true", help="also run the model with as many chunks chosen by chance"
    )


def _add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--memory-sizes", type=comma_separated, metavar="N,…",
        help="tokens a sequence remembers; 0: memory off (default: 0 and the checkpoint's)",
    )  # fmt: skip
    memory.add_argument("--top-k", type=positive, metavar="N", help="chunks a retrieval takes (default: checkpoint's)")


def _add_running_arguments(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running")
    running.add_argument("--engine", choices=("vllm", "reference"), default="vllm")
    running.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: float32; with vLLM on a GPU, where some kernels take no float32, bfloat16",
    )  # fmt: skip
    running.add_argument("--max-model-len", type=positive, metavar="N", help="let sequences exceed the checkpoint's")
    running.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    running.add_argument(
        "--piece", type=positive, default=512, metavar="N",
        help="tokens computed at once, which bounds the memory for logits (default: 512)",
    )  # fmt: skip
    running.add_argument(
        "--memlong", type=json_object, default={}, metavar="JSON",
        help='more of additional_config["memlong"], for example \'{"bank_gib": 16}\'; with --engine reference what is '
        f"no matter of an engine: {', '.join(FOR_THE_REFERENCE)} and the checkpoint's settings",
    )  # fmt: skip


def specs_of(arguments: argparse.Namespace) -> list[ModelSpec]:
    """The models that the options name.

    Raises:
        EvaluationError, ModelArgumentError, MemoryConfigError: naming the option or setting.
    """
    check_memlong(arguments.engine, arguments.memlong)
    specs = model_specs(
        resolve_model(arguments.model),
        resolved("--control", arguments.control),
        arguments.baselines,
        resolved("--backbone", arguments.backbone),
        arguments.random_retrieval,
        arguments.memlong,
    )
    for varied in arguments.vary:
        if varied.key in arguments.memlong or (varied.key == "top_k" and arguments.top_k is not None):
            raise EvaluationError(f"--vary {varied.key} and another option that sets it for all models: drop either")
    checkpoints = [(label, resolved(f"--variant {label}", text)) for label, text in arguments.variant]
    variants = variant_specs(specs[0], arguments.vary, checkpoints, [spec.label for spec in specs])
    return specs + [deployed(spec, arguments.memlong) for spec in variants]


@overload
def resolved(option: str, text: None) -> None: ...
@overload
def resolved(option: str, text: str) -> Path: ...
def resolved(option: str, text: str | None) -> Path | None:
    """The folder of another model than ``--model``, which may be called all that that may.

    Raises:
        EvaluationError: naming the option.
    """
    try:
        return None if text is None else resolve_model(text)
    except ModelArgumentError as error:
        raise EvaluationError(f"{option} {error}") from error


def check_memlong(engine: str, memlong: dict[str, Any]) -> None:
    """Raises:
    EvaluationError: if ``--memlong`` has what the reference cannot apply, or what the run itself decides.
    """
    of_engines = {field.name for field in fields(DeploymentConfig)} - set(FOR_THE_REFERENCE)
    if engine == "reference" and (refused := sorted(of_engines & memlong.keys())):
        raise EvaluationError(
            f"--memlong {', '.join(refused)}: a matter of the engine, and --engine reference has none: leave it out"
        )
    if refused := sorted(OF_THE_RUN & memlong.keys()):
        raise EvaluationError(f"--memlong {', '.join(refused)}: the evaluation sets this itself: leave it out")


def memory_sizes_of(arguments: argparse.Namespace, main: ModelSpec) -> list[int]:
    """``--memory-sizes``, checked against the checkpoint."""
    block = main.config["memlong"]
    sizes = arguments.memory_sizes
    if sizes is None:
        return sorted({0, block["memory_size"]})
    for size in sizes:
        if size % block["chunk_size"]:
            raise EvaluationError(f"--memory-sizes {size} is no multiple of the chunk size ({block['chunk_size']})")
    return list(sizes)


def run_task(
    task: Task, arguments: argparse.Namespace, specs: Sequence[ModelSpec], sizes: Sequence[int]
) -> ResultsFile:
    """Measure what is missing in ``--output``.

    Raises:
        EvaluationError: before anything is computed or written, if a sequence is too long for a
            model, there is no such sequence, or the file is of another run.
    """
    for spec in specs:
        check_reach(spec, task.max_length, arguments.max_model_len)
        if arguments.engine == "vllm":
            check_heads(spec)
    check_memory_size(specs, max(sizes, default=0))
    dtype = arguments.dtype or default_dtype(arguments.engine)
    settings = task.settings() | {"engine": arguments.engine, "dtype": dtype, "memlong": arguments.memlong}
    settings |= {"memory_sizes": list(sizes), "top_k": arguments.top_k}
    descriptions = {spec.label: describe(spec) for spec in specs}
    items = [task.items(spec) for spec in specs]
    check_writable(arguments.output)
    results = ResultsFile(
        arguments.output, task.command, settings, descriptions, task.key, task.extensible, arguments.overwrite
    )
    with tempfile.TemporaryDirectory(prefix="memlong-evaluate-") as folder:
        how = ScorerSettings(
            engine=arguments.engine,
            dtype=dtype,
            # vLLM always generates a token, which is not computed any further.
            max_length=task.max_length + 1,
            scratch=Path(folder),
            memory_size=max(sizes, default=None),
            top_k=arguments.top_k,
            batch=arguments.batch,
            piece=arguments.piece,
            memlong=arguments.memlong,
        )
        for spec, of_model in zip(specs, items, strict=True):
            _run_model(task, spec, of_model, how, results)
    return results


def check_writable(output: Path) -> None:
    """Raises:
    EvaluationError: if results cannot be put there, before hours went into them.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name}."):
            pass
    except OSError as error:
        raise EvaluationError(f"--output {output}: cannot be written there: {error}") from error


def default_dtype(engine: str) -> str:
    """What numbers are compared in, unless said otherwise."""
    return "bfloat16" if engine == "vllm" and torch.cuda.is_available() else "float32"


def check_reach(spec: ModelSpec, length: int, allowed: int | None) -> None:
    """Raises:
    EvaluationError: if sequences are longer than the checkpoint says, and nobody allowed it.
    """
    # Baselines are measured past the length they were trained on: that is what they are for.
    if spec.kind == "memlong" and length > max(spec.reach, allowed or 0):
        raise EvaluationError(
            f"sequences of {length} tokens are longer than the {spec.reach} of '{spec.label}' ({spec.source}): add "
            f"--max-model-len {length}, or convert with --max-length {length}"
        )


def _run_model(task: Task, spec: ModelSpec, items: Sequence[Item], how: ScorerSettings, results: ResultsFile) -> None:
    missing = [item for item in items if not results.has(item.row)]
    if len(missing) < len(items):
        print(f"{spec.label}: {len(items) - len(missing)} of {len(items)} rows are in {results.path} already")
    if not missing:
        return
    with open_scorer(spec, how) as scorer, tqdm(total=len(missing), desc=spec.label, unit="row") as bar:
        try:
            for start in range(0, len(missing), how.batch):
                batch = missing[start : start + how.batch]
                began = time.perf_counter()
                rows = task.measure(scorer, batch)
                seconds = round((time.perf_counter() - began) / len(batch), 3)
                results.append([row | {"seconds": seconds} for row in rows])
                for row in rows:
                    bar.write(task.line(row))
                bar.update(len(batch))
        finally:
            results.flush()
