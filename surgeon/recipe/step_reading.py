"""One step of a native recipe while it is read: the options found so far, and where each of them stands."""

from __future__ import annotations

from typing import Any

from surgeon.recipe.reading import Reading
from surgeon.recipe.references import Names
from surgeon.recipe.schema import Verb
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show


class StepReading:
    """One step; mistakes are recorded.

    Attributes:
        options: option of the request model -> value; models as references or `StepOutput`.
        places: option -> where it stands.
        sound: no mistake was found in the step so far.
        wrong: options whose value was refused.
    """

    def __init__(
        self, reading: Reading, names: Names, verb: Verb, identity: str, path: KeyPath, number: int
    ) -> None:
        self.reading, self.names, self.verb = reading, names, verb
        self.identity, self.path, self.number = identity, path, number
        self.options: dict[str, Any] = {}
        self.places: dict[str, KeyPath] = {}
        self.sound = True
        self.wrong: set[str] = set()

    def refuse(
        self, code: str, message: str, path: KeyPath, help: str | None = None, *, key: bool = False
    ) -> None:
        """Record a mistake in this step."""
        self.sound = False
        self.reading.refuse(code, message, path, help, key=key)

    def take(self, name: str, value: Any, place: KeyPath) -> None:
        """Take an option; two ways to say the same exclude each other."""
        if name in self.options:
            self.refuse(
                "E224",
                f"{show(place[-1])} and {show(self.places[name][-1])} say the same",
                place,
                "leave one out",
                key=True,
            )
            return
        self.options[name], self.places[name] = value, place

    def each(self, value: Any, place: KeyPath, one: Any) -> Any:
        """Convert a value, or every value of a list."""
        if isinstance(value, list):
            return [one(item, (*place, number)) for number, item in enumerate(value)]
        return one(value, place)
