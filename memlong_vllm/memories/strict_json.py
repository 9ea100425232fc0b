"""Reading JSON of which every field must be there and be of its type."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from memlong_vllm.memories.errors import MemoryDamagedError


def load_object(data: bytes, file: str) -> StrictObject:
    """Parse a JSON object.

    Args:
        file: what errors call it.

    Raises:
        MemoryDamagedError: naming the file.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MemoryDamagedError(f"{file}: not JSON: {str(error)[:200]}") from error
    return StrictObject(value, file, "")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


class StrictObject:
    """A JSON object whose fields are taken one by one; every complaint names file and field."""

    def __init__(self, value: object, file: str, where: str) -> None:
        self.file, self._where = file, where
        if not isinstance(value, dict):
            raise MemoryDamagedError(f"{file}: field {where or 'at the top'!r} must be an object")
        self._left = dict(value)

    def wrong(self, name: str, rule: str) -> MemoryDamagedError:
        return MemoryDamagedError(f"{self.file}: field '{self._where}{name}' must be {rule}")

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise MemoryDamagedError(f"{self.file}: field '{self._where}{name}' is missing")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def matching(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self.text(name)
        if not pattern.fullmatch(value):
            raise self.wrong(name, f"of the form {pattern.pattern}")
        return value

    def count(self, name: str, minimum: int) -> int:
        value = self.take(name)
        if type(value) is not int or value < minimum:
            raise self.wrong(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str) -> float:
        value = self.take(name)
        if type(value) is not float or not math.isfinite(value):
            raise self.wrong(name, "a number with a fraction")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.take(name)
        if not isinstance(value, list) or not all(type(x) is float and math.isfinite(x) for x in value):
            raise self.wrong(name, "a list of numbers with fractions")
        return tuple(value)

    def object(self, name: str) -> StrictObject:
        return StrictObject(self.take(name), self.file, f"{self._where}{name}.")

    def objects(self, name: str) -> list[StrictObject]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return [StrictObject(item, self.file, f"{self._where}{name}[{i}].") for i, item in enumerate(value)]

    def end(self, *expected: str) -> None:
        for name in self._left:
            if name not in expected:
                raise MemoryDamagedError(f"{self.file}: field '{self._where}{name[:60]}' is unknown")
