"""What the functions return: the document of the command, which can be asked, shown in a notebook, and reported on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.output.manifest import MANIFEST
from surgeon.python import views
from surgeon.python.rendering import View, as_html, as_markdown, as_text, framed


class Shown:
    """Something with a view: readable in a terminal, a table in a notebook."""

    def view(self) -> View:
        """Return what is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(self.view())

    def _repr_html_(self) -> str:
        return as_html(self.view())

    def _repr_markdown_(self) -> str:
        return as_markdown(self.view())


class Document(Shown, dict[str, Any]):
    """The document that ``surgeon COMMAND --json`` prints: a dictionary.

    Attributes:
        command: the name of the command.
    """

    def __init__(self, command: str, document: Mapping[str, Any]) -> None:
        super().__init__(document)
        self.command = command

    # A dictionary is pickled as a class, a state and items; the class cannot be called without its arguments.
    def __reduce__(self) -> Any:
        return _again, (type(self), self.command, dict(self), self.__dict__)

    def view(self) -> View:
        return views.of(self.command, self)

    @property
    def warnings(self) -> list[str]:
        """Sentences about what is odd and not wrong."""
        return list(self.get("warnings") or ())


def _again(kind: type[Document], command: str, items: dict[str, Any], state: dict[str, Any]) -> Document:
    found = kind.__new__(kind)
    found.update(items)
    found.__dict__.update({"command": command, **state})
    return found


class Result(Document):
    """What a command made or measured.

    Args:
        file: where the document itself was written, of commands that only measure.
    """

    def __init__(self, command: str, document: Mapping[str, Any], file: Path | None = None) -> None:
        super().__init__(command, document)
        self.file = file

    @property
    def path(self) -> Path | None:
        """The model folder or file that was written, or would be in a dry run; of commands that measure their result file."""
        output = self.get("output")
        found = output.get("path") if isinstance(output, Mapping) else None
        return Path(found) if isinstance(found, str) else self.file

    @property
    def models(self) -> dict[str, Path]:
        """Every model that was written, by name: the members of a family, the points of a sweep; else one, called ""."""
        output = self.get("output")
        named = output.get("models") if isinstance(output, Mapping) else None
        if isinstance(named, Mapping) and named:
            return {str(name): Path(path) for name, path in named.items()}
        written = self.path if isinstance(output, Mapping) and self.get("status") != "dry-run" else None
        if self.command == "run" and not self.get("published"):
            return {}
        return {} if written is None else {"": written}

    @property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """The content of ``surgeon.json`` of every model that was written and is still there."""
        found = {name: _manifest(path) for name, path in self.models.items()}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The content of ``surgeon.json`` of the model, of the first one of a family; None where no model was written."""
        return next(iter(self.manifests.values()), None)

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured."""
        if self.command == "run":
            return dict(self.get("results") or {})
        return dict(self.get("metrics") or {})

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The gates, each with ``passed``."""
        return list(self.get("gates") or ())

    @property
    def passed(self) -> bool:
        """Whether all gates hold; true where there are none."""
        return all(gate["passed"] for gate in self.gates) and self.get("status") != "gate-failed"

    def document(self) -> dict[str, Any]:
        """Return plain data: exactly what ``surgeon COMMAND --json`` prints."""
        return {"schema": 1, "command": self.command, "status": "ok", "exit_code": 0, "error": None, **self}

    def report(self, path: str | Path | None = None, *, title: str | None = None) -> Report | Path:
        """Make the page that ``surgeon report`` makes.

        Args:
            path: a file ending in .html, .md, .svg or .png, or in .json for the document; None returns the page.
            title: its heading.

        Returns:
            The path, or a `Report`, which a notebook shows.

        Raises:
            UsageError: E237 another suffix.
        """
        return report([self.document()], path, title=title)


def _manifest(path: Path) -> dict[str, Any] | None:
    place = path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST}")
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Report:
    """A report that was not written to a file: shown in a notebook in a frame of its own, as Markdown in a terminal.

    Attributes:
        html: the page; it needs no network and holds no scripts.
        markdown: the same as tables for a pull request.
    """

    def __init__(self, documents: list[dict[str, Any]], title: str | None = None, **drawing: bool) -> None:
        from surgeon import report as reports

        self.html = reports.render(documents, "html", title=title, **drawing).decode()
        self.markdown = reports.render(documents, "markdown", title=title, **drawing).decode()

    def _repr_html_(self) -> str:
        return framed(self.html)

    def _repr_markdown_(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return self.markdown

    def __str__(self) -> str:
        return self.markdown


def report(
    documents: list[dict[str, Any]],
    path: str | Path | None = None,
    *,
    title: str | None = None,
    log_tokens: bool = False,
    iso_lines: bool = False,
) -> Report | Path:
    """Make one report over documents; see `Result.report`."""
    from surgeon.report import documents as checked
    from surgeon.report.writing import publish, write

    if path is None:
        return Report(documents, title, log_tokens=log_tokens, iso_lines=iso_lines)
    place = Path(path)
    if place.suffix.lower() != ".json":
        return write(documents, place, title=title, log_tokens=log_tokens, iso_lines=iso_lines)
    for position, one in enumerate(documents):
        checked.validate(one, f"results[{position}]")
    content = documents[0] if len(documents) == 1 else documents
    publish(place, (json.dumps(content, indent=2, default=str) + "\n").encode())
    return place


class Merged(Result):
    """What a merge made; beside the document what the run of its plan says.

    Attributes:
        timing: seconds by kind of work.
        resumed_items: tensors of an interrupted run that were kept.
        summaries: what methods measured of each tensor.
    """

    def __init__(self, document: Mapping[str, Any], outcome: Any = None) -> None:
        super().__init__("merge", document)
        self.timing = getattr(outcome, "timing", None)
        self.resumed_items: int = getattr(outcome, "resumed_items", 0)
        self.summaries: dict[str, Any] = getattr(outcome, "summaries", {})

    @property
    def path(self) -> Path:
        """The folder, or the file, that was written, or would be in a dry run."""
        return Path(self["output"]["path"])

    @property
    def unchanged(self) -> bool:
        """Whether an identical result was already there."""
        return bool(self["output"].get("unchanged"))

    @property
    def seconds(self) -> float:
        """How long the merge took."""
        return float(self.get("seconds") or 0.0)
