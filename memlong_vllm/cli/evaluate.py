"""``memlong-vllm evaluate``: what memory is worth, measured."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from memlong_vllm.cli.model_argument import ModelArgumentError
from memlong_vllm.config import MemoryConfigError
from memlong_vllm.evaluation.reports import write_report
from memlong_vllm.evaluation.scoring import EvaluationError
from memlong_vllm.retriever.embedder import RetrieverLoadError

COMMANDS = {
    "perplexity": "of the end of long texts, against how much of them came before",
    "recall": "of keys and numbers hidden in long prose, by length and depth",
    "ablation": "perplexities of variants of a checkpoint: other settings, other checkpoints",
    "icl": "of classifying sentences, with demonstrations in memory, in prompts or retrieved into them",
    "render": "make table and plot again from a results file",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="evaluation", required=True)
    chosen = next((word for word in sys.argv[2:] if word in COMMANDS), None)
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        if name == "render":
            command.add_argument("results", type=Path, metavar="JSON")
        elif name == chosen:  # Import one command's needs only.
            module = importlib.import_module(f"memlong_vllm.evaluation.{name}")
            module.add_arguments(command)
            command.set_defaults(evaluate=module.run)


def run(arguments: argparse.Namespace) -> int:
    try:
        is_render = arguments.evaluation == "render"
        path = arguments.results if is_render else arguments.evaluate(arguments).path
        written = write_report(path)
    except (EvaluationError, ModelArgumentError, MemoryConfigError, RetrieverLoadError) as error:
        print(f"memlong-vllm evaluate {arguments.evaluation}: {error}", file=sys.stderr)
        return 2
    print("written:", *([] if is_render else [path]), *written)
    return 0
