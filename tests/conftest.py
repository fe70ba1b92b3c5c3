"""Fixtures shared by all tests: a private cache folder, a fast scratch folder, tiny model folders."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import forge


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep digest caches of tests apart from the user's, and the network out of reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def scratch():
    """A folder in memory where there is one: fsync costs nothing there, the calls are the same."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    if place is not None and shutil.disk_usage(place).free < 1 << 30:
        place = None
    folder = Path(tempfile.mkdtemp(prefix="surgeon-test-", dir=place))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def long_short(scratch) -> tuple[Path, Path]:
    """Two fine-tunes of one tiny llama, as folders ``long`` and ``short``."""
    return forge.model_folder(scratch / "long", 1), forge.model_folder(scratch / "short", 2)
