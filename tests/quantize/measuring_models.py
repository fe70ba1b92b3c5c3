"""Tiny models opened as checkpoints and as stock models, with texts, menus and forms to measure sensitivities with."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from surgeon.calibrate.matrices import Matrix, matrices_of
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import open_path
from surgeon.formats.compressed_runtimes import Reader
from surgeon.formats.scheme import Scheme
from surgeon.quantize import forms
from surgeon.quantize.measuring import measure
from surgeon.quantize.solving import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibrate"))
from walk_models import model_folder, stock, texts

MENU = tuple(Scheme("int", bits, -1) for bits in (2, 3, 4, 8))
NAMES = tuple(scheme.name for scheme in MENU)
SETTINGS = Settings(threads=1)
LENGTHS = (48, 48, 41, 48, 33, 48)
"""266 tokens: more than four for each input, so that dense Hessians are taken as they are."""
RTN, GPTQ = Options(method="rtn", clip=False), Options(method="gptq", clip=False)
"""Without the search for ranges, which takes most of the time of matrices as small as these."""


class Model:
    """One tiny model, opened both ways, with a text."""

    def __init__(self, family: str, **extra) -> None:
        self.folder = model_folder(family, tuple(sorted(extra.items())))
        self.checkpoint = open_path(self.folder)
        self.layers = matrices_of(self.checkpoint, Skeleton(self.checkpoint, SETTINGS))
        self.form = forms.get("compressed-tensors", Reader(dtype="F32"), family)
        self.samples = texts(LENGTHS)

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix for layer in self.layers for matrix in layer]

    def measure(self, kind, folder, options=RTN, **changes):
        given = {"layers": self.layers, "menu": MENU, "samples": self.samples, **changes}
        layers, menu, samples = given.pop("layers"), given.pop("menu"), given.pop("samples")
        settings = given.pop("settings", SETTINGS)
        return measure(
            kind, self.checkpoint, layers, menu, self.form, samples, settings, options, folder, **given
        )

    def stock(self):
        return stock(self.folder, dtype=torch.float32, experts_implementation="eager")


class Scaled:
    """A checkpoint with some tensors multiplied."""

    def __init__(self, checkpoint, factors) -> None:
        self._checkpoint, self._factors = checkpoint, dict(factors)
        self.identity = f"scaled by {sorted(self._factors.items())}"

    def __getattr__(self, name):
        return getattr(self._checkpoint, name)

    def read(self, name, start, stop):
        return self._checkpoint.read(name, start, stop) * np.float32(self._factors.get(name, 1.0))
