"""What can be wrong with a named memory or with what is asked of the library."""

from __future__ import annotations


class MemoryLibraryError(ValueError):
    """Base of all errors of named memories."""


class MemoryNameError(MemoryLibraryError):
    """A name of a memory or of a tenant's folder breaks the rule. The message says the rule."""


class UnknownMemoryError(MemoryLibraryError):
    """No memory has this name."""


class MemoryExistsError(MemoryLibraryError):
    """A memory of this name exists already."""


class MemoryDamagedError(MemoryLibraryError):
    """A file of a memory is missing or not as it was written. The message names file and field."""


class MemoryFormatError(MemoryLibraryError):
    """A memory was made by another model or retriever. The message lists the differences."""


class QuotaExceededError(MemoryLibraryError):
    """A write would exceed a tenant's quota. The message says by which numbers."""


class MemoryLibraryBusyError(MemoryLibraryError):
    """Another process has the library open."""


class MemoryWriteError(MemoryLibraryError):
    """A write did not become part of its memory. The message says why."""


class FingerprintError(MemoryLibraryError):
    """What identifies a model cannot be read from its checkpoint."""


class ShardError(MemoryLibraryError):
    """A shard's file cannot be written, or is not what a shard should be. The message names it."""
