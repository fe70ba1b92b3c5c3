"""What the readers of a native recipe share: the document, and every mistake found in it so far."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, UsageError, close_matches
from surgeon.recipe.yaml import Document, KeyPath
from surgeon.scalars import show

VARIABLE = re.compile(r"\$\{")
MAX_ERRORS = 200


@dataclass
class Reading:
    """A recipe that is being read; mistakes are recorded, and raised together at the end."""

    document: Document
    errors: list[SurgeonError] = field(default_factory=list)

    def refuse(
        self, code: str, message: str, path: KeyPath, help: str | None = None, *, key: bool = False
    ) -> None:
        """Record a mistake at a value, or at its key."""
        where = self.document.key_where(path) if key else self.document.where(path)
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(UsageError(code, message, where=where, help=help))

    def at(self, path: KeyPath) -> Any:
        """Return the value at a path, None where nothing is."""
        here: Any = self.document.data
        for word in path:
            try:
                here = here[word]
            except (KeyError, IndexError, TypeError):
                return None
        return here

    def check_keys(self, path: KeyPath, known: Any, what: str) -> bool:
        """Refuse keys of a mapping that are not known (E203); say whether all are."""
        names = list(known)
        wrong = [key for key in self.at(path) if key not in names]
        for key in wrong:
            near = close_matches(key, names)
            self.refuse("E203", f"unknown key {show(key)} in {what}", (*path, key),
                        (f"{near} " if near else "") + f"{what} takes {', '.join(names)}", key=True)  # fmt: skip
        return not wrong

    def text(self, path: KeyPath) -> str | None:
        """Return a text as it is written, so that a revision such as 1e5 stays one; E224 for anything else."""
        value = self.at(path)
        source = self.document.source(path)
        if isinstance(value, (dict, list)) or value is None or source is None or not source.strip():
            self.refuse(
                "E224",
                f"{show(value)} where text is expected",
                path,
                'one line of text, in quotes where it holds ": " or " #"',
            )
            return None
        return source.strip()

    def folder(self, path: KeyPath) -> Path:
        """Return the folder that relative paths at this place start from: the file's, or the current one of --set."""
        file = self.document.where(path).file or self.document.file
        if file is None or file.startswith("--"):
            return Path.cwd()
        return Path(os.path.abspath(file)).parent

    def no_variables(self) -> None:
        """Refuse ${NAME} outside of models (E2006): nothing else is ever replaced."""
        for path, text in self.document.sources.items():
            if VARIABLE.search(text) and path[:1] not in (("models",), ("name",), ("description",)):
                self.refuse("E2006", f"{show(text)}: variables are replaced in models alone", path,
                            "name the model under models: and refer to it; or use --set")  # fmt: skip


def known_list(names: Any) -> str:
    """Return names as one sentence's list."""
    return ", ".join(map(str, names)) or "none"
