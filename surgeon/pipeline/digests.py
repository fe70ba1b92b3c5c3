"""What a step depends on, as digests: its options, the models and files it reads, the program."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.api import open_model
from surgeon.checkpoint.digests import InputDigester
from surgeon.output.manifest import MANIFEST
from surgeon.recipe.recipe import Step, StepOutput, replaced

LARGEST_COMPANION = 256 << 20
"""Files beside the weights are read for their digest up to here; nothing larger belongs to a model."""


class Digests:
    """Digests of inputs, each computed once."""

    def __init__(self, *, offline: bool = False) -> None:
        self.offline = offline
        self._models: dict[str, str] = {}
        self._files: dict[Path, str] = {}

    def model(self, reference: str) -> str:
        """Return a digest of a model's weights and of the files beside them; weights already hashed are not read."""
        if reference not in self._models:
            self._models[reference] = self._model(reference)
        return self._models[reference]

    def _model(self, reference: str) -> str:
        with open_model(reference, offline=self.offline, dequantize=True) as opened:
            checkpoint = opened.checkpoint
            weights = InputDigester(list(checkpoint.headers)).finish()
            found = {path.name: digest for path, digest in weights.items()}
            folder = checkpoint.folder
            for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
                if path not in weights and path.is_file() and path.stat().st_size <= LARGEST_COMPANION:
                    found[path.name] = self.file(path)
        return _digest(found)

    def file(self, path: Path) -> str:
        """Return the digest of a file, or of the files below a folder."""
        if path not in self._files:
            if path.is_dir():
                inner = sorted(one for one in path.rglob("*") if one.is_file())
                self._files[path] = _digest({str(one.relative_to(path)): _sha256(one) for one in inner})
            else:
                self._files[path] = _sha256(path)
        return self._files[path]

    def step(self, step: Step, models: set[str], made: dict[str, str]) -> str:
        """Return the fingerprint of a step.

        Args:
            models: references of the recipe's models.
            made: step -> digest of what it made.
        """

        def known(value: Any) -> Any:
            if isinstance(value, StepOutput):
                return {"step": made[value.step]}
            if isinstance(value, str) and value in models:
                return {"model": self.model(value)}
            if isinstance(value, str):
                name, sign, text = value.rpartition("=")
                path = Path(text if sign else value)
                if path.is_absolute() and path.exists():
                    return {"file": self.file(path), "name": name}
            return value

        return _digest({"program": __version__, "verb": step.verb, "options": replaced(step.options, known)})


def made_digest(path: Path) -> str | None:
    """Return the digest of a model this program wrote: that of its manifest, which vouches for every file."""
    manifest = path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST}")
    return _sha256(manifest) if manifest.is_file() else None


def intact(path: Path) -> bool:
    """Say whether a model is what its manifest says, every file hashed."""
    from surgeon.errors import SurgeonError
    from surgeon.verify.static import verify_path

    try:
        if path.is_dir() or path.suffix == ".safetensors":
            return not verify_path(path, hashes=True).errors
        manifest = json.loads(path.with_name(f"{path.name}.{MANIFEST}").read_bytes())
        return manifest["files"][path.name] == _sha256(path)
    except (OSError, ValueError, KeyError, TypeError, SurgeonError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
