"""Adapters as files: one safetensors file whose metadata says the rest."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memlong_vllm.adapters.adapter import Adapter, LoraSettings
from memlong_vllm.adapters.base_identity import BaseIdentity
from memlong_vllm.adapters.errors import AdapterError

FORMAT, VERSION = "memlong_vllm.adapter", 1
_BLOCKS = ("base", "lora", "memlong", "training")


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter; the file appears complete or not at all.

    The metadata holds strings: ``format`` and ``version``, and as JSON ``base``, ``lora``,
    ``memlong`` and ``training``.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    # Copies: tensors that share storage, as views do, cannot be written.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in adapter.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        save_file(tensors, written, metadata={"format": FORMAT, "version": str(VERSION)} | dump_blocks(adapter))
        written.chmod(0o644)  # safetensors writes 0600: a service's account could not read it.
        os.replace(written, path)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises:
        AdapterError: if it is not one, of another version, or damaged; names the file and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Adapter(tensors=tensors, **parse_blocks(metadata))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file, or cut short: {error}") from error
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def dump_blocks(adapter: Adapter) -> dict[str, str]:
    """All but the tensors, as strings of safetensors metadata."""
    return {name: json.dumps(value, allow_nan=False) for name, value in adapter.metadata().items()}


def parse_blocks(metadata: dict[str, str]) -> dict[str, Any]:
    """Fields of :class:`Adapter` from what :func:`dump_blocks` makes.

    Raises:
        AdapterError: naming the block that is missing, unknown or not as it must be.
    """
    for name in _BLOCKS:
        if name not in metadata:
            raise AdapterError(f"its metadata lacks the block {name!r}")
    for name in metadata:
        if name not in (*_BLOCKS, "format", "version"):
            raise AdapterError(f"its metadata has an unknown field {name!r}")
    values = {}
    for name in _BLOCKS:
        try:
            values[name] = json.loads(metadata[name])
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"the block {name!r} of its metadata is not JSON: {error}") from error
    if not isinstance(values["training"], dict):
        raise AdapterError("training must be an object")
    values["lora"] = _lora(values["lora"])
    values["base"] = None if values["base"] is None else BaseIdentity.from_dict(values["base"])
    return values


def _check_format(metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise AdapterError(
            f"not an adapter: its metadata says format {metadata.get('format')!r}, not {FORMAT!r}. "
            "Of a PEFT adapter, name the folder"
        )
    if metadata.get("version") != str(VERSION):
        raise AdapterError(f"version {metadata.get('version')!r} of the adapter format: this release reads {VERSION}")


def _lora(values: object) -> LoraSettings | None:
    if values is None:
        return None
    if not isinstance(values, dict) or values.keys() != {"rank", "alpha"}:
        raise AdapterError(f"lora = {values!r}: must be null or an object of rank and alpha")
    return LoraSettings(values["rank"], values["alpha"])
