"""One measurement: what is measured on what, and the results of its layers, each a file until the table is complete."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Interrupted, UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize.allocation import sensitivity_file
from surgeon.quantize.allocation.sensitivity import Kind, Sensitivities, union
from surgeon.quantize.forms import Form
from surgeon.quantize.solving import Options

Tell = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

VERSION = 1
OF_QUANTIZER = ("method", "order", "damp", "block", "clip")
"""Options that change what one matrix becomes when its inputs are those of the unquantized model."""


@dataclass(frozen=True)
class Job:
    """One measurement; see `surgeon.quantize.measuring.measure` for what is not explained here.

    Attributes:
        layers: as given; those without a matrix are empty, so that place and number agree.
        about: everything the losses depend on, as plain data.
    """

    kind: Kind
    checkpoint: Checkpoint
    layers: tuple[tuple[Matrix, ...], ...]
    menu: tuple[Scheme, ...]
    form: Form
    samples: tuple[np.ndarray, ...]
    settings: Settings
    options: Options
    folder: Path
    search: tuple[np.ndarray, ...]
    groups: Mapping[str, str]
    seed: int
    tell: Tell
    stop: threading.Event | None
    about: Mapping[str, Any]
    _known: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, kind: Any, checkpoint: Checkpoint, layers: Sequence[Sequence[Matrix]], menu: Sequence[Scheme], form: Form,
        samples: Sequence[np.ndarray], settings: Settings, options: Options, folder: Path,
        search: Sequence[np.ndarray], groups: Mapping[str, str] | None, seed: int, tell: Tell,
        stop: threading.Event | None,
    ) -> Job:  # fmt: skip
        """Return a job, refused where text is missing.

        Raises:
            UsageError: E475.
        """
        if kind != "weight" and not len(samples):
            raise UsageError("E475", f"a sensitivity by {kind} is measured on text, and there is none",
                             help="give calibration text, or measure by weight")  # fmt: skip
        if kind == "kl" and not len(search):
            raise UsageError("E475", "there is no text on which divergences can be measured",
                             help="give more calibration text, or measure by rel-output")  # fmt: skip
        if len({scheme.name for scheme in menu}) != len(menu) or not menu:
            raise ValueError(f"the menu is {[scheme.name for scheme in menu]}")
        about: dict[str, Any] = {
            "version": VERSION, "schemes": [scheme.name for scheme in menu], "form": [form.name, form.scale_dtype],
            "quantizer": {name: getattr(options, name) for name in OF_QUANTIZER if kind != "weight" or name == "clip"},
            "checkpoint": [header.sha256 for header in checkpoint.headers],
            "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in checkpoint.headers],
            "view": getattr(checkpoint, "identity", ""), "config": _digest(checkpoint.config),
            "matrices": _digest([matrix.label for layer in layers for matrix in layer]),
            "calibration": "" if kind == "weight" else digest_of(samples),
        }  # fmt: skip
        if kind != "weight":
            about |= {"dtype": settings.dtype, "torch": torch.__version__}
        if kind == "fisher":
            about["seed"] = seed
        if kind == "kl":
            about |= {"search": digest_of(search), "groups": _digest(sorted((groups or {}).items()))}
        return cls(kind, checkpoint, tuple(map(tuple, layers)), tuple(menu), form, tuple(samples), settings, options, folder,
                   tuple(search), dict(groups or {}), seed, tell, stop, about)  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """Of the schemes."""
        return tuple(scheme.name for scheme in self.menu)

    @property
    def key(self) -> str:
        """Of everything the losses depend on."""
        return sensitivity_file.key(self.kind, self.about)

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(map(len, self.samples))

    @property
    def data_free(self) -> bool:
        """Whether the quantizer looks at no text, whatever is measured on it."""
        return self.options.method == "rtn" or all(scheme.kind != "int" for scheme in self.menu)

    def check_stop(self) -> None:
        """Raise E130 when the measurement is to end."""
        if self.stop is not None and self.stop.is_set():
            raise Interrupted(
                "E130", "interrupted while sensitivities were measured; finished layers are kept"
            )

    # ---- layers --------------------------------------------------------------------------------------

    def rows(self, matrices: Sequence[Matrix]) -> np.ndarray:
        """Return a table of these matrices in which nothing is measured, NaN [M, S]."""
        return np.full((len(matrices), len(self.menu)), np.nan)

    def table(self, matrices: Sequence[Matrix], losses: np.ndarray, tokens: Sequence[int]) -> Sensitivities:
        """Return losses [M, S] of some matrices as a table."""
        return Sensitivities(
            self.kind, tuple(matrix.label for matrix in matrices), self.names, losses, np.array(tokens, dtype=np.int64),
            np.array([matrix.elements for matrix in matrices], dtype=np.int64), dict(self.about),
        )  # fmt: skip

    def _file(self, layer: int) -> Path:
        return self.folder / f"unfinished-{self.key}" / f"layer-{layer:04d}.json"

    def keep(self, layer: int, losses: np.ndarray, tokens: Sequence[int]) -> None:
        """Keep the losses of one layer's matrices."""
        sensitivity_file.save(self._file(layer), self.table(self.layers[layer], losses, tokens))

    def kept(self, layer: int) -> Sensitivities | None:
        """Return what an earlier run found for a layer."""
        if not self._file(layer).is_file():
            return None
        try:
            return sensitivity_file.load(self._file(layer), kind=self.kind, about=self.about)
        except InputError:  # damaged
            return None

    def done(self, layer: int) -> bool:
        """Whether a layer's losses are known, or there is nothing to know."""
        if layer >= len(self.layers) or not self.layers[layer] or layer in self._known:
            return True
        if self.kept(layer) is None:
            return False
        self._known.add(layer)
        return True

    @property
    def complete(self) -> bool:
        """Whether all layers are done."""
        return all(map(self.done, range(len(self.layers))))

    def together(self) -> Sensitivities:
        """Return the table of all layers; losses of experts that no token reached are filled in.

        Divergences are measured all the same, on another text, and stay what they are.
        """
        found = [self.kept(layer) for layer in range(len(self.layers)) if self.layers[layer]]
        assert None not in found
        if self.kind == "kl":
            return union([one for one in found if one is not None])
        like = {
            m.label: f"layer {m.layer} {projection(m)}" for layer in self.layers for m in layer if m.routed
        }
        return union([one for one in found if one is not None]).filled(like)

    def forget(self) -> None:
        """Remove the files of single layers; the table is complete."""
        self._known.clear()
        place = self._file(0).parent
        for path in place.glob("*.json"):
            path.unlink(missing_ok=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def projection(matrix: Matrix) -> str:
    """Return what a routed matrix has in common with those of other experts: its name without the expert's number."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", matrix.tensor)


def digest_of(samples: Sequence[np.ndarray]) -> str:
    """Return what identifies a text: of token ids, one array a sample."""
    digest = hashlib.sha256()
    for sample in samples:
        ids = np.ascontiguousarray(sample, dtype="<i8").reshape(-1)
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
