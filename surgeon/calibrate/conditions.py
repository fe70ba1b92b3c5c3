"""The surroundings of a computation: number of threads, and what exhausted memory is reported as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from surgeon.errors import EnvironmentFault


@contextmanager
def memory_faults(stage: str) -> Iterator[None]:
    """Turn exhausted memory into a refusal that names the stage."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EnvironmentFault("E504", f"the memory is used up in {stage}", help="set --memory-limit, or a smaller batch") from error  # fmt: skip
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise EnvironmentFault("E504", f"the memory is used up in {stage}", help="set --memory-limit, or a smaller batch") from error  # fmt: skip


def threads(count: int | None) -> Any:
    """Return a context in which torch computes with so many threads; None leaves them alone."""
    return nullcontext() if count is None else _with_threads(count)


@contextmanager
def _with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
