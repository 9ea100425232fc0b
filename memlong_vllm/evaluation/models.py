"""The models of a run: the one that is evaluated, controls, and baselines made of its backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from memlong_vllm.config import MemLongConfig, resolve
from memlong_vllm.evaluation.scoring import EvaluationError

Kind = Literal["memlong", "plain"]
MEMLONG, CONTROL, RANDOM, FULL, WINDOW = "memlong", "control", "random", "full", "window"
BASELINES = (FULL, WINDOW)


@dataclass(frozen=True)
class ModelSpec:
    """A model of a run.

    Attributes:
        label: names it in rows.
        path: folder that is loaded.
        source: folder that the user named, which it was made from.
        kind: ``"memlong"``, or ``"plain"`` for a Llama model without memory.
        window: tokens that a token attends to in every layer, or None for all.
        random_retrieval: chunks are chosen by chance.
        config: contents of ``config.json``; the ``memlong`` block as it is served (:func:`deployed`).
        group: of a variant (:mod:`memlong_vllm.evaluation.variants`), what it is one of.
        changes: fields of the ``memlong`` block that ``config`` has otherwise than ``path`` does.
        differs: of a control or another checkpoint, in what it was trained otherwise than the main model,
            beside memory.
    """

    label: str
    path: Path
    source: Path
    kind: Kind
    window: int | None
    random_retrieval: bool = False
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    group: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    differs: tuple[str, ...] = ()

    @property
    def reach(self) -> int:
        """How many tokens the checkpoint says a sequence may have."""
        return int(self.config["max_position_embeddings"])

    def memory_sizes(self, asked: Sequence[int]) -> list[int | None]:
        """Those of the sizes asked for that tell something about this model. Chunks chosen by chance
        are those of the main model at size 0, and a control was trained without any. Variants are
        compared with the main model at its largest."""
        if self.kind == "plain":
            return [None]
        if self.label == CONTROL:
            return [0]
        if self.group is not None:
            return [max(asked)]
        return [size for size in asked if size or not self.random_retrieval]


def model_specs(
    model: Path,
    control: Path | None = None,
    baselines: Sequence[str] = (),
    backbone: Path | None = None,
    random_retrieval: bool = False,
    memlong: Mapping[str, Any] | None = None,
) -> list[ModelSpec]:
    """The models that options name. Baselines are made when they are loaded (:mod:`memlong_vllm.evaluation.opening`).

    Args:
        memlong: entries for ``additional_config["memlong"]``.

    Raises:
        EvaluationError: if a folder is not what its option asks for.
        MemoryConfigError: if a setting is not valid.
    """
    config = read_config(model, "--model")
    if "memlong" not in config:
        raise EvaluationError(f"--model {model} is no MemLong checkpoint: make one with memlong-vllm convert")
    main = ModelSpec(MEMLONG, model, model, "memlong", config["memlong"]["local_window"], config=config)
    main = deployed(main, memlong)
    specs = [main]
    if control is not None:
        config = read_config(control, "--control")
        kind: Kind = "memlong" if "memlong" in config else "plain"
        check_control(control, config, main)
        differs = (*training_differences(config, main.config), *layer_differences(config, main.config))
        spec = ModelSpec(CONTROL, control, control, kind, main.window, config=config, differs=differs)
        specs.append(deployed(spec, memlong))
    if random_retrieval:
        specs.append(ModelSpec(RANDOM, main.path, main.source, "memlong", main.window, True, main.config))
    source = backbone or model
    config = read_config(source, "--backbone")
    for name in baselines:
        window = main.window if name == WINDOW else None
        specs.append(ModelSpec(name, source, source, "plain", window, config=config))
    for spec in specs[1:]:
        check_same_tokens(main, spec)
    return specs


def deployed(spec: ModelSpec, memlong: Mapping[str, Any] | None) -> ModelSpec:
    """The model with the settings it is served with: some entries of ``additional_config["memlong"]``
    take the place of the checkpoint's.

    Raises:
        MemoryConfigError: if a setting is not valid.
    """
    if spec.kind != "memlong" or not memlong:
        return spec
    memory, _ = resolve(MemLongConfig.from_dict(dict(spec.config)), {"memlong": dict(memlong)})
    return replace(spec, window=memory.local_window, config=spec.config | {"memlong": memory.to_dict()})


def read_config(path: Path, option: str) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder."""
    try:
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{option} {path} is no folder with a model: its config.json {error}") from error


def check_control(path: Path, config: Mapping[str, Any], main: ModelSpec) -> None:
    """Raises:
    EvaluationError: if the model, or what it went on from, was trained with memory, or has another window.
    """
    if any(record["settings"].get("with_memory") for record in _trainings(config.get("memlong_adapter"))):
        raise EvaluationError(f"--control {path} was trained with memory: train it with finetune --no-memory")
    window = config.get("memlong", {}).get("local_window", main.window)
    if window != main.window:
        raise EvaluationError(f"--control {path} has a local window of {window}, --model one of {main.window}")


def training_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's configuration says of how its adapter was trained, if it has one that says it."""
    return (config.get("memlong_adapter") or {}).get("training") or {}


