"""Requests over HTTP that come one after another: ``vllm bench serve`` against real servers.

    python benchmarks/online.py --output benchmarks/results/online.json

Every contender is a ``vllm serve`` of its own. The client, vLLM's own, sends prompts of a novel at
random times, ``--rate`` a second on average. A cell's batch is the number of requests.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import command_line
from cells import Cell
from contenders import AUTHORS, WARM_UP_ANSWER, Contenders
from example_text import DOCUMENT, STRIDE
from server_process import ServerProcess

from memlong_vllm.evaluation.models import load_tokenizer

SIZES = [(4096, 10)]
# Of the tokenizer's margin: prompts are cut by their tokens, and may be cut otherwise as text.
SPARE_TOKENS = 64


class ServedContenders(Contenders):
    """The contenders behind servers."""

    def why_not(self, name: str, cell: Cell) -> str | None:
        if name == AUTHORS:
            return "it is no server"
        return super().why_not(name, cell)

    def start(self, name: str) -> Any:
        return ServerProcess(self.model(name), self.settings(name))

    def warm_up(self, name: str, engine: Any) -> None:
        text = Prompts.of(self.model(name)).warm_up(self.warm_up_tokens(name) - SPARE_TOKENS)
        engine.ask(prompts=[text], max_tokens=WARM_UP_ANSWER, request_rate=1.0, seed=0)


class Prompts:
    """Stretches of the novel, as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokenizer(DOCUMENT.read_text(encoding="utf-8"))["input_ids"]

    @staticmethod
    @functools.cache
    def of(model: Path) -> Prompts:
        return Prompts(load_tokenizer(model))

    def texts(self, number: int, length: int, first: int, label: str) -> list[str]:
        """``number`` texts of about ``length`` tokens, others for every ``first``. Those of different labels share no
        prefix."""
        room = max(1, len(self._tokens) - length)
        starts = [(first + row) * STRIDE % room for row in range(number)]
        bodies = [self._tokenizer.decode(self._tokens[start : start + length]) for start in starts]
        return [f"{label}, {row}. {body}" for row, body in enumerate(bodies)]

    def warm_up(self, length: int) -> str:
        return self._tokenizer.decode(self._tokens[:length])


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--rate", type=float, default=0.04, help="requests a second; what the slowest can just serve")
    parser.set_defaults(repetitions=2)
    arguments = parser.parse_args()
    cells = command_line.cells_of(arguments, {"online": arguments.answer + SPARE_TOKENS}, {"online": SIZES})
    prompts = Prompts.of(arguments.model or command_line.demo_checkpoint())

    def measure(name: str, server: Any, cell: Cell, repetition: int) -> dict[str, Any]:
        texts = prompts.texts(cell.batch, cell.length, repetition * cell.batch, f"{cell}, {repetition}")
        return server.ask(prompts=texts, max_tokens=arguments.answer, request_rate=arguments.rate, seed=repetition)

    command_line.run(
        "online", arguments, cells, measure, ServedContenders, answer=arguments.answer, rate=arguments.rate
    )


if __name__ == "__main__":
    main()
