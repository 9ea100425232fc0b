"""``memlong-vllm finetune``: train what reads from memory, and write it as an adapter."""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from memlong_vllm.adapters.errors import AdapterError
from memlong_vllm.cli.model_argument import ModelArgumentError, resolve_model
from memlong_vllm.config import MemLongConfig, MemoryConfig, MemoryConfigError
from memlong_vllm.conversion import is_memlong
from memlong_vllm.memories.fingerprint import FingerprintError
from memlong_vllm.retriever.embedder import RetrieverLoadError
from memlong_vllm.ridge import RidgeError
from memlong_vllm.training.allocator import keep_freed_memory
from memlong_vllm.training.documents import (
    Document,
    Excerpt,
    TextsError,
    dataset_documents,
    dataset_loader,
    find_texts,
    read_documents,
    take,
)
from memlong_vllm.training.features import least_tokens
from memlong_vllm.training.finetune import finetune
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.run_state import ResumeError
from memlong_vllm.training.settings import PRESETS, FinetuneSettings, with_overrides
from memlong_vllm.training.trainable import SettingsError
from memlong_vllm.training.trainer import DivergedError
from memlong_vllm.training.woven_facts import WeaveRecipe, weave

_ERRORS = (
    SettingsError, TextsError, ResumeError, RetrieverLoadError, MemoryConfigError, ModelArgumentError, DivergedError,
    FingerprintError, RidgeError, AdapterError, OSError,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="MemLong checkpoint to train (a folder), or demo-base")
    parser.add_argument("--output", type=Path, required=True, help="adapter file to write (.safetensors)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings to start from; options override them")
    parser.add_argument("--start", type=Path, metavar="ADAPTER", help="go on from what an adapter learned")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted run with this output")
    parser.add_argument(
        "--cache-dir", type=Path, help="where frozen features are kept (default: the user's cache folder)"
    )
    parser.add_argument(
        "--no-cache", dest="keep_features", action="store_false", default=None,
        help="keep nothing on disk: compute what the frozen layers make of a text when it is read",
    )  # fmt: skip
    parser.add_argument("--retriever-path", help="folder of the retriever, if it is not where the checkpoint says")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))


def _add_data(group: Any) -> None:
    group.add_argument("--texts", nargs="+", default=[], metavar="GLOB", help="UTF-8 text files, one document each")
    group.add_argument("--dataset", help="dataset with a text column: hub name or folder (needs the datasets package)")
    group.add_argument("--dataset-split", default="train")
    group.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="of --dataset (default: as many as the steps read once, so that no steps can be added later)",
    )
    group.add_argument("--valid", nargs="+", default=[], metavar="GLOB", help="validation texts")
    group.add_argument("--document-tokens", type=int, help="tokens of each text that are used")
    group.add_argument(
        "--document-offset", type=int, default=0, metavar="N", help="tokens left out at a text's beginning (default: 0)"
    )
    group.add_argument("--valid-tokens", type=int, default=16384, help="of each validation text")
    group.add_argument(
        "--weave-facts", type=int, default=0, metavar="GAP",
        help="put facts, and questions for them out of sight, into training texts every GAP tokens or so; 0: none",
    )  # fmt: skip
    group.add_argument(
        "--weave-copies", type=float, default=WeaveRecipe.copies, metavar="SHARE",
        help=f"of what is woven in, repeat a passage instead (default: {WeaveRecipe.copies})",
    )  # fmt: skip


def _add_training(group: Any) -> None:
    group.add_argument("--no-memory", dest="with_memory", action="store_false", default=None, help="train the control")
    for name, (kind, text) in _NUMBERS.items():
        default = getattr(FinetuneSettings, name, None)
        known = "" if default is None else f" (default: {default}, or the preset's)"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text}{known}")
    group.add_argument("--schedule", choices=("constant", "linear", "cosine"))
    group.add_argument("--precision", choices=("bf16", "fp32"))
    group.add_argument("--checkpointing", action="store_true", default=None, help="recompute activations (less memory)")
    group.add_argument("--lora-rank", dest="rank", type=int)
    group.add_argument("--lora-alpha", dest="alpha", type=float)
    group.add_argument("--lora-dropout", dest="dropout", type=float)
    group.add_argument("--lora-targets", dest="targets", type=_names, help="default q_proj,k_proj,v_proj,o_proj")
    group.add_argument("--train-whole", dest="full", type=_names, help="norms,embeddings")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


