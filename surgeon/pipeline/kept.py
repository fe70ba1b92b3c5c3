"""What a work folder remembers of finished steps: fingerprint, document, where the model lies.

OUT.work/steps/ID        models that later steps read
OUT.work/publish/OUT     the model that will be published, under its final name
OUT.work/results/ID.json a step's document, as its command prints it
OUT.work/baselines/      of a sweep: results of the models that all points are compared with
OUT.work/state/ID.json   what it was made from
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.measure.files import write_json
from surgeon.pipeline.digests import intact, made_digest
from surgeon.pipeline.publication import staged
from surgeon.recipe.recipe import Step

STEPS, PUBLISH, RESULTS, STATE, POINTS, BASELINES = (
    "steps",
    "publish",
    "results",
    "state",
    "points",
    "baselines",
)


@dataclass(frozen=True)
class Kept:
    """A finished step.

    Attributes:
        digest: of the model's manifest, None when the step makes no model.
        document: what its command printed.
    """

    fingerprint: str
    digest: str | None
    document: dict[str, Any]
    seconds: float


class Shelf:
    """The part of a work folder that belongs to one recipe, or to one point of a sweep."""

    def __init__(self, folder: Path, published: str | None, destination: Path) -> None:
        self.folder, self.published, self.destination = folder, published, destination

    def place(self, step: Step, *, file: bool) -> Path:
        """Return where a step's model is made; what will be published has its final name, which its card shows."""
        if step.id == self.published:
            return self.folder / PUBLISH / self.destination.name
        return self.folder / STEPS / (f"{step.id}.gguf" if file else step.id)

    def result(self, step: Step) -> Path:
        return self.folder / RESULTS / f"{step.id}.json"

    def make_folders(self) -> None:
        for name in (STEPS, PUBLISH, RESULTS, STATE):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def read(self, step: Step) -> Kept | None:
        """Return what is remembered of a step; None when nothing is, or it cannot be read."""
        try:
            state = json.loads((self.folder / STATE / f"{step.id}.json").read_bytes())
            document = json.loads(self.result(step).read_bytes())
            if not isinstance(document, dict):
                return None
            return Kept(str(state["fingerprint"]), state["digest"], document, float(state["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, step: Step, kept: Kept) -> None:
        """Remember a finished step; the state last, because it vouches for the result."""
        self.make_folders()
        state = self.folder / STATE / f"{step.id}.json"
        state.unlink(missing_ok=True)
        write_json(kept.document, self.result(step))
        write_json({"fingerprint": kept.fingerprint, "digest": kept.digest, "seconds": kept.seconds}, state)

    def left(self, step: Step, digest: str) -> bool:
        """Say whether a finished step's model was left unwritten here: all of it but the weights, undamaged."""
        from surgeon.unwritten.leaving import left

        place = self.place(step, file=False)
        return place.is_dir() and made_digest(place) == digest and left(place) is not None

    def find(self, step: Step, digest: str, *, file: bool) -> Path | None:
        """Return where the model of a finished step lies, verified: where it was made, or where it was published."""
        candidates = [self.place(step, file=file)]
        if step.id == self.published:
            candidates.append(self.destination)
            held = staged(self.destination, digest)
            candidates += [held] if held is not None else []
        return next(
            (path for path in candidates if path.exists() and made_digest(path) == digest and intact(path)),
            None,
        )
