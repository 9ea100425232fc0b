"""Answer a question about several documents in one batch, offline.

    python examples/offline_batch.py [CHECKPOINT] [DOCUMENT ...]

Without arguments: the demo checkpoint, and two parts of a novel, each far longer than the window.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from memlong_vllm.demo_model import demo_checkpoint

NOVEL = Path(__file__).parent / "data" / "doyle_lost_world.txt"


def main() -> None:
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else str(demo_checkpoint())
    documents = [Path(name).read_text() for name in sys.argv[2:]]
    if not documents:
        novel = NOVEL.read_text()
        documents = [novel[:20_000], novel[100_000:130_000]]
    # float32 and eager suit a CPU. The key-value cache holds windows only, so it can be small.
    llm = LLM(model=checkpoint, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 30)
    prompts = [f"{document}\n\nThe main characters of this story are" for document in documents]
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32)):
        print(f"{len(output.prompt_token_ids):6} tokens … {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file.
    main()
