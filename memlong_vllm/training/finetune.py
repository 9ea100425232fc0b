"""A fine-tuning run from a checkpoint and texts to an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.adapter_file import load_adapter, save_adapter
from memlong_vllm.adapters.base_identity import BaseIdentity, backbone_identity
from memlong_vllm.config import RetrieverConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.retriever.embedder import embedder_digest, load_embedder
from memlong_vllm.training.calibration import calibrate, is_fresh
from memlong_vllm.training.documents import Document, TextsError
from memlong_vllm.training.features import DocumentFeatures, FrozenHalf
from memlong_vllm.training.run_state import RunFolder
from memlong_vllm.training.settings import FinetuneSettings
from memlong_vllm.training.trainable import half_precision, learned_tensors, select_trained, start_from
from memlong_vllm.training.trainer import Trainer, make_accelerator
from memlong_vllm.training.validation import Validation

VERSIONS_OF = ("memlong-vllm", "torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class FinetuneJob:
    """What a run reads and writes.

    Attributes:
        model: folder of a MemLong checkpoint.
        output: the adapter file to write; the run's folder is ``output`` with ``.run`` appended.
        cache_dir: of frozen features.
        retriever_path: in place of the checkpoint's retriever.
        start: adapter that training goes on from, of the same base and with the same parts; None: afresh.
        cpu: use the CPU even where there is a GPU.
        restart: forget an interrupted run with this output.
        notes: put into the adapter's metadata as they are.
    """

    model: Path
    output: Path
    cache_dir: Path
    retriever_path: str | None = None
    start: Path | None = None
    cpu: bool = False
    restart: bool = False
    notes: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".run")


def finetune(
    job: FinetuneJob,
    settings: FinetuneSettings,
    make_documents: Callable[[Any], tuple[list[Document], list[Document]]],
    say: Callable[[str], None] = print,
) -> Adapter:
    """Train, and write the adapter with the lowest validation loss (without validation texts,
    the last one).

    Args:
        make_documents: tokenizer -> training and validation documents.

    Raises:
        SettingsError, TextsError, ResumeError, RetrieverLoadError, AdapterError: before training begins.
        DivergedError: if the loss is no number any more.
    """
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator(settings, job.cpu)
    say_once = say if accelerator.is_main_process else _silent
    if settings.precision == "bf16" and _emulates_bfloat16(accelerator.device):
        say_once("this CPU has no instructions for bfloat16 and takes ten times as long with it: use --precision fp32")
    trainer, best = _prepare(job, settings, make_documents, accelerator, say_once)
    trainer.run(best.offer if accelerator.is_main_process else _ignore)
    if accelerator.is_main_process and not (trainer.valid and job.output.exists()):
        best.write(trainer.step, None)
    accelerator.wait_for_everyone()
    return load_adapter(job.output)


def _prepare(
    job: FinetuneJob,
    settings: FinetuneSettings,
    make_documents: Callable[[Any], tuple[list[Document], list[Document]]],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[Trainer, _BestAdapter]:
    """Everything up to the first step, or to the step where an interrupted run was."""
    model = MemLongForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(accelerator.device)
    settings.check_model(model.config.memory)
    tokenizer = AutoTokenizer.from_pretrained(job.model, config=model.config)
    documents, valid_documents = make_documents(tokenizer)
    streams = accelerator.num_processes * settings.rows
    if len(documents) < streams:
        raise TextsError(f"{len(documents)} training texts are too few for {streams} rows: lower --rows")
    base = backbone_identity(model.state_dict(), model.config)
    identity = _identity(job, settings, base, model, documents, valid_documents, accelerator.num_processes)
    trained = select_trained(model, settings.parts, settings.with_memory)
    if job.start is not None:
        start = load_adapter(job.start)
        start_from(start, base, settings.parts, trained)
        identity["start"] = start.digest()
    folder = RunFolder(job.folder)
    if accelerator.is_main_process:
        folder.open(identity, job.restart)
    accelerator.wait_for_everyone()

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    # LoRA begins alike everywhere; what dropout draws from now on does not.
    torch.manual_seed(settings.seed + accelerator.process_index)
    half_precision(model, dtype)
    frozen = _frozen_half(job, model, tokenizer, dtype, accelerator)
    frozen.check_space([*documents, *valid_documents])
    train, valid = (_all_features(frozen, part, accelerator, say) for part in (documents, valid_documents))
    if settings.with_memory:
        _check_reading(train, say)
    if not folder.has_state:
        _start_memory(model, train, settings, accelerator, say)
    trainer = Trainer(model, trained, train, valid, settings, accelerator, folder)
    best = _BestAdapter(job, model, settings, base, identity, trained)
    if folder.has_state:
        trainer.restore()
        say(f"going on from step {trainer.step} of {settings.steps}")
        best.lowest = folder.lowest_validation() if job.output.exists() else best.lowest
    return trainer, best


def _emulates_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _silent(text: str) -> None:
    pass


def _ignore(step: int, validation: Validation) -> None:
    pass


def _identity(
    job: FinetuneJob,
    settings: FinetuneSettings,
    base: BaseIdentity,
    model: MemLongForCausalLM,
    documents: Sequence[Document],
    valid: Sequence[Document],
    num_processes: int,
) -> dict[str, Any]:
    """What makes a run this run; steps may be added to a finished one, unless its rate depends on them."""
    free = ("save_every", "steps") if settings.schedule == "constant" else ("save_every",)
    return {
        "settings": {name: value for name, value in settings.to_dict().items() if name not in free},
        "num_processes": num_processes,
        "base": base.digest,
        "retriever": embedder_digest(_retriever(job, model), str(job.model)),
        "memlong": model.config.memory.to_dict(),
        "memory_parameters": _digest_of_memory(model),
        "train": [_describe(document) for document in documents],
        "valid": [_describe(document) for document in valid],
    }


def _describe(document: Document) -> str:
    digest = hashlib.sha256(
        json.dumps([document.token_ids, document.loss_weights, document.questions]).encode()
    ).hexdigest()
    return f"{document.name} ({len(document.token_ids)} tokens, {digest[:12]})"


def _digest_of_memory(model: MemLongForCausalLM) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".memory_" in name:
            digest.update(name.encode() + parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _frozen_half(job: FinetuneJob, model: Any, tokenizer: Any, dtype: torch.dtype, accelerator: Any) -> FrozenHalf:
    retriever, device = _retriever(job, model), accelerator.device
    embedders: list[Any] = []

    def embed_texts(texts: list[str]) -> Any:
        if not embedders:  # Loaded when something is not in the cache.
            embedders.append(load_embedder(retriever, str(job.model), str(device)))
        return embedders[0].embed(texts)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    digest = embedder_digest(retriever, str(job.model))
    return FrozenHalf(job.model, model, embed_texts, decode, job.cache_dir, dtype, accelerator.autocast, digest)


def _retriever(job: FinetuneJob, model: MemLongForCausalLM) -> RetrieverConfig:
    configured = model.config.memory.retriever
    return configured if job.retriever_path is None else replace(configured, model=job.retriever_path)


def _all_features(
    frozen: FrozenHalf, documents: Sequence[Document], accelerator: Any, say: Callable[[str], None]
) -> list[DocumentFeatures]:
    """Of all documents; each process computes its share of what the cache lacks."""
    for idx, document in enumerate(documents):
        if idx % accelerator.num_processes == accelerator.process_index:
            frozen.features(document)
        if (idx + 1) % 10 == 0 or idx + 1 == len(documents):
            say(f"frozen half: {idx + 1} of {len(documents)} documents")
    accelerator.wait_for_everyone()
    return [frozen.features(document) for document in documents]


def _check_reading(train: Sequence[DocumentFeatures], say: Callable[[str], None]) -> None:
    """Raises TextsError if nothing is ever retrieved, and memory would learn nothing."""
    reading = [bool(span.chunk_ids) for features in train for span in features.spans]
    if not any(reading):
        longest = max(len(features.document.token_ids) for features in train)
        raise TextsError(
            f"no training text is long enough to retrieve anything: the longest has {longest} tokens. Give longer "
            "texts, or raise --document-tokens"
        )
    say(f"something is retrieved for {sum(reading) / len(reading):.0%} of the training tokens")


def _start_memory(model: Any, train: Sequence[DocumentFeatures], settings: Any, accelerator: Any, say: Any) -> None:
    """Where the memory's parameters begin, if the checkpoint's are as ``convert`` left them."""
    if not settings.with_memory:
        return
    if settings.calibrate_tokens and is_fresh(model):
        explained = calibrate(model, train, settings.calibrate_tokens, accelerator.autocast)
        for layer, (keys, values) in explained.items():
            say(f"layer {layer}: linear maps explain {keys:.2f} of the variance of its keys, {values:.2f} of values")
    if settings.bias_start:
        for name, parameter in model.named_parameters():
            if name.endswith(".memory_bias") and not parameter.any():
                parameter.data.fill_(settings.bias_start)


class _BestAdapter:
    """Writes the adapter whenever validation is better than before.

    Attributes:
        lowest: negative log-likelihood of the best so far; infinite if there is none.
    """

    def __init__(
        self,
        job: FinetuneJob,
        model: MemLongForCausalLM,
        settings: FinetuneSettings,
        base: BaseIdentity,
        identity: dict[str, Any],
        trained: dict[str, nn.Parameter],
    ) -> None:
        self.job, self.model, self.settings, self.base = job, model, settings, base
        self.identity, self.trained = identity, trained
        self.lowest = float("inf")

    def offer(self, step: int, validation: Validation) -> None:
        if step > 0 and validation.nll < self.lowest:
            self.lowest = validation.nll
            self.write(step, validation)

    def write(self, step: int, validation: Validation | None) -> None:
        parts = self.settings.parts
        training = {
            "settings": self.settings.to_dict(),
            "train": self.identity["train"],
            "valid": self.identity["valid"],
            **({"start": self.identity["start"]} if "start" in self.identity else {}),
            "step": step,
            "validation": validation and validation.to_dict(),
            "versions": {name: metadata.version(name) for name in VERSIONS_OF},
            **(self.job.notes or {}),
        }
        tensors = {
            name: tensor.to(torch.bfloat16 if tensor.dim() > 1 else torch.float32)
            for name, tensor in learned_tensors(self.model, self.trained).items()
        }
        lora = LoraSettings(parts.rank, parts.alpha) if parts.rank else None
        adapter = Adapter(tensors, lora, self.model.config.memory.to_dict(), self.base, training)
        self.job.output.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(adapter, self.job.output)
