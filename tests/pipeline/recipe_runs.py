"""What tests of recipes share: recipes as text, the trained models, a few records of calibration text."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "cli")]

import task  # noqa: E402

MODELS = TESTS / "models"

MERGE = """\
version: 1
name: demo
models:
  long: {models}/long
  short: {models}/short
steps:
  - id: merged
    merge:
      method: ties
      base: short
      models: [{{model: long, weight: 1.0, density: 0.5}}]
"""

EXPORT = """\
  - id: wide
    export: {dtype: float32}
"""

SCORES = """\
  - id: scores
    eval: {model: merged, baseline: long, perplexity: ./texts.jsonl}
"""


def recipe(folder: Path, *parts: str, name: str = "recipe.yaml") -> Path:
    """Write a recipe that begins with a merge of the trained models; further parts follow it."""
    path = folder / name
    path.write_text(MERGE.format(models=MODELS) + "".join(parts))
    return path


def texts(folder: Path, records: int = 3) -> Path:
    """Write a few exchanges as the trained models have them."""
    path, drawn = folder / "texts.jsonl", random.Random(4)
    with open(path, "w") as stream:
        for question in itertools.islice(task.questions("train", 0), records):
            stream.write(
                json.dumps({"prompt": question.text, "response": task.solve(question, 1.0, drawn)}) + "\n"
            )
    return path
