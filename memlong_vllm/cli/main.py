"""The console script ``memlong-vllm``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "adapter": "look at what fine-tuning learned; exchange it with the PEFT library",
    "convert": "make a MemLong checkpoint from a local Llama model",
    "demo": "serve a novel with a small real model and ask it questions",
    "evaluate": "measure perplexity, recall and learning in context of a checkpoint, and ablate it",
    "finetune": "train what reads from memory, and write it as an adapter",
    "memory": "list, import, export and delete named memories",
    "plan": "say how many sequences of a length a card can serve",
    "probe": "find the layers of a backbone that copy, and which to store and to read",
}


EXTRAS = {"finetune": "train"}
"""Which of the package's optional dependencies a command cannot do without."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="memlong-vllm", description="MemLong inside vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = sys.argv[1] if len(sys.argv) > 1 else None
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description)
        if name == chosen:  # Import one command's needs only.
            try:
                module = importlib.import_module(f"memlong_vllm.cli.{name}")
            except ModuleNotFoundError as error:
                if name not in EXTRAS:
                    raise
                needed = f"pip install 'memlong-vllm[{EXTRAS[name]}]'"
                print(f"memlong-vllm {name}: the package {error.name!r} is missing: {needed}", file=sys.stderr)
                return 2
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
