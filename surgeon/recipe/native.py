"""Native recipes (``version: 1``): from a file to a `Recipe`, or to every mistake in it at once.

The version is read first: a recipe written for a newer program is refused for that alone. Then the file is laid
over the one it extends, options of the command line are set, and models, data, steps, gates and the sweep are read.

Codes: E202 version, E2003 extends, E2009 publish, E2012 sweep; see the modules for the others.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, UsageError, Where, close_matches, raise_all
from surgeon.recipe import yaml
from surgeon.recipe.measured import read_gates
from surgeon.recipe.overlay import assign, find, overlay, set_option
from surgeon.recipe.reading import Reading, known_list
from surgeon.recipe.recipe import Point, Recipe, Step
from surgeon.recipe.references import Names
from surgeon.recipe.schema import MACHINE, PUBLISH, TOP, VERBS, VERSION, WHEN
from surgeon.recipe.steps import read_steps
from surgeon.recipe.yaml import Document, KeyPath
from surgeon.scalars import show

MAX_POINTS = 64
_NAMED = re.compile(r"[^\s/\\:*?\"<>|.\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]{0,119}")


def is_native(text: str, file: str | None = None) -> bool:
    """Say whether YAML is a native recipe, and not a merge file of mergekit.

    Raises:
        UsageError: it is no YAML.
    """
    documents = yaml.load_all(text, file, booleans="1.1")
    if len(documents) != 1 or not isinstance(documents[0].data, dict):
        return False
    return "merge_method" not in documents[0].data and bool(
        {"version", "steps", "extends"} & documents[0].data.keys()
    )


def read(file: str | Path, settings: Sequence[str] = (), *, seed: int | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        file: the file.
        settings: PATH=VALUE of ``--set``, in order.
        seed: takes the place of the recipe's own.

    Raises:
        UsageError: everything that is wrong with it, each with line and column.
    """
    document = yaml.load_file(file)
    _check_version(document)
    document = _extended(document, Path(file))
    for text in settings:
        document = set_option(document, text)
    if seed is not None:
        document = assign(document, ("seed",), seed, Where(file=f"--seed {seed}"))
    return parse(document)


def parse(document: Document) -> Recipe:
    """Read a document as a recipe, its sweep included."""
    reading = Reading(document)
    recipe = _read(reading)
    points = _sweep(reading) if not reading.errors else ()
    raise_all(sorted(reading.errors, key=_place))
    assert recipe is not None
    return replace(recipe, points=points)


def _place(error: SurgeonError) -> tuple[str, int, int]:
    """Return where a mistake stands, so that they are shown in the order of the file."""
    where = error.where or Where()
    return where.file or "", where.line or 0, where.column or 0


def _check_version(document: Document) -> None:
    data = document.data
    if not isinstance(data, dict):
        raise UsageError(
            "E202",
            f"a recipe is a mapping that begins with version: 1, this is {show(data)}",
            where=document.where(()),
            help="surgeon recipe copy writes one to begin with; a mergekit file is run by surgeon merge FILE.yaml",
        )
    if "version" not in data:
        raise UsageError(
            "E202",
            "the recipe does not say its version",
            where=document.where(()),
            help=f"begin with version: {VERSION}",
        )
    version = data["version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UsageError(
            "E202",
            f"{show(version)} is no version of recipes",
            where=document.where(("version",)),
            help=f"version: {VERSION}",
        )
    if version > VERSION:
        from surgeon import __version__

        raise UsageError("E202", f"the recipe has version {version}; surgeon {__version__} reads version {VERSION}",
                         where=document.where(("version",)), help=f"a newer release is needed, one that reads version {version}: pip install -U model-surgeon")  # fmt: skip


def _extended(document: Document, file: Path) -> Document:
    """Lay a recipe over the one it extends, which lies in the same folder or below (fault F8)."""
    if "extends" not in document.data:
        return document
    where, text = document.where(("extends",)), document.source(("extends",))
    if not text or not isinstance(document.data["extends"], str):
        raise UsageError(
            "E2003",
            f"{show(document.data['extends'])} is no file to extend",
            where=where,
            help="extends: base.yaml",
        )
    folder = file.absolute().parent
    place = folder / text
    if Path(text).is_absolute() or not place.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "E2003",
            f"{show(text)} lies outside the recipe's folder",
            where=where,
            help="a recipe extends one beside it or below it",
        )
    if not place.is_file():
        raise UsageError("E2003", f"there is no {show(text)} to extend", where=where, help=_near(place))
    base = yaml.load_file(place)
    _check_version(base)
    if "extends" in base.data:
        raise UsageError("E2003", f"{show(text)} extends another recipe itself", where=base.key_where(("extends",)), help="one level is read; name the last one")  # fmt: skip
    return overlay(base, document)


