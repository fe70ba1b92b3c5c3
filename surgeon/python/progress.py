"""How long work tells how far it is: one callback, the same three arguments everywhere."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Progress(Protocol):
    """Called with what is being done, how much of it is done, and how much there is; bytes of a merge, steps elsewhere.

    It may be called from any thread, and often: it should return at once. What it raises ends the work, as an
    interruption does: finished work is kept, and the same call goes on with it. Where it has a method ``close``, that is called when
    the function it was given to returns or raises.
    """

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


class Say(Protocol):
    """Called with one sentence at a time about what is decided and found."""

    def __call__(self, sentence: str, /) -> None: ...


@contextlib.contextmanager
def told(progress: Progress | Callable[[int, int], None] | None) -> Iterator[Progress | None]:
    """Give a function's callback for the time of its work, and close it afterwards.

    A callback of two parameters is called with (done, total).
    """
    try:
        yield of_three(progress)
    finally:
        close = getattr(progress, "close", None)
        if callable(close):
            close()


def telling(function: Function) -> Function:
    """Let a function's ``progress`` be any callback of `of_three`, and close it when the function ends."""

    @functools.wraps(function)
    def inner(*arguments: Any, progress: Any = None, **options: Any) -> Any:
        with told(progress) as tell:
            return function(*arguments, progress=tell, **options)

    return inner  # type: ignore[return-value]


def of_three(progress: Any) -> Progress | None:
    """Return a callback of three arguments; one that takes two is called with (done, total)."""
    if progress is None:
        return None
    try:
        found = inspect.signature(progress)
    except (TypeError, ValueError):  # a builtin without a signature
        return progress
    if not _takes(found, 3) and _takes(found, 2):
        return lambda _, done, total: progress(done, total)
    return progress


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def counted(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    """Return the callback of one step of the work: (done, total) of ``what``."""
    if progress is None:
        return None

    def tell(done: int, total: int) -> None:
        progress(what, done, total)

    return tell
