"""What is raised about adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter cannot be read, written or merged. The message says what is wrong and what to do."""
