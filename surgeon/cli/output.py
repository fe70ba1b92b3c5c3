"""The one object that prints: data to stdout, everything else to stderr.

Human mode uses plain lines (colour only on a terminal); ``--json`` prints exactly one object on
stdout. A closed pipe neither aborts the work nor shows a traceback (fault A4).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

from surgeon.errors import SurgeonError

MAX_LINES = 12


def plain(text: object) -> str:
    """Return text that cannot drive a terminal: control characters escaped (fault G7)."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text)
    )


class Output:
    """Printing for one command.

    Args:
        json_mode: one JSON document on stdout, nothing else there.
        quiet: no notes, no progress.
        verbose: all findings of an error.
        progress: show progress on stderr.
    """

    def __init__(
        self, json_mode: bool = False, quiet: bool = False, verbose: bool = False, progress: bool = True
    ) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self.verbose = verbose
        self.show_progress = progress and not quiet
        self.color = (
            sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        self._lock = threading.Lock()
        self._bar = ""

    def line(self, text: object = "") -> None:
        """Print one line of data to stdout (human mode only)."""
        if not self.json_mode:
            self._write(sys.stdout, plain(text) + "\n")

    def document(self, value: dict[str, Any]) -> None:
        """Print the JSON document."""
        self._write(sys.stdout, json.dumps(value, indent=2, default=str) + "\n")

    def table(self, header: list[str], rows: list[list[object]]) -> None:
        """Print an aligned table; numbers (text that starts with a digit or sign) to the right."""
        texts = [[plain(c) for c in row] for row in [header, *rows]]
        widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
        right = [bool(rows) and all(_numeric(str(row[i])) for row in rows) for i in range(len(header))]
        for row in texts:
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
            self.line("  ".join(cells).rstrip())

    def note(self, text: object) -> None:
        if not self.quiet:
            self.log(f"note: {plain(text)}")

    def warning(self, text: object) -> None:
        self.log(self._paint("warning:", "33") + f" {plain(text)}")

    def log(self, text: str) -> None:
        """Print one line to stderr."""
        with self._lock:
            self._clear()
            self._write(sys.stderr, text + "\n")

    def error(self, error: SurgeonError) -> None:
        """Print a refusal: what, where, help, and further findings."""
        lines = self._error_lines(error)
        shown = 0
        for other in error.others:
            if not self.verbose and len(lines) >= MAX_LINES - 1:
                break
            lines.extend(self._error_lines(other, short=not self.verbose))
            shown += 1
        hidden = len(error.others) - shown
        if hidden:
            lines.append(f"and {hidden} more, use -v")
        for line in lines:
            self.log(line)

    def _error_lines(self, error: SurgeonError, short: bool = False) -> list[str]:
        lines = [self._paint(f"error[{error.code}]:", "31;1") + f" {plain(error.message)}"]
        if error.where is not None and str(error.where):
            lines.append(f"  --> {plain(error.where)}")
        if error.help and not short:
            lines.append(f"  help: {plain(error.help)}")
        return lines

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    def _clear(self) -> None:
        if self._bar:
            self._write(sys.stderr, "\r" + " " * len(self._bar) + "\r")
            self._bar = ""

    def _write(self, stream: Any, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except UnicodeEncodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            # The reader went away or its disk is full; the work goes on. Keep the interpreter's own flush
            # at exit quiet, too.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def progress(self, title: str, unit: str = "MB/s") -> Progress:
        """Return a progress line; without ``unit`` it counts steps instead of bytes."""
        return Progress(self, title, unit)


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "+-±" or text == ""


class Progress:
    """A progress line: redrawn on a terminal, one line a minute elsewhere (fault H9)."""

    def __init__(self, out: Output, title: str, unit: str) -> None:
        self._out = out
        self._title = title
        self._unit = unit
        self._begin = time.monotonic()
        self._last = self._begin
        self._tty = sys.stderr.isatty()

    def __call__(self, done: int, total: int, title: str | None = None) -> None:
        """Redraw; a new ``title`` starts another phase on the same line."""
        if title is not None and title != self._title:
            self._title = title
            self._begin = time.monotonic()
        if not self._out.show_progress:
            return
        now = time.monotonic()
        if now - self._last < (0.1 if self._tty else 60):
            return
        with self._out._lock:
            self._last = now
            elapsed = now - self._begin
            share = done / max(total, 1)
            left = elapsed / share - elapsed if share > 0 else 0
            rate = f"  {done / max(elapsed, 1e-9) / 1e6:,.0f} {self._unit}" if self._unit else ""
            counted = (
                f"  {share:4.0%}{rate}  {_clock(left)} left" if total > 1 else ""
            )  # else a step's name is all
            text = self._title + counted
            if self._tty:
                width = 24 if counted else 0
                full = int(share * width)
                text = f"{self._title}  {'━' * full}{'╌' * (width - full)}{counted}"
                self._out._write(sys.stderr, "\r" + text.ljust(len(self._out._bar)))
                self._out._bar = text
            else:
                self._out._write(sys.stderr, text + "\n")

    def close(self) -> None:
        with self._out._lock:
            self._out._clear()


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )


def size(count: float) -> str:
    """Return bytes in decimal units: 15.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """Return a parameter count: 7.6B, 1.3M."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000 or unit == "B":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError
