"""One BLAS thread while matrices are decomposed.

NumPy's BLAS splits a product over as many threads as the machine has cores, and how it splits can
decide the last bits of a sum. Work is spread over threads here, in pieces that belong to the
computation and not to the machine, so the library's own threads are switched off meanwhile.

OpenBLAS (NumPy's wheels) and MKL are known; with another library, say Apple's Accelerate, nothing
is switched and its own rules hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

_NAMES = [
    (f"{prefix}openblas_get_num_threads{suffix}", f"{prefix}openblas_set_num_threads{suffix}")
    for prefix in ("", "scipy_")
    for suffix in ("", "64_", "_64", "64")
] + [("MKL_Get_Max_Threads", "MKL_Set_Num_Threads")]

_lock = threading.Lock()
_users = 0
_before: list[int] = []


@cache
def _controls() -> tuple[tuple[Callable[[], int], Callable[[int], None]], ...]:
    """Return (get, set) of every BLAS library that NumPy may be calling."""
    found = []
    for path in _libraries():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for get, put in _NAMES:
            if hasattr(library, get) and hasattr(library, put):
                found.append((getattr(library, get), getattr(library, put)))
                break
    return tuple(found)


def _libraries() -> list[str]:
    """Return loaded libraries that look like BLAS; where that cannot be asked, those NumPy brings along."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        loaded = {line[line.index("/") :] for line in lines if "/" in line}
    except OSError:
        package = Path(np.__file__).parent
        places = (package.parent / "numpy.libs", package / ".dylibs")
        loaded = {str(p) for place in places if place.is_dir() for p in place.iterdir()}
    return sorted(p for p in loaded if any(w in Path(p).name for w in ("openblas", "mkl_rt")))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep BLAS calls of this process on the thread that makes them; nests, and ends with the last user."""
    global _users
    with _lock:
        if _users == 0:
            _before[:] = [get() for get, _ in _controls()]
            for _, put in _controls():
                put(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for (_, put), count in zip(_controls(), _before, strict=True):
                    put(count)
