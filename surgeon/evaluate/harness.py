"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness), when it is installed.

The model is the one this program loaded strictly; lm-eval only asks it. Its results become metrics
``task:NAME:METRIC``, with ``,FILTER`` behind the metric where a task has several filters.

Codes: E228 no such task, E398 a task failed; E512 lm-eval is missing, E524 its data is out of reach.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, UsageError, close_matches
from surgeon.evaluate.intervals import Z
from surgeon.evaluate.model import Loaded, one_line, quiet_transformers

INSTALL = "pip install 'model-surgeon[eval]'   (or: pip install lm_eval)"


def require() -> None:
    """Refuse tasks where lm-eval is not installed (E512)."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentFault("E512", "lm-eval is not installed: --tasks runs through it", help=INSTALL)


def run_tasks(
    loaded: Loaded, tasks: Sequence[str], *, include_path: str | None, limit: int | None, batch_size: int, seed: int, offline: bool
) -> dict[str, Any]:  # fmt: skip
    """Run tasks on a loaded model and return their metrics.

    Args:
        tasks: names lm-eval knows, of its own or from ``include_path``.
        include_path: a folder of task YAML files.
        limit: first documents of each task.
    """
    require()
    if offline:  # read by datasets when it is imported
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UsageError(
            "E228",
            f"--include-path {printable(include_path)} is no folder",
            help="the folder of your task YAML files",
        )
    # lm-eval writes remarks to standard output, where only results belong.
    with contextlib.redirect_stdout(sys.stderr), quiet_transformers():
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        manager = TaskManager(include_path=str(Path(include_path).expanduser()) if include_path else None)
        known = set(manager.all_tasks)
        for name in tasks:
            if name not in known:
                raise UsageError("E228", f"lm-eval has no task {printable(name)[:80]}",
                                 help=close_matches(name, known) or "lm-eval ls tasks shows all; --include-path adds your own")  # fmt: skip
        model: Any = HFLM(pretrained=loaded.model, tokenizer=loaded.encoder.tokenizer, batch_size=batch_size,
                          max_length=loaded.context or None)  # fmt: skip
        try:
            found = simple_evaluate(
                model=model, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=loaded.encoder.template,
                log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except (ConnectionError, TimeoutError) as error:
            raise EnvironmentFault("E524", f"lm-eval cannot reach a task's data: {one_line(error)}",
                                   help="download it elsewhere into the datasets cache, or use local data with --include-path") from error  # fmt: skip
        except Exception as error:
            raise InputError(
                "E398", f"lm-eval failed: {one_line(error)}", help=f"tasks: {', '.join(tasks)}"
            ) from error
    return metrics_of(found or {})


def metrics_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lm-eval's results into metrics; intervals from its standard errors, null where it gives none."""
    found: dict[str, Any] = {}
    counts = results.get("n-samples") or {}
    # Groups repeat their members' keys; their own rows carry the average.
    for task in sorted(results.get("results") or {}):
        row = results["results"][task]
        filters = {key.partition(",")[2] for key in row if "," in key}
        for key in sorted(row):
            metric, sign, filtered = key.partition(",")
            value = row[key]
            if (
                not sign
                or metric.endswith("_stderr")
                or isinstance(value, bool)
                or not isinstance(value, (int, float))
            ):
                continue
            error = row.get(f"{metric}_stderr,{filtered}")
            spread = Z * error if isinstance(error, (int, float)) and error == error else None
            sound = value == value and abs(value) != float("inf")
            name = f"task:{task}:{metric}" + (f",{filtered}" if len(filters) > 1 else "")
            count = (counts.get(task) or {}).get("effective")
            found[name] = {
                "value": float(value) if sound else None, "low": None if spread is None else value - spread,
                "high": None if spread is None else value + spread, "n": count,
            }  # fmt: skip
    return found
