"""Recipes that come with the package: listed by goal, found by name, copied.

Codes: E2013 no such recipe; E601 the copy would replace something.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from surgeon.errors import EnvironmentFault, OutputConflict, UsageError, close_matches

GOALS = {
    "prune": "make a dense model smaller or faster",
    "experts": "make a mixture of experts smaller",
    "quantize": "store a model in 4 or 8 bits",
    "mixed-precision": "choose bits for each matrix: for a size, an average or a divergence",
    "pipelines": "several steps with gates: merge, prune, quantize, sweep",
    "long-to-short": "published merges for shorter answers (mergekit YAML)",
}
"""Folder -> what its recipes are for, in the order they are listed."""


@dataclass(frozen=True)
class Shipped:
    """A recipe: its name, folder, file and what it says about itself in one line."""

    name: str
    kind: str
    file: Path
    summary: str

    @property
    def goal(self) -> str:
        """What recipes of its folder are for."""
        return GOALS.get(self.kind, "")


def folder() -> Path:
    """Return where the recipes lie: in the installed package, else in the source tree.

    Raises:
        EnvironmentFault: E502 neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "recipes", package.parent / "recipes"):
        if place.is_dir():
            return place
    raise EnvironmentFault(
        "E502", "the recipes are not installed", help="pip install --force-reinstall model-surgeon"
    )


def shipped() -> list[Shipped]:
    """Return every recipe that comes with the package, by goal, then by name."""
    order = list(GOALS)
    found = [Shipped(file.stem, file.parent.name, file, _summary(file)) for file in folder().glob("*/*.yaml")]
    return sorted(
        found,
        key=lambda one: (order.index(one.kind) if one.kind in GOALS else len(order), one.kind, one.name),
    )


def _summary(file: Path) -> str:
    """Return a recipe's description, or the first sentence of its comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("description:"):
            return line.partition(":")[2].strip()
    comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"\. |\.$", comment, maxsplit=1)[0]


def named(name: str) -> Shipped:
    """Return one recipe.

    Raises:
        UsageError: E2013.
    """
    known = shipped()
    found = _match(name, known)
    if found is None:
        near = close_matches(name, [one.name for one in known])
        raise UsageError(
            "E2013", f'no recipe is called "{name[:60]}"', help=near or "surgeon recipe list shows all"
        )
    return found


def _match(name: str, known: list[Shipped]) -> Shipped | None:
    return next(
        (one for one in known if name in (one.name, f"{one.kind}/{one.name}", f"{one.kind}/{one.name}.yaml")),
        None,
    )


def file_of(text: str) -> Path:
    """Return the file that is meant: the one at a path, else the recipe that comes with the package by that name.

    Raises:
        UsageError: E2013 neither, and the text does not look like a file.
    """
    path = Path(text)
    # A run publishes under the recipe's name by default, so a folder of that name does not stand for the recipe.
    if path.exists() and not path.is_dir():
        return path
    found = _match(text, shipped())
    if found is not None:
        return found.file
    if path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1 or path.is_dir():
        return path  # what reads it says what is wrong with it
    return named(text).file


def copy(name: str, destination: Path | None = None) -> Path:
    """Copy a recipe to a file, or into a folder; nothing is replaced.

    Raises:
        UsageError: E2013. OutputConflict: E601. EnvironmentFault: E502.
    """
    recipe = named(name)
    target = destination or Path(recipe.file.name)
    if target.is_dir():
        target = target / recipe.file.name
    try:
        with open(target, "xb") as stream:
            stream.write(recipe.file.read_bytes())
    except FileExistsError:
        raise OutputConflict(
            "E601", f"the file exists: {target}", help="choose another name; nothing is replaced"
        ) from None
    except OSError as error:
        raise EnvironmentFault(
            "E502", f"cannot write {target}: {error.strerror}", help="choose another file"
        ) from error
    return target
