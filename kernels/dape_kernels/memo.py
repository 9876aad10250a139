"""What is computed once for an object and shared by all who ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo(dict[Hashable, Any]):
    """Results by key: `memo(key, make)` is `make()`, called once for every key."""

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of the first `make` that was given for `key`."""
        if key not in self:
            self[key] = make()
        result: T = self[key]
        return result
