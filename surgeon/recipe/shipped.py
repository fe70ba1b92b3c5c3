"""Recipes that come with the package: listed, found by name, copied.

Codes: E2013 no such recipe; E601 the copy would replace something.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import EnvironmentFault, OutputConflict, UsageError, close_matches


@dataclass(frozen=True)
class Shipped:
    """A recipe: its name, folder, file and what it says about itself in one line."""

    name: str
    kind: str
    file: Path
    summary: str


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
    """Return every recipe that comes with the package."""
    place = folder()
    return [
        Shipped(file.stem, file.parent.name, file, _summary(file)) for file in sorted(place.glob("*/*.yaml"))
    ]


def _summary(file: Path) -> str:
    """Return a recipe's description, or the first line of its comment."""
    first = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("description:"):
            return line.partition(":")[2].strip()
        if line.startswith("#") and not first:
            first = line[1:].strip()
    return first


def named(name: str) -> Shipped:
    """Return one recipe.

    Raises:
        UsageError: E2013.
    """
    known = shipped()
    found = next(
        (one for one in known if name in (one.name, f"{one.kind}/{one.name}", f"{one.kind}/{one.name}.yaml")),
        None,
    )
    if found is None:
        near = close_matches(name, [one.name for one in known])
        raise UsageError(
            "E2013", f'no recipe is called "{name[:60]}"', help=near or "surgeon recipe list shows all"
        )
    return found


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