# Of FinetuneSettings.
_NUMBERS = {
    "steps": (int, "updates of the weights"),
    "rows": (int, "streams that are read side by side, by each process"),
    "accumulation": (int, "batches an update is made of"),
    "segment_tokens": (int, "tokens of a stream in a batch"),
    "learning_rate": (float, "of LoRA, and of what is trained whole, after warm-up"),
    "memory_learning_rate": (float, "a tenth of that of gates and biases (default: the learning rate)"),
    "adapter_learning_rate": (float, "of maps of memory (default: the memory's)"),
    "warmup_steps": (int, "steps in which the rates rise"),
    "weight_decay": (float, "AdamW's"),
    "max_grad_norm": (float, "longer gradients are cut to this"),
    "bias_start": (float, "where a memory_bias that is 0 begins"),
    "calibrate_tokens": (int, "tokens that fresh maps of memory are fitted on; 0: they are not"),
    "validate_every": (int, "steps; 0: at the end only"),
    "save_every": (int, "steps; 0: at the end only"),
    "seed": (int, "of the texts' order, LoRA's beginning and dropout"),
}
_SETTINGS = (
    *_NUMBERS, "with_memory", "schedule", "precision", "checkpointing", "keep_features", "rank", "alpha", "dropout",
    "targets", "full",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    keep_freed_memory()
    try:
        start = PRESETS[arguments.preset] if arguments.preset else FinetuneSettings()
        _check(arguments)
        settings = with_overrides(start, {name: getattr(arguments, name) for name in _SETTINGS})
        job = FinetuneJob(
            _checkpoint(arguments.model),
            arguments.output,
            arguments.cache_dir or _default_cache(),
            arguments.retriever_path,
            arguments.start,
            arguments.cpu,
            arguments.restart,
            {"command": shlex.join(["memlong-vllm", *sys.argv[1:]])},
        )
        finetune(job, settings, _Texts(arguments, settings, job.model))
    except _ERRORS as error:
        print(f"memlong-vllm finetune: {error}", file=sys.stderr)
        return 2
    print(f"written to {job.output}; its log is {job.folder / 'log.jsonl'}")
    print(f"merge it: memlong-vllm convert BASE OUT --adapter {job.output}")
    return 0


def _checkpoint(text: str) -> Path:
    path = resolve_model(text)
    if not is_memlong(path):
        raise ModelArgumentError(f"--model {text}: no MemLong checkpoint; make one of it with memlong-vllm convert")
    return path


def _check(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output.is_dir() or output.suffix != ".safetensors":
        raise SettingsError(f"--output {output}: name a .safetensors file")
    if arguments.start is not None and arguments.start.resolve() == output.resolve():
        raise SettingsError(f"--start {arguments.start} is --output too, and would be overwritten: name another output")
    for name in ("weave_facts", "document_offset"):
        if getattr(arguments, name) < 0:
            raise SettingsError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 0 or more")
    if not 0 <= arguments.weave_copies <= 1:
        raise SettingsError(f"--weave-copies {arguments.weave_copies}: must be from 0 to 1")
    for name in ("document_tokens", "valid_tokens", "max_documents"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} {value}: must be positive")
    for option, folder in (("--output", output.parent), ("--cache-dir", arguments.cache_dir)):
        if folder is not None and any(part.is_file() for part in (folder, *folder.parents)):
            raise SettingsError(f"{option} {folder}: a file is where a folder is needed")


def _default_cache() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("memlong-vllm")) / "features"


class _Texts:
    """Makes the documents that the arguments name, once there is a tokenizer."""

    def __init__(self, arguments: argparse.Namespace, settings: FinetuneSettings, model: Path) -> None:
        if not arguments.texts and not arguments.dataset:
            raise TextsError("nothing to train on: give --texts or --dataset")
        if arguments.dataset:
            dataset_loader()
        self.arguments, self.settings, self.model = arguments, settings, model
        self.texts, self.valid = find_texts(arguments.texts), find_texts(arguments.valid)
        both = {path.resolve() for path in self.texts} & {path.resolve() for path in self.valid}
        if both:
            raise TextsError(f"--valid {min(both)} is a training text too: what knows it by heart would be chosen")

    def __call__(self, tokenizer: Any, num_processes: int) -> tuple[list[Document], list[Document]]:
        arguments, least = self.arguments, self.settings.segment_tokens
        train = read_documents(self.texts, tokenizer, self._excerpt(), least)
        if arguments.dataset:
            train += self._of_dataset(tokenizer, num_processes)
        if arguments.weave_facts:
            train = self._woven(tokenizer, train)
        return train, read_documents(self.valid, tokenizer, Excerpt(max_tokens=arguments.valid_tokens), least)

    def _excerpt(self) -> Excerpt:
        return Excerpt(self.arguments.document_offset, self.arguments.document_tokens)

    def _of_dataset(self, tokenizer: Any, num_processes: int) -> list[Document]:
        """Texts that are long enough to retrieve; as many as are asked for, or as all steps read once."""
        arguments, settings = self.arguments, self.settings
        least = max(settings.segment_tokens, least_tokens(self._memory()))
        if arguments.document_tokens is not None and arguments.document_tokens < least:
            raise SettingsError(f"--document-tokens {arguments.document_tokens}: texts must have {least} to retrieve")
        found = dataset_documents(arguments.dataset, arguments.dataset_split, tokenizer, self._excerpt(), least)
        if arguments.max_documents is not None:
            return list(islice(found, arguments.max_documents))
        rows = settings.rows * num_processes
        # Of a text, what is no whole segment is not read.
        return take(found, rows, int(1.25 * settings.steps * settings.accumulation * rows * settings.segment_tokens))

    def _memory(self) -> MemoryConfig:
        return MemLongConfig.from_pretrained(self.model).memory

    def _woven(self, tokenizer: Any, train: list[Document]) -> list[Document]:
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        memory = self._memory()
        recipe = WeaveRecipe(self.arguments.weave_facts, copies=self.arguments.weave_copies)
        return [weave(document, encode, memory, recipe, self.settings.seed) for document in train]
