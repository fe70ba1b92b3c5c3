"""Progress bars for Python: in a terminal, and in a notebook without widgets."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

SHOWN = 8
"""Steps that are shown at once; of longer work the latest."""
PAUSE = 0.2
"""Seconds between two drawings in a notebook."""


class Bars:
    """A progress callback that draws one bar for each step of the work.

    A function it is given to closes it at the end, and it can be given to the next. Where there is neither a terminal nor a
    notebook, it draws nothing.

    Args:
        console: where the bars go; default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._notebook = console is None and in_notebook()
        self._console = console or Console(stderr=True)
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._draw: Callable[[], None] | None = None
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """Draw how far a step is."""
        with self._lock:
            if self._progress is None:
                self._open()
            assert self._progress is not None
            if what not in self._tasks:
                self._tasks[what] = self._progress.add_task(what, total=max(total, 1))
                for old in list(self._tasks)[:-SHOWN]:
                    self._progress.remove_task(self._tasks.pop(old))
            self._progress.update(self._tasks[what], completed=min(done, max(total, 1)), total=max(total, 1))
            if self._draw is not None and (time.monotonic() - self._last >= PAUSE):
                self._redraw()

    def close(self) -> None:
        """Draw the last state and leave it there; the next call begins anew."""
        with self._lock:
            if self._progress is None:
                return
            if self._draw is not None:
                self._redraw()
            else:
                self._progress.stop()
            self._progress, self._draw = None, None
            self._tasks.clear()

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=self._console, disable=not (self._notebook or self._console.is_terminal)
        )
        if not self._notebook:
            self._progress.start()
            return
        # rich draws into a widget, which a notebook may not have; what it would draw is shown as HTML instead.
        with contextlib.suppress(ImportError):
            display = importlib.import_module("IPython.display").display
            shown = self._progress
            handle: Any = display(shown, display_id=True)
            self._draw = lambda: handle.update(shown)

    def _redraw(self) -> None:
        assert self._draw is not None
        self._last = time.monotonic()
        self._draw()


def in_notebook() -> bool:
    """Say whether what is drawn goes to a notebook."""
    return Console().is_jupyter


def bars() -> Bars:
    """Return a progress callback that draws bars, in a terminal and in a notebook.

    Example:
        >>> surgeon.merge(["long", "short"], output="merged", progress=surgeon.bars())  # doctest: +SKIP
    """
    return Bars()
