"""Reading config.json the way a model class would: defaults, aliases and types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import InputError, Where

LARGEST = 2**40
"""No size of a model is larger; a bigger number is a damaged or hostile file."""


@dataclass(frozen=True)
class Size:
    """One dimension of a model: its value and the configuration keys that decide it."""

    value: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """A configuration with the defaults that the family's class uses for absent keys.

    A key that is present with the value null is null, not absent, as in transformers.
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def get(self, *keys: str) -> Any:
        """Return the value of the first key that the file or the defaults have, else None."""
        for source in (self.config, self.defaults):
            for key in keys:
                if key in source:
                    return source[key]
        return None

    def named(self, *keys: str) -> str:
        """Return which of several names of one setting the file uses (the first when it has none)."""
        return next((key for key in keys if key in self.config), keys[0])

    def integer(self, *keys: str, minimum: int = 1) -> int:
        """Return a whole number, refusing an absent or impossible value by the name of its key."""
        value = self.optional_integer(*keys, minimum=minimum)
        if value is None:
            raise InputError(
                "E340",
                f"config.json does not set {keys[0]}",
                where=Where(file="config.json"),
                help="add the key; the sizes of the tensors follow from it",
            )
        return value

    def optional_integer(self, *keys: str, minimum: int = 1) -> int | None:
        """Return a whole number, or None when it is null or absent without a default."""
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST:
            raise InputError(
                "E340",
                f"config.json sets {self.named(*keys)} to {value!r}, which is not a usable size",
                where=Where(file="config.json"),
                help=f"it must be a whole number of at least {minimum}",
            )
        return value

    def flag(self, *keys: str) -> bool:
        """Return a truth value; absent and null are false."""
        value = self.get(*keys)
        if value is not None and not isinstance(value, bool):
            raise InputError(
                "E340",
                f"config.json sets {self.named(*keys)} to {value!r}, which is neither true nor false",
                where=Where(file="config.json"),
                help="fetch config.json again",
            )
        return bool(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers; absent and null are empty."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InputError(
                "E340",
                f"config.json sets {key} to {value!r}, which is not a list of whole numbers",
                where=Where(file="config.json"),
                help="fetch config.json again",
            )
        return tuple(value)

    def size(self, *keys: str, minimum: int = 1) -> Size:
        """Return one key's number together with the name of the key."""
        return Size(self.integer(*keys, minimum=minimum), (self.named(*keys),))

    def model_class(self) -> str:
        """Return the class name in ``architectures``, or an empty string."""
        names = self.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
