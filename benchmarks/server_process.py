"""A real server, ``vllm serve``, and the load that ``vllm bench serve`` puts on it over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from engine_process import EngineError

VLLM = Path(sys.executable).parent / "vllm"
START_S = 900
MODEL_NAME = "benchmark"
# Settings of vllm.LLM that are options of the server with a value; the rest is told apart below.
VALUES = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "kv_cache_dtype")
# Of the client's results; times in ms.
MEASURED = {
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_token_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "duration_s": "duration",
    "completed": "completed",
}


def options(settings: dict[str, Any]) -> list[str]:
    """The server's command line for settings of ``vllm.LLM``."""
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if name in VALUES:
            words += [option, str(value)]
        elif isinstance(value, dict):
            words += [option, json.dumps(value)]
        elif isinstance(value, bool):
            words.append(option if value else "--no-" + option.removeprefix("--"))
        else:
            raise ValueError(f"the setting {name} has no option")
    return words


class ServerProcess:
    """A server that answers a benchmark's requests, in the place of an
    :class:`engine_process.EngineProcess`.

    Raises:
        EngineError: if it does not start.
    """

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._model = model
        self.facts: dict[str, Any] = {"server": "vllm serve"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        command = [str(VLLM), "serve", str(model), "--trust-remote-code", "--served-model-name", MODEL_NAME]
        command += ["--host", "127.0.0.1", "--port", self._url.rpartition(":")[2], *options(settings)]
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        # All cores, as engines in a benchmark's own processes have them: by itself a server keeps one free.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores} | environment | {"VLLM_LOGGING_LEVEL": "ERROR"}
        self.facts["cores"] = environment["VLLM_CPU_OMP_THREADS_BIND"]
        self._process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self._url}/health", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        self._log.seek(0)
        raise EngineError(f"the server did not start: {' '.join(self._log.read()[-400:].split())}")

    def ask(self, prompts: Sequence[str], max_tokens: int, request_rate: float, seed: int) -> dict[str, Any]:
        """Have the client send prompts, at ``request_rate`` a second on average (Poisson arrivals).

        Raises:
            EngineError: if the client fails, or not every request was answered.
        """
        with tempfile.TemporaryDirectory() as folder:
            dataset = Path(folder) / "prompts.jsonl"
            dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            command = [str(VLLM), "bench", "serve", "--backend", "openai", "--base-url", self._url]
            command += ["--endpoint", "/v1/completions", "--model", MODEL_NAME, "--tokenizer", str(self._model)]
            command += ["--dataset-name", "custom", "--dataset-path", str(dataset), "--skip-chat-template"]
            command += ["--disable-shuffle", "--custom-output-len", str(max_tokens), "--ignore-eos"]
            command += ["--num-prompts", str(len(prompts)), "--request-rate", str(request_rate), "--seed", str(seed)]
            command += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]
            command += ["--trust-remote-code", "--temperature", "0"]
            command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
            client = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if client.returncode:
                raise EngineError(f"vllm bench serve failed: {' '.join(client.stdout[-400:].split())}")
            found = json.loads((Path(folder) / "result.json").read_text())
        if found["completed"] != len(prompts):
            raise EngineError(f"only {found['completed']} of {len(prompts)} requests were answered")
        return {name: found[field] for name, field in MEASURED.items()}

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
