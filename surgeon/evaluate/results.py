"""The result document on disk: written in one step, and read again as a baseline.

Codes: E395 a baseline that cannot be used, E502 it cannot be written, E601 the file is something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import Located
from surgeon.checkpoint.strict_json import MAX_JSON_BYTES, read_json_object
from surgeon.errors import EnvironmentFault, InputError, OutputConflict, Where
from surgeon.evaluate.metrics import Outcomes
from surgeon.evaluate.model import Described
from surgeon.evaluate.questions import Question, QuestionSet
from surgeon.evaluate.request import EvalRequest

LARGEST = 8 * MAX_JSON_BYTES
"""A result has a few numbers for every question and sample."""


def read_result(path: Path) -> dict[str, Any]:
    """Read a result document of eval (E395 when it is none)."""
    content = read_json_object(path, LARGEST)
    if content.get("command") != "eval" or not isinstance(content.get("metrics"), dict):
        raise InputError("E395", f"{printable(path.name)} is no result of surgeon eval", where=Where(str(path)),
                         help="give a model, or a file written by surgeon eval -o")  # fmt: skip
    return content


def per_question(outcomes: Outcomes, questions: QuestionSet) -> list[dict[str, Any]]:
    """Return every question's outcomes, for pairing with later runs."""
    rows = []
    for i, question in enumerate(questions.questions):
        row: dict[str, Any] = {"key": question.key, "line": question.line, "tokens": outcomes.tokens[i].tolist(),
                               "finished": outcomes.finished[i].tolist(), "reflective": outcomes.reflective[i].tolist()}  # fmt: skip
        row |= {"domain": question.domain} if question.domain else {}
        if outcomes.correct is not None and question.rule is not None:
            row |= {"correct": outcomes.correct[i].tolist(), "rule": rule_key(question)}
        rows.append(row)
    return rows


def rule_key(question: Question) -> str:
    plain = question.rule.plain() if question.rule else None
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def recorded(model: dict[str, Any], path: Path) -> Described:
    """Return a baseline's model as its result document recorded it."""
    name = str(model.get("name", path.stem))
    return Described(
        name, Located(Path(str(model.get("path", ""))), name), int(model.get("parameters") or 0), int(model.get("bytes") or 0),
        str(model.get("dtype", "")), str(model.get("sha256", "")), {},
    )  # fmt: skip


def outcomes_of(rows: Any, questions: QuestionSet, length: bool, path: Path) -> Outcomes:
    """Return a baseline's outcomes for exactly these questions (E395 when it has not all of them)."""
    help = "evaluate the baseline on these questions, or give its model"
    try:
        by_key = {row["key"]: row for row in rows or ()}
        chosen = [by_key[q.key] for q in questions.questions if q.key in by_key]
        missing = len(questions.questions) - len(chosen)
        if missing:
            raise InputError("E395", f"the baseline {printable(path.name)} lacks {missing} of the {len(questions.questions)} questions",
                             where=Where(str(path)), help=help)  # fmt: skip
        if not length and any(
            row.get("rule") != rule_key(q) for q, row in zip(questions.questions, chosen, strict=True)
        ):
            raise InputError("E395", f"the baseline {printable(path.name)} was judged by other answers", where=Where(str(path)), help=help)  # fmt: skip
        return Outcomes(
            tuple(row["key"] for row in chosen), tuple(row.get("domain", "") for row in chosen),
            None if length else np.array([row["correct"] for row in chosen], dtype=bool),
            np.array([row["tokens"] for row in chosen], dtype=np.int64),
            np.array([row["finished"] for row in chosen], dtype=bool),
            np.array([row["reflective"] for row in chosen], dtype=bool),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise InputError("E395", f"{printable(path.name)} does not say how each question was answered", where=Where(str(path)), help=help) from None  # fmt: skip


def check_output(request: EvalRequest) -> None:
    """Refuse a result file that would replace something else (E601) or cannot be written (E502)."""
    replies = request.reply_file() if request.samples_out else None
    if replies is not None:
        _check_folder(replies, "replies")
    path = request.result_file()
    if path is None:
        return
    if path.suffix != ".json":
        raise OutputConflict("E601", f"the result is one JSON file; {printable(path.name)} does not end in .json",
                             help="-o result.json; --report writes pages and plots")  # fmt: skip
    if path.is_dir():
        raise OutputConflict(
            "E601", f"{printable(str(path))} is a folder", help="give a file: -o result.json"
        )
    _check_folder(path, "result")
    if path.exists() and not request.overwrite:
        try:
            ours = read_json_object(path, LARGEST).get("command") == "eval"
        except InputError:
            ours = False
        if not ours:
            raise OutputConflict("E601", f"{printable(str(path))} exists and is no result of surgeon eval",
                                 help="choose another -o, or --overwrite")  # fmt: skip


def _check_folder(path: Path, what: str) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise EnvironmentFault("E502", f"the folder for the {what} does not exist: {printable(str(parent))}",
                               help=f"mkdir -p '{printable(str(parent))}'")  # fmt: skip
    if not os.access(parent, os.W_OK):
        raise EnvironmentFault("E502", f"no permission to write into {printable(str(parent))}",
                               help="give a file in a folder of your own")  # fmt: skip


def save(document: dict[str, Any], request: EvalRequest) -> None:
    """Write the result file in one step; remove the replies that were only kept to continue.

    Raises:
        EnvironmentFault: E502.
    """
    path = request.result_file()
    if path is None:
        return
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise EnvironmentFault(
            "E502", f"cannot write {printable(str(path))}: {error.strerror}", help="choose another file"
        ) from error
    if not request.samples_out:
        for role in ("", "baseline"):
            kept = request.reply_file(role)
            if kept is not None:
                kept.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
