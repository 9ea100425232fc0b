"""Run as a program: serve a checkpoint in a set-up that needs a process of its own, and print how
far log-probabilities are from the reference. See test_engine_processes.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def use_v2_runner() -> None:
    """vLLM's V2 runner on a CPU: Triton's interpreter behind a backend that claims to be there.
    Must come before anything of vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None)


def check_output(output: Any, reference: Any) -> dict[str, Any]:
    """How far a request's log-probabilities are from the reference's, with memory and without."""
    from tests.engines import logprobs_of

    assert output.outputs[0].finish_reason == "length"
    tokens, measured = logprobs_of(output)
    prompt_len = len(output.prompt_token_ids)
    logits = reference.logits(tokens, prompt_len)
    expected = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    without = reference.logprobs(tokens, prompt_len, with_memory=False)
    assert tokens[prompt_len:] == logits.argmax(-1)[prompt_len - 1 : -1].tolist()
    return {"with": (measured - expected).abs().max().item(), "without": (measured - without).abs().max().item()}


def check_sharing(engine: Any, reference: Any, tokens: list[int]) -> list[dict[str, float]]:
    """A request that takes over a prefix, and one that reads what another wrote."""
    import torch

    text, options = tokens[:300], {"prompt_logprobs": None}
    engine.add(text, max_tokens=1, extra_args={"memory_write": "book"}, **options)
    engine.run()
    hit = engine.add(text + tokens[400:430], max_tokens=20, **options)
    read = engine.add(tokens[600:650], max_tokens=20, extra_args={"memory_read": "book"}, **options)
    outputs = engine.run()
    assert outputs[hit].num_cached_tokens >= 256
    rows = []
    for request, named in ((hit, []), (read, [reference.memorize(text)])):
        prompt, completion = outputs[request].prompt_token_ids, outputs[request].outputs[0]
        answer = list(completion.token_ids)
        assert len(answer) == 20
        entries = zip(completion.logprobs, answer, strict=True)
        measured = torch.tensor([entry[token].logprob for entry, token in entries])
        row = {}
        for key, with_memory in (("with", True), ("without", False)):
            logits = reference.logits(prompt + answer, len(prompt), with_memory, named=named if with_memory else [])
            expected = logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]
            row[key] = (measured - expected).abs().max().item()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--v2", action="store_true")
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    if arguments.v2:
        use_v2_runner()
    # Only now: the modules below import vLLM.
    from tests.buffer_watch import BufferWatch
    from tests.checkpoints import novel
    from tests.engines import Engine, Reference

    trace = Path(os.environ["TRACE_FILE"])
    engine = Engine(arguments.model, trace, **arguments.options)
    tokenizer = engine.llm.get_tokenizer()
    tokens = tokenizer(novel()[3000:30000])["input_ids"]
    in_process = hasattr(engine.llm.llm_engine.engine_core, "engine_core")
    if in_process:
        runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        watch = BufferWatch(runner.get_model())
    for prompt in (tokens[:171], tokens[300:370], tokens[500:596]):
        engine.add(prompt, max_tokens=30)

    preempted: list[int] = []

    def preempt(step: int) -> None:
        if in_process and len(engine.scheduler.running) > 1 and step >= 15 and not preempted:
            preempted.append(step)
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    outputs = engine.run(preempt)
    reference = Reference(arguments.model)
    rows = [check_output(output, reference) for output in outputs.values()]
    rows += check_sharing(engine, reference, tokenizer(novel()[30000:50000])["input_ids"])
    if in_process:
        assert preempted
        engine.assert_empty()
        counts = {"steps": watch.num_steps, "launches": watch.num_launches}
        rows.append({"runner": type(runner).__module__} | counts)
    engine.shutdown()
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