def _near(place: Path) -> str:
    try:
        near = close_matches(place.name, [path.name for path in place.parent.iterdir()])
    except OSError:
        near = None
    return near or "the path starts from the folder of this recipe"


def _read(reading: Reading) -> Recipe | None:
    data = reading.document.data
    reading.check_keys((), TOP, "a recipe")
    reading.no_variables()
    name = _name(reading)
    description = "" if data.get("description") is None else reading.text(("description",)) or ""
    seed = _seed(reading)
    names = Names(reading)
    defaults = _defaults(reading)
    steps = read_steps(reading, names, defaults, seed)
    publish, when = _publish(reading, steps)
    gates = read_gates(reading, steps, publish)
    if not isinstance(data.get("fuse", False), bool):
        reading.refuse("E224", f"fuse is {show(data['fuse'])}", ("fuse",), "true or false")
    if reading.errors:
        return None
    warnings = _warnings(reading, names, steps)
    fuse = data.get("fuse") is True
    return Recipe(
        name, description, seed, reading.document.file, names.models, names.data, tuple(steps), tuple(gates), publish, when,
        tuple((path, reading.document.where(place)) for path, place in names.files.items()), (), tuple(warnings),
        fuse,
    )  # fmt: skip


def _name(reading: Reading) -> str:
    if reading.at(("name",)) is None:
        return Path(reading.document.file or "recipe").stem
    text = reading.text(("name",)) or "recipe"
    if not _NAMED.fullmatch(text):
        reading.refuse(
            "E224",
            f"{show(text)} is no name of a recipe",
            ("name",),
            "the output is called so when no -o is given: no / or :",
        )
    return text


def _seed(reading: Reading) -> int:
    value = reading.at(("seed",))
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        reading.refuse("E224", f"seed is {show(value)}", ("seed",), "a whole number from 0 up")
        return 0
    return value


def _defaults(reading: Reading) -> dict[str, Any]:
    """Return options that every step takes whose verb knows them; sizes as bytes."""
    value = reading.at(("defaults",))
    if value is None:
        return {}
    if not isinstance(value, dict):
        reading.refuse(
            "E224", f"{show(value)} where defaults are expected", ("defaults",), "defaults: {dtype: bfloat16}"
        )
        return {}
    known = {
        name
        for verb in VERBS.values()
        for name in verb.options
        if name not in verb.references and name != "models"
    }
    found = {}
    for name, one in value.items():
        place: KeyPath = ("defaults", name)
        if name in MACHINE:
            reading.refuse(
                "E2008",
                f"{name} belongs to the run, not to the recipe",
                place,
                f"surgeon run ... {MACHINE[name]}",
                key=True,
            )
        elif name not in known:
            near = close_matches(name, known)
            reading.refuse(
                "E203",
                f"unknown key {show(name)} in defaults",
                place,
                (f"{near} " if near else "") + "an option of a step",
                key=True,
            )
        else:
            found[name] = _bytes(reading, one, place) if name == "max_shard_size" else one
    return found


def _bytes(reading: Reading, value: Any, place: KeyPath) -> Any:
    from surgeon.system import parse_size

    try:
        return parse_size(value) if isinstance(value, str) else value
    except ValueError:
        reading.refuse("E224", f"{show(value)} is no size", place, "such as 5GB")
        return 1


def _publish(reading: Reading, steps: list[Step]) -> tuple[str | None, str]:
    writing = [step.id for step in steps if step.writes]
    last = writing[-1] if writing else None
    value = reading.at(("publish",))
    if value is None:
        return last, "on_pass"
    if not isinstance(value, dict):
        reading.refuse(
            "E2009",
            f"{show(value)} does not say what is published",
            ("publish",),
            "publish: {step: ID, when: on_pass}",
        )
        return last, "on_pass"
    reading.check_keys(("publish",), PUBLISH, "publish")
    when = value.get("when", "on_pass")
    if when not in WHEN:
        near = close_matches(when, WHEN) if isinstance(when, str) else None
        reading.refuse(
            "E2009",
            f"{show(when)} is no time to publish",
            ("publish", "when"),
            near or f"one of {known_list(WHEN)}",
        )
        when = "on_pass"
    step = value.get("step", last)
    if step not in writing:
        near = close_matches(step, writing) if isinstance(step, str) else None
        reading.refuse("E2009", f"no step that makes a model is called {show(step)}", ("publish", "step"),
                       (f"{near} " if near else "") + f"steps that do: {known_list(writing)}")  # fmt: skip
        return last, when
    return step, when


