"""Serve a checkpoint with vLLM's OpenAI-compatible server, ask it in three ways, stop it.

    python examples/serve_and_query.py [CHECKPOINT]
    python examples/serve_and_query.py --base-url http://127.0.0.1:8000/v1    (a server that runs already)

Needs the package ``openai``. Without CHECKPOINT, the demo checkpoint is served.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

from memlong_vllm.demo_model import demo_checkpoint

NOVEL = Path(__file__).parent / "data" / "doyle_lost_world.txt"
START_TIMEOUT_S = 600


@contextmanager
def serve(checkpoint: str) -> Iterator[str]:
    """Run ``vllm serve`` on a free loopback port; yields the base URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]  # The command vllm, of this environment.
    options = ["--host", "127.0.0.1", "--port", str(port), "--trust-remote-code", "--served-model-name", "memlong"]
    # For a CPU; the key-value cache holds windows only, so it can be small.
    options += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
    options += ["--disable-uvicorn-access-log"]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    server = subprocess.Popen([*vllm, "serve", checkpoint, *options], env=environment, start_new_session=True)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_healthy(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server was not healthy after {START_TIMEOUT_S} s")


def query(base_url: str) -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    text = NOVEL.read_text()[:30_000]

    completion = client.completions.create(model=model, prompt=text, max_tokens=24, temperature=0)
    print(f"completion after {completion.usage.prompt_tokens} tokens: {completion.choices[0].text!r}")

    messages = [{"role": "user", "content": f"{text}\n\nWho tells this story? Answer in one sentence."}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    print(f"chat about {chat.usage.prompt_tokens} tokens: {chat.choices[0].message.content!r}")

    print("streamed: ", end="")
    for event in client.completions.create(model=model, prompt=text, max_tokens=24, temperature=0, stream=True):
        print(event.choices[0].text, end="|", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="checkpoint folder (default: the demo checkpoint)")
    parser.add_argument("--base-url", help="of a running server, instead of starting one")
    arguments = parser.parse_args()
    if arguments.base_url:
        query(arguments.base_url)
        return
    with serve(arguments.checkpoint or str(demo_checkpoint())) as base_url:
        query(base_url)
    print("server stopped")


if __name__ == "__main__":
    main()
