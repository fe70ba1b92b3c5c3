"""A native recipe, read and resolved: plain data, ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError, Where, raise_all
from surgeon.evaluate.gates import Gate


@dataclass(frozen=True)
class StepOutput:
    """The model that a step makes, where another step's option names one."""

    step: str

    def __str__(self) -> str:
        return f"<{self.step}>"


@dataclass(frozen=True)
class Model:
    """A named model: how it is opened, and where a local one lies."""

    name: str
    reference: str
    local: Path | None
    where: Where


@dataclass(frozen=True)
class DataSet:
    """A named set of texts or questions: its source as the verbs take it, and how much of it calibrates."""

    name: str
    source: str
    samples: int | None = None
    sequence_length: int | None = None


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        options: of the verb's request model; models are references or `StepOutput`.
        models: model option -> how the recipe names it, for what people read.
        gate_limited: gates may decide over part of the data.
    """

    id: str
    verb: str
    options: dict[str, Any]
    where: Where
    writes: bool = True
    gate_limited: bool = False

    @property
    def uses(self) -> tuple[str, ...]:
        """Steps whose models this one reads."""
        return tuple(dict.fromkeys(one.step for one in leaves(self.options) if isinstance(one, StepOutput)))


@dataclass(frozen=True)
class RecipeGate:
    """A gate, the step that measures its metric (None: a size of the published model) and the metric's name there."""

    gate: Gate
    step: str | None
    metric: str
    where: Where


@dataclass(frozen=True)
class Point:
    """One point of a sweep: what was set, and the recipe with it."""

    name: str
    values: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs to know.

    Attributes:
        file: as it was named.
        publish: id of the step whose model becomes the output; None when no step makes one.
        files: local files and folders that are read -> where they are named.
        fuse: models between steps are handed on unwritten where that is possible.
    """

    name: str
    description: str
    seed: int
    file: str | None
    models: dict[str, Model]
    data: dict[str, DataSet]
    steps: tuple[Step, ...]
    gates: tuple[RecipeGate, ...] = ()
    publish: str | None = None
    when: str = "on_pass"
    files: tuple[tuple[Path, Where], ...] = ()
    points: tuple[Point, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    fuse: bool = False

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.id == name)

    def check_files(self) -> None:
        """Refuse models and files that are not there (fault F7).

        Raises:
            UsageError: E2005, all of them at once.
        """
        found = {}
        for one in (self, *(point.recipe for point in self.points)):
            for model in one.models.values():
                if model.local is not None and not model.local.exists():
                    found[model.where, model.local] = (f'the model "{model.name}"', model.local)
            for path, where in one.files:
                if not path.exists():
                    found[where, path] = ("the file", path)
        raise_all(
            UsageError("E2005", f"{what} does not exist: {path}", where=where,
                       help="--set models.NAME=PATH puts your own in its place" if what.startswith("the model") else
                       "paths are relative to the recipe")
            for (where, _), (what, path) in found.items()
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """Return the recipe as ``surgeon recipe show`` prints it: every default and reference resolved."""
        steps = []
        for step in self.steps:
            names = {model.reference: model.name for model in self.models.values()}
            steps.append({"id": step.id, step.verb: _plain(step.options, names)})
        found: dict[str, Any] = {"version": 1, "name": self.name}
        found |= {"description": self.description} if self.description else {}
        found |= {
            "seed": self.seed,
            **({"fuse": True} if self.fuse else {}),
            "models": {name: model.reference for name, model in self.models.items()},
            "steps": steps,
        }
        found |= {"gates": [gate.gate.text for gate in self.gates]} if self.gates else {}
        found |= {"publish": {"step": self.publish, "when": self.when}} if self.publish else {}
        found |= {"points": {point.name: point.values for point in self.points}} if self.points else {}
        return found


def leaves(value: Any) -> Iterator[Any]:
    """Yield every value inside lists and mappings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def replaced(value: Any, change: Any) -> Any:
    """Return a value with ``change`` applied to every leaf."""
    if isinstance(value, dict):
        return {key: replaced(one, change) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [replaced(one, change) for one in value]
    return change(value)


def _plain(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return replaced(
        options,
        lambda one: (
            one.step if isinstance(one, StepOutput) else names.get(one, one) if isinstance(one, str) else one
        ),
    )