def _warnings(reading: Reading, names: Names, steps: list[Step]) -> list[str]:
    """Say which models and data are named and not used."""
    text = [reading.at(("steps", number, verb)) for number, (_, verb) in enumerate(names.steps) if verb]
    words = {str(one) for value in text for one in _words(value)}
    used = {str(step.options.get("model")) for step in steps}
    found = [
        f'the model "{n}" is named and not used'
        for n, m in names.models.items()
        if n not in words and m.reference not in used
    ]
    return found + [
        f'the data set "{name}" is named and not used' for name in names.data if name not in words
    ]


def _words(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [word for one in value.values() for word in _words(one)]
    if isinstance(value, list):
        return [word for one in value for word in _words(one)]
    return [value]


# ---- sweeps ---------------------------------------------------------------------------------------


def _sweep(reading: Reading) -> tuple[Point, ...]:
    """Return one recipe for each combination of the values of a sweep."""
    given = reading.at(("sweep",))
    if given is None:
        return ()
    if not isinstance(given, dict) or not given:
        reading.refuse(
            "E2012",
            f"{show(given)} where a sweep is expected",
            ("sweep",),
            "sweep: {steps.merged.merge.parameters.lambda: [0.5, 1.0]}",
        )
        return ()
    axes = [axis for words in given if (axis := _axis(reading, words, given[words])) is not None]
    count = math.prod(len(values) for _, values in axes)
    if count > MAX_POINTS:
        reading.refuse(
            "E2012",
            f"the sweep has {count:,} points",
            ("sweep",),
            f"at most {MAX_POINTS} models are made at once",
        )
    if reading.errors:
        return ()
    names = _axis_names([words for words in given])
    points: dict[str, Point] = {}
    for chosen in itertools.product(*(enumerate(values) for _, values in axes)):
        document, values, shown = reading.document, {}, []
        for (path, _), words, name, (number, value) in zip(axes, given, names, chosen, strict=True):
            place: KeyPath = ("sweep", words, number)
            document = assign(
                document, path, value, reading.document.where(place), reading.document.source(place)
            )
            values[words] = value
            shown.append(f"{name}={_file_safe(value)}")
        key = ",".join(shown)
        if key in points:
            reading.refuse(
                "E2012",
                f"two points of the sweep would be called {show(key)}",
                ("sweep",),
                "values must differ in letters and digits",
            )
            return ()
        one = Reading(document)
        recipe = _read(one)
        _add_new(reading, one.errors)
        if recipe is not None:
            points[key] = Point(key, values, recipe)
    return tuple(points.values())


def _add_new(reading: Reading, errors: list[SurgeonError]) -> None:
    seen = {(error.code, error.message, error.where) for error in reading.errors}
    reading.errors.extend(error for error in errors if (error.code, error.message, error.where) not in seen)


def _axis(reading: Reading, words: str, values: Any) -> tuple[KeyPath, list[Any]] | None:
    place: KeyPath = ("sweep", words)
    try:
        path = find(reading.document.data, words, reading.document.key_where(place))
    except UsageError as error:
        reading.errors.append(UsageError("E2012", error.message, where=error.where, help=error.help))
        return None
    if path[0] not in ("models", "data", "steps", "defaults", "seed"):
        reading.refuse(
            "E2012",
            f"{show(words)} cannot be swept",
            place,
            "a value of models, data, steps, defaults, or the seed",
            key=True,
        )
        return None
    if (
        not isinstance(values, list)
        or len(values) < 1
        or any(isinstance(value, (list, dict)) for value in values)
    ):
        reading.refuse(
            "E2012", f"{show(values)} where a list of values is expected", place, "such as [0.4, 0.5, 0.6]"
        )
        return None
    return path, values


def _axis_names(axes: list[str]) -> list[str]:
    """Return the shortest ending of each path that no other one has: weight, or 0.weight and 1.weight."""
    found = []
    for words in axes:
        parts = words.split(".")
        for count in range(1, len(parts) + 1):
            ending = parts[-count:]
            if sum(other.split(".")[-count:] == ending for other in axes) == 1:
                break
        found.append(_file_safe(".".join(ending)))
    return found


def _file_safe(value: Any) -> str:
    return (
        re.sub(r"[^A-Za-z0-9._+-]", "-", f"{value:g}" if isinstance(value, float) else str(value)).strip(".")[
            -40:
        ]
        or "-"
    )
