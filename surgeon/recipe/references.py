"""What names in a native recipe stand for: models, data sets, files, and models that steps make.

Codes: E224 not a name, E273 a name nothing has, E2001 a name given twice, E2004 a step that needs a later one or
itself, E2006 a variable, E2011 not a step.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.checkpoint.source import looks_local
from surgeon.errors import UsageError, close_matches
from surgeon.merge.references import expand_variables, parse_model_ref
from surgeon.recipe.reading import Reading, known_list
from surgeon.recipe.recipe import DataSet, Model, StepOutput
from surgeon.recipe.schema import DATA, VERBS
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_DOMAIN = re.compile(r"([A-Za-z_]\w*)=(.+)")
_SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".parquet", ".csv", ".safetensors", ".yaml", ".yml", ".jinja")


class Names:
    """Everything a recipe gives a name to; mistakes are recorded in the reading."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.files: dict[Path, KeyPath] = {}
        self.steps = self._steps()
        self.models = self._models()
        self.data = self._data()

    # ---- what is named ---------------------------------------------------------------------------

    def _steps(self) -> list[tuple[str | None, str | None]]:
        """Return (id, verb) of every step, None where it has none."""
        given = self.reading.at(("steps",))
        if not isinstance(given, list) or not given:
            self.reading.refuse(
                "E2011", "a recipe has a list of steps", ("steps",), "steps: [{id: merged, merge: {...}}]"
            )
            return []
        first: dict[str, int] = {}
        found = []
        for number, item in enumerate(given):
            path: KeyPath = ("steps", number)
            if not isinstance(item, dict):
                self.reading.refuse(
                    "E2011", f"{show(item)} where a step is expected", path, "{id: merged, merge: {...}}"
                )
                found.append((None, None))
                continue
            self.reading.check_keys(path, ("id", *VERBS), "a step")
            verbs = [key for key in item if key in VERBS]
            if len(verbs) != 1:
                said = " and ".join(verbs) or "none"
                self.reading.refuse(
                    "E2011", f"a step has one verb, {said} given", path, f"one of {known_list(VERBS)}"
                )
            identity = self._identity(item, path, first, number)
            found.append((identity, verbs[0] if len(verbs) == 1 else None))
        return found

    def _identity(
        self, item: dict[str, Any], path: KeyPath, first: dict[str, int], number: int
    ) -> str | None:
        text = self.reading.document.source((*path, "id"))
        if text is None or not _NAME.fullmatch(text):
            shown = show(item.get("id"))
            self.reading.refuse("E2011", "a step has an id" if "id" not in item else f"{shown} is no id of a step", (*path, "id"),
                                "letters, digits, _ and -; results lie in a folder of that name")  # fmt: skip
            return None
        if text in first:
            before = self.reading.document.where(("steps", first[text], "id"))
            self.reading.refuse(
                "E2001",
                f"two steps are called {show(text)}; the first is on line {before.line}",
                (*path, "id"),
                "every step has an id of its own",
            )
            return None
        first[text] = number
        return text

    def _models(self) -> dict[str, Model]:
        found = {}
        for name in self._mapping("models"):
            path = ("models", name)
            if any(name == identity for identity, _ in self.steps):
                self.reading.refuse(
                    "E2001",
                    f"a model and a step are called {show(name)}",
                    path,
                    "rename one of them",
                    key=True,
                )
            text = self.reading.text(path)
            if text is not None:
                found[name] = self._model(name, text, path)
        return {name: model for name, model in found.items() if model is not None}

    def _model(self, name: str, text: str, path: KeyPath) -> Model | None:
        where = self.reading.document.where(path)
        try:
            text = expand_variables(text, os.environ, where=where)
            folder = self.reading.folder(path)
            beside = _under(folder, text)
            if beside is not None and beside.exists():
                return Model(name, str(beside), beside, where)
            reference = parse_model_ref(text, where=where)
        except UsageError as error:
            self.reading.errors.append(error)
            return None
        anchored = {}
        for key in ("path", "adapter"):
            part = getattr(reference, key)
            near = _under(folder, part) if part else None
            if near is not None and (part.startswith((".", "~", "/")) or near.exists()):
                anchored[key] = str(near)
        reference = replace(reference, **anchored)
        local = Path(reference.path) if looks_local(reference.path) and not text.startswith("hf://") else None
        return Model(name, f"hf://{reference}" if text.startswith("hf://") else str(reference), local, where)

    def _data(self) -> dict[str, DataSet]:
        found = {}
        for name in self._mapping("data"):
            path = ("data", name)
            item = self.reading.at(path)
            if isinstance(item, str):
                found[name] = DataSet(name, self.text(item, path))
                continue
            if not isinstance(item, dict):
                self.reading.refuse(
                    "E224",
                    f"{show(item)} where a data set is expected",
                    path,
                    "{file: questions.jsonl} or {dataset: org/name, split: train}",
                )
                continue
            self.reading.check_keys(path, DATA, "a data set")
            found[name] = self._data_set(name, item, path)
        return found

    def _data_set(self, name: str, item: dict[str, Any], path: KeyPath) -> DataSet:
        if ("dataset" in item) == ("file" in item):
            self.reading.refuse(
                "E224",
                "a data set is a dataset or a file",
                path,
                "dataset: org/name, or file: questions.jsonl",
            )
            return DataSet(name, "")
        if "file" in item:
            for key in ("config", "split"):
                if key in item:
                    self.reading.refuse(
                        "E224", f"a file has no {key}", (*path, key), "leave it out", key=True
                    )
            text = self.reading.text((*path, "file"))
            source = self.text(text, (*path, "file")) if text else ""
        else:
            parts = [
                self.reading.text((*path, key)) if key in item else ""
                for key in ("dataset", "config", "split")
            ]
            source = ":".join(part or "" for part in parts).rstrip(":")
        numbers = {}
        for key, least in (("samples", 1), ("sequence_length", 2)):
            value = item.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                self.reading.refuse(
                    "E224", f"{key} is {show(value)}", (*path, key), f"a whole number from {least} up"
                )
            else:
                numbers[key] = value
        return DataSet(name, source, **numbers)

    def _mapping(self, key: str) -> list[str]:
        value = self.reading.at((key,))
        if value is None:
            return []
        if not isinstance(value, dict):
            self.reading.refuse(
                "E224", f"{show(value)} where {key} are named", (key,), f"{key}: {{NAME: ...}}"
            )
            return []
        for name in value:
            if not _NAME.fullmatch(name):
                self.reading.refuse(
                    "E224", f"{show(name)} is no name", (key, name), "letters, digits, _ and -", key=True
                )
        return list(value)

    # ---- what names stand for --------------------------------------------------------------------

    def model(self, name: str, number: int, path: KeyPath) -> str | StepOutput | None:
        """Return the reference of a named model, or the output of an earlier step; None when there is neither."""
        if name in self.models:
            return self.models[name].reference
        order = [identity for identity, _ in self.steps]
        if name in order:
            return self._output(name, number, order.index(name), path)
        if name in (self.reading.at(("models",)) or {}):
            return None  # what is wrong with it is said there
        known = [*self.models, *(identity for identity in order[:number] if identity)]
        near = close_matches(name, known)
        self.reading.refuse("E273", f"no model and no step is called {show(name)}", path,
                            (f"{near} " if near else "") + f"known here: {known_list(known)}")  # fmt: skip
        return None

    def _output(self, name: str, number: int, other: int, path: KeyPath) -> StepOutput | None:
        verb = self.steps[other][1]
        if other >= number:
            mine = self.steps[number][0]
            back = self.reading.at(("steps", other)) or {}
            circle = name == mine or (other > number and mine is not None and _mentions(back, mine))
            said = f"{mine} -> {name}" + ("" if name == mine else f" -> {mine}")
            self.reading.refuse("E2004", f"the steps go in a circle: {said}" if circle else f"step {show(mine)} needs {show(name)}, which runs after it",
                                path, "steps run in the order they are written; name an earlier one")  # fmt: skip
            return None
        if verb is not None and not VERBS[verb].writes:
            self.reading.refuse(
                "E273",
                f"step {show(name)} ({verb}) makes no model",
                path,
                f"steps that do: {known_list(self.writing(number))}",
            )
            return None
        return StepOutput(name)

    def writing(self, before: int) -> list[str]:
        """Return the steps before a number that make a model."""
        return [
            i for i, verb in self.steps[:before] if i is not None and verb is not None and VERBS[verb].writes
        ]

    def default_input(self, number: int, path: KeyPath) -> str | StepOutput | None:
        """Return what a step works on when it names nothing: the model made before it, or the only model there is."""
        made = self.writing(number)
        if made:
            return StepOutput(made[-1])
        if len(self.models) == 1:
            return next(iter(self.models.values())).reference
        self.reading.refuse(
            "E273",
            "the step names no model, and none is made before it",
            path,
            f"model: one of {known_list(self.models)}",
            key=True,
        )
        return None

    def file(self, path: KeyPath) -> str | None:
        """Return a file beside the recipe, or what is written where none is there; files are looked for before a run."""
        text = self.reading.text(path)
        return None if text is None else self.text(text, path)

    def text(self, text: str, path: KeyPath) -> str:
        """Return where a text or file lies: beside the recipe, or a dataset id as it is; ``NAME=FILE`` keeps its name."""
        domain = _DOMAIN.fullmatch(text)
        if domain is not None:
            return f"{domain[1]}={self.text(domain[2], path)}"
        place = _under(self.reading.folder(path), text)
        if place is not None and (
            text.startswith((".", "~", "/")) or text.endswith(_SUFFIXES) or place.exists()
        ):
            self.files.setdefault(place, path)
            return str(place)
        return text


def _under(folder: Path, text: str) -> Path | None:
    if not text or "\0" in text or len(text) > 4096:
        return None
    place = Path(os.path.expanduser(text))
    return Path(os.path.normpath(place if place.is_absolute() else folder / place))


def _mentions(value: Any, word: str) -> bool:
    if isinstance(value, dict):
        return any(_mentions(one, word) for key, one in value.items() if key != "id")
    if isinstance(value, list):
        return any(_mentions(one, word) for one in value)
    return value == word