def training_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``finetune``; none if something else trained the adapter."""
    settings = training_of(config).get("settings")
    return settings if isinstance(settings, dict) else {}


def _trainings(adapter: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Records of all trainings, by ``finetune``, of what is merged in a checkpoint."""
    while adapter:
        training = adapter.get("training") or {}
        if isinstance(training.get("settings"), dict):
            yield training
        # Adapters of the first versions say only which one they went on from.
        start = training.get("start")
        yield from _trainings(start if isinstance(start, dict) else None)
        adapter = adapter.get("merged_before")


# Settings of a training that are not its own, or do not change what is learned.
NOT_DECISIVE = {"with_memory", "keep_features", "checkpointing", "save_every"}


def training_differences(other: Mapping[str, Any], main: Mapping[str, Any]) -> tuple[str, ...]:
    """In what the training of a control or variant was not the main model's, beside memory: settings,
    texts, validation texts (which choose the step), what it went on from; "not known" if one has no record."""
    before = [(config.get("memlong_adapter") or {}).get("merged_before") or {} for config in (other, main)]
    found = _differences(training_of(other), training_of(main))
    return found if before[0].get("digest") == before[1].get("digest") else (*found, "what was merged before")


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, ...]:
    settings = [record.get("settings") for record in (theirs, ours)]
    their_settings, our_settings = settings
    if not (isinstance(their_settings, dict) and isinstance(our_settings, dict)):
        return () if theirs == ours else ("not known",)
    names = sorted((their_settings.keys() & our_settings.keys()) - NOT_DECISIVE)
    found = [name for name in names if their_settings[name] != our_settings[name]]
    found += [] if theirs.get("train") == ours.get("train") else ["texts"]
    found += [] if theirs.get("valid") == ours.get("valid") else ["validation texts"]
    starts = [record.get("start") for record in (theirs, ours)]
    if (starts[0] is None) != (starts[1] is None):
        return (*found, "what it went on from")
    # Adapters of the first versions say of it only which one it was.
    records = [start["training"] for start in starts if isinstance(start, dict)]
    if len(records) == 2:
        found += [f"{difference} of the training before" for difference in _differences(*records)]
    return tuple(found)


def layer_differences(control: Mapping[str, Any], main: Mapping[str, Any]) -> tuple[str, ...]:
    """Whether other layers of a control than of the model were trained: those above the memory layer, and
    part of that itself if it reads."""
    blocks = [config["memlong"] for config in (control, main) if "memlong" in config]
    if len(blocks) < 2:
        return ()
    lowest = [(block["memory_layer"], block["memory_layer"] in block["retrieval_layers"]) for block in blocks]
    return () if lowest[0] == lowest[1] else ("layers",)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint folder, of MemLong or of a plain Llama model."""
    is_memlong = "memlong" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = MemLongConfig.from_pretrained(path) if is_memlong else None
    return AutoTokenizer.from_pretrained(path, config=config)


def check_same_tokens(main: ModelSpec, other: ModelSpec) -> None:
    """Token ids must mean the same text for all models, or their perplexities cannot be compared."""
    if other.source == main.source:
        return
    if load_tokenizer(other.source).get_vocab() != load_tokenizer(main.source).get_vocab():
        raise EvaluationError(f"'{other.label}' ({other.source}) has another vocabulary than --model {main.source}")


def end_ids_of(path: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, of the tokenizer and of ``generation_config.json``."""
    file = path / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ends = [*found, tokenizer.eos_token_id] if isinstance(found, list) else [found, tokenizer.eos_token_id]
    return frozenset(int(token) for token in ends if token is not None)


def describe(spec: ModelSpec) -> dict[str, Any]:
    """What identifies a model in a results file: settings, origin and a digest of its weights."""
    block = spec.config.get("memlong")
    trained = spec.config.get("backbone_max_position_embeddings") or spec.reach
    return {
        "name": model_name(spec.source),
        "attention": "memory" if spec.kind == "memlong" else "full" if spec.window is None else "window",
        "random_retrieval": spec.random_retrieval,
        "group": spec.group,
        "changes": spec.changes or None,
        **({"training_differs": list(spec.differs)} if spec.differs else {}),
        "local_window": spec.window,
        "trained_length": trained,
        "memlong": block if spec.kind == "memlong" else None,
        "adapter": merged_adapter(spec.config.get("memlong_adapter")),
        "is_stripped": is_stripped(spec),
        "digest": checkpoint_digest(spec.source),
    }


def is_stripped(spec: ModelSpec) -> bool:
    """Whether a baseline's weights were trained with a memory that was taken away, which flatters the memory."""
    return spec.kind == "plain" and bool(training_settings(spec.config).get("with_memory"))


def model_name(folder: Path) -> str:
    """The folder's name; for a model in the hub's cache, whose folder is called by its revision, the hub's."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def merged_adapter(block: dict[str, Any] | None) -> dict[str, Any] | None:
    """Which adapter is in a checkpoint, and after how many steps of training. All else that
    ``config.json`` says of it, every training text among it, can be looked up by the digest."""
    if block is None:
        return None
    before = merged_adapter(block.get("merged_before"))
    named = {"digest": block["digest"], "step": block["training"].get("step")}
    return named if before is None else named | {"merged_before": before}


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of the configuration and of every byte of the weights, those of a retriever within the folder
    included, so that a checkpoint trained further under the same name is told apart."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.rglob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
