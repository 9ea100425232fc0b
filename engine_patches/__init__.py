"""Everything that relies on private parts of vLLM: one module per supported version."""

from __future__ import annotations

from importlib import import_module

import vllm

SUPPORTED_VERSIONS = {"0.32.0": "engine_patches.vllm_0_32"}


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is none that was tested."""


def module_name(version: str) -> str:
    """The module for a vLLM version, local part (``+cpu``) ignored.

    Raises:
        UnsupportedVllmError: listing the versions that were tested.
    """
    try:
        return SUPPORTED_VERSIONS[version.partition("+")[0]]
    except KeyError:
        tested = ", ".join(SUPPORTED_VERSIONS)
        raise UnsupportedVllmError(
            f"memlong-vllm does not support vLLM {version}; it was tested with: {tested}. "
            f"Install one of these, for example: pip install 'vllm=={next(iter(SUPPORTED_VERSIONS))}'"
        ) from None


_module = import_module(module_name(vllm.__version__))
apply = _module.apply

__all__ = ["SUPPORTED_VERSIONS", "UnsupportedVllmError", "apply", "module_name"]
