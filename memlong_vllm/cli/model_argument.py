"""What ``--model`` may be in this package's commands."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from memlong_vllm.demo_model import DemoModelError, demo_checkpoint

DEMO, DEMO_BASE = "demo", "demo-base"


class ModelArgumentError(ValueError):
    """No model is called that. The message says what is possible."""


def resolve_model(text: str) -> Path:
    """The folder of a model: a path, ``"demo"`` for the demo checkpoint (made if need be; a folder
    of that name is ``./demo``), ``"demo-base"`` for the same before fine-tuning, or the hub name of
    a model that was downloaded before.

    Raises:
        ModelArgumentError: if it is none of these, or the demo checkpoint cannot be made.
    """
    if text in (DEMO, DEMO_BASE):
        try:
            return demo_checkpoint(adapted=text == DEMO)
        except DemoModelError as error:
            raise ModelArgumentError(str(error)) from error
        except OSError as error:
            raise ModelArgumentError(f"{text}: the demo checkpoint cannot be written: {error}") from error
    if text and Path(text).is_dir():
        return Path(text)
    try:
        return Path(snapshot_download(text, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = "is a file" if Path(text).is_file() else "no such folder, and no model that the hub's cache holds"
        raise ModelArgumentError(f'{text!r}: {reason}; "{DEMO}" stands for the demo checkpoint') from error
