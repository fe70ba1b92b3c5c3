"""The state of an unfinished training run on disk: written beside the last one, believed only when it is complete."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import EnvironmentFault, Where

_LOG = logging.getLogger(__name__)

FORMAT = 1
NOTE = "state.json"


class SavedState:
    """A folder that holds the last state of one run; its name is the run's identity.

    Two files take turns. A small note written last says which of them counts and what its sha256 is, so
    a run that is killed while it saves goes on from the state before.

    Args:
        work: the folder a caller gives for such things.
        identity: everything the result depends on, as plain data.
    """

    def __init__(self, work: Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.path = Path(work) / f"train-{self.identity[:20]}"
        self._turn = 0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault("E502", f"cannot make the folder for the state of training: {error.strerror}",
                                   where=Where(str(self.path)), help="choose another folder for it") from error  # fmt: skip

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the last state; tensors, numbers, texts, lists and dictionaries only."""
        name = f"state-{self._turn}.pt"
        try:
            temporary = self.path / (name + ".new")
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
            with (self.path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            note = self.path / (NOTE + ".new")
            with note.open("w") as file:
                json.dump({"format": FORMAT, "identity": self.identity, "file": name, "sha256": digest}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(note, self.path / NOTE)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise EnvironmentFault("E501", f"cannot write the state of training: {str(error)[:200]}",
                                   where=Where(str(self.path)), help="free disk space") from error  # fmt: skip
        self._turn = 1 - self._turn

    def load(self) -> dict[str, Any] | None:
        """Return the last state with its tensors on the CPU, or None when there is none that can be believed."""
        try:
            note = json.loads((self.path / NOTE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return self._unusable("its note cannot be read")
        if (
            not isinstance(note, dict)
            or note.get("format") != FORMAT
            or note.get("identity") != self.identity
        ):
            return self._unusable("it belongs to another run")
        name = note.get("file")
        if name not in ("state-0.pt", "state-1.pt"):
            return self._unusable("its note is damaged")
        try:
            with (self.path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != note.get("sha256"):
                    return self._unusable("it is damaged")
            state = torch.load(self.path / name, map_location="cpu", weights_only=True)
        except OSError as error:
            return self._unusable(f"it cannot be read ({error.strerror})")
        self._turn = 1 - int(name == "state-1.pt")
        return state

    def _unusable(self, why: str) -> None:
        _LOG.warning("the unfinished training in %s is not continued: %s", self.path, why)

    def clear(self) -> None:
        """Remove the state; the run is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
