"""Pieces of one computation, done by its owner and by whoever waits for its result.

Several threads may ask for the same thing, say the factors of one matrix. One of them computes it;
the others lend a hand instead of sleeping. The pieces are fixed by the computation, so the result
does not depend on how many hands there were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Spread = Callable[[Callable[[int], None], int], None]
"""``spread(work, count)`` calls work(0) .. work(count - 1), in any order, and returns when all are done."""


def serially(work: Callable[[int], None], count: int) -> None:
    """Do all pieces here, one after the other."""
    for i in range(count):
        work(i)


class Crew:
    """One owner, any number of helpers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._work: Callable[[int], None] | None = None
        self._next = self._count = self._running = 0
        self._failure: BaseException | None = None
        self._closed = False

    def spread(self, work: Callable[[int], None], count: int) -> None:
        """Do all pieces together with the helpers (owner only); raise what the first failing piece raised."""
        with self._changed:
            self._work, self._next, self._count = work, 0, count
            self._changed.notify_all()
        self._take()
        with self._changed:
            while self._running:
                self._changed.wait()
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def assist(self) -> None:
        """Help until the owner closes the crew."""
        while True:
            with self._changed:
                while not self._closed and self._next >= self._count:
                    self._changed.wait()
                if self._closed:
                    return
            self._take()

    def close(self) -> None:
        """Send the helpers away."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self) -> None:
        while True:
            with self._changed:
                if self._next >= self._count:
                    return
                piece, work = self._next, self._work
                self._next += 1
                self._running += 1
            try:
                assert work is not None
                work(piece)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._next = self._count
            finally:
                with self._changed:
                    self._running -= 1
                    if not self._running:
                        self._changed.notify_all()
