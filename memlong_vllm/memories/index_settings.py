"""Which settings of an index are taken from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping

from memlong_vllm.memories.errors import MemoryLibraryError

# FAISS allocates what a factory string names before there is anything to index, and what some
# parameters name in every search, so of what it understands only this is taken from outside.
_CODES = r"(Flat|SQ4|SQ6|SQ8|SQfp16|PQ\d{1,3}(x(4|5|6|8|10))?(fs)?)"
_FACTORY = re.compile(rf"{_CODES}|IVF[1-9]\d{{0,5}}(_HNSW\d{{1,2}})?,{_CODES}|HNSW[1-9]\d?(,{_CODES})?")
_FACTORY_RULE = "must be Flat, SQ8, PQ<m>, HNSW<m>, or IVF<n> followed by ,Flat ,SQ8 or ,PQ<m>"
_LARGEST = {"nprobe": 65_536, "efSearch": 4_096, "quantizer_efSearch": 4_096}


class IndexSettingsError(MemoryLibraryError):
    """The settings of an index are not ones that FAISS can build, or that it may be asked for."""


def check_index_settings(factory: str, parameters: Mapping[str, object]) -> None:
    """Accept what costs memory in proportion to the chunks that are indexed.

    Args:
        factory: of FAISS.
        parameters: of FAISS's ParameterSpace.

    Raises:
        IndexSettingsError: naming the factory or the parameter.
    """
    if not _FACTORY.fullmatch(factory):
        raise IndexSettingsError(f"the index factory {ascii(factory)[:80]} {_FACTORY_RULE}")
    for name, value in parameters.items():
        largest = _LARGEST.get(name)
        if largest is None:
            raise IndexSettingsError(f"the index parameter {ascii(name)[:40]} must be one of {', '.join(_LARGEST)}")
        if type(value) is not int or not 1 <= value <= largest:
            raise IndexSettingsError(f"the index parameter {name} = {value!r:.40} must be from 1 to {largest:,}")
