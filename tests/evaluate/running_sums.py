"""The trained models and the questions they answer, for the evaluation tests."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODELS = TESTS / "models"
sys.path[:0] = [str(MODELS), str(TESTS / "cli"), str(TESTS / "architectures")]

import task  # noqa: E402


def asked(count: int, seed: int = 0) -> list[task.Question]:
    """Return held-out questions."""
    return list(itertools.islice(task.questions("test", seed), count))
