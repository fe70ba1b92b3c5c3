"""The state of an unfinished pass on disk: what is done, by whom, and whether it can be believed.

A pass with a spill folder keeps there, after every stage, the hidden states at the boundary and the
observer's state. One small file written last says which files these are and what their sha256 is,
and for which inputs they hold. Anything that does not fit is ignored and the pass starts over.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from surgeon.errors import EnvironmentFault, OutputConflict, Where

_LOG = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"


class PassFolder:
    """The folder of one pass inside the spill folder; its name is the pass's identity.

    Args:
        spill: the folder a caller gives for such things.
        identity: everything the results depend on, as plain data.
    """

    def __init__(self, spill: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.path = spill / f"pass-{self.identity[:20]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault("E502", f"cannot make the folder for activations: {error.strerror}",
                                   where=Where(str(self.path)), help="choose another folder for them") from error  # fmt: skip

        self._lock = _locked(self.path / "lock")

    def close(self) -> None:
        """Let others have the folder; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def activations(self, stage: int) -> Path:
        """Return the file of a stage's activations; two take turns, so the last complete one survives."""
        return self.path / f"activations-{stage % 2}.bin"

    def save(self, stage: int, digests: list[str], observer: Mapping[str, np.ndarray] | None) -> None:
        """Record that a stage is complete, its activations being on disk already."""
        packed = io.BytesIO()
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in (observer or {}).items()}
        np.savez(packed, allow_pickle=False, **arrays)
        content = packed.getvalue()
        name = f"observer-{stage % 2}.npz"
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "stage": stage,
            "activations": digests,
            "observer": None
            if observer is None
            else {"file": name, "sha256": hashlib.sha256(content).hexdigest()},
        }
        try:
            if observer is not None:
                _write(self.path / name, content)
            _write(self.path / STATE, json.dumps(state, sort_keys=True).encode())
        except OSError as error:
            raise EnvironmentFault("E501", f"cannot write the state of the pass: {error.strerror}",
                                   where=Where(str(self.path)), help="free disk space") from error  # fmt: skip

    def load(self) -> tuple[int, list[str], dict[str, np.ndarray] | None] | None:
        """Return (stage, digests of its activations, the observer's state), or None when nothing can be used."""
        try:
            raw = json.loads((self.path / STATE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            return self._unusable("its state cannot be read")
        try:
            if raw["format"] != FORMAT or raw["identity"] != self.identity:
                return self._unusable("it belongs to another pass")
            stage, digests, entry = raw["stage"], raw["activations"], raw["observer"]
            if type(stage) is not int or stage < 0 or not all(isinstance(d, str) for d in digests):
                return self._unusable("its state is damaged")
            if entry is None:
                return stage, list(digests), None
            if entry["file"] != f"observer-{stage % 2}.npz":
                return self._unusable("its state is damaged")
            content = (self.path / entry["file"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                return self._unusable("the observer's state is damaged")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return stage, list(digests), {name: arrays[name] for name in arrays.files}
        except (KeyError, TypeError, ValueError, OSError) as error:
            return self._unusable(f"its state is damaged ({type(error).__name__})")

    def _unusable(self, why: str) -> None:
        _LOG.warning("the unfinished pass in %s is not continued: %s", self.path, why)

    def forget(self) -> None:
        """Remove the note of what is done, before anything it speaks of is overwritten."""
        (self.path / STATE).unlink(missing_ok=True)


def _locked(path: Path) -> IO[bytes] | None:
    """Hold a lock file until it is closed or the process ends; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "ab")  # noqa: SIM115  (held for as long as the pass)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OutputConflict("E603", "the same pass is running already, with the same folder for its activations",
                             where=Where(str(path.parent)), help="wait for it, or give another folder") from None  # fmt: skip
    except OSError:  # network shares without locks: nothing worse than without one
        pass
    return file


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
