"""From results to a file: the suffix chooses the form; what is there is replaced in one step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import EnvironmentFault, OutputConflict, UsageError, Where, close_matches
from surgeon.report import documents, html, markdown, png, run_page, svg
from surgeon.report.plot import scene
from surgeon.report.summary import summarise
from surgeon.report.text import visible

FORMATS = {"html": ".html", "markdown": ".md", "svg": ".svg", "png": ".png"}
"""Format -> suffix."""


def format_of(path: Path) -> str:
    """Return the format a file's suffix names.

    Raises:
        UsageError: E237 another suffix.
    """
    suffixes = {s: f for f, s in FORMATS.items()} | {".htm": "html", ".markdown": "markdown"}
    found = suffixes.get(path.suffix.lower())
    if found is None:
        raise UsageError("E237", f'the suffix of {visible(path)} is "{visible(path.suffix)}"',
                         help=f"a report ends in {', '.join(FORMATS.values())}")  # fmt: skip
    return found


def render(
    results: Sequence[Mapping[str, Any]],
    form: str = "html",
    *,
    title: str | None = None,
    log_tokens: bool = False,
    iso_lines: bool = False,
) -> bytes:
    """Return a report over results as the bytes of a file.

    Args:
        results: result documents of eval, of runs, and of merge, prune, edit, quantize, export, measure and diff.
        form: one of FORMATS.
        log_tokens: logarithmic axis for answer lengths.
        iso_lines: draw lines of equal accuracy per 1,000 tokens.

    Raises:
        UsageError: E235 no results, E237 unknown format, E238 nothing to plot.
        InputError: E234, E236 a document is not sound.
        EnvironmentFault: E512 matplotlib is missing (PNG).
    """
    if form not in FORMATS:
        raise UsageError(
            "E237",
            f'unknown format "{visible(form)}"',
            help=close_matches(form, FORMATS) or ", ".join(FORMATS),
        )
    if not results:
        raise UsageError(
            "E235", "no results to report on", help='give the output of "surgeon eval MODEL --json"'
        )
    for position, document in enumerate(results):
        documents.validate(document, f"results[{position}]")
    if any(document["command"] != "eval" for document in results):
        return _of_runs(results, form, title, log_tokens, iso_lines)
    found = summarise(results, title)
    if form == "markdown":
        return markdown.render(found).encode()
    if form == "html":
        return html.render(found, log_tokens=log_tokens, iso_lines=iso_lines).encode()
    drawn = scene(found, log_tokens=log_tokens, iso_lines=iso_lines)
    if drawn is None:
        raise UsageError("E238", "nothing to plot: no result has both accuracy and mean tokens",
                         help="--format html or markdown show the other metrics; eval --length measures tokens")  # fmt: skip
    return png.draw(drawn) if form == "png" else svg.draw(drawn).encode()


def _of_runs(
    results: Sequence[Mapping[str, Any]], form: str, title: str | None, log_tokens: bool, iso_lines: bool
) -> bytes:
    if form == "markdown":
        return run_page.markdown_all(results, title=title).encode()
    if form == "html":
        return run_page.render_all(results, title=title, log_tokens=log_tokens, iso_lines=iso_lines).encode()
    drawn = run_page.drawing(results, log_tokens=log_tokens, iso_lines=iso_lines)
    if drawn is None:
        raise UsageError("E238", "nothing to plot: no result says anything by layer, and no two models compare",
                         help="--format html or markdown show the tables; the folders of the models must still be there")  # fmt: skip
    return png.draw(drawn) if form == "png" else svg.draw(drawn).encode()


def write(
    results: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    log_tokens: bool = False,
    iso_lines: bool = False,
) -> Path:
    """Write a report; the suffix of ``path`` chooses html, Markdown, SVG or PNG. See `render`.

    Raises:
        OutputConflict: E601 the path is a folder or no regular file.
        EnvironmentFault: E502 not permitted, E503 the path does not work, E505 the disk refuses.
    """
    destination = Path(path)
    content = render(results, format_of(destination), title=title, log_tokens=log_tokens, iso_lines=iso_lines)
    publish(destination, content)
    return destination


def check_place(path: str | Path) -> None:
    """Refuse what `write` would refuse after the work: a wrong suffix, a folder, no folder to write into."""
    destination = Path(path)
    format_of(destination)
    shown = visible(destination)
    if destination.exists() and not destination.is_file():
        raise OutputConflict("E601", f"{shown} is not a file", where=Where(shown), help="choose another -o")
    if not destination.absolute().parent.is_dir():
        raise _no_folder(shown)


def _no_folder(shown: str) -> EnvironmentFault:
    return EnvironmentFault("E503", f"the folder of {shown} does not exist", where=Where(shown),
                            help="make it first, or choose another file")  # fmt: skip


def publish(destination: Path, content: bytes) -> None:
    """Put a file in place: complete, or not at all."""
    shown = visible(destination)
    if destination.exists() and not destination.is_file():
        raise OutputConflict("E601", f"{shown} is not a file", where=Where(shown), help="choose another -o")
    temporary = None
    try:
        # mkstemp gives 0600 whatever the umask; reports are as readable as any file of this user
        descriptor, temporary = tempfile.mkstemp(prefix=".surgeon-report-", dir=destination.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, destination)
        temporary = None
    except PermissionError:
        raise EnvironmentFault(
            "E502", f"cannot write {shown}: permission denied", where=Where(shown), help="choose another -o"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _no_folder(shown) from None
    except OSError as error:
        raise EnvironmentFault(
            "E505",
            f"cannot write {shown}: {error.strerror or error}",
            where=Where(shown),
            help="free disk space, or choose another -o",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
