"""Replies on disk: appended one by one, so that an interrupted evaluation continues.

Each line is a record that other commands read as data (prompt and response, or messages), plus
what identifies it: the run (model digest and settings), the question, the sample and the prompt's
tokens. The first line also says the run's settings in full, so that a mismatch can be named.

Codes: E395 the file is damaged; E601 it is no file of replies, E603 another process writes it,
E605 it belongs to another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, OutputConflict, Where


@dataclass(frozen=True)
class Written:
    """One reply: its text, how many tokens it has, whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


def run_digest(identity: dict[str, Any]) -> str:
    """Return the name of a run: everything that decides its replies."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def prompt_digest(ids: tuple[int, ...]) -> str:
    """Return a short digest of a prompt's token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


class ReplyFile:
    """A file of replies, open for appending; without a path replies are kept in memory only."""

    def __init__(self, path: Path | None, identity: dict[str, Any], *, resume: bool = True) -> None:
        """Open and read what is there.

        Args:
            path: the file; its folder must exist.
            identity: model digest and settings; see `run_digest`.
            resume: False discards replies of another or the same run.

        Raises:
            OutputConflict: E601, E603, E605. InputError: E395.
        """
        self.path = path
        self.identity = identity
        self.run = run_digest(identity)
        self.known: dict[tuple[str, int, str], Written] = {}
        self._stream: Any = None
        if path is None:
            return
        if path.is_dir() or not path.parent.is_dir():
            raise OutputConflict("E601", f"{printable(str(path))} cannot be a file of replies",
                                 help="give a file in an existing folder, such as samples.jsonl")  # fmt: skip
        self._stream = open(path, "a+b")  # noqa: SIM115 it lives as long as the run
        try:
            self._lock()
            self._read(resume)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputConflict("E603", f"another run is writing {printable(str(self.path))}",
                                     help="wait for it, or choose another --samples-out") from None  # fmt: skip

    def _read(self, resume: bool) -> None:
        self._stream.seek(0)
        raw = self._stream.read()
        end = raw.rfind(b"\n") + 1
        lines = raw[:end].splitlines()
        if raw and (not lines or not _is_ours(lines[0])) and not (not lines and raw[:1] == b"{"):
            raise OutputConflict("E601", f"{printable(str(self.path))} is no file of replies",
                                 help="it would be appended to; choose another --samples-out")  # fmt: skip
        if not resume:
            self._cut(0)
            return
        for number, line in enumerate(lines, 1):
            self._take(line, number)
        if end < len(raw):  # a line that was being written when the run ended
            self._cut(end)

    def _take(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            place = (entry["question_key"], int(entry["sample"]), entry["prompt_ids"])
            text = entry["response"] if "response" in entry else entry["messages"][-1]["content"]
            written = Written(text, int(entry["tokens"]), bool(entry["finished"]))
            run = entry["run"]
        except (ValueError, KeyError, TypeError, IndexError):
            raise InputError("E395", f"line {number} is not a reply", where=Where(str(self.path), number),
                             help="the file was changed by hand; --no-resume starts it over") from None  # fmt: skip
        if run != self.run:
            said = entry.get("settings") if number == 1 else None
            raise OutputConflict("E605", f"{printable(str(self.path))} belongs to another run{_differences(said, self.identity)}",
                                 help="repeat that run's settings to continue it, choose another --samples-out, or start over: --no-resume")  # fmt: skip
        self.known[place] = written

    def _cut(self, size: int) -> None:
        self._stream.truncate(size)
        self._stream.flush()

    def find(self, key: str, sample: int, ids: tuple[int, ...]) -> Written | None:
        """Return a reply that is known already."""
        return self.known.get((key, sample, prompt_digest(ids)))

    def add(self, key: str, sample: int, ids: tuple[int, ...], chat: list[dict[str, str]], domain: str, reply: Written) -> None:  # fmt: skip
        """Append one reply."""
        place = (key, sample, prompt_digest(ids))
        first = not self.known
        self.known[place] = reply
        if self._stream is None:
            return
        if len(chat) == 1:
            entry: dict[str, Any] = {"prompt": chat[0]["content"], "response": reply.text}
        else:
            entry = {"messages": [*chat, {"role": "assistant", "content": reply.text}]}
        entry |= {"domain": domain} if domain else {}
        entry |= {"tokens": reply.tokens, "finished": reply.finished, "sample": sample, "question_key": key,
                  "prompt_ids": place[2], "run": self.run}  # fmt: skip
        entry |= {"settings": self.identity} if first else {}
        self._stream.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def _is_ours(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and {"question_key", "run", "sample"} <= set(entry)


def _differences(theirs: Any, ours: dict[str, Any]) -> str:
    if not isinstance(theirs, dict):
        return ""
    changed = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
    shown = [
        "another model" if k == "model" else f"{k} {theirs.get(k)} there, {ours.get(k)} here" for k in changed
    ]
    return f": {printable('; '.join(shown[:3]))}" if shown else ""
