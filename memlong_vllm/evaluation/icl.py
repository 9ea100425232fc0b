"""Learning in context from demonstrations that stand in memory only (section 4.3, Table 2)."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from memlong_vllm.config import MemLongConfig, resolve
from memlong_vllm.evaluation.demonstrations import SentenceRetriever
from memlong_vllm.evaluation.icl_cases import BESIDE, CONTENT_FREE, MEMORY, RAG, Case, CaseMaker, Demonstrations, Plan
from memlong_vllm.evaluation.labelled_sentences import TASKS, Wording, file_digest, held_out, read_examples
from memlong_vllm.evaluation.models import CONTROL, ModelSpec, load_tokenizer
from memlong_vllm.evaluation.results import ResultsFile, Row
from memlong_vllm.evaluation.runs import Item, add_run_arguments, comma_separated, positive, run_task, specs_of
from memlong_vllm.evaluation.scoring import EvaluationError, MemoryUse, Prompt, Scorer
from memlong_vllm.retriever.embedder import load_embedder


@dataclass
class Desk:
    """What the scorer at work has in its memory, and what it said to sentences that say nothing."""

    scorer: Scorer | None = None
    memory: str | None = None
    content_free: dict[tuple[str | None, tuple[int, ...]], np.ndarray] = field(default_factory=dict)

    def lay_out(self, scorer: Scorer, memory: Demonstrations | None) -> None:
        """Memorise what is to be read; the memory before it is not needed any more."""
        if scorer is not self.scorer:
            self.scorer, self.memory = scorer, None
            self.content_free.clear()
        name = None if memory is None else memory.name
        if name == self.memory:
            return
        if self.memory is not None:
            scorer.forget(self.memory)
        self.memory = name
        if memory is not None:
            scorer.memorize(memory.name, [memory.token_ids])


@dataclass(frozen=True)
class InContextLearning:
    """The task.

    Attributes:
        described: what was asked for, as JSON.
        label_ids: first tokens of the labels' words.
    """

    cases: list[Case]
    words: tuple[str, ...]
    label_ids: list[int]
    described: dict[str, Any]
    top_k: int | None
    desk: Desk = field(default_factory=Desk)
    command: str = "icl"
    key: tuple[str, ...] = ("model", "method", "shots", "memory_shots", "seed", "example")
    extensible: tuple[str, ...] = ()

    @property
    def max_length(self) -> int:
        lengths = [max(len(case.prompt), len(case.content_free or ())) for case in self.cases]
        # A memory longer than the model takes at once would be cut, and its parts not know each other.
        return max(lengths + [len(case.memory.token_ids) for case in self.cases if case.memory is not None])

    def settings(self) -> dict[str, Any]:
        return self.described

    def items(self, spec: ModelSpec) -> list[Item]:
        is_control = spec.label == CONTROL
        has_memory = spec.kind == "memlong" and not is_control
        items = []
        for case in self.cases:
            if case.memory is not None and not has_memory:
                continue
            if spec.random_retrieval and (
                case.memory is None or case.row["method"] != MEMORY or self.is_read_whole(spec, case.memory)
            ):
                continue
            read = () if case.memory is None else (case.memory.name,)
            size = 0 if is_control and spec.kind == "memlong" else None
            use = MemoryUse(size, self.top_k if has_memory else None, read)
            items.append(Item({"model": spec.label} | case.row, Prompt(case.prompt, use), case))
        return items

    def is_read_whole(self, spec: ModelSpec, memory: Demonstrations) -> bool:
        """Whether a retrieval takes all of a memory's chunks: then there is no choice that could be by chance."""
        block = spec.config["memlong"]
        return len(memory.token_ids) // int(block["chunk_size"]) <= (self.top_k or int(block["top_k"]))

    def measure(self, scorer: Scorer, items: Sequence[Item]) -> list[Row]:
        rows: list[Row] = []
        for _, group in groupby(items, key=lambda item: item.prompt.memory.read):
            together = list(group)
            self.desk.lay_out(scorer, together[0].expected.memory)
            scores = self._ask(scorer, [item.prompt for item in together])
            free = self._content_free(scorer, together)
            rows += [self._judge(*entry) for entry in zip(together, scores, free, strict=True)]
        return rows

    def _ask(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        return scorer.candidates(prompts, [self.label_ids] * len(prompts))

    def _content_free(self, scorer: Scorer, items: Iterable[Item]) -> list[np.ndarray | None]:
        """What each label gets without a sentence, after the same demonstrations."""
        found: list[np.ndarray | None] = []
        for item in items:
            token_ids = item.expected.content_free
            if token_ids is None:
                found.append(None)
                continue
            key = self.desk.memory, tuple(token_ids)
            if key not in self.desk.content_free:
                (self.desk.content_free[key],) = self._ask(scorer, [replace(item.prompt, token_ids=token_ids)])
            found.append(self.desk.content_free[key])
        return found

    def _judge(self, item: Item, scores: np.ndarray, content_free: np.ndarray | None) -> Row:
        predicted = int(scores.argmax())
        row = item.row | {"label": item.expected.label, "predicted": predicted, "scores": scores.round(4).tolist()}
        if content_free is not None:
            # Zhao et al. (2021): each probability by the one it has without a sentence.
            row |= {"calibrated": int((scores - content_free).argmax()), "content_free": content_free.round(4).tolist()}
        return row

    def line(self, row: Row) -> str:
        verdict = "right" if row["predicted"] == row["label"] else "wrong"
        where = f"{row['model']} {row['shots']}+{row['memory_shots']} {row['method']} seed {row['seed']}"
        return f"{where}, sentence {row['example']}: {self.words[row['predicted']]} {verdict}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=sorted(TASKS), required=True, help="how sentences and labels are worded")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE",
        help=".tsv with the columns sentence and label, or .csv with label and sentence; labels 0, 1, …",
    )  # fmt: skip
    parser.add_argument(
        "--train", type=Path, metavar="FILE", help="where demonstrations are from (default: every 4th of --data)"
    )
    parser.add_argument(
        "--shots", type=comma_separated, default=[0], metavar="N,…", help="demonstrations in prompts (default: 0)"
    )
    parser.add_argument(
        "--memory-shots", type=comma_separated, default=[0, 4, 18], metavar="N,…",
        help="more demonstrations, in memory; 0 is always run, as what others are compared with (default: 0,4,18)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="draws of demonstrations (default: 5)")
    parser.add_argument("--limit", type=positive, metavar="N", help="sentences tested, drawn once (default: all)")
    parser.add_argument(
        "--beside", nargs="+", choices=BESIDE, default=[], metavar="KIND",
        help="'shuffled': also with the labels of the memory's demonstrations shuffled, which tells learning from a "
        "bias to some labels; 'prompt': with these demonstrations in the prompt; 'rag': with those of them in the "
        "prompt that are most like the sentence, by the memory's own retriever",
    )  # fmt: skip
    parser.add_argument("--rag-shots", type=positive, default=4, metavar="N", help="for 'rag' (default: 4)")
    parser.add_argument(
        "--calibrate", action="store_true",
        help=f"also judge by how much more probable a label is than after {CONTENT_FREE!r} instead of a sentence",
    )  # fmt: skip
    parser.add_argument("--label-words", metavar="WORD,…", help="of the labels 0, 1, … (default: the task's)")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> ResultsFile:
    """Raises:
    EvaluationError: naming an option.
    RetrieverLoadError: with ``--beside rag``, if there is no such retriever.
    """
    if arguments.memory_sizes is not None:
        raise EvaluationError("--memory-sizes: here it is --memory-shots that says what is in memory")
    if "memory_dir" in arguments.memlong:
        raise EvaluationError("--memlong memory_dir: memories of demonstrations must end with the run: leave it out")
    specs = specs_of(arguments)
    main = specs[0]
    wording = wording_of(arguments)
    plan = plan_of(arguments, wording)
    memory, deployment = resolve(MemLongConfig.from_pretrained(main.path), {"memlong": arguments.memlong})
    retriever = None
    if RAG in plan.beside and plan.memory_shots:
        embedder = load_embedder(memory.retriever, str(main.path), deployment.retriever_device)
        retriever = SentenceRetriever(embedder, memory.retriever.query_instruction)
    # Complete chunks for every model.
    chunk_size = math.lcm(*(spec.config["memlong"]["chunk_size"] for spec in specs if spec.kind == "memlong"))
    maker = CaseMaker(plan, wording, load_tokenizer(main.source), chunk_size, retriever)
    label_ids = maker.label_ids()
    described = settings_of(arguments, plan, wording) | {"memory_chunk": chunk_size}
    task = InContextLearning(list(maker.cases()), wording.words, label_ids, described, arguments.top_k)
    say_what_is_left_out(task, specs)
    return run_task(task, arguments, specs, [])


def say_what_is_left_out(task: InContextLearning, specs: Sequence[ModelSpec]) -> None:
    """Which memories are too small for a choice by chance."""
    for spec in specs:
        cases = [(case.row["memory_shots"], case.memory) for case in task.cases if case.memory is not None]
        whole = sorted({shots for shots, memory in cases if spec.random_retrieval and task.is_read_whole(spec, memory)})
        if whole:
            print(
                f"SKIPPED: {spec.label} with {', '.join(map(str, whole))} demonstrations in memory, where a retrieval "
                "takes all chunks: a lower --top-k leaves a choice",
                file=sys.stderr,
            )


def wording_of(arguments: argparse.Namespace) -> Wording:
    wording = TASKS[arguments.task]
    if arguments.label_words is None:
        return wording
    words = tuple(word.strip() for word in arguments.label_words.split(","))
    if len(words) != len(wording.words) or len(set(words)) < len(words) or not all(words):
        raise EvaluationError(f"--label-words {arguments.label_words}: needs {len(wording.words)} different words")
    return replace(wording, words=words)


def plan_of(arguments: argparse.Namespace, wording: Wording) -> Plan:
    """Read the files and choose what is tested."""
    num_labels = len(wording.words)
    examples = read_examples(arguments.data, "--data", num_labels)
    if arguments.train is None:
        tested, pool = held_out(examples)
    else:
        tested, pool = examples, read_examples(arguments.train, "--train", num_labels)
    # Nothing that is asked may be demonstrated.
    asked = {example.sentence for example in tested}
    pool = [example for example in pool if example.sentence not in asked]
    if arguments.limit is not None and arguments.limit < len(tested):
        tested = sorted(random.Random(0).sample(tested, arguments.limit), key=lambda example: example.number)
    return Plan(
        tested=tested,
        pool=pool,
        shots=sorted(arguments.shots),
        memory_shots=sorted(set(arguments.memory_shots) - {0}),
        beside=[kind for kind in BESIDE if kind in arguments.beside],
        num_retrieved=arguments.rag_shots,
        num_seeds=arguments.seeds,
        calibrate=arguments.calibrate,
    )


def settings_of(arguments: argparse.Namespace, plan: Plan, wording: Wording) -> dict[str, Any]:
    files = {"data": arguments.data, "train": arguments.train or arguments.data}
    return {
        "task": arguments.task,
        "files": {option: [path.name, file_digest(path)] for option, path in files.items()},
        "question": wording.question,
        "words": list(wording.words),
        "num_tested": len(plan.tested),
        "shots": plan.shots,
        "memory_shots": plan.memory_shots,
        "beside": plan.beside,
        "rag_shots": plan.num_retrieved,
        "num_seeds": plan.num_seeds,
        "calibrate": plan.calibrate,
    }
