"""A fine-tuning run from a checkpoint and texts to an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from memlong_vllm.adapters.adapter import Adapter
from memlong_vllm.adapters.adapter_file import load_adapter
from memlong_vllm.adapters.base_identity import backbone_identity
from memlong_vllm.config import MemoryConfig
from memlong_vllm.reference.modeling_memlong import MemLongForCausalLM
from memlong_vllm.retriever.embedder import embedder_digest, load_embedder
from memlong_vllm.training.best_adapter import BestAdapter
from memlong_vllm.training.calibration import calibrate, is_fresh
from memlong_vllm.training.documents import Document, TextsError
from memlong_vllm.training.features import DocumentFeatures, FeaturesAsRead, FrozenHalf, least_tokens
from memlong_vllm.training.identity import retriever_of, run_identity
from memlong_vllm.training.job import FinetuneJob
from memlong_vllm.training.run_state import RunFolder
from memlong_vllm.training.settings import FinetuneSettings
from memlong_vllm.training.trainable import half_precision, select_trained, start_from
from memlong_vllm.training.trainer import Trainer, make_accelerator
from memlong_vllm.training.validation import Validation

MakeDocuments = Callable[[Any, int], tuple[list[Document], list[Document]]]
"""(tokenizer, number of processes) -> training and validation documents."""


def finetune(
    job: FinetuneJob,
    settings: FinetuneSettings,
    make_documents: MakeDocuments,
    say: Callable[[str], None] = print,
) -> Adapter:
    """Train, and write the adapter with the lowest validation loss (without validation texts,
    the last one).

    Args:
        make_documents: called once there is a tokenizer.

    Raises:
        SettingsError, TextsError, ResumeError, RetrieverLoadError, AdapterError: before training begins, and
            all that can be known from settings and texts before anything is computed.
        DivergedError: if the loss is no number any more.
    """
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator(settings, job.cpu)
    say_once = say if accelerator.is_main_process else _silent
    if settings.precision == "bf16" and _emulates_bfloat16(accelerator.device):
        say_once("this CPU has no instructions for bfloat16 and takes ten times as long with it: use --precision fp32")
    trainer, best = _prepare(job, settings, make_documents, accelerator, say_once)
    trainer.run(best.offer if accelerator.is_main_process else _ignore)
    if accelerator.is_main_process:
        best.finish(trainer.step)
        if not best.has_learned:
            say("no validation was better than the one before the first step: this run learned nothing of use")
    accelerator.wait_for_everyone()
    return load_adapter(job.output)


def _prepare(
    job: FinetuneJob,
    settings: FinetuneSettings,
    make_documents: MakeDocuments,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[Trainer, BestAdapter]:
    """Everything up to the first step, or to the step where an interrupted run was."""
    model = MemLongForCausalLM.from_pretrained(job.model, dtype=torch.float32).to(accelerator.device)
    settings.check_model(model.config.memory)
    tokenizer = AutoTokenizer.from_pretrained(job.model, config=model.config)
    documents, valid_documents = make_documents(tokenizer, accelerator.num_processes)
    check_reading(documents, valid_documents, settings, model.config.memory, accelerator.num_processes)
    base = backbone_identity(model.state_dict(), model.config)
    identity = run_identity(job, settings, base, model, documents, valid_documents, accelerator)
    trained = select_trained(model, settings.parts, settings.with_memory)
    start = None if job.start is None else load_adapter(job.start)
    if start is not None:
        start_from(start, base, settings.parts, trained)
        identity["start"] = start.digest()
    folder = _open_folder(job, identity, accelerator)

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    # LoRA begins alike everywhere; what dropout draws from now on does not.
    torch.manual_seed(settings.seed + accelerator.process_index)
    half_precision(model, dtype)
    frozen = _frozen_half(job, settings, model, tokenizer, dtype, accelerator)
    frozen.check_space([*documents, *valid_documents])
    train = _training_features(frozen, documents, settings, accelerator, say)
    validates = settings.keep_features or accelerator.is_main_process
    valid = _all_features(frozen, valid_documents if validates else [], accelerator, say)
    if not folder.has_state:
        _start_memory(model, train, settings, accelerator, say)
    trainer = Trainer(model, trained, train, valid, settings, accelerator, folder)
    best = BestAdapter(job, model, settings, base, identity, trained, folder, start)
    if folder.has_state:
        trainer.restore()
        say(f"going on from step {trainer.step} of {settings.steps}")
        best.lowest = folder.lowest_validation() if folder.best.exists() else best.lowest
        best.at_start = folder.first_validation()
    return trainer, best


def _open_folder(job: FinetuneJob, identity: dict[str, Any], accelerator: Accelerator) -> RunFolder:
    folder = RunFolder(job.folder)
    if accelerator.is_main_process:
        folder.open(identity, job.restart)
    accelerator.wait_for_everyone()
    return folder


def check_reading(
    train: Sequence[Document],
    valid: Sequence[Document],
    settings: FinetuneSettings,
    memory: MemoryConfig,
    num_processes: int = 1,
) -> None:
    """Raises TextsError if texts are too few for the rows of all processes, or if nothing can ever be
    retrieved, so that memory would learn nothing, or nobody see it."""
    if len(train) < num_processes * settings.rows:
        raise TextsError(
            f"{len(train)} training texts are too few for {num_processes * settings.rows} rows: lower --rows"
        )
    least, segment = least_tokens(memory), settings.segment_tokens
    beyond = memory.local_window + memory.chunk_size - memory.retrieval_stride
    if memory.memory_size < beyond and (settings.with_memory or valid):
        raise TextsError(
            f"the model's memory_size ({memory.memory_size}) holds nothing that the window does not: convert it with "
            f"at least {beyond}"
        )
    longest, longest_valid = (
        max((len(document.token_ids) // segment * segment for document in part), default=least)
        for part in (train, valid)
    )
    needed = f"{least} tokens are needed, in whole segments of {segment}, to leave a chunk outside the window"
    if settings.with_memory and longest < least:
        raise TextsError(
            f"no training text is long enough to retrieve anything: the longest has {longest} tokens, and {needed}. "
            "Give longer texts, or raise --document-tokens"
        )
    if longest_valid < least:
        raise TextsError(
            f"--valid-tokens: nothing is retrieved in the validation texts: the longest has {longest_valid} tokens, "
            f"and {needed}"
        )


def _emulates_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _silent(text: str) -> None:
    pass


def _ignore(step: int, validation: Validation) -> None:
    pass


def _frozen_half(
    job: FinetuneJob, settings: FinetuneSettings, model: Any, tokenizer: Any, dtype: torch.dtype, accelerator: Any
) -> FrozenHalf:
    retriever, device = retriever_of(job, model), accelerator.device
    embedders: list[Any] = []

    def embed_texts(texts: list[str]) -> Any:
        if not embedders:  # Loaded when something is not in the cache.
            embedders.append(load_embedder(retriever, str(job.model), str(device)))
        return embedders[0].embed(texts)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    digest = embedder_digest(retriever, str(job.model))
    cache_dir = job.cache_dir if settings.keep_features else None
    return FrozenHalf(job.model, model, embed_texts, decode, cache_dir, dtype, accelerator.autocast, digest)


def _training_features(
    frozen: FrozenHalf,
    documents: Sequence[Document],
    settings: FinetuneSettings,
    accelerator: Any,
    say: Callable[[str], None],
) -> Sequence[DocumentFeatures]:
    if not settings.keep_features:
        return FeaturesAsRead(frozen, documents, 2 * settings.rows)
    made = _all_features(frozen, documents, accelerator, say)
    if settings.with_memory:
        reading = [bool(span.chunk_ids) for features in made for span in features.spans]
        if not any(reading):
            raise TextsError("nothing is retrieved in the training texts: their chunks have no text")
        say(f"something is retrieved for {sum(reading) / len(reading):.0%} of the training tokens")
    return made


def _all_features(
    frozen: FrozenHalf, documents: Sequence[Document], accelerator: Any, say: Callable[[str], None]
) -> list[DocumentFeatures]:
    """Of all documents; each process computes its share of what the cache lacks. Without a cache: all of them."""
    if frozen.cache_dir is None:
        return [frozen.features(document) for document in documents]
    for idx, document in enumerate(documents):
        if idx % accelerator.num_processes == accelerator.process_index:
            frozen.features(document)
        if (idx + 1) % 10 == 0 or idx + 1 == len(documents):
            say(f"frozen half: {idx + 1} of {len(documents)} documents")
    accelerator.wait_for_everyone()
    return [frozen.features(document) for document in documents]


def _start_memory(model: Any, train: Sequence[DocumentFeatures], settings: Any, accelerator: Any, say: Any) -> None:
    """Where the memory's parameters begin, if the checkpoint's are as ``convert`` left them."""
    if not settings.with_memory:
        return
    if settings.calibrate_tokens and is_fresh(model):
        if isinstance(train, FeaturesAsRead):
            train = train.longest(model.config.memory.local_window, settings.calibrate_tokens)
        explained = calibrate(model, train, settings.calibrate_tokens, accelerator.autocast)
        for layer, (keys, values) in explained.items():
            say(f"layer {layer}: linear maps explain {keys:.2f} of the variance of its keys, {values:.2f} of values")
    if settings.bias_start:
        for name, parameter in model.named_parameters():
            if name.endswith(".memory_bias") and not parameter.any():
                parameter.data.fill_(settings.bias_start)
