"""Engines in processes of their own, asked by a benchmark, and how a request is timed in one.

A benchmark's script is both sides: started as ``script.py --serve-measurements MODEL SETTINGS`` it
runs an engine and answers each line of standard input, a JSON object, with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "examples" / "data" / "doyle_lost_world.txt"
SERVE = "--serve-measurements"


class EngineProcess:
    """One engine; measures on request.

    Args:
        script: the benchmark, which calls :func:`serve` if :func:`is_engine_process`.
        settings: of ``vllm.LLM``.
    """

    def __init__(self, script: str, model: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, script, SERVE, str(model), json.dumps(settings)]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have one measurement made. Blocks, so that engines take turns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the engine's process ended; its messages are above")

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def is_engine_process() -> bool:
    return sys.argv[1:2] == [SERVE]


def serve(prepare: Callable[[Any], Callable[..., dict[str, Any]]]) -> None:
    """Run the engine this process was started for.

    Args:
        prepare: gets the ``vllm.LLM``, returns what answers a request's fields with a measurement.
    """
    from vllm import LLM

    answer = prepare(LLM(model=sys.argv[2], **json.loads(sys.argv[3])))
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


# Inside an engine's process.


@dataclass
class Answer:
    """What one request got, and when. Times are seconds since its batch was added.

    Attributes:
        num_cached: prompt tokens that were not computed.
        logprobs: of every token of the completion, {token id: log-probability} of the likeliest.
    """

    first_token_s: float = 0.0
    num_cached: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Batch:
    """What a batch of requests got.

    Attributes:
        answers: in the order of the prompts.
        prompts_s: until every request had its first token; ``total_s``: until the last token.
        num_decoded: tokens that came after ``prompts_s``.
    """

    answers: list[Answer]
    prompts_s: float = 0.0
    total_s: float = 0.0
    num_decoded: int = 0


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def tokens_of(llm: Any) -> list[int]:
    """The example text."""
    return llm.get_tokenizer()(DOCUMENT.read_text(encoding="utf-8"))["input_ids"]


def generate(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    after_prompts: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> Batch:
    """Answer all prompts in one batch, greedily, step by step.

    Args:
        after_prompts: called once, when every request has its first token.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **sampling)
    engine, batch = llm.llm_engine, Batch([Answer() for _ in prompts])
    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), {"prompt_token_ids": prompt}, parameters)
    has_prompts = False
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter() - began
        for output in outputs:
            answer, completion = batch.answers[int(output.request_id)], output.outputs[0]
            batch.num_decoded += (len(completion.token_ids) - len(answer.token_ids)) * has_prompts
            answer.first_token_s = answer.first_token_s or now
            answer.num_cached = output.num_cached_tokens or 0
            answer.token_ids = list(completion.token_ids)
            answer.logprobs = [{t: e.logprob for t, e in entry.items()} for entry in completion.logprobs or ()]
        batch.total_s = now
        if not has_prompts and all(answer.token_ids for answer in batch.answers):
            has_prompts, batch.prompts_s = True, now
            after_prompts()
    return batch


@dataclass(frozen=True)
class EmbedderCall:
    texts: list[str]
    seconds: float


def observe_embedder(llm: Any) -> list[EmbedderCall]:
    """The calls of a MemLong engine's embedder from now on, as they come."""
    calls: list[EmbedderCall] = []
    embedder = scheduler_of(llm)._service._embedder
    embed = embedder.embed

    def embed_and_note(texts: list[str]) -> Any:
        began = time.perf_counter()
        vectors = embed(texts)
        calls.append(EmbedderCall(list(texts), time.perf_counter() - began))
        return vectors

    embedder.embed = embed_and_note
    return calls


# Results.


def write_result(output: Path, settings: dict[str, Any], rows: list[dict[str, Any]], summary: Any) -> None:
    """The file under ``benchmarks/results``: what was run, where, every measurement (one a line), and
    the summary."""
    result = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("memlong-vllm", "vllm", "torch", "transformers")},
        # The load includes the benchmark's own; above the number of cores, others were at work.
        "machine": {"cores": os.cpu_count(), "load_at_the_end": os.getloadavg()},
        "settings": settings,
        "summary": summary,
        "rows": [],
    }
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2).replace('"rows": []', f'"rows": [\n    {lines}\n  ]') + "\n")
    print(json.dumps(summary, indent=2))
