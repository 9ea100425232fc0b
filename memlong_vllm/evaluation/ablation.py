"""What the choices that went into a model are worth: variants of it, measured by perplexity (section 4.4)."""

from __future__ import annotations

import argparse
from dataclasses import replace

from memlong_vllm.evaluation import perplexity
from memlong_vllm.evaluation.results import ResultsFile
from memlong_vllm.evaluation.runs import memory_sizes_of, run_task, specs_of
from memlong_vllm.evaluation.scoring import EvaluationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    perplexity.add_arguments(parser)


def run(arguments: argparse.Namespace) -> ResultsFile:
    """The rows are those of ``evaluate perplexity``; the report is another.

    Raises:
        EvaluationError: naming an option.
    """
    specs = specs_of(arguments)
    sizes = memory_sizes_of(arguments, specs[0])
    if sum(len(spec.memory_sizes(sizes)) for spec in specs) == 1:
        raise EvaluationError(
            "there is nothing to compare: add --vary, --variant, --random-retrieval or more --memory-sizes"
        )
    task = replace(perplexity.task_of(arguments, specs[0], sizes), command="ablation")
    return run_task(task, arguments, specs, sizes)
