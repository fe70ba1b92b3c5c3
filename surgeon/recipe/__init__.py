"""YAML that people write; and the functions of ``surgeon recipe``: `validate`, `show`, `schema`, `list` and `copy`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builtins import list as List


def validate(
    files: str | Path | Sequence[str | Path], *, set: str | Sequence[str] = (), inputs: bool = False, strict: bool = False
) -> dict[str, List[str]]:  # fmt: skip
    """Check recipes without running them.

    Args:
        files: recipes, mergekit YAML, or names of recipes that come with the package; one or several.
        set: PATH=VALUE, such as ``models.long=./mine``.
        inputs: models and files must be there, too.
        strict: warnings are errors.

    Returns:
        File -> warnings.

    Raises:
        SurgeonError: what is wrong, with line and column; further mistakes, of all files, are its ``others``.

    Example:
        >>> surgeon.recipe.validate("recipe.yaml")  # doctest: +SKIP
    """
    from surgeon.errors import SurgeonError, UsageError, raise_all
    from surgeon.recipe.checking import check

    names = [files] if isinstance(files, (str, Path)) else files
    found: dict[str, List[str]] = {}
    errors: List[SurgeonError] = []
    for name in map(str, names):
        try:
            found[name] = check(name, _several(set), inputs)
            if found[name] and strict:
                raise UsageError("E220", f"strict: {name}: {found[name][0]}", help="change what the warning names, or leave out strict")  # fmt: skip
        except SurgeonError as error:
            errors.append(error)
    raise_all(errors)
    return found


def show(file: str | Path, *, set: str | Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe resolved, as plain data: what it extends, defaults and references filled in; a mergekit YAML as it is.

    Example:
        >>> surgeon.recipe.show("recipe.yaml", set="models.long=./mine")  # doctest: +SKIP
    """
    import json

    from surgeon.recipe import native, shipped, yaml

    path = shipped.file_of(str(file))
    text = yaml.read_text(path)
    if not native.is_native(text, str(path)) and "merge_method" in text:
        import yaml as pyyaml

        validate(path, set=set)
        documents = [*pyyaml.safe_load_all(text)]
        return documents[0] if len(documents) == 1 else {"documents": documents}
    recipe = native.read(path, _several(set))
    return json.loads(json.dumps(recipe.plain()))


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    from surgeon.recipe.json_schema import json_schema

    return json_schema()


def list() -> List[dict[str, str]]:
    """Return the recipes that come with the package: name, folder, goal, summary.

    Example:
        >>> [one["name"] for one in surgeon.recipe.list()]  # doctest: +SKIP
    """
    from surgeon.recipe.shipped import shipped

    return [
        {"name": one.name, "folder": one.kind, "goal": one.goal, "summary": one.summary} for one in shipped()
    ]


def copy(name: str, destination: str | Path | None = None) -> Path:
    """Copy a recipe that comes with the package, to change it.

    Args:
        destination: file or folder; default NAME.yaml in the current folder.

    Example:
        >>> surgeon.recipe.copy("merge-then-quantize", "mine.yaml")  # doctest: +SKIP
    """
    from surgeon.recipe import shipped

    return shipped.copy(name, None if destination is None else Path(destination))


def _several(texts: str | Sequence[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)
